"""
Merge a LoRA adapter into its base model and write a Hugging Face checkpoint that every runtime reads.

    reads    --base_model    a folder or hub id with safetensors files
             --lora_weights  an adapter folder of finetune.py, or any PEFT LoRA adapter
    writes   --output_dir    model*.safetensors, config.json, generation_config.json, tokenizer files, README.md,
                             export.json (what was done, and the figures of the self-check), a Modelfile for Ollama
    then     python generate.py --base_model OUT, vllm serve OUT, transformers serve OUT, export_gguf.py

    default  python export_hf_checkpoint.py         data/tiny/model with out/finetune/adapter, into out/export
    any      python export_hf_checkpoint.py --base_model Qwen/Qwen2.5-7B --lora_weights A --output_dir out/merged
    vLLM     python export_hf_checkpoint.py --quantize fp8

The weights stay on disk. One file of the output after the other is put together: an adapted layer is read, merged in
float32 by PEFT's own layer and rounded once, every other tensor is copied. Then base + adapter and the written files
answer the same prompts, a layer at a time. The folder gets its name last.

Shapes in comments: B prompts, T tokens, N positions of all prompts, V vocabulary.
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
import torch.nn.functional as F
import transformers
from accelerate.hooks import attach_align_device_hook, remove_hook_from_submodules
from accelerate.utils import OffloadedWeightsLoader, set_module_tensor_to_device
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, load_peft_weights
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

HERE = Path(__file__).resolve().parent
PEFT_LAYERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)  # that hold a module of the base
PIECE = 2**18  # elements merged at a time: a megabyte of float32, which stays in a cache
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.*",
)
# what Ollama converts itself
OLLAMA = ("LlamaForCausalLM", "Qwen2ForCausalLM", "MixtralForCausalLM", "Phi3ForCausalLM", "Gemma2ForCausalLM")
# largest mean KL divergence that passes, in nats; measured figures are in docs/export.md
MAX_KL = {"": 1e-3, "fp8": 0.1, "int8": 0.1, "nf4": 0.5}
QUESTIONS = [
    "Tom has 6 boxes with 7 coins in each. He gives 12 coins away. How many coins does Tom have now?",
    "Write one sentence about the sea in winter, then translate it into French and into German.",
    "Explain in a few words why the sky is blue, and name a book in which one can read more about it.",
    "def mean(numbers):  # complete this function, and say what it does with an empty list of numbers",
]

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


# -----------------------------------------------------------------------------
# base and adapter


def base_folder(base_model, allow_pickle):
    """Return the folder of a base model; what the hub has of it is downloaded."""
    path = local_path(base_model)
    if path:
        if not (path / "config.json").exists():
            raise ValueError(f"--base_model {base_model}: no model is in this folder (config.json)")
        return path
    wanted = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"] + ["pytorch_model*.bin"] * allow_pickle
    try:
        return Path(snapshot_download(base_model, allow_patterns=wanted))
    except Exception as error:  # the hub client raises dozens of kinds
        raise ValueError(f"--base_model {base_model}: the hub could not give it: {error}") from error


def load_model(folder, **options):
    """Return the model in a folder, once all of its weights are there."""
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        auto = AutoModelForImageTextToText if "_vl" in config.model_type else AutoModelForCausalLM
        model, info = auto.from_pretrained(folder, output_loading_info=True, **options)
    except Exception as error:  # transformers, huggingface_hub, torch and safetensors have their own kinds
        raise ValueError(
            f"{folder}: the model cannot be loaded: {error!s:.500}. PyTorch's *.bin files, pickles that can run "
            "code, are read with --allow_pickle only"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"{folder}: {len(missing)} tensors are not in its files: {', '.join(missing[:3])}")
    return model.eval()


def open_model(folder, scratch, **options):
    """Return a model whose weights stay on disk, and what reads them: a mapping {parameter: float32 tensor}.

    In a forward pass each module reads its weights and forgets them again. `weights.index` says in which file and under
    which name a parameter lies; what transformers makes of several tensors (experts) lies in files in `scratch`.
    """
    options |= {"device_map": {"": "disk"}, "offload_folder": str(scratch)}
    model = load_model(folder, dtype="auto", **options).float()  # in float32, transformers would read the files now
    hooks = [module._hf_hook for module in model.modules() if hasattr(module, "_hf_hook")]
    weights = next(hook.weights_map.dataset for hook in hooks if getattr(hook, "weights_map", None))
    for entry in weights.index.values():
        entry["dtype"] = "float32"
    for name, other in model.all_tied_weights_keys.items():
        weights.index.setdefault(name, weights.index[other])
    return model, weights


def check_adapter(lora_weights, allow_pickle):
    """Refuse an adapter folder that cannot be merged, whatever the base; returns its configuration."""
    folder, flag = Path(lora_weights), f"--lora_weights {lora_weights}"
    if not (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{flag}: no adapter there (adapter_config.json). `python finetune.py` makes out/finetune/adapter; "
            "--base_model data/tiny/model exports that alone"
        )
    if not (folder / "adapter_model.safetensors").exists() and not allow_pickle:
        raise ValueError(f"{flag}: no adapter_model.safetensors there; a pickle (*.bin) is read with --allow_pickle")
    config = read_json(folder / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{flag}: an adapter of type {config.get('peft_type')}; only LoRA is merged here")
    if str(config.get("init_lora_weights")).lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise ValueError(
            f"{flag}: it was initialised with {config['init_lora_weights']}, which changes the base model too. Save it "
            "as a plain LoRA (PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)), and merge that"
        )
    return config


def add_adapter(model, weights, lora_weights):
    """Return PEFT's model of an open model and an adapter; its base's weights stay on disk, too."""
    remove_hook_from_submodules(model)
    del model.hf_device_map
    # PEFT moves an adapter to the device of its layer, and the meta device would lose it: so until the adapter is there
    # each weight of the base is one number, repeated
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        set_module_tensor_to_device(model, name, "cpu", value=torch.zeros(()).expand(parameter.shape))
    blank = set(model.parameters())
    warnings.filterwarnings("ignore", module="peft")  # on missing tensors, refused below, and on tied embeddings
    try:
        model = PeftModel.from_pretrained(model, lora_weights, low_cpu_mem_usage=True, torch_device="cpu")
        found = set(load_peft_weights(lora_weights, device="cpu"))
    except Exception as error:  # peft, torch and safetensors have their own kinds
        raise ValueError(
            f"--lora_weights {lora_weights} is damaged or does not fit this base model: {error!s:.800}"
        ) from error
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    unknown = found - expected - set(model.state_dict())  # the last: embeddings of the base that it carries
    lines = [f"  unknown to the base: {name}" for name in sorted(unknown)]
    lines += [f"  not in the adapter: {name}" for name in sorted(expected - found)]
    if lines:
        raise ValueError(f"--lora_weights {lora_weights} is of another base, or damaged:\n" + "\n".join(lines[:10]))

    in_memory, index = {}, {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter in blank:
            stored = re.sub(r"\.(base_layer|original_module|token_adapter)\b", "", name)
            index[name] = weights.index[stored.removeprefix("base_model.model.")]
        else:
            in_memory[name] = parameter.detach().float()
    attach_align_device_hook(
        model,
        execution_device="cpu",
        offload=True,
        weights_map=OffloadedWeightsLoader(state_dict=in_memory, index=index),
        preload_module_classes=[type(layer).__name__ for layer in model.modules() if isinstance(layer, PEFT_LAYERS)],
    )
    return model


# -----------------------------------------------------------------------------
# merge


def merge_module(layer, name):
    """Return {parameter: float32 tensor} of the module `name` of the base, once PEFT's layer around it has merged."""
    layer._hf_hook.pre_forward(layer)  # reads the weights
    for parameter in layer.parameters():
        parameter.data = parameter.data.clone()  # PEFT adds in place, and the adapter may carry the embeddings
    if hasattr(layer, "unload_and_optionally_merge_module"):  # modules_to_save, trainable tokens
        merged = layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    else:
        layer.merge()
        merged = layer.get_base_layer()
    tensors = {f"{name}.{leaf}": value for leaf, value in merged.state_dict().items()}
    for part in layer.modules():
        getattr(part, "merged_adapters", []).clear()
    layer.to("meta")
    return tensors


