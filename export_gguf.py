"""
Write a model, with or without a LoRA adapter, as one GGUF file for llama.cpp and Ollama.

    reads    --base_model    a merged model of export_hf_checkpoint.py, or any Llama, Qwen2 or Qwen3 in safetensors
             --lora_weights  an adapter folder of finetune.py, or any PEFT adapter; it is merged in memory
    writes   --output_dir    model-TYPE.gguf (weights, tokenizer, chat template), Modelfile-TYPE for Ollama
    then     llama-server -m OUT/model-f16.gguf, or ollama create NAME -f OUT/Modelfile-f16

    default  python export_gguf.py         data/tiny/model with out/finetune/adapter, into out/gguf
    any      python export_gguf.py --base_model Qwen/Qwen2.5-0.5B --lora_weights A --outtype q8_0 --output_dir out/mine

The file must make llama.cpp see the tokens that the tokenizer makes, or the model answers nonsense without a word. So
llama.cpp's name for how the tokenizer splits text is found by the rules themselves, and where it has no name for them
nothing is written. Its own converter refuses too; here the message says what would differ.
"""

import copy
import functools
import json
import logging
import re
import sys
import traceback
import warnings
from pathlib import Path
from typing import get_type_hints

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # when it is imported, it asks for an optional package

import fire
import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType, TokenType
from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

