"""
export_state_dict.py: its files in an implementation of Meta's model written from its description, against
transformers; ExecuTorch's own model, where that is installed (slow); every refusal, and what a killed export leaves.

    .venv/bin/python -m pytest tests/test_export_state_dict.py
    .venv/bin/python -m pytest tests/test_export_state_dict.py -m slow
"""

import json
import math
import os
import pickle
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

import export_state_dict as script
from export_state_dict import export_meta, ffn_params, permute_for_rope

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "data" / "tiny" / "model"
BOUND = 1e-5  # between logits in float32
TOKENS = torch.randint(0, 96, (2, 300), generator=torch.Generator().manual_seed(0))  # [B, T]

SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": 96}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.08}
SIZES |= {"max_position_embeddings": 16384, "bos_token_id": 1, "eos_token_id": 2}


def llama3_rope(factor, **other):
    numbers = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    numbers |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    return {"rope_parameters": {"rope_type": "llama3"} | numbers | other}


CONFIGS = {
    "llama": LlamaConfig(**SIZES, rms_norm_eps=1e-5),
    "llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama, all heads": LlamaConfig(**SIZES | {"num_key_value_heads": 4, "intermediate_size": 200}),
    "llama 3.1": LlamaConfig(**SIZES, **llama3_rope(8.0)),
    "llama 3.2": LlamaConfig(**SIZES, **llama3_rope(32.0), tie_word_embeddings=True),
    "llama, wide heads": LlamaConfig(**SIZES, head_dim=32),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES, rms_norm_eps=1e-6),
    "qwen2, tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
}


def rotations(params, length):
    """Meta's rotation of each position and pair as a complex number, [T, head_dim / 2]; scaling as in Llama 3.1."""
    head_dim = params.get("head_dim", params["dim"] // params["n_heads"])
    angles = []
    for i in range(0, head_dim, 2):
        frequency = params["rope_theta"] ** (-i / head_dim)
        if params.get("use_scaled_rope"):
            factor, high = params.get("rope_scale_factor", 8), params.get("high_freq_factor", 4)
            turns = 8192 * frequency / (2 * math.pi)  # in the original context
            kept = min(max((turns - 1) / (high - 1), 0), 1)  # the share of the frequency that is not scaled
            frequency = kept * frequency + (1 - kept) * frequency / factor
        angles.append(frequency)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), torch.tensor(angles))
    return torch.polar(torch.ones_like(angles), angles)


def meta_logits(stored, params, tokens):
    """The logits of Meta's model, [B, T, V], from nothing but a state dict and params.json."""

    def weight(name):
        return stored[f"{name}.weight"].float()

    def norm(x, name):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + params["norm_eps"]) * weight(name)

    def heads(x, name, count):
        bias = stored[f"{name}.bias"].float() if params.get("attention_qkv_bias") else None
        return F.linear(x, weight(name), bias).unflatten(-1, (count, -1))  # [B, T, H, D]

    def rotate(x):
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * rotation[:, None]).flatten(-2)

    queries, keys = params["n_heads"], params["n_kv_heads"]
    ffn_size = int(params.get("ffn_dim_multiplier", 1) * int(2 * (4 * params["dim"]) / 3))
    ffn_size = params["multiple_of"] * math.ceil(ffn_size / params["multiple_of"])
    rotation = rotations(params, tokens.shape[1])
    mask = torch.full([tokens.shape[1]] * 2, -math.inf).triu(1)
    assert weight("tok_embeddings").shape == weight("output").shape == (params["vocab_size"], params["dim"])
    h = weight("tok_embeddings")[tokens]
    for i in range(params["n_layers"]):
        block, x = f"layers.{i}", norm(h, f"layers.{i}.attention_norm")
        q, k = rotate(heads(x, f"{block}.attention.wq", queries)), rotate(heads(x, f"{block}.attention.wk", keys))
        v = heads(x, f"{block}.attention.wv", keys)
        k, v = (y.repeat_interleave(queries // keys, dim=2) for y in (k, v))
        scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1]) + mask
        mixed = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)
        h = h + F.linear(mixed.flatten(2), weight(f"{block}.attention.wo"))
        x, ffn = norm(h, f"{block}.ffn_norm"), f"{block}.feed_forward"
        assert weight(f"{ffn}.w1").shape == weight(f"{ffn}.w2").T.shape == (ffn_size, params["dim"])
        gated = F.silu(F.linear(x, weight(f"{ffn}.w1"))) * F.linear(x, weight(f"{ffn}.w3"))
        h = h + F.linear(gated, weight(f"{ffn}.w2"))
    return F.linear(norm(h, "norm"), weight("output"))