@torch.no_grad()
def merge_rows(layer, weight, dtype):
    """Return what merge_module would of plain LoRA, rounded, a few rows at a time, which stay in a processor's cache.

    A row of the update comes from one row of lora_B.
    """
    base, a, b = layer.get_base_layer(), layer.lora_A["default"], layer.lora_B["default"]
    stored, on_meta = layer._hf_hook.weights_map, (base.weight, a.weight, b.weight)
    merged = torch.empty(weight.shape, dtype=dtype)
    a.weight = nn.Parameter(stored["lora_A.default.weight"])
    rows = max(1, PIECE // weight.shape[1])
    for i in range(0, len(weight), rows):
        b.weight = nn.Parameter(stored["lora_B.default.weight"][i : i + rows])
        base.weight = nn.Parameter(weight[i : i + rows].to(torch.float32, copy=True))
        layer.merge()
        layer.merged_adapters.clear()
        merged[i : i + rows] = base.weight
    base.weight, a.weight, b.weight = on_meta
    return merged


def is_plain(layer):
    """Say whether a layer of PEFT is plain LoRA on a linear layer."""
    return type(layer) is LoraLinear and not (
        layer.lora_variant or layer.fan_in_fan_out or any(layer.lora_bias.values())
    )


def read_tensor(entry):
    """Return a tensor as it is on disk: a view of its file, which is read when it is used."""
    with safe_open(entry["safetensors_file"], "pt") as file:
        return file.get_tensor(entry["weight_name"])


def merge_by_shard(base, weights, adapted, untied, target, dtype, max_shard_size):
    """Write the base, with its modules `adapted` merged, in files of at most `max_shard_size`, and their index.

    untied   parameters to write beside the ones that the base ties them to
    dtype    of the floating-point tensors; None for what each is on disk
    """
    plan, parameters = {}, {}
    for parameter, entry in weights.index.items():
        name = entry["weight_name"]
        if parameter in untied:
            name = parameter
        elif parameter in base.all_tied_weights_keys:
            continue
        parameters[name] = parameter
        plan[name] = read_tensor(entry).to("meta")
        if plan[name].is_floating_point():
            plan[name] = plan[name].to(dtype)
    shards = split_torch_state_dict_into_shards(plan, max_shard_size=max_shard_size)
    ready, changed = {}, False
    for filename, names in shards.filename_to_tensors.items():
        shard = {}
        for name in names:
            parameter, new_dtype = parameters[name], plan[name].dtype
            before = value = read_tensor(weights.index[parameter])
            module = next((other for other in adapted if parameter.startswith(f"{other}.")), None)
            layer = base.get_submodule(module) if module else None
            if layer and is_plain(layer):
                if parameter == f"{module}.weight":
                    value = merge_rows(layer, value, new_dtype)
            elif layer:
                if parameter not in ready:
                    ready |= merge_module(layer, module)
                value = ready.pop(parameter)
            shard[name] = value = value.to(new_dtype).contiguous()
            if module and not changed:
                changed = not torch.equal(value, before.to(new_dtype))
            if not torch.stack(value.aminmax()).isfinite().all():
                raise ValueError(f"{name}: NaN, or numbers too large for {new_dtype}")
        save_file(shard, target / filename, metadata={"format": "pt"})
    if adapted and not changed:
        raise ValueError(
            f"the adapter changes nothing: zero, or too small for {new_dtype}, at {', '.join(adapted[:3])}, ..."
        )
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        write_json(target / "model.safetensors.index.json", index)


def merge_whole(source, lora_weights, target, untied, dtype, max_shard_size, **options):
    """Merge with the whole model in memory, and let transformers write it back in the form of its files."""
    model = load_model(source, dtype=torch.float32, **options)
    for name in untied:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        setattr(module, leaf, nn.Parameter(getattr(module, leaf).detach().clone()))
    if lora_weights:
        model = PeftModel.from_pretrained(model, lora_weights, torch_device="cpu").merge_and_unload()
    model.to(dtype).save_pretrained(target, max_shard_size=max_shard_size)


def quantize_model(source, target, method, max_shard_size):
    """Write the model in `source` quantized, by bitsandbytes (nf4) or compressed-tensors (fp8, int8).

    The output embedding and the vision tower stay as they are.
    """
    if method == "nf4":
        settings = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=["lm_head", "visual", "model.visual"],  # as vLLM and as transformers call it
        )
        load_model(source, quantization_config=settings).save_pretrained(target, max_shard_size=max_shard_size)
        return
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams

    model = load_model(source, dtype="auto")
    scheme = preset_name_to_scheme({"fp8": "FP8_DYNAMIC", "int8": "INT8"}[method], ["Linear"])
    # weights are restored when the whole model runs, but transformers' generate() runs the vision tower before that
    settings = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head", "re:.*visual.*"])
    apply_quantization_config(model, settings, show_progress=False)
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):  # one scale a row
            extremes = module.weight.aminmax(dim=1, keepdim=True)
            module.weight_scale.data = calculate_qparams(*extremes, scheme.weights)[0]
    compressor = ModelCompressor.from_pretrained_model(model)
    # its own list has the names of the files, which transformers does not match with its modules'
    compressor.quantization_config.ignore = settings.ignore
    compressor.compress_model(model)
    model.save_pretrained(target, max_shard_size=max_shard_size)
    compressor.update_config(target)