HERE = Path(__file__).resolve().parent
FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}  # gguf's names
ARCHITECTURES = ("llama", "qwen2", "qwen3")  # which transformers and llama.cpp call alike
ROPE_TYPES = ("default", "linear", "yarn", "llama3")
ROPE_SETTINGS = {
    "rope_theta",
    "rope_type",
    "type",  # the same, as older configurations say it
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
}
LLAMA3_WORDS = (  # how Llama 3 splits text; Qwen2 takes its digits one by one
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2, ENCODE = ByteLevel(add_prefix_space=False), ByteLevel(add_prefix_space=False, use_regex=False)
LLAMA3 = Sequence([Split(Regex(LLAMA3_WORDS), "isolated"), ENCODE])
# {llama.cpp's name: (what splits text in the same way, whether a word that is a token stays whole whatever the merges
# say)}; llm_tokenizer_bpe in llama.cpp's src/llama-vocab.cpp has the regular expressions
SPLITTERS = {
    "llama-bpe": (LLAMA3, True),
    "smaug-bpe": (LLAMA3, False),
    "qwen2": (Sequence([Split(Regex(LLAMA3_WORDS.replace("{1,3}", "")), "isolated"), ENCODE]), False),
    "gpt-2": (GPT2, False),
    "smollm": (Sequence([Digits(individual_digits=True), GPT2]), False),
}
PROBE = "'tis it's I'M 12345 a  b\t\n\n  c\r\n 1 12,5% (x_y) -> 3e4 née Grüße 東京2024"  # shows what splitters do

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


# -----------------------------------------------------------------------------
# tokenizer


def find_pre_tokenizer(backend):
    """Return llama.cpp's name for how a tokenizer splits text; an error that names the differences if it has none."""
    state, differences = json.loads(backend.to_str()), ""
    model, normalizer = state["model"], state["normalizer"] or {"type": "NFC"}
    if model["type"] != "BPE" or model["byte_fallback"] or normalizer["type"] != "NFC":
        raise ValueError("neither byte-level BPE that leaves text as it is nor SentencePiece with its tokenizer.model")

    def describe(splitter):
        rules = re.sub(b'"trim_offsets":[a-z]+,', b"", splitter.__getstate__())
        return rules, {piece for piece, _ in splitter.pre_tokenize_str(PROBE)}

    rules, pieces = describe(backend.pre_tokenizer)
    for name, (splitter, whole) in SPLITTERS.items():
        known, there = describe(splitter)
        if (known, whole) == (rules, model["ignore_merges"]):
            return name
        differences += f"\n  {name}: {sorted(there - pieces)} where the tokenizer has {sorted(pieces - there)}"
    raise ValueError(
        "llama.cpp has no name for how this tokenizer splits text (ignore_merges counts, too). "
        f"Of {PROBE!r} those that it has make{differences}\nIf one is near enough for you: --pre_tokenizer NAME"
    )


def add_tokenizer(writer, tokenizer, kind, stops, size):
    """Add the tokenizer to a GGUF file: `size` tokens, some of them unused; an answer ends with one of `stops`.

    kind  a name of SPLITTERS, or the file of a SentencePiece model
    gguf's SpecialVocab would guess from the files: it takes config.json's BOS where the tokenizer has none.
    """
    tokens = {i: (text, 0.0, TokenType.NORMAL) for text, i in tokenizer.get_vocab().items()}
    for i, token in tokenizer.added_tokens_decoder.items():
        tokens[i] = (token.content, 0.0, TokenType.CONTROL if token.special else TokenType.USER_DEFINED)
    if kind in SPLITTERS:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(kind)
        merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
        writer.add_token_merges([" ".join(pair) for pair in merges])
    else:
        writer.add_tokenizer_model("llama")
        tokens |= dict(enumerate(gguf.SentencePieceVocab(Path(kind).parent).all_tokens()))
    texts, scores, types = zip(*(tokens.get(i, (f"[PAD{i}]", 0.0, TokenType.UNUSED)) for i in range(size)))
    writer.add_token_list(texts)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_add_bos_token(tokenizer("a").input_ids[0] == tokenizer.bos_token_id)
    template = tokenizer.chat_template and tokenizer.get_chat_template()  # of several the default one
    special = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    special |= zip(("eot", "eom"), stops - {tokenizer.eos_token_id})
    for name, number in special.items():
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
        elif template:  # llama.cpp would hand it the text of a default of its own
            template = f"{{%- set {name}_token = '' -%}}{template}"
    if template:
        writer.add_chat_template(template)


# -----------------------------------------------------------------------------
# model


def check_config(config):
    """Refuse a model that llama.cpp cannot run, or would run otherwise than transformers."""
    if config.model_type not in ARCHITECTURES:
        raise ValueError(f"a model of type {config.model_type}; written are {', '.join(ARCHITECTURES)}")
    rope = config.rope_parameters
    if rope["rope_type"] not in ROPE_TYPES or rope.keys() - ROPE_SETTINGS:
        raise ValueError(f"RoPE with {rope}; written are {', '.join(ROPE_TYPES)} with {', '.join(ROPE_SETTINGS)}")
    if config.hidden_act != "silu" or getattr(config, "use_sliding_window", False):
        raise ValueError(f"activation {config.hidden_act}, or a sliding window: not written")


def load_merged(base, lora_weights):
    """Return the base model, with the adapter merged into it in float32 where there is one."""
    model, info = AutoModelForCausalLM.from_pretrained(
        base, dtype="float32" if lora_weights else "auto", use_safetensors=True, output_loading_info=True
    )
    if info["missing_keys"]:
        raise ValueError(f"tensors are missing: {', '.join(sorted(info['missing_keys']))}")
    if not lora_weights:
        return model
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights

    # where the two embeddings are tied, a merge into one must not change the other
    model.lm_head = copy.deepcopy(model.lm_head)
    saved = load_peft_weights(lora_weights)
    model = PeftModel.from_pretrained(model, lora_weights)
    odd = saved.keys() ^ get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    odd -= model.state_dict().keys()  # where embeddings are adapted, peft saves the base's own with the adapter
    if odd:
        raise ValueError(f"{len(odd)} tensors of the adapter do not fit: {', '.join(sorted(odd)[:3])}")
    return model.merge_and_unload()


def add_settings(writer, config):
    """Add what a GGUF file says of the model."""
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
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(
            rope.get("original_max_position_embeddings", config.max_position_embeddings)
        )


def gguf_tensors(model, config):
    """Return {GGUF's name: tensor}, in the order of rows that llama.cpp wants."""
    state = model.state_dict()
    if torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"]):
        del state["lm_head.weight"]  # llama.cpp takes the embedding
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[config.model_type.upper()], config.num_hidden_layers)
    tensors = {}
    for name, tensor in state.items():
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name and config.model_type == "llama":
                # there llama.cpp rotates neighbouring pairs, transformers the two halves of a head
                tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))] = tensor
    if None in tensors:
        raise ValueError(
            "gguf has no name for some of the model's tensors, of layers that an adapter repeats for example"
        )
    if config.rope_parameters["rope_type"] == "llama3":  # llama.cpp divides the frequencies by a tensor of factors
        scaled = model.model.rotary_emb.inv_freq
        exponents = torch.arange(len(scaled)) / len(scaled)
        tensors["rope_freqs.weight"] = config.rope_parameters["rope_theta"] ** -exponents / scaled
    return tensors


