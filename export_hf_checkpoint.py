"""
Merge a LoRA adapter into its base model and write a Hugging Face checkpoint that every runtime reads.

    reads    --base_model    a folder or hub id with safetensors files
             --lora_weights  an adapter folder of finetune.py, or any PEFT LoRA adapter
    writes   --output_dir    model*.safetensors, config.json, generation_config.json, tokenizer files, README.md,
                             export.json (what was done, and the figures of the self-check), a Modelfile for Ollama
    then     python generate.py --base_model OUT, vllm serve OUT, transformers serve OUT, ollama create

    default  python export_hf_checkpoint.py         data/tiny/model with out/finetune/adapter, into out/export
    any      python export_hf_checkpoint.py --base_model Qwen/Qwen2.5-7B --lora_weights A --output_dir out/merged
    Ollama   python export_hf_checkpoint.py --gguf q8_0
    vLLM     python export_hf_checkpoint.py --quantize fp8

The model is never in memory. Each adapted tensor is read, merged in float32 by PEFT's own layer, rounded once and
written; every other tensor is copied as bytes. Then the written files are compared with base + adapter, again a tensor
at a time. The folder gets its name last.

Shapes in comments: B prompts, T tokens, V vocabulary.
"""

import copy
import ctypes
import errno
import functools
import json
import math
import os
import re
import shutil
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import get_type_hints

import fire
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import nn
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