# -----------------------------------------------------------------------------
# what runtimes read beside the weights


def read_json(path):
    """Return what a JSON file holds."""
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def portable_config(folder, settings, untied, dtype):
    """Return the config.json of a base with the names that old and new runtimes read: RoPE and dtype, twice each.

    settings is the same as transformers read it, with its defaults. transformers 5 writes rope_parameters and dtype;
    Ollama, vLLM and others still read rope_theta, rope_scaling and torch_dtype, and take 10000 and no scaling where
    they are missing.
    """
    config = read_json(folder / "config.json")
    text = config.get("text_config", config)
    rope = getattr(settings.get_text_config(), "rope_parameters", None) or {}
    if "rope_theta" in rope:  # not the kind that differs from layer to layer
        text["rope_parameters"], text["rope_theta"] = rope, rope["rope_theta"]
        if rope["rope_type"] != "default":
            text["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    for level in (config, text):
        level["dtype"] = level["torch_dtype"] = dtype
        if untied:
            level["tie_word_embeddings"] = False
    return config


def copy_files(patterns, source, target):
    """Copy the files of a folder whose names fit, byte for byte."""
    for pattern in patterns:
        for path in source.glob(pattern):
            shutil.copyfile(path, target / path.name)


def copy_tokenizer(source, target):
    """Copy a tokenizer's files; the chat template goes into both of the places that runtimes read.

    Ollama and older runtimes look for it in tokenizer_config.json only, transformers 5 writes chat_template.jinja only.
    """
    copy_files(TOKENIZER_FILES, source, target)
    path, jinja = target / "tokenizer_config.json", target / "chat_template.jinja"
    config = read_json(path)
    if jinja.exists():
        write_json(path, config | {"chat_template": jinja.read_text("utf-8")})
    elif isinstance(config.get("chat_template"), str):
        jinja.write_text(config["chat_template"], "utf-8")


def write_companions(source, lora_weights, folder, settings):
    """Write what a model has beside weights and configuration: the adapter's, where that has it, or the base's."""
    places = [source, Path(lora_weights)] if lora_weights else [source]
    for place in places:
        copy_files(["*processor_config.json", "generation_config.json"], place, folder)
    if not (folder / "generation_config.json").exists():
        write_json(folder / "generation_config.json", {"eos_token_id": settings.get_text_config().eos_token_id})
    tokenizers = [place for place in places if (place / "tokenizer_config.json").exists()]
    if tokenizers:
        copy_tokenizer(tokenizers[-1], folder)


def write_modelfile(folder, context):
    """Write Ollama's Modelfile: where the weights are, what ends an answer, and how long the context is.

    It has no TEMPLATE: Ollama renders with the chat template that the model carries, since its version 0.30.
    """
    stops = read_json(folder / "generation_config.json").get("eos_token_id")
    if isinstance(stops, int):
        stops = [stops]
    lines = ["FROM ."]
    if stops and (folder / "tokenizer_config.json").exists():
        for text in AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(stops):
            lines.append(f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}")
    lines.append(f"PARAMETER num_ctx {context}\n")
    (folder / "Modelfile").write_text("\n".join(lines), "utf-8")


def model_card(base_model, lora_weights, report):
    """Return README.md of the exported model."""
    check = "not made"
    if report["check"]:
        check = "KL divergence {kl:.2e} nats, largest logit difference {logit_diff:.2e}".format(**report["check"])
    return f"""---
library_name: transformers
---

# {Path(base_model).name}

| what | value |
|---|---|
| base model | {base_model} |
| adapter | {lora_weights or "none"} |
| merged modules | {len(report["merged"])} |
| dtype | {report["dtype"]} |
| comparison with base + adapter in float32 | {check} |

Made by export_hf_checkpoint.py; export.json says more.
"""


# -----------------------------------------------------------------------------
# self-check


def check_prompts(folder, vocab_size):
    """Return token ids [B, T] to compare two models on: the ends of a few prompts; without a template, random ids."""
    if not (folder / "chat_template.jinja").exists():
        return torch.randint(vocab_size, (4, 24), generator=torch.Generator().manual_seed(0))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [[{"role": "user", "content": text}] for text in QUESTIONS]
    rows = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    length = min(24, *(len(ids) for ids in rows))
    return torch.tensor([ids[-length:] for ids in rows])


def image_prompt(folder, config):
    """Return the inputs of an image and some tokens after it; None for a model that takes no images."""
    if "_vl" not in config.model_type:
        return None
    processor = AutoImageProcessor.from_pretrained(folder)
    stripes = torch.arange(14112).byte().reshape(3, 56, 84)
    inputs = processor(images=[stripes], return_tensors="pt")
    pads = int(inputs["image_grid_thw"].prod()) // processor.merge_size**2
    ids = [config.vision_start_token_id, *[config.image_token_id] * pads, config.vision_end_token_id, *range(10, 34)]
    inputs["input_ids"] = torch.tensor([ids])
    inputs["mm_token_type_ids"] = inputs["input_ids"].eq(config.image_token_id).int()
    return inputs


@torch.no_grad()
def logits_of(model, ids, picture):
    """Return the logits [N, V] of token ids [B, T] and, where there is one, of `image_prompt`."""
    logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
    if picture:
        logits = torch.cat([logits, model(**picture, use_cache=False).logits[0]])
    return logits


def compare(reference, other):
    """Return the mean KL divergence in nats and the largest difference of a logit between two models' logits [N, V]."""
    p, q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    kl = F.kl_div(q, p, log_target=True, reduction="batchmean").item()
    return {"kl": kl, "logit_diff": (reference - other).abs().max().item()}


def self_check(model, adapter, folder, scratch, quantize):
    """Compare what is in `folder` with base + adapter: the same prompts, from the files on disk.

    In float32; a quantized model in the dtype of the rest of its weights.
    """
    ids = check_prompts(folder, model.config.get_text_config().vocab_size)
    picture = image_prompt(folder, model.config)
    reference, effect = logits_of(model, ids, picture), None
    if adapter:
        with adapter.disable_adapter():
            effect = compare(reference, logits_of(model, ids, picture))["kl"]
    if quantize:
        written = load_model(folder, dtype="auto")
    else:
        written, _ = open_model(folder, scratch / "written")
    return compare(reference, logits_of(written, ids, picture)) | {"effect": effect}


# -----------------------------------------------------------------------------
# export


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
        check: compare what was written with base + adapter.
        max_kl: largest mean KL divergence in nats that passes. 0: 0.001; 0.1 for fp8 and int8, 0.5 for nf4.
        allow_pickle: read weights from PyTorch's pickle files, if there are no safetensors.
    """
    # 1. check flags
    flags = dict(locals())
    if not base_model:
        base_model = "data/tiny/model"
        lora_weights = lora_weights or "out/finetune/adapter"
    if save_dtype not in ("", "float32", "float16", "bfloat16"):
        raise ValueError(f"--save_dtype {save_dtype}: one of float32, float16, bfloat16")
    if quantize not in MAX_KL:
        raise ValueError(f"--quantize {quantize}: one of fp8, int8, nf4")
    max_kl = max_kl or MAX_KL[quantize]
    try:
        split_torch_state_dict_into_shards({}, max_shard_size=max_shard_size)
    except ValueError:
        raise ValueError(f"--max_shard_size {max_shard_size}: a size such as 400MB or 5GB") from None
    check_output(output_dir, overwrite)
    config = check_adapter(lora_weights, allow_pickle) if lora_weights else {}
    quiet_libraries()
    logging.getLogger("accelerate").setLevel("ERROR")  # weights are on disk on purpose

    # 2. base and adapter, without their weights
    source, target = base_folder(base_model, allow_pickle), Path(output_dir).resolve()  # a link stays one
    if "quantization_config" in read_json(source / "config.json"):
        raise ValueError(
            f"--base_model {base_model} is quantized: a merge would be rounded to its few bits, far more than the "
            "adapter changes. Merge onto the model that it was made from, and then --quantize"
        )
    print(f"export_hf_checkpoint.py  {base_model} + {lora_weights or 'no adapter'} -> {output_dir}", flush=True)
    partial = Path(f"{target}.incomplete")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    try:
        partial.mkdir(parents=True)
        scratch = partial / "scratch"
        options = {"use_safetensors": None if allow_pickle else True}
        base, weights = open_model(source, scratch / "base", **options)
        adapter = None
        adapted = []
        if lora_weights:
            adapter = add_adapter(base, weights, lora_weights)
            adapted = [
                name
                for name, module in base.named_modules()
                if isinstance(module, PEFT_LAYERS) and hasattr(module, "_hf_hook")  # not those inside of another
            ]
        untied = []
        for name, other in base.all_tied_weights_keys.items():
            # where both are in the files and differ, transformers does not tie them, whatever config.json says
            equal = torch.equal(read_tensor(weights.index[name]), read_tensor(weights.index[other]))
            if not equal or {name.rpartition(".")[0], other.rpartition(".")[0]} & set(adapted):
                untied.append(name)
        dtype = getattr(torch, save_dtype) if save_dtype else None
        main_dtype = dtype or base.config.dtype
        dtype_name = str(main_dtype).removeprefix("torch.")
        folders = {Path(entry["safetensors_file"]).parent for entry in weights.index.values()}
        whole = folders != {source} or config.get("target_parameters") or config.get("bias", "none") != "none"

        # 3. weights, then what belongs to them
        merged = scratch / "merged" if quantize else partial
        merged.mkdir(parents=True, exist_ok=True)
        if whole:
            merge_whole(source, lora_weights, merged, untied, main_dtype, max_shard_size, **options)
        else:
            merge_by_shard(base, weights, adapted, untied, merged, dtype, max_shard_size)
        settings = portable_config(source, base.config, untied, dtype_name)
        write_json(merged / "config.json", settings)
        if quantize:
            quantize_model(merged, partial, quantize, max_shard_size)
            write_json(partial / "config.json", read_json(partial / "config.json") | settings)
        write_companions(source, lora_weights, partial, base.config)
        if not quantize and type(base).__name__ in OLLAMA:
            write_modelfile(partial, base.config.max_position_embeddings)
        how = "with the whole model in memory: experts, pickles or trained biases" if whole else "a file at a time"
        print(f"  merged      {len(adapted)} modules, {how}")

        # 4. what was written against base + adapter
        report = {
            "base_model": base_model,
            "lora_weights": lora_weights,
            "flags": flags,
            "merged": adapted,
            "dtype": quantize or dtype_name,
            "check": None,
            "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        }
        if check:
            report["check"] = found = self_check(base, adapter, partial, scratch, quantize)
            print(f"  check       KL {found['kl']:.2e} nats, logits differ by at most {found['logit_diff']:.2e}")
            if adapter and not quantize:  # half of what the base alone would have: then most of the update is lost
                max_kl = min(max_kl, max(found["effect"] / 2, 1e-9))
            if not found["kl"] <= max_kl:
                raise ValueError(
                    f"what was written is not base + adapter, and is deleted: the mean KL is {found['kl']:.2e}, above "
                    f"{max_kl:.2e} (without the adapter: {found['effect']}). If rounding is why: --save_dtype float32"
                )
        write_json(partial / "export.json", report)
        (partial / "README.md").write_text(model_card(base_model, lora_weights, report), encoding="utf-8")
        shutil.rmtree(scratch)
        replace_folder(partial, target)
    except BaseException:  # an interrupt, too
        shutil.rmtree(partial, ignore_errors=True)
        raise
    print(f"wrote {output_dir}. Next:\n  python generate.py --base_model {output_dir} --prompt '...'")
    print(f"  vllm serve {output_dir}" + " --dtype float32" * (report["dtype"] == "float32"))
    return report


if __name__ == "__main__":
    run_cli(export)
