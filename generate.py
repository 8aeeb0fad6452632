"""
Ask a base model, with or without a LoRA adapter: one question, a chat, a file of questions, or a page for a browser.

    reads    --base_model, --lora_weights (an adapter folder of finetune.py or ppo_gsm8k.py, or any PEFT adapter)
             --prompt, or --data_path: any data file that finetune.py reads, or a text file with a prompt a line,
             or --run: the validation rows of a fine-tuning run
    writes   the answer to the terminal; for a file --output_path (a JSON line a prompt) and a summary beside it
    then     export_hf_checkpoint.py, or a closer look at the predictions

    one      python generate.py --prompt "Tom has 6 boxes with 7 coins in each. How many coins does Tom have now?"
    a chat   python generate.py --chat
    a file   python generate.py --data_path data/tiny/test.jsonl --score gsm8k_strict
    a run    python generate.py --run out/finetune --score rouge
    a page   python generate.py --ui
    a GPU    python generate.py --base_model Qwen/Qwen2.5-0.5B --lora_weights out/finetune/adapter --prompt "Hello"

The prompt goes through the chat template that the adapter or checkpoint carries, so the model sees the tokens that
it was trained on; it stops at the token that ended its training answers. A file that was stopped, even with kill -9,
goes on with the same command. To serve many users, take one of the servers whose commands are printed.

Shapes in comments: B sequences, T tokens.
"""

import codecs
import contextlib
import csv
import functools
import hashlib
import hmac
import importlib.util
import itertools
import json
import math
import os
import queue
import random
import re
import shlex
import socket
import statistics
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import get_type_hints

import fire
import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig, set_seed

HERE = Path(__file__).resolve().parent
SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")

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

    Returns the name of what was taken, and what the template puts between an instruction and its input.
    """
    name = name or ("" if tokenizer.chat_template else "alpaca")
    if name:
        path = Path(name) if name.endswith(".jinja") else HERE / "templates" / f"{name}.jinja"
        if not path.exists():
            known = ", ".join(sorted(template.stem for template in (HERE / "templates").glob("*.jinja")))
            raise ValueError(f"--prompt_template {name}: no such template; there are {known}, or give a .jinja file")
        tokenizer.chat_template = path.read_text("utf-8")
    found = re.search(r'set input_separator = ("(?:[^"\\]|\\.)*")', tokenizer.get_chat_template())
    return name or "the model's own", json.loads(found[1]) if found else "\n"


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
# which model


def find_model(base_model, lora_weights, run):
    """Return (base_model, lora_weights), filled in where they were not given.

    An adapter names its base. Alone, --run means the adapter of that run; no flag at all the furthest that the
    embedded default has come: its PPO adapter, else its fine-tuned one, else the embedded base.
    """
    if run and not base_model and not lora_weights:
        lora_weights = str(Path(run) / "adapter")
    if not base_model and not lora_weights:
        for folder in ("out/ppo_gsm8k/adapter", "out/finetune/adapter"):
            if (trained_on(folder) or "").endswith("data/tiny/model"):
                return "data/tiny/model", folder
        return "data/tiny/model", ""
    if lora_weights and not (Path(lora_weights) / "adapter_config.json").exists():
        raise ValueError(f"--lora_weights {lora_weights}: no adapter there (adapter_config.json)")
    if not base_model:
        base_model = trained_on(lora_weights)
        if not base_model:
            raise ValueError(f"--lora_weights {lora_weights}: it does not name its base model: give --base_model")
        if find_path(base_model) is None and not re.fullmatch(r"[\w.-]+/[\w.-]+", base_model):
            raise ValueError(
                f"--lora_weights {lora_weights} was trained on {base_model}, which is not there: give --base_model"
            )
    return base_model, lora_weights


def trained_on(lora_weights):
    """Return the base model that an adapter's configuration names; None without one, or without an adapter."""
    path = Path(lora_weights) / "adapter_config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path") if path.exists() else None
    except (ValueError, AttributeError) as error:
        raise ValueError(f"--lora_weights {lora_weights} is damaged: {path.name}: {error}") from None


def load_adapter(model, lora_weights):
    """Return `model` with the adapter of a folder, once every tensor of it has found its place."""
    from peft import PeftModel, get_peft_model_state_dict

    folder = Path(lora_weights)
    if not (folder / "adapter_config.json").exists() or not (folder / "adapter_model.safetensors").exists():
        raise ValueError(f"--lora_weights {lora_weights}: no adapter_config.json and adapter_model.safetensors there")
    warnings.filterwarnings("ignore", message="Found missing adapter keys")  # all of them by name; refused below
    try:
        model = PeftModel.from_pretrained(model, folder)
    except Exception as error:  # peft, torch and safetensors have their own kinds; torch lists every tensor
        raise ValueError(
            f"--lora_weights {lora_weights} is damaged or does not fit this base model: {error!s:.300}"
        ) from error
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        odd = set(file.keys()) ^ set(get_peft_model_state_dict(model, save_embedding_layers=False))
    odd -= set(model.state_dict())  # where embeddings are adapted, peft saves the base model's own with the adapter
    if odd:
        raise ValueError(
            f"--lora_weights {lora_weights} does not fit this base model: {len(odd)} tensors have no counterpart, "
            f"{', '.join(sorted(odd)[:3])} among them"
        )
    return model