HERE = Path(__file__).resolve().parent
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# the names of safetensors' headers
STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
STORED |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
STORED |= {"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
PIECE = 2**18  # elements worked on at a time: a megabyte of float32, which stays in a cache
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt")
TOKENIZER_FILES += ("*.tiktoken", "spiece.model", "chat_template.*", "additional_chat_templates/*")
TOKENIZER_FILES += ("*processor_config.json",)  # of a model that takes images
GGUF_NAMES = {"llama": "llama", "qwen2": "qwen2"}  # transformers' model type: llama.cpp's
# how byte-level tokenizers split text into words, by llama.cpp's names
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {
    name: "(?i:'s|'t|'re|'ve|'m|'ll|'d)|" + WORDS % n for name, n in (("llama-bpe", "{1,3}"), ("qwen2", ""))
}
OLLAMA = (
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "MixtralForCausalLM",
    "Phi3ForCausalLM",
    "Gemma2ForCausalLM",
)  # that it converts itself
# what --quantize may cost before the export counts as failed, in nats; measured figures are in docs/export.md
MAX_KL = {"": 1e-3, "fp8": 0.1, "int8": 0.1, "nf4": 0.5}

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


def find_base(base_model):
    """Return the folder or hub id to load --base_model from, once it can be one."""
    path = find_path(base_model)
    if path is None and not re.fullmatch(r"[\w.-]+/[\w.-]+", base_model):
        raise ValueError(f"--base_model {base_model}: no such folder, and not the name of a hub model (owner/name)")
    if path and not (path / "config.json").exists():
        what = "an adapter" if (path / "adapter_config.json").exists() else "no model"
        raise ValueError(f"--base_model {base_model}: {what} is in this folder (there is no config.json)")
    return str(path or base_model)


def load_tokenizer(base):
    """Return the tokenizer in a folder or hub id."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise ValueError(f"{base}: its tokenizer cannot be loaded: {error}") from error
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ValueError(f"{base}: its tokenizer is not of the tokenizers library, which this needs")
    return tokenizer


# -----------------------------------------------------------------------------
# checkpoints on disk, a tensor at a time


def keep_memory_low():
    """Make glibc return what large tensors took as soon as they are freed: it would keep up to 32 MB pieces."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-3, 2**22)  # M_MMAP_THRESHOLD: larger blocks go back to the system when they are freed
        mallopt(-1, 2**26)  # M_TRIM_THRESHOLD: smaller ones stay


def read_header(path):
    """Return {tensor: (first byte, bytes, dtype, shape)} of a safetensors file; ValueError if it is damaged."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length)) if 0 < length < size else None
            header.pop("__metadata__", None)
            entries = {
                name: (
                    8 + length + e["data_offsets"][0],
                    e["data_offsets"][1] - e["data_offsets"][0],
                    e["dtype"],
                    e["shape"],
                )
                for name, e in header.items()
            }
        except (ValueError, AttributeError, KeyError, TypeError):
            raise ValueError(f"{path} is damaged or cut short: it has no safetensors header: copy it again") from None
    end = max((start + count for start, count, *_ in entries.values()), default=8 + length)
    if end != size:
        raise ValueError(f"{path} is damaged: it has {size:,} bytes, its header tells of {end:,}: copy it again")
    unknown = sorted({dtype for *_, dtype, _ in entries.values()} - set(STORED))
    if unknown:
        raise ValueError(f"{path}: tensors of type {', '.join(unknown)} cannot be merged: take an unquantized model")
    return {n: (start, count, STORED[dtype], tuple(shape)) for n, (start, count, dtype, shape) in entries.items()}


def weight_files(folder, allow_pickle):
    """Return the weight files of a model folder: safetensors, or with `allow_pickle` PyTorch's own."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index, single = folder / f"{stem}.{suffix}.index.json", folder / f"{stem}.{suffix}"
        if not index.exists() and not single.exists():
            continue
        if suffix == "bin" and not allow_pickle:
            raise ValueError(
                f"{folder} has only pickle files ({stem}*.bin), which can run code when they are read. If you trust "
                "their author: --allow_pickle, which reads nothing but tensors from them"
            )
        if not index.exists():
            return [single]
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise ValueError(
                f"{folder}: of the {len(names)} weight files in {index.name}, {', '.join(missing)} missing"
            )
        return [folder / name for name in names]
    raise ValueError(f"{folder}: no weights there (model.safetensors, or model.safetensors.index.json and its files)")


@dataclass
class Part:
    """Parameters of the model, and the tensors on disk that they are made of: nearly always one of each."""

    names: list  # of the model
    sources: list  # on disk
    converter: object = None  # transformers' WeightConverter, where it reorders weights while loading (experts)
    patterns: tuple = ()  # of the converter, one a source


class Checkpoint:
    """A model folder, read a tensor at a time: what is on disk, and the parameters that the model makes of it.

    model    the language model with its parameters on the meta device, so without memory
    stored   {tensor: (file, first byte, bytes, dtype, shape)} on disk; for pickle files a tensor in place of the tuple
    parts    {parameter: Part}
    shapes   {parameter: torch.Size}
    tied     {parameter that has no tensor on disk: the one that it is}
    """

    def __init__(self, folder, allow_pickle=False):
        from accelerate import init_empty_weights

        self.folder, self.stored, self.replaced, self.memory = Path(folder), {}, {}, torch.empty(0)
        try:
            self.config = transformers.AutoConfig.from_pretrained(folder)
            auto = AutoModelForImageTextToText if "_vl" in self.config.model_type else AutoModelForCausalLM
            with init_empty_weights(include_buffers=False):
                self.model = auto.from_config(self.config, dtype=torch.float32).eval()
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{folder}: not a language model that transformers can load: {error}") from error
        for path in weight_files(self.folder, allow_pickle):
            if path.suffix == ".bin":
                self.stored |= torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            else:
                self.stored |= {name: (path, *entry) for name, entry in read_header(path).items()}
        self.find_parts()
        for name, buffer in self.model.named_buffers():
            if name in self.parts:
                buffer.copy_(self.fetch(name))

    def find_parts(self):
        """Match the tensors on disk with the model's parameters, by the rules that from_pretrained loads with."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        rules, state = get_model_conversion_mapping(self.model), self.model.state_dict()
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        found = {}
        for source in sorted(self.stored, key=dot_natural_key):
            name, pattern = rename_source_key(source, renamings, converters, self.model.base_model_prefix, state)
            if name in state:
                found.setdefault(name, []).append((source, pattern))
        self.model._weight_conversions = [rule for rule in rules if rule.was_used()]  # what writing back reverts
        self.parts, self.shapes = {}, {name: value.shape for name, value in state.items()}
        for name, pairs in found.items():
            sources, patterns = [source for source, _ in pairs], tuple(pattern for _, pattern in pairs)
            part = Part([name], sources)
            if patterns[0]:
                part.converter = next(rule for rule in converters if patterns[0] in rule.source_patterns)
                part.patterns = patterns
                part.names = list(self.convert(part, {s: torch.empty(self.shape(s), device="meta") for s in sources}))
            elif len(sources) > 1:
                raise ValueError(f"{self.folder}: {' and '.join(sources)} are both {name}")
            self.parts |= dict.fromkeys(part.names, part)
        self.tied = {}
        for target, source in self.model.all_tied_weights_keys.items():
            if target not in self.parts:
                self.tied[target] = source
            elif source not in self.parts:
                self.tied[source] = target
        missing = [name for name in state if self.tied.get(name, name) not in self.parts]
        if missing:
            raise ValueError(
                f"{self.folder}: {len(missing)} tensors of its configuration are not in its files: "
                f"{', '.join(missing[:3])}"
            )
        for name, part in self.parts.items():
            if not part.converter and part.sources[0] == name and self.shape(name) != tuple(state[name].shape):
                if self.stored_dtype(name) != torch.uint8:  # four-bit weights lie packed
                    raise ValueError(
                        f"{self.folder}: {name} has shape {list(self.shape(name))} in its file, "
                        f"{list(state[name].shape)} in config.json"
                    )

    def shape(self, source):
        entry = self.stored[source]
        return tuple(entry.shape) if isinstance(entry, torch.Tensor) else entry[4]

    def stored_dtype(self, source):
        entry = self.stored[source]
        return entry.dtype if isinstance(entry, torch.Tensor) else entry[3]

    def source_of(self, part):
        """Return the first of the tensors on disk that a part is made of."""
        name = self.tied.get(part.sources[0])
        return self.parts[name].sources[0] if name else part.sources[0]

    def chunks(self, source):
        """Yield the bytes of a tensor on disk in pieces, each valid until the next."""
        entry = self.stored[source]
        if isinstance(entry, torch.Tensor):
            yield tensor_bytes(entry)
            return
        path, offset, count, *_ = entry
        piece = memoryview(bytearray(2**20))
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            while count:
                got = file.readinto(piece[: min(count, len(piece))])
                count -= got
                yield piece[:got]

    def read(self, source, start=0, stop=None):
        """Return rows start:stop of a tensor on disk, in memory of its own."""
        entry = self.stored[source]
        if isinstance(entry, torch.Tensor):
            return (entry[start:stop] if entry.ndim else entry).clone()
        path, offset, count, dtype, shape = entry
        if shape and (start or stop is not None):
            row = count // shape[0]
            shape = (len(range(shape[0])[start:stop]), *shape[1:])
            offset, count = offset + start * row, shape[0] * row
        data = torch.empty(count, dtype=torch.uint8)
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            view = memoryview(data.numpy())
            while view:  # one call reads at most 2 GiB
                view = view[file.readinto(view) :]
        return data.view(dtype).reshape(shape)

    def convert(self, part, tensors):
        """Return {parameter: tensor} of a part whose tensors on disk (in the order of its sources) are converted."""
        converter = copy.deepcopy(part.converter)
        for (source, tensor), pattern in zip(tensors.items(), part.patterns, strict=True):
            converter.add_tensor(part.names[0], source, pattern, tensor)
        made = converter.convert(part.names[0], model=self.model, config=self.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def revert(self, part, tensors):
        """Return {tensor on disk: value} of a part's {parameter: tensor}: convert() backwards."""
        from transformers.core_model_loading import revert_weight_conversion

        if not part.converter:
            return {source: tensors[name] for source, name in zip(part.sources, part.names, strict=True)}
        made = revert_weight_conversion(self.model, tensors)
        if set(made) != set(part.sources):
            raise ValueError(f"{', '.join(part.names)}: transformers cannot write these back as {part.sources[0]}, ...")
        return {source: made[source] for source in part.sources}

    def values(self, part):
        """Return {parameter: float32 tensor} of a part; without a converter, valid until the next call.

        That memory is taken once: to get it from the system anew each time takes longer than the merge.
        """
        if part.converter:
            return self.convert(part, {source: self.read(source).float() for source in part.sources})
        shapes = [self.shapes[name] for name in part.names]
        total = sum(shape.numel() for shape in shapes)
        self.memory = self.memory if len(self.memory) >= total else torch.empty(total)
        flats, values = self.memory[:total].split([shape.numel() for shape in shapes]), {}
        for name, source, flat, shape in zip(part.names, part.sources, flats, shapes, strict=True):
            values[name] = flat.view(shape)
            for i, j in row_ranges(shape):
                values[name][i:j] = self.fetch(name, i, j) if name in self.replaced else self.before(source, i, j)
        return values

    def fetch(self, name, start=0, stop=None):
        """Return rows start:stop of a parameter of the model, in float32."""
        name = self.tied.get(name, name)
        if name in self.replaced:
            return self.replaced[name][start:stop].float()
        part = self.parts[name]
        if part.converter:
            return self.values(part)[name][start:stop]
        source = part.sources[part.names.index(name)]
        if f"{source}.quant_state.bitsandbytes__nf4" in self.stored:
            return self.fetch_nf4(source)[start:stop]
        rows = self.read(source, start, stop).float()
        return rows * self.read(f"{source}_scale", start, stop) if f"{source}_scale" in self.stored else rows

    def before(self, source, start, stop):
        """Return rows start:stop of a tensor as it was before the merge, on disk or tied to one there."""
        return (self.read if source in self.stored else self.fetch)(source, start, stop)

    def fetch_nf4(self, source):
        """Return a four-bit weight in float32."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        prefix = f"{source}."
        state = {name.removeprefix(prefix): self.read(name) for name in self.stored if name.startswith(prefix)}
        return dequantize_4bit(self.read(source), QuantState.from_dict(state, device="cpu")).float()


class ShardWriter:
    """Write tensors one after another into safetensors files of at most `limit` bytes, and their index.

    A header stands before its tensors, and their sizes are known only when they are made: room is kept for it, and
    filled up with spaces. Tensors of a size that is not a multiple of 8 bytes come last, so that the others are
    aligned.
    """

    def __init__(self, folder, limit, names):
        self.folder, self.limit, self.file = folder, limit, None
        self.room = 64 + -(-sum(len(json.dumps(name)) + 160 for name in names) // 8) * 8
        self.shards, self.late = [], []  # [{tensor: shard entry}]

    def add(self, name, dtype, shape, chunks):
        """Write one tensor, given as an iterable of its bytes in order."""
        count = math.prod(shape) * dtype.itemsize
        if self.file and self.at + count > self.limit:
            self.end_shard()
        if not self.file:
            self.file, self.at = open(self.folder / f"model-{len(self.shards):05d}.safetensors", "wb"), 0
            self.file.seek(8 + self.room)
            self.shards.append({})
        if count % 8:
            self.late.append((name, dtype, shape, b"".join(bytes(chunk) for chunk in chunks)))
            return
        self.put(name, dtype, shape, chunks)

    def put(self, name, dtype, shape, chunks):
        start = self.at
        for chunk in chunks:
            self.at += self.file.write(chunk)
        known = next(key for key, value in STORED.items() if value == dtype)
        self.shards[-1][name] = {"dtype": known, "shape": list(shape), "data_offsets": [start, self.at]}

    def end_shard(self):
        for name, dtype, shape, data in sorted(self.late, key=lambda entry: -entry[1].itemsize):
            self.put(name, dtype, shape, [data])
        self.late = []
        header = json.dumps({"__metadata__": {"format": "pt"}} | self.shards[-1], separators=(",", ":")).encode()
        self.file.seek(0)
        self.file.write(self.room.to_bytes(8, "little") + header.ljust(self.room))
        self.file.close()
        self.file = None

    def finish(self):
        """Name the files, write their index and return {file: bytes}."""
        self.end_shard()
        names, weight_map = {}, {}
        for number, shard in enumerate(self.shards):
            name = f"model-{number + 1:05d}-of-{len(self.shards):05d}.safetensors"
            name = name if len(self.shards) > 1 else "model.safetensors"
            path = (self.folder / f"model-{number:05d}.safetensors").rename(self.folder / name)
            names[name] = path.stat().st_size
            weight_map |= dict.fromkeys(shard, name)
        if len(self.shards) > 1:
            total = sum(e["data_offsets"][1] - e["data_offsets"][0] for shard in self.shards for e in shard.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(self.folder / "model.safetensors.index.json", index)
        return names


def row_ranges(shape):
    """Yield (first, last) of runs of rows that a processor's cache holds."""
    step = max(1, PIECE // max(1, math.prod(shape[1:])))
    for i in range(0, shape[0], step):
        yield i, min(i + step, shape[0])


def rounded(tensor, dtype, name, before=None, sums=None):
    """Yield the bytes of a tensor in `dtype`, in pieces; ValueError if its numbers do not fit there.

    before, sums  (first row, last row) -> rows of the tensor before the merge; [sum of squares of the update, of what
                  rounding takes from it], to which this tensor's are added
    """
    tensor = tensor if tensor.ndim else tensor[None]
    for i, j in row_ranges(tensor.shape):
        exact, piece = tensor[i:j], tensor[i:j].to(dtype)
        good = True
        if before:
            change, error = (rows.to(torch.float32, copy=True).sub_(exact).flatten() for rows in (before(i, j), piece))
            squares = change.dot(change).item(), error.dot(error).item()
            sums[:] = [total + square for total, square in zip(sums, squares, strict=True)]
            good = math.isfinite(sum(squares))
        elif dtype == torch.float16:
            good = piece.isfinite().all()
        if not good:
            raise ValueError(f"{name}: NaN, or numbers too large for {dtype}, from the merge or from --save_dtype")
        yield tensor_bytes(piece)


def tensor_bytes(tensor):
    """Return a tensor's bytes as an array that files can be written from."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def parse_size(text):
    """Return the bytes of a size such as 400MB or 5GB (powers of ten, as in transformers)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)B?", text.strip(), re.I)
    size = float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ") if match else 0
    if size < 1:
        raise ValueError(f"--max_shard_size {text}: a size such as 400MB or 5GB")
    return int(size)


# -----------------------------------------------------------------------------
# adapter


def read_adapter(folder, allow_pickle):
    """Return (configuration, {tensor: value}) of a LoRA adapter folder; ValueError if it cannot be merged."""
    from peft import PeftConfig
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path, flag = Path(folder), f"--lora_weights {folder}"
    if not (path / "adapter_config.json").exists():
        raise ValueError(f"{flag}: no adapter there (adapter_config.json)")
    try:
        config = PeftConfig.from_pretrained(folder)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{flag}: adapter_config.json cannot be read: {error}") from error
    if config.peft_type != "LORA":
        raise ValueError(f"{flag}: an adapter of type {config.peft_type.value}; only LoRA is merged here")
    init = str(config.init_lora_weights).lower()
    if init.startswith(("pissa", "olora", "corda", "loftq", "lora_ga", "mica")):
        raise ValueError(
            f"{flag}: it was initialised with {init}, which changes the base model too. Save it as a plain LoRA "
            "(PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)), and merge that"
        )
    if (path / "adapter_model.safetensors").exists():
        try:
            weights = load_file(path / "adapter_model.safetensors")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{flag}: adapter_model.safetensors is damaged: {error}") from error
    elif not (path / "adapter_model.bin").exists():
        raise ValueError(f"{flag}: no adapter_model.safetensors there")
    elif not allow_pickle:
        raise ValueError(
            f"{flag}: adapter_model.bin is a pickle file, which can run code: --allow_pickle if you trust it"
        )
    else:
        weights = torch.load(path / "adapter_model.bin", map_location="cpu", weights_only=True)
    broken = [name for name, value in weights.items() if not value.isfinite().all()]
    if broken:
        raise ValueError(f"{flag}: NaN or infinity in {', '.join(broken[:3])} ({len(broken)} tensors)")
    half = re.compile(r"\.lora_(A|embedding_B|magnitude_vector)\b")  # alone, these change nothing
    if not config.use_dora and not any(value.any() for name, value in weights.items() if not half.search(name)):
        raise ValueError(f"{flag}: an adapter that was never trained: its update is zero everywhere")
    return config, weights


class Adapter:
    """A LoRA adapter on the meta model of a Checkpoint, which it wraps.

    model    PEFT's model: the adapter's tensors in memory (float32), the base's on the meta device
    adapted  {parameter of the base: PEFT's layer that merges it, or the tensor that replaces it}
    """

    def __init__(self, base, folder, allow_pickle):
        from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import ModulesToSaveWrapper

        config, weights = read_adapter(folder, allow_pickle)
        config.inference_mode = True
        self.names = {id(module): name for name, module in base.model.named_modules()}
        own = {id(p) for p in base.model.parameters()}
        flag = f"--lora_weights {folder}"
        try:
            self.model = PeftModel(base.model, config, low_cpu_mem_usage=True).eval()
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, NotImplementedError) as error:
            raise ValueError(f"{flag} does not fit {base.folder}: {error}") from error
        # every tensor of the adapter has a place, and every place its tensor, of one shape
        expected = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        state = self.model.state_dict()
        copies = [name for name in weights if name not in expected and name in state]  # of the base's embeddings
        expected |= {name: state[name] for name in copies}
        unused, absent = sorted(set(weights) - set(expected)), sorted(set(expected) - set(weights))
        shapes = [n for n in weights if n in expected and weights[n].shape != expected[n].shape]
        lines = [f"  unknown to the base: {name}" for name in unused]
        lines += [f"  not in the adapter: {name}" for name in absent]
        lines += [f"  {n}: {list(weights[n].shape)} here, {list(expected[n].shape)} in the base" for n in shapes]
        if lines:
            more = f"\n  and {len(lines) - 10} more" if len(lines) > 10 else ""
            raise ValueError(f"{flag} is of another base, or damaged:\n" + "\n".join(lines[:10]) + more)
        for key in copies:
            path, _, leaf = key.rpartition(".")
            name, value = f"{self.names[id(self.model.get_submodule(path))]}.{leaf}", weights.pop(key).float()
            if not torch.equal(value, base.fetch(name)):
                base.replaced[base.tied.get(name, name)] = value
        for module in self.model.modules():
            if hasattr(module, "_move_adapter_to_device_of_base_layer"):  # it would send them to the meta device
                module._move_adapter_to_device_of_base_layer = lambda *args, **kwargs: None
        weights = {name: value.float() for name, value in weights.items()}
        set_peft_model_state_dict(self.model, weights, low_cpu_mem_usage=True)
        left = [name for name, p in self.model.named_parameters() if p.is_meta and id(p) not in own]
        if left:
            raise ValueError(f"{flag}: PEFT gave no value to {', '.join(left[:3])} ({len(left)} tensors)")
        self.adapted = {}
        for module in self.model.modules():
            if isinstance(module, ModulesToSaveWrapper):
                saved = module.modules_to_save["default"].named_parameters()
                name = self.names[id(module.original_module)]
                self.adapted |= {f"{name}.{leaf}": value for leaf, value in saved}
            elif isinstance(module, BaseTunerLayer):
                name = self.names[id(module.get_base_layer())]
                leaves = [f"{name}.{leaf}" for leaf in self.leaves(module)]
                self.adapted |= dict.fromkeys(leaves, module)
                if len(leaves) > 1:  # weight and bias are merged at once
                    joint = Part(leaves, [base.parts[leaf].sources[0] for leaf in leaves])
                    base.parts |= dict.fromkeys(leaves, joint)

    @staticmethod
    def leaves(layer):
        """Return the names of the parameters that PEFT's layer merges into its base layer."""
        bias = any(getattr(layer, "lora_bias", {}).values())
        return [getattr(layer, "parameter_name", "weight"), *(["bias"] if bias else [])]

    def merge(self, values):
        """Merge into {parameter: float32 tensor} what adapts them; the tensors given may be changed in place."""
        merged = dict(values)
        for name in values:
            layer = self.adapted.get(name)
            if isinstance(layer, torch.Tensor):
                merged[name] = layer.detach()
            elif layer is not None and name.rpartition(".")[2] == self.leaves(layer)[0]:
                path = name.rpartition(".")[0]
                merged |= {f"{path}.{leaf}": value for leaf, value in self.merge_layer(layer, path, values).items()}
        return merged

    def merge_layer(self, layer, path, values):
        """Return {leaf: merged parameter} of PEFT's layer at `path`.

        PEFT makes the whole update, and then a scaled copy of it. A row of plain LoRA's update needs its own row of
        lora_B only, so PEFT gets a few rows at a time of that and of the weight, which a cache holds.
        """
        from peft.tuners.lora.layer import Linear

        module, leaves = layer.get_base_layer(), self.leaves(layer)
        holders, exact = [(module, leaf) for leaf in leaves], [values[f"{path}.{leaf}"] for leaf in leaves]
        ranges = [(None, None)]
        if type(layer) is Linear and not layer.lora_variant and not layer.fan_in_fan_out and len(leaves) == 1:
            holders.append((layer.lora_B["default"], "weight"))
            exact.append(layer.lora_B["default"].weight)
            ranges = row_ranges(exact[0].shape)
        meta, made = [holder._parameters[leaf] for holder, leaf in holders], []
        for i, j in ranges:
            for (holder, leaf), value in zip(holders, exact, strict=True):
                holder._parameters[leaf] = nn.Parameter(value.detach()[i:j], requires_grad=False)
            try:
                layer.merge(safe_merge=False)  # in float32 there is nothing to choose: one sum, one rounding later
            except (NotImplementedError, RuntimeError) as error:
                raise ValueError(f"{path}: PEFT cannot merge this kind of LoRA: {error}") from error
            made = [holder._parameters[leaf].detach() for holder, leaf in holders]
            layer.merged_adapters.clear()
        for (holder, leaf), parameter in zip(holders, meta, strict=True):
            holder._parameters[leaf] = parameter
        # rows were merged in place, in views of `values`
        return dict(zip(leaves, made if ranges == [(None, None)] else exact, strict=False))


