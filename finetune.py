"""
LoRA and QLoRA supervised fine-tuning of a causal language model on instruction data.

    reads    --data_path     instruction data in any of the forms of data/README.md, or --dataset, a name in
                             --dataset_dir/dataset_info.json; without either data/tiny/demonstrations.jsonl
             templates/      the chat template named by --prompt_template
    writes   --output_dir    run.json (flags, versions, counts, results), log.jsonl (a line a step), adapter/,
                             checkpoint-N/ (the best and the last), plots/, runs/ (TensorBoard)
    then     generate.py --base_model BASE --lora_weights OUT/adapter

    1 GPU    python finetune.py --base_model Qwen/Qwen2.5-0.5B --data_path yahma/alpaca-cleaned
    8 GPUs   torchrun --standalone --nproc_per_node=8 finetune.py --base_model ...
    sharded  torchrun --nproc_per_node=8 finetune.py --deepspeed deepspeed/zero3.json --base_model ...
    no GPU   python finetune.py

A conversation is cut where its answers start and stop, and the loss falls on the tokens of the answers. By default
the examples of a micro-batch lie end to end in one row without padding, attend to themselves only, and the
vocabulary is applied to labeled positions only, in chunks.

Shapes in comments: B sequences, N tokens of a packed row, T tokens, L labeled positions, D hidden, V vocabulary.
"""

import csv
import difflib
import functools
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import types
import warnings
from pathlib import Path
from typing import get_type_hints

import fire
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError, safe_open
from torch.nn.attention.varlen import varlen_attn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface
from transformers.utils.chat_template_utils import _compile_jinja_template

HERE = Path(__file__).resolve().parent
IGNORE = -100  # label of a token that carries no loss (the default of F.cross_entropy)
SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")

# -----------------------------------------------------------------------------
# shared with the other scripts, word for word: tests/test_copies.py compares them


def run_cli(fn):
    """Call `fn` with the flags on the command line, once every flag has been checked.

    By itself fire calls the function first and reports unknown flags afterwards (python-fire#168), and it guesses
    types from the text, so `--bf16 false` arrives as the truthy string "false". A typo must not cost a training
    run: fire is handed a stand-in that records the call, and the type hints say how to read each value. Flags are
    `--name value`, booleans `--name` or `--noname`, lists `a,b` or `[a,b]`. An error that the script itself raises
    (ValueError) is shown as its message alone; any other keeps its traceback.
    """
    hints, call = get_type_hints(fn), {}

    @functools.wraps(fn)
    def record(*args, **kwargs):
        call.update(inspect.signature(fn).bind(*args, **kwargs).arguments)

    if {"--help", "-h"} & set(sys.argv[1:]):
        fire.Fire(record, command=["--help"])  # leaves here; later, help would show the setting below as a flag
    fire.decorators.SetParseFn(str)(record)
    for arg in sys.argv[1:]:
        name = arg.partition("=")[0][2:].replace("-", "_")
        if arg.startswith("--") and name not in hints and name.removeprefix("no") not in hints:
            close = difflib.get_close_matches(name, hints, n=1)
            raise SystemExit(f"unknown flag --{name}: " + (f"did you mean --{close[0]}?" if close else "see --help"))
    fire.Fire(record)  # leaves here on anything it cannot consume
    for name, text in call.items():
        hint = hints[name]
        if hint is bool:
            if text not in ("True", "False"):
                raise SystemExit(f"--{name} takes no value, got {text!r}: write --{name} or --no{name}")
            call[name] = text == "True"
        elif text in ("True", "False"):  # what fire records for a flag that nothing follows
            raise SystemExit(f"--{name} needs a value: --{name} {getattr(hint, '__name__', hint).upper()}")
        elif hint in (int, float):
            try:
                call[name] = hint(text)
            except ValueError:
                raise SystemExit(f"--{name} takes {hint.__name__}, got {text!r}") from None
        elif hint == list[str]:
            call[name] = [part.strip(" '\"") for part in text.strip("[]()").split(",") if part.strip(" '\"")]
    try:
        return fn(**call)
    except ValueError as error:
        frame = error.__traceback__
        while frame.tb_next:
            frame = frame.tb_next
        if frame.tb_frame.f_code.co_filename != fn.__code__.co_filename:
            raise
        raise SystemExit(f"error: {error}") from None


def quiet_libraries():
    """Silence the libraries' own progress bars and notes, errors aside (peft asks for a renamed property)."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated")


def limit_threads(config):
    """Give a small model one CPU thread, unless OMP_NUM_THREADS says otherwise.

    Below a hidden size of 512 a second thread gains little, and each time another process has its core, all wait:
    the embedded default was 20 times slower that way.
    """
    if config.hidden_size < 512 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def find_path(path):
    """Return `path` as a Path where it exists, seen from here or from this script's folder; otherwise None."""
    return next((p for p in (Path(path), HERE / path) if path and p.exists()), None)


def write_json(path, value):
    """Write `value` as JSON beside `path` and rename it, so that `path` is never half written."""
    partial = Path(f"{path}.incomplete")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def locate(path, index):
    """Return "FILE, line N" of row `index` in a data file (for parquet: "FILE, row N"), for an error message."""
    if path.suffix == ".jsonl":
        lines = path.read_text(encoding="utf-8-sig").split("\n")
        number = [n for n, line in enumerate(lines, 1) if line.strip()][index]
    elif path.suffix == ".json":
        text, decode = path.read_text(encoding="utf-8-sig"), json.JSONDecoder().raw_decode
        at = re.compile(r"\s*\[?\s*").match(text).end()
        for _ in range(index):
            at = re.compile(r"[\s,]*").match(text, decode(text, at)[1]).end()
        number = text.count("\n", 0, at) + 1
    elif path.suffix == ".csv":
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            ends = [(reader.line_num, bool(row)) for row in reader]  # DictReader skips empty lines
            starts = [before + 1 for (before, _), (_, filled) in zip(ends, ends[1:]) if filled]
            number = starts[index]
    else:
        return f"{path}, row {index + 1}"
    return f"{path}, line {number}"


def read_file(path):
    """Return the rows (dicts) of a json, jsonl, csv or parquet file; ValueError names the file and line."""
    rows = []
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            try:
                rows = pyarrow.parquet.read_table(path).to_pylist()
            except pyarrow.ArrowInvalid as error:
                raise OSError(error) from None
        elif path.suffix == ".csv":
            csv.field_size_limit(2**31 - 1)  # the default is 131,072 characters
            with open(path, newline="", encoding="utf-8-sig") as file:
                rows = list(csv.DictReader(file))
        elif path.suffix == ".jsonl":
            for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):  # noqa: B007
                if line.strip():
                    rows.append(json.loads(line))
        else:
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
            rows = rows if isinstance(rows, list) else [rows]
    except json.JSONDecodeError as error:
        number = number if path.suffix == ".jsonl" else error.lineno
        raise ValueError(f"{path}, line {number}: not valid JSON: {error.msg} (column {error.colno})") from None
    except (ValueError, RecursionError, csv.Error, OSError) as error:  # pyarrow's errors are OSError or ValueError
        raise ValueError(f"{path}: cannot be read: {error}") from None
    if not rows:
        raise ValueError(f"{path}: no rows in it")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{locate(path, index)}: a row must be an object with named fields, got {row!r:.80}")
        if None in row:  # what csv calls the cells beyond the header's
            raise ValueError(f"{locate(path, index)}: more cells than the header has: quote a text that holds commas")
    return rows


def read_rows(source, split="train", subset=None):
    """Return (rows, where) of a file, a folder of files or a hub data set; `where(i)` says where row i stands.

    Of a folder, the files named after `split` are taken (train.jsonl, train-00001.parquet); all, if none is.
    """
    path = find_path(source)
    if path is None and not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise ValueError(f"{source}: no such file or folder, and not the name of a hub data set (owner/name)")
    if path is None:
        from datasets import load_dataset

        if Path(source).suffix in SUFFIXES:
            raise ValueError(f"{source}: no such file")
        try:
            rows = load_dataset(source, subset, split=split).to_list()
        except Exception as error:  # the hub client raises dozens of kinds
            raise ValueError(f"{source}: no such file or folder, and the hub could not give it: {error}") from error
        return rows, lambda i: f"{source} ({split}), row {i + 1}"
    files = [path]
    if path.is_dir():
        files = [(file, file.relative_to(path)) for file in sorted(path.rglob("*")) if file.suffix in SUFFIXES]
        files = [(file, name) for file, name in files if not any(part.startswith(".") for part in name.parts)]
        named = [file for file, name in files if split in re.split(r"[-_./]", str(name.with_suffix("")))]
        files = named or [file for file, _ in files]
    if not files:
        raise ValueError(f"{source}: no data files in this folder ({', '.join(SUFFIXES)})")
    if files[0].suffix not in SUFFIXES:
        raise ValueError(f"{source}: not a data file; one of {', '.join(SUFFIXES)}, or a folder of them")
    tables = [read_file(file) for file in files]

    def where(i):
        for file, table in zip(files, tables, strict=True):
            if i < len(table):
                return locate(file, i)
            i -= len(table)

    return [row for table in tables for row in table], where


# the field names of each form of data; "columns" and "tags" are dataset_info.json's own words
ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
SHAREGPT_TAGS = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"}
SHAREGPT_TAGS |= {"system_tag": "system", "observation_tag": "observation", "function_tag": "function_call"}
OPENAI_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
OPENAI_TAGS |= {"system_tag": "system", "observation_tag": "tool", "function_tag": "function_call"}


def detect_form(row):
    """Return how to read a row like `row`: {"formatting", "columns", "tags"} as in dataset_info.json."""
    turns = next((name for name in ("messages", "conversations") if name in row), None)
    if turns:
        openai = isinstance(row[turns], list) and any(isinstance(turn, dict) and "role" in turn for turn in row[turns])
        columns = {"messages": turns, "system": "system"}
        return {"formatting": "sharegpt", "columns": columns, "tags": OPENAI_TAGS if openai else SHAREGPT_TAGS}
    if "instruction" in row:
        return {"formatting": "alpaca", "columns": ALPACA | {"system": "system", "history": "history"}}
    if "question" in row:
        return {"formatting": "alpaca", "columns": {"prompt": "question", "response": "answer"}}
    if "prompt" in row and "extra_info" in row:  # the parquet rows of data/gsm8k.py, verl's schema
        return {"formatting": "verl"}
    raise ValueError(
        f"none of the known forms has the fields {', '.join(map(repr, row))}; a row has instruction and output, "
        "messages, conversations, question and answer, or verl's prompt and extra_info (data/README.md)"
    )