def stop_ids(model, tokenizer, lora_weights):
    """Return every token id that ends an answer: the adapter's or checkpoint's, the template's and the tokenizer's."""
    config = model.generation_config
    if lora_weights and (Path(lora_weights) / "generation_config.json").exists():
        config = GenerationConfig.from_pretrained(lora_weights)
    stops = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return [i for i in dict.fromkeys([*stops, end_of_turn(tokenizer)[1], tokenizer.eos_token_id]) if i is not None]


def same_model(one, other):
    """Whether two names of a model, folders or hub ids, are one place."""
    paths = find_path(one), find_path(other)
    return one == other or None not in paths and paths[0].samefile(paths[1])


def fingerprint(base):
    """Return a digest of the model or adapter in a folder: of its files, or of the commit of a hub model.

    Of files above 64 MB it takes name, size and time of change in place of their content.
    """
    if not Path(base).exists():
        return Path(transformers.utils.cached_file(base, "config.json")).parent.name
    digest = hashlib.sha256()
    for path in sorted(Path(base).iterdir()):
        if path.suffix in (".json", ".jinja", ".model", ".safetensors"):
            stat = path.stat()
            digest.update(f"{path.name} {stat.st_size}\n".encode())
            digest.update(path.read_bytes() if stat.st_size < 2**26 else str(stat.st_mtime_ns).encode())
    return digest.hexdigest()


def serve_commands(base_model, lora_weights, template, carried):
    """Return the commands that serve the model to others, of vLLM and of transformers, as lines.

    template is the name or file of --prompt_template, "" for the model's own; carried says whether the model or
    adapter has a template of its own.
    """
    name = template or ("" if carried else "alpaca")
    file = name if name.endswith(".jinja") else f"templates/{name}.jinja" if name else ""
    base, folder = shlex.quote(base_model), shlex.quote(lora_weights)
    if not lora_weights and file:
        return [
            f"vllm serve {base} --chat-template {file}",
            "(transformers serve reads templates of model folders only)",
        ]
    if not lora_weights:
        return [f"vllm serve {base}", f"transformers serve {base}"]
    config = json.loads((Path(lora_weights) / "adapter_config.json").read_text(encoding="utf-8"))
    rank = max([config.get("r") or 0, *(config.get("rank_pattern") or {}).values()])
    fits = next((limit for limit in (8, 16, 32, 64, 128, 256, 320, 512) if limit >= rank), None)  # vLLM's choices
    merge = f"python export_hf_checkpoint.py --base_model {base} --lora_weights {folder} --output_dir out/export"
    if not rank or not fits or config.get("use_dora") or config.get("modules_to_save"):
        return [merge, "vllm serve out/export", "transformers serve out/export"]  # vLLM serves no such adapter
    vllm = f"vllm serve {base} --enable-lora --max-lora-rank {fits} --lora-modules adapter={folder}"
    vllm += f" --chat-template {file or folder + '/chat_template.jinja'}"
    if (Path(lora_weights) / "generation_config.json").exists():
        vllm += f" --generation-config {folder}"  # its end tokens
    return [vllm, f"{merge} && transformers serve out/export"]


# -----------------------------------------------------------------------------
# prompts


def read_each(source):
    """Return (rows, where) as read_rows does, but in place of a row that cannot be read a ValueError that says why.

    So in a .jsonl, .csv, .json or .txt file; a .txt file has a prompt a line. What makes the whole file unreadable
    is an error here, too.
    """
    path, rows, numbers = find_path(source), [], []
    if path is None or path.is_dir() or path.suffix not in (".jsonl", ".csv", ".json", ".txt"):
        return read_rows(source, "test")
    try:
        if path.suffix in (".jsonl", ".txt"):
            for number, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
                if not line.strip():
                    continue
                numbers.append(number)
                try:
                    text = line.removesuffix(b"\r").decode("utf-8")
                    rows.append({"question": text} if path.suffix == ".txt" else json.loads(text))
                except json.JSONDecodeError as error:
                    rows.append(ValueError(f"not valid JSON: {error.msg} (column {error.colno})"))
                except (ValueError, RecursionError) as error:
                    rows.append(ValueError(f"cannot be read: {error}"))
        elif path.suffix == ".csv":
            csv.field_size_limit(2**31 - 1)  # the default is 131,072 characters
            with open(path, newline="", encoding="utf-8-sig") as file:
                rows = list(csv.DictReader(file))
        else:
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
            rows = rows if isinstance(rows, list) else [rows]
    except (ValueError, RecursionError, csv.Error, OSError):
        return read_rows(source)  # which says where and why
    if not rows:
        raise ValueError(f"{path}: no rows in it")
    for i, row in enumerate(rows):
        if not isinstance(row, dict | ValueError):
            rows[i] = ValueError(f"a row must be an object with named fields, got {row!r:.80}")
        elif isinstance(row, dict) and None in row:  # what csv calls the cells beyond the header's
            rows[i] = ValueError("more cells than the header has: quote a text that holds commas")
    return rows, lambda i: f"{path}, line {numbers[i]}" if numbers else locate(path, i)


def read_prompts(source, separator, max_samples):
    """Return a dict a row: index, messages, and where it has an answer reference; where it cannot be used, error.

    `row` is the row as it stands, for a score function that wants more of it.
    """
    rows, where = read_each(source)
    items = []
    for i, row in enumerate(rows[: max_samples or None]):
        item = {"index": i}
        try:
            if isinstance(row, ValueError):
                raise row
            form = detect_form(row)
            item |= {"row": row, "messages": to_messages(row, form, separator, need_response=False)}
        except ValueError as error:
            item["error"] = f"{where(i)}: {error}"
        else:
            with contextlib.suppress(ValueError):
                item["reference"] = to_messages(row, form, separator)[-1]["content"]
        items.append(item)
    return items


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