def executorch_logits(stored, params, tokens):
    """The logits of ExecuTorch's own model, loaded as its exporter loads it, but strictly."""
    args = pytest.importorskip("executorch.examples.models.llama.model_args", reason="executorch is not installed")
    from executorch.examples.models.llama.llama_transformer import construct_transformer

    model = construct_transformer(args.ModelArgs(generate_full_logits=True, max_seq_len=512, **params)).eval()
    model.load_state_dict({name: tensor.float() for name, tensor in stored.items()}, strict=True)
    return model(tokens)


def read(folder):
    """The state dict and the parameters of an export."""
    stored = torch.load(Path(folder) / "consolidated.00.pth", weights_only=True, mmap=True)
    assert type(stored) is dict and {type(tensor) for tensor in stored.values()} == {torch.Tensor}
    return stored, json.loads((Path(folder) / "params.json").read_text())


def unpermute_for_rope(tensor, num_heads):
    """Undo permute_for_rope: the even elements of a head are its first half, the odd ones its second."""
    heads = tensor.reshape(num_heads, -1, *tensor.shape[1:])
    return torch.cat([heads[:, 0::2], heads[:, 1::2]], dim=1).reshape(tensor.shape)


def apart(logits, others):
    return (logits - others).abs().max().item()


def make_base(folder, kind="llama", dtype=torch.float32):
    """Save a random model whose biases and norms are random, too; returns its folder."""
    torch.manual_seed(1)
    config = CONFIGS[kind] if isinstance(kind, str) else kind
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn(parameter.shape), alpha=0.3)
    model.to(dtype).save_pretrained(folder)
    return str(folder)