# -----------------------------------------------------------------------------
# quantized weights


def quantize_rows(weight, method):
    """Return (quantized weight, scale [rows, 1] in bfloat16) of a float32 matrix, one scale a row, as fp8 or int8."""
    dtype, limit = (torch.float8_e4m3fn, 448) if method == "fp8" else (torch.int8, 127)
    scale = (weight.abs().amax(1, keepdim=True) / limit).clamp(min=1e-12).bfloat16()
    ratio = (weight / scale).clamp_(-limit, limit)
    return (ratio.round_() if method == "int8" else ratio).to(dtype), scale


def quantized_tensors(name, weight, method):
    """Return {tensor on disk: value} for the weight `name` of a linear layer, in the format that --quantize names."""
    if method != "nf4":
        weight, scale = quantize_rows(weight, method)
        return {name: weight, f"{name}_scale": scale}
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight.bfloat16(), quant_type="nf4", compress_statistics=True)
    return {name: packed} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}


def quantization_config(method, ignored):
    """Return config.json's quantization_config: of compressed-tensors for fp8 and int8, of bitsandbytes for nf4."""
    if method == "nf4":
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=ignored,
        )
        return config.to_dict()
    kind = {"num_bits": 8, "type": "float" if method == "fp8" else "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": kind | {"strategy": "channel", "dynamic": False},
        "input_activations": kind | {"strategy": "token", "dynamic": True},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if method == "fp8" else "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignored,
    }


