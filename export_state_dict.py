"""
Export a Llama or Qwen2 model, with or without a LoRA adapter, as Meta's own checkpoint.

    reads    --base_model, --lora_weights (an adapter folder of finetune.py, or any PEFT adapter that can be merged)
    writes   --output_dir    consolidated.00.pth (a dict of plain tensors), params.json (what the target's ModelArgs
                             takes, and nothing else), export.json (sources, self-check), the tokenizer's files
    then     torch.load("OUT/consolidated.00.pth", weights_only=True, mmap=True), or ExecuTorch's Llama export

    tiny     python export_state_dict.py
    Llama    python export_state_dict.py --base_model meta-llama/Llama-3.1-8B --lora_weights out/finetune/adapter
    phones   python export_state_dict.py --base_model Qwen/Qwen2.5-0.5B --target executorch

Meta's model rotates neighbouring pairs of a head's elements, transformers' the first half against the second: the rows
of the query and key projections, and of their biases, change places. What Meta's model cannot compute is refused.

The base model's files are mapped, not read. With an adapter the whole model is in memory in float32: for a large one
merge with export_hf_checkpoint.py first, and export the result.
"""

import functools
import json
import logging
import re
import shutil
import sys
import traceback
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import get_type_hints

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # when it is imported, it asks for an optional package

import fire
import torch
import transformers
from transformers import AutoModelForCausalLM

HERE = Path(__file__).resolve().parent
MODEL_TYPES = ("llama", "mistral", "qwen2")  # transformers' names of what is Meta's model, biases of Qwen2 aside
META_NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOKENIZER_PARTS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")

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


def local_path(path):
    """Return `path` as a Path where it exists, seen from here or from this script's folder; otherwise None.

    What is not there may be the id of a model or data set of the hub (owner/name), or it is an error.
    """
    for place in (Path(path), HERE / path):
        if place.exists():
            return place
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) or Path(path).parent.is_dir():
        raise ValueError(f"{path}: no such file or folder, and no id of the hub (owner/name)")
    return None


def write_json(path, value):
    """Write `value` as JSON beside `path` and rename it, so that `path` is never half written."""
    partial = Path(f"{path}.incomplete")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def find_base(base_model):
    """Return the folder or hub id to load --base_model from, once it can be one."""
    path = local_path(base_model)
    if path and not (path / "config.json").exists():
        what = "an adapter" if (path / "adapter_config.json").exists() else "no model"
        raise ValueError(f"--base_model {base_model}: {what} is in this folder (there is no config.json)")
    return str(path or base_model)


def load_config(base):
    """Return the configuration of the language model in a folder or hub id."""
    try:
        return transformers.AutoConfig.from_pretrained(base).get_text_config()
    except Exception as error:  # transformers and huggingface_hub have their own kinds
        raise ValueError(f"--base_model {base} cannot be loaded: {error}") from error


def load_adapter(model, lora_weights):
    """Return `model` with the adapter of a folder, once every tensor of it has found its place."""
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights

    warnings.filterwarnings("ignore", message="Found missing adapter keys")  # all of them by name; refused below
    try:
        model = PeftModel.from_pretrained(model, lora_weights)
    except Exception as error:  # peft, torch and safetensors have their own kinds; torch lists every tensor
        raise ValueError(
            f"--lora_weights {lora_weights} is damaged or does not fit this base model: {error!s:.300}"
        ) from error
    found = load_peft_weights(lora_weights, device="cpu").keys()
    odd = found ^ get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    odd -= model.state_dict().keys()  # where embeddings are adapted, peft saves the base model's own with the adapter
    if odd:
        raise ValueError(
            f"--lora_weights {lora_weights} does not fit this base model: {len(odd)} tensors have no counterpart, "
            f"{', '.join(sorted(odd)[:3])} among them"
        )
    return model


# -----------------------------------------------------------------------------
# Meta's format


def ffn_params(dim, ffn_size):
    """Return the entries of params.json that make Meta's model compute `ffn_size`, for which it has no entry itself.

    It takes multiple_of * ceil(int(ffn_dim_multiplier * int(8 * dim / 3)) / multiple_of): with multiple_of the size
    itself, any product from 1 to the size gives the size.
    """
    product, entries = int(2 * (4 * dim) / 3), {"multiple_of": ffn_size}
    if product > ffn_size:
        entries["ffn_dim_multiplier"] = ffn_size / product
    return entries


