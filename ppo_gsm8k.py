"""
PPO with a critic and a rule-based reward on GSM8K: actor, critic, reference and rollouts on one copy of the weights.

    reads    --train_files, --val_files   rows in verl's schema (data/gsm8k.py writes them), or question and answer
             --base_model, --lora_weights the policy to start from, usually an adapter of finetune.py
    writes   --output_dir    run.json (flags, versions, results), log.jsonl (a line a step), adapter/, checkpoint-N/,
                             val_generations/, plots/, tensorboard/
    then     generate.py --base_model BASE --lora_weights OUT/adapter, or export_hf_checkpoint.py

    no GPU   python finetune.py && python ppo_gsm8k.py
    1 GPU    python ppo_gsm8k.py --base_model Qwen/Qwen2.5-0.5B-Instruct --train_files data/gsm8k/train.parquet \\
                 --val_files data/gsm8k/test.parquet
    8 GPUs   torchrun --standalone --nproc_per_node=8 ppo_gsm8k.py --base_model ...

A step samples responses to a batch of prompts, scores them, and improves the policy on them: Schulman et al. 2017
(arXiv:1707.06347) with generalized advantages (arXiv:1506.02438), as verl's PPO quickstart has it. Nothing is drawn
from a generator with a state: order and samples of step s are functions of --seed and s, whatever the number of ranks.

Shapes in comments: B sequences of the global batch, R response tokens, N tokens of a packed row, L predicted tokens,
D hidden, V vocabulary, T cached tokens.
"""

import contextlib
import copy
import csv
import functools
import hashlib
import importlib.util
import inspect
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import time
import traceback
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
from safetensors.torch import load_file, save_file
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig, set_seed
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import AttentionInterface

HERE = Path(__file__).resolve().parent
SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
LOGITS_AT_ONCE = 2**26  # entries of a chunk of logits: 256 MB in float32
ROLES = {"actor": "default", "critic": "critic", "reference": "reference", "rollout": "rollout"}  # and their adapters
TINY = ("data/tiny/train.jsonl", "data/tiny/test.jsonl")
KL_TYPES = ("k1", "k2", "k3", "low_var_kl")
LOSS_AGG_MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
DONE = ("adapter", "model")  # what a finished run has
WRITTEN = ("run.json", "log.jsonl", "adapter", "model", "plots", "tensorboard", "val_generations")
# flags that may differ where a run is continued: they change neither what is sampled nor what is learned from it
NOT_OF_THE_RESULT = """
    output_dir resume overwrite train_files val_files total_epochs total_training_steps test_freq save_freq
    val_before_train max_ckpt_to_keep ppo_max_tokens rollout_batch_size cuda_graph activation_checkpointing
    wandb_project wandb_run_name
""".split()
# dense bfloat16 operations a second, in the makers' data sheets
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12, "4090": 165e12}

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


def stop_ids(model, tokenizer, lora_weights):
    """Return every token id that ends an answer: the adapter's or checkpoint's, the template's and the tokenizer's."""
    config = model.generation_config
    if lora_weights and (Path(lora_weights) / "generation_config.json").exists():
        config = GenerationConfig.from_pretrained(lora_weights)
    stops = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return [i for i in dict.fromkeys([*stops, end_of_turn(tokenizer)[1], tokenizer.eos_token_id]) if i is not None]


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


def default_learning_rate(config):
    """Return the LoRA learning rate for a model: 5e-4 (2000 / hidden size)^p, p by family.

    The fit of Schulman et al., "LoRA Without Regret" (Thinking Machines 2025), as in tinker-cookbook's
    hyperparam_utils: p is 0.0775 for Qwen, 0.781 for Llama, and here for every other family. It was made with
    lora_alpha 32 on models from 1B to 70B parameters.
    """
    exponent = 0.0775 if config.model_type.startswith("qwen") else 0.781
    return 5e-4 * (2000 / config.hidden_size) ** exponent


def file_sha256(path):
    """Return the SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_log(path):
    """Return the records of a log.jsonl; without a last line that a killed process left unfinished."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
    return [json.loads(line) for line in lines[:-1]]


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


# -----------------------------------------------------------------------------
# data: problems and their prompts


def read_problems(source, split, tokenizer, max_prompt_length, filter_overlong_prompts):
    """Return (problems, number of overlong prompts) of a data file, folder or hub data set.

    A problem is {"prompt": token ids, "ground_truth", "data_source", "extra_info", "where": says where its row stands}.
    Prompts longer than max_prompt_length are left out, or refused where filter_overlong_prompts is off.
    """
    rows, where = read_rows(source, split)
    problems, texts = [], []
    for i, row in enumerate(rows):
        try:
            problems.append(to_problem(row) | {"where": functools.partial(where, i)})
            messages = problems[-1].pop("messages")
            texts.append(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except ValueError as error:
            raise ValueError(f"{where(i)}: {error}") from None
        except Exception as error:  # jinja2 has its own kinds, and a template can raise
            raise ValueError(f"{where(i)}: the chat template cannot render it: {error}") from error
    for problem, text, ids in zip(problems, texts, tokenizer(texts, add_special_tokens=False).input_ids, strict=True):
        if not ids:
            raise ValueError(f"{problem['where']()}: the chat template makes {text!r} of it, no token")
        problem["prompt"] = ids
    kept = [problem for problem in problems if len(problem["prompt"]) <= max_prompt_length]
    overlong = [problem for problem in problems if len(problem["prompt"]) > max_prompt_length]
    if overlong and not (kept and filter_overlong_prompts):
        how = "take a larger one" + (", or --filter_overlong_prompts to leave them out" if kept else "")
        raise ValueError(
            f"{overlong[0]['where']()}: the prompt has {len(overlong[0]['prompt'])} tokens, more than "
            f"--max_prompt_length {max_prompt_length}, as have {len(overlong)} of {len(problems)}: {how}"
        )
    return kept, len(overlong)


def to_problem(row):
    """Return the problem in a row, its prompt still as messages: a row of verl's, or one with question and answer."""
    if "question" in row and "prompt" not in row:
        answer = text_field(row, "answer")
        truth = final_number(answer, "strict")
        if truth is None:
            raise ValueError(f"the answer must end in '#### number', got {answer[-60:]!r}")
        messages = [{"role": "user", "content": text_field(row, "question")}]
        return {"messages": messages, "ground_truth": truth, "data_source": "openai/gsm8k", "extra_info": row}
    lacks = [name for name in ("prompt", "reward_model") if name not in row]
    if lacks:
        raise ValueError(
            f"the row has no {' and no '.join(lacks)}; it has {', '.join(map(repr, row))}. Needed are prompt, "
            "reward_model and data_source (data/gsm8k.py writes such files) or question and answer"
        )
    turns, reward = row["prompt"], row["reward_model"]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"field 'prompt' must list messages with role and content, got {turns!r:.80}")
    if not isinstance(reward, dict) or reward.get("ground_truth") is None:
        raise ValueError(f"field 'reward_model' must be an object with a ground_truth, got {reward!r:.80}")
    messages = [{"role": text_field(turn, "role"), "content": text_field(turn, "content")} for turn in turns]
    truth = reward["ground_truth"]
    return {
        "messages": messages,
        "ground_truth": str(truth) if type(truth) is int else truth,  # scores compare texts
        "data_source": text_field(row, "data_source", required=False) or "unknown",
        "extra_info": row.get("extra_info") or {},
    }


