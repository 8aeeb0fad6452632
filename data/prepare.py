"""
Turn instruction data of any kind into one .jsonl file of conversations, the form that every trainer reads.

    reads    --data_path     a json, jsonl, csv or parquet file, a folder of them, or the id of a hub data set; or
             --dataset       names in --dataset_dir/dataset_info.json, LLaMA-Factory's list of data sets
    writes   --output_path   for each row a line {"messages": [{"role": ..., "content": ...}, ...]}
    then     python finetune.py --base_model BASE --data_path OUT.jsonl

    file     python data/prepare.py --data_path my_rows.csv
    hub      python data/prepare.py --data_path openai/gsm8k --subset main
    names    python data/prepare.py --dataset identity,alpaca_en_demo --dataset_dir ../LLaMA-Factory/data

Roles are system, user, assistant and tool. White space around an answer is taken off. A row that cannot be read as a
conversation stops the run with its file and number, or is left out with --skip_bad_rows. The forms: data/README.md.
"""

import csv
import functools
import glob
import io
import json
import random
import re
import sys
import traceback
from pathlib import Path
from typing import get_type_hints

import fire
import pyarrow.parquet as pq

KINDS = (".json", ".jsonl", ".csv", ".parquet")
FORMS = {  # {form: its columns, as dataset_info.json calls them}; a row has the first form whose first column it has
    "openai": {"messages": "messages"},
    "sharegpt": {"messages": "conversations"},
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output"},
    "question": {"prompt": "question", "response": "answer"},
    "verl": {"extra": "extra_info", "messages": "prompt"},
}
READABLE = """
    file_name hf_hub_url ms_hub_url om_hub_url subset split num_samples ranking formatting columns tags
    prompt query response history messages system tools
""".split()  # all that an entry of dataset_info.json may give
SPEAKERS = {  # {role: what data calls it, and which tag of dataset_info.json does}
    "system": "system system_tag",
    "user": "user human user_tag",
    "assistant": "assistant gpt function_call assistant_tag function_tag",
    "tool": "tool observation observation_tag",
}

# -----------------------------------------------------------------------------
# shared with the other scripts, word for word: tests/test_copies.py compares them


def run_cli(fn):
    """Call `fn` with the flags on the command line, once every flag has been checked against its type.

    By itself fire calls the function first and reports unknown flags afterwards (python-fire#168), and reads
    `--bf16 false` as a text that is true. So it is handed a stand-in that records the call. Flags are `--name value`,
    booleans `--name` or `--noname`. An error that the script itself raises (ValueError) is shown as its
    message alone; any other keeps its traceback.
    """
    hints, call = get_type_hints(fn), {}

    @functools.wraps(fn)
    def record(**flags):
        call.update(flags)

    if {"--help", "-h"} & set(sys.argv[1:]):
        fire.Fire(record, command=["--help"])  # leaves here
    fire.decorators.SetParseFn(str)(record)
    fire.Fire(record, command=[arg for arg in sys.argv[1:] if arg != "--"])  # leaves here on an unknown flag
    for name, text in call.items():
        hint = hints[name]
        if (hint is bool) != (text in ("True", "False")):  # what fire records for a flag that nothing follows
            raise SystemExit(f"--{name} {text}: a switch is --{name} or --no{name} alone, others need a value")
        try:
            call[name] = text == "True" if hint is bool else hint(text)
        except ValueError:
            raise SystemExit(f"--{name} takes {hint.__name__}, got {text!r}") from None
    try:
        return fn(**call)
    except ValueError as error:
        if traceback.extract_tb(error.__traceback__)[-1].filename != fn.__code__.co_filename:
            raise
        raise SystemExit(f"error: {error}") from None


# -----------------------------------------------------------------------------
# from files to rows


