"""
export_hf_checkpoint.py: every kind of LoRA bit for bit as PEFT merges it in float32, what runtimes read beside the
weights, the self-check, quantized files read back, exports that are killed, and bad input.

    .venv/bin/python -m pytest tests/test_export_hf.py
"""

import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

import export_hf_checkpoint as script
from export_hf_checkpoint import export

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "data" / "tiny" / "model"
VL = ROOT / "data" / "tiny_vl" / "model"
SIZES = {"vocab_size": 160, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 128}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES),
    "gpt2": GPT2Config(vocab_size=160, n_embd=64, n_layer=2, n_head=4, n_positions=128),
    "moe": Qwen3MoeConfig(**SIZES, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, head_dim=16),
}
LLAMA3 = {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
KINDS = {
    "plain": ("llama", {"target_modules": LINEAR}),
    "rslora": ("llama", {"target_modules": LINEAR, "use_rslora": True}),
    "patterns": ("llama", {"target_modules": LINEAR, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}}),
    "dora": ("llama", {"target_modules": LINEAR, "use_dora": True}),
    "lora_bias": ("qwen2", {"target_modules": ["q_proj", "k_proj", "v_proj"], "lora_bias": True}),
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "dora_embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "modules_to_save": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    ),
    "mica": ("llama", {"target_modules": LINEAR, "init_lora_weights": "mica"}),
    "some_layers": ("llama", {"target_modules": ["down_proj"], "layers_to_transform": [1]}),
    "trainable_tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 5]}}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "experts": ("moe", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "expert_down": ("moe", {"target_modules": [], "target_parameters": EXPERTS[1:], "use_rslora": True}),
    "router": ("moe", {"target_modules": ["o_proj"], "target_parameters": ["mlp.gate.weight"]}),
    "tied_embedding": ("tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied_head": ("tied", {"target_modules": ["q_proj", "lm_head"]}),
    "tied_both": ("tied", {"target_modules": ["embed_tokens", "lm_head"]}),
    "tied_saved": ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "tied_saved_head": ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tied_saved_both": ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    "kept_tied": ("tied", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "kept_tied_saved": (
        "tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]} | {"ensure_weight_tying": True},
    ),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Return a function that gives the folder of a random bfloat16 model of a kind in CONFIGS."""
    made = {}

    def get(kind):
        if kind not in made:
            torch.manual_seed(0)
            made[kind] = tmp_path_factory.mktemp(kind) / "base"
            model = AutoModelForCausalLM.from_config(CONFIGS[kind])
            for parameter in model.parameters():
                parameter.data.normal_(0, 0.1)
            model.to(torch.bfloat16).save_pretrained(made[kind])
        return made[kind]

    return get


def make_adapter(folder, base, **config):
    """Save a LoRA adapter with random values everywhere; returns its folder."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": False} | config))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def with_adapter(base, adapter):
    """Base + adapter as PEFT runs them, in float32."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter).eval()


def load(folder, dtype=torch.float32, **kwargs):
    """A model as transformers loads it, every tensor of it from the files."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **kwargs)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


@torch.no_grad()
def logits(model, ids=None):
    ids = torch.arange(60).reshape(3, 20) if ids is None else ids
    return model(input_ids=ids).logits.flatten(0, 1).double()


def kl(p, q):
    return F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean().item()