def read_flags(run):
    """Return the flags in the run.json of a fine-tuning run, once they can give its validation rows."""
    path = Path(run) / "run.json"
    if not path.exists():
        raise ValueError(f"--run {run}: no run.json there: give the --output_dir of a run of finetune.py")
    names = "data_path dataset dataset_dir max_samples seed val_set_size prompt_template".split()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        flags = {name: found["flags"][name] for name in names} | {"rows": found["counts"]["eval"]["conversations"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--run {run}: its run.json is not that of a fine-tuning run: {error!r}") from None
    if not flags["rows"]:
        raise ValueError(f"--run {run} held no rows out: its --val_set_size was {flags['val_set_size']:g}")
    return flags


def read_validation(flags, separator, data_path):
    """Return the validation rows of a fine-tuning run, in the form of read_prompts, drawn as finetune.py drew them.

    data_path is where the run's data file is now, if it has moved.
    """
    names = [name.strip() for name in flags["dataset"].split(",") if name.strip()]
    sources = [find_dataset(name, flags["dataset_dir"]) for name in names]
    if data_path or not sources:
        sources = [(data_path or flags["data_path"] or "data/tiny/demonstrations.jsonl", "train", None, None, None)]
    conversations = read_conversations(sources, separator, flags["max_samples"], flags["seed"])
    _, held_out = split_rows(len(conversations), flags["val_set_size"], flags["seed"])
    if len(held_out) != flags["rows"]:
        raise ValueError(
            f"the run held {flags['rows']} rows out, but of {len(conversations)} rows its flags take {len(held_out)}: "
            "the data has changed since"
        )
    items = [{"index": i, "messages": conversations[i][:-1], "row": {}} for i in held_out]
    return [item | {"reference": conversations[item["index"]][-1]["content"]} for item in items]


def encode_prompt(messages, tokenizer, max_new_tokens, context):
    """Return the ids of a conversation as the chat template renders it, up to where the answer starts."""
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False).input_ids
    except Exception as error:  # jinja2 has its own kinds, a template can raise, and half a character has no ids
        raise ValueError(f"the chat template cannot render {messages!r:.200}: {error}") from error
    if not ids:
        raise ValueError("the chat template makes nothing of it")
    if context and len(ids) + max_new_tokens > context:
        raise ValueError(
            f"{len(ids)} tokens of prompt and --max_new_tokens {max_new_tokens} are more than the {context} positions "
            "of the model: shorten one of them"
        )
    return ids


# -----------------------------------------------------------------------------
# scores


def final_number(text, method):
    """Return the number that a GSM8K answer ends in, or None if there is none; as verl's reward_score/gsm8k.py does.

    strict takes the last "#### number" and leaves its commas out; flexible the last number of any kind, as it stands.
    """
    if method == "strict":
        found = [number.replace(",", "") for number in re.findall(r"#### (\-?[0-9\.\,]+)", text)]
    else:
        found = [number for number in re.findall(r"(\-?[0-9\.\,]+)", text) if number != "."]
    return found[-1] if found else None


def compute_score(solution_str, ground_truth, method="strict"):
    """Return 1.0 if an answer's final number is `ground_truth` (a string without commas), else 0.0.

    Only the last 300 characters of the answer are read, as in verl.
    """
    return float(final_number(solution_str[-300:], method) == ground_truth)


def rouge(answer, reference):
    """Return the F1 of ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004, sections 2 and 3.1) of an answer, without stemming.

    Of text in the Latin alphabet the tokens are those of the rouge_score package: words in lower case. Scripts that
    put no spaces between words (Chinese, Japanese, Thai, ...) count by the character.
    """
    alone = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
    a, b = (re.findall(rf"[{alone}]|[^\W_{alone}]+", text.lower()) for text in (answer, reference))
    common = {}
    for n in (1, 2):
        grams = [Counter(zip(*(tokens[i:] for i in range(n)))) for tokens in (a, b)]
        common[f"rouge{n}"] = ((grams[0] & grams[1]).total(), *(counts.total() for counts in grams))
    # longest common subsequence, one bit a token of `a` (Hyyro 2004): zeros mark where it grows
    places, row = {}, (1 << len(a)) - 1
    for i, token in enumerate(a):
        places[token] = places.get(token, 0) | 1 << i
    for token in b:
        matches = row & places.get(token, 0)
        row = (row + matches | row - matches) & (1 << len(a)) - 1
    common["rougeL"] = (len(a) - row.bit_count(), len(a), len(b))
    return {name: 2 * same / (x + y) if x + y else 0.0 for name, (same, x, y) in common.items()}


def score_answer(answer, reference, method):
    """Return the score of one answer against the reference answer, by the name that --score gives."""
    if method == "exact":
        return float(answer.strip() == reference.strip())
    return compute_score(answer, final_number(reference, "strict"), method.removeprefix("gsm8k_"))


def check_references(items, score):
    """Refuse rows that hold no answer that `score` could compare with."""
    number = score.startswith("gsm8k")
    lost = [item for item in items if "reference" not in item]
    lost = lost or [item for item in items if number and final_number(item["reference"], "strict") is None]
    if lost:
        what = "'#### number'" if "reference" in lost[0] else "answer"
        place = f"row {lost[0]['index'] + 1}" + (f" and {len(lost) - 1} others" if len(lost) > 1 else "")
        raise ValueError(f"--score {score}: no {what} to compare with in {place}")


def load_function(score):
    """Return the function that --score path.py:function names."""
    path, _, name = score.rpartition(":")
    if find_path(path) is None:
        raise ValueError(f"--score {score}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, find_path(path))
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file does
        raise ValueError(f"--score {score}: {path} cannot be loaded: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, name, None)):
        raise ValueError(f"--score {score}: {path} has no function {name}")
    return getattr(module, name)


def score_item(answer, item, source, score, function):
    """Return {"score": ..., and what else the score gives} of one answer.

    A function of the user's is called as verl calls one (its reward_score): of a row in verl's schema with that
    row's values, of any other with the source, the reference and {"index": ...}. It returns a number or a dict with
    a number as `score`.
    """
    if score == "rouge":
        found = rouge(answer, item["reference"])
        return {"score": found["rougeL"]} | found
    if not function:
        return {"score": score_answer(answer, item["reference"], score)}
    row = item["row"]
    given = {"data_source": row.get("data_source", source), "solution_str": answer}
    given["ground_truth"] = (row.get("reward_model") or {}).get("ground_truth", item.get("reference"))
    given["extra_info"] = row.get("extra_info") or {"index": item["index"]}
    try:
        found = function(**given)
        found = dict(found) if isinstance(found, dict) else {"score": found}
        found["score"] = float(found["score"])
        if not math.isfinite(found["score"]):
            raise ValueError(f"the score is {found['score']}")
        json.dumps(found)
    except Exception as error:  # whatever the user's function does
        raise ValueError(
            f"--score {score}: of row {item['index']} it gave {type(error).__name__}: {error}. The answers are kept: "
            "the same command scores them again"
        ) from error
    return found


def mean_and_error(values):
    """Return the mean of a list of numbers and its standard error (of one number: None)."""
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), spread


# -----------------------------------------------------------------------------
# answers


def check_sampling(max_new_tokens, temperature, top_p, top_k, num_beams, repetition_penalty, seed):
    """Refuse settings that are out of their range, and those that would do nothing."""
    if not (0 <= temperature < math.inf and 0 < repetition_penalty < math.inf and 0 < top_p <= 1 and top_k >= 0):
        raise ValueError(
            "--temperature and --top_k must not be negative, --repetition_penalty above 0, --top_p in (0, 1]"
        )
    if num_beams < 1 or max_new_tokens < 1:
        raise ValueError("--num_beams and --max_new_tokens must be at least 1")
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed {seed} must not be negative, and below 2**32")
    if not temperature and (top_p != 1 or top_k):
        raise ValueError("--top_p and --top_k do nothing at --temperature 0: set a temperature")
    if num_beams > 1 and temperature:
        raise ValueError(f"--num_beams {num_beams} searches and --temperature {temperature} samples: give one of them")


def to_generation_config(stops, *, temperature, top_p, top_k, seed, **settings):
    """Return the GenerationConfig of the sampling flags, each set: what is not set, transformers fills in."""
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k} if temperature else {}
    # padding is masked, and what follows a stop is dropped: any token of the model does, but the tokenizer's own
    # padding token may have been added to it alone
    ends = {"eos_token_id": stops or None, "pad_token_id": stops[0] if stops else 0}
    return GenerationConfig(do_sample=temperature > 0, **settings, **sampling, **ends)


def answer_batch(model, batch, config, stops, **kwargs):
    """Return [(the ids of the answer without its end token, whether it was cut before one)] of prompts (ids)."""
    longest = max(len(ids) for ids in batch)
    # padded with its own first token: a repetition penalty counts masked tokens, too
    ids = torch.tensor([[ids[0]] * (longest - len(ids)) + ids for ids in batch], device=model.device)  # [B, T]
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in batch], device=model.device)
    out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, **kwargs)
    rows = [row.tolist() for row in out[:, longest:]]
    ends = [next((i for i, token in enumerate(row) if token in stops), None) for row in rows]
    return [(row[:end], end is None) for row, end in zip(rows, ends, strict=True)]