def make_adapter(folder, base, config=None, **settings):
    """Save a random adapter of a base model; returns its folder."""
    torch.manual_seed(2)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False} | settings
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config or LoraConfig(**settings)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("modules_to_save", "trainable_tokens_delta", "ia3", "magnitude")):
                parameter.mul_(1 + 0.2 * torch.rand(parameter.shape))
            elif "lora_" in name:  # small enough that the logits stay of the size that the bound is meant for
                parameter.mul_(0.5)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test runs in an empty folder."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """{kind: folder}, each made when it is asked for; no test writes there."""

    class Bases(dict):
        def __missing__(self, kind):
            self[kind] = make_base(tmp_path_factory.mktemp("base") / "model", kind)
            return self[kind]

    return Bases()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, bases):
    return make_adapter(tmp_path_factory.mktemp("adapter"), bases["llama"])


# -----------------------------------------------------------------------------
# the same model

TARGETS = [(kind, target) for kind in CONFIGS for target in ("llama", "executorch")]
TARGETS = [
    (kind, target)
    for kind, target in TARGETS
    if target == "executorch" or kind not in ("llama 3.2", "llama, wide heads") and "qwen2" not in kind
]


@pytest.mark.parametrize(("kind", "target"), TARGETS)
@torch.no_grad()
def test_logits_are_transformers(bases, kind, target):
    export_meta(base_model=bases[kind], target=target)
    stored, params = read("out/state_dict")
    expected = AutoModelForCausalLM.from_pretrained(bases[kind])(TOKENS).logits
    assert apart(meta_logits(stored, params, TOKENS), expected) < BOUND

    def unpermuted(endings):
        return {
            name: unpermute_for_rope(tensor, params["n_heads"] if ".wq." in name else params["n_kv_heads"])
            if name.endswith(endings)
            else tensor
            for name, tensor in stored.items()
        }

    controls = [(unpermuted(("wq.weight", "wk.weight")), params)]
    if "qwen2" in kind:
        controls += [(unpermuted(("wq.bias", "wk.bias")), params)]
    if "3." in kind:
        controls += [(stored, {name: value for name, value in params.items() if name != "use_scaled_rope"})]
    if "3.2" in kind:
        controls += [(stored, {name: value for name, value in params.items() if name != "rope_scale_factor"})]
    for control in controls:
        assert apart(meta_logits(*control, TOKENS), expected) > 100 * BOUND


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_logits_in_executorchs_own_model(bases, kind):
    export_meta(base_model=bases[kind], target="executorch")
    stored, params = read("out/state_dict")
    expected = AutoModelForCausalLM.from_pretrained(bases[kind])(TOKENS).logits
    assert apart(executorch_logits(stored, params, TOKENS), expected) < BOUND
    wq = {n: unpermute_for_rope(t, params["n_heads"]) for n, t in stored.items() if n.endswith("wq.weight")}
    assert apart(executorch_logits(stored | wq, params, TOKENS), expected) > 100 * BOUND


ADAPTERS = {
    "plain": {},
    "rank and alpha patterns, rslora": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 8},
        "alpha_pattern": {"k_proj": 32},
    },
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj", "k_proj", "v_proj"]},
    "trained biases": {"bias": "all", "target_modules": ["q_proj"]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "output": {"target_modules": ["lm_head", "q_proj"]},
    "both": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "modules_to_save": {"target_modules": ["k_proj"], "modules_to_save": ["lm_head", "norm"]},
    "saved embeddings": {"target_modules": ["k_proj"], "modules_to_save": ["embed_tokens"]},
    "new tokens": {"target_modules": ["k_proj"], "trainable_token_indices": {"embed_tokens": [5, 17]}},
    "ia3": {"config": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])},
    "tokens": {"config": TrainableTokensConfig(token_indices=[5, 17], target_modules=["embed_tokens"])},
}


@pytest.mark.parametrize("kind", ADAPTERS)
@torch.no_grad()
def test_an_adapter_of_any_kind_is_merged(tmp_path, bases, kind):
    base = bases["qwen2, tied"]
    folder = make_adapter(tmp_path / "adapter", base, **ADAPTERS[kind])
    summary = export_meta(base_model=base, lora_weights=folder, target="executorch")
    model = AutoModelForCausalLM.from_pretrained(base)
    before = model(TOKENS).logits
    expected = PeftModel.from_pretrained(model, folder).eval()(TOKENS).logits
    assert apart(before, expected) > 1000 * BOUND
    assert apart(meta_logits(*read("out/state_dict"), TOKENS), expected) < BOUND
    assert 0 <= summary["difference"] < 1e-5


@torch.no_grad()
def test_an_adapter_that_repeats_layers_is_written_with_all_of_them(tmp_path, bases):
    folder = make_adapter(tmp_path / "adapter", bases["llama"], layer_replication=[(0, 2), (1, 2)])
    export_meta(base_model=bases["llama"], lora_weights=folder)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases["llama"]), folder).eval()
    assert apart(meta_logits(*read("out/state_dict"), TOKENS), model(TOKENS).logits) < BOUND


@pytest.mark.parametrize("save_dtype", ["", "bfloat16", "float16", "float32"])
@torch.no_grad()
def test_merging_rounds_once(tmp_path, adapter, save_dtype):
    """Merged in float32 by peft itself and cast, from a base in bfloat16: the same bits."""
    base = make_base(tmp_path / "base", "llama", torch.bfloat16)
    export_meta(base_model=base, lora_weights=adapter, save_dtype=save_dtype)
    stored, params = read("out/state_dict")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
    expected = merged.to(getattr(torch, save_dtype or "bfloat16")).state_dict()
    rows = {"q_proj": params["n_heads"], "k_proj": params["n_kv_heads"]}
    for name, tensor in expected.items():
        heads = rows.get(name.split(".")[-2])
        assert torch.equal(stored[script.meta_name(name)], permute_for_rope(tensor, heads) if heads else tensor)
    assert len(stored) == len(expected)


@torch.no_grad()
def test_greedy_answers_of_the_embedded_model_with_an_adapter(capsys):
    """Without any flag: base -> adapter -> state dict, in the tiny model's own bfloat16."""
    adapter = make_adapter("out/finetune/adapter", BASE, lora_alpha=4)
    shutil.copy(BASE / "tokenizer_config.json", adapter)
    (Path(adapter) / "tokenizer.json").write_text((BASE / "tokenizer.json").read_text() + "\n")
    summary = export_meta()
    assert summary["lora_weights"] == adapter and summary["difference"] < 1e-5
    names = {"consolidated.00.pth", "params.json", "export.json", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in Path("out/state_dict").iterdir()} == names
    assert Path("out/state_dict/tokenizer.json").read_bytes() == Path(adapter, "tokenizer.json").read_bytes()
    assert "merged      in float32" in capsys.readouterr().out and not list(Path("out").glob("*.incomplete"))
    stored, params = read("out/state_dict")
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    for parameter in merged.parameters():  # model.bfloat16() would round the rotary frequencies, too
        parameter.copy_(parameter.bfloat16())
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    rows = [json.loads(line) for line in (ROOT / "data/tiny/test.jsonl").read_text().splitlines()[:4]]
    for row in rows:
        ids = torch.tensor([tokenizer(row["question"]).input_ids])
        expected = merged.generate(ids, max_new_tokens=24, min_new_tokens=24, do_sample=False, pad_token_id=1)
        bans = torch.zeros(params["vocab_size"])
        bans[summary["eos_token_id"]] = -math.inf  # what min_new_tokens does
        while ids.shape[1] < expected.shape[1]:
            logits = meta_logits(stored, params, ids)
            ids = torch.cat([ids, (logits[:, -1] + bans).argmax(-1, keepdim=True)], dim=1)
        assert ids.tolist() == expected.tolist()
        assert apart(logits, merged(ids[:, :-1]).logits) < 10 * BOUND  # they reach 20 here