def write_tensors(writer, tensors, outtype):
    """Write the file: what was added to it, and the tensors; vectors stay in float32."""
    for name, tensor in tensors.items():
        kind = GGMLQuantizationType[outtype.upper() if tensor.ndim > 1 else "F32"]
        if not (tensor.half() if outtype == "f16" else tensor).isfinite().all():
            raise ValueError(f"{name} has NaN, or numbers too large for {outtype} (bf16 and f32 take larger ones)")
        try:
            data = gguf.quants.quantize(tensor.float().numpy(), kind)
        except gguf.quants.QuantError:
            raise ValueError(f"{name} has rows of {tensor.shape[1]}, which --outtype {outtype} cannot store") from None
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# -----------------------------------------------------------------------------
# export


def export_gguf(
    *,
    base_model: str = "",
    lora_weights: str = "",
    output_dir: str = "out/gguf",
    overwrite: bool = False,
    outtype: str = "f16",
    pre_tokenizer: str = "",
):
    """Write a model as a GGUF file, with a LoRA adapter merged in.

    Without any flag it writes data/tiny/model with out/finetune/adapter.

    Args:
        base_model: hub id or folder of the model.
        lora_weights: folder of a LoRA adapter. Empty: the base model alone.
        output_dir: where everything of this run is written.
        overwrite: replace what an earlier run left in --output_dir.
        outtype: of the weights: f32, f16, bf16 or q8_0; vectors stay f32.
        pre_tokenizer: llama.cpp's name for how text is split: llama-bpe, smaug-bpe, qwen2, gpt-2 or smollm. Empty: the
            one that splits it as the tokenizer does; if there is none, an error says what each does otherwise.
    """
    # 1. flags
    if not base_model:
        base_model, lora_weights = "data/tiny/model", lora_weights or "out/finetune/adapter"
    if outtype not in FILE_TYPES:
        raise ValueError(f"--outtype {outtype}: one of {', '.join(FILE_TYPES)}")
    if pre_tokenizer not in ("", *SPLITTERS):
        raise ValueError(f"--pre_tokenizer {pre_tokenizer}: one of {', '.join(SPLITTERS)}")
    base, adapter = str(local_path(base_model) or base_model), lora_weights and local_path(lora_weights)
    target = Path(output_dir, f"model-{outtype}.gguf")
    if target.exists() and not overwrite:
        raise ValueError(f"{target} exists: --overwrite it, or another --output_dir")
    transformers.utils.logging.disable_progress_bar()
    # on renamed properties, tied embeddings and missing tensors, which are refused below
    warnings.filterwarnings("ignore", module="peft|transformers")

    # 2. the model, once llama.cpp can read it
    source = adapter if adapter and (adapter / "tokenizer_config.json").exists() else base
    try:
        config = transformers.AutoConfig.from_pretrained(base)
        tokenizer = AutoTokenizer.from_pretrained(source)
        check_config(config)
        kind = transformers.utils.cached_file(base, "tokenizer.model", _raise_exceptions_for_missing_entries=False)
        kind = kind or pre_tokenizer or find_pre_tokenizer(tokenizer.backend_tokenizer)
        if len(tokenizer) > config.vocab_size:
            raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}")
        model = load_merged(base, str(adapter or lora_weights))
        if adapter and (adapter / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(adapter)
    except Exception as error:  # transformers, peft, torch and safetensors have their own kinds
        raise ValueError(f"--base_model {base_model} --lora_weights {lora_weights}: {error!s:.999}") from error
    stops = {tokenizer.eos_token_id, *np.ravel(model.generation_config.eos_token_id).tolist()} - {None}

    # 3. the file, and how Ollama is to run it: with the template that the file carries
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(f"{target}.incomplete")
    writer = gguf.GGUFWriter(partial, config.model_type, use_temp_file=True)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[outtype]])
    add_settings(writer, config)
    add_tokenizer(writer, tokenizer, kind, stops, config.vocab_size)
    write_tensors(writer, gguf_tensors(model, config), outtype)
    partial.replace(target)
    ends = "".join(f"PARAMETER stop {json.dumps(end)}\n" for end in tokenizer.convert_ids_to_tokens(sorted(stops)))
    modelfile = target.with_name(f"Modelfile-{outtype}")
    modelfile.write_text(f"FROM ./{target.name}\nPARAMETER num_ctx {config.max_position_embeddings}\n{ends}")
    print(
        f"wrote {target} ({target.stat().st_size / 1e6:,.1f} MB; tokenizer {kind}) and {modelfile.name}. Next:\n"
        f"  llama-server -m {target}\n"
        f"  ollama create {Path(base_model).name} -f {modelfile}"
    )


if __name__ == "__main__":
    run_cli(export_gguf)
