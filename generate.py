"""
Ask a base model, with or without a LoRA adapter, one question or a file of them.

    reads    --base_model, --lora_weights (an adapter folder of finetune.py, or any PEFT adapter)
             --prompt, or --data_path: any data file that finetune.py reads, or a text file with a prompt a line
    writes   the answer to the terminal; for a file --output_path (a JSON line a prompt) and, with --score,
             a summary beside it
    then     export_hf_checkpoint.py, or a closer look at the predictions

    one      python generate.py --prompt "Tom has 6 boxes with 7 coins in each. How many coins does Tom have now?"
    a file   python generate.py --data_path data/tiny/test.jsonl --score gsm8k_strict
    a GPU    python generate.py --base_model Qwen/Qwen2.5-0.5B --lora_weights out/finetune/adapter --prompt "Hello"

The prompt goes through the chat template that the adapter or checkpoint carries, so the model sees the tokens that
it was trained on; it stops at the token that ended its training answers.

Shapes in comments: B sequences, T tokens.
"""

import csv
import difflib
import functools
import inspect
import json
import math
import os
import re
import sys
import time
import warnings
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
# prompts, scores


def read_prompts(data_path, separator, max_samples):
    """Return (conversations, references) of a data file, folder or hub data set, or of the lines of a text file.

    A reference is the text of the answer that the row holds; None in a row without one, or of a text file.
    """
    path = find_path(data_path)
    if path and path.suffix == ".txt":
        try:
            lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
        except UnicodeDecodeError as error:
            raise ValueError(f"--data_path {data_path}: cannot be read: {error}") from None
        if not lines:
            raise ValueError(f"--data_path {data_path}: no lines in it")
        conversations = [[{"role": "user", "content": line}] for line in lines]
        return conversations[: max_samples or None], [None] * len(lines[: max_samples or None])
    rows, where = read_rows(data_path, "test")
    conversations, references = [], []
    for i, row in enumerate(rows[: max_samples or None]):
        try:
            form = detect_form(row)
            conversations.append(to_messages(row, form, separator, need_response=False))
        except ValueError as error:
            raise ValueError(f"{where(i)}: {error}") from None
        try:
            references.append(to_messages(row, form, separator)[-1]["content"])
        except ValueError:
            references.append(None)
    return conversations, references


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


def score_answer(answer, reference, method):
    """Return the score of one answer against the reference answer, by the name that --score gives."""
    if method == "exact":
        return float(answer.strip() == reference.strip())
    return compute_score(answer, final_number(reference, "strict"), method.removeprefix("gsm8k_"))


# -----------------------------------------------------------------------------
# model


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