def test_the_size_is_that_of_the_weights_and_a_tied_output_is_stored_once(bases):
    for kind, tied in (("llama", False), ("llama, tied", True)):
        summary = export_meta(base_model=bases[kind], output_dir=kind)
        stored, _ = read(kind)
        assert (stored["output.weight"].data_ptr() == stored["tok_embeddings.weight"].data_ptr()) is tied
        size = sum({t.data_ptr(): t.nbytes for t in stored.values()}.values())
        assert summary["tensors"] == len(stored)
        assert 0 <= (Path(kind) / "consolidated.00.pth").stat().st_size - size < 20_000


# -----------------------------------------------------------------------------
# helpers and parameters


def test_permutation_by_hand():
    halves = torch.tensor([0, 1, 2, 10, 11, 12, 100, 101, 102, 110, 111, 112])  # two heads of six elements
    pairs = torch.tensor([0, 10, 1, 11, 2, 12, 100, 110, 101, 111, 102, 112])
    assert permute_for_rope(halves, 2).tolist() == pairs.tolist()
    assert unpermute_for_rope(pairs, 2).tolist() == halves.tolist()
    matrix = torch.stack([halves, -halves], dim=1)
    assert permute_for_rope(matrix, 2).tolist() == torch.stack([pairs, -pairs], dim=1).tolist()