def stream_answer(model, tokenizer, ids, config, stops):
    """Yield (the answer so far, None) as tokens come, and at the end (the answer, whether it was cut).

    The model works in a thread, which stops at its next token once the caller no longer listens.
    """
    ready, closed = queue.SimpleQueue(), threading.Event()

    class Streamer(transformers.generation.BaseStreamer):
        def put(self, tokens):
            ready.put(tokens.flatten().tolist())

        def end(self):
            pass

    def work():
        stopped = lambda ids, scores, **kwargs: torch.full((len(ids),), closed.is_set(), device=ids.device)
        streamer = Streamer() if config.num_beams == 1 else None  # beams are known at the end only
        try:
            ready.put(answer_batch(model, [ids], config, stops, streamer=streamer, stopping_criteria=[stopped])[0])
        except BaseException as error:  # belongs to the caller's thread
            ready.put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        new, prompt = [], True
        while isinstance(item := ready.get(), list):
            if not prompt:  # the first that a streamer is given
                new += [token for token in item if token not in stops]
                # the bytes of a character can be several tokens
                yield tokenizer.decode(new, skip_special_tokens=True).rstrip("\ufffd"), None
            prompt = False
        if isinstance(item, BaseException):
            raise item
        yield tokenizer.decode(item[0], skip_special_tokens=True), item[1]
    finally:
        closed.set()
        thread.join()