# -----------------------------------------------------------------------------
# GGUF


def gguf_vocabulary(folder, writer, vocab_size):
    """Add the tokenizer in `folder` to a GGUF file; returns a warning, or "".

    Byte-level BPE (Llama 3, Qwen2) and SentencePiece (Llama 2). llama.cpp knows how a tokenizer splits text into
    words by a name for each regular expression.
    """
    from gguf import TokenType

    tokenizer = load_tokenizer(str(folder))
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = {i: (f"[PAD{i}]", 0.0, TokenType.UNUSED) for i in range(vocab_size)}
    warning = ""
    if (folder / "tokenizer.model").exists():
        import sentencepiece

        pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        tests = {"IsUnknown": "UNKNOWN", "IsControl": "CONTROL", "IsUnused": "UNUSED", "IsByte": "BYTE"}
        for i in range(pieces.vocab_size()):
            kind = next((name for test, name in tests.items() if getattr(pieces, test)(i)), "NORMAL")
            tokens[i] = (pieces.IdToPiece(i), pieces.GetScore(i), TokenType[kind])
        writer.add_tokenizer_model("llama")
    elif state["model"]["type"] == "BPE" and not state["model"].get("byte_fallback"):
        tokens |= {i: (token, 0.0, TokenType.NORMAL) for token, i in state["model"]["vocab"].items()}
        merges = state["model"]["merges"]
        writer.add_tokenizer_model("gpt2")
        writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
        steps = state["pre_tokenizer"] or {}
        patterns = [s["pattern"].get("Regex") for s in steps.get("pretokenizers", [steps]) if s.get("type") == "Split"]
        known = next((name for name, pattern in PRE_TOKENIZERS.items() if patterns == [pattern]), None)
        if patterns == [] and steps.get("use_regex"):
            known = "gpt-2"
        writer.add_tokenizer_pre(known or "default")
        if not known:
            warning = "llama.cpp has no name for how this tokenizer splits text, and may make other tokens of some"
    else:
        raise ValueError(f"--gguf: {folder} has neither byte-level BPE nor a tokenizer.model of SentencePiece")
    for i, token in tokenizer.added_tokens_decoder.items():
        tokens[i] = (token.content, 0.0, TokenType.CONTROL if token.special else TokenType.USER_DEFINED)
    if max(tokens) >= vocab_size:
        raise ValueError(f"--gguf: the tokenizer has ids beyond the {vocab_size} of the model")
    texts, scores, kinds = zip(*(tokens[i] for i in range(vocab_size)), strict=True)
    writer.add_token_list(texts)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    for name in ("bos", "eos", "unk", "pad"):
        if getattr(tokenizer, f"{name}_token_id") is not None:
            getattr(writer, f"add_{name}_token_id")(getattr(tokenizer, f"{name}_token_id"))
    first = tokenizer("a").input_ids[:1]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
    return warning