def rope_params(rope, target):
    """Return (entries of params.json, what is refused) for a config's rope_parameters.

    Meta's code has Llama 3.1's scaling with its numbers as constants; ExecuTorch lets two of them be set.
    """
    kind, entries, refused = rope["rope_type"], {"rope_theta": rope["rope_theta"]}, []
    if rope.get("partial_rotary_factor", 1) != 1:
        refused.append(f"partial_rotary_factor {rope['partial_rotary_factor']} (1 only)")
    if kind == "default":
        return entries, refused
    if kind != "llama3":
        return entries, [*refused, f"RoPE scaling of type {kind} (llama3 only)"]
    constants = {"low_freq_factor": 1, "original_max_position_embeddings": 8192}
    entries["use_scaled_rope"] = True
    if target == "llama":
        constants |= {"factor": 8, "high_freq_factor": 4}
    else:
        for name, key in {"factor": "rope_scale_factor", "high_freq_factor": "high_freq_factor"}.items():
            entries[key] = int(rope[name]) if rope[name] == int(rope[name]) else rope[name]
    wrong = [f"{name} {rope[name]} ({value} only)" for name, value in constants.items() if rope[name] != value]
    if wrong:
        hint = " (--target executorch has it)" if target == "llama" and rope["factor"] != 8 else ""
        refused.append(f"RoPE scaling with {', '.join(wrong)}{hint}")
    return entries, refused


def meta_params(config, target):
    """Return what params.json says of a transformers config; ValueError names all that the target cannot compute.

    Both loaders call ModelArgs(**params), which raises on a name that it does not know: Llama 3.0's code has no
    use_scaled_rope, so that is written only where it is true. Meta's code loads with strict=False: the biases of a
    Qwen2 would be dropped without a word.
    """
    if config.model_type not in MODEL_TYPES:
        raise ValueError(
            f"--base_model is a {config.model_type}, which is not Meta's model: {', '.join(MODEL_TYPES)} are"
        )
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    entries, refused = rope_params(config.rope_parameters, target)
    qwen2, window = config.model_type == "qwen2", getattr(config, "sliding_window", None)
    if getattr(config, "quantization_config", None):
        method = config.quantization_config.get("quant_method")
        refused.append(f"weights quantized with {method} (give the unquantized model: its adapters fit that, too)")
    if config.hidden_act != "silu":
        refused.append(f"activation {config.hidden_act} (silu only)")
    if window and (not qwen2 or "sliding_attention" in config.layer_types):
        refused.append(f"sliding windows of {window} tokens")
    if getattr(config, "attention_bias", False):
        refused.append("attention_bias: a bias of the attention's output projection")
    if getattr(config, "mlp_bias", False):
        refused.append("mlp_bias")
    if qwen2 and target == "llama":
        refused.append("biases of the query, key and value projections (--target executorch has them)")
    if head_dim * heads != config.hidden_size and target == "llama":
        refused.append(
            f"head_dim {head_dim}, which is not hidden_size {config.hidden_size} / {heads} heads "
            "(--target executorch has it)"
        )
    if refused:
        raise ValueError(f"--target {target} cannot represent this base model: " + "; ".join(refused))
    params = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": heads,
        "n_kv_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "norm_eps": config.rms_norm_eps,
    }
    params |= ffn_params(config.hidden_size, config.intermediate_size) | entries
    if head_dim * heads != config.hidden_size:
        params["head_dim"] = head_dim
    if qwen2:
        params["attention_qkv_bias"] = True
    return params


def meta_name(name):
    """Return Meta's name of a tensor that transformers calls `name`."""
    match = re.fullmatch(r"(?:model\.(layers\.\d+\.))?(.+)\.(weight|bias)", name)
    if not match or match[2] not in META_NAMES:
        raise ValueError(f"--base_model: Meta's model has no counterpart of its tensor {name}")
    return f"{match[1] or ''}{META_NAMES[match[2]]}.{match[3]}"


