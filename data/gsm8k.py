"""
Write GSM8K as train.parquet and test.parquet in the schema that PPO, verl's and ours, reads.

    reads    --source        a hub id, a json, jsonl or parquet file, or a folder holding train.* and test.*
    writes   --output_dir    train.parquet, test.parquet: data_source, prompt, ability, reward_model, extra_info
    then     finetune.py --data_path OUT/train.parquet, or verl with data.train_files and data.val_files

    hub      python data/gsm8k.py
    folder   python data/gsm8k.py --source data/tiny --output_dir out/tiny
    file     python data/gsm8k.py --source rows.jsonl --split train

A row to read has a `question` and an `answer` that ends in "#### 1,234". What follows the marker, less its commas and
dollar sign, becomes the ground truth. The reward compares text, so anything but a plain number there is refused: a
ground truth of "42." would never be met. Every row is checked before anything is written.
"""

import functools
import json
import os
import re
import sys
import traceback
from pathlib import Path
from typing import get_type_hints

import fire
import pyarrow as pa
import pyarrow.parquet as pq

SPLITS = ("train", "test")
CONFIGS = ("main", "socratic")  # the configurations of openai/gsm8k
DATA_SOURCE = "openai/gsm8k"  # the name under which verl finds its GSM8K reward
INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'  # verl's own wording
FILE_KINDS = (".json", ".jsonl", ".parquet")
SCHEMA = pa.schema(
    {
        "data_source": pa.string(),
        "prompt": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        "ability": pa.string(),
        "reward_model": pa.struct({"style": pa.string(), "ground_truth": pa.string()}),
        "extra_info": pa.struct(
            {"split": pa.string(), "index": pa.int64(), "answer": pa.string(), "question": pa.string()}
        ),
    }
)

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
            raise SystemExit(f"--{name} takes {hint.__name__}, got {text!r}: a switch is --{name} or --no{name} alone")
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
# rows


def brief(value, length=80):
    """Return `value` as it is written in Python, its middle cut out where it is longer than `length`."""
    text = repr(value)
    return text if len(text) <= length else f"{text[: length // 2]} ... {text[-length // 2 :]}"


def extract_solution(answer):
    """Return the number after the last "#### " of `answer` as text, without commas and dollar sign."""
    marked = re.findall(r"#### ([^\n]*)", answer)
    if not marked:
        raise ValueError(f'no "#### " in the answer {brief(answer)}: end it in a line like "#### 42"')
    solution = marked[-1].strip()
    if not re.fullmatch(r"(-?\$?|\$-)([0-9][0-9,]*(\.[0-9]+)?|\.[0-9]+)", solution):
        raise ValueError(
            f'{brief(solution)} after "####" is not a plain number, and the reward compares text: '
            'write the number alone, as in "#### 42", "#### -1,234" or "#### $0.50"'
        )
    return solution.replace(",", "").replace("$", "")