def gguf_settings(config, writer):
    """Add what a GGUF file says of the model; returns the RoPE frequency factors [head_dim / 2], or None."""
    import gguf
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    kind = rope.get("rope_type", "default")
    if kind == "llama3":  # llama.cpp divides the frequencies by a tensor of factors
        plain = 1 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        return plain / ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
        if "original_max_position_embeddings" in rope:
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    elif kind != "default":
        raise ValueError(f"--gguf: RoPE scaling of the type {kind} is not written")
    return None


def write_gguf(checkpoint, path, kind, name):
    """Write a checkpoint as a GGUF file with weights of type `kind`, a tensor at a time; returns a warning, or ""."""
    import gguf

    config, arch = checkpoint.config, GGUF_NAMES[checkpoint.config.model_type]
    if any(getattr(config, flag, False) for flag in ("mlp_bias", "use_sliding_window")) or (
        arch == "llama" and config.attention_bias
    ):
        raise ValueError("--gguf: biases of Llama models and sliding windows are not written")
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name(name)
    factors = gguf_settings(config, writer)
    warning = gguf_vocabulary(checkpoint.folder, writer, config.vocab_size)
    ftypes = {"f32": "ALL_F32", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(gguf.LlamaFileType[ftypes[kind]])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    plan = []
    for source in sorted(checkpoint.parts):
        shape = checkpoint.shape(checkpoint.parts[source].sources[0])
        # llama.cpp wants vectors in float32, and blocks of 32 for q8_0
        store = kind if len(shape) == 2 and (kind != "q8_0" or shape[-1] % 32 == 0) else "f32"
        store = gguf.GGMLQuantizationType[store.upper()]
        stored = gguf.quants.quant_shape_to_byte_shape(shape, store) if store.name != "F32" else shape
        dtype = np.dtype(np.float32 if store.name == "F32" else np.uint8)
        new = names.get_name(source, try_suffixes=(".weight", ".bias"))
        writer.add_tensor_info(new, stored, dtype, math.prod(stored) * dtype.itemsize, raw_dtype=store)
        plan.append((source, shape, store, np.empty(0, dtype), stored))
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for source, shape, store, empty, stored in plan:
        out = np.empty(stored, empty.dtype)
        permute = heads.get(source.split(".")[-2]) if arch == "llama" else None
        for i, j in [(0, shape[0])] if permute else row_ranges(shape):
            piece = checkpoint.fetch(source, i, j)
            if permute:  # llama.cpp rotates neighbouring pairs, transformers the two halves of a head
                piece = piece.reshape(permute, 2, -1, *shape[1:]).transpose(1, 2).reshape(shape)
            out[i:j] = gguf.quants.quantize(piece.numpy(), store)
        writer.write_tensor_data(out)
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
    writer.close()
    return warning


# -----------------------------------------------------------------------------
# what runtimes read beside the weights


def portable_config(config, settings, untied, dtype, quantization):
    """Return the base's config.json with the names that old and new runtimes read: RoPE and dtype, twice each.

    config is what the file holds; settings the same after transformers read it, with its defaults. transformers 5
    writes rope_parameters and dtype; Ollama, vLLM and others still read rope_theta, rope_scaling and torch_dtype, and
    take 10000 and no scaling where they are missing.
    """
    config = copy.deepcopy(config)
    for level, read in ((config, settings), (config.get("text_config"), settings.get_text_config())):
        rope = getattr(read, "rope_parameters", None)
        if level is None or not rope or (level is config and "text_config" in config):
            continue
        if "rope_theta" in rope:  # not the kind that differs from layer to layer
            level["rope_parameters"], level["rope_theta"] = rope, rope["rope_theta"]
            scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
            if rope.get("rope_type", "default") != "default":
                level["rope_scaling"] = scaling
    if dtype:
        for level in (config, config.get("text_config", {})):
            level["dtype"] = level["torch_dtype"] = dtype
    if untied:
        config["tie_word_embeddings"] = False
    if quantization:
        config["quantization_config"] = quantization
    return config


def copy_tokenizer(source, target):
    """Copy a tokenizer's files as they are; the chat template goes into both of the places that runtimes read.

    Returns the template, or None. Ollama and older runtimes look for it in tokenizer_config.json only, transformers 5
    writes chat_template.jinja only.
    """
    for path in sorted({path for pattern in TOKENIZER_FILES for path in source.glob(pattern)}):
        (target / path.relative_to(source)).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target / path.relative_to(source))
    path, jinja = target / "tokenizer_config.json", target / "chat_template.jinja"
    if not path.exists():
        return None
    config = json.loads(path.read_text(encoding="utf-8"))
    template = jinja.read_text(encoding="utf-8") if jinja.exists() else config.get("chat_template")
    if isinstance(template, str):
        jinja.write_text(template, encoding="utf-8")
        if config.get("chat_template") != template:
            write_json(path, config | {"chat_template": template})
    return template


# -----------------------------------------------------------------------------
# self-check