def untied(base):
    """A base in float32 whose two embeddings are separate tensors, as PEFT cannot merge only one of two tied ones."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if getattr(model.config, "tie_word_embeddings", False) and hasattr(model.lm_head, "weight"):
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_bit_for_bit_as_peft_merges_in_float32(kind, bases, tmp_path):
    name, config = KINDS[kind]
    base, adapter = bases(name), make_adapter(tmp_path / "adapter", bases(name), **config)
    flags = {"base_model": str(base), "lora_weights": str(adapter), "max_shard_size": "60KB"}
    report = export(**flags, output_dir=str(tmp_path / "out"))
    before, written = untied(base).state_dict(), load(tmp_path / "out", torch.bfloat16).state_dict()
    if kind == "kept_tied":  # PEFT itself would add the update to the shared tensor twice: merge it into one
        model = PeftModel.from_pretrained(untied(base), adapter)
        merged = model.base_model.model.model.embed_tokens
        merged.merge()
        merged = before | dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), merged.weight.data)
    else:
        merged = PeftModel.from_pretrained(untied(base), adapter).merge_and_unload().state_dict()
    assert merged.keys() == written.keys()
    for key, value in merged.items():
        assert torch.equal(value.bfloat16(), written[key]), key
    changed = {key for key in before if not torch.equal(before[key], merged[key])}
    assert changed and all(any(key.startswith(f"{module}.") for module in report["merged"]) for key in changed)
    assert all(any(key.startswith(f"{module}.") for key in changed) for module in report["merged"])
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1

    expected = logits(with_adapter(base, adapter))
    assert kl(expected, logits(load(tmp_path / "out"))) < 0.02 * kl(expected, logits(load(base)))
    if name == "tied":
        export(**flags, output_dir=str(tmp_path / "exact"), save_dtype="float32")
        assert kl(expected, logits(load(tmp_path / "exact"))) < 1e-9


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_written(bias, bases, tmp_path):
    base = bases("qwen2")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], bias=bias)
    export(base_model=str(base), lora_weights=str(adapter), output_dir=str(tmp_path / "out"), save_dtype="float32")
    expected = PeftModel.from_pretrained(untied(base), adapter).merge_and_unload().state_dict()
    before, written = untied(base).state_dict(), load(tmp_path / "out").state_dict()
    assert all(torch.equal(expected[name], written[name]) for name in expected)
    name = f"model.layers.1.self_attn.{'k' if bias == 'all' else 'q'}_proj.bias"
    assert not torch.equal(before[name], written[name])


def test_embeddings_that_differ_are_not_tied_whatever_config_json_says(bases, tmp_path):
    """PEFT saves such a model where LoRA on one of two tied embeddings was merged; transformers loads both."""
    base, ids = shutil.copytree(bases("llama"), tmp_path / "base"), torch.arange(60).reshape(3, 20)
    config = json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": True}
    (base / "config.json").write_text(json.dumps(config))
    adapter = make_adapter(tmp_path / "adapter", bases("llama"), target_modules=LINEAR)
    flags = {"base_model": str(base), "lora_weights": str(adapter), "output_dir": str(tmp_path / "out")}
    export(**flags, save_dtype="float32")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert kl(logits(with_adapter(bases("llama"), adapter), ids), logits(load(tmp_path / "out"), ids)) < 1e-9


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return (adapter folder with a tokenizer, an export of it) of the embedded model."""
    folder = tmp_path_factory.mktemp("tiny")
    make_adapter(folder / "adapter", BASE, target_modules=["q_proj", "up_proj"])
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = (ROOT / "templates" / "chatml.jinja").read_text(encoding="utf-8")
    tokenizer.save_pretrained(folder / "adapter")
    generation = {"eos_token_id": [3, 0], "pad_token_id": 1}
    (folder / "adapter" / "generation_config.json").write_text(json.dumps(generation))
    export(base_model=str(BASE), lora_weights=str(folder / "adapter"), output_dir=str(folder / "out"))
    return folder / "adapter", folder / "out"


def test_what_lies_beside_the_weights(tiny):
    adapter, out = tiny
    assert set(files(out)) == set(
        "model.safetensors config.json generation_config.json tokenizer.json tokenizer_config.json "
        "chat_template.jinja Modelfile README.md export.json".split()
    )
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert files(out)[name] == files(adapter)[name]
    template = (adapter / "chat_template.jinja").read_text(encoding="utf-8")
    old, new = (json.loads((folder / "tokenizer_config.json").read_text()) for folder in (adapter, out))
    assert new == old | {"chat_template": template} and "chat_template" not in old
    base, config = (json.loads((folder / "config.json").read_text()) for folder in (BASE, out))
    assert config == base | {"rope_theta": 10000.0, "torch_dtype": "bfloat16"}
    assert (out / "Modelfile").read_text() == (
        'FROM .\nPARAMETER stop "<|im_end|>"\nPARAMETER stop "<|endoftext|>"\nPARAMETER num_ctx 1024\n'
    )
    report, card = json.loads((out / "export.json").read_text()), (out / "README.md").read_text(encoding="utf-8")
    assert len(report["merged"]) == 8 and "| merged modules | 8 |" in card
    assert f"KL divergence {report['check']['kl']:.2e} nats" in card