def print_answer(stream):
    """Print an answer as it comes; returns (answer, whether it was cut). Ctrl-C ends it where it is."""
    shown, cut = "", None
    try:
        for text, cut in stream:  # noqa: B007
            print(text[len(shown) :], end="", flush=True)
            shown = text
    except KeyboardInterrupt:
        stream.close()
    print()
    return shown, cut


def chat_in_terminal(stream, prompt, limit):
    """Ask, answer, and remember, until /exit or the end of the input; returns the messages."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (gives input() its history and editing)

    print("/new forgets the conversation, /exit ends it, Ctrl-C ends an answer")
    messages = []
    while True:
        if prompt:
            print(f"> {prompt}")
        try:
            text = prompt or input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return messages
        prompt = ""
        if text == "/exit":
            return messages
        if text in ("", "/new"):
            messages = [] if text else messages
            continue
        messages.append({"role": "user", "content": text})
        try:
            answer, cut = print_answer(stream(messages))
        except ValueError as error:
            print(f"error: {error}, or /new")
            messages.pop()
            continue
        if cut:
            print(f"(cut at --max_new_tokens {limit})")
        messages.append({"role": "assistant", "content": answer})


# -----------------------------------------------------------------------------
# a file that can be stopped


def differences(before, now):
    """Return the settings of two runs that differ, in words."""
    names = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    long = ("model", "adapter", "prompts")  # digests: their values say nothing
    return ", ".join(name if name in long else f"{name} {before.get(name)} -> {now.get(name)}" for name in names)


def read_answers(target, settings, batches):
    """Return ({index: answer}, bytes of the log to keep) of what an earlier run of the same settings has written.

    The log's first line holds the settings, the others the answers of one batch after the other. A line torn by
    kill -9, and a batch that is not whole, are left out: that batch is answered again.
    """
    log, summary = Path(f"{target}.incomplete"), target.with_name("summary.json")
    lines = log.read_bytes().split(b"\n")[:-1] if log.exists() else []
    way_out = "give the same ones again, start over with --overwrite, or choose another --output_dir"
    if lines:
        try:
            before = json.loads(lines[0])["settings"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{log}: not a file that generate.py began: move it, or --overwrite it") from None
        if len(lines) > 1 and before != settings:
            raise ValueError(f"{log} was begun with other settings ({differences(before, settings)}): {way_out}")
        done, size, rest = {}, len(lines[0]) + 1, iter(lines[1:])
        for batch in batches if before == settings else []:
            some = list(itertools.islice(rest, len(batch)))
            try:
                records = {record["index"]: record for record in map(json.loads, some)}
            except (ValueError, KeyError, TypeError):
                break
            if list(records) != batch:
                break
            done, size = done | records, size + sum(len(line) + 1 for line in some)
        return done, size if before == settings else 0
    if not target.exists():
        return {}, 0
    try:
        before = json.loads(summary.read_text(encoding="utf-8"))["settings"]
        records = [json.loads(line) for line in target.read_text(encoding="utf-8").split("\n") if line]
        done = {record["index"]: record for record in records if "prediction" in record}
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{target} is there already: replace it with --overwrite") from None
    if before != settings or sorted(done) != sorted(itertools.chain(*batches)):
        why = differences(before, settings) or "rows are missing"
        raise ValueError(f"{target} holds the answers of other settings ({why}): {way_out}")
    return done, 0


def write_answers(path, rows):
    """Write rows as JSON lines beside `path` and rename the file, so that `path` is never half written."""
    partial = Path(f"{path}.sorted.incomplete")
    with open(partial, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    partial.replace(path)


def answer_missing(log, size, settings, batches, done, answer):
    """Answer the batches that are not in `done`, adding each to it and to the log after its first `size` bytes.

    `answer(n, batch)` returns the records of the n-th batch.
    """
    from tqdm import tqdm

    total, tokens, started = sum(len(batch) for batch in batches), 0, time.time()
    with (
        open(log, "r+b" if log.exists() else "wb") as file,
        tqdm(total=total, initial=len(done), unit="prompt", disable=None) as bar,
    ):
        file.truncate(size)
        file.seek(size)
        if not size:
            file.write(json.dumps({"settings": settings}).encode() + b"\n")
        try:
            for n, batch in enumerate(batches):
                if batch[0] in done:
                    continue
                records = answer(n, batch)
                file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
                file.flush()
                done |= {record["index"]: record for record in records}
                tokens += sum(record["tokens"] for record in records)
                bar.update(len(batch))
                bar.set_postfix_str(f"{tokens / (time.time() - started):,.0f} tok/s")
        except KeyboardInterrupt:
            raise SystemExit(f"{len(done):,} of {total:,} answers are in {log}: the same command goes on") from None
    seconds = time.time() - started
    print(f"{total:,} answers, {tokens:,} new tokens in {seconds:.1f} s, {tokens / seconds:,.0f} tok/s")


def finish(target, items, done, summary, score, source, function):
    """Score the answers, write them in the order of the rows, and the summary beside them; returns the summary."""
    rows, scores = [], []
    for item in items:
        row = {name: item[name] for name in ("index", "messages", "reference", "error") if name in item}
        if "error" not in item:
            row |= {name: done[item["index"]][name] for name in ("prediction", "cut", "tokens")}
            if score:
                scores.append(score_item(row["prediction"], item, source, score, function))
                row |= {name: value for name, value in scores[-1].items() if name not in row}
        rows.append(row)
    answered = [row for row in rows if "prediction" in row]
    summary |= {"rows": len(rows), "answered": len(answered), "cut": sum(row["cut"] for row in answered)}
    summary["tokens"] = sum(row["tokens"] for row in answered)
    if score:
        names = [name for name, value in scores[0].items() if isinstance(value, int | float)]
        means = {name: mean_and_error([one[name] for one in scores]) for name in names}
        summary |= {"score": score, "mean": means["score"][0], "standard_error": means["score"][1]}
        summary["means"] = {name: mean for name, (mean, _) in means.items() if name != "score"}
    write_json(target.with_name("summary.json"), summary)
    write_answers(target, rows)
    Path(f"{target}.incomplete").unlink(missing_ok=True)
    return summary


# -----------------------------------------------------------------------------
# a page


def check_address(host, port, password):
    """Refuse an address that cannot be listened on, or that others reach without a password; returns the port."""
    if host not in ("127.0.0.1", "localhost", "::1") and not password:
        raise ValueError(
            f"--host {host} lets others in: set a password, in the environment as LOOSELEAF_PASSWORD (other users of "
            "this machine can read a --password)"
        )
    if not 0 <= port < 2**16:
        raise ValueError(f"--port {port}: from 1 to 65535, or 0 for any that is free")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server will
            probe.bind((host, port))
            return probe.getsockname()[1]
    except OSError as error:
        way_out = "choose another --port, or 0 for any that is free"
        raise ValueError(f"--host {host} --port {port} cannot be listened on: {error.strerror}: {way_out}") from None


def open_page(stream, title, sampling, context, examples, host, port, password):
    """Serve a chat page until Ctrl-C; `stream(messages, **sampling)` yields answers as stream_answer does."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio

    bounds = {"max_new_tokens": (1, context or 4096, 1), "temperature": (0, 2, 0.05), "top_p": (0.05, 1, 0.05)}
    bounds |= {"top_k": (0, 200, 1), "num_beams": (1, 8, 1), "repetition_penalty": (0.5, 2, 0.05)}

    def control(name, value):
        label = name.replace("_", " ")
        if name not in bounds:
            return gradio.Number(value, precision=0, label=label)
        low, high, step = bounds[name]
        return gradio.Slider(min(low, value), max(high, value), value, step=step, label=label)

    def reply(text, history, *values):
        messages = []
        for turn in [*history, {"role": "user", "content": text}]:
            parts = [turn["content"]] if isinstance(turn["content"], str) else [p["text"] for p in turn["content"]]
            messages.append({"role": turn["role"], "content": "".join(parts)})
        try:
            if None in values:
                raise ValueError("a sampling setting is empty")
            given = {name: type(sampling[name])(value) for name, value in zip(sampling, values, strict=True)}
            check_sampling(**given)
            for answer, cut in stream(messages, **given):  # noqa: B007
                yield answer
        except ValueError as error:
            raise gradio.Error(str(error)) from error
        if cut:
            gradio.Info("The answer was cut at max new tokens.")

    with gradio.Blocks(title="looseleaf", fill_height=True) as page:
        with gradio.Sidebar(position="right", width=340):
            gradio.Markdown(
                "### Sampling\nAt temperature 0 the likeliest token is taken: leave top p at 1, top k at 0."
            )
            controls = [control(name, value) for name, value in sampling.items()]
        gradio.Markdown(f"## looseleaf\n{title}")
        gradio.ChatInterface(
            reply,
            # as the model wrote it: Markdown would take "#### 42" for a heading
            chatbot=gradio.Chatbot(render_markdown=False, show_label=False, buttons=["copy"], scale=1),
            additional_inputs=controls,
            examples=[[text] for text in examples],
            cache_examples=False,
            run_examples_on_click=False,
            concurrency_limit=1,
            api_visibility="private",
        )
    auth = (lambda user, given: hmac.compare_digest(given.encode(), password.encode())) if password else None
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        auth=auth,
        auth_message="Any user name, and the password.",
        theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),  # none of another site
        footer_links=[],
        ssr_mode=False,
        quiet=True,
        prevent_thread_lock=True,
    )
    print(f"open http://{f'[{host}]' if ':' in host else host}:{port} in a browser; Ctrl-C ends it", flush=True)
    page.block_thread()


