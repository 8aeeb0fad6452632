"""
Tokenizing speed: finetune.py's batched `encode` beside alpaca-lora's one-by-one `map`, both in one run.

    reads    data/tiny (words and tokenizer); rows are made in a temporary folder
    writes   nothing: the figures and their ratio go to the terminal

    no GPU   python benchmarks/tokenize_rows.py
"""

import functools
import json
import random
import re
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import get_type_hints

import fire
import numpy as np
from datasets import disable_progress_bars
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import finetune  # noqa: E402 (the script under test, one folder up)

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


def write_rows(path, count, seed):
    """Write `count` alpaca rows whose lengths are spread as alpaca's are: most are short, a few ten times as long.

    The words are those of the embedded problems, so that the tiny tokenizer does not fall back to bytes. Prompts
    have a geometric number of sentences, answers a log-normal one (sigma 1.1), cut at 40.
    """
    rng = random.Random(seed)
    with open(ROOT / "data" / "tiny" / "train.jsonl", encoding="utf-8") as file:
        problems = [json.loads(line) for line in file]
    questions = [sentence for p in problems for sentence in re.split(r"(?<=[.?]) ", p["question"])]
    answers = [line for p in problems for line in p["answer"].split("\n") if not line.startswith("#")]
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            long = min(40, max(1, round(rng.lognormvariate(0.9, 1.1))))
            row = {
                "instruction": " ".join(rng.choices(questions, k=min(12, 1 + int(rng.expovariate(0.5))))),
                "input": " ".join(rng.choices(questions, k=2)) if rng.random() < 0.4 else "",
                "output": "\n".join(rng.choices(answers, k=long)),
            }
            file.write(json.dumps(row) + "\n")


HEADER = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
)
PAIRED = ", paired with an input that provides further context"


def alpaca_prompt(row):
    """Return alpaca-lora's prompt of a row: templates/alpaca.json, filled in with str.format."""
    if row["input"]:
        text = HEADER.format(PAIRED) + "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
    else:
        text = HEADER.format("") + "### Instruction:\n{instruction}\n\n### Response:\n"
    return text.format(instruction=row["instruction"], input=row["input"])


def one_by_one(path, tokenizer, cutoff_len):
    """Tokenize a file as alpaca-lora's finetune.py does: one row at a time, the prompt a second time to mask it."""
    from datasets import load_dataset

    def tokenize(text):
        ids = tokenizer(text, truncation=True, max_length=cutoff_len, padding=False, return_tensors=None)
        if ids["input_ids"][-1] != tokenizer.eos_token_id and len(ids["input_ids"]) < cutoff_len:
            ids["input_ids"].append(tokenizer.eos_token_id)
            ids["attention_mask"].append(1)
        ids["labels"] = ids["input_ids"].copy()
        return ids

    def generate_and_tokenize(row):
        prompt = alpaca_prompt(row)
        full = tokenize(prompt + row["output"])
        length = len(tokenizer(prompt, truncation=True, max_length=cutoff_len)["input_ids"])
        full["labels"] = [finetune.IGNORE] * length + full["labels"][length:]
        return full

    rows = load_dataset("json", data_files=str(path), split="train", cache_dir=str(Path(path).parent / "cache"))
    return rows.shuffle(seed=0).map(generate_and_tokenize, load_from_cache_file=False, new_fingerprint="one-by-one")


def batched(path, tokenizer, cutoff_len):
    """Read, check and tokenize a file as finetune.py does, rendering the same template."""
    _, separator = finetune.use_template(tokenizer, "alpaca")
    rows = finetune.read_conversations([(str(path), "train", None, None, None)], separator, 0, 0)
    return finetune.encode(rows, tokenizer, cutoff_len=cutoff_len)[0]


def compare_tokenizing(*, rows: int = 50000, cutoff_len: int = 1024, tokenizer: str = "data/tiny/model", seed: int = 0):
    """Tokenize the same rows both ways, from the file to ids and labels, and print the ratio.

    Args:
        rows: alpaca-format rows.
        cutoff_len: longest example in tokens.
        tokenizer: folder or hub id of the tokenizer.
        seed: of the rows.
    """
    finetune.quiet_libraries()
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, rows, seed)
        source = str(finetune.find_path(tokenizer) or tokenizer)
        seconds, made = {}, {}
        for name, way in (("batched", batched), ("one by one", one_by_one)):
            fresh = AutoTokenizer.from_pretrained(source)
            started = time.time()
            made[name] = way(path, fresh, cutoff_len)
            seconds[name] = time.time() - started
            print(f"{name:11s} {rows / seconds[name]:,.0f} rows/s ({seconds[name]:.1f} s)", flush=True)
        order = np.random.default_rng(0).permutation(rows)  # what shuffle(seed=0) took
        for i in range(0, rows, max(1, rows // 500)):  # the same ids and labels, or the comparison means nothing
            (ids, learned), other = made["batched"][order[i]], made["one by one"][i]
            assert ids.tolist() == other["input_ids"], i
            assert np.where(learned, ids, finetune.IGNORE).tolist() == other["labels"], i
    ratio = seconds["one by one"] / seconds["batched"]
    print(f"tokenizing: batched / one by one = {ratio:.1f} in rows a second, {rows:,} rows")
    return {"ratio": ratio}


if __name__ == "__main__":
    run_cli(compare_tokenizing)
