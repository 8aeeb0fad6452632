"""
Write GSM8K as train.parquet and test.parquet in the schema that PPO, verl's and ours, reads.

    reads    --source        a hub id, a json, jsonl or parquet file, or a folder holding train.* and test.*
    writes   --output_dir    train.parquet, test.parquet: data_source, prompt, ability, reward_model, extra_info
    then     python ppo_gsm8k.py --train_files OUT/train.parquet --val_files OUT/test.parquet, or the same with verl

    hub      python data/gsm8k.py
    folder   python data/gsm8k.py --source data/tiny --output_dir out/tiny
    file     python data/gsm8k.py --source rows.jsonl --split train

A row to read has a `question` and an `answer` that ends in "#### 1,234". What follows the marker, less its commas and
dollar sign, becomes the ground truth. The reward compares text, so anything but a plain number there is refused: a
ground truth of "42." would never be met. Every row is checked before anything is written.
"""

import functools
import json
import re
import sys
import traceback
from pathlib import Path
from typing import get_type_hints

import fire
import pyarrow as pa
import pyarrow.parquet as pq

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
# reading


def find_split(source, split):
    """Return the file of a split, which is `source` or lies in that folder."""
    pattern = rf"{split}(-\d+-of-\d+)?\.(json|jsonl|parquet)"  # with the numbers in the files of the hub
    files = [source] if source.is_file() else [file for file in source.glob("*") if re.fullmatch(pattern, file.name)]
    if len(files) != 1:
        raise ValueError(
            f"--source {source} must be a file, a hub id (owner/name) or a folder with one {split}.json, {split}.jsonl "
            f"or {split}.parquet, and {len(files)} are there: pass the file itself with --split {split}"
        )
    return files[0]


def read_raw(path):
    """Return the rows of a json, jsonl or parquet file; a row of json lines is still its text."""
    try:
        if path.suffix == ".parquet":
            return pq.read_table(path).to_pylist()
        text = path.read_text("utf-8-sig")
        if text.lstrip().startswith("["):
            return json.loads(text)
        return [line for line in text.split("\n") if line.strip()]  # splitlines() would also cut at U+2028
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


# -----------------------------------------------------------------------------
# rows


def extract_solution(answer):
    """Return the number after the last "#### " of `answer` as text, without commas and dollar sign."""
    solution = answer.rpartition("#### ")[2].partition("\n")[0].strip()
    if not re.fullmatch(r"(-?\$?|\$-)([0-9][0-9,]*(\.[0-9]+)?|\.[0-9]+)", solution) or "#### " not in answer:
        raise ValueError(
            f"the answer {answer[-80:]!r} does not end in a line like "
            '"#### 42", "#### -1,234" or "#### $0.50": a plain number, as the reward compares text'
        )
    return solution.replace(",", "").replace("$", "")


def to_row(row, split, index, instruction):
    """Return the PPO row of one raw row {question, answer}; `index` counts from 0 within `split`."""
    if isinstance(row, str):
        row = json.loads(row)
    for key in ("question", "answer"):
        if not isinstance(row, dict) or not isinstance(row.get(key), str) or not row[key].strip():
            raise ValueError(f'no text in field "{key}" of {row!r:.200}')
    question, answer = row["question"], row["answer"]
    return {
        "data_source": "openai/gsm8k",  # the name under which verl finds its GSM8K reward
        "prompt": [{"role": "user", "content": f"{question} {instruction}" if instruction else question}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": extract_solution(answer)},
        "extra_info": {"split": split, "index": index, "answer": answer, "question": question},
    }


def write_gsm8k(
    *,
    source: str = "openai/gsm8k",
    output_dir: str = "data/gsm8k",
    split: str = "",
    config: str = "main",
    instruction: str = 'Let\'s think step by step and output the final answer after "####".',
    max_samples: int = 0,
):
    """Write GSM8K's train.parquet and test.parquet for PPO.

    Args:
        source: hub id, file (json, jsonl, parquet) or folder with one train.* and one test.*; local names go first.
        output_dir: folder to write to; files of the same name are replaced once every row has been checked.
        split: train or test, to write that one alone; empty for both. A single file needs it.
        config: main or socratic (answers in questions and answers); of the hub, local files are taken as they are.
        instruction: added to every question after a space, by default verl's own; empty adds nothing, nor the space.
        max_samples: use only the first so many rows of each source; 0 for all.
    """
    # 1. every row checked
    place, output, tables = Path(source), Path(output_dir), {}
    if split not in ("", "train", "test") or max_samples < 0:
        raise ValueError(
            f"--split {split!r} must be train, test or, for both, empty; --max_samples {max_samples} must be 0 or more"
        )
    if place.is_file() and not split:
        raise ValueError(f"--source {source} is one file, so one split: add --split train or --split test")
    raw, local = {}, place.parent.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", source)
    if not local:
        import datasets  # takes seconds, and local files do without

        try:
            raw = datasets.load_dataset(source, config)
        except Exception as error:  # the hub client raises dozens of kinds
            raise ValueError(
                f"--source {source} is no file or folder, and the hub could not give it with --config {config}: "
                f"{error}. Where it is out of reach, run `hf download {source} --repo-type dataset --local-dir DIR` "
                f"elsewhere, copy DIR, and pass --source DIR/{config}"
            ) from error
    for name in [split] if split else ["train", "test"]:
        target = output / f"{name}.parquet"
        if local:
            place = find_split(Path(source), name)
            if place.resolve() == target.resolve():
                raise ValueError(
                    f"--output_dir {output}: {place} is read from there and would be replaced: pass another"
                )
            raw[name] = read_raw(place)
        if not raw.get(name):
            raise ValueError(f"{place}: no rows of the split {name!r} in it")
        rows = []
        for index, row in enumerate(list(raw[name])[: max_samples or None]):
            try:
                rows.append(to_row(row, name, index, instruction))
            except ValueError as error:
                raise ValueError(f"{place}, {name} row {index + 1}: {error}") from None
        tables[target] = pa.Table.from_pylist(rows)

    # 2. all files written beside their places, then each renamed, so that none is ever there half written
    output.mkdir(parents=True, exist_ok=True)
    try:
        for target, table in tables.items():
            pq.write_table(table, f"{target}.incomplete")
        for target, table in tables.items():
            Path(f"{target}.incomplete").replace(target)
            print(f"wrote {table.num_rows:,} rows to {target}")
    finally:
        for target in tables:
            Path(f"{target}.incomplete").unlink(missing_ok=True)
    print(f"Next: python ppo_gsm8k.py --train_files {output}/train.parquet --val_files {output}/test.parquet")


if __name__ == "__main__":
    run_cli(write_gsm8k)