@pytest.mark.parametrize(
    ("config", "old", "new"),
    [
        (
            LlamaConfig(rope_parameters=LLAMA3),
            {},
            {"rope_theta": 5e5, "rope_scaling": {key: value for key, value in LLAMA3.items() if key != "rope_theta"}},
        ),
        (Qwen2Config(rope_theta=1e6), {"rope_theta": 1e6}, {"rope_theta": 1e6}),
    ],
)
def test_rope_settings_have_old_and_new_names(config, old, new, tmp_path):
    raw = old or config.to_dict()
    raw.pop("dtype", None)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    got = script.portable_config(tmp_path, config, [], "bfloat16")
    assert {key: got.get(key) for key in new} == new
    assert got["rope_parameters"] == config.rope_parameters and got["dtype"] == got["torch_dtype"] == "bfloat16"
    assert "tie_word_embeddings" not in got or not old
    assert type(config).from_dict(got).rope_parameters == config.rope_parameters


@pytest.mark.parametrize("kind", ["fp8", "int8", "nf4"])
def test_quantized_files_load(kind, tiny, tmp_path):
    out = tmp_path / "out"
    flags = {"base_model": str(BASE), "lora_weights": str(tiny[0]), "max_shard_size": "500KB"}
    report = export(**flags, output_dir=str(out), quantize=kind)
    stored = {name: tensor for path in out.glob("*.safetensors") for name, tensor in load_file(path).items()}
    weight = stored["model.layers.0.mlp.down_proj.weight"]
    assert weight.dtype == {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "nf4": torch.uint8}[kind]
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert set(json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]) == set(stored)
    ids, model = script.check_prompts(out, 1024), AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    expected = logits(with_adapter(BASE, tiny[0]), ids)
    got, base = kl(expected, logits(model, ids)), kl(expected, logits(load(BASE), ids))
    assert report["check"]["kl"] == pytest.approx(got, rel=0.05) and got < base / 3
    config = json.loads((out / "config.json").read_text())
    method = "bitsandbytes" if kind == "nf4" else "compressed-tensors"
    assert config["quantization_config"]["quant_method"] == method and config["rope_theta"] == 10000.0
    # Ollama reads none of these, and nothing of the work in between is left
    assert not (out / "Modelfile").exists() and not [path for path in out.iterdir() if path.is_dir()]


@pytest.mark.parametrize("kind", ["fp8", "int8", "nf4"])
def test_quantized_files_of_a_vision_language_model_read_an_image(kind, tmp_path):
    report = export(base_model=str(VL), output_dir=str(tmp_path / "out"), quantize=kind)
    assert report["check"]["kl"] < script.MAX_KL[kind]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {stored[name].dtype for name in stored if "visual" in name} == {torch.bfloat16}
    assert {stored[name].itemsize for name in stored if name.endswith("mlp.down_proj.weight")} == {1}
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype="auto")
    inputs = script.image_prompt(tmp_path / "out", model.config)
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)  # the vision tower runs first
    assert ids.shape[1] > inputs["input_ids"].shape[1]


def flags_of(tiny, tmp_path, **more):
    return {"base_model": str(BASE), "lora_weights": str(tiny[0]), "output_dir": str(tmp_path / "out")} | more


def copy_adapter(tiny, tmp_path, change):
    """Copy the adapter, with `change` applied to its {name: tensor}."""
    folder = shutil.copytree(tiny[0], tmp_path / "changed")
    save_file(change(load_file(folder / "adapter_model.safetensors")), folder / "adapter_model.safetensors")
    return str(folder)