def fetch_while_running(model, names, fetch):
    """Let each module of a meta model hold its parameters only during its own forward pass.

    names  {id of a module of the base: its name}; PEFT's layers around them are left out
    fetch  (parameter, first row, last row) -> float32 tensor
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    inside = set()
    for unit in model.modules():  # parents come before their children
        wrapper = isinstance(unit, BaseTunerLayer | AuxiliaryTrainingWrapper)
        if wrapper and type(getattr(unit, "base_layer", None)) is nn.Linear and not getattr(unit, "lora_variant", True):
            wrapper = False  # plain LoRA calls its base layer, and never looks at the weight
        if id(unit) in inside or not (wrapper or unit._parameters):
            continue
        if wrapper:
            inside |= {id(module) for module in unit.modules()}
        holders = [module for module in (unit.modules() if wrapper else [unit]) if id(module) in names]
        places = [
            (m, leaf, f"{names[id(m)]}.{leaf}") for m in holders for leaf, p in m._parameters.items() if p is not None
        ]
        if not places:  # the adapter's own, which are in memory
            continue
        if type(unit) is nn.Linear:
            unit.forward = functools.partial(linear_in_pieces, unit, places[0][2], fetch)
            places = places[1:]  # the bias
        elif type(unit) is nn.Embedding:
            unit.forward = functools.partial(look_up, places[0][2], fetch)
            continue

        def before(module, *_, places=places):
            for holder, leaf, name in places:
                holder._parameters[leaf] = nn.Parameter(fetch(name), requires_grad=False)

        def after(module, *_, places=places):
            for holder, leaf, _ in places:
                holder._parameters[leaf] = nn.Parameter(holder._parameters[leaf].to("meta"), requires_grad=False)

        unit.register_forward_pre_hook(before, with_kwargs=True)
        unit.register_forward_hook(after)


def linear_in_pieces(layer, name, fetch, x):
    """Return F.linear of x with the weight `name`, of which a few rows are fetched at a time."""
    shape = (layer.out_features, layer.in_features)
    pieces = [F.linear(x, fetch(name, i, j)) for i, j in row_ranges(shape)]
    return torch.cat(pieces, -1) if layer.bias is None else torch.cat(pieces, -1) + layer.bias


def look_up(name, fetch, ids):
    """Return the rows `ids` of the embedding `name`."""
    found = {i: fetch(name, i, i + 1)[0] for i in set(ids.flatten().tolist())}
    return torch.stack([found[i] for i in ids.flatten().tolist()]).reshape(*ids.shape, -1)


def check_prompts(folder, vocab_size):
    """Return token ids [B, T] to compare two models on: of a few questions, as the chat template renders them."""
    questions = (
        "Tom has 6 boxes with 7 coins in each. He gives 12 coins away. How many coins does Tom have now?",
        "Write one sentence about the sea in winter, then translate it into French and into German.",
        "Explain in a few words why the sky is blue, and name a book in which one can read more about it.",
        "def mean(numbers):  # complete this function, and say what it does with an empty list of numbers",
    )
    if not (folder / "tokenizer_config.json").exists() and not (folder / "tokenizer.json").exists():
        return torch.randint(vocab_size, (4, 24), generator=torch.Generator().manual_seed(0))
    tokenizer = load_tokenizer(str(folder))
    texts = list(questions)
    if isinstance(tokenizer.chat_template, str):
        turns = [[{"role": "user", "content": question}] for question in questions]
        texts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    rows = tokenizer(texts, add_special_tokens=False).input_ids
    length = min(24, *(len(ids) for ids in rows))
    return torch.tensor([ids[-length:] for ids in rows])  # [B, T]: the ends, for they differ


def image_prompt(folder, config):
    """Return the inputs of an image and some tokens after it; None for a model that takes no images."""
    if "_vl" not in config.model_type:
        return None
    try:
        processor = AutoImageProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: no image processor for the check (preprocessor_config.json): {error}") from None
    noise = np.random.default_rng(0).integers(0, 256, (56, 84, 3), np.uint8)
    inputs = processor(images=[Image.fromarray(noise)], return_tensors="pt")
    pads = int(inputs["image_grid_thw"].prod()) // processor.merge_size**2
    ids = [config.vision_start_token_id, *[config.image_token_id] * pads, config.vision_end_token_id, *range(10, 34)]
    inputs["input_ids"] = torch.tensor([ids])
    inputs["mm_token_type_ids"] = inputs["input_ids"].eq(config.image_token_id).int()
    return inputs


@torch.no_grad()
def logits_of(model, ids, picture=None):
    """Return the logits [N, V] of token ids [B, T] and, where there is one, of `image_prompt`."""
    logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
    return torch.cat([logits, model(**picture, use_cache=False).logits[0]]) if picture else logits


def compare(reference, other):
    """Return the mean and largest KL divergence (nats), the largest logit difference and the share of equal tops.

    reference, other  [N, V] logits; a model's output may have padded entries that the other lacks
    """
    kl, worst, same = [], 0.0, 0
    for p, q in zip(reference.split(16), other.split(16), strict=True):
        p, q = p.double(), q.double()
        kl.append(F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none").sum(-1))
        worst, same = max(worst, (p - q).abs().max().item()), same + int((p.argmax(-1) == q.argmax(-1)).sum())
    kl = torch.cat(kl).clamp(min=0)
    return {"kl": kl.mean().item(), "kl_max": kl.max().item(), "logit_diff": worst, "same_top": same / len(kl)}


def self_check(base, adapter, folder, with_effect):
    """Compare the checkpoint in `folder` with base + adapter, in float32 and from the files on disk.

    Quantized weights are multiplied out first; that runtimes quantize activations too is not part of it.
    """
    ids = check_prompts(folder, base.config.get_text_config().vocab_size)
    picture = image_prompt(folder, base.config)
    model, names = base.model, {id(module): name for name, module in base.model.named_modules()}
    if adapter:
        model, names = adapter.model, adapter.names
    fetch_while_running(model, names, base.fetch)
    reference = logits_of(model, ids, picture)
    effect = None
    if adapter and with_effect:
        with adapter.model.disable_adapter():
            effect = compare(reference, logits_of(model, ids, picture))["kl"]
    written = Checkpoint(folder)
    fetch_while_running(written.model, {id(m): name for name, m in written.model.named_modules()}, written.fetch)
    found = compare(reference, logits_of(written.model, ids, picture))
    return found | {"effect": effect, "tokens": len(reference)}


# -----------------------------------------------------------------------------
# export


def base_folder(base_model, allow_pickle):
    """Return the folder of a base model; what the hub has of it is downloaded."""
    base = find_base(base_model)
    if Path(base).is_dir():
        return Path(base)
    from huggingface_hub import snapshot_download

    wanted = [
        "*.json",
        "*.safetensors",
        "*.jinja",
        "*.txt",
        "*.model",
        *(["pytorch_model*.bin"] if allow_pickle else []),
    ]
    try:
        return Path(snapshot_download(base, allow_patterns=wanted))
    except Exception as error:  # the hub client raises dozens of kinds
        raise ValueError(f"--base_model {base_model}: the hub could not give it: {error}") from error


def merged_parts(base, adapter):
    """Return ([Part], names of tied parameters to write out): what to write, in the order of the files.

    A tensor that is no parameter of the model is a part without names. Where LoRA adapts one of two tied embeddings,
    the other must be written too: they are no longer the same.
    """
    part_of = {source: part for part in base.parts.values() for source in part.sources}
    parts = [part_of.get(source) or Part([], [source]) for source in base.stored]
    parts = list({id(part): part for part in parts}.values())
    untied = [name for name, other in base.tied.items() if adapter and {name, other} & set(adapter.adapted)]
    return parts + [Part([name], [name]) for name in untied], untied


def write_weights(base, adapter, folder, limit, dtype, method, linears):
    """Write every tensor, merged where LoRA adapts it; returns ({file: bytes}, what export.json says of them).

    dtype    of the floating-point tensors; None for what each is on disk
    linears  names of the weights to quantize with `method`
    """
    parts, untied = merged_parts(base, adapter)
    extra = [f"{name}.quant_state.bitsandbytes__nf4" for name in linears] * 6  # more tensors, if quantized
    writer = ShardWriter(folder, limit, [source for part in parts for source in part.sources] + extra)
    merged, sums = [], [0.0, 0.0]
    for part in parts:
        adapted = [name for name in part.names if adapter and name in adapter.adapted]
        if not adapted and not (linears | set(untied) | set(base.replaced)) & set(part.names):
            for source in part.sources:
                stored = base.stored_dtype(source)
                new = dtype if dtype and stored.is_floating_point else stored
                same = base.chunks(source) if new == stored else rounded(base.read(source), new, source)
                writer.add(source, new, base.shape(source), same)
            continue
        stored = base.stored_dtype(base.source_of(part))
        new = dtype if dtype and stored.is_floating_point else stored
        values = base.values(part)
        if adapted:
            values = adapter.merge(values)
            merged += adapted
        for source, value in base.revert(part, values).items():
            chunks = rounded(value, new, source, lambda i, j, s=source: base.before(s, i, j), sums) if adapted else None
            if part.names[0] in linears and value.ndim == 2:
                for _ in chunks or ():  # for the sums
                    pass
                for name, tensor in quantized_tensors(source, value, method).items():
                    writer.add(name, tensor.dtype, tensor.shape, [tensor_bytes(tensor)])
            else:
                writer.add(source, new, value.shape, chunks or rounded(value, new, source))
    update, lost = sums
    if adapter and not update:
        raise ValueError("the adapter changes nothing: the sum of all its updates is zero")
    share = math.sqrt(lost / update) if adapter else None
    return writer.finish(), {"merged": merged, "untied": untied, "update_lost": share}


def write_metadata(base, lora_weights, tokenizer, folder, untied, dtype, method, ignored):
    """Write everything but the weights that loading needs; config.json last. Returns the stop ids."""
    for path in base.folder.glob("*processor_config.json"):
        shutil.copyfile(path, folder / path.name)
    copy_tokenizer(tokenizer, folder)
    sources = [Path(place) / "generation_config.json" for place in (lora_weights, base.folder) if place]
    generation = next((path for path in sources if path.exists()), None)
    if generation:
        shutil.copyfile(generation, folder / "generation_config.json")
    else:
        write_json(folder / "generation_config.json", {"eos_token_id": base.config.get_text_config().eos_token_id})
    config = json.loads((base.folder / "config.json").read_text(encoding="utf-8"))
    quantization = quantization_config(method, ignored) if method else None
    write_json(folder / "config.json", portable_config(config, base.config, untied, dtype, quantization))
    stops = json.loads((folder / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id")
    return stops if isinstance(stops, list) else [] if stops is None else [stops]


def write_modelfile(folder, source, stops, context):
    """Write Ollama's Modelfile: where the weights are, what ends an answer, and how long the context is.

    It has no TEMPLATE: Ollama renders with the chat template that the model carries, since its version 0.30.
    """
    lines = [f"FROM {source}"]
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    lines += [f"PARAMETER num_ctx {context}"] if context else []
    (folder / "Modelfile").write_text("\n".join(lines) + "\n", encoding="utf-8")


def stop_texts(folder, stops):
    """Return the texts of the tokens that end an answer."""
    if not stops or not (folder / "tokenizer_config.json").exists():
        return []
    return load_tokenizer(str(folder)).convert_ids_to_tokens(stops)


def model_card(base_model, lora_weights, report):
    """Return README.md of the exported model."""
    hub = not Path(base_model).exists()
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    head += [f"base_model: {base_model}"] * hub + ["---", "", f"# {Path(base_model).name}, with an adapter merged in"]
    rows = {"base model": base_model, "adapter": lora_weights or "none", "dtype": report["dtype"]}
    rows |= {"merged tensors": len(report["merged"]), "quantized": report["quantize"] or "no"}
    if report["check"]:
        check = report["check"]
        rows |= {
            "KL divergence from base + adapter, nats": f"{check['kl']:.2e} mean, {check['kl_max']:.2e} largest",
            "largest logit difference": f"{check['logit_diff']:.2e}",
        }
    if report["update_lost"] is not None:
        rows["share of the update lost to rounding"] = f"{report['update_lost']:.2%}"
    table = ["| what | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    note = "Made by export_hf_checkpoint.py; export.json has the details of the comparison, which was in float32."
    return "\n".join([*head, "", *table, "", note, ""])


def replace_folder(partial, target):
    """Give the finished folder its name; what had it is deleted after that."""
    old = Path(f"{target}.old")
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def export(
    *,
    base_model: str = "",
    lora_weights: str = "",
    output_dir: str = "out/export",
    overwrite: bool = False,
    # format
    max_shard_size: str = "5GB",
    save_dtype: str = "",
    quantize: str = "",
    gguf: str = "",
    # check
    check: bool = True,
    max_kl: float = 0.0,
    allow_pickle: bool = False,
):
    """Write a base model, with a LoRA adapter merged in, as a checkpoint of its own.

    Without any flag it merges out/finetune/adapter into data/tiny/model.

    Args:
        base_model: hub id or folder of the model.
        lora_weights: folder of a LoRA adapter. Empty: the base model alone.
        output_dir: where everything of this run is written.
        overwrite: replace what an earlier run left in --output_dir.
        max_shard_size: largest weight file, such as 400MB or 5GB.
        save_dtype: of the written weights: float32, bfloat16 or float16. Empty: the base's own.
        quantize: write the linear layers' weights as fp8 or int8 (compressed-tensors) or nf4 (bitsandbytes).
        gguf: write a GGUF file too, for Ollama and llama.cpp: f32, bf16 or q8_0. Llama and Qwen2 models.
        check: compare what was written with base + adapter.
        max_kl: largest mean KL divergence in nats that passes. 0: 0.001; 0.1 for fp8 and int8, 0.5 for nf4.
        allow_pickle: read weights from PyTorch's pickle files, if there are no safetensors.
    """
    # 1. check flags
    started, flags = time.time(), dict(locals())
    if not base_model:
        base_model = "data/tiny/model"
        lora_weights = lora_weights or "out/finetune/adapter"
        if not Path(lora_weights).exists():
            raise ValueError(
                f"no adapter in {lora_weights} yet: make it with `python finetune.py`, name another with "
                "--lora_weights, or give --base_model data/tiny/model to export that alone"
            )
    if save_dtype not in ("", *DTYPES):
        raise ValueError(f"--save_dtype {save_dtype}: one of {', '.join(DTYPES)}")
    if quantize not in MAX_KL:
        raise ValueError(f"--quantize {quantize}: one of fp8, int8, nf4")
    if gguf not in ("", "f32", "bf16", "q8_0"):
        raise ValueError(f"--gguf {gguf}: one of f32, bf16, q8_0")
    if quantize and (gguf or save_dtype):
        raise ValueError("--quantize goes with neither --gguf nor --save_dtype: make two exports")
    if not 0 <= max_kl < math.inf:
        raise ValueError("--max_kl must not be negative")
    limit, target = parse_size(max_shard_size), Path(output_dir)
    partial = Path(f"{target}.incomplete")
    sources = [path.resolve() for path in (find_path(base_model), find_path(lora_weights)) if path]
    if any(target.resolve() in (path, *path.parents) for path in sources):
        raise ValueError(f"--output_dir {output_dir} holds what is to be exported: choose another folder")
    if target.is_file() or target.is_dir() and any(target.iterdir()):
        if not (target / "export.json").exists():
            raise ValueError(f"--output_dir {output_dir} holds something else than an export: choose another folder")
        if not overwrite:
            raise ValueError(
                f"--output_dir {output_dir} holds an earlier export: replace it with --overwrite, or choose another"
            )
    quiet_libraries()
    keep_memory_low()

    # 2. base and adapter, without their weights
    folder = base_folder(base_model, allow_pickle)
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if raw.get("quantization_config"):
        raise ValueError(
            f"--base_model {base_model} is quantized ({raw['quantization_config'].get('quant_method')}): a merge would "
            "be rounded to its few bits, far more than the adapter changes. Merge onto the model that it was made "
            "from, and then --quantize"
        )
    base = Checkpoint(folder, allow_pickle)
    text_config = base.config.get_text_config()
    limit_threads(text_config)
    linears, head = set(), base.model.get_output_embeddings()
    if quantize:
        if any(part.converter for part in base.parts.values()):
            raise ValueError(f"--quantize {quantize}: not for models whose experts are fused")
        modules = [(name, module) for name, module in base.model.named_modules() if type(module) is nn.Linear]
        linears = {f"{name}.weight" for name, module in modules if module is not head}
        ignored = [name for name, module in modules if module is head]
    if gguf and base.config.model_type not in GGUF_NAMES:
        raise ValueError(f"--gguf {gguf}: {base.config.model_type} models are not written; {', '.join(GGUF_NAMES)} are")
    carries = lora_weights and (Path(lora_weights) / "tokenizer_config.json").exists()
    tokenizer = Path(lora_weights) if carries else folder
    if gguf and not (tokenizer / "tokenizer_config.json").exists():
        raise ValueError(
            f"--gguf {gguf}: there is no tokenizer in {tokenizer} (tokenizer_config.json) to put into the file"
        )
    adapter = Adapter(base, lora_weights, allow_pickle) if lora_weights else None
    dtype = DTYPES[save_dtype] if save_dtype else None
    size = sum(math.prod(base.shape(s)) * (dtype or base.stored_dtype(s)).itemsize for s in base.stored)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
    except OSError as error:
        raise ValueError(f"--output_dir {output_dir} cannot be made: {error}") from None
    if size > free:
        raise ValueError(
            f"--output_dir {output_dir}: the disk has {free / 1e9:.1f} GB free, this takes {size / 1e9:.1f} GB"
        )
    kept = sorted({str(base.stored_dtype(s)).removeprefix("torch.") for s in base.stored})
    written = save_dtype or ", ".join(kept)
    print(f"export_hf_checkpoint.py  {base_model} + {lora_weights or 'no adapter'} -> {output_dir}")
    print(f"  base        {len(base.stored)} tensors, {size / 1e6:,.1f} MB as {written}", flush=True)

    # 3. weights, then what belongs to them; config.json last, without which nothing loads
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir()
        files, report = write_weights(base, adapter, partial, limit, dtype, quantize, linears)
        merged_in = time.time() - started
        single = save_dtype or (kept[0] if len(kept) == 1 else "")
        stops = write_metadata(
            base, lora_weights, tokenizer, partial, report["untied"], single, quantize, ignored if quantize else []
        )
        print(
            f"  wrote       {len(report['merged'])} tensors merged, {len(files)} files, "
            f"{sum(files.values()) / 1e6:,.1f} MB in {merged_in:.1f} s"
            + (f"; untied: {', '.join(report['untied'])}" if report["untied"] else "")
        )

        # 4. the files against base + adapter
        report = {"dtype": written, "quantize": quantize, "check": None} | report
        if check:
            checked = time.time()
            report["check"] = result = self_check(base, adapter, partial, not quantize)
            result["max_kl"] = max_kl or MAX_KL[quantize]
            result["seconds"] = time.time() - checked
            print(
                f"  check       KL {result['kl']:.2e} (largest {result['kl_max']:.2e}), logits differ by at most "
                f"{result['logit_diff']:.2e}, {result['same_top']:.0%} of the likeliest tokens are the same"
            )
            if adapter:
                print(f"  update      {report['update_lost']:.2%} of its norm lost to rounding", end="")
                print("" if quantize else f"; without the adapter the KL would be {result['effect']:.2e}")
            if not result["kl"] <= result["max_kl"]:
                raise ValueError(
                    f"what was written is not base + adapter: the mean KL is {result['kl']:.2e}, above --max_kl "
                    f"{result['max_kl']:g}. It was deleted"
                )
            if result["effect"] and result["effect"] > 1e-9 and result["kl"] > result["effect"] / 2:
                raise ValueError(
                    f"most of the update is lost: the KL from base + adapter is {result['kl']:.2e} with the merge and "
                    f"{result['effect']:.2e} without: --save_dtype float32 keeps it. What was written is deleted"
                )

        # 5. for Ollama and for people
        source = "."
        if gguf:
            source = f"./model-{gguf}.gguf"
            warning = write_gguf(Checkpoint(partial), partial / source, gguf, target.name)
            report["gguf_warning"] = warning
            if warning:
                print(f"  note        {warning}")
        modelfile = gguf or not quantize and set(base.config.architectures or []) & set(OLLAMA)
        if modelfile:
            write_modelfile(partial, source, stop_texts(partial, stops), text_config.max_position_embeddings)
        from importlib.metadata import version

        packages = "torch transformers peft safetensors".split()
        report |= {"base_model": base_model, "lora_weights": lora_weights, "flags": flags, "files": files}
        report |= {"seconds": time.time() - started, "merge_seconds": merged_in}
        report["versions"] = {name: version(name) for name in packages}
        write_json(partial / "export.json", report)
        (partial / "README.md").write_text(model_card(base_model, lora_weights, report), encoding="utf-8")
        replace_folder(partial, target)
    except BaseException as error:  # an interrupt, too
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ValueError(f"--output_dir {output_dir}: the disk is full ({error}); nothing was left there") from None
        raise
    print(f"wrote {target}. Next:")
    print(f"  python generate.py --base_model {target} --prompt '...'")
    print(f"  vllm serve {target}")
    print(f"  transformers serve {target}")
    if modelfile:
        print(f"  ollama create {target.name} -f {target / 'Modelfile'}")
    return report


if __name__ == "__main__":
    run_cli(export)