@pytest.mark.parametrize("dim", [64, 2048, 3072, 4096, 5120, 8192])
def test_every_size_of_a_feed_forward_is_expressed(dim):
    for size in [160, 4864, 8192, 8960, 11008, 13824, 14336, 18944, 28672, *range(2, 20_000, 37)]:
        given = ffn_params(dim, size)
        product = int(2 * (4 * dim) / 3)
        if "ffn_dim_multiplier" in given:
            product = int(given["ffn_dim_multiplier"] * product)
        assert given["multiple_of"] * -(-product // given["multiple_of"]) == size


@pytest.mark.parametrize("target", ["llama", "executorch"])
def test_params_are_what_the_target_takes(bases, target):
    """Llama 3.0's ModelArgs, which raises on an unknown name, and what ExecuTorch's loader passes itself."""
    known = "dim n_layers n_heads n_kv_heads vocab_size multiple_of ffn_dim_multiplier norm_eps rope_theta".split()
    for kind in ("llama", "llama 3.1"):
        export_meta(base_model=bases[kind], target=target, output_dir=kind)
        _, params = read(kind)
        scaled = {"use_scaled_rope"} | ({"rope_scale_factor", "high_freq_factor"} if target == "executorch" else set())
        assert set(params) - set(known) == (scaled if kind == "llama 3.1" else set())
        assert params["vocab_size"] == SIZES["vocab_size"] and params["n_kv_heads"] == 2


def test_a_config_of_transformers_4_gives_the_same(tmp_path, bases):
    """Most checkpoints say rope_theta, rope_scaling and torch_dtype, and have an inv_freq in their files."""
    old = Path(shutil.copytree(bases["llama 3.1"], tmp_path / "old"))
    config = json.loads((old / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": config.pop("dtype")}
    (old / "config.json").write_text(json.dumps(config))
    tensors = load_file(old / "model.safetensors") | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(tensors, old / "model.safetensors", {"format": "pt"})
    export_meta(base_model=bases["llama 3.1"], output_dir="new")
    export_meta(base_model=str(old), output_dir="old")
    assert read("old")[1] == read("new")[1]
    assert Path("old/consolidated.00.pth").stat().st_size == Path("new/consolidated.00.pth").stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_executorchs_arguments_have_the_sizes(bases, kind):
    args = pytest.importorskip("executorch.examples.models.llama.model_args", reason="executorch is not installed")
    export_meta(base_model=bases[kind], target="executorch")
    found, config = args.ModelArgs(**read("out/state_dict")[1]), CONFIGS[kind]
    assert (found.hidden_dim, found.head_dim) == (config.intermediate_size, getattr(config, "head_dim", None) or 16)


def test_the_tokenizer_comes_from_the_adapter_and_metas_own_from_the_base(tmp_path, bases):
    base = Path(shutil.copytree(bases["llama"], tmp_path / "base"))
    (base / "original").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "original/tokenizer.model"):
        (base / name).write_text("of the base")
    adapter = Path(make_adapter(tmp_path / "adapter", base))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (adapter / name).write_text("of the adapter")
    export_meta(base_model=str(base), lora_weights=str(adapter), output_dir="both")
    export_meta(base_model=str(base), output_dir="base")
    texts = {
        folder: {path.name: path.read_text() for path in Path(folder).iterdir() if path.suffix in (".model", ".jinja")}
        | {path.name: path.read_text() for path in Path(folder).glob("tokenizer*.json")}
        for folder in ("both", "base")
    }
    ours, theirs = "of the adapter", "of the base"
    assert texts["both"] == {"tokenizer.model": theirs, "tokenizer.json": ours, "tokenizer_config.json": ours}
    assert set(texts["base"].values()) == {theirs} and len(texts["base"]) == 4


# -----------------------------------------------------------------------------
# refusals


def contents(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def refused(message, **flags):
    """Export, which must raise ValueError with `message`, leave nothing and not touch what it read."""
    sources = [Path(flags[name]) for name in ("base_model", "lora_weights") if name in flags]
    before = [contents(source) for source in sources]
    with pytest.raises(ValueError, match=message) as error:
        export_meta(**flags)
    assert error.traceback[-1].path == Path(script.__file__), "run_cli shows a message alone for the script's own"
    assert [contents(source) for source in sources] == before
    assert not list(Path().rglob("*.pth")) and not list(Path().rglob("*.incomplete"))


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


REFUSED_CONFIGS = [
    (LlamaConfig(**SIZES, head_dim=32), "llama", "head_dim 32, which is not hidden_size 64 / 4 heads"),
    (LlamaConfig(**SIZES, **llama3_rope(32.0)), "llama", "factor 32.0 .8 only.*--target executorch has it"),
    (LlamaConfig(**SIZES, **llama3_rope(8.0, high_freq_factor=2.0)), "llama", "high_freq_factor 2.0 .4 only"),
    (LlamaConfig(**SIZES, **llama3_rope(8.0, low_freq_factor=2.0)), "executorch", "low_freq_factor 2.0 .1 only"),
    (
        LlamaConfig(**SIZES, **llama3_rope(8.0, original_max_position_embeddings=4096)),
        "executorch",
        "original_max_position_embeddings 4096 .8192 only",
    ),
    (
        LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
        "executorch",
        "RoPE scaling of type linear",
    ),
    (
        LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 1e4}),
        "executorch",
        "partial_rotary_factor 0.5",
    ),
    (LlamaConfig(**SIZES, hidden_act="gelu"), "llama", "activation gelu"),
    (LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True), "executorch", "attention_bias.*mlp_bias"),
    (MistralConfig(**SIZES, sliding_window=64), "executorch", "sliding windows of 64"),
    (
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=64, max_window_layers=1),
        "executorch",
        "windows of 64",
    ),
    (Qwen2Config(**SIZES), "llama", "biases of the query, key and value projections .--target executorch has them"),
    (Qwen3Config(**SIZES), "executorch", "is a qwen3, which is not Meta's model"),
]