def refused(tmp_path, match, **flags):
    """Check that an export stops with a message, and that nothing is left of it."""
    before = {path: path.read_bytes() for path in BASE.iterdir()}
    with pytest.raises(ValueError, match=match) as error:
        export(**flags)
    assert error.traceback[-1].path == Path(script.__file__)  # run_cli shows the message alone
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]
    assert {path: path.read_bytes() for path in BASE.iterdir()} == before


ONE = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda w: {key.replace(ONE, ONE.replace("0", "9")): value for key, value in w.items()}, "layers.9.self_attn"),
        (lambda w: {key: value for key, value in w.items() if key != ONE}, f"not in the adapter: {ONE}"),
        (lambda w: w | {ONE.replace("q_proj", "k_proj"): w[ONE].clone()}, "unknown to the base: .*k_proj"),
        (lambda w: w | {ONE: w[ONE][:, :64].contiguous()}, r"does not fit(.*\n)+.*q_proj.*\[4, 64\].*\[4, 128\]"),
        (lambda w: {key: torch.zeros_like(value) for key, value in w.items()}, "changes nothing.*layers.0.self_attn.q"),
        (lambda w: {k: v if "lora_A" in k else torch.zeros_like(v) for k, v in w.items()}, "changes nothing"),
        (lambda w: {k: v if "lora_B" in k else torch.zeros_like(v) for k, v in w.items()}, "changes nothing"),
        (lambda w: w | {ONE: w[ONE] * float("nan")}, "layers.0.self_attn.q_proj.weight: NaN, or numbers too large"),
        (lambda w: {key: value * 1e30 for key, value in w.items()}, "NaN, or numbers too large"),
    ],
    ids=["renamed", "missing", "extra", "shape", "zero", "zero_b", "zero_a", "nan", "overflow"],
)
def test_adapters_that_do_not_fit(change, match, tiny, tmp_path):
    adapter = copy_adapter(tiny, tmp_path, change)
    refused(tmp_path, match, **flags_of(tiny, tmp_path, lora_weights=adapter))


def test_adapter_of_another_base_lists_what_differs(tiny, bases, tmp_path):
    refused(
        tmp_path,
        r"does not fit(.*\n)+.*layers.0.self_attn.q_proj.*128\].*64\]",
        **flags_of(tiny, tmp_path, base_model=str(bases("llama"))),
    )
    refused(tmp_path, "does not fit", **flags_of(tiny, tmp_path, base_model=str(bases("gpt2"))))


@pytest.mark.parametrize(("name", "value"), [("init_lora_weights", "pissa"), ("peft_type", "LOHA")])
def test_adapters_of_other_kinds(name, value, tiny, tmp_path):
    folder = shutil.copytree(tiny[0], tmp_path / "changed")
    config = json.loads((folder / "adapter_config.json").read_text()) | {name: value}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    refused(
        tmp_path,
        value if name == "init_lora_weights" else "only LoRA",
        **flags_of(tiny, tmp_path, lora_weights=str(folder)),
    )


def test_damaged_weights(tiny, tmp_path):
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(BASE).save_pretrained(base, max_shard_size="500KB")
    shards, flags = sorted(base.glob("*.safetensors")), flags_of(tiny, tmp_path, base_model=str(base))
    whole = shards[1].read_bytes()
    shards[1].unlink()
    refused(tmp_path, f"cannot be loaded: (.*\n)*.*{shards[1].name}", **flags)
    for size in (len(whole) - 1, 100, 0):
        shards[1].write_bytes(whole[:size])
        refused(tmp_path, "cannot be loaded", **flags)
    shards[1].write_bytes(whole)
    index = base / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    whole["weight_map"] = {k: v for k, v in whole["weight_map"].items() if v != shards[1].name}
    index.write_text(json.dumps(whole))
    refused(tmp_path, "are not in its files", **flags)