def parse_line(number, line):
    """Return the value of a line of a .jsonl file, or a sentence that says why it has none."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return f"line {number + 1} is not valid JSON: {error.msg} (column {error.colno})"


def parse_file(path):
    """Return the rows of a data file. In place of a .jsonl line that is not valid JSON it has a sentence saying so."""
    try:
        if path.suffix == ".parquet":
            return pq.read_table(path).to_pylist()
        text = path.read_bytes().decode("utf-8-sig")
        if path.suffix == ".csv":
            csv.field_size_limit(1_000_000_000)  # the default is 131,072 characters
            return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
        if path.suffix == ".jsonl":  # splitlines() would also cut at U+2028 inside a text
            return [parse_line(number, line) for number, line in enumerate(text.split("\n")) if line.strip()]
        return json.loads(text) or []
    except Exception as error:  # of pyarrow, csv and json
        raise ValueError(f"{path} cannot be read as {path.suffix}: {error}") from None


def data_files(source, split):
    """Return the file `source`, or the files in that folder: those named after `split`, or all if none is."""
    inside = glob.glob("**/*", root_dir=source, recursive=True) or [""]  # without hidden ones; [""] is the file itself
    names = sorted(name for name in inside if f"{source}{name}".endswith(KINDS))
    if not names:
        raise ValueError(
            f"{source} is no data file ({', '.join(KINDS)}), no folder of them, and no hub id (owner/name)"
        )
    named = [name for name in names if split in re.split(r"[-_./\\]", name)]
    return [Path(source) / name for name in named or names]


def find_entry(name, dataset_dir):
    """Return the entry `name` of dataset_dir/dataset_info.json, its columns and the path of its file filled in.

    The keys and their defaults are those of LLaMA-Factory's data/parser.py: with `columns` given, a column that is
    not listed is not read.
    """
    path = Path(dataset_dir) / "dataset_info.json"
    known = parse_file(path)
    if name not in known:
        raise ValueError(f"--dataset {name} is not in {path}, which has: {', '.join(known)}")
    entry = known[name]
    columns = FORMS.get(entry.get("formatting", "alpaca"))
    if not columns:
        raise ValueError(f"--dataset {name}: {path} has formatting {entry['formatting']!r}, none of {', '.join(FORMS)}")
    entry.setdefault("columns", columns)
    refused = {*entry, *entry["columns"]}.difference(READABLE)
    if refused or entry.get("ranking"):
        raise ValueError(
            f"--dataset {name}: {path} gives {' and '.join(sorted(refused)) or 'ranking'}, which cannot be read"
        )
    if "hf_hub_url" not in entry:
        if "file_name" not in entry:
            raise ValueError(f"--dataset {name}: {path} gives {', '.join(entry)}; it must give hf_hub_url or file_name")
        entry["file_name"] = path.parent / entry["file_name"]
    return entry


def read_entry(entry, split, subset, target):
    """Return [(place, row), ...] of an entry such as dataset_info.json has: of a hub data set or of files."""
    tables, rows, split = {}, [], entry.get("split", split)
    if "hf_hub_url" in entry:
        from datasets import load_dataset  # takes seconds, and local files do without

        name = entry["hf_hub_url"]
        try:
            tables[f"{name} ({split})"] = load_dataset(name, entry.get("subset", subset) or None, split=split)
        except Exception as error:  # the hub client raises dozens of kinds
            raise ValueError(
                f"{name} is no local file or folder, and the hub could not give its split {split!r}: {error}. Where "
                f"it is out of reach, pass a folder that `hf download {name} --repo-type dataset --local-dir DIR` made"
            ) from error
    else:
        for file in data_files(entry["file_name"], split):
            if file.resolve() == target.resolve():
                raise ValueError(f"{file} is read, and would be replaced: give another --output_path")
            tables[file] = parse_file(file)
    for place, table in tables.items():
        print(f"read {len(table):,} rows of {place}")
        if not table:
            raise ValueError(f"{place}: no rows in it")
        rows += [(f"{place}, row {number + 1}", row) for number, row in enumerate(table)]
    if count := entry.get("num_samples"):  # all as often as they fit in, and a draw of the rest
        rows = rows * (count // len(rows)) + random.sample(rows, count % len(rows))
    return rows


# -----------------------------------------------------------------------------
# from rows to conversations


def field(row, name, kind=str, default=None):
    """Return a field of a row, which must be of the type `kind`; where there is a default, it may be missing."""
    value = row.get(name)
    if default is not None and value in (None, ""):
        return default
    if not isinstance(value, kind):
        raise ValueError(f"no {kind.__name__} in field {name!r}: it is {value!r:.60}; there are {', '.join(row)}")
    return value


def columns_of(row):
    """Return the columns of a row, its form told by the names of its fields."""
    for columns in FORMS.values():
        if next(iter(columns.values())) in row:
            return columns | {"system": "system", "tools": "tools", "history": "history"}
    raise ValueError(f"fields {', '.join(row)}: no form of data/README.md; dataset_info.json can name other columns")


def to_turns(row, entry, separator):
    """Return the conversation in a row, [(role, content), ...], read by the entry's columns and tags if it has any."""
    if not isinstance(row, dict) or None in row:  # None is where csv puts cells beyond the header's
        raise ValueError(f"no object with named fields, or more cells than the header has names for: {row!r:.200}")
    turns, tags, columns = [], entry.get("tags", {}), entry.get("columns") or columns_of(row)
    column = columns.get
    if "messages" in columns:
        named = {name: tag for tag, name in tags.items()}
        for turn in field(row, columns["messages"], list):
            if not isinstance(turn, dict) or turn.get("tool_calls") or turn.get("function_call"):
                raise ValueError(f"a message must be an object with a role and a text, not {turn!r:.200}")
            speaker = field(turn, tags.get("role_tag", "from" if "from" in turn else "role"))
            content = field(turn, tags.get("content_tag", "value" if "value" in turn else "content"))
            roles = [role for role, names in SPEAKERS.items() if named.get(speaker, speaker) in names.split()]
            if not roles:
                raise ValueError(f"{speaker!r} is none of the roles {', '.join(SPEAKERS.values())}")
            turns += [(roles[0], content)]
        if "extra" in columns:
            turns += [("assistant", field(field(row, columns["extra"], dict), "answer"))]
    else:
        for pair in field(row, column("history"), list, []):
            if not isinstance(pair, list) or [*map(type, pair)] != [str, str]:
                raise ValueError(f"field {columns['history']!r} must list pairs [question, answer], not {pair!r:.60}")
            turns += zip(("user", "assistant"), pair)
        asked = [field(row, column("prompt")), field(row, column("query"), default="")]
        turns += [("user", separator.join(filter(None, asked))), ("assistant", field(row, column("response")))]

    system = field(row, column("system"), default="") or None
    if turns and turns[0][0] == "system":  # goes before the column's, as in LLaMA-Factory
        system = turns.pop(0)[1]
    if not turns or turns[0][0] == "assistant" or turns[-1][0] != "assistant":
        raise ValueError("a conversation begins with the user's message and ends in an answer of the assistant's")
    tools = row.get(column("tools")) or ""
    if not isinstance(tools, str):
        tools = json.dumps(tools, ensure_ascii=False)
    if tools.strip(" []"):
        system = f"{system or ''}\n\nYou have access to the following tools:\n{tools}".lstrip()
    return turns if system is None else [("system", system), *turns]