@pytest.mark.parametrize(("config", "target", "message"), REFUSED_CONFIGS, ids=lambda value: str(value)[:30])
def test_what_the_format_cannot_represent_is_refused_by_name(tmp_path, monkeypatch, config, target, message):
    config.save_pretrained(tmp_path / "base")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # refused before the model is loaded
    refused(message, base_model=str(tmp_path / "base"), target=target)


def test_a_configuration_that_cannot_be_is_refused(tmp_path):
    CONFIGS["llama"].save_pretrained(tmp_path / "base")
    edit(tmp_path / "base" / "config.json", hidden_size=126)
    refused("cannot be loaded: (.*\n)*.*126. is not a multiple", base_model=str(tmp_path / "base"))


def test_a_quantized_base_is_refused(tmp_path):
    CONFIGS["llama"].save_pretrained(tmp_path / "base")
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    edit(tmp_path / "base" / "config.json", quantization_config=quantization)
    refused("quantized with bitsandbytes .give the unquantized model", base_model=str(tmp_path / "base"))


def broken_adapter(kind, folder, bases):
    """Make an adapter of the llama base and break it."""
    base = bases["llama, all heads"] if kind == "other shapes" else bases["llama"]
    if kind == "prefix":
        return make_adapter(folder, base, PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    make_adapter(folder, base, **({"init_lora_weights": True} if kind == "zero" else {}))
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "layers.1.self_attn.q_proj.lora_A" in name)
    if kind == "renamed":
        tensors[name.replace("q_proj", "qq_proj")] = tensors.pop(name)
    elif kind == "missing":
        del tensors[name]
    elif kind == "nan":
        tensors[name][0, 0] = math.nan
    save_file(tensors, path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "none":
        path.unlink()
    elif kind == "pickled":
        torch.save(tensors, folder / "adapter_model.bin")
        path.unlink()
    return str(folder)


BROKEN_ADAPTERS = {
    "other shapes": "(?s)does not fit this base model: .*size mismatch for .*layers.0.self_attn.k_proj.lora_B",
    "renamed": "does not fit this base model: .*layers.1.self_attn.qq?_proj.lora_A",
    "missing": "does not fit this base model: .*layers.1.self_attn.q_proj.lora_A",
    "zero": "changes nothing",
    "nan": "cannot be merged: logits change by nan",
    "truncated": "damaged or does not fit",
    "none": r"no adapter there \(adapter_model.safetensors\)",
    "pickled": r"no adapter there \(adapter_model.safetensors\)",
    "prefix": "cannot be merged: ",
}


@pytest.mark.parametrize("kind", BROKEN_ADAPTERS)
def test_an_adapter_that_is_not_this_bases_is_refused(tmp_path, bases, kind):
    folder = broken_adapter(kind, tmp_path / "adapter", bases)
    refused(BROKEN_ADAPTERS[kind], base_model=bases["llama"], lora_weights=folder)


def broken_base(kind, folder, bases):
    shutil.copytree(bases["llama"], folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if kind in ("a missing shard", "shards"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        path.unlink()
        model.save_pretrained(folder, max_shard_size="100KB")
        if kind == "a missing shard":
            next(folder.glob("model-00002-*.safetensors")).unlink()
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "a missing tensor":
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, path, {"format": "pt"})
    elif kind == "a tensor too many":
        save_file(tensors | {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, path, {"format": "pt"})
    elif kind == "nan":
        tensors["model.norm.weight"][3] = math.nan
        save_file(tensors, path, {"format": "pt"})
    elif kind in ("pickled", "malicious"):
        torch.save(tensors, folder / "pytorch_model.bin")
        path.unlink()
    if kind == "malicious":

        class Run:
            def __reduce__(self):
                return os.mkdir, (str(folder / "was_run"),)

        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Run()))
    return str(folder)


BROKEN_BASES = {
    "a missing shard": "cannot be loaded: (.*\n)*.*model-00002",
    "truncated": "cannot be loaded: .*",
    "a missing tensor": "1 tensors are not in its files: model.layers.1.mlp.up_proj.weight",
    "a tensor too many": "1 tensors are not in its configuration: model.layers.0.self_attn.q_proj.bias",
    "nan": "1 tensors are not finite in float32, model.norm.weight",
    "pickled": "cannot be loaded: (.*\n)*.*--allow_pickle only",
}


@pytest.mark.parametrize("kind", BROKEN_BASES)
def test_a_base_that_is_not_whole_is_refused(tmp_path, bases, kind):
    refused(BROKEN_BASES[kind], base_model=broken_base(kind, tmp_path / "base", bases))


def test_shards_are_joined_and_pickles_read_where_that_is_allowed(tmp_path, bases, adapter):
    export_meta(base_model=bases["llama"], lora_weights=adapter, output_dir="expected")
    shards, pickled = (broken_base(kind, tmp_path / kind, bases) for kind in ("shards", "pickled"))
    assert len(list(Path(shards).glob("*.safetensors"))) > 2
    export_meta(base_model=shards, lora_weights=adapter, output_dir="shards")
    export_meta(base_model=pickled, lora_weights=adapter, output_dir="pickled", allow_pickle=True)
    for folder in ("shards", "pickled"):
        found, expected = read(folder)[0], read("expected")[0]
        assert set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in found)