def test_damaged_configurations(tiny, tmp_path):
    base, adapter = shutil.copytree(BASE, tmp_path / "base"), shutil.copytree(tiny[0], tmp_path / "adapter")
    flags = flags_of(tiny, tmp_path, base_model=str(base), lora_weights=str(adapter))
    for path in (base / "config.json", adapter / "adapter_config.json", adapter / "tokenizer_config.json"):
        whole = path.read_text()
        path.write_text(whole[:-9])
        refused(tmp_path, f"{path.name} is damaged: ", **flags)
        path.write_text(whole)
    whole = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(whole | {"model_type": "unheard-of"}))
    refused(tmp_path, "the model cannot be loaded: .*unheard-of", **flags)
    del whole["architectures"]  # transformers does without
    (base / "config.json").write_text(json.dumps(whole))
    export(**flags)
    assert (tmp_path / "out" / "Modelfile").exists()


def test_pickle_files_only_when_allowed(tiny, tmp_path):
    base = shutil.copytree(BASE, tmp_path / "base")
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    adapter = shutil.copytree(tiny[0], tmp_path / "adapter")
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    refused(tmp_path, "--allow_pickle", **flags_of(tiny, tmp_path, base_model=str(base)))
    refused(tmp_path, "--allow_pickle", **flags_of(tiny, tmp_path, lora_weights=str(adapter)))
    export(**flags_of(tiny, tmp_path, base_model=str(base), lora_weights=str(adapter)), allow_pickle=True)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(tiny[1] / "model.safetensors").keys()
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, load_file(tiny[1] / "model.safetensors")[name])


def test_a_configuration_that_cannot_be(tiny, tmp_path):
    base = shutil.copytree(BASE, tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"hidden_size": 126}
    (base / "config.json").write_text(json.dumps(config))
    flags = flags_of(tiny, tmp_path, base_model=str(base))
    refused(tmp_path, "cannot be loaded: (.*\n)*.*126. is not a multiple", **flags)


def test_quantized_base(tiny, tmp_path):
    export(base_model=str(BASE), output_dir=str(tmp_path / "base"), quantize="nf4")
    refused(
        tmp_path,
        "is quantized.*Merge onto the model that it was made",
        **flags_of(tiny, tmp_path, base_model=str(tmp_path / "base")),
    )


def test_full_disk(tiny, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises((OSError, SafetensorError)):
            export(**flags_of(tiny, tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"max_shard_size": "big"}, "400MB or 5GB"),
        ({"save_dtype": "int8"}, "one of float32"),
        ({"quantize": "int4"}, "one of fp8"),
        ({"lora_weights": "nowhere"}, "no adapter there"),
        ({"base_model": "no where"}, "no where: no such file or folder"),
        ({"output_dir": str(BASE), "overwrite": True}, "is no earlier export"),
        ({"output_dir": str(ROOT / "README.md"), "overwrite": True}, "is no earlier export"),
    ],
)
def test_flags_that_cannot_be(more, match, tiny, tmp_path):
    refused(tmp_path, match, **flags_of(tiny, tmp_path, **more))


def test_a_base_mistyped_in_a_folder_that_is_there_is_no_hub_id(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    refused(tmp_path, "mine/merget: no such file or folder", **flags_of(tiny, tmp_path, base_model="mine/merget"))


def test_without_an_adapter_yet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(tmp_path, "python finetune.py")


def test_an_earlier_export_is_kept_unless_overwritten(tiny, tmp_path):
    flags = flags_of(tiny, tmp_path)
    export(**flags)
    first = files(tmp_path / "out")
    with pytest.raises(ValueError, match="--overwrite"):
        export(**flags, save_dtype="float32")
    assert files(tmp_path / "out") == first
    with pytest.raises(ValueError, match="mean KL is"):
        export(**flags, overwrite=True, max_kl=1e-30)
    assert files(tmp_path / "out") == first
    export(**flags, overwrite=True, save_dtype="float32")
    assert load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].dtype == torch.float32
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_link_stays_a_link_and_a_mount_is_refused(tiny, tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "export")
    for _ in range(2):
        export(**flags_of(tiny, tmp_path, overwrite=True))
        assert (tmp_path / "out").is_symlink() and files(tmp_path / "disk" / "export").keys() == files(tiny[1]).keys()
    assert len(list((tmp_path / "disk").iterdir())) == 1
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "mounted")
    with pytest.raises(ValueError, match="is a mount.*name a folder in it"):
        export(**flags_of(tiny, tmp_path, output_dir=str(tmp_path / "mounted")))