def text_field(row, name, required=True):
    """Return the text in field `name` of a row; None or a missing field is "" unless required."""
    value = row.get(name) if name else None
    if value is None and not required:
        return ""
    if not isinstance(value, str):
        found = f"it is {value!r:.60}" if name in row else f"the row has {', '.join(map(repr, row))}"
        raise ValueError(f"no text in field {name!r}: {found}")
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise ValueError(f"field {name!r} holds half a surrogate pair, which is no character: {ascii(value):.60}")
    return value


def to_messages(row, form, separator="\n", need_response=True):
    """Return the conversation in a row as [{"role": "user", "content": ...}, {"role": "assistant", ...}].

    separator stands between an alpaca row's instruction and its input. With `need_response` the last message is the
    assistant's; without, it is the last user message and what was to be answered is left out.
    """
    columns, messages = form.get("columns", {}), []
    if form["formatting"] == "verl":
        turns, extra = row["prompt"], row["extra_info"]
        if not isinstance(turns, list) or not all(isinstance(m, dict) and type(m.get("role")) is str for m in turns):
            raise ValueError(f"field 'prompt' must list messages with role and content, got {turns!r:.60}")
        if not isinstance(extra, dict):
            raise ValueError(f"field 'extra_info' must be an object, got {extra!r:.60}")
        messages = [{"role": m["role"], "content": text_field(m, "content")} for m in row["prompt"]]
        if need_response:
            messages.append({"role": "assistant", "content": text_field(row["extra_info"], "answer")})
        return messages
    system = text_field(row, columns.get("system"), required=False)
    if system:
        messages.append({"role": "system", "content": system})
    if form["formatting"] == "alpaca":
        history = row.get(columns.get("history")) or []
        for turn in history if isinstance(history, list) else [history]:
            if not isinstance(turn, list) or len(turn) != 2:
                raise ValueError(f"field {columns['history']!r} must list pairs [question, answer], got {turn!r:.60}")
            pair = dict(zip(("question", "answer"), turn, strict=True))
            messages.append({"role": "user", "content": text_field(pair, "question")})
            messages.append({"role": "assistant", "content": text_field(pair, "answer")})
        prompt = [text_field(row, columns.get("prompt")), text_field(row, columns.get("query"), required=False)]
        messages.append({"role": "user", "content": separator.join(part for part in prompt if part)})
        if need_response:
            messages.append({"role": "assistant", "content": text_field(row, columns.get("response"))})
        return messages
    tags, name = form["tags"], columns.get("messages")
    roles = {tags[f"{role}_tag"]: role for role in ("user", "assistant", "system")}
    roles |= {tags["observation_tag"]: "tool", tags["function_tag"]: "assistant"}
    if not isinstance(row.get(name), list):
        raise ValueError(f"no list of messages in field {name!r}; the row has {', '.join(map(repr, row))}")
    for turn in row[name]:
        role = turn.get(tags["role_tag"]) if isinstance(turn, dict) else None
        if not isinstance(role, str) or role not in roles:
            raise ValueError(f"a message's {tags['role_tag']!r} must be one of {', '.join(roles)}, got {role!r}")
        message = {"role": roles[role], "content": text_field(turn, tags["content_tag"])}
        if message["role"] == "system" and len(messages) == 1 and messages[0]["role"] == "system":
            messages.pop()  # a conversation's own system message goes before the column's, as in LLaMA-Factory
        messages.append(message)
    while messages and not need_response and messages[-1]["role"] == "assistant":
        messages.pop()
    if next((m["role"] for m in messages if m["role"] != "system"), None) == "assistant":
        raise ValueError("the conversation begins with an answer: its first message must be the user's")
    if not messages or need_response and messages[-1]["role"] != "assistant":
        raise ValueError("the conversation has no answer to learn: its last message must be the assistant's")
    return messages


def use_template(tokenizer, name):
    """Give the tokenizer the chat template `name`: "" its own, or alpaca if it has none; a name; a .jinja file.

    Returns what was taken, in words, and what the template puts between an instruction and its input.
    """
    folder, own = HERE / "templates", bool(tokenizer.chat_template)
    if name or not tokenizer.chat_template:
        path = Path(name) if name.endswith(".jinja") else folder / f"{name or 'alpaca'}.jinja"
        if not path.exists():
            known = ", ".join(sorted(file.stem for file in folder.glob("*.jinja")))
            raise ValueError(f"--prompt_template {name}: no such template; there are: {known}, or give a .jinja file")
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    elif not isinstance(tokenizer.chat_template, str):
        raise ValueError("the tokenizer has several chat templates: choose one of templates/ with --prompt_template")
    found = re.search(r'set input_separator = ("(?:[^"\\]|\\.)*")', tokenizer.chat_template)
    taken = name or ("the tokenizer's own" if own else "alpaca")
    return taken, json.loads(found[1]) if found else "\n"


def end_of_turn(tokenizer):
    """Return (text, id) of the token that ends an answer in the tokenizer's chat template; ("", None) if none does."""
    turns = [{"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"}]
    tail = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("pong")[2]
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
    found = [(tail.find(text), text) for text in special if text.strip() and text in tail]
    return (min(found)[1], special[min(found)[1]]) if found else ("", None)


def pick_dtype(dtype):
    """Return the torch dtype that --dtype names; auto is bfloat16 on a GPU that has it, else float32."""
    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if dtype == "auto":
        has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if has_bf16 else "float32"
    if dtype not in known:
        raise ValueError(f"--dtype {dtype}: one of auto, {', '.join(known)}")
    return known[dtype]


def find_base(base_model):
    """Return the folder or hub id to load --base_model from, once it can be one."""
    path = find_path(base_model)
    if path is None and not re.fullmatch(r"[\w.-]+/[\w.-]+", base_model):
        raise ValueError(f"--base_model {base_model}: no such folder, and not the name of a hub model (owner/name)")
    if path and not (path / "config.json").exists():
        what = "an adapter" if (path / "adapter_config.json").exists() else "no model"
        raise ValueError(f"--base_model {base_model}: {what} is in this folder (there is no config.json)")
    return str(path or base_model)


def load_config(base):
    """Return the configuration of the language model in a folder or hub id."""
    try:
        return transformers.AutoConfig.from_pretrained(base).get_text_config()
    except (OSError, ValueError) as error:
        raise ValueError(f"--base_model {base} cannot be loaded: {error}") from error