def generate(
    *,
    base_model: str = "",
    lora_weights: str = "",
    prompt: str = "",
    input: str = "",
    chat: bool = False,
    data_path: str = "",
    run: str = "",
    output_dir: str = "out/generate",
    overwrite: bool = False,
    score: str = "",
    prompt_template: str = "",
    # sampling
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    num_beams: int = 1,
    repetition_penalty: float = 1.0,
    seed: int = 42,
    # a page
    ui: bool = False,
    host: str = "127.0.0.1",
    port: int = 7860,
    password: str = "",
    # memory and speed
    max_samples: int = 0,
    micro_batch_size: int = 32,
    dtype: str = "auto",
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
):
    """Answer one prompt, a chat, every prompt of a file, or a page in the browser, with a model and its chat template.

    Without any flag it asks the embedded model the first test problem, with the adapter of out/ppo_gsm8k or else
    out/finetune if one is there. --data_path may also be a .txt file with a prompt a line.

    Args:
        base_model: hub id or folder of the model.
        lora_weights: folder of a LoRA adapter. Empty: the base model alone.
        prompt: the question.
        input: further text that the question is about, as in alpaca's rows.
        chat: talk in the terminal, over several turns; --prompt is then the first.
        data_path: data file, folder of data files or hub id, in any of the forms of data/README.md.
        run: folder of a run of finetune.py: answer its validation rows, with its adapter unless told otherwise.
        output_dir: where everything of this run is written.
        overwrite: replace what an earlier run left in --output_dir.
        score: gsm8k_strict, gsm8k_flexible, exact, rouge or path.py:function: compare with the file's own answers.
        prompt_template: chat template: a name of templates/ or a .jinja file. Empty: what the model carries, or alpaca.
        max_new_tokens: longest answer, in tokens.
        temperature: of sampling; 0 takes the likeliest token. Above 0, --micro_batch_size changes what is drawn.
        top_p: sample among the likeliest tokens that together have this probability; 1 for all.
        top_k: sample among so many likeliest tokens; 0 for all.
        num_beams: beams of a beam search; 1 for none.
        repetition_penalty: above 1 makes tokens that are there already less likely.
        seed: of everything random.
        ui: open a chat page for the browser; needs gradio (requirements-ui.txt).
        host: address that the page listens on; any but this machine's own needs a password.
        port: of the page; 0 for any that is free.
        password: for the page, with any user name; better as LOOSELEAF_PASSWORD in the environment.
        max_samples: use only the first so many rows of each source; 0 for all.
        micro_batch_size: examples that one device processes at a time; only rounding, memory and speed depend on it.
        dtype: of the base weights: auto (bfloat16 on a GPU that has it, else float32), bfloat16, float16 or float32.
        load_in_8bit: quantize the base to int8 with bitsandbytes.
        load_in_4bit: quantize the base to NF4 with bitsandbytes (QLoRA).
    """
    # 1. check flags
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    sampling |= {"num_beams": num_beams, "repetition_penalty": repetition_penalty, "seed": seed}
    check_sampling(**sampling)
    if prompt and data_path:
        raise ValueError("--prompt and --data_path: give one of them")
    wanted = [name for name, on in {"chat": chat, "ui": ui, "run or --data_path": data_path or run}.items() if on]
    if len(wanted) > 1 or prompt and (run or ui):
        raise ValueError(f"{' and '.join('--' + name for name in ['prompt'] * bool(prompt) + wanted)}: one at a time")
    given = {"score": score, "overwrite": overwrite, "output_dir": output_dir != "out/generate"}
    if any(given.values()) and not (data_path or run):
        raise ValueError(f"{' and '.join('--' + n for n in given if given[n])} needs a file: --data_path, or --run")
    if input and not prompt:
        raise ValueError("--input goes with --prompt")
    if max_samples and (not data_path or run):
        raise ValueError(f"--max_samples {max_samples} goes with --data_path; a --run has its own")
    if micro_batch_size < 1 or max_samples < 0:
        raise ValueError("--micro_batch_size must be at least 1, --max_samples not negative")
    function = load_function(score) if ".py:" in score else None
    if not function and score not in ("", "gsm8k_strict", "gsm8k_flexible", "exact", "rouge"):
        raise ValueError(f"--score {score}: one of gsm8k_strict, gsm8k_flexible, exact, rouge, or path.py:function")
    target = Path(output_dir) / "predictions.jsonl"
    if data_path and find_path(data_path) and target.exists() and target.samefile(find_path(data_path)):
        raise ValueError(f"--data_path {data_path}: the answers would replace it: choose another --output_dir")
    if load_in_8bit and load_in_4bit:
        raise ValueError("--load_in_8bit and --load_in_4bit: give one of them")
    if ui:
        password = password or os.environ.get("LOOSELEAF_PASSWORD", "")
        port = check_address(host, port, password)
        if not importlib.util.find_spec("gradio"):
            raise ValueError("--ui needs gradio: pip install gradio, or the exact set of requirements-ui.txt")
    elif password or (host, port) != ("127.0.0.1", 7860):
        raise ValueError("--host, --port and --password belong to a page: --ui")
    flags_of_run = read_flags(run) if run else {}
    base_model, lora_weights = find_model(base_model, lora_weights, run)
    base, base_dtype = find_base(base_model), pick_dtype(dtype)
    dtype = str(base_dtype).removeprefix("torch.")
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    quiet_libraries()

    # 2. template
    carries = lora_weights and (Path(lora_weights) / "tokenizer_config.json").exists()
    tokenizer = load_tokenizer(lora_weights if carries else base)
    has_template = bool(tokenizer.chat_template)
    if run and not has_template:
        prompt_template = prompt_template or flags_of_run["prompt_template"]
    template, separator = use_template(tokenizer, prompt_template)
    config = load_config(base)
    limit_threads(config)
    context = getattr(config, "max_position_embeddings", None)
    print(f"generate.py  {base_model} + {lora_weights or 'no adapter'}    {device}  {dtype}  template {template}")
    other = trained_on(lora_weights) if lora_weights else None
    if other and not same_model(other, base_model):
        print(f"  note     the adapter was trained on {other}: it may belong to another model than {base_model}")
    for line in serve_commands(base_model, lora_weights, prompt_template, has_template):
        print(f"  serve    {line}")

    # 3. prompts, and what is answered already
    if data_path or run:
        if run:
            items = read_validation(flags_of_run, separator, data_path)
        else:
            items = read_prompts(data_path, separator, max_samples)
    else:
        if not (prompt or chat or ui):
            prompt = read_file(find_path("data/tiny/test.jsonl"))[0]["question"]
        text = prompt + (separator + input if input else "")
        items = [{"index": 0, "messages": [{"role": "user", "content": text}]}] if prompt and not chat else []
    for item in items:
        try:
            if "error" not in item:
                item["ids"] = encode_prompt(item["messages"], tokenizer, max_new_tokens, context)
        except ValueError as error:
            place = f"row {item['index'] + 1} of {data_path or run}" if data_path or run else "--prompt"
            item["error"] = f"{place}: {error}"
    good, bad = [item for item in items if "ids" in item], [item for item in items if "error" in item]
    if bad and not good:
        raise ValueError(bad[0]["error"])
    if score and not function:
        check_references(good, score)
    for item in bad[:5]:
        print(f"  left out {item['error']}")
    if data_path or run:
        # batches of like length, the longest first: what does not fit into memory fails at once
        order = [item["index"] for item in sorted(good, key=lambda item: -len(item["ids"]))]
        batches = [order[at : at + micro_batch_size] for at in range(0, len(order), micro_batch_size)]
        prompts = [[item["index"], item.get("ids"), item.get("messages"), item.get("reference")] for item in items]
        settings = {"model": fingerprint(base), "adapter": fingerprint(lora_weights) if lora_weights else None}
        settings |= {"prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(), **sampling, "device": device}
        settings |= {"micro_batch_size": micro_batch_size, "dtype": dtype, "load_in_8bit": load_in_8bit}
        settings |= {"load_in_4bit": load_in_4bit, "torch": torch.__version__, "transformers": transformers.__version__}
        log = Path(f"{target}.incomplete")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--output_dir {output_dir} cannot be made: {error}") from None
        done, size = ({}, 0) if overwrite else read_answers(target, settings, batches)
        if done:
            print(f"  resumed  {len(done):,} of {len(good):,} answers were there already")

    # 4. model
    if not (data_path or run) or len(done) < len(good):
        model = load_base(base, base_dtype, load_in_8bit, load_in_4bit, device)
        if not (load_in_8bit or load_in_4bit):
            model.to(device)
        stops = stop_ids(model, tokenizer, lora_weights)
        # nothing of the model's own generation_config.json may leak into a request; before peft wraps the model: a
        # wrapper of no task type would keep it to itself
        model.generation_config = GenerationConfig(eos_token_id=stops or None, pad_token_id=stops[0] if stops else 0)
        model = load_adapter(model, lora_weights).eval() if lora_weights else model.eval()

    def stream(messages, **changed):
        """Yield the answer to a conversation, as stream_answer does."""
        settings = sampling | changed
        ids = encode_prompt(messages, tokenizer, settings["max_new_tokens"], context)
        set_seed(settings["seed"])
        yield from stream_answer(model, tokenizer, ids, to_generation_config(stops, **settings), stops)

    # 5. one answer, a chat or a page
    if ui:
        examples = [row["question"] for row in read_file(find_path("data/tiny/test.jsonl"))[:3]]
        title = f"{base_model} + {lora_weights or 'no adapter'}, template {template}"
        return open_page(stream, title, sampling, context, examples, host, port, password)
    if chat:
        return {"messages": chat_in_terminal(stream, text if prompt else "", max_new_tokens)}
    if not (data_path or run):
        print(f"> {items[0]['messages'][0]['content']}", flush=True)
        answer, cut = print_answer(stream(items[0]["messages"]))
        if cut:
            print(f"(cut at --max_new_tokens {max_new_tokens})")
        return {"answer": answer, "cut": cut}

    # 6. a file
    by_index, finished = {item["index"]: item for item in good}, len(done) == len(good) and not log.exists()

    def answer(n, batch):
        """Return the records of the answers to the n-th batch, a list of indices."""
        # each batch has its own draws: the same ones in a run that was stopped and one that was not
        set_seed(int.from_bytes(hashlib.sha256(f"{seed} {n}".encode()).digest()[:4]))
        config = to_generation_config(stops, **sampling)
        try:
            made = answer_batch(model, [by_index[i]["ids"] for i in batch], config, stops)
        except torch.OutOfMemoryError:
            raise ValueError(f"--micro_batch_size {micro_batch_size} takes more memory than there is") from None
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in made]
        return [
            {"index": i, "prediction": text, "cut": cut, "tokens": len(ids)}
            for i, text, (ids, cut) in zip(batch, texts, made, strict=True)
        ]

    if len(done) < len(good):
        answer_missing(log, size, settings, batches, done, answer)
    if finished and not score:
        print(f"{target} was finished already: --overwrite answers it again")
        return json.loads(target.with_name("summary.json").read_text(encoding="utf-8"))
    summary = {"base_model": base_model, "lora_weights": lora_weights, "data_path": data_path, "run": run}
    summary = finish(target, items, done, summary | {"settings": settings}, score, data_path or run, function)
    if summary["cut"]:
        print(f"{summary['cut']:,} of them cut at --max_new_tokens {max_new_tokens}")
    if bad:
        print(f"{len(bad):,} of {len(items):,} rows could not be answered" + " and are not in the score" * bool(score))
    if score:
        mean, spread, count = summary["mean"], summary["standard_error"], summary["answered"]
        spread = math.nan if spread is None else spread  # of one row
        if function or score == "rouge":
            others = "".join(f", {name} {value:.4f}" for name, value in summary["means"].items() if name != "rougeL")
            print(f"{score} {mean:.4f} +- {spread:.4f} ({count:,} rows){others}")
        else:
            print(f"{score} {mean:.1%} +- {spread:.1%} ({mean * count:.0f} of {count:,})")
    print(f"wrote {target}")
    return summary


if __name__ == "__main__":
    run_cli(generate)