def test_base_alone_is_copied(tmp_path):
    report = export(base_model=str(BASE), output_dir=str(tmp_path / "out"))
    old, new = load_file(BASE / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    assert report["check"]["kl"] < 1e-12 and report["merged"] == []
    assert "merged in" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("change", ["not merged", "merged twice", "one layer less", "rows in another order"])
def test_self_check_sees_a_wrong_merge(change, tiny, tmp_path, monkeypatch):
    merge = script.merge_rows
    layers = []

    def wrong(layer, weight, dtype):
        layers.append(layer)
        merged = merge(layer, weight, dtype)
        if change == "not merged":  # a thousandth of the update, so that it is not zero
            return (weight.float() + (merged.float() - weight.float()) / 1000).to(dtype)
        if change == "merged twice":
            return merge(layer, merged, dtype)
        if change == "rows in another order":
            return merged.flip(0)
        return weight if len(layers) == 3 else merged

    monkeypatch.setattr(script, "merge_rows", wrong)
    refused(tmp_path, "the mean KL is", **flags_of(tiny, tmp_path))


def test_self_check_reads_the_files(tiny, tmp_path, monkeypatch):
    write = script.write_companions

    def damage(source, lora_weights, folder, *rest):
        stored = load_file(folder / "model.safetensors")
        stored |= {"model.norm.weight": stored["model.norm.weight"] * 1.5}
        save_file(stored, folder / "model.safetensors", {"format": "pt"})
        return write(source, lora_weights, folder, *rest)

    monkeypatch.setattr(script, "write_companions", damage)
    refused(tmp_path, "the mean KL is", **flags_of(tiny, tmp_path))


def test_update_below_the_dtypes_resolution(tiny, tmp_path):
    adapter = copy_adapter(tiny, tmp_path, lambda w: {k: v * 1e-4 if "lora_B" in k else v for k, v in w.items()})
    refused(tmp_path, "--save_dtype float32", **flags_of(tiny, tmp_path, lora_weights=adapter))
    (tmp_path / "changed").rename(tmp_path / "small")
    adapter = copy_adapter(tiny, tmp_path, lambda w: {k: v * 1e-9 if "lora_B" in k else v for k, v in w.items()})
    refused(tmp_path, "too small for torch.bfloat16", **flags_of(tiny, tmp_path, lora_weights=adapter))
    adapter = str(tmp_path / "small")
    report = export(**flags_of(tiny, tmp_path, lora_weights=adapter), save_dtype="float32")
    assert report["check"]["kl"] < report["check"]["effect"] / 100


def test_rows_are_merged_as_the_whole(tiny, tmp_path, monkeypatch):
    """Pieces of three rows, the whole tensor, and PEFT's layer as it is: the same bits, in float32, too."""
    for dtype in ("", "float32"):
        made = []
        for name, value in (("PIECE", 3 * 128), ("PIECE", 2**30), ("is_plain", lambda layer: False)):
            with monkeypatch.context() as patch:
                patch.setattr(script, name, value)
                export(**flags_of(tiny, tmp_path, overwrite=True, save_dtype=dtype))
            made.append(load_file(tmp_path / "out" / "model.safetensors"))
        for name, tensor in made[0].items():
            assert torch.equal(tensor, made[1][name]) and torch.equal(tensor, made[2][name]), name


def test_a_model_with_experts_is_merged_whole_where_they_are_adapted(bases, tmp_path, capsys):
    base = bases("moe")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], target_parameters=EXPERTS)
    export(base_model=str(base), lora_weights=str(adapter), output_dir=str(tmp_path / "out"))
    assert "with the whole model in memory" in capsys.readouterr().out
    old, new = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert old.keys() == new.keys()  # each expert under its own name again