def rows_of_step(step, num_rows, batch_size, seed):
    """Return the row numbers of step `step` (from 1): a window of one endless row of shuffled epochs, [batch_size].

    No row is dropped at an epoch's end; a batch may hold the end of one epoch and the start of the next.
    """
    window = np.arange((step - 1) * batch_size, step * batch_size)
    epochs = {e: np.random.default_rng([seed, 0, e]).permutation(num_rows) for e in np.unique(window // num_rows)}
    return [int(epochs[i // num_rows][i % num_rows]) for i in window]


# -----------------------------------------------------------------------------
# reward


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


def load_reward(reward):
    """Return the reward function that --reward names: strict, flexible, or a user's as path/to/file.py:function.

    It is called with verl's arguments (data_source, solution_str, ground_truth, extra_info) and returns a number, or
    a dict with the number as "score".
    """
    if reward in ("strict", "flexible"):
        return lambda data_source, solution_str, ground_truth, extra_info: compute_score(
            solution_str, ground_truth, reward
        )
    path, _, name = reward.rpartition(":")
    if not path.endswith(".py"):
        raise ValueError(f"--reward {reward}: strict, flexible, or path/to/file.py:function")
    if find_path(path) is None:
        raise ValueError(f"--reward {reward}: there is no file {path}")
    spec = importlib.util.spec_from_file_location("user_reward", find_path(path))
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look it up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"--reward {reward}: {path} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, name, None)):
        raise ValueError(f"--reward {reward}: {path} has no function {name!r}")
    return getattr(module, name)


def score_response(reward_fn, problem, text):
    """Return the reward of a response text as a finite float; ValueError names the problem and shows the response."""
    try:
        score = reward_fn(
            data_source=problem["data_source"],
            solution_str=text,
            ground_truth=problem["ground_truth"],
            extra_info=problem["extra_info"],
        )
        score = float(score["score"] if isinstance(score, dict) else score)
    except Exception as error:  # whatever the user's function raises
        raise ValueError(
            f"the reward function failed on {problem['where']()} with {type(error).__name__}: {error}; the response "
            f"was {text!r:.300}"
        ) from error
    if not math.isfinite(score):
        raise ValueError(
            f"the reward function returned {score} on {problem['where']()}; the response was {text!r:.300}"
        )
    return score


# -----------------------------------------------------------------------------
# advantages: token-level rewards in, advantages and returns out, all over the global batch


def masked_mean(x, mask):
    """Return the mean of x where mask is True (0 where it never is)."""
    return (x * mask).sum() / (mask.sum() + 1e-8)


def masked_whiten(x, mask):
    """Return x with mean 0 and variance 1 over the True entries of mask, as verl does; other entries move along.

    The variance is the unbiased one. Both are those of what is given: give the global batch.
    """
    mean = masked_mean(x, mask)
    count = mask.sum()
    variance = masked_mean((x - mean) ** 2, mask) * count / (count - 1).clamp(min=1)
    return (x - mean) * torch.rsqrt(variance + 1e-8)


def compute_gae(token_rewards, values, mask, gamma, lam):
    """Return (advantages, returns) by generalized advantage estimation, Schulman et al. 2015, eq. 16; both [B, R].

    token_rewards, values  [B, R] float
    mask                   [B, R] bool, True on response tokens: a run of True, then False

    The value after the last response token is 0, whether the response ended or was cut. Advantages are not whitened
    yet, and 0 where mask is False.
    """
    advantages = torch.zeros_like(values)
    next_value = running = torch.zeros_like(values[:, 0])  # [B]
    for t in reversed(range(values.shape[1])):
        delta = token_rewards[:, t] + gamma * next_value - values[:, t]
        running = (delta + gamma * lam * running) * mask[:, t]
        next_value = values[:, t] * mask[:, t]
        advantages[:, t] = running
    return advantages, (advantages + values) * mask


def compute_group_advantage(token_rewards, mask, group, estimator, norm_adv_by_std=True):
    """Return (advantages, returns) [B, R] without a critic: a response's reward beside the others to its prompt.

    group [B] numbers the prompts. grpo (Shao et al. 2024, arXiv:2402.03300, sec. 4.1.2): reward less the group's
    mean, over its unbiased standard deviation if norm_adv_by_std (without: Dr. GRPO, arXiv:2503.20783). rloo
    (Ahmadian et al. 2024, arXiv:2402.14740, eq. 8): reward less the mean of the others.
    """
    rewards = (token_rewards * mask).sum(-1)  # [B]
    advantages = rewards.clone()
    for number in group.unique():
        own = group == number
        n, r = int(own.sum()), rewards[own]
        if n == 1:
            continue  # as verl: nothing to compare with, the reward itself
        if estimator == "rloo":
            advantages[own] = (r - r.mean()) * n / (n - 1)
        else:
            advantages[own] = (r - r.mean()) / (r.std() + 1e-6 if norm_adv_by_std else 1)
    advantages = advantages[:, None] * mask
    return advantages, advantages


def compute_reinforce_plus_plus_advantage(token_rewards, mask, gamma):
    """Return (advantages, returns) [B, R] of REINFORCE++ (Hu et al. 2025, arXiv:2501.03262): discounted, whitened."""
    returns = torch.zeros_like(token_rewards)
    running = torch.zeros_like(token_rewards[:, 0])
    for t in reversed(range(token_rewards.shape[1])):
        running = (token_rewards[:, t] + gamma * running) * mask[:, t]
        returns[:, t] = running
    return masked_whiten(returns, mask) * mask, returns


def explained_variance(values, returns, mask):
    """Return 1 - Var(returns - values) / Var(returns) over the True entries of mask; 1 is perfect, 0 a constant."""
    if mask.sum() < 2:
        return 0.0
    errors, targets = (returns - values)[mask], returns[mask]
    return 1 - (errors.var() / (targets.var() + 1e-5)).item()


# -----------------------------------------------------------------------------
# losses


def agg_loss(loss, mask, mode, num_tokens=None, num_sequences=None, horizon=None):
    """Return the per-token losses [B, R] as one number, by verl's name of the way.

    token-mean: over all tokens. seq-mean-token-sum, seq-mean-token-mean: a response's sum or mean, then the mean over
    responses. seq-mean-token-sum-norm: all summed, over the longest possible response (Dr. GRPO, arXiv:2503.20783).
    For a part of a batch give the whole batch's num_tokens and num_sequences: the parts' losses then add up to its
    loss, however it is cut. horizon is the longest possible response, by default R.
    """
    num_tokens = mask.sum() if num_tokens is None else num_tokens
    num_sequences = len(mask) if num_sequences is None else num_sequences
    sums = (loss * mask).sum(-1)  # [B]
    if mode == "token-mean":
        return sums.sum() / num_tokens
    if mode == "seq-mean-token-sum":
        return sums.sum() / num_sequences
    if mode == "seq-mean-token-mean":
        return (sums / mask.sum(-1).clamp(min=1)).sum() / num_sequences
    if mode == "seq-mean-token-sum-norm":
        return sums.sum() / (mask.shape[-1] if horizon is None else horizon)
    raise ValueError(f"loss_agg_mode {mode!r}: one of {', '.join(LOSS_AGG_MODES)}")


def compute_policy_loss(
    old_logprobs,
    logprobs,
    advantages,
    mask,
    clip_ratio_low=0.2,
    clip_ratio_high=0.2,
    clip_ratio_c=3.0,
    loss_agg_mode="token-mean",
    **counts,
):
    """Return (loss, clipfrac, ppo_kl, clipfrac_lower) of PPO's clipped objective; all inputs [B, R].

    Schulman et al. 2017, eq. 7, with the ratio clipped to [1 - clip_ratio_low, 1 + clip_ratio_high]; where the
    advantage is negative the loss is at most -advantage * clip_ratio_c (dual clip, Ye et al. 2020, arXiv:1912.09729,
    eq. 5). ppo_kl is the k1 estimate of KL(old || new), the fractions are shares of the tokens. counts: see agg_loss.
    """
    log_ratio = (logprobs - old_logprobs).clamp(-20, 20)  # exp stays finite
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_ratio_low, 1 + clip_ratio_high)
    worse, bound = torch.maximum(plain, clipped), -advantages * clip_ratio_c
    loss = torch.where(advantages < 0, torch.minimum(worse, bound), worse)
    clipfrac = masked_mean((clipped > plain).float(), mask)
    clipfrac_lower = masked_mean(((worse > bound) & (advantages < 0)).float(), mask)
    loss = agg_loss(loss, mask, loss_agg_mode, **counts)
    return loss, clipfrac, masked_mean(-log_ratio, mask), clipfrac_lower


def compute_value_loss(values, old_values, returns, mask, cliprange_value=0.5, **counts):
    """Return (loss, clipfrac) of the critic: half the squared error, token-mean; all inputs [B, R].

    A value that moved more than cliprange_value from old_values is clipped there, and the larger of both errors
    counts (OpenAI baselines' ppo2). counts: see agg_loss.
    """
    clipped = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    plain_error, clipped_error = (values - returns) ** 2, (clipped - returns) ** 2
    clipfrac = masked_mean((clipped_error > plain_error).float(), mask)
    return 0.5 * agg_loss(torch.maximum(plain_error, clipped_error), mask, "token-mean", **counts), clipfrac


def kl_penalty(logprobs, ref_logprobs, kind):
    """Return a per-token estimate of KL(policy || reference), [B, R], by Schulman's names (joschu.net/blog/kl-approx).

    k1: log-ratio, unbiased, may be negative. k2: half its square. k3, verl's low_var_kl: unbiased and never negative.
    """
    log_ratio = logprobs - ref_logprobs
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * log_ratio**2
    if kind in ("k3", "low_var_kl"):
        inverse = (-log_ratio).clamp(-20, 20)
        return (inverse.exp() - inverse - 1).clamp(-10, 10)
    raise ValueError(f"KL estimate {kind!r}: one of {', '.join(KL_TYPES)}")


class FixedKLController:
    """A KL coefficient that stays what it is."""

    def __init__(self, kl_coef):
        self.value = kl_coef

    def update(self, current_kl, n_steps):
        """Leave the coefficient alone."""


class AdaptiveKLController:
    """A KL coefficient that steers the KL towards target_kl (Ziegler et al. 2019, arXiv:1909.08593, sec. 2.2)."""

    def __init__(self, kl_coef, target_kl, horizon):
        self.value, self.target_kl, self.horizon = kl_coef, target_kl, horizon

    def update(self, current_kl, n_steps):
        """Move the coefficient for a batch of n_steps responses with a mean per-token KL of current_kl."""
        error = min(max(current_kl / self.target_kl - 1, -0.2), 0.2)
        self.value *= 1 + error * n_steps / self.horizon


# -----------------------------------------------------------------------------
# model: packed rows, a cache for decoding, roles on one base


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


class KVCache:
    """Keys and values of up to B sequences of up to T tokens, which `cached_attention` fills and reads.

    A layer's two tensors [B, KV heads, T, D] are made when it first writes. `rows` and `positions`, [n] each, say
    where the next write goes: in a prefill an entry for each packed token, in decoding one for each sequence.
    """

    def __init__(self, num_rows, num_tokens):
        self.num_rows, self.num_tokens, self.layers = num_rows, num_tokens, {}

    def at(self, rows, positions, prefill=False):
        """Set where the next write goes, and return the cache."""
        self.rows, self.positions, self.prefill = rows, positions, prefill
        return self

    def write(self, layer, key, value):
        """Store key and value [n, KV heads, D] of a layer and return its two tensors."""
        if layer not in self.layers:  # zeros: what is masked must be finite
            self.layers[layer] = [
                x.new_zeros(self.num_rows, x.shape[1], self.num_tokens, x.shape[2]) for x in (key, value)
            ]
        for cached, new in zip(self.layers[layer], (key, value), strict=True):
            cached[self.rows, :, self.positions] = new
        return self.layers[layer]

    def keep(self, index):
        """Move the sequences `index` [n] to the front."""
        for tensors in self.layers.values():
            for cached in tensors:
                cached[: len(index)] = cached[index]


def cached_attention(module, query, key, value, attention_mask, scaling=None, kv_cache=None, **kwargs):
    """Attention of packed rows and, where a KVCache is given, of decoding, as an attention function of transformers.

    Packed: see packed_attention; a prefill also fills the cache. Decoding: query [B, H, 1, D] sees the cached tokens
    where attention_mask [B, 1, 1, T] is True, T the first tokens of the cache that may hold any. Returns
    ([B, T, H, D], None).
    """
    query, key = query.to(value.dtype), key.to(value.dtype)  # over float32 weights autocast leaves rotary in float32
    if kv_cache is None or kv_cache.prefill:
        if kv_cache is not None:
            kv_cache.write(module.layer_idx, key[0].transpose(0, 1), value[0].transpose(0, 1))
        return packed_attention(module, query, key, value, None, scaling, **kwargs)
    cached = kv_cache.write(module.layer_idx, key[:, :, 0], value[:, :, 0])
    num, heads, _, size = query.shape
    keys, values = (x[:num, :, : attention_mask.shape[-1]] for x in cached)
    if window := kwargs.get("sliding_window"):
        columns = torch.arange(attention_mask.shape[-1], device=query.device)
        attention_mask = attention_mask & (columns > kv_cache.positions[:, None, None, None] - window)
    # the query heads of a group stand as if they were positions of one head: no key is repeated
    query = query.reshape(num, keys.shape[1], heads // keys.shape[1], size)
    out = F.scaled_dot_product_attention(query, keys, values, attn_mask=attention_mask, scale=scaling)
    return out.reshape(num, 1, heads, size), None


def pack_rows(rows, device):
    """Lay lists of token ids end to end in one row, [1, N], as inputs of `Policies.hidden`."""
    lengths = [len(row) for row in rows]
    return {
        "input_ids": torch.tensor([token for row in rows for token in row], device=device)[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths]).to(device)[None],
        "cu_seq_lens": torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device=device),
        "max_length": max(lengths),
    }


def pack_responses(prompts, responses, device):
    """Lay prompts and their responses end to end: (inputs, positions [L], targets [L]).

    The positions are those whose hidden states predict the response tokens, the targets are those tokens, in order.
    """
    inputs = pack_rows([p + r for p, r in zip(prompts, responses, strict=True)], device)
    ends = np.cumsum([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)])
    positions = [np.arange(end - len(r), end) - 1 for end, r in zip(ends, responses, strict=True)]
    targets = torch.tensor([token for r in responses for token in r], device=device)
    return inputs, torch.from_numpy(np.concatenate(positions)).to(device), targets


def sampled_logits(logits, temperature, vocab_size, top_k=0, top_p=1.0):
    """Return logits [..., V] as those of the distribution that is sampled from, [..., vocab_size] in float32.

    Divided by the temperature; without the ids that pad the vocabulary; and with the lowest possible logit for every
    token that top-k or top-p leaves out. Sampling and log-probabilities both go through here, so they agree.
    """
    logits = logits[..., :vocab_size].float() / temperature
    lowest = torch.finfo(torch.float32).min
    if top_k and top_k < vocab_size:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[..., -1:], lowest)
    if top_p < 1:
        ranked, order = logits.sort(dim=-1, descending=True)
        probs = ranked.softmax(-1)
        beyond = probs.cumsum(-1) - probs >= top_p  # the likelier ones alone have top_p
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), lowest)
    return logits