def test_a_pickle_is_read_without_running_it(tmp_path, bases):
    base = broken_base("malicious", tmp_path / "base", bases)
    refused("cannot be loaded", base_model=base, allow_pickle=True)
    assert not (Path(base) / "was_run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"target": "gguf"}, "--target gguf: one of llama, executorch"),
        ({"save_dtype": "int8"}, "--save_dtype int8: one of"),
        ({"lora_weights": "nowhere"}, "--lora_weights nowhere: no adapter there"),
        ({"base_model": "nowhere"}, "nowhere: no such file or folder"),
        ({"output_dir": str(BASE), "overwrite": True}, "exists and is no earlier export"),
        ({"output_dir": str(ROOT / "docs"), "overwrite": True}, "exists and is no earlier export"),
        ({"output_dir": str(ROOT / "README.md"), "overwrite": True}, "exists and is no earlier export"),
    ],
)
def test_bad_flags_are_refused_before_the_model_loads(monkeypatch, flags, message):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    refused(message, **flags)


def test_float16_that_overflows_is_refused(tmp_path):
    base = make_base(tmp_path / "base", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    refused("1 tensors are not finite in float16, model.norm.weight", base_model=base, save_dtype="float16")
    export_meta(base_model=base)


# -----------------------------------------------------------------------------
# never half an export


def test_an_earlier_export_is_replaced_with_overwrite_alone(bases):
    export_meta(base_model=bases["llama"])
    with pytest.raises(ValueError, match="has an earlier export: --overwrite"):
        export_meta(base_model=bases["llama, tied"])
    before = contents("out")
    export_meta(base_model=bases["llama, tied"], overwrite=True)
    assert contents("out").keys() == before.keys() and contents("out") != before
    assert len(list(Path("out").iterdir())) == 1


@pytest.mark.parametrize("there", [False, True])
def test_a_disk_that_is_full(bases, there):
    """A write that fails in its middle: torch's writer meets a real limit."""
    flags = {"base_model": bases["llama"], "overwrite": True}
    if there:
        export_meta(**flags)
    before = contents("out") if there else {}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(ValueError, match="is the disk full"):
            export_meta(**flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(Path("out").glob("*.incomplete")) and contents("out") == before


def test_a_layer_that_is_not_merged_is_found(bases, adapter, monkeypatch):
    """What a change in peft did to alpaca-lora's export: merging does nothing, and nothing is said."""
    from peft.tuners.lora.layer import Linear

    monkeypatch.setattr(Linear, "merge", lambda self, safe_merge=False, adapter_names=None: None)
    refused("cannot be merged: logits change by", base_model=bases["llama"], lora_weights=adapter)


def killed_export(moment, **flags):
    """Export in a child that SIGKILL ends at its `moment`-th step in the file system; returns whether it was reached.

    A step is what Python's audit hooks report of files under out/: opening, making, renaming, removing. Step 0 is in
    the middle of the weights, which torch writes without a report.
    """
    child = os.fork()
    if not child:
        sys.stdout = open(os.devnull, "w")
        steps = iter(range(1, 10_000))

        def hook(event, args):
            named = event == "open" or event.startswith(("os.", "shutil."))
            if named and args and "out/" in str(args[0]) and next(steps) == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        def half(stored, path, save=torch.save):
            save(stored, path)
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

        if moment:
            sys.addaudithook(hook)
        else:
            torch.save = half
        export_meta(**flags)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("there", [False, True])
def test_an_export_killed_at_any_step_leaves_a_whole_one_or_none(bases, adapter, there):
    earlier = {"base_model": bases["llama, tied"], "overwrite": True}
    flags = {"base_model": bases["llama"], "lora_weights": adapter, "overwrite": True}
    whole = []
    for one in (earlier, flags):
        export_meta(**one)
        whole.append(contents("out"))
    found, moment, reached = set(), 0, True
    while reached:
        shutil.rmtree("out")
        if there:
            export_meta(**earlier)
        reached = killed_export(moment, **flags)
        state = contents("out/state_dict")
        found.add(whole.index(state) if state else None)
        found |= {"beside"} if list(Path("out").glob("*.incomplete")) else set()
        export_meta(**flags)  # clears what was left
        assert contents("out") == whole[1]
        moment += 1
    assert moment > 10 and found >= ({0, 1, "beside"} if there else {None, 1, "beside"})


def test_from_the_command_line_an_error_is_its_message_alone(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["export_state_dict.py", "--target", "ggml"])
    with pytest.raises(SystemExit, match="^error: --target ggml: one of"):
        script.run_cli(export_meta)