def test_self_check_agrees_with_whole_models(tiny):
    report = json.loads((tiny[1] / "export.json").read_text())
    ids = script.check_prompts(tiny[1], 1024)
    expected, got = logits(with_adapter(BASE, tiny[0]), ids), logits(load(tiny[1]), ids)
    assert report["check"]["kl"] == pytest.approx(kl(expected, got), rel=1e-2)
    assert report["check"]["logit_diff"] == pytest.approx((expected - got).abs().max().item(), rel=1e-2)
    assert report["check"]["effect"] == pytest.approx(kl(expected, logits(load(BASE), ids)), rel=1e-2)


def test_the_chain_answers_the_same(tiny, tmp_path):
    """Base + adapter and the merged model: the same greedy tokens (in float32, so without rounding)."""
    export(**flags_of(tiny, tmp_path, save_dtype="float32"))
    ids = script.check_prompts(tmp_path / "out", 1024)
    answers = [
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=1)
        for model in (with_adapter(BASE, tiny[0]), load(tmp_path / "out"), load(BASE))
    ]
    assert torch.equal(answers[0], answers[1]) and not torch.equal(answers[0], answers[2])


@pytest.mark.parametrize(("dtype", "said"), [("", "vllm serve {}\n"), ("float32", "vllm serve {} --dtype float32\n")])
def test_the_printed_command_serves_in_the_dtype_of_the_files(dtype, said, tiny, tmp_path, capsys):
    export(**flags_of(tiny, tmp_path, save_dtype=dtype))
    assert said.format(tmp_path / "out") in capsys.readouterr().out


@pytest.mark.slow
def test_command_line(tiny, tmp_path):
    def run(*more):
        command = [sys.executable, str(ROOT / "export_hf_checkpoint.py"), "--base_model", str(BASE), *more]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    good = run("--lora_weights", str(tiny[0]), "--output_dir", "out")
    assert good.returncode == 0 and "python generate.py --base_model out" in good.stdout and "KL" in good.stdout
    assert "vllm serve out" in good.stdout and "kernels" not in good.stderr  # which bitsandbytes asks for
    bad = run("--lora_weights", str(tiny[0]), "--output_dir", "worse", "--max_kl", "1e-30")
    assert bad.returncode == 1 and "mean KL is" in bad.stderr and "Traceback" not in bad.stderr
    assert not list(tmp_path.glob("worse*"))


STOPS = {  # {function: at which of its calls}
    "open_model": 1,
    "add_adapter": 1,
    "merge_rows": 5,
    "save_file": 2,
    "portable_config": 1,
    "write_companions": 1,
    "write_modelfile": 1,
    "self_check": 1,
    "model_card": 1,
    "replace_folder": 1,
}
KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import export_hf_checkpoint as script
where, count = {where!r}, {count}
real, calls = getattr(script, where), 0
def stop(*args, **kwargs):
    global calls
    calls += 1
    if calls == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
setattr(script, where, stop)
script.export(base_model={base!r}, lora_weights={adapter!r}, output_dir={out!r}, overwrite=True, max_shard_size="700KB")
"""


@pytest.mark.slow
@pytest.mark.parametrize("before", ["nothing", "an export"])
@pytest.mark.parametrize("where", STOPS)
def test_killed_at_ten_moments(where, before, tiny, tmp_path):
    out = tmp_path / "out"
    if before == "an export":
        shutil.copytree(tiny[1], out)
    names = {"root": str(ROOT), "base": str(BASE), "adapter": str(tiny[0]), "out": str(out)}
    code = KILLED.format(where=where, count=STOPS[where], **names)
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -signal.SIGKILL
    assert out.exists() == (before == "an export")
    expected = logits(load(tiny[1]))
    for folder in [*tmp_path.iterdir(), *tmp_path.glob("*/*/")]:  # what loads, is right
        if (folder / "config.json").exists():
            assert torch.equal(logits(load(folder)), expected)
        else:
            with pytest.raises(Exception):  # noqa: B017 (transformers has many kinds)
                AutoModelForCausalLM.from_pretrained(folder)
    export(**flags_of(tiny, tmp_path, overwrite=True))
    assert torch.equal(logits(load(out)), expected) and {path.name for path in tmp_path.iterdir()} == {"out"}