def token_logprobs(hidden, targets, head, to_logits, with_entropy=False):
    """Return (log-probabilities [L], entropies [L] or None) of targets [L] in float32, without the [L, V] logits.

    head maps hidden [L, D] to logits, to_logits is sampled_logits with its settings. More rows than fit into one
    chunk are taken in chunks, whose logits are computed again in the backward pass.
    """

    def of_chunk(hidden, targets):
        logprobs = to_logits(head(hidden)).log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1) if with_entropy else None
        return logprobs.gather(-1, targets[:, None])[:, 0], entropy

    rows = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
    if len(targets) <= rows:
        return of_chunk(hidden, targets)
    parts = [
        checkpoint(of_chunk, h, t, use_reentrant=False)
        for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies) if with_entropy else None


class Policies:
    """The actor, the critic, the reference, and the policy that rollouts sample from, by role.

    With LoRA all are one frozen base with an adapter each; a reference without an adapter of its own is the bare
    base. In full fine-tuning each is a model of its own. Rollouts in half precision have a copy of the actor's trained
    weights in that dtype, which `sync_rollout` refreshes; in float32 they use the actor itself.
    """

    def __init__(self, models, value_head, dtype, device, activation_checkpointing=False):
        AttentionInterface.register("cached", cached_attention)
        self.models, self.value_head, self.dtype, self.device = models, value_head, dtype, torch.device(device)
        self.peft, self.active, self.layers = hasattr(models["actor"], "peft_config"), None, []
        for model in {id(model): model for model in models.values()}.values():
            base = self.base(model)
            base.config.use_cache = False
            base.set_attn_implementation("cached")
            model.eval()  # no dropout: what sampled, what is compared and what is trained are one function
            for module in model.modules():  # nor in layers that recompute activations, which are in training mode
                for name in [
                    name for name, value in vars(module).items() if "dropout" in name and type(value) is float
                ]:
                    setattr(module, name, 0.0)
            if activation_checkpointing:
                base.activation_checkpointing_enable({"use_reentrant": False})
                self.layers += [m for m in base.modules() if isinstance(m, GradientCheckpointingLayer)]

    def base(self, model):
        """Return the transformers model in a model with or without adapters."""
        return model.get_base_model() if self.peft else model

    def autocast(self, role):
        """Return the context in which a role computes: half precision over float32 weights, where it has such."""
        enabled = self.dtype != torch.float32 and role != "rollout"
        return torch.autocast(self.device.type, self.dtype, enabled=enabled)

    def use(self, role):
        """Return the transformers model of a role, with the role's adapter active and no other."""
        role = "actor" if role == "rollout" and role not in self.models else role
        if self.peft and self.active != role:
            model, self.active = self.models[role], role
            if role == "reference" and "reference" not in model.peft_config:
                model.base_model.disable_adapter_layers()
            else:
                model.base_model.enable_adapter_layers()
                model.set_adapter(ROLES[role], inference_mode=role not in ("actor", "critic"))
        return self.base(self.models[role])

    def hidden(self, role, input_ids, **inputs):
        """Return the last hidden states [tokens, D] of a role's decoder; inputs as of `pack_responses` or decoding."""
        decoder = self.use(role).get_decoder()
        for layer in self.layers:  # transformers recomputes activations in training mode only
            layer.training = torch.is_grad_enabled()
        with self.autocast(role):
            return decoder(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state.flatten(0, 1)

    def logprobs(self, role, packed, to_logits, with_entropy=False):
        """Return (log-probabilities [L], entropies [L] or None) of the response tokens in the row of pack_responses."""
        inputs, positions, targets = packed
        hidden = self.hidden(role, **inputs)[positions]
        with self.autocast(role):
            return token_logprobs(hidden, targets, self.use(role).get_output_embeddings(), to_logits, with_entropy)

    def values(self, packed):
        """Return the critic's values [L] before each response token in the row of pack_responses, float32."""
        inputs, positions, _ = packed
        return self.value_head(self.hidden("critic", **inputs)[positions].float())[:, 0]

    def parameters(self, role):
        """Return {name: parameter} of what belongs to a role alone; the critic's with its value head."""
        model, part = self.models[role], f".{ROLES[role]}."
        found = {name: p for name, p in model.named_parameters() if not self.peft or part in f"{name}."}
        found = {f"{name}.".replace(part, ".")[:-1] if self.peft else name: p for name, p in found.items()}
        if role == "critic":
            found |= {f"value_head.{name}": p for name, p in self.value_head.named_parameters()}
        return found

    @torch.no_grad()
    def sync_rollout(self):
        """Copy the actor's trained weights to the rollouts' own, where they have some."""
        if "rollout" in self.models:
            own = self.parameters("rollout")
            for name, p in self.parameters("actor").items():
                own[name].copy_(p)


# -----------------------------------------------------------------------------
# rollout


def pick_tokens(logits, uniforms=None):
    """Return (tokens [B], log-probabilities [B]): the likeliest of logits [B, V], or one drawn by uniforms [B].

    A draw inverts the cumulative distribution, so a token depends on its own uniform number in [0, 1) alone, not on
    who is in the batch. The sums are float64: the small probabilities of a large vocabulary would be lost in float32.
    """
    logprobs = logits.log_softmax(-1)
    if uniforms is None:
        tokens = logits.argmax(-1)
    else:
        cumulative = logprobs.double().exp().cumsum(-1)
        # a little below the whole: the last token with any probability is the last that can be drawn
        target = uniforms.double()[:, None] * cumulative[:, -1:] * (1 - 2**-40)
        tokens = torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_max(logits.shape[-1] - 1)  # nan
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


class Rollout:
    """Samples responses with a policy: a packed prefill, then a decoding loop over a KV cache that stays in place.

    Sequences that have ended leave the batch. On a GPU a decoding step is a CUDA graph, captured once for each of a
    few batch sizes and replayed from then on, with the adapters' weights as they are at that time.
    """

    def __init__(self, policies, to_logits, stops, max_tokens, max_rows, prefill_tokens, cuda_graph=False):
        self.policies, self.to_logits, self.stop_set = policies, to_logits, set(stops)
        self.stops = torch.tensor(stops, device=policies.device)
        self.max_tokens, self.max_rows, self.prefill_tokens = max_tokens, max_rows, prefill_tokens
        self.cuda_graph, self.graphs, self.cache = cuda_graph, {}, None

    @torch.no_grad()
    def generate(self, prompts, max_response_length, uniforms=None):
        """Return (responses, logprobs) of prompts (lists of ids): token lists up to and with the end token, [R] arrays.

        uniforms [B, max_response_length] float32 in [0, 1) decide what is drawn; without them the likeliest token is
        taken. A response without an end token was cut at max_response_length.
        """
        responses, logprobs = [], []
        for start in range(0, len(prompts), self.max_rows):
            stop = start + self.max_rows
            part = self.decode(
                prompts[start:stop], max_response_length, None if uniforms is None else uniforms[start:stop]
            )
            responses, logprobs = responses + part[0], logprobs + part[1]
        return responses, logprobs

    def decode(self, prompts, max_response_length, uniforms):
        """Do what `generate` says for at most max_rows prompts."""
        device, longest, num = self.policies.device, max(map(len, prompts)), self.bucket(len(prompts))
        self.make_buffers(device)
        if uniforms is not None:
            uniforms = F.pad(torch.as_tensor(uniforms, device=device), (0, 0, 0, num - len(prompts)))
        out = torch.zeros(num, max_response_length, dtype=torch.long, device=device)
        out_logprobs = torch.zeros(num, max_response_length, device=device)
        rows = torch.arange(num, device=device)
        ended = rows >= len(prompts)  # what fills the bucket of a CUDA graph
        self.tokens[:num], self.positions[:num] = 0, 0
        self.prefill(prompts, uniforms)
        check_every = 16 if device.type == "cuda" else 1  # asking the GPU whether all have ended makes it wait
        for t in range(max_response_length):
            if t:
                if uniforms is not None:
                    self.uniforms[:num] = uniforms[rows, t]
                self.step(num, longest + t, uniforms is None)
            out[rows, t], out_logprobs[rows, t] = self.tokens[:num], self.logprobs[:num]
            ended |= torch.isin(self.tokens[:num], self.stops)
            if t % check_every == check_every - 1 or t == 0:
                alive = (~ended).nonzero()[:, 0]
                if not len(alive):
                    break
                size = self.bucket(len(alive))
                if size <= 0.75 * num:
                    index = torch.cat([alive, ended.nonzero()[:, 0]])[:size]  # some that have ended fill the bucket
                    self.cache.keep(index)
                    for buffer in (self.tokens, self.positions):
                        buffer[:size] = buffer[index]
                    rows, ended, num = rows[index], ended[index], size
        is_stop = torch.isin(out, self.stops)
        ends = torch.where(is_stop.any(-1), is_stop.int().argmax(-1) + 1, max_response_length).tolist()
        made = list(zip(out.tolist(), out_logprobs.cpu().numpy(), ends, strict=True))[: len(prompts)]
        return [tokens[:end] for tokens, _, end in made], [logprobs[:end] for _, logprobs, end in made]

    def make_buffers(self, device):
        """Make, once, what a decoding step reads and writes: CUDA graphs need it to stay where it is."""
        if self.cache is None:
            self.cache = KVCache(self.max_rows, self.max_tokens)
            self.tokens, self.positions, self.all_rows = (torch.arange(self.max_rows, device=device) for _ in range(3))
            self.uniforms, self.logprobs = (torch.zeros(self.max_rows, device=device) for _ in range(2))

    def bucket(self, num):
        """Return the batch size to decode `num` sequences with: itself, or the next power of two for a CUDA graph."""
        return min(self.max_rows, max(8, 2 ** (num - 1).bit_length())) if self.cuda_graph else num

    def prefill(self, prompts, uniforms):
        """Fill the cache with the prompts, packed, and draw the first token of each response."""
        for part in split_by_tokens([len(p) for p in prompts], self.prefill_tokens):
            mine = [prompts[i] for i in part]
            rows, lengths = torch.tensor(part, device=self.policies.device), torch.tensor([len(p) for p in mine])
            inputs = pack_rows(mine, self.policies.device)
            cache = self.cache.at(rows.repeat_interleave(lengths.to(rows)), inputs["position_ids"][0], prefill=True)
            hidden = self.policies.hidden("rollout", **inputs, kv_cache=cache)[inputs["cu_seq_lens"][1:] - 1]
            picked = self.pick(hidden, None if uniforms is None else uniforms[rows, 0])
            self.tokens[rows], self.logprobs[rows] = picked
            self.positions[rows] = lengths.to(rows)

    def pick(self, hidden, uniforms):
        """Return (tokens, log-probabilities) [B] at the hidden states [B, D]."""
        head = self.policies.use("rollout").get_output_embeddings()
        with self.policies.autocast("rollout"):
            logits = head(hidden)
        return pick_tokens(self.to_logits(logits), uniforms)

    def forward(self, num, width, greedy):
        """Feed the first `num` sequences their last token and draw the next; `width` cached tokens may be in use."""
        positions = self.positions[:num]
        visible = torch.arange(width, device=positions.device) <= positions[:, None]
        hidden = self.policies.hidden(
            "rollout",
            self.tokens[:num, None],
            position_ids=positions[:, None],
            attention_mask=visible[:, None, None],
            kv_cache=self.cache.at(self.all_rows[:num], positions),
        )
        self.tokens[:num], self.logprobs[:num] = self.pick(hidden, None if greedy else self.uniforms[:num])
        positions += 1

    def step(self, num, width, greedy):
        """Do a decoding step, as a CUDA graph where there may be one."""
        if not self.cuda_graph:
            return self.forward(num, width, greedy)
        if (num, greedy) not in self.graphs:
            state = [(buffer, buffer.clone()) for buffer in (self.tokens, self.positions, self.logprobs)]
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # libraries set themselves up outside of the capture
                for _ in range(2):
                    self.forward(num, self.max_tokens, greedy)
            torch.cuda.current_stream().wait_stream(stream)
            pool = next(iter(self.graphs.values())).pool() if self.graphs else None
            self.graphs[num, greedy] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[num, greedy], pool=pool, capture_error_mode="thread_local"):  # NCCL's
                self.forward(num, self.max_tokens, greedy)
            for buffer, before in state:  # what the warm-up wrote to the cache is written again, the same
                buffer.copy_(before)
        self.graphs[num, greedy].replay()