def to_row(row, split, index, data_source=DATA_SOURCE, instruction=INSTRUCTION):
    """Return the PPO row of one raw row {question, answer}; `index` counts from 0 within `split`."""
    if not isinstance(row, dict):
        raise ValueError(f'{brief(row)} is not a row: a row is an object {{"question": ..., "answer": ...}}')
    for key in ("question", "answer"):
        if key not in row:
            raise ValueError(f'the row has no "{key}", its keys are {brief(list(row))}: rename or add it')
        if not isinstance(row[key], str) or not row[key].strip():
            raise ValueError(f'"{key}" is {brief(row[key])}: it must be text, and not blank; mend or remove the row')
    question, answer = row["question"], row["answer"]
    content = f"{question} {instruction}" if instruction else question
    return {
        "data_source": data_source,
        "prompt": [{"role": "user", "content": content}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": extract_solution(answer)},
        "extra_info": {"split": split, "index": index, "answer": answer, "question": question},
    }


def to_table(placed, split, data_source=DATA_SOURCE, instruction=INSTRUCTION):
    """Return the table of [(place, raw row), ...]; an error begins with the place of its row."""
    rows = []
    for index, (place, row) in enumerate(placed):
        try:
            rows.append(to_row(row, split, index, data_source, instruction))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
    return pa.Table.from_pylist(rows, schema=SCHEMA)


# -----------------------------------------------------------------------------
# reading: each reader returns [(place, raw row), ...], where the place is what an error is to name


def parse_json(text, path, line):
    """Return the value of `text`, which starts on `line` of `path`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        found = text.split("\n")[error.lineno - 1]
        raise ValueError(
            f"{path}:{line + error.lineno - 1}: invalid JSON, {error.msg} at column {error.colno} of {brief(found)}: "
            'the file must be rows {"question": ..., "answer": ...}, one a line, or one list of them'
        ) from None


def read_json(path):
    """Return the placed rows of a file that holds a JSON object a line, or one JSON list."""
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")  # the mark that some editors put before UTF-8
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = data[error.start]
        raise ValueError(f"{path}:{line}: byte 0x{byte:02x} is not UTF-8: save the file as UTF-8") from None
    if not text.lstrip().startswith("["):  # split("\n"), as splitlines() also cuts at U+2028 inside a string
        lines = enumerate(text.split("\n"), 1)
        return [(f"{path}:{line}", parse_json(each, path, line)) for line, each in lines if each.strip()]

    count, placed = len(parse_json(text, path, 1)), []
    position, line = text.index("[") + 1, text.count("\n", 0, text.index("[")) + 1
    for _ in range(count):  # json keeps no line numbers, so the list is walked again, a row at a time
        start = re.compile(r"[\s,]*").match(text, position).end()
        line += text.count("\n", position, start)
        row, position = json.JSONDecoder().raw_decode(text, start)
        placed.append((f"{path}:{line}", row))
        line += text.count("\n", start, position)
    return placed


def read_split_file(path):
    """Return the placed rows of a json, jsonl or parquet file; a row of parquet is named by its number, from 0."""
    if path.suffix != ".parquet":
        return read_json(path)
    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: cannot be read as parquet ({error}): fetch or write it again") from None
    return [(f"{path}, row {i} (from 0)", row) for i, row in enumerate(rows)]


def read_hub(name, config, splits):
    """Return {split: placed rows} of a data set on the hub, or in its local cache."""
    import datasets  # takes seconds, and local files do without

    local = (
        "Without the hub: on a machine that reaches it, run `hf download "
        f"{name} --repo-type dataset --local-dir DIR`, copy DIR, and pass --source DIR/{config}"
    )
    try:
        loaded = datasets.load_dataset(name, config)
    except Exception as error:  # each library underneath has errors of its own for a hub that does not answer
        raise ValueError(
            f"--source {name}: there is no such file or folder, and loading it from the hub with --config {config} "
            f"failed ({type(error).__name__}: {error}). {local}"
        ) from error
    for split in splits:
        if split not in loaded:
            raise ValueError(
                f"--source {name}: the data set has no split {split!r}, it has {', '.join(loaded)}: "
                "take one of its splits alone with --split, or pass local files"
            )
    return {
        split: [(f"{name} ({config}), {split} row {i} (from 0)", row) for i, row in enumerate(loaded[split])]
        for split in splits
    }


def find_files(source, splits, output):
    """Return {split: path} for a local `source`, or None where it can only be a hub id."""
    path = Path(source).expanduser()
    targets = {split: (output / f"{split}.parquet").resolve() for split in splits}
    if path.is_file():
        if path.suffix not in FILE_KINDS:
            raise ValueError(
                f"--source {source}: files ending in {', '.join(FILE_KINDS)} can be read, not {path.suffix!r}"
            )
        if len(splits) > 1:
            raise ValueError(f"--source {source} is one file, so one split: add --split train or --split test")
        files = {splits[0]: path}
    elif path.is_dir():
        files = {}
        for split in splits:
            pattern = rf"{split}(-\d+-of-\d+)?\.(json|jsonl|parquet)"  # with the numbers in the files of the hub
            found = sorted(file for file in path.iterdir() if re.fullmatch(pattern, file.name) and file.is_file())
            if len(found) > 1:  # an earlier output of this script, beside its input, is no candidate
                found = [file for file in found if file.resolve() != targets[split]]
            if len(found) != 1:
                held = " and ".join(file.name for file in found) or f"no {split}.json, .jsonl or .parquet"
                raise ValueError(
                    f"--source {source}: the folder holds {held}, and one file is needed for the split {split!r}: "
                    f"pass the file itself with --split {split}, or the other split alone with --split"
                )
            files[split] = found[0]
    elif path.suffix in FILE_KINDS or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        raise ValueError(
            f"--source {source!r}: there is no such file or folder, and it does not look like a hub id "
            f"(owner/name, as {DATA_SOURCE}): check the path, or drop the flag to load {DATA_SOURCE}"
        )
    else:
        return None
    for file in files.values():
        if file.resolve() in targets.values():
            raise ValueError(f"--output_dir {output}: {file} is read from there and would be replaced: pass another")
    return files


# -----------------------------------------------------------------------------
# writing


def write_tables(tables):
    """Write {target: table} as parquet: all of them beside their targets first, then each renamed onto its target."""
    fresh = {target: target.with_name(target.name + ".incomplete") for target in tables}
    try:
        for target, table in tables.items():
            pq.write_table(table, fresh[target])
        for target in tables:
            os.replace(fresh[target], target)
    finally:
        for path in fresh.values():
            path.unlink(missing_ok=True)


def prepare(
    *,
    source: str = "openai/gsm8k",
    output_dir: str = "data/gsm8k",
    split: str = "",
    config: str = "main",
    data_source: str = DATA_SOURCE,
    instruction: str = INSTRUCTION,
    max_samples: int = 0,
):
    """Write GSM8K's train.parquet and test.parquet for PPO.

    Args:
        source: hub id, file (json, jsonl, parquet) or folder with one train.* and one test.*; local names go first.
        output_dir: folder to write to; files of the same name are replaced once every row has been checked.
        split: train or test, to write that one alone; empty for both. A single file needs it.
        config: main or socratic (answers in questions and answers); of the hub, local files are taken as they are.
        data_source: the name in each row by which verl picks its reward.
        instruction: added to every question after a space; empty adds nothing, nor the space.
        max_samples: rows to take from the start of each split; 0 takes all.
    """
    if split and split not in SPLITS:
        raise ValueError(f"--split {split!r}: it is train, test or, for both, empty")
    if config not in CONFIGS:
        raise ValueError(f"--config {config!r}: GSM8K comes as {' or '.join(CONFIGS)}")
    if max_samples < 0:
        raise ValueError(f"--max_samples {max_samples}: it counts rows; 0 takes all")
    if not data_source:
        raise ValueError(f"--data_source is empty: verl picks the reward by it; GSM8K's is {DATA_SOURCE}")
    output = Path(output_dir).expanduser()
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output_dir {output_dir} is a file: pass a folder, new or existing")

    splits = (split,) if split else SPLITS
    files = find_files(source, splits, output)
    if files:
        placed = {name: read_split_file(path) for name, path in files.items()}
    else:
        placed = read_hub(source, config, splits)
    tables = {}
    for name, rows in placed.items():
        if not rows:
            where = files[name] if files else f"{source} ({config}), {name}"
            raise ValueError(f'{where}: no rows: it needs at least one {{"question": ..., "answer": ...}}')
        taken = rows[:max_samples] if max_samples else rows
        tables[output / f"{name}.parquet"] = to_table(taken, name, data_source, instruction)

    output.mkdir(parents=True, exist_ok=True)
    write_tables(tables)

    print(f"gsm8k.py  {source} -> {output}" + ("" if files else f"  config {config}"))
    for target, table in tables.items():
        held = len(placed[target.stem])
        cut = f" of {held:,}, cut by --max_samples" if held > table.num_rows else ""
        print(f"  {target.stem:<9} {table.num_rows:,} rows{cut}  {target} ({target.stat().st_size / 1e6:.1f} MB)")
    keys = {"train": "data.train_files", "test": "data.val_files"}
    paths = " ".join(f"{keys[target.stem]}={target}" for target in tables)
    print(f"wrote {output}. Next: python finetune.py --data_path {output}/train.parquet, or verl: {paths}")


if __name__ == "__main__":
    run_cli(prepare)