def permute_for_rope(tensor, num_heads):
    """Move a head's element i of its first half to 2i, and of its second half to 2i + 1.

    tensor   [num_heads * head_dim, ...], a projection's weight or bias; the result is a new tensor
    """
    return tensor.reshape(num_heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def to_meta(weights, config):
    """Turn {transformers' name: tensor} into {Meta's name: tensor}; what is not permuted shares its memory."""
    rotated = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    stored = {}
    for name, tensor in weights.items():
        heads = rotated.get(name.split(".")[-2])
        tensor = permute_for_rope(tensor, heads) if heads else tensor.contiguous()
        if tensor.untyped_storage().nbytes() != tensor.nbytes:  # torch.save would write all that a view looks at
            tensor = tensor.clone()
        stored[meta_name(name)] = tensor
    return stored


# -----------------------------------------------------------------------------
# base and adapter


def load_source(base, dtype, allow_pickle):
    """Load the base model of a folder or hub id to the CPU, once all of it is there and is used."""
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            base, dtype=dtype, use_safetensors=None if allow_pickle else True, output_loading_info=True
        )
    except Exception as error:  # transformers, torch and safetensors have their own kinds
        raise ValueError(
            f"--base_model {base} cannot be loaded: {error!s:.500}. PyTorch's *.bin files, pickles that can run "
            "code, are read with --allow_pickle only"
        ) from error
    unused = sorted(name for name in info["unexpected_keys"] if not name.endswith("rotary_emb.inv_freq"))
    for names, what in (sorted(info["missing_keys"]), "in its files"), (unused, "in its configuration"):
        if names:
            raise ValueError(f"--base_model {base}: {len(names)} tensors are not {what}: {', '.join(names[:5])}")
    return model.eval()


@torch.no_grad()
def merge_adapter(model, lora_weights):
    """Return a float32 model with an adapter merged into it, and how far its logits are from those before the merge.

    The difference is relative to the largest logit, on some tokens: base and adapter are run side by side first.
    """
    warnings.filterwarnings("ignore", module="peft")  # on embeddings that are no longer tied
    tokens = torch.arange(64)[None] % model.config.vocab_size
    alone = model(tokens).logits
    model = load_adapter(model, lora_weights).eval()
    # a tied weight becomes two parameters in the same memory: merging into one must not change the other
    seen = set()
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if parameter in seen:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, torch.nn.Parameter(parameter.detach().clone()))
        seen.add(parameter)
    beside = model(tokens).logits
    if torch.equal(alone, beside):
        raise ValueError(f"--lora_weights {lora_weights} changes nothing")
    try:
        model = model.merge_and_unload()
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"--lora_weights {lora_weights} cannot be merged: {error}") from error
    difference = (model(tokens).logits - beside).abs().max() / beside.abs().max()
    return model, difference.item()