# -----------------------------------------------------------------------------
# batches: who processes what


def split_by_tokens(lengths, max_tokens):
    """Return the row numbers of each micro-batch: rows sorted by length, longest first, with at most max_tokens tokens.

    A row longer than that stands alone.
    """
    parts, total = [], 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not parts or total + lengths[i] > max_tokens:
            parts, total = [*parts, []], 0
        parts[-1].append(i)
        total += lengths[i]
    return parts


def deal(lengths, num_ranks):
    """Return the row numbers of each rank, about equally many tokens each: the longest first, to whom has fewest."""
    hands, totals = [[] for _ in range(num_ranks)], [0] * num_ranks
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        poorest = totals.index(min(totals))
        hands[poorest].append(i)
        totals[poorest] += lengths[i]
    return hands


def plan_batches(lengths, mini_batch_size, max_tokens, rank, world_size):
    """Return [(rows of a mini-batch, this rank's micro-batches of it)], all as row numbers.

    Mini-batches are consecutive rows, the same for any number of ranks and any max_tokens.
    """
    plan = []
    for start in range(0, len(lengths), mini_batch_size):
        rows = range(start, min(start + mini_batch_size, len(lengths)))
        mine = [rows[i] for i in deal([lengths[i] for i in rows], world_size)[rank]]
        parts = split_by_tokens([lengths[i] for i in mine], max_tokens)
        plan.append((rows, [[mine[i] for i in part] for part in parts]))
    return plan


def gather_rows(own, num_rows):
    """Return the rows {row number: object} of all ranks as a list of num_rows objects, on every rank."""
    parts = [own]
    if dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, own)
    rows = {number: row for part in parts for number, row in part.items()}
    return [rows[number] for number in range(num_rows)]


def sum_over_ranks(numbers):
    """Return a dict of numbers with the sums of all ranks', on every rank; a rank may lack some."""
    parts = [numbers]
    if dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, numbers)
    return {name: sum(part.get(name, 0.0) for part in parts) for name in sorted(set().union(*parts))}


def pad_rows(rows):
    """Return rows of numbers as one right-padded tensor [B, R] float32 and its mask [B, R] bool."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    padded = torch.zeros(mask.shape)
    padded[mask] = torch.from_numpy(np.concatenate(rows)).float()
    return padded, mask


def optimizer_step(optimizer, parameters, max_grad_norm):
    """Add up the ranks' gradients, clip their norm, and step; returns the norm before clipping, [] on every rank.

    Where it is not finite, no rank steps.
    """
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    if dist.is_initialized():
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        grads = [part.view_as(grad) for part, grad in zip(flat.split([g.numel() for g in grads]), grads, strict=True)]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))).item()
    if math.isfinite(norm):
        if max_grad_norm and norm > max_grad_norm:
            torch._foreach_mul_(grads, max_grad_norm / (norm + 1e-6))
        for p, grad in zip(parameters, grads, strict=True):
            p.grad = grad
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


# -----------------------------------------------------------------------------
# build, save, resume


def load_policies(base, dtype, device, roles, lora_weights, lora, targets, quantization, activation_checkpointing):
    """Return the Policies that have `roles`: one base with adapters, or, if lora["r"] is 0, a model for each role.

    quantization is (load_in_8bit, load_in_4bit). An adapter in lora_weights is what actor and critic start from, and
    the reference; in full fine-tuning it is merged first, and what is trained is float32.
    """
    full = not lora["r"]
    model = load_base(base, torch.float32 if full else dtype, *quantization, str(device))
    generation_config = model.generation_config
    if lora_weights:
        model = load_adapter(model, lora_weights)
    if full:
        model = model.merge_and_unload() if lora_weights else model
        models = {role: copy.deepcopy(model) if role != "actor" else model for role in roles}
        for role in {"reference", "rollout"} & set(roles):
            for p in models[role].requires_grad_(False).parameters():
                p.data = p.data.to(dtype)  # .to(dtype) of the model would round its rotary frequencies, too
    else:
        model = model if lora_weights else add_lora(model, targets, **lora)
        for role in roles[1:]:
            if role != "reference" or lora_weights:  # without an adapter the reference is the bare base
                copy_adapter(model, ROLES[role], "" if role == "rollout" else lora_weights)
        models = dict.fromkeys(roles, model)
    for model in models.values():
        if not any(quantization):
            model.to(device)
    value_head = torch.nn.Linear(models["actor"].config.get_text_config().hidden_size, 1, device=device)
    torch.nn.init.zeros_(value_head.weight)  # a random one would begin with values of +-10 for rewards of 0 and 1
    torch.nn.init.zeros_(value_head.bias)
    policies = Policies(models, value_head, dtype, device, activation_checkpointing)
    policies.generation_config = generation_config
    if "rollout" in roles:
        for p in policies.parameters("rollout").values():
            p.data = p.data.to(dtype)
    return policies


def make_optimizer(policies, role, lr, weight_decay):
    """Return AdamW over what a role trains."""
    parameters = list(policies.parameters(role).values())
    for p in parameters:
        p.requires_grad_(True)
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)


def copy_adapter(model, name, lora_weights):
    """Add an adapter `name` with the shape of the actor's: the one in lora_weights again, or a new one."""
    if lora_weights:
        model.load_adapter(lora_weights, name, is_trainable=name == "critic")
    else:
        model.add_adapter(name, copy.deepcopy(model.peft_config["default"]))


@torch.no_grad()
def check_forward(policies, rollout, to_logits, vocab_size):
    """Refuse a model whose packed or cached forward is not its own.

    The log-probabilities of greedy responses to three random prompts must agree: as the decoding loop found them, in
    a packed row, and in the model's own forward.
    """
    rng, most = np.random.default_rng(0), min(4, rollout.max_tokens - 1)
    prompts = [rng.integers(vocab_size, size=min(n, rollout.max_tokens - most)).tolist() for n in (9, 24, 17)]
    model = policies.use("actor")
    try:
        responses, decoded = rollout.generate(prompts, most)
        packed, _ = policies.logprobs("actor", pack_responses(prompts, responses, policies.device), to_logits)
        model.set_attn_implementation("sdpa")
        own = []
        for prompt, response in zip(prompts, responses, strict=True):
            with policies.autocast("actor"):
                row = torch.tensor([prompt + response], device=policies.device)
                logits = to_logits(model(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 : -1])
            own.append(logits.log_softmax(-1).gather(-1, row[0, len(prompt) :, None])[:, 0])
        model.set_attn_implementation("cached")
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, AttributeError, ValueError) as error:
        hint = "; --nocuda_graph may help" if rollout.cuda_graph else ""
        why = str(error).partition(": use --nopacking")[0]  # finetune.py's way out, not this script's
        raise ValueError(f"this model cannot be run packed and with this script's cache: {why}" + hint) from error
    exact, own = policies.dtype == torch.float32 and not getattr(model, "is_quantized", False), torch.cat(own)
    for name, found in {"packed": packed, "cached": torch.from_numpy(np.concatenate(decoded))}.items():
        off = (found.to(own) - own).abs().mean().item()
        if not off <= (1e-4 if exact else 0.2):  # in half precision, and divided by the temperature
            raise ValueError(
                f"the {name} forward of this model is not its own: log-probabilities are {off:.3g} off. Its attention "
                "or its output layer does something that this script does not know"
            )


def micro_batch(batch, part, device):
    """Return the rows `part` of the global batch on the device: "packed", and its [B, R] tensors as far as they go."""
    prompts, responses = ([batch[name][i] for i in part] for name in ("prompts", "responses"))
    longest = max(map(len, responses))
    tensors = {name: x[part, :longest].to(device) for name, x in batch.items() if torch.is_tensor(x)}
    return {"packed": pack_responses(prompts, responses, device)} | tensors


def unflatten(flat, mask):
    """Return the values [L] of response tokens as [B, R], 0 where mask [B, R] is False."""
    return torch.zeros(mask.shape, device=flat.device).masked_scatter(mask, flat)


@torch.no_grad()
def forward_all(batch, plan, device, forward):
    """Return [B, R] tensors of the whole global batch on every rank: what forward(micro-batch) returns as [L] each."""
    own = {}
    for part in (part for _, parts in plan for part in parts):
        micro = micro_batch(batch, part, device)
        rows = zip(*(unflatten(flat, micro["mask"]).cpu() for flat in forward(micro)), strict=True)
        own |= {i: [x[: len(batch["responses"][i])].numpy() for x in row] for i, row in zip(part, rows, strict=True)}
    rows = gather_rows(own, len(batch["responses"]))
    return [pad_rows(column)[0] for column in zip(*rows, strict=True)]