def generate(
    *,
    base_model: str = "",
    lora_weights: str = "",
    prompt: str = "",
    input: str = "",
    data_path: str = "",
    output_path: str = "",
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
    # run
    max_samples: int = 0,
    micro_batch_size: int = 64,
    dtype: str = "auto",
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
):
    """Answer one prompt, or every prompt of a file, with a model and its chat template.

    Without any flag it asks data/tiny/model, with out/finetune/adapter if that is there, the first test problem.
    --data_path may also be a .txt file with a prompt a line.

    Args:
        base_model: hub id or folder of the model.
        lora_weights: folder of a LoRA adapter. Empty: the base model alone.
        prompt: the question.
        input: further text that the question is about, as in alpaca's rows.
        data_path: data file, folder of data files or hub id, in any of the forms of data/README.md.
        output_path: JSON lines file for the answers to --data_path. Empty: predictions.jsonl in out/generate.
        score: compare with the file's own answers: gsm8k_strict, gsm8k_flexible or exact.
        prompt_template: chat template: a name of templates/ or a .jinja file. Empty: what the model carries, or alpaca.
        max_new_tokens: longest answer, in tokens.
        temperature: of sampling; 0 takes the likeliest token. Above 0, --micro_batch_size changes what is drawn.
        top_p: sample among the likeliest tokens that together have this probability; 1 for all.
        top_k: sample among so many likeliest tokens; 0 for all.
        num_beams: beams of a beam search; 1 for none.
        repetition_penalty: above 1 makes tokens that are there already less likely.
        seed: of everything random.
        max_samples: use only the first so many rows of each source; 0 for all.
        micro_batch_size: examples that one device processes at a time; only rounding, memory and speed depend on it.
        dtype: of the base weights: auto (bfloat16 on a GPU that has it, else float32), bfloat16, float16 or float32.
        load_in_8bit: quantize the base to int8 with bitsandbytes.
        load_in_4bit: quantize the base to NF4 with bitsandbytes (QLoRA).
    """
    # 1. check flags
    if prompt and data_path:
        raise ValueError("--prompt and --data_path: give one of them")
    if input and not prompt:
        raise ValueError("--input goes with --prompt")
    if score and not data_path:
        raise ValueError(f"--score {score} needs --data_path, a file that holds the right answers")
    if score not in ("", "gsm8k_strict", "gsm8k_flexible", "exact"):
        raise ValueError(f"--score {score}: one of gsm8k_strict, gsm8k_flexible, exact")
    if output_path and not data_path:
        raise ValueError(f"--output_path {output_path} goes with --data_path")
    target = Path(output_path or "out/generate/predictions.jsonl")
    if target.is_dir():
        raise ValueError(f"--output_path {target} is a folder: name a file, such as {target / 'predictions.jsonl'}")
    if data_path and find_path(data_path) and target.exists() and target.samefile(find_path(data_path)):
        raise ValueError(f"--output_path {target} is the file of --data_path: the answers would replace it")
    if not (0 <= temperature < math.inf and 0 < repetition_penalty < math.inf and 0 < top_p <= 1 and top_k >= 0):
        raise ValueError(
            "--temperature and --top_k must not be negative, --repetition_penalty above 0, --top_p in (0, 1]"
        )
    if num_beams < 1 or max_new_tokens < 1 or micro_batch_size < 1:
        raise ValueError("--num_beams, --max_new_tokens and --micro_batch_size must be at least 1")
    if max_samples < 0 or not 0 <= seed < 2**32:
        raise ValueError("--max_samples and --seed must not be negative, --seed below 2**32")
    if not temperature and (top_p != 1 or top_k):
        raise ValueError("--top_p and --top_k do nothing at --temperature 0: set a temperature")
    if num_beams > 1 and temperature:
        raise ValueError(f"--num_beams {num_beams} searches and --temperature {temperature} samples: give one of them")
    if load_in_8bit and load_in_4bit:
        raise ValueError("--load_in_8bit and --load_in_4bit: give one of them")
    if not base_model:
        base_model = "data/tiny/model"
        trained = Path("out/finetune/adapter")
        lora_weights = lora_weights or (str(trained) if (trained / "adapter_config.json").exists() else "")
    if lora_weights and not (Path(lora_weights) / "adapter_config.json").exists():
        raise ValueError(f"--lora_weights {lora_weights}: no adapter there (adapter_config.json)")
    base, base_dtype = find_base(base_model), pick_dtype(dtype)
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    quiet_libraries()

    # 2. prompts
    carries = lora_weights and (Path(lora_weights) / "tokenizer_config.json").exists()
    tokenizer = load_tokenizer(lora_weights if carries else base)
    template, separator = use_template(tokenizer, prompt_template)
    references = [None]
    if data_path:
        conversations, references = read_prompts(data_path, separator, max_samples)
        if score and None in references:
            raise ValueError(f"--score {score}: {references.count(None)} rows of {data_path} hold no answer to compare")
        if score.startswith("gsm8k"):
            lost = [i for i, text in enumerate(references) if final_number(text, "strict") is None]
            if lost:
                raise ValueError(
                    f"--score {score}: the answer in row {lost[0] + 1} of {data_path} has no '#### number'"
                )
    else:
        if not prompt:
            prompt = read_file(find_path("data/tiny/test.jsonl"))[0]["question"]
        conversations = [[{"role": "user", "content": prompt + (separator + input if input else "")}]]
    texts = []
    for i, messages in enumerate(conversations):
        try:
            texts.append(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # jinja2 has its own kinds, and a template can raise
            raise ValueError(f"prompt {i + 1}: the chat template cannot render {messages!r:.200}: {error}") from error
    prompts = tokenizer(texts, add_special_tokens=False).input_ids
    if [] in prompts:
        raise ValueError(f"prompt {prompts.index([]) + 1}: the chat template {template} makes nothing of it")
    config = load_config(base)
    limit_threads(config)
    context = getattr(config, "max_position_embeddings", None)
    long = [i for i, ids in enumerate(prompts) if context and len(ids) + max_new_tokens > context]
    if long:
        raise ValueError(
            f"prompt {long[0] + 1} has {len(prompts[long[0]])} tokens; with --max_new_tokens {max_new_tokens} that is "
            f"more than the {context} positions of the model ({len(long)} such prompts): shorten it, or the answer"
        )

    # 3. model
    set_seed(seed)
    model = load_base(base, base_dtype, load_in_8bit, load_in_4bit, device)
    if not (load_in_8bit or load_in_4bit):
        model.to(device)
    stops = stop_ids(model, tokenizer, lora_weights)
    # padding is masked, and what follows a stop is dropped: any token of the model does, but the tokenizer's own
    # padding token may have been added to it alone
    pad_id = stops[0] if stops else 0
    # every setting is given here: what the model's own generation_config.json says must not leak in
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k} if temperature else {}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        num_beams=num_beams,
        repetition_penalty=repetition_penalty,
        eos_token_id=stops or None,
        pad_token_id=pad_id,
        **sampling,
    )
    model.generation_config = config  # before peft wraps the model: a wrapper of no task type would keep it to itself
    if lora_weights:
        model = load_adapter(model, lora_weights)
    model.eval()
    dtype = str(base_dtype).removeprefix("torch.")
    print(f"generate.py  {base_model} + {lora_weights or 'no adapter'}    {device}  {dtype}  template {template}")

    def answer(batch, streamer=None):
        """Return the new token ids of a batch of prompts, as lists up to and without the end token."""
        longest = max(len(ids) for ids in batch)
        # padded with its own first token: a repetition penalty counts masked tokens, too
        ids = torch.tensor([[ids[0]] * (longest - len(ids)) + ids for ids in batch], device=device)  # [B, T]
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in batch], device=device)
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, streamer=streamer)
        rows = [row.tolist() for row in out[:, longest:]]
        ends = [next((i for i, token in enumerate(row) if token in stops), None) for row in rows]
        return [(row[:end], end is None) for row, end in zip(rows, ends, strict=True)]

    # 4. one answer, to the terminal
    if not data_path:
        streamer = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        print(f"> {conversations[0][-1]['content']}", flush=True)
        (ids, cut), *_ = answer(prompts, streamer if num_beams == 1 else None)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if num_beams > 1:
            print(text)
        if cut:
            print(f"(cut at --max_new_tokens {max_new_tokens})")
        return {"answer": text, "cut": cut}

    # 5. a file: longest prompts first, so that what does not fit into memory fails at once
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(f"{target}.incomplete")
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    records, num_tokens, num_cut, started = {}, 0, 0, time.time()
    from tqdm import tqdm

    with open(partial, "w", encoding="utf-8") as file, tqdm(total=len(order), unit="prompt", disable=None) as bar:
        for at in range(0, len(order), micro_batch_size):
            picked = order[at : at + micro_batch_size]
            for i, (ids, cut) in zip(picked, answer([prompts[i] for i in picked]), strict=True):
                text = tokenizer.decode(ids, skip_special_tokens=True)
                records[i] = {"index": i, "messages": conversations[i], "prediction": text, "cut": cut}
                if references[i] is not None:
                    records[i]["reference"] = references[i]
                if score:
                    records[i]["score"] = score_answer(text, references[i], score)
                num_tokens, num_cut = num_tokens + len(ids), num_cut + cut
                file.write(json.dumps(records[i], ensure_ascii=False) + "\n")
            file.flush()
            bar.update(len(picked))
    seconds = time.time() - started
    lines = [json.dumps(records[i], ensure_ascii=False) + "\n" for i in range(len(prompts))]
    partial.write_text("".join(lines), encoding="utf-8")
    partial.replace(target)
    print(f"{len(prompts)} answers, {num_tokens:,} tokens in {seconds:.1f} s, {num_tokens / seconds:,.0f} tok/s")
    if num_cut:
        print(f"{num_cut} of them cut at --max_new_tokens {max_new_tokens}")
    summary = {"base_model": base_model, "lora_weights": lora_weights, "data_path": data_path, "rows": len(prompts)}
    summary |= {"cut": num_cut, "tokens": num_tokens, "seconds": seconds, "generation_config": config.to_diff_dict()}
    if score:
        scores = [records[i]["score"] for i in range(len(prompts))]
        mean = sum(scores) / len(scores)
        error = math.sqrt(mean * (1 - mean) / len(scores))  # of a mean of zeros and ones
        summary |= {"score": score, "mean": mean, "standard_error": error}
        print(f"{score} {mean:.1%} +- {error:.1%} ({sum(scores):.0f} of {len(scores)})")
    write_json(target.with_suffix(".summary.json"), summary)
    print(f"wrote {target}")
    return summary


if __name__ == "__main__":
    run_cli(generate)