def prepare(
    *,
    data_path: str = "",
    dataset: str = "",
    dataset_dir: str = "data",
    output_path: str = "",
    input_separator: str = "\n\n### Input:\n",
    split: str = "train",
    subset: str = "",
    max_samples: int = 0,
    skip_bad_rows: bool = False,
    overwrite: bool = False,
    seed: int = 42,
):
    """Write instruction data of any kind as one .jsonl file of conversations.

    Args:
        data_path: data file, folder of data files or hub id, in any of the forms of data/README.md.
        dataset: name, or names with commas, of --dataset_dir/dataset_info.json, in place of --data_path.
        dataset_dir: folder of LLaMA-Factory's dataset_info.json and the files that it names.
        output_path: the .jsonl file to write. Empty: out/data/NAME.jsonl, after the source.
        input_separator: between an alpaca row's instruction and its input; `\\n` is a new line, and for chat models.
        split: of a folder or a hub data set, where dataset_info.json does not say it.
        subset: of a hub data set, its configuration, where dataset_info.json does not say it.
        max_samples: use only the first so many rows of each source; 0 for all.
        skip_bad_rows: leave out the rows that cannot be read, and count them.
        overwrite: replace --output_path where it is there already.
        seed: of everything random: the draw of dataset_info.json's num_samples.
    """
    # 1. what to read and where to write
    random.seed(seed)
    names = re.findall(r"[^,\s]+", dataset)
    if bool(data_path) == bool(names):
        raise ValueError(f"--data_path {data_path!r} and --dataset {dataset!r}: give one of them")
    if max_samples < 0:
        raise ValueError(f"--max_samples {max_samples} must not be negative; 0 takes all rows")
    target = Path(output_path or f"out/data/{'_'.join(names) or Path(data_path).stem}.jsonl")
    if target.suffix != ".jsonl":
        raise ValueError(f"--output_path {target} must end in .jsonl, the kind of file that is written")
    if target.exists() and not overwrite:
        raise ValueError(f"{target} is there already: --overwrite replaces it, --output_path gives another place")
    # a hub id is owner/name, and a mistyped path is none
    hub_id = re.fullmatch(r"(?!.*\.(json|jsonl|csv|parquet)$)[\w.-]+/[\w.-]+", data_path)
    source = "hf_hub_url" if hub_id and not Path(data_path).parent.exists() else "file_name"
    entries = [find_entry(name, dataset_dir) for name in names] or [{source: data_path}]

    # 2. rows to conversations
    lines, bad, stripped, empty = [], [], 0, 0
    for entry in entries:
        for place, row in read_entry(entry, split, subset, target)[: max_samples or None]:
            messages = []
            try:
                for role, content in to_turns(row, entry, input_separator.replace("\\n", "\n")):
                    answer = content.strip() if role == "assistant" else content
                    stripped += answer != content
                    empty += role == "assistant" and not answer
                    messages.append({"role": role, "content": answer})
                lines.append(json.dumps({"messages": messages}, ensure_ascii=False).encode())
            except ValueError as error:
                bad.append(f"{place}: {error}")
                if not skip_bad_rows:
                    raise ValueError(f"{bad[0]}; --skip_bad_rows leaves such rows out") from None
    print(
        *bad[:3],
        f"{len(lines):,} conversations, {len(bad):,} bad rows left out, {stripped:,} answers stripped, {empty:,} empty",
        sep="\n",
    )
    if not lines:
        raise ValueError("no row is left to write")

    # 3. the file, written beside its place and renamed, so that it is never there half written
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(f"{target}.incomplete")
    try:
        partial.write_bytes(b"\n".join(lines) + b"\n")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    print(f"wrote {target}\nNext: python finetune.py --base_model BASE --data_path {target}")


if __name__ == "__main__":
    run_cli(prepare)