def update(parameters, optimizer, batch, plan, epochs, max_grad_norm, micro_loss):
    """Do PPO's epochs over the mini-batches of `plan`, an optimizer step each, and return their metrics.

    micro_loss(micro-batch, num_tokens=, num_sequences=) returns its share of the mini-batch's loss, and metrics: means
    over its tokens, or shares of a loss where the name says so. They become means over all tokens, or mini-batches.
    """
    sums, norms, parameters, steps = {}, [], list(parameters.values()), epochs * len(plan)
    tokens, device = epochs * int(batch["mask"].sum()), parameters[0].device
    for step in range(steps):
        rows, parts = plan[step % len(plan)]
        counts = {"num_tokens": int(batch["mask"][list(rows)].sum()), "num_sequences": len(rows)}
        for part in parts:
            micro = micro_batch(batch, part, device)
            loss, metrics = micro_loss(micro, **counts)
            loss.backward()
            share = int(micro["mask"].sum())
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + value.item() * (1 / steps if "loss" in name else share / tokens)
            if step == 0 and "ratio_diff" in metrics:
                first = metrics["ratio_diff"].item() * share / counts["num_tokens"]
                sums["first_ratio_diff"] = sums.get("first_ratio_diff", 0.0) + first
        norms.append(optimizer_step(optimizer, parameters, max_grad_norm))
    finite = [norm for norm in norms if math.isfinite(norm)]
    sums = sum_over_ranks(sums) | {
        "grad_norm": sum(finite) / max(1, len(finite)),
        "skipped_updates": steps - len(finite),
    }
    sums.pop("ratio_diff", None)  # the first mini-batch's says something
    return sums


# -----------------------------------------------------------------------------
# validation, checkpoints, plots


def validate(rollout, problems, reward_fn, reward, tokenizer, max_response_length, rank, world_size):
    """Answer every problem greedily; return (metrics under verl's names, the generations) on every rank."""
    mine = range(rank, len(problems), world_size)
    responses, _ = rollout.generate([problems[i]["prompt"] for i in mine], max_response_length)
    own = {}
    for i, ids in zip(mine, responses, strict=True):
        problem, text = problems[i], tokenizer.decode(ids, skip_special_tokens=True)
        own[i] = {
            "index": i,
            "input": tokenizer.decode(problem["prompt"]),
            "output": text,
            "ground_truth": problem["ground_truth"],
            "data_source": problem["data_source"],
            "tokens": len(ids),
            "cut": ids[-1] not in rollout.stop_set,
            "score": score_response(reward_fn, problem, text),
        }
        if reward in ("strict", "flexible"):
            own[i] |= {m: compute_score(text, problem["ground_truth"], m) for m in ("strict", "flexible")}
    rows = gather_rows(own, len(problems))
    metrics = {}
    for source in sorted({row["data_source"] for row in rows}):
        of_source = [row for row in rows if row["data_source"] == source]
        metrics[f"val-core/{source}/reward/mean@1"] = sum(row["score"] for row in of_source) / len(of_source)
        for method in ("strict", "flexible"):
            if method in of_source[0]:
                metrics[f"val-aux/{source}/{method}/mean@1"] = sum(row[method] for row in of_source) / len(of_source)
    metrics["val-aux/response_length/mean"] = sum(row["tokens"] for row in rows) / len(rows)
    metrics["val-aux/response_length/clip_ratio"] = sum(row["cut"] for row in rows) / len(rows)
    return metrics, rows


def write_lines(path, records):
    """Write records as JSON lines beside `path` and rename the file."""
    partial = Path(f"{path}.incomplete")
    partial.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    partial.replace(path)


def export_policy(policies, tokenizer, folder, dtype):
    """Write the actor to `folder` as other programs load it: an adapter, or a whole model in `dtype`.

    With it go the tokenizer with its chat template and a generation config that says what ends an answer.
    """
    model = policies.models["actor"]
    if policies.peft:
        model.save_pretrained(folder, selected_adapters=[ROLES["actor"]], save_embedding_layers=False)
    else:
        weights = {name: p.detach().to(dtype) for name, p in model.state_dict().items()}
        model.save_pretrained(folder, state_dict=weights)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        write_json(folder / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})
    tokenizer.save_pretrained(folder)
    policies.generation_config.save_pretrained(folder)


def list_checkpoints(out):
    """Return the steps of the whole checkpoints in a folder, ascending."""
    names = [path.name.removeprefix("checkpoint-") for path in Path(out).glob("checkpoint-*")]
    return sorted(int(name) for name in names if name.isdigit())


def save_checkpoint(out, state, policies, optimizers, settings, tokenizer, max_ckpt_to_keep):
    """Write checkpoint-N under another name, rename it once it is whole, and drop all but the last ones.

    It holds what a role trains (actor.safetensors, critic.safetensors), optimizer.pt, state.json, and adapter/.
    """
    target = out / f"checkpoint-{state['global_step']}"
    partial = target.with_name(f"{target.name}.incomplete")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for role in optimizers:
            tensors = {name: p.detach().cpu().contiguous() for name, p in policies.parameters(role).items()}
            save_file(tensors, partial / f"{role}.safetensors")
        if policies.peft:
            export_policy(policies, tokenizer, partial / "adapter", policies.dtype)
        torch.save({role: optimizer.state_dict() for role, optimizer in optimizers.items()}, partial / "optimizer.pt")
        write_json(partial / "state.json", state)
        files = {str(f.relative_to(partial)): file_sha256(f) for f in sorted(partial.rglob("*")) if f.is_file()}
        write_json(partial / "manifest.json", {"settings": settings, "files": files})
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap a full disk in their own
        shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(out).free / 1e6
        raise ValueError(
            f"{target} could not be written ({free:.0f} MB free): {error}. Earlier checkpoints are untouched; make "
            "room and run the same command again"
        ) from error
    for old in list_checkpoints(out)[:-max_ckpt_to_keep]:
        shutil.rmtree(out / f"checkpoint-{old}")