def load_tokenizer(base):
    """Return the tokenizer in a folder or hub id."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise ValueError(f"{base}: its tokenizer cannot be loaded: {error}") from error
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ValueError(f"{base}: its tokenizer is not of the tokenizers library, which this needs")
    return tokenizer


def load_base(base_model, dtype, load_in_8bit, load_in_4bit, device):
    """Load the frozen base model, a quantized one on `device`, any other on the CPU (ZeRO-3: sharded by DeepSpeed)."""
    quantization, kwargs = None, {}
    if load_in_4bit:  # NF4 with double quantization, as in QLoRA (Dettmers et al. 2023, arXiv:2305.14314)
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    elif load_in_8bit:
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    if quantization:
        kwargs = {"quantization_config": quantization, "device_map": {"": device}}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(base_model, dtype=dtype, output_loading_info=True, **kwargs)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(f"--base_model {base_model} cannot be loaded: {error}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"--base_model {base_model}: {len(missing)} tensors of its configuration are not in its files, and would "
            f"be random: {', '.join(missing[:3])}"
        )
    for module in model.modules():
        # on some CPUs bitsandbytes repacks 4-bit weights in place in the first forward without gradient, and training
        # would go on with the wrong ones
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


# -----------------------------------------------------------------------------
# data: from rows to token ids and labels


def find_dataset(name, dataset_dir):
    """Return (source, split, subset, form or None, num_samples) of a name in dataset_dir/dataset_info.json.

    The file is LLaMA-Factory's: its keys, their precedence and their defaults are those of its data/parser.py. With
    `columns` given, a column that is not listed is not read.
    """
    path = find_path(str(Path(dataset_dir) / "dataset_info.json"))
    if path is None:
        raise ValueError(f"--dataset {name}: there is no {dataset_dir}/dataset_info.json; see --dataset_dir")
    known = read_file(path)[0]
    if name not in known:
        raise ValueError(f"--dataset {name}: not in {path}, which has: {', '.join(sorted(known))}")
    entry = known[name]
    shapes = {"file_name": str, "hf_hub_url": str, "columns": dict, "tags": dict, "num_samples": int, "split": str}
    wrong = [k for k, kind in shapes.items() if isinstance(entry, dict) and k in entry and type(entry[k]) is not kind]
    if not isinstance(entry, dict) or wrong or entry.get("num_samples", 1) < 1:
        what = f"{wrong[0]} is {entry[wrong[0]]!r}" if wrong else f"{entry!r:.80}"
        raise ValueError(f"--dataset {name}: the entry in {path} cannot be used: {what}")
    if entry.get("ranking"):
        raise ValueError(f"--dataset {name}: holds preference pairs (ranking), which supervised fine-tuning cannot use")
    source = entry.get("hf_hub_url")
    if source and entry.get("folder"):
        raise ValueError(f"--dataset {name}: {path} names the folder {entry['folder']!r} of {source}: give file_name")
    if not source and "file_name" in entry:
        source = str(path.parent / entry["file_name"])
        if not Path(source).exists():
            raise ValueError(f"--dataset {name}: {path} names {entry['file_name']}, and {source} does not exist")
    if not source:
        kinds = ", ".join(key for key in entry if key.endswith(("_url", "file_name"))) or "no source at all"
        raise ValueError(f"--dataset {name}: {path} gives {kinds}; only hf_hub_url and file_name can be read")
    formatting, columns = entry.get("formatting", "alpaca"), entry.get("columns")
    if formatting not in ("alpaca", "sharegpt", "openai"):
        raise ValueError(f"--dataset {name}: formatting {formatting!r} in {path}; known: alpaca, sharegpt, openai")
    defaults = ALPACA | {"messages": "conversations"} if formatting != "openai" else {"messages": "messages"}
    tags = (OPENAI_TAGS if formatting == "openai" else SHAREGPT_TAGS) | entry.get("tags", {})
    formatting = "alpaca" if formatting == "alpaca" else "sharegpt"
    form = {"formatting": formatting, "columns": columns if columns is not None else defaults, "tags": tags}
    return source, entry.get("split", "train"), entry.get("subset"), form, entry.get("num_samples")


def read_conversations(sources, separator, max_samples, seed):
    """Read every source and return its rows as conversations (lists of messages), a bad row being an error.

    `num_samples` of dataset_info.json draws that many rows of a source, with repetition beyond its size, as
    LLaMA-Factory does; `max_samples` then takes the first rows of each source.
    """
    conversations = []
    for source, split, subset, form, num_samples in sources:
        rows, where = read_rows(source, split, subset)
        picked = range(len(rows))
        if num_samples:
            rng = random.Random(seed)
            whole, rest = divmod(num_samples, len(rows))
            picked = [*range(len(rows))] * whole + rng.sample(range(len(rows)), rest)
        for i in picked[:max_samples] if max_samples else picked:
            try:
                conversations.append(to_messages(rows[i], form or detect_form(rows[i]), separator))
            except ValueError as error:
                raise ValueError(f"{where(i)}: {error}") from None
    return conversations


def split_rows(count, val_set_size, seed):
    """Return (train, validation), two lists of row numbers in ascending order, the same for the same arguments.

    val_set_size below 1 is a share of the rows, otherwise their number.
    """
    size = round(count * val_set_size) if val_set_size < 1 else int(val_set_size)
    if size >= count:
        raise ValueError(f"--val_set_size {val_set_size:g} takes {size} of {count} rows and leaves none to train on")
    held_out = set(random.Random(seed).sample(range(count), size))
    return [i for i in range(count) if i not in held_out], sorted(held_out)


def check_template(tokenizer, add_eos_token):
    """Refuse a chat template that loses the user's words, never ends an answer, or starts with two BOS tokens.

    Returns the text of the token that ends an answer and its id.
    """
    probe = [{"role": "user", "content": "prompt-7309"}, {"role": "assistant", "content": "answer-2846"}]
    try:
        text = tokenizer.apply_chat_template(probe, tokenize=False)
    except Exception as error:  # jinja2 has its own kinds, and a template can raise
        raise ValueError(f"--prompt_template: the chat template does not render: {error}") from error
    for part in ("prompt-7309", "answer-2846"):
        if part not in text:
            raise ValueError(f"--prompt_template: the chat template drops the {part[:6]}; it rendered {text!r}")
    end_text, end_id = end_of_turn(tokenizer)
    if add_eos_token and end_id is None:
        raise ValueError(
            "--prompt_template: after an answer the template writes no special token of this tokenizer, so the model "
            f"would never learn to stop; it rendered {text!r}. Choose another template, or --noadd_eos_token"
        )
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if tokenizer.bos_token_id is not None and ids[:2].count(tokenizer.bos_token_id) == 2:
        raise ValueError("--prompt_template: the template starts with two BOS tokens; take its {{ bos_token }} out")
    return end_text, end_id


def mark_answers(conversations, tokenizer, end_text, add_eos_token):
    """Render conversations and return (texts, spans): spans[i] lists the (start, stop) of what is learned in texts[i].

    A span runs from the end of the generation prompt to the end of the token that ends the answer: the start is
    where the model is asked to go on when it serves. Where a template renders an earlier turn differently once a
    later one is there (Qwen3 drops old reasoning), each answer becomes a text of its own.
    """
    template = _compile_jinja_template(tokenizer.chat_template)  # what apply_chat_template renders with, half its time
    special = tokenizer.special_tokens_map | {"tools": None, "documents": None}
    texts, spans = [], []
    for messages in conversations:
        parts = []
        for k, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            try:
                prompt = template.render(messages=messages[:k], add_generation_prompt=True, **special)
                text = template.render(messages=messages[: k + 1], add_generation_prompt=False, **special)
            except Exception as error:  # jinja2 has its own kinds, and a template can raise
                shown = f"{messages[: k + 1]!r:.200}"
                raise ValueError(f"--prompt_template: the chat template cannot render {shown}: {error}") from error
            end = text.rfind(end_text, len(prompt)) if end_text else len(text)
            if not text.startswith(prompt) or end < 0:
                raise ValueError(
                    "--prompt_template: the template does not continue the prompt it asks with, so training and "
                    f"serving would differ: it asks with {prompt[-60:]!r} and tells {text[-120:]!r}"
                )
            stop = end + len(end_text)
            parts.append((text[:stop], (len(prompt), stop if add_eos_token else end)))
        last = parts[-1][0]
        if all(last.startswith(text) for text, _ in parts):
            texts.append(last)
            spans.append([span for _, span in parts])
        else:
            texts += [text for text, _ in parts]
            spans += [[span] for _, span in parts]
    return texts, spans


def encode(conversations, tokenizer, train_on_inputs=False, add_eos_token=True, cutoff_len=2048, workers=None):
    """Tokenize conversations with the tokenizer's chat template and mark the tokens that are learned.

    Returns (examples, counts). An example is (ids, learned), [T] int32 and [T] bool; counts says how many
    conversations there were, how many examples were cut at cutoff_len tokens or left out because nothing of their
    answer was left, and how many answers are empty. Many rows are shared out over `workers` processes, by default
    one a core.

    A text is cut where an answer starts and where it stops, and the parts are tokenized: the prompt as a server
    tokenizes it, then what is generated after it. A tokenizer that puts a space before the first word of a text
    (SentencePiece) would put one before each part, so with it the text is tokenized whole.
    """
    end_text, end_id = check_template(tokenizer, add_eos_token)
    backend, chunk = tokenizer.backend_tokenizer, 1000
    whole = backend.encode("a", add_special_tokens=False).tokens != ["a"]
    to_ids = tokenize_by_word(backend)

    def encode_chunk(at):
        texts, spans = mark_answers(conversations[at : at + chunk], tokenizer, end_text, add_eos_token)
        rows = tokenize_whole(texts, spans, backend) if whole else tokenize_parts(texts, spans, to_ids)
        examples, cut = [], 0
        empty = sum(text.startswith(end_text, start) for text, s in zip(texts, spans) for start, _ in s if end_text)
        for ids, learned in rows:
            cut += len(ids) > cutoff_len
            ids, learned = np.array(ids[:cutoff_len], np.int32), learned[:cutoff_len]
            if learned[1:].any():  # nothing predicts the first token
                if train_on_inputs:
                    learned = np.full(len(ids), True) if add_eos_token else ids != end_id
                examples.append((ids, learned))
        left_out = len(rows) - len(examples)
        return examples, {"examples": len(examples), "cut": cut, "left_out": left_out, "empty": empty}

    starts = range(0, len(conversations), chunk)
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1  # elsewhere forking is not safe
        workers = min(cores, len(starts) // 4)
    if workers > 1:
        # forked, so that nothing is copied to the workers; they do not touch the GPU
        with multiprocessing.get_context("fork").Pool(workers, adopt, (encode_chunk,)) as pool:
            try:
                chunks = pool.map(call_adopted, starts)
            except ValueError as error:
                raise ValueError(str(error)) from None
    else:
        chunks = [encode_chunk(at) for at in starts]
    counts = {name: sum(c[name] for _, c in chunks) for name in ("examples", "cut", "left_out", "empty")}
    return [example for examples, _ in chunks for example in examples], {"conversations": len(conversations)} | counts


def adopt(function):
    """Remember, in a forked worker of `encode`, the function that it runs: a closure cannot be sent to it."""
    call_adopted.function = function


def call_adopted(argument):
    """Run the adopted function in a worker."""
    return call_adopted.function(argument)


def tokenize_by_word(backend):
    """Return a function from a list of texts to their token ids, several times as fast as the tokenizer itself.

    Text is cut before a single space between two printable ASCII characters, where pre-tokenizers cut anyway, and the
    ids of what lies between are remembered. A tokenizer whose pre-tokenizer does not cut there is called on whole
    texts.
    """
    known, pieces = {}, ["The", " quick", " 12", " (brown)", " Fox.", " 3.5", " -", " test,", " 'a'", " <b>", " 7"]

    def plain(text):
        return backend.encode(text, add_special_tokens=False).ids

    text = "".join(pieces)
    cuts = backend.pre_tokenizer.pre_tokenize_str(text) if backend.pre_tokenizer else []
    apart = {start for _, (start, _) in cuts} >= set(itertools.accumulate(map(len, pieces[:-1])))
    spaced = any(" " in token.content for token in backend.get_added_tokens_decoder().values())
    if not apart or spaced or plain(text) != [i for piece in pieces for i in plain(piece)]:
        return lambda texts: [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]
    split = re.compile("(?<=[!-~])(?= [!-~])").split

    def by_word(text):
        ids = []
        for piece in split(text):
            found = known.get(piece)
            if found is None:
                if len(known) > 1_000_000:
                    known.clear()
                found = known[piece] = plain(piece)
            ids += found
        return ids

    return lambda texts: [by_word(text) for text in texts]


def tokenize_parts(texts, spans, to_ids):
    """Return (ids list, learned [T] bool) of texts, each prompt tokenized as a server does and its answer by itself.

    Where a later prompt does not begin with the tokens that came before it (its history holds an answer that merges
    with what stands before or after it), that turn becomes an example of its own.
    """
    parts = []
    for text, answers in zip(texts, spans, strict=True):
        for start, stop in answers:
            parts += [text[:start], text[start:stop]]
        parts.append(text[answers[-1][1] :])
    ids, rows = iter(to_ids(parts)), []
    for answers in spans:
        examples = []
        for _ in answers:
            prompt, answer = next(ids), next(ids)
            row, learned = examples[-1] if examples else ([], [])
            if examples and prompt[: len(row)] == row:
                examples.pop()
            else:
                learned = []
            examples.append((prompt + answer, [*learned, (len(prompt), len(prompt) + len(answer))]))
        tail = next(ids)  # an end token that is not learned
        examples[-1] = (examples[-1][0] + tail, examples[-1][1])
        for row, learned in examples:
            mask = np.zeros(len(row), bool)
            for start, stop in learned:
                mask[start:stop] = True
            rows.append((row, mask))
    return rows


def tokenize_whole(texts, spans, backend):
    """Return (ids, learned) lists of texts tokenized whole; a token is learned if it starts in an answer.

    An answer that merges with its prompt is refused: a server, which tokenizes the prompt alone, would give the
    model other tokens.
    """
    rows = []
    for text, answers, encoding in zip(texts, spans, backend.encode_batch(texts, add_special_tokens=False)):
        ids = encoding.ids
        learned = [any(a <= start < b for a, b in answers) for start, _ in encoding.offsets]
        for start, _ in answers:
            asked = backend.encode(text[:start], add_special_tokens=False).ids
            if ids[: len(asked)] != asked:
                raise ValueError(
                    f"--prompt_template: the generation prompt ends in {text[:start][-20:]!r}, which this tokenizer "
                    f"merges with the answer {text[start : start + 40]!r}: end the prompt with a newline or a special "
                    "token, or take the white space off that answer"
                )
        rows.append((ids, np.array(learned)))
    return rows


class Examples(torch.utils.data.Dataset):
    """Tokenized examples in three flat arrays, which the ranks of a machine share by memory-mapping one folder."""

    @staticmethod
    def save(folder, examples):
        """Write (ids, learned) pairs below `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "ends.npy", np.cumsum([0] + [len(ids) for ids, _ in examples]))
        np.save(folder / "ids.npy", np.concatenate([ids for ids, _ in examples] or [np.zeros(0, np.int32)]))
        np.save(folder / "learned.npy", np.concatenate([mask for _, mask in examples] or [np.zeros(0, bool)]))

    def __init__(self, folder):
        self.ends = np.load(folder / "ends.npy")
        self.ids, self.learned = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("ids", "learned"))

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        """Return {"input_ids": [T], "labels": [T]}, both int64."""
        start, stop = self.ends[i], self.ends[i + 1]
        ids = self.ids[start:stop].astype(np.int64)
        labels = np.where(self.learned[start:stop], ids, IGNORE)
        labels[0] = IGNORE  # nothing predicts the first token
        return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}

    def lengths(self):
        """Return the number of tokens of each example, [examples]."""
        return np.diff(self.ends)

    def sha256(self):
        """Return a digest of all tokens and labels."""
        digest = hashlib.sha256()
        for array in (self.ends, self.ids, self.learned):
            digest.update(array.data)
        return digest.hexdigest()


class MicroBatches(torch.utils.data.Sampler):
    """The example numbers of each micro-batch of this rank, one epoch long, as a DataLoader's batch_sampler.

    An epoch is one permutation of the examples, the same for any number of ranks; a step takes the next batch_size
    of it, the last step of an epoch what is left. Only then is a step's batch dealt out, so that every way to split
    it trains on the same examples. Ranks always have equally many micro-batches; some may be empty in an epoch's
    last step. Packed rows are dealt out so that they have about equally many tokens, padded ones so that examples of
    like length meet.
    """

    def __init__(self, lengths, batch_size, micro_batch_size, rank, world_size, seed, group_by_length, packing):
        self.lengths, self.batch_size, self.rank, self.world_size = lengths, batch_size, rank, world_size
        self.parts = batch_size // micro_batch_size  # micro-batches of a step, over all ranks
        self.seed, self.group_by_length, self.packing, self.epoch = seed, group_by_length, packing, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def steps(self, epoch):
        """Return the batches of an epoch: a list of arrays of example numbers, for all ranks together."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.lengths))
        if self.group_by_length:  # sort within pools of 50 batches, then take the batches in random order
            pool = 50 * self.batch_size
            pools = [order[i : i + pool] for i in range(0, len(order), pool)]
            order = np.concatenate([p[np.argsort(-self.lengths[p], kind="stable")] for p in pools])
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        if self.group_by_length:  # the short last batch stays last: every epoch has its steps at the same places
            batches = [batches[i] for i in [*rng.permutation(len(batches) - 1), len(batches) - 1]]
        return batches

    def __len__(self):
        return math.ceil(len(self.lengths) / self.batch_size) * (self.parts // self.world_size)

    def __iter__(self):
        for batch in self.steps(self.epoch):
            batch = batch[np.argsort(-self.lengths[batch], kind="stable")]
            if self.packing:
                parts = [batch[i :: self.parts] for i in range(self.parts)]
            else:
                parts = np.array_split(batch, self.parts)
            for i in range(self.rank, self.parts, self.world_size):
                yield parts[i].tolist()


def pack(examples):
    """Collate examples end to end into one row, for `packed_forward`; no examples make a row without a label.

    Returns input_ids, position_ids, labels [1, N]; cu_seq_lens [B+1] int32, where each example starts, and max_length,
    the longest; positions [L] and targets [L], the places that predict a labeled token, and that token.
    """
    if not examples:
        examples = [{"input_ids": torch.zeros(2, dtype=torch.long), "labels": torch.full((2,), IGNORE)}]
    input_ids = torch.cat([e["input_ids"] for e in examples])[None]
    labels = torch.cat([e["labels"] for e in examples])[None]
    lengths = [len(e["input_ids"]) for e in examples]
    positions = (labels[0, 1:] != IGNORE).nonzero()[:, 0]
    return {
        "input_ids": input_ids,
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "labels": labels,
        "cu_seq_lens": torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        "max_length": max(lengths),
        "positions": positions,
        "targets": labels[0, 1:][positions],
    }


def pad(examples, pad_id):
    """Collate examples into a right-padded batch: input_ids, attention_mask, labels [B, T]."""
    if not examples:
        examples = [{"input_ids": torch.full((2,), pad_id), "labels": torch.full((2,), IGNORE)}]
    longest = max(len(e["input_ids"]) for e in examples)
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for e in examples:
        fill = longest - len(e["input_ids"])
        batch["input_ids"].append(F.pad(e["input_ids"], (0, fill), value=pad_id))
        batch["attention_mask"].append(F.pad(torch.ones_like(e["input_ids"]), (0, fill)))
        batch["labels"].append(F.pad(e["labels"], (0, fill), value=IGNORE))
    return {name: torch.stack(rows) for name, rows in batch.items()}


# -----------------------------------------------------------------------------
# model: packed rows, and a loss without the [N, V] logits


def packed_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, cu_seq_lens=None, **kwargs):
    """Causal attention within each example of a packed row, as an attention function of transformers.

    query [1, H, N, D], key and value [1, KV heads, N, D]; cu_seq_lens [B+1]. Returns ([1, N, H, D], None). On CUDA
    one FlashAttention call of torch itself; elsewhere one scaled_dot_product_attention an example.
    """
    odd = [name for name in ("softcap", "s_aux", "head_mask") if kwargs.get(name) is not None]
    odd += ["attention dropout"] * (dropout > 0)
    if odd:
        raise ValueError(f"packed rows do not know this model's attention ({', '.join(odd)}): use --nopacking")
    window, grouped = kwargs.get("sliding_window"), query.shape[1] != key.shape[1]
    fits = query.shape[-1] == value.shape[-1] <= 256 and query.shape[-1] % 8 == 0  # FlashAttention's head sizes
    half = query.dtype == key.dtype == value.dtype and query.dtype != torch.float32
    if query.is_cuda and half and fits and torch.cuda.get_device_capability()[0] >= 8:
        longest = kwargs["max_length"]
        out = varlen_attn(
            query[0].transpose(0, 1),
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            cu_seq_lens,
            cu_seq_lens,
            longest,
            longest,
            scale=scaling,
            window_size=(window - 1 if window else -1, 0),
            enable_gqa=grouped,
        )
        return out[None], None
    outs, ends = [], cu_seq_lens.tolist()
    for start, stop in zip(ends, ends[1:], strict=False):
        mask = None
        if window and stop - start > window:
            far = torch.arange(stop - start, device=query.device)
            far = far[:, None] - far[None, :]
            mask = (far >= 0) & (far < window)
        q, k, v = (x[:, :, start:stop] for x in (query, key, value))
        outs.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(outs, dim=2).transpose(1, 2).contiguous(), None


def head_loss(head, hidden, targets, with_accuracy=False, chunk=512):
    """Return (summed nll, number of right guesses or None) of a language-model head without its [L, V] logits.

    hidden [L, D], targets [L]. With `with_accuracy` no gradient is made. The nll is summed in float32.
    """
    if not len(targets):
        return hidden.float().sum() * 0, hidden.new_zeros((), dtype=torch.long)
    hidden, weight, bias = hidden.to(head.weight.dtype), head.weight, head.bias
    if not with_accuracy:
        options = torch.nn.LinearCrossEntropyOptions()
        # a sum in half precision would keep three digits, and in float16 overflow: there, one nll a label
        how = "sum" if hidden.dtype == torch.float32 else "none"
        nll = F.linear_cross_entropy(
            hidden, weight, targets, linear_bias=bias, reduction=how, ignore_index=IGNORE, options=options
        )
        return nll.float().sum(), None
    nll, right = 0, 0
    for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        logits = F.linear(h, weight, bias).float()  # [chunk, V]
        nll = nll + F.cross_entropy(logits, t, reduction="sum")
        right = right + (logits.argmax(-1) == t).sum()
    return nll, right


def make_packed(model, neftune_noise_alpha=0.0):
    """Change the forward of a causal language model, in place, to take the rows of `pack` and return their loss.

    The loss is the summed nll over `num_items_in_batch` labels (over 1 if None). In eval mode it returns the sums
    {"nll", "right"} instead. NEFTune (Jain et al. 2023, arXiv:2310.05914, algorithm 1): uniform noise on the input
    embeddings, alpha / sqrt(T D) with T the length of the example, not that of the row.
    """
    head, decoder = model.get_output_embeddings(), model.get_decoder()
    if type(head) is not torch.nn.Linear:
        kind = f"{type(head).__module__}.{type(head).__name__}"
        raise ValueError(
            f"packed rows need a plain linear output layer, this model's is {kind} "
            "(is it among --lora_target_modules?): use --nopacking"
        )
    AttentionInterface.register("packed", packed_attention)
    AttentionMaskInterface.register("packed", lambda *args, **kwargs: None)
    model.set_attn_implementation("packed")

    # through the module's own call, so that ZeRO-3's hooks gather the weight
    head.forward = torch.compiler.disable(functools.partial(head_loss, head))

    # Trainer passes num_items_in_batch to a forward that takes **kwargs
    def forward(
        self, input_ids, position_ids, cu_seq_lens, max_length, positions, targets, num_items_in_batch=None, **kwargs
    ):
        embeds = self.get_input_embeddings()(input_ids)  # [1, N, D]
        if self.training and neftune_noise_alpha:
            lengths = cu_seq_lens.diff()
            scale = neftune_noise_alpha / (lengths * embeds.shape[-1]).sqrt()
            noise = torch.empty_like(embeds).uniform_(-1, 1)
            embeds = embeds + noise * scale.repeat_interleave(lengths).to(embeds.dtype)[None, :, None]
        hidden = decoder(
            inputs_embeds=embeds,
            position_ids=position_ids,
            cu_seq_lens=cu_seq_lens,
            max_length=max_length,
            use_cache=False,
        ).last_hidden_state[0]  # [N, D]
        nll, right = head(hidden[positions], targets, with_accuracy=not self.training)
        if not self.training:
            return {"nll": nll, "right": right}
        return {"loss": nll / (1 if num_items_in_batch is None else num_items_in_batch)}

    model.forward = types.MethodType(forward, model)


@torch.no_grad()
def check_packed(model, vocab_size, device):
    """Refuse a model that packed rows would change.

    Its packed loss on three examples must be that of its own forward on each, and the hidden states of the last
    must not depend on the examples before it.
    """
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(vocab_size, (n,), generator=generator) for n in (9, 24, 17)]
    made = [{"input_ids": row, "labels": torch.cat([torch.tensor([IGNORE]), row[1:]])} for row in rows]
    # int8 rounds activations by what else is in their batch
    exact = model.dtype == torch.float32 and not getattr(model, "is_quantized", False)
    was_training = model.training
    model.eval()
    head, head_forward, hidden, outs = model.get_output_embeddings(), model.get_output_embeddings().forward, [], []
    hook = model.get_decoder().register_forward_hook(lambda m, a, out: hidden.append(out.last_hidden_state[0].float()))
    try:
        for batch in (pack(made), pack(made[-1:])):
            batch = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}
            outs.append(model(**batch)["nll"].item())
        hook.remove()
        model.set_attn_implementation("sdpa")
        head.forward = types.MethodType(type(head).forward, head)
        alone = 0.0
        for row in rows:
            row = row[None].to(device)
            logits = type(model).forward(model, input_ids=row, use_cache=False).logits.float()
            alone += F.cross_entropy(logits[0, :-1], row[0, 1:], reduction="sum").item()
    except RuntimeError as error:
        raise ValueError(f"packed rows do not work for this model ({error}): use --nopacking") from error
    model.set_attn_implementation("packed")
    head.forward = head_forward
    model.train(was_training)
    behind = hidden[0][-len(rows[-1]) :]
    leak = ((behind - hidden[1]).norm() / hidden[1].norm()).item()
    if not abs(outs[0] - alone) <= (1e-4 if exact else 2e-2) * abs(alone) or leak > (1e-3 if exact else 5e-2):
        raise ValueError(
            f"packed rows do not work for this model: the loss of three test examples is {outs[0]:.5f} packed and "
            f"{alone:.5f} one by one, and those before an example change its hidden states by {leak:.1%}: use "
            "--nopacking"
        )


def default_learning_rate(config):
    """Return the LoRA learning rate for a model: 5e-4 (2000 / hidden size)^p, p by family.

    The fit of Schulman et al., "LoRA Without Regret" (Thinking Machines 2025), as in tinker-cookbook's
    hyperparam_utils: p is 0.0775 for Qwen, 0.781 for Llama, and here for every other family. It was made with
    lora_alpha 32 on models from 1B to 70B parameters.
    """
    exponent = 0.0775 if config.model_type.startswith("qwen") else 0.781
    return 5e-4 * (2000 / config.hidden_size) ** exponent


def add_lora(model, targets, **config):
    """Wrap `model` in LoRA layers; `targets` ["all-linear"] are all linear layers but the output layer."""
    from peft import LoraConfig, get_peft_model

    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "in_features")}
    known = {name.rpartition(".")[2] for name, _ in model.named_modules() if name}
    unknown = [name for name in targets if name != "all-linear" and name.rpartition(".")[2] not in known]
    if "all-linear" in targets and len(targets) > 1:
        raise ValueError(f"--lora_target_modules {','.join(targets)}: all-linear stands alone")
    if unknown or not targets:
        raise ValueError(
            f"--lora_target_modules {','.join(targets) or '[]'}: the model has no {', '.join(unknown) or 'such name'}; "
            f"its linear layers are {', '.join(sorted(linear))}, or all-linear for all but the output layer"
        )
    targets = "all-linear" if targets == ["all-linear"] else targets
    zero3 = transformers.integrations.is_deepspeed_zero3_enabled()
    lora = LoraConfig(target_modules=targets, task_type="CAUSAL_LM", bias="none", **config)
    # adapters in float32 next to a half-precision base, except where DeepSpeed owns the dtype
    try:
        return get_peft_model(model, lora, autocast_adapter_dtype=not zero3)
    except ValueError as error:
        raise ValueError(f"--lora_target_modules {targets}: {error}") from error


# -----------------------------------------------------------------------------
# training: the Trainer, with our order of examples, exact evaluation and atomic checkpoints


class LoraTrainer(Trainer):
    """transformers.Trainer with the batches of `MicroBatches`, an exact `evaluate` and atomic checkpoints.

    The loss of a step is summed over the labels of the whole batch, over all micro-batches and ranks, and divided by
    their number: Trainer gathers it (num_items_in_batch) and undoes the mean that DDP takes over the ranks.
    """

    def __init__(self, *args, batches, packing, tokenizer, generation_config, settings, **kwargs):
        super().__init__(*args, **kwargs)
        self.batches, self.packing, self.tokenizer = batches, packing, tokenizer
        self.generation_config, self.settings = generation_config, settings

    def get_train_dataloader(self):
        loader = torch.utils.data.DataLoader(
            self.train_dataset,
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            pin_memory=self.args.device.type == "cuda",
        )
        loader.set_epoch = self.batches.set_epoch
        return loader

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Return the token-weighted eval_loss and eval_token_acc over the whole validation set.

        Sums are taken over all ranks and divided once, so neither the batch size nor the number of ranks matters
        (Trainer's own averages batch means and counts the examples that fill up the last batch).
        """
        dataset, started, world_size = self.eval_dataset, time.time(), self.args.world_size
        order = np.argsort(-dataset.lengths(), kind="stable")
        size = self.args.per_device_eval_batch_size
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        model = self.model_wrapped if self.is_deepspeed_enabled else self.model
        was_training = model.training
        model.eval()
        nll, right, tokens = 0.0, 0, 0
        # every rank makes the same number of forward passes, for ZeRO-3 gathers weights in each
        for at in range(self.args.process_index, math.ceil(len(batches) / world_size) * world_size, world_size):
            batch = self.data_collator([dataset[i] for i in batches[at]] if at < len(batches) else [])
            inputs = self._prepare_inputs(batch)
            with self.compute_loss_context_manager():
                if self.packing:
                    sums = model(**inputs)
                    nll, right = nll + sums["nll"].item(), right + int(sums["right"])
                else:
                    labels = inputs.pop("labels")[:, 1:]
                    logits = model(**inputs).logits[:, :-1][labels != IGNORE].float()  # [L, V]
                    targets = labels[labels != IGNORE]
                    nll = nll + F.cross_entropy(logits, targets, reduction="sum").item()
                    right += int((logits.argmax(-1) == targets).sum())
            tokens += int((batch["labels"][:, 1:] != IGNORE).sum()) if self.packing else len(targets)
        model.train(was_training)
        sums = torch.tensor([nll, right, tokens], dtype=torch.float64)
        if world_size > 1:
            sums = sums.to(self.args.device)
            dist.all_reduce(sums)
        nll, right, tokens = sums.tolist()
        metrics = {
            "eval_loss": nll / tokens,
            "eval_token_acc": right / tokens,
            "eval_tokens": int(tokens),
            "eval_seconds": time.time() - started,
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir=None, state_dict=None):
        """Write the adapter, the tokenizer with its template, and the generation config; no pickled arguments."""
        if self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            # "auto" would look the base up on the hub; embeddings are not among what is trained
            self.model.save_pretrained(output_dir, state_dict=state_dict, save_embedding_layers=False)
            self.tokenizer.save_pretrained(output_dir)
            self.generation_config.save_pretrained(output_dir)

    def _save_checkpoint(self, model, trial):
        """Write checkpoint-N under another name and rename it once it is whole; then drop all but best and last."""
        self.store_flos()
        out, step = Path(self.args.output_dir), self.state.global_step
        target, partial = out / f"checkpoint-{step}", out / f"checkpoint-{step}.incomplete"
        if self.state.best_global_step:
            self.state.best_model_checkpoint = str(out / f"checkpoint-{self.state.best_global_step}")
        try:
            if self.args.should_save:
                shutil.rmtree(partial, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            self.save_model(str(partial), _internal_call=True)
            self._save_optimizer_and_scheduler(str(partial))
            self._save_scaler(str(partial))
            self._save_rng_state(str(partial))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(str(partial / "trainer_state.json"))
                files = {str(file.relative_to(partial)): file_sha256(file) for file in sorted(partial.rglob("*.*"))}
                write_json(partial / "manifest.json", {"settings": self.settings, "files": files})
                shutil.rmtree(target, ignore_errors=True)
                partial.rename(target)
                keep = {target.name, f"checkpoint-{self.state.best_global_step}"}
                for old in out.glob("checkpoint-*"):
                    if old.name not in keep:
                        shutil.rmtree(old)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap a full disk in their own
            if isinstance(error, (torch.OutOfMemoryError, dist.DistBackendError)):
                raise
            shutil.rmtree(partial, ignore_errors=True)
            free = shutil.disk_usage(out).free / 1e6
            raise ValueError(
                f"{target} could not be written ({free:.0f} MB free): {error}. Earlier checkpoints are untouched; make "
                "room and continue with --resume_from_checkpoint auto"
            ) from error
        self.accelerator.wait_for_everyone()


class Report(TrainerCallback):
    """Writes log.jsonl and the console lines, evaluates and saves the last step, and stops early when asked to."""

    def __init__(self, trainer, patience, logging_steps):
        self.trainer, self.patience, self.logging_steps = trainer, patience, logging_steps
        self.bar, self.tokens = None, 0
        self.log_path = Path(trainer.args.output_dir) / "log.jsonl"

    @functools.cache  # noqa: B019 (one Report a run)
    def tokens_of_epoch(self, epoch):
        """Return the number of tokens of each step of an epoch, over all ranks."""
        batches = self.trainer.batches
        return [int(batches.lengths[batch].sum()) for batch in batches.steps(epoch)]

    def tokens_of_step(self, step):
        """Return the number of tokens of optimizer step `step` (from 1), over all ranks."""
        per_epoch = math.ceil(len(self.trainer.batches.lengths) / self.trainer.batches.batch_size)
        return self.tokens_of_epoch((step - 1) // per_epoch)[(step - 1) % per_epoch]

    def on_train_begin(self, args, state, control, **kwargs):
        self.tokens = sum(self.tokens_of_step(step) for step in range(1, state.global_step + 1))
        if not state.is_world_process_zero:
            return
        kept = [r for r in read_log(self.log_path) if r["step"] <= state.global_step]
        partial = self.log_path.with_suffix(".incomplete")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        partial.replace(self.log_path)
        from tqdm import tqdm

        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", leave=False, disable=None)

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.time()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_evaluate = self.trainer.eval_dataset is not None
            control.should_save = True
        if self.bar is not None:
            self.bar.update()

    def on_log(self, args, state, control, logs, **kwargs):
        record = {"step": state.global_step, "epoch": round(state.epoch, 6)}
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise ValueError(
                    f"the loss is {logs['loss']} at step {state.global_step}; the checkpoints before it are untouched. "
                    "Lower --learning_rate, or with --dtype float16 use bfloat16 or float32"
                )
            tokens = self.tokens_of_step(state.global_step)
            self.tokens += tokens
            seconds = time.time() - self.began
            record |= {name: logs[name] for name in ("loss", "grad_norm", "learning_rate") if name in logs}
            if not math.isfinite(record.get("grad_norm", 0.0)):  # a step that float16's loss scaler skips
                record["grad_norm"] = None
            record |= {"tokens": self.tokens, "tokens_per_second": tokens / seconds, "seconds": seconds}
        elif "eval_loss" in logs:
            record |= {name: value for name, value in logs.items() if name.startswith("eval_")}
        else:
            return  # Trainer's own summary
        if not state.is_world_process_zero:
            return
        with open(self.log_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        at = f"step {state.global_step:05d}/{state.max_steps:05d}"
        if "loss" in record and (state.global_step % self.logging_steps == 0 or state.global_step == 1):
            self.bar.write(
                f"{at} | loss {record['loss']:.4f} | lr {record['learning_rate']:.2e} | "
                f"grad {record.get('grad_norm') or math.nan:.3f} | {record['tokens_per_second']:,.0f} tok/s"
            )
        elif "eval_loss" in record:
            best = " | best so far" if record["eval_loss"] < (state.best_metric or math.inf) else ""
            self.bar.write(
                f"{at} | eval_loss {record['eval_loss']:.4f} | eval_token_acc {record['eval_token_acc']:.4f} | "
                f"{record['eval_tokens']:,} tokens{best}"
            )

    def on_evaluate(self, args, state, control, **kwargs):
        losses = [record["eval_loss"] for record in state.log_history if "eval_loss" in record]
        if self.patience and len(losses) - 1 - losses.index(min(losses)) >= self.patience:
            control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()


def file_sha256(path):
    """Return the SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_log(path):
    """Return the records of a log.jsonl; without a last line that a killed process left unfinished."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
    return [json.loads(line) for line in lines[:-1]]


def find_checkpoint(output_dir, resume, settings):
    """Return the checkpoint to resume from, or None where --resume_from_checkpoint is auto and there is none yet.

    Every file of it must be the one that was saved, and the run that saved it must have had the same settings.
    """
    path = Path(resume)
    if resume != "auto" and path.resolve().parent != Path(output_dir).resolve():
        raise ValueError(f"--resume_from_checkpoint {resume} is not in --output_dir {output_dir}, with the run's log")
    if resume == "auto":
        steps = [p for p in Path(output_dir).glob("checkpoint-*") if p.name.partition("-")[2].isdigit()]
        if not steps:
            return None
        path = max(steps, key=lambda p: int(p.name.partition("-")[2]))
    if not (path / "manifest.json").exists():
        there = sorted(p.name for p in path.parent.glob("checkpoint-*")) if path.parent.is_dir() else []
        raise ValueError(
            f"--resume_from_checkpoint {resume}: {path} is not a whole checkpoint (no manifest.json)"
            + (f"; there are: {', '.join(there)}" if there else "")
        )
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        manifest = {"files": manifest["files"], "settings": manifest["settings"]}
    except (ValueError, KeyError):
        raise ValueError(f"--resume_from_checkpoint: {path}/manifest.json is damaged: take another one") from None
    torn = [n for n, digest in manifest["files"].items() if not (path / n).exists() or file_sha256(path / n) != digest]
    if torn:
        raise ValueError(
            f"--resume_from_checkpoint: {path} is damaged: {', '.join(torn)} missing or changed since it was saved. "
            "Remove it to resume from the one before, or start over with --overwrite"
        )
    then = manifest["settings"]
    changed = [f"{k}: {then.get(k)!r} then, {settings.get(k)!r} now" for k in settings if settings[k] != then.get(k)]
    if changed:
        raise ValueError(
            f"--resume_from_checkpoint: {path} is from another configuration ({'; '.join(changed)}). Resume with the "
            "old flags, or start over in another --output_dir"
        )
    return path


def write_adapter(checkpoint, adapter, num_tensors):
    """Copy a checkpoint's adapter to `adapter`, by renaming, and check what is there: every tensor, and not zero."""
    partial = adapter.with_name("adapter.incomplete")
    shutil.rmtree(partial, ignore_errors=True)
    training = ("optimizer", "scheduler", "scaler", "rng_state", "trainer_state", "manifest", "global_step", "latest")
    training += ("zero_to_fp32",)
    shutil.copytree(checkpoint, partial, ignore=lambda folder, names: [n for n in names if n.startswith(training)])
    with safe_open(partial / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
        lora_b = [name for name in names if "lora_B" in name or "lora_embedding_B" in name]
        zero = [name for name in lora_b if not file.get_tensor(name).any()]
    if len(names) != num_tensors or len(zero) == len(lora_b):
        raise ValueError(
            f"{checkpoint}: the saved adapter has {len(names)} tensors where {num_tensors} were trained, and "
            f"{len(zero)} of {len(lora_b)} LoRA B matrices are all zero: nothing was learned (in the first step of a "
            "warmup the learning rate is 0: --warmup_ratio 0)"
        )
    shutil.rmtree(adapter, ignore_errors=True)
    partial.rename(adapter)


def plot(records, folder):
    """Draw loss.png, learning_rate.png and, with validation, eval_loss.png and eval_token_acc.png from log records."""
    from matplotlib.figure import Figure

    folder.mkdir(exist_ok=True)
    charts = {"loss": "training loss, nll per token", "learning_rate": "learning rate"}
    charts |= {"eval_loss": "validation loss, nll per token", "eval_token_acc": "validation token accuracy"}
    for name, title in charts.items():
        points = [(r["step"], r[name]) for r in records if name in r]
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        if name == "loss":  # exponential moving average with the bias of its start taken out, as in Adam
            smooth, average, weight = [], 0.0, 0.9
            for n, value in enumerate(values, 1):
                average = weight * average + (1 - weight) * value
                smooth.append(average / (1 - weight**n))
            axes.plot(steps, values, color="0.75", label="each step")
            axes.plot(steps, smooth, color="C0", label=f"moving average ({weight:g})")
            axes.legend()
        else:
            axes.plot(steps, values, color="C0", marker="o" if name.startswith("eval") else None)
        axes.set(title=title, xlabel="optimizer step")
        axes.grid(alpha=0.3)
        figure.savefig(folder / f"{name}.png.incomplete", dpi=110, format="png")
        (folder / f"{name}.png.incomplete").rename(folder / f"{name}.png")


def provenance():
    """Return the versions, git commit and script digest that made this run."""
    git = ["git", "-C", str(HERE)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        commit, dirty = None, None
    from importlib.metadata import version

    packages = "torch transformers peft accelerate datasets tokenizers bitsandbytes".split()
    return {
        "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in packages},
        "git": {"commit": commit, "dirty": bool(dirty) if commit else None},
        "script_sha256": file_sha256(__file__),
    }


def train(
    *,
    base_model: str = "data/tiny/model",
    data_path: str = "",
    dataset: str = "",
    dataset_dir: str = "data",
    output_dir: str = "out/finetune",
    prompt_template: str = "",
    # data
    val_set_size: float = 0.05,
    max_samples: int = 0,
    cutoff_len: int = 1024,
    train_on_inputs: bool = False,
    add_eos_token: bool = True,
    packing: bool = True,
    group_by_length: bool = False,
    # optimization
    batch_size: int = 32,
    micro_batch_size: int = 4,
    num_epochs: float = 3.0,
    max_steps: int = 0,
    learning_rate: float = 0.0,
    lr_scheduler_type: str = "cosine",
    warmup_ratio: float = 0.03,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    neftune_noise_alpha: float = 0.0,
    early_stopping_patience: int = 0,
    # adapter
    lora_r: int = 16,
    lora_alpha: int = 32,
    lora_dropout: float = 0.0,
    lora_target_modules: list[str] = ("all-linear",),
    use_rslora: bool = False,
    use_dora: bool = False,
    # memory and speed
    dtype: str = "auto",
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
    activation_checkpointing: bool = False,
    torch_compile: bool = False,
    deepspeed: str = "",
    # run
    save_steps: float = 0.1,
    logging_steps: int = 10,
    resume_from_checkpoint: str = "",
    overwrite: bool = False,
    seed: int = 42,
    wandb_project: str = "",
    wandb_run_name: str = "",
    wandb_watch: str = "",
    wandb_log_model: str = "",
):
    """Fine-tune a causal language model with LoRA on instruction data.

    Without any flag it trains the embedded tiny model on the embedded data (data/tiny/demonstrations.jsonl), in
    minutes on a laptop CPU.

    Args:
        base_model: hub id or folder of the model.
        data_path: data file, folder of data files or hub id, in any of the forms of data/README.md.
        dataset: name, or names with commas, of --dataset_dir/dataset_info.json, in place of --data_path.
        dataset_dir: folder of LLaMA-Factory's dataset_info.json and the files that it names.
        output_dir: where everything of this run is written.
        prompt_template: chat template: a name of templates/ or a .jinja file. Empty: what the model carries, or alpaca.
        val_set_size: rows held out for validation: a share below 1, a number from 1 on, 0 for none.
        max_samples: use only the first so many rows of each source; 0 for all.
        cutoff_len: longest example in tokens; what is longer is cut at its end, and counted.
        train_on_inputs: learn the prompts as well as the responses.
        add_eos_token: learn the token that ends a response; without it the model does not learn to stop.
        packing: micro-batches are one row without padding, and the loss is made without full logits.
        group_by_length: batches of examples of like length; saves padding with --nopacking.
        batch_size: examples of an optimizer step, over all ranks and micro-batches.
        micro_batch_size: examples that one device processes at a time; only rounding, memory and speed depend on it.
        num_epochs: passes over the training rows.
        max_steps: stop after so many optimizer steps; 0 for --num_epochs.
        learning_rate: peak, reached after the warmup; 0 for one that fits the model's family and hidden size.
        lr_scheduler_type: transformers' name of the schedule: cosine, linear, constant_with_warmup, ...
        warmup_ratio: share of the steps in which the learning rate rises from 0.
        weight_decay: of AdamW, decoupled.
        max_grad_norm: the gradient's norm is clipped to this; 0 for no clipping.
        neftune_noise_alpha: strength of NEFTune's noise on the embeddings, 5 to 15 in the paper; 0 for none.
        early_stopping_patience: stop after so many evaluations without a better eval_loss; 0 for never.
        lora_r: rank of the adapter matrices.
        lora_alpha: the adapter is scaled by lora_alpha / lora_r, or lora_alpha / sqrt(lora_r) with --use_rslora.
        lora_dropout: dropout on the adapters' inputs; above 0 the result depends on --micro_batch_size and ranks.
        lora_target_modules: names of the layers that get an adapter; all-linear for all but the output layer.
        use_rslora: rank-stabilized scaling (arXiv:2312.03732).
        use_dora: weight-decomposed adapters (arXiv:2402.09353); slower.
        dtype: of the base weights: auto (bfloat16 on a GPU that has it, else float32), bfloat16, float16 or float32.
        load_in_8bit: quantize the base to int8 with bitsandbytes.
        load_in_4bit: quantize the base to NF4 with bitsandbytes (QLoRA).
        activation_checkpointing: recompute activations in the backward pass: less memory, about a third slower.
        torch_compile: compile the model; pays off in long runs on a GPU.
        deepspeed: a DeepSpeed config such as deepspeed/zero3.json; needs torchrun and the deepspeed package.
        save_steps: evaluate and save every so many steps; below 1 it is a share of the run.
        logging_steps: print a line every so many steps; log.jsonl has every step.
        resume_from_checkpoint: auto for the last one in --output_dir, or a checkpoint's folder. Empty: start afresh.
        overwrite: replace what an earlier run left in --output_dir.
        seed: of everything random.
        wandb_project: log to this Weights & Biases project. Empty: do not.
        wandb_run_name: name of the run there.
        wandb_watch: false, gradients, parameters or all.
        wandb_log_model: false, checkpoint or end.
    """
    flags = dict(locals())
    quiet_libraries()

    # 1. check flags
    out, world_size = Path(output_dir), int(os.environ.get("WORLD_SIZE", 1))
    names = [name.strip() for name in dataset.split(",") if name.strip()]
    if dataset and not names:
        raise ValueError(f"--dataset {dataset!r}: no name in it")
    if overwrite and resume_from_checkpoint:
        raise ValueError("--overwrite starts over and --resume_from_checkpoint goes on: give one of them")
    if data_path and dataset:
        raise ValueError(f"--data_path {data_path} and --dataset {dataset}: give one of them")
    positive = {"batch_size": batch_size, "micro_batch_size": micro_batch_size, "lora_r": lora_r}
    positive |= {"save_steps": save_steps, "logging_steps": logging_steps}
    positive |= {"num_epochs": num_epochs, "cutoff_len": cutoff_len, "lora_alpha": lora_alpha}
    for name, value in positive.items():
        if not 0 < value < math.inf:
            raise ValueError(f"--{name} must be above 0, got {value}")
    not_negative = {"val_set_size": val_set_size, "max_samples": max_samples, "max_steps": max_steps}
    not_negative |= {"weight_decay": weight_decay, "max_grad_norm": max_grad_norm, "warmup_ratio": warmup_ratio}
    not_negative |= {"neftune_noise_alpha": neftune_noise_alpha, "lora_dropout": lora_dropout, "seed": seed}
    not_negative |= {"early_stopping_patience": early_stopping_patience, "learning_rate": learning_rate}
    for name, value in not_negative.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"--{name} must not be negative, got {value}")
    at_once = micro_batch_size * world_size
    if batch_size % at_once:
        low, high = max(1, batch_size // at_once) * at_once, (batch_size // at_once + 1) * at_once
        raise ValueError(
            f"--batch_size {batch_size} must be a multiple of {at_once} = --micro_batch_size {micro_batch_size} x "
            f"{world_size} ranks: it is split into equal micro-batches. Nearest that fit: "
            + (f"{low} or {high}" if low != high else f"{low}")
        )
    if seed >= 2**32:
        raise ValueError(f"--seed {seed} must be below 2**32")
    if warmup_ratio >= 1 or lora_dropout >= 1:
        raise ValueError(f"--warmup_ratio {warmup_ratio} and --lora_dropout {lora_dropout} must be below 1")
    if early_stopping_patience and not val_set_size:
        raise ValueError(f"--early_stopping_patience {early_stopping_patience} needs a validation set: --val_set_size")
    if load_in_8bit and load_in_4bit:
        raise ValueError("--load_in_8bit and --load_in_4bit: give one of them")
    known = "linear cosine constant constant_with_warmup inverse_sqrt".split()  # the others need settings of their own
    if lr_scheduler_type not in known:
        known = ", ".join(known)
        raise ValueError(f"--lr_scheduler_type {lr_scheduler_type}: one of {known}")
    if wandb_project and not importlib.util.find_spec("wandb"):
        raise ValueError(f"--wandb_project {wandb_project}: the package is not installed: pip install wandb")
    if deepspeed:
        if find_path(deepspeed) is None:
            raise ValueError(f"--deepspeed {deepspeed}: no such file; deepspeed/ has zero1.json to zero3.json")
        if "WORLD_SIZE" not in os.environ:
            raise ValueError("--deepspeed needs a launcher: torchrun --nproc_per_node=1 finetune.py --deepspeed ...")
        if not transformers.integrations.is_deepspeed_available():
            how = "pip install --no-build-isolation -r requirements-deepspeed.txt"
            raise ValueError(f"--deepspeed {deepspeed}: the package is not installed: {how}")
    base, base_dtype, on_gpu = find_base(base_model), pick_dtype(dtype), torch.cuda.is_available()
    dtype = str(base_dtype).removeprefix("torch.")
    config = load_config(base)
    limit_threads(config)
    learning_rate = learning_rate or default_learning_rate(config)
    steps_of_data = {"num_train_epochs": num_epochs} if not max_steps else {"max_steps": max_steps}

    # 2. processes and seeds (before the model: DeepSpeed ZeRO-3 shards it while it is loaded)
    if wandb_project:
        os.environ["WANDB_PROJECT"] = wandb_project
        os.environ["WANDB_WATCH"] = wandb_watch or "false"
        os.environ["WANDB_LOG_MODEL"] = wandb_log_model or "false"
    args = TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=micro_batch_size,
        per_device_eval_batch_size=micro_batch_size,
        gradient_accumulation_steps=batch_size // at_once,
        **steps_of_data,
        learning_rate=learning_rate,
        lr_scheduler_type=lr_scheduler_type,
        warmup_steps=warmup_ratio,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        neftune_noise_alpha=None if packing else neftune_noise_alpha or None,  # packed_forward has its own
        logging_steps=1,  # a step's own loss; a mean over several would be lost where a run is resumed
        logging_nan_inf_filter=False,
        eval_strategy="steps" if val_set_size else "no",
        save_strategy="steps",
        metric_for_best_model="eval_loss" if val_set_size else None,
        greater_is_better=False,
        seed=seed,
        bf16=dtype == "bfloat16" and on_gpu,
        fp16=dtype == "float16" and on_gpu,
        use_cpu=not on_gpu and not torch.backends.mps.is_available(),
        ddp_backend="gloo" if world_size > 1 and not on_gpu else None,
        ddp_find_unused_parameters=False,
        deepspeed=str(find_path(deepspeed)) if deepspeed else None,
        torch_compile=torch_compile,
        activation_checkpointing=activation_checkpointing,
        remove_unused_columns=False,
        report_to=["wandb"] if wandb_project else [],
        run_name=wandb_run_name or None,
    )
    if deepspeed:  # its own view of the ranks, which ZeRO-3 needs while the model is loaded
        from deepspeed.comm import init_distributed

        init_distributed(dist_backend="nccl" if on_gpu else "gloo")
    zero3 = transformers.integrations.is_deepspeed_zero3_enabled()
    if zero3 and (load_in_8bit or load_in_4bit):
        raise ValueError(f"--deepspeed {deepspeed}: ZeRO-3 cannot shard a quantized base; use ZeRO-2, or 16 bits")
    if activation_checkpointing:  # ZeRO-3 needs the reentrant kind: it gathers a layer's weights to recompute it
        args.activation_checkpointing_kwargs = {"use_reentrant": zero3}
    args._n_gpu = min(args.n_gpu, 1)  # several GPUs are used through torchrun, not through nn.DataParallel
    main = args.process_index == 0
    say = functools.partial(print, flush=True) if main else lambda *args, **kwargs: None
    set_seed(seed)

    # 3. data: read, checked and tokenized by one process of each machine
    if main:
        ours = ("run.json", "log.jsonl", "adapter", "plots", "runs")
        theirs = [p for p in out.glob("*") if p.name in ours or p.name.startswith("checkpoint-")]
        if theirs and not overwrite and not resume_from_checkpoint:
            raise ValueError(
                f"--output_dir {output_dir} holds another run: continue it with --resume_from_checkpoint auto, replace "
                "it with --overwrite, or choose another folder"
            )
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--output_dir {output_dir} cannot be made: {error}") from None
    tokenizer = load_tokenizer(base)
    template, separator = use_template(tokenizer, prompt_template)
    end_text, end_id = check_template(tokenizer, add_eos_token)
    # on the machine's own disk: the ranks of a machine are children of one launcher
    tokens = Path(tempfile.gettempdir()) / f"finetune-{os.getpid() if world_size == 1 else os.getppid()}"
    with args.main_process_first(local=True, desc="tokenizing"):
        if args.local_process_index == 0:
            shutil.rmtree(tokens, ignore_errors=True)
            started = time.time()
            sources = [find_dataset(name, dataset_dir) for name in names]
            sources = sources or [(data_path or "data/tiny/demonstrations.jsonl", "train", None, None, None)]
            conversations = read_conversations(sources, separator, max_samples, seed)
            parts = zip(("train", "eval"), split_rows(len(conversations), val_set_size, seed), strict=True)
            counts = {}
            for part, rows in parts:
                examples, counts[part] = encode(
                    [conversations[i] for i in rows], tokenizer, train_on_inputs, add_eos_token, cutoff_len
                )
                if rows and not examples:
                    raise ValueError(
                        f"no label is left in any of the {len(rows)} {part} rows: every prompt fills --cutoff_len "
                        f"{cutoff_len} by itself"
                    )
                Examples.save(tokens / part, examples)
            write_json(tokens / "counts.json", counts | {"seconds": time.time() - started})
    train_set, eval_set = Examples(tokens / "train"), Examples(tokens / "eval")
    counts = json.loads((tokens / "counts.json").read_text(encoding="utf-8"))
    if world_size > 1:
        dist.barrier()  # every rank has mapped the files, which may now lose their names
    if args.local_process_index == 0:
        shutil.rmtree(tokens)

    ignored = "output_dir overwrite resume_from_checkpoint micro_batch_size logging_steps".split()
    ignored += "data_path dataset dataset_dir max_samples".split()  # data_sha256 says what they gave
    ignored += [name for name in flags if name.startswith("wandb_")]
    settings = {name: value for name, value in flags.items() if name not in ignored}
    settings |= {
        "data_sha256": train_set.sha256() + eval_set.sha256(),
        "lora_target_modules": list(lora_target_modules),
    }
    checkpoint = find_checkpoint(output_dir, resume_from_checkpoint, settings) if resume_from_checkpoint else None

    if not len(eval_set):  # a share of very few rows
        args.eval_strategy, args.metric_for_best_model = "no", None
        if early_stopping_patience:
            raise ValueError(f"--early_stopping_patience: --val_set_size {val_set_size} of these rows is none")

    # 4. model
    if getattr(config, "max_position_embeddings", None) and cutoff_len > config.max_position_embeddings:
        limit = config.max_position_embeddings
        if max(part.lengths().max(initial=0) for part in (train_set, eval_set)) > limit:
            raise ValueError(f"--cutoff_len {cutoff_len}: the model has only {limit} positions: set it to {limit}")
    if max(part.ids.max(initial=0) for part in (train_set, eval_set)) >= config.vocab_size:
        raise ValueError(
            f"--base_model {base_model}: the tokenizer has ids beyond the {config.vocab_size} of the model"
        )
    model = load_base(base, base_dtype, load_in_8bit, load_in_4bit, str(args.device))
    model.config.use_cache = False
    # what generation stops at: the token that training ends answers with, and whatever the base stopped at
    generation = transformers.GenerationConfig.from_model_config(model.config)
    stops = [end_id, model.generation_config.eos_token_id, tokenizer.eos_token_id]
    stops = [i for stop in stops for i in (stop if isinstance(stop, list) else [stop]) if i is not None]
    generation.eos_token_id, generation.pad_token_id = list(dict.fromkeys(stops)), tokenizer.pad_token_id
    if activation_checkpointing and zero3:
        model.enable_input_require_grads()  # a frozen embedding would cut such layers off the gradient
    set_seed(seed)
    model = add_lora(
        model,
        list(lora_target_modules),
        r=lora_r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        use_rslora=use_rslora,
        use_dora=use_dora,
    )
    trainable = [p for p in model.parameters() if p.requires_grad]
    if packing:
        make_packed(model.get_base_model(), neftune_noise_alpha)
        if not zero3:  # there the weights are not whole yet
            check_packed(model.to(args.device).get_base_model(), config.vocab_size, args.device)

    # 5. trainer
    batches = MicroBatches(
        train_set.lengths(),
        batch_size,
        micro_batch_size,
        args.process_index,
        args.world_size,
        seed,
        group_by_length,
        packing,
    )
    steps_per_epoch = math.ceil(len(train_set) / batch_size)
    total_steps = max_steps or math.ceil(num_epochs * steps_per_epoch)
    if total_steps == 1 and warmup_ratio:
        raise ValueError("a run of one step learns nothing: in a warmup its learning rate is 0: give --warmup_ratio 0")
    args.save_steps = args.eval_steps = max(1, round(save_steps * total_steps) if save_steps < 1 else int(save_steps))
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    trainer = LoraTrainer(
        model=model,
        args=args,
        train_dataset=train_set,
        eval_dataset=eval_set if len(eval_set) else None,
        data_collator=pack if packing else functools.partial(pad, pad_id=pad_id),
        batches=batches,
        packing=packing,
        tokenizer=tokenizer,
        generation_config=generation,
        settings=settings,
    )
    set_seed((seed + 100003 * args.process_index) % 2**32)  # dropout and noise are each rank's own
    trainer.remove_callback(transformers.trainer_callback.ProgressCallback)
    trainer.remove_callback(transformers.PrinterCallback)
    report = Report(trainer, early_stopping_patience, logging_steps)
    trainer.add_callback(report)
    if main and overwrite:  # not before everything about the new run has been checked
        for path in theirs:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if main:
        from torch.utils.tensorboard import SummaryWriter

        saved = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8")) if checkpoint else None
        first = saved["global_step"] + 1 if saved else None
        writer = SummaryWriter(str(out / "runs"), purge_step=first)
        trainer.add_callback(transformers.integrations.TensorBoardCallback(writer))

    # 6. say what will happen
    num_all = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    num_trainable = sum(getattr(p, "ds_numel", p.numel()) for p in trainable)
    lengths, got = train_set.lengths(), counts["train"]
    where = torch.cuda.get_device_name() if on_gpu else str(args.device)
    bits = " 4-bit base" if load_in_4bit else " 8-bit base" if load_in_8bit else ""
    say(
        f"finetune.py  {base_model} -> {output_dir}    torch {torch.__version__}  {world_size} x {where}  {dtype}{bits}"
    )
    say(
        f"  batch       {batch_size} = {world_size} ranks x {micro_batch_size} per micro-batch x "
        f"{batch_size // at_once} micro-batches    about {int(lengths.mean() * batch_size):,} tokens a step"
    )
    epochs = f"{total_steps / steps_per_epoch:.3g} epochs x {steps_per_epoch:,}"
    say(f"  steps       {total_steps:,} = {epochs}    evaluated and saved every {args.save_steps}")
    how = "" if flags["learning_rate"] else f", from the model's family and its hidden size {config.hidden_size}"
    say(f"  rate        {learning_rate:.2e}{how}")
    say(f"  trainable   {num_trainable:,} of {num_all:,} parameters ({num_trainable / num_all:.2%})")
    source = dataset or data_path or "data/tiny/demonstrations.jsonl"
    say(
        f"  data        {source}: {got['examples']:,} examples, {lengths.sum():,} tokens, "
        f"{int(train_set.learned.sum()):,} learned; {len(eval_set):,} for validation; template {template}; tokenized "
        f"in {counts['seconds']:.1f} s"
    )
    for what, words in {
        "cut": f"cut at --cutoff_len {cutoff_len}",
        "left_out": f"left out: nothing of the answer fits into --cutoff_len {cutoff_len}",
        "empty": "answers are empty: only their end is learned",
    }.items():
        if got[what] + counts["eval"][what]:
            say(f"  note        {got[what] + counts['eval'][what]:,} {words}")
    ids, labels, shown = *train_set[0].values(), ""
    for learned, run in itertools.groupby(range(len(ids)), key=lambda i: bool(labels[i] != IGNORE)):
        text = tokenizer.decode(ids[list(run)])
        shown += f"[{text}]" if learned else text
    say(f"  example, learned part in brackets:\n    {shown[:1200]!r}")
    if resume_from_checkpoint:
        say(f"  resume      {checkpoint or 'no checkpoint yet: from the first step'}")
    run = {
        "status": "running",
        "flags": flags,
        "argv": sys.argv,
        **provenance(),
        "device": f"{world_size} x {where}",
        "dtype": dtype,
        "template": template,
        "counts": counts | {"tokens": int(lengths.sum()), "trainable": num_trainable, "parameters": num_all},
    }
    if main:
        write_json(out / "run.json", run)

    # 7. train
    from peft.helpers import disable_input_dtype_casting

    # under autocast PEFT's float32 copies of LoRA's inputs change nothing and cost time; DoRA takes its norms in
    # their dtype, and DeepSpeed has no autocast
    no_copies = disable_input_dtype_casting(model, active=args.bf16 and not use_dora and not deepspeed)
    try:
        with no_copies:
            metrics = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).metrics
    except KeyboardInterrupt:
        if main:
            write_json(out / "run.json", run | {"status": "interrupted"})
        say(
            f"\ninterrupted after step {trainer.state.global_step}; continue with the same flags and "
            "--resume_from_checkpoint auto"
        )
        raise SystemExit(130) from None
    state = trainer.state

    # 8. save the best adapter, plots and the summary
    last = out / f"checkpoint-{state.global_step}"
    best = out / f"checkpoint-{state.best_global_step}" if state.best_global_step else last
    if main:
        write_adapter(best, out / "adapter", len(trainable))
        records = read_log(report.log_path)
        plot(records, out / "plots")
        evals = [record for record in records if "eval_loss" in record]
        trained = [record for record in records if "loss" in record]
        metrics = {
            "train_loss": sum(r["loss"] for r in trained) / len(trained),
            "train_runtime": metrics["train_runtime"],
            "train_samples_per_second": metrics["train_samples_per_second"],
            "train_tokens_per_second": trained[-1]["tokens"] / sum(r["seconds"] for r in trained),
            "train_tokens": trained[-1]["tokens"],
            "total_flos": metrics["total_flos"],
        }
        if evals:
            metrics |= {name: evals[-1][name] for name in ("eval_loss", "eval_token_acc")}
            metrics |= {"best_eval_loss": state.best_metric}
        if on_gpu:
            metrics["max_memory_allocated_gb"] = torch.cuda.max_memory_allocated() / 2**30
        run |= {
            "status": "finished" if state.global_step >= total_steps else "stopped early",
            "steps": state.global_step,
            "best_checkpoint": best.name,
            "last_checkpoint": last.name,
            "metrics": metrics,
        }
        write_json(out / "run.json", run)
        for name, value in metrics.items():
            say(f"  {name:25s} {value:,.4f}" if isinstance(value, float) else f"  {name:25s} {value:,}")
        size = (out / "adapter" / "adapter_model.safetensors").stat().st_size / 1e6
        say(f"wrote {out}/adapter ({size:.1f} MB, from {best.name}), {out}/plots, {out}/run.json")
        say(f"Next: python generate.py --base_model {base_model} --lora_weights {out}/adapter --prompt '...'")
    if world_size > 1:
        dist.barrier()
    return {"run": run, "metrics": metrics, "adapter": str(out / "adapter")}


if __name__ == "__main__":
    run_cli(train)