def copy_tokenizer_parts(base, lora_weights, folder):
    """Copy the tokenizer's files of the adapter, or else the base, to `folder`, byte for byte; returns their names."""
    carries = lora_weights and (Path(lora_weights) / "tokenizer_config.json").exists()
    wanted = [(lora_weights if carries else base, name) for name in TOKENIZER_PARTS]
    wanted += [(base, "tokenizer.model"), (base, "original/tokenizer.model")]  # Llama 3's own, in Meta's repositories
    for source, name in wanted:
        found = transformers.utils.cached_file(
            source, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
        if found:
            shutil.copyfile(found, folder / Path(name).name)
    return sorted(path.name for path in folder.iterdir())


def check_output(output_dir, overwrite):
    """Refuse an --output_dir that is taken, unless it is an earlier export and may go."""
    out = Path(output_dir)
    if out.is_mount():
        raise ValueError(f"--output_dir {output_dir} is a mount, which cannot be replaced: name a folder in it")
    if not out.exists() or out.is_dir() and not any(out.iterdir()):
        return
    if not (out / "export.json").exists():
        raise ValueError(f"--output_dir {output_dir} exists and is no earlier export: name another folder")
    if not overwrite:
        raise ValueError(f"--output_dir {output_dir} has an earlier export: --overwrite replaces it")


def replace_folder(partial, target):
    """Give the finished folder its name; what had it is deleted after that."""
    old = Path(f"{target}.old.incomplete")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def export_meta(
    *,
    base_model: str = "",
    lora_weights: str = "",
    output_dir: str = "out/state_dict",
    target: str = "llama",
    save_dtype: str = "",
    allow_pickle: bool = False,
    overwrite: bool = False,
):
    """Write Meta's consolidated.00.pth and params.json of a base model, with an adapter merged into it or without.

    Without any flag it takes data/tiny/model, with out/finetune/adapter if that is there.

    Args:
        base_model: hub id or folder of the model.
        lora_weights: folder of a LoRA adapter. Empty: the base model alone.
        output_dir: where everything of this run is written.
        target: what is to load it: llama (Meta's code, and what follows it) or executorch.
        save_dtype: of the written weights: float32, bfloat16 or float16. Empty: the base's own.
        allow_pickle: read weights from PyTorch's pickle files, if there are no safetensors.
        overwrite: replace what an earlier run left in --output_dir.
    """
    # 1. check flags
    if target not in ("llama", "executorch"):
        raise ValueError(f"--target {target}: one of llama, executorch")
    if save_dtype not in ("", "bfloat16", "float16", "float32"):
        raise ValueError(f"--save_dtype {save_dtype}: one of bfloat16, float16, float32")
    if not base_model:
        base_model = "data/tiny/model"
        trained = Path("out/finetune/adapter")
        lora_weights = lora_weights or (str(trained) if (trained / "adapter_config.json").exists() else "")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if lora_weights and not (Path(lora_weights) / name).exists():
            raise ValueError(f"--lora_weights {lora_weights}: no adapter there ({name})")
    base = find_base(base_model)
    check_output(output_dir, overwrite)
    quiet_libraries()
    config = load_config(base)
    params = meta_params(config, target)

    # 2. base model, adapter merged
    print(
        f"export_state_dict.py  {base_model} + {lora_weights or 'no adapter'} -> {output_dir}    {target}", flush=True
    )
    model = load_source(base, "auto", allow_pickle)
    dtype, difference = getattr(torch, save_dtype) if save_dtype else model.dtype, None
    if lora_weights:
        model, difference = merge_adapter(model.float(), lora_weights)
        params["n_layers"] = model.config.num_hidden_layers  # an adapter may repeat layers
        print(f"  merged      in float32; logits before and after differ by {difference:.1e} of the largest")
        if not difference < 1e-4:
            raise ValueError(f"--lora_weights {lora_weights} cannot be merged: logits change by {difference:.1e}")
    weights, dtype_name = model.to(dtype).state_dict(), str(dtype).removeprefix("torch.")
    broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"{len(broken)} tensors are not finite in {dtype_name}, {broken[0]} among them: --save_dtype")

    # 3. write beside the target
    target_folder = Path(output_dir).resolve()  # a link stays one
    partial = Path(f"{target_folder}.incomplete")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    try:
        partial.mkdir(parents=True)
        try:
            torch.save(to_meta(weights, config), partial / "consolidated.00.pth")
        except RuntimeError as error:  # torch's word for a full disk is "unexpected pos"
            raise ValueError(f"--output_dir {output_dir}: writing failed; is the disk full? {error}") from error
        write_json(partial / "params.json", params)
        summary = {
            "base_model": base_model,
            "lora_weights": lora_weights,
            "target": target,
            "difference": difference,
            "dtype": dtype_name,
            "tensors": len(weights),
            "bos_token_id": config.bos_token_id,
            "eos_token_id": config.eos_token_id,
            "max_position_embeddings": config.max_position_embeddings,
            "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        }
        write_json(partial / "export.json", summary)
        files = copy_tokenizer_parts(base, lora_weights, partial)
        replace_folder(partial, target_folder)
    except BaseException:  # an interrupt, too
        shutil.rmtree(partial, ignore_errors=True)
        raise
    print(f"wrote {output_dir}: {', '.join(files)}")
    if not {"tokenizer.model", "tokenizer.json"} & set(files):
        print(f"there is no tokenizer in {base_model}: add it yourself")
    if params.get("use_scaled_rope") and target == "executorch":
        # its loader sets the factor to 32 for all but llama3 and llama3_1, whatever params.json says
        print(f"in ExecuTorch, base.model_class=llama3_1 keeps the RoPE scaling's factor {params['rope_scale_factor']}")
    print(f'Next: torch.load("{output_dir}/consolidated.00.pth", weights_only=True, mmap=True)')
    return summary


if __name__ == "__main__":
    run_cli(export_meta)