def choose_checkpoint(out, resume, settings):
    """Return the checkpoint to continue from, or None: --resume auto takes the last one in `out`, if there is one.

    Every file of it must be the one that was saved, and the run that saved it must have had the same settings.
    """
    if resume == "never":
        return None
    steps = list_checkpoints(out)
    path = Path(resume)
    if resume == "auto":
        if not steps:
            return None
        path = Path(out) / f"checkpoint-{steps[-1]}"
    elif path.resolve().parent != Path(out).resolve() or path.name not in {f"checkpoint-{step}" for step in steps}:
        there = ", ".join(f"checkpoint-{step}" for step in steps) or "none"
        raise ValueError(f"--resume {resume}: not a checkpoint in --output_dir {out}, which has: {there}")
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        files, then = manifest["files"], manifest["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"--resume: {path}/manifest.json is missing or damaged: remove this checkpoint") from None
    torn = [name for name, digest in files.items() if not (path / name).exists() or file_sha256(path / name) != digest]
    if torn:
        raise ValueError(
            f"--resume: {path} is damaged: {', '.join(torn)} missing or changed since it was saved. Remove it to go on "
            "from the one before, or start over with --overwrite"
        )
    changed = [f"{k}: {then.get(k)!r} then, {settings[k]!r} now" for k in settings if settings[k] != then.get(k)]
    if changed:
        raise ValueError(
            f"--resume: {path} is from another configuration ({'; '.join(changed)}). Continue with the old flags, or "
            "start over: --overwrite, or another --output_dir"
        )
    return path


def load_checkpoint(path, policies, optimizers):
    """Load what save_checkpoint wrote into the policies and optimizers, and return its state."""
    states = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
    for role, optimizer in optimizers.items():
        tensors = load_file(path / f"{role}.safetensors")
        for name, p in policies.parameters(role).items():
            p.data.copy_(tensors[name])
        optimizer.load_state_dict(states[role])
    return json.loads((path / "state.json").read_text(encoding="utf-8"))


def open_writers(out, first, flags, wandb_project, wandb_run_name):
    """Return a function that sends a record of log.jsonl to TensorBoard and, where asked for, to wandb."""
    from torch.utils.tensorboard import SummaryWriter

    board = SummaryWriter(str(out / "tensorboard"), purge_step=first)
    run = None
    if wandb_project:
        import wandb

        run = wandb.init(project=wandb_project, name=wandb_run_name or None, config=flags)

    def write(record):
        for name, value in record.items():
            if value is not None:
                board.add_scalar(name, value, record["training/global_step"])
        board.flush()
        if run:
            run.log(record, step=record["training/global_step"])

    return write


def plot_metrics(records, folder):
    """Draw reward.png, kl.png, length.png, value.png and time.png from the records of log.jsonl."""
    from matplotlib.figure import Figure

    folder.mkdir(exist_ok=True)
    names = {name for record in records for name in record}
    validation = sorted(name for name in names if name.startswith("val-") and name.endswith("mean@1"))
    phases = sorted(name for name in names if name.startswith("timing_s/") and name != "timing_s/step")
    charts = {
        "reward": ("reward", ["critic/score/mean", *validation]),
        "kl": ("KL, nats a token", ["actor/ppo_kl", "actor/reward_kl_penalty", "actor/kl_loss"]),
        "length": ("response length, tokens", ["response_length/mean", "response_length/max"]),
        "value": ("critic", ["critic/vf_explained_var", "critic/vf_loss"]),
        "time": ("seconds a step", phases),
    }
    for chart, (title, wanted) in charts.items():
        lines = {n: [(r["training/global_step"], r[n]) for r in records if r.get(n) is not None] for n in wanted}
        lines = {name: points for name, points in lines.items() if points}
        if not lines:
            continue
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        if chart == "time":
            steps = [r["training/global_step"] for r in records if "timing_s/step" in r]
            rows = [[r.get(name, 0.0) for r in records if "timing_s/step" in r] for name in lines]
            axes.stackplot(steps, rows, labels=[name.removeprefix("timing_s/") for name in lines])
        else:
            for name, points in lines.items():
                if points in [lines[other] for other in list(lines)[: list(lines).index(name)]]:
                    continue  # --reward strict is drawn once
                axes.plot(*zip(*points, strict=True), label=name, marker="o" if name.startswith("val-") else None)
        axes.set(title=title, xlabel="step")
        axes.legend(fontsize="small", **({"loc": "center left", "bbox_to_anchor": (1, 0.5)} if chart == "time" else {}))
        axes.grid(alpha=0.3)
        figure.savefig(folder / f"{chart}.png.incomplete", dpi=110, format="png")
        (folder / f"{chart}.png.incomplete").rename(folder / f"{chart}.png")


class Stopwatch:
    """Notes the seconds of each phase: `with clock("gen"): ...`; on a GPU it waits for what was started."""

    def __init__(self, device):
        self.device, self.seconds = device, {}

    @contextlib.contextmanager
    def __call__(self, name):
        started = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[f"timing_s/{name}"] = time.perf_counter() - started


def spread(name, x):
    """Return {name/mean, name/max, name/min} of a tensor."""
    x = x.float()
    return {f"{name}/mean": x.mean().item(), f"{name}/max": x.max().item(), f"{name}/min": x.min().item()}


def lr_share(kind, step, total_steps):
    """Return the share of the first learning rate that step `step` (from 1) has: falling to 0, or constant."""
    done = (step - 1) / total_steps
    return {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0}[kind]


def batch_metrics(batch, scores, token_rewards, rollout_logprobs, max_response_length):
    """Return what the step's samples were like, over the global batch, under verl's names."""
    mask, lengths = batch["mask"], batch["mask"].sum(-1)
    diff = (rollout_logprobs.exp() - batch["old_logprobs"].exp()).abs()[mask]
    metrics = {
        **spread("critic/score", scores),
        **spread("critic/rewards", token_rewards.sum(-1)),
        **spread("critic/advantages", batch["advantages"][mask]),
        **spread("critic/returns", batch["returns"][mask]),
        **spread("response_length", lengths),
        "response_length/clip_ratio": (lengths == max_response_length).float().mean().item(),
        **spread("prompt_length", torch.tensor([len(p) for p in batch["prompts"]])),
        "training/rollout_probs_diff_mean": diff.mean().item(),
        "training/rollout_probs_diff_max": diff.max().item(),
    }
    if "values" in batch:
        metrics |= spread("critic/values", batch["values"][mask])
        metrics["critic/vf_explained_var"] = explained_variance(batch["values"], batch["returns"], mask)
    return metrics


def perf_metrics(policies, lengths, clock, world_size, ppo_epochs):
    """Return speed and memory of a step: `lengths` are the tokens of each sequence of the global batch."""
    seconds, tokens = clock.seconds["timing_s/step"], sum(lengths)
    gpu = policies.device.type == "cuda"
    metrics = {
        "perf/total_num_tokens": tokens,
        "perf/time_per_step": seconds,
        "perf/throughput": tokens / seconds / world_size,
        "perf/cpu_memory_used_gb": peak_rss() / 2**30,
    }
    if gpu:
        metrics["perf/max_memory_allocated_gb"] = torch.cuda.max_memory_allocated() / 2**30
        metrics["perf/max_memory_reserved_gb"] = torch.cuda.max_memory_reserved() / 2**30
    peak = next((flops for name, flops in PEAK_FLOPS.items() if gpu and name in torch.cuda.get_device_name()), None)
    if peak and "timing_s/update_actor" in clock.seconds:
        base = policies.base(policies.models["actor"])
        weights = sum(p.numel() for n, p in base.named_parameters() if "embed" not in n and "lora_" not in n)
        config = base.config.get_text_config()
        # forward and backward: 6 operations a weight and token, 4 where the weights themselves get no gradient
        flops = (4 if policies.peft else 6) * weights * tokens
        flops += 6 * config.num_hidden_layers * config.hidden_size * sum(n * n for n in lengths)  # causal attention
        metrics["perf/mfu/actor"] = ppo_epochs * flops / clock.seconds["timing_s/update_actor"] / peak / world_size
    return metrics


def peak_rss():
    """Return the most memory that this process has had so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def check_flags(flags):
    """Refuse flags that cannot be, or that contradict each other."""
    at_least = {
        0: "kl_coef kl_loss_coef entropy_coeff critic_warmup actor_lr critic_lr weight_decay max_grad_norm lora_r"
    }
    at_least[0] += " top_k total_training_steps test_freq save_freq seed clip_ratio_low clip_ratio_high gamma lam"
    at_least[1] = "train_batch_size max_prompt_length max_response_length rollout_n rollout_batch_size lora_alpha"
    at_least[1] += " ppo_mini_batch_size ppo_epochs ppo_max_tokens max_ckpt_to_keep kl_horizon"
    for least, names in at_least.items():
        for name in names.split():
            if not least <= flags[name] < math.inf:
                raise ValueError(f"--{name} must be at least {least}, got {flags[name]}")
    for name in ("temperature", "total_epochs", "target_kl", "cliprange_value"):
        if not 0 < flags[name] < math.inf:
            raise ValueError(f"--{name} must be above 0, got {flags[name]}")
    for name in ("gamma", "lam"):
        if flags[name] > 1:
            raise ValueError(f"--{name} must be at most 1, got {flags[name]}")
    if not 0 < flags["top_p"] <= 1 or not 1 < flags["clip_ratio_c"] < math.inf or flags["seed"] >= 2**32:
        raise ValueError("--top_p must be in (0, 1], --clip_ratio_c above 1, --seed below 2**32")
    choices = {
        "adv_estimator": ("gae", "grpo", "rloo", "reinforce_plus_plus"),
        "kl_penalty_type": KL_TYPES,
        "kl_loss_type": KL_TYPES[1:],
        "kl_ctrl": ("fixed", "adaptive"),
        "lr_scheduler_type": ("linear", "cosine", "constant"),
        "loss_agg_mode": LOSS_AGG_MODES,
    }
    for name, known in choices.items():
        if flags[name] not in known:
            raise ValueError(f"--{name} {flags[name]}: one of {', '.join(known)}")
    if flags["train_batch_size"] % flags["ppo_mini_batch_size"]:
        raise ValueError(
            f"--train_batch_size {flags['train_batch_size']} must be a multiple of --ppo_mini_batch_size "
            f"{flags['ppo_mini_batch_size']}: the batch is split into equal mini-batches"
        )
    if flags["adv_estimator"] in ("grpo", "rloo") and flags["rollout_n"] < 2:
        raise ValueError(
            f"--adv_estimator {flags['adv_estimator']} compares responses to one prompt: --rollout_n 2 or more"
        )
    if flags["critic_warmup"] and flags["adv_estimator"] != "gae":
        raise ValueError(f"--critic_warmup: --adv_estimator {flags['adv_estimator']} has no critic")
    defaults = inspect.signature(train_ppo).parameters
    if flags["lora_weights"] or not flags["base_model"]:
        for name in ["lora_alpha", "lora_target_modules", "use_rslora"] + ["lora_r"] * bool(flags["lora_r"]):
            if flags[name] != defaults[name].default:
                raise ValueError(
                    f"--{name} {flags[name]}: the adapter that training starts from has its own; leave it out"
                )
    if flags["kl_ctrl"] == "adaptive" and not flags["kl_coef"]:
        raise ValueError("--kl_ctrl adaptive starts from --kl_coef, which is 0")
    if (flags["top_k"] or flags["top_p"] < 1) and (flags["kl_coef"] or flags["kl_loss_coef"]):
        raise ValueError(
            "--top_k and --top_p with a KL: a token that the reference leaves out would have an infinite one. Set "
            "--kl_coef 0 and --kl_loss_coef 0, or sample from all tokens"
        )
    if flags["load_in_8bit"] and flags["load_in_4bit"]:
        raise ValueError("--load_in_8bit and --load_in_4bit: give one of them")
    if not flags["lora_r"] and (flags["load_in_8bit"] or flags["load_in_4bit"]):
        raise ValueError("--lora_r 0 trains all weights, which cannot be quantized: take --load_in_8bit or 4bit away")
    if flags["val_files"] and not flags["test_freq"]:
        raise ValueError(f"--val_files {flags['val_files']}: --test_freq 0 never uses them")
    if flags["overwrite"] and flags["resume"] not in ("auto", "never"):
        raise ValueError("--overwrite starts over and --resume PATH goes on: give one of them")
    if flags["wandb_project"] and not importlib.util.find_spec("wandb"):
        raise ValueError(f"--wandb_project {flags['wandb_project']}: the package is not installed: pip install wandb")


def train_ppo(
    *,
    base_model: str = "",
    lora_weights: str = "",
    train_files: str = "",
    val_files: str = "",
    output_dir: str = "out/ppo_gsm8k",
    prompt_template: str = "",
    # data and rollouts
    train_batch_size: int = 128,
    rollout_n: int = 1,
    max_prompt_length: int = 512,
    max_response_length: int = 512,
    filter_overlong_prompts: bool = True,
    temperature: float = 0.6,
    top_k: int = 0,
    top_p: float = 1.0,
    # reward and advantages
    reward: str = "strict",
    adv_estimator: str = "gae",
    gamma: float = 1.0,
    lam: float = 1.0,
    norm_adv_by_std_in_grpo: bool = True,
    kl_coef: float = 0.001,
    kl_penalty_type: str = "k1",
    kl_ctrl: str = "fixed",
    target_kl: float = 0.1,
    kl_horizon: int = 10000,
    # update
    ppo_mini_batch_size: int = 32,
    ppo_epochs: int = 1,
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.2,
    clip_ratio_c: float = 3.0,
    cliprange_value: float = 0.5,
    loss_agg_mode: str = "token-mean",
    entropy_coeff: float = 0.0,
    kl_loss_coef: float = 0.0,
    kl_loss_type: str = "low_var_kl",
    critic_warmup: int = 0,
    actor_lr: float = 0.0,
    critic_lr: float = 0.0,
    lr_scheduler_type: str = "linear",
    weight_decay: float = 0.01,
    max_grad_norm: float = 1.0,
    # adapters
    lora_r: int = 16,
    lora_alpha: int = 32,
    lora_target_modules: str = "all-linear",
    use_rslora: bool = False,
    # memory and speed
    dtype: str = "auto",
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
    ppo_max_tokens: int = 16384,
    activation_checkpointing: bool = False,
    rollout_batch_size: int = 256,
    cuda_graph: bool = True,
    # run
    total_epochs: float = 6.0,
    total_training_steps: int = 0,
    val_before_train: bool = True,
    test_freq: int = 10,
    save_freq: int = 1,
    max_ckpt_to_keep: int = 2,
    resume: str = "auto",
    overwrite: bool = False,
    seed: int = 42,
    wandb_project: str = "",
    wandb_run_name: str = "",
):
    """Train a policy with PPO on problems whose answers a function can check.

    Without any flag it goes on from what `python finetune.py` made of the embedded tiny model, on the embedded
    problems, in minutes on a laptop CPU.

    Args:
        base_model: hub id or folder of the model.
        lora_weights: folder of a LoRA adapter. Empty: the base model alone.
        train_files: data file, folder or hub id with verl's rows (data/gsm8k.py) or question and answer.
        val_files: the same, to validate on. Empty: no validation, but for the embedded problems.
        output_dir: where everything of this run is written.
        prompt_template: chat template: a name of templates/ or a .jinja file. Empty: what the model carries, or alpaca.
        train_batch_size: prompts of a step, over all ranks.
        rollout_n: responses sampled to each prompt.
        max_prompt_length: longest prompt, in tokens.
        max_response_length: longest response, in tokens; what is not finished by then is cut, and counted.
        filter_overlong_prompts: leave longer prompts out, and count them; otherwise they are an error.
        temperature: of sampling; log-probabilities are those at this temperature. Validation is greedy.
        top_k: sample among so many likeliest tokens; 0 for all.
        top_p: sample among the likeliest tokens that together have this probability; 1 for all.
        reward: strict or flexible, as verl scores GSM8K, or path/to/file.py:function with verl's arguments.
        adv_estimator: gae, with a critic; or grpo, rloo, reinforce_plus_plus, without one.
        gamma: discount of later rewards.
        lam: lambda of generalized advantage estimation; 1 for no bias, less for less variance.
        norm_adv_by_std_in_grpo: divide GRPO's advantages by their group's standard deviation.
        kl_coef: weight of the KL to the starting policy that is taken off each token's reward; 0 for none.
        kl_penalty_type: estimate of that KL: k1, k2, k3 or low_var_kl, which is k3.
        kl_ctrl: fixed, or adaptive, which steers kl_coef towards --target_kl.
        target_kl: KL that --kl_ctrl adaptive aims at, in nats a token.
        kl_horizon: responses after which --kl_ctrl adaptive has moved kl_coef by its error.
        ppo_mini_batch_size: prompts of an optimizer step, over all ranks.
        ppo_epochs: times that a batch is learned from.
        clip_ratio_low: the probability ratio is clipped at 1 minus this.
        clip_ratio_high: the probability ratio is clipped at 1 plus this.
        clip_ratio_c: limit of the ratio where the advantage is negative (dual clip).
        cliprange_value: furthest that a value's update counts.
        loss_agg_mode: token-mean, seq-mean-token-sum, seq-mean-token-mean or seq-mean-token-sum-norm.
        entropy_coeff: weight of an entropy bonus; 0 for none.
        kl_loss_coef: weight of the KL to the starting policy as a loss; 0 for none.
        kl_loss_type: estimate of that KL: k2, k3 or low_var_kl, which is k3 (the gradient of k1 is 0 on average).
        critic_warmup: steps in which only the critic learns.
        actor_lr: first learning rate of the actor; 0 for one that fits the model's family and hidden size.
        critic_lr: the same, of the critic.
        lr_scheduler_type: linear or cosine, both down to 0 over the run, or constant.
        weight_decay: of AdamW, decoupled.
        max_grad_norm: the gradient's norm is clipped to this; 0 for no clipping.
        lora_r: rank of the adapter matrices; 0 trains all weights, with a model each for actor, critic and reference.
        lora_alpha: the adapter is scaled by lora_alpha / lora_r, or lora_alpha / sqrt(lora_r) with --use_rslora.
        lora_target_modules: layers that get an adapter, as q_proj,v_proj; all-linear for all but the output layer.
        use_rslora: rank-stabilized scaling (arXiv:2312.03732).
        dtype: of the base weights: auto (bfloat16 on a GPU that has it, else float32), bfloat16, float16 or float32.
        load_in_8bit: quantize the base to int8 with bitsandbytes.
        load_in_4bit: quantize the base to NF4 with bitsandbytes (QLoRA).
        ppo_max_tokens: tokens that one device processes at a time in forward and backward passes.
        activation_checkpointing: recompute activations in the backward pass: less memory, about a third slower.
        rollout_batch_size: sequences that one device decodes at a time.
        cuda_graph: on a GPU, decode with captured CUDA graphs; with --load_in_8bit that is not possible, and not done.
        total_epochs: passes over the training rows.
        total_training_steps: stop after so many steps; 0 for --total_epochs.
        val_before_train: validate before the first step, too.
        test_freq: validate every so many steps and at the end; 0 for never.
        save_freq: write a checkpoint every so many steps and at the end; 0 for the end alone.
        max_ckpt_to_keep: how many checkpoints stay.
        resume: auto for the last checkpoint in --output_dir if there is one, never, or a checkpoint's folder.
        overwrite: replace what an earlier run left in --output_dir.
        seed: of everything random.
        wandb_project: log to this Weights & Biases project. Empty: do not.
        wandb_run_name: name of the run there.
    """
    flags = dict(locals())
    quiet_libraries()

    # 1. check flags
    check_flags(flags)
    reward_fn = load_reward(reward)
    out, rank, world_size = Path(output_dir), int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not base_model:
        base_model, lora_weights = "data/tiny/model", lora_weights or "out/finetune/adapter"
        if not (Path(lora_weights) / "adapter_config.json").exists():
            raise ValueError(
                f"there is no fine-tuned model in {lora_weights} to start from: run `python finetune.py` first, a "
                "minute or two, or give --base_model"
            )
    base, base_dtype = find_base(base_model), pick_dtype(dtype)
    if base_dtype == torch.float16:
        raise ValueError("--dtype float16: small gradients would be rounded to 0: use bfloat16 or float32")
    config = load_config(base)
    limit_threads(config)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    actor_lr = actor_lr or default_learning_rate(config) / 20
    critic_lr = critic_lr or default_learning_rate(config) / 4

    # 2. problems
    carries = lora_weights and (Path(lora_weights) / "tokenizer_config.json").exists()
    tokenizer = load_tokenizer(lora_weights if carries else base)
    template, _ = use_template(tokenizer, prompt_template)
    train_files, val_files = train_files or TINY[0], val_files or ("" if train_files else TINY[1])
    train_set, overlong = read_problems(train_files, "train", tokenizer, max_prompt_length, filter_overlong_prompts)
    val_set, val_overlong = [], 0
    if val_files and test_freq:
        val_set, val_overlong = read_problems(val_files, "test", tokenizer, max_prompt_length, filter_overlong_prompts)
    odd = [problem for problem in train_set + val_set if type(problem["ground_truth"]) is not str]
    if odd and ":" not in reward:
        raise ValueError(
            f"{odd[0]['where']()}: --reward {reward} compares texts, and the ground truth is {odd[0]['ground_truth']!r}"
        )
    longest = max(len(problem["prompt"]) for problem in train_set + val_set)
    context, vocab_size = getattr(config, "max_position_embeddings", None), max(tokenizer.get_vocab().values()) + 1
    if context and longest + max_response_length > context:
        raise ValueError(
            f"--max_response_length {max_response_length}: with the longest prompt, {longest} tokens, that is more "
            f"than the {context} positions of the model: shorten it, or --max_prompt_length"
        )
    if vocab_size > config.vocab_size:
        raise ValueError(
            f"--base_model {base_model}: its tokenizer has ids beyond the {config.vocab_size} of the model"
        )
    total_steps = total_training_steps or max(1, int(total_epochs * len(train_set) / train_batch_size))

    # 3. what an earlier run left
    theirs = [p for p in out.glob("*") if p.name in WRITTEN or p.name.startswith("checkpoint-")]
    settings = {name: value for name, value in flags.items() if name not in NOT_OF_THE_RESULT}
    data = json.dumps([[problem["prompt"], problem["ground_truth"]] for problem in train_set])
    settings |= {"data_sha256": hashlib.sha256(data.encode()).hexdigest()}
    settings["lora_target_modules"] = re.findall(r"[\w.-]+", lora_target_modules)
    if lr_scheduler_type != "constant":
        settings["total_steps"] = total_steps  # the schedule's length
    for name, file in {"lora_sha256": "adapter_model.safetensors", "lora_config_sha256": "adapter_config.json"}.items():
        path = Path(lora_weights) / file
        settings[name] = file_sha256(path) if lora_weights and path.exists() else ""
    settings["reward_sha256"] = file_sha256(find_path(reward.rpartition(":")[0])) if ":" in reward else ""
    resumed = None if overwrite else choose_checkpoint(out, resume, settings)
    # a finished run whose checkpoints are gone cannot be continued, and is not to be lost
    if not overwrite and not resumed and (resume == "never" and theirs or any((out / n).exists() for n in DONE)):
        raise ValueError(
            f"--output_dir {output_dir} holds another run: continue it with --resume auto, replace it "
            "with --overwrite, or choose another folder"
        )

    # 4. processes, model, optimizers
    if on_gpu:
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    say = functools.partial(print, flush=True) if rank == 0 else lambda *args: None
    set_seed(seed)
    use_critic, use_reference = adv_estimator == "gae", bool(kl_coef or kl_loss_coef)
    roles = ["actor"] + ["critic"] * use_critic + ["reference"] * use_reference
    roles += ["rollout"] * (base_dtype != torch.float32)
    lora = {"r": lora_r, "lora_alpha": lora_alpha, "use_rslora": use_rslora}
    policies = load_policies(
        base,
        base_dtype,
        device,
        roles,
        lora_weights,
        lora,
        re.findall(r"[\w.-]+", lora_target_modules),
        (load_in_8bit, load_in_4bit),
        activation_checkpointing,
    )
    stops = stop_ids(policies, tokenizer, lora_weights)
    if not stops:
        raise ValueError(
            f"--base_model {base_model}: neither tokenizer, generation config nor chat template names an end token, so "
            "no response would ever end: set eos_token in its tokenizer_config.json"
        )
    policies.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=tokenizer.pad_token_id)
    to_logits = functools.partial(
        sampled_logits, temperature=temperature, vocab_size=vocab_size, top_k=top_k, top_p=top_p
    )
    rollout = Rollout(
        policies,
        to_logits,
        stops,
        max_tokens=longest + max_response_length,
        max_rows=min(rollout_batch_size, math.ceil(max(train_batch_size * rollout_n, len(val_set)) / world_size)),
        prefill_tokens=ppo_max_tokens,
        cuda_graph=cuda_graph and on_gpu and not load_in_8bit,  # int8 looks for outliers, and the host waits for them
    )
    policies.sync_rollout()
    check_forward(policies, rollout, to_logits, vocab_size)
    optimizers = {"actor": make_optimizer(policies, "actor", actor_lr, weight_decay)}
    if use_critic:
        optimizers["critic"] = make_optimizer(policies, "critic", critic_lr, weight_decay)
    controller = FixedKLController(kl_coef)
    if kl_ctrl == "adaptive":
        controller = AdaptiveKLController(kl_coef, target_kl, kl_horizon)
    first = 1
    if resumed:
        state = load_checkpoint(resumed, policies, optimizers)
        first, controller.value = state["global_step"] + 1, state["kl_coef"]

    # 5. say what will happen
    log_path, writer, run = out / "log.jsonl", None, {}
    if rank == 0:
        for path in theirs if overwrite else []:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (out / "val_generations").mkdir(parents=True, exist_ok=True)
        for later in [step for step in list_checkpoints(out) if resumed and step >= first]:
            shutil.rmtree(out / f"checkpoint-{later}")  # of the run that --resume PATH leaves behind
        write_lines(log_path, [r for r in read_log(log_path) if resumed and r["training/global_step"] < first])
        writer = open_writers(out, first, flags, wandb_project, wandb_run_name)
    where = torch.cuda.get_device_name() if on_gpu else "cpu"
    num_all = sum(p.numel() for p in policies.models["actor"].parameters())
    trainable = {role: sum(p.numel() for p in policies.parameters(role).values()) for role in optimizers}
    per_step = train_batch_size * rollout_n
    say(f"ppo_gsm8k.py  {base_model} + {lora_weights or 'no adapter'} -> {output_dir}")
    say(f"  on          {world_size} x {where}, {str(base_dtype).removeprefix('torch.')}, torch {torch.__version__}")
    say(
        f"  data        {train_files}: {len(train_set):,} prompts, {len(val_set):,} to validate on; template "
        f"{template}; {overlong + val_overlong:,} left out, longer than --max_prompt_length {max_prompt_length}"
    )
    say(
        f"  batch       {per_step} = {train_batch_size} prompts x {rollout_n}, on {world_size} ranks; "
        f"{train_batch_size // ppo_mini_batch_size} mini-batches x {ppo_epochs} epochs"
    )
    say(f"  steps       {total_steps} = {total_steps * train_batch_size / len(train_set):.3g} epochs")
    say(f"  trained     {', '.join(f'{role} {n:,}' for role, n in trainable.items())} of {num_all:,} parameters")
    if policies.peft:
        shape, whose = policies.models["actor"].peft_config["default"], f"of {lora_weights}" if lora_weights else "new"
        say(f"  adapters    {whose}: rank {shape.r}, alpha {shape.lora_alpha}")
    say(f"  rates       actor {actor_lr:.2e}" + (f", critic {critic_lr:.2e}" if use_critic else ""))
    if resumed:
        say(f"  resume      {resumed}")
    run = {"status": "running", "flags": flags, "argv": sys.argv, **provenance(), "device": f"{world_size} x {where}"}
    run |= {"template": template, "counts": {"train": len(train_set), "val": len(val_set)}}
    run["counts"] |= {"overlong": overlong + val_overlong, "parameters": num_all, "trainable": trainable}
    if rank == 0:
        write_json(out / "run.json", run)

    def actor_loss(micro, **counts):
        """Return a micro-batch's share of the actor's loss, and its metrics."""
        mask, counts = micro["mask"], counts | {"horizon": max_response_length}
        logprobs, entropy = policies.logprobs("actor", micro["packed"], to_logits, with_entropy=entropy_coeff != 0)
        logprobs = unflatten(logprobs, mask)
        loss, clipfrac, ppo_kl, clipfrac_lower = compute_policy_loss(
            micro["old_logprobs"],
            logprobs,
            micro["advantages"],
            mask,
            clip_ratio_low,
            clip_ratio_high,
            clip_ratio_c,
            loss_agg_mode,
            **counts,
        )
        metrics = {"pg_loss": loss, "pg_clipfrac": clipfrac, "pg_clipfrac_lower": clipfrac_lower, "ppo_kl": ppo_kl}
        metrics["ratio_diff"] = masked_mean(((logprobs - micro["old_logprobs"]).exp() - 1).abs(), mask)
        if entropy_coeff:
            loss = loss - entropy_coeff * agg_loss(unflatten(entropy, mask), mask, loss_agg_mode, **counts)
        if kl_loss_coef:
            kl = kl_penalty(logprobs, micro["ref_logprobs"], kl_loss_type)
            metrics["kl_loss"] = agg_loss(kl, mask, loss_agg_mode, **counts)
            loss = loss + kl_loss_coef * metrics["kl_loss"]
        return loss, metrics

    def critic_loss(micro, **counts):
        """Return a micro-batch's share of the critic's loss, and its metrics."""
        mask = micro["mask"]
        values = unflatten(policies.values(micro["packed"]), mask)
        loss, clipfrac = compute_value_loss(
            values, micro["values"], micro["returns"], mask, cliprange_value, num_tokens=counts["num_tokens"]
        )
        return loss, {"vf_loss": loss, "vf_clipfrac": clipfrac, "vpred_mean": masked_mean(values, mask)}

    def validation(step):
        """Validate, write the generations, and return the metrics."""
        metrics, rows = validate(rollout, val_set, reward_fn, reward, tokenizer, max_response_length, rank, world_size)
        if rank == 0:
            write_lines(out / "val_generations" / f"step-{step:05d}.jsonl", rows)
        shown = [name for name in metrics if name.endswith("mean@1") and f"/{reward}/" not in name]  # that is val-core
        found = ", ".join(f"{name} {metrics[name]:.1%}" for name in shown)
        say(f"step {step:05d}/{total_steps:05d} | {found}")
        return metrics

    def log(record):
        """Append a record to log.jsonl and to TensorBoard; a number that is not finite is null there."""
        if rank == 0:
            record = {name: value if math.isfinite(value) else None for name, value in record.items()}
            with open(log_path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            writer(record)

    # 6. train
    rates = {"actor": actor_lr, "critic": critic_lr}
    save_seconds, stuck = {}, dict.fromkeys(optimizers, 0)
    try:
        if first == 1 and val_set and val_before_train:
            policies.sync_rollout()
            log({"training/global_step": 0, "training/epoch": 0.0} | validation(0))
        for step in range(first, total_steps + 1):
            clock, started = Stopwatch(device), time.perf_counter()
            set_seed(int(np.random.default_rng([seed, 1, step]).integers(2**32)))  # for a user's reward function

            # 6.1 a batch of problems, rollout_n times each, dealt out to the ranks
            picked = rows_of_step(step, len(train_set), train_batch_size, seed)
            problems = [train_set[i] for i in picked for _ in range(rollout_n)]
            mine = np.array_split(np.arange(per_step), world_size)[rank].tolist()

            # 6.2 responses
            policies.sync_rollout()
            uniforms = np.random.default_rng([seed, 2, step]).random((per_step, max_response_length), np.float32)
            with clock("gen"):
                made = rollout.generate([problems[i]["prompt"] for i in mine], max_response_length, uniforms[mine])

            # 6.3 rewards; from here on every rank knows the whole batch
            with clock("reward"):
                texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in made[0]]
                scores = [score_response(reward_fn, problems[i], text) for i, text in zip(mine, texts, strict=True)]
            rows = gather_rows(dict(zip(mine, zip(*made, scores, strict=True), strict=True)), per_step)
            responses, rollout_logprobs, scores = (list(column) for column in zip(*rows, strict=True))
            (rollout_logprobs, mask), scores = pad_rows(rollout_logprobs), torch.tensor(scores)
            batch = {"prompts": [problem["prompt"] for problem in problems], "responses": responses, "mask": mask}
            lengths = [len(p) + len(r) for p, r in zip(batch["prompts"], responses, strict=True)]
            plan = plan_batches(lengths, ppo_mini_batch_size * rollout_n, ppo_max_tokens, rank, world_size)

            # 6.4 log-probabilities and values before the update
            with clock("old_log_prob"):
                batch["old_logprobs"], entropy = forward_all(
                    batch, plan, device, lambda micro: policies.logprobs("actor", micro["packed"], to_logits, True)
                )
            if use_reference:
                with clock("ref"):
                    (batch["ref_logprobs"],) = forward_all(
                        batch,
                        plan,
                        device,
                        lambda micro: policies.logprobs("reference", micro["packed"], to_logits)[:1],
                    )
            if use_critic:
                with clock("values"):
                    (batch["values"],) = forward_all(
                        batch, plan, device, lambda micro: [policies.values(micro["packed"])]
                    )

            # 6.5 token-level rewards and advantages, over the global batch
            metrics = {}
            with clock("adv"):
                token_rewards = torch.zeros(mask.shape)
                token_rewards[torch.arange(per_step), mask.sum(-1) - 1] = scores
                if kl_coef:
                    kl = kl_penalty(batch["old_logprobs"], batch["ref_logprobs"], kl_penalty_type) * mask
                    token_rewards -= controller.value * kl
                    current_kl = (kl.sum(-1) / mask.sum(-1)).mean().item()
                    metrics["actor/reward_kl_penalty"] = current_kl
                    metrics["actor/reward_kl_penalty_coeff"] = controller.value
                    controller.update(current_kl, per_step)
                if adv_estimator == "gae":
                    advantages, returns = compute_gae(token_rewards, batch["values"], mask, gamma, lam)
                    advantages = masked_whiten(advantages, mask) * mask
                elif adv_estimator == "reinforce_plus_plus":
                    advantages, returns = compute_reinforce_plus_plus_advantage(token_rewards, mask, gamma)
                else:
                    group = torch.arange(per_step) // rollout_n
                    advantages, returns = compute_group_advantage(
                        token_rewards, mask, group, adv_estimator, norm_adv_by_std_in_grpo
                    )
                batch |= {"advantages": advantages, "returns": returns}

            # 6.6 updates
            losses = {"critic": critic_loss} if use_critic else {}
            losses |= {"actor": actor_loss} if step > critic_warmup else {}
            for role, micro_loss in losses.items():
                optimizers[role].param_groups[0]["lr"] = rates[role] * lr_share(lr_scheduler_type, step, total_steps)
                with clock(f"update_{role}"):
                    policies.use(role)
                    found = update(
                        policies.parameters(role), optimizers[role], batch, plan, ppo_epochs, max_grad_norm, micro_loss
                    )
                stuck[role] = stuck[role] + 1 if found["skipped_updates"] == ppo_epochs * len(plan) else 0
                if stuck[role] == 3:
                    raise ValueError(
                        f"step {step}: three times in a row no mini-batch had a finite gradient. Checkpoints are "
                        "untouched; lower the learning rates"
                    )
                found["lr"] = optimizers[role].param_groups[0]["lr"]
                metrics |= {f"{role}/{name}": value for name, value in found.items()}

            # 6.7 validation, log, checkpoint
            if val_set and (step == total_steps or step % test_freq == 0):
                with clock("testing"):
                    policies.sync_rollout()
                    metrics |= validation(step)
            clock.seconds["timing_s/step"] = time.perf_counter() - started
            record = {"training/global_step": step, "training/epoch": step * train_batch_size / len(train_set)}
            record |= {"actor/entropy": masked_mean(entropy, mask).item()} | metrics
            record |= batch_metrics(batch, scores, token_rewards, rollout_logprobs, max_response_length)
            record |= perf_metrics(policies, lengths, clock, world_size, ppo_epochs) | clock.seconds | save_seconds
            log(record)
            say(
                f"step {step:05d}/{total_steps:05d} | score {record['critic/score/mean']:.3f} | "
                f"kl {record.get('actor/ppo_kl', math.nan):+.4f} | "
                f"ev {record.get('critic/vf_explained_var', math.nan):+.3f} | entropy {record['actor/entropy']:.3f} | "
                f"length {record['response_length/mean']:.0f}, cut {record['response_length/clip_ratio']:.1%} | "
                f"{record['perf/throughput']:,.0f} tok/s | {record['timing_s/step']:.1f} s"
            )
            if rank == 0 and (step == total_steps or save_freq and step % save_freq == 0):
                with clock("save_checkpoint"):
                    state = {"global_step": step, "kl_coef": controller.value}
                    save_checkpoint(out, state, policies, optimizers, settings, tokenizer, max_ckpt_to_keep)
                save_seconds = {"timing_s/save_checkpoint": clock.seconds["timing_s/save_checkpoint"]}
    except KeyboardInterrupt:
        if rank == 0:
            write_json(out / "run.json", run | {"status": "interrupted"})
        say("\ninterrupted; the same command goes on from the last checkpoint")
        raise SystemExit(130) from None

    # 7. the actor, plots, the summary
    target = out / ("adapter" if policies.peft else "model")
    records = read_log(log_path)
    if rank == 0:
        partial = target.with_name(f"{target.name}.incomplete")
        shutil.rmtree(partial, ignore_errors=True)
        export_policy(policies, tokenizer, partial, base_dtype)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        plot_metrics(records, out / "plots")
        tests = [r for r in records if any(name.startswith("val-core/") for name in r)]
        results = {name: [r[name] for r in (tests[0], tests[-1])] for name in (tests[0] if tests else {})}
        results = {name: values for name, values in results.items() if name.endswith("mean@1")}
        run |= {"status": "finished", "steps": total_steps, "results": results}
        write_json(out / "run.json", run)
        for name, (before, after) in results.items():
            say(f"  {name}: {before:.1%} -> {after:.1%}")
        say(f"wrote {target}, {out}/plots, {out}/val_generations, {log_path}")
        with_adapter = (
            f"--base_model {base_model} --lora_weights {target}" if policies.peft else f"--base_model {target}"
        )
        say(f"Next: python generate.py {with_adapter} --data_path {val_files or train_files} --score gsm8k_strict")
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()
    return {"run": run, "records": records, "target": str(target)}


if __name__ == "__main__":
    run_cli(train_ppo)
