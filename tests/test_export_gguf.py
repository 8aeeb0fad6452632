"""
export_gguf.py: what is in the file, read back by gguf and transformers; every kind of tokenizer and model in llama.cpp
itself (slow); what is refused, and that nothing is left of it.

    .venv/bin/python -m pytest tests/test_export_gguf.py
    make .venv-llamacpp/installed && .venv/bin/python -m pytest tests/test_export_gguf.py -m slow
"""

import json

import pytest
import sentencepiece
import torch
from engines import llama_cpp, post
from gguf import GGUFReader, GGUFWriter
from peft import LoraConfig, PeftModel, get_peft_model
from test_flags import ROOT
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

import export_gguf as script
from export_gguf import export_gguf

BASE = ROOT / "data" / "tiny" / "model"
TEMPLATES = {path.stem: path.read_text("utf-8") for path in sorted((ROOT / "templates").glob("*.jinja"))}
TEXTS = (
    "Hello world",
    " two  spaces,   three, and a trailing one ",
    "It's what they'd've said: I'LL, We'Re, don't, o'clock, x'tis, John's'",
    "'Quoted' \"words\" (in) [all] {kinds} <of> `marks`...!?",
    "0 12 123 1234 12345678901234567890 3.14 1,000,000 1e-5 0x1F ½ ² Ⅷ ٣٤",
    "line\nline\n\nline\r\nline\t\ttabs \n \n  end\n",
    "def f(x):\n    return x**2 + y[1:-1]  # why not?\n\n\n",
    "https://example.com/a_b-c?d=e&f=%20#g user@mail.org",
    "Élève naïve, Straße, smörgåsbord, Ελληνικά, Русский",
    "東京は日本の首都です。你好，世界！ 한국어 ไทย",
    "नमस्ते दुनिया, مرحبا بالعالم, שלום",
    "👩‍👩‍👧‍👦 😀 🏳️‍🌈 ™ © €5 £6 ∑∫√ ← →",
    "snake_case camelCase ALLCAPS iPhone15Pro x1y2z3",
    "-- --- ### ## *** ___ ;;; :: // \\\\ @@ && || ~~ ^^ $$ %%",
    "a\u00a0b\u2003c\u200bd non-breaking, em and zero-width spaces \u3000 end",
)
CONVERSATIONS = (
    [("user", "Tom has 6 boxes with 7 coins in each.\nHow many?")],
    [("system", "Be short."), ("user", "Hello, it's me")],
    [("user", "2+2?"), ("assistant", "4"), ("user", "And 'twice' that?\n\n### Input:\n8 {{ x }}")],
)
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"intermediate_size": 96, "max_position_embeddings": 256, "vocab_size": 1536}
LLAMA3 = {"rope_theta": 5e5, "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
LINEAR = {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}
YARN = {"rope_theta": 1e6, "type": "yarn", "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
MODELS = {  # {kind: (config, tokenizer)}
    "llama-3.2": (LlamaConfig(**SIZES, rope_parameters=LLAMA3, tie_word_embeddings=True), "llama-bpe"),
    "llama-2": (LlamaConfig(**SIZES), "SentencePiece"),
    "llama with biases": (LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True), "gpt-2"),
    "smollm, linear": (LlamaConfig(**SIZES, tie_word_embeddings=True, rope_parameters=LINEAR), "smollm"),
    "llama3 without ignore_merges": (LlamaConfig(**SIZES), "smaug-bpe"),
    "qwen2, tied": (Qwen2Config(**SIZES, tie_word_embeddings=True), "qwen2"),
    "qwen2, yarn": (Qwen2Config(**SIZES, rope_parameters=YARN), "qwen2"),
    "qwen3": (Qwen3Config(**SIZES, head_dim=128), "qwen2"),  # transformers reads no other head_dim from GGUF files
}


def make_tokenizer(name, folder):
    """Save a tokenizer that splits text as llama.cpp's `name` does, trained on the documents and the odd texts."""
    sample = [path.read_text("utf-8") for path in sorted((ROOT / "docs").glob("*.md"))] + [*TEXTS] * 20
    if name == "SentencePiece":
        lines = iter(line for text in sample for line in text.split("\n") if line)
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_prefix=str(folder / "tokenizer"),
            model_type="bpe",
            vocab_size=1400,
            byte_fallback=True,
            character_coverage=0.98,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
        tokenizer = LlamaTokenizer.from_pretrained(folder, add_bos_token=True)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    else:
        splitter, ignore_merges = script.SPLITTERS[name]
        backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
        backend.pre_tokenizer, backend.decoder = splitter, decoders.ByteLevel()
        special = ["<|endoftext|>", "<|begin|>", "<|im_start|>", "<|im_end|>"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=1400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator(sample, trainer)
        state = json.loads(backend.to_str())
        state["model"]["vocab"]["ĠHelloworld"] = 1400  # a token that no merge makes
        backend = Tokenizer.from_str(json.dumps(state))
        bos = {"bos_token": "<|begin|>"} if name == "llama-bpe" else {}
        if bos:
            backend.post_processor = processors.TemplateProcessing("<|begin|> $A", special_tokens=[("<|begin|>", 1)])
        if name == "qwen2":
            backend.normalizer = normalizers.NFC()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", **bos)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a function that gives the folder of a random model of a kind in MODELS, with its tokenizer."""
    folders = {}

    def get(kind):
        if kind not in folders:
            torch.manual_seed(0)
            config, name = MODELS[kind]
            folder = folders[kind] = tmp_path_factory.mktemp("model")
            model = AutoModelForCausalLM.from_config(config)
            for parameter in model.parameters():
                parameter.data.normal_(0, 0.1)
            model.generation_config.eos_token_id = [0, 3]
            model.save_pretrained(folder)
            make_tokenizer(name, folder)
        return folders[kind]

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


def read_gguf(path):
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def read_fields(path):
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.arange(120).reshape(3, 40)).logits


# -----------------------------------------------------------------------------
# what is in the file


@pytest.mark.parametrize("kind", ["llama-3.2", "qwen2, tied", "qwen3", "llama3 without ignore_merges"])
def test_in_float32_it_is_the_same_model(kind, made, tmp_path):
    base = made(kind)
    export_gguf(base_model=str(base), output_dir=str(tmp_path), outtype="f32")
    model, expected = read_gguf(tmp_path / "model-f32.gguf"), AutoModelForCausalLM.from_pretrained(base).eval()
    model.model.rotary_emb = expected.model.rotary_emb  # transformers ignores the factors of llama3: compared below
    assert (logits(model) - logits(expected)).abs().max() == 0
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "model-f32.gguf").tensors}
    assert ("output.weight" in tensors) == (not expected.config.tie_word_embeddings)
    assert ("rope_freqs.weight" in tensors) == (kind == "llama-3.2")
    if kind == "llama-3.2":
        plain = 1 / 5e5 ** (torch.arange(0, 16, 2) / 16)
        factors = torch.tensor(tensors["rope_freqs.weight"])
        torch.testing.assert_close(plain / factors, expected.model.rotary_emb.inv_freq)


@pytest.mark.parametrize(("kind", "limit"), [("f16", 1e-3), ("bf16", 1e-2), ("q8_0", 2e-2)])
def test_smaller_types(kind, limit, made, tmp_path):
    export_gguf(base_model=str(made("qwen3")), output_dir=str(tmp_path), outtype=kind)
    expected, got = (
        logits(model)
        for model in (AutoModelForCausalLM.from_pretrained(made("qwen3")), read_gguf(tmp_path / f"model-{kind}.gguf"))
    )
    assert 0 < (got - expected).abs().mean() < limit * expected.std()
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / f"model-{kind}.gguf").tensors}
    assert {name for name, stored in types.items() if stored == "F32"} == {name for name in types if "norm" in name}
    assert {stored for stored in types.values()} == {"F32", kind.upper()}


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["up_proj", "q_proj"]},
        {"target_modules": ["up_proj", "embed_tokens"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["up_proj"], "use_dora": True},
        {"target_modules": ["up_proj", "q_proj"], "bias": "all"},
        {"target_modules": ["up_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["up_proj"], "modules_to_save": ["embed_tokens"]},
    ],
    ids=str,
)
def test_an_adapter_is_merged_in_float32(config, made, tmp_path):
    """Where the embeddings are tied, a change of one must not change the other."""
    base = made("qwen2, tied")
    adapter = make_adapter(tmp_path / "adapter", base, **config)
    export_gguf(base_model=str(base), lora_weights=str(adapter), output_dir=str(tmp_path), outtype="f32")
    with torch.no_grad():
        expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval())
    assert (logits(read_gguf(tmp_path / "model-f32.gguf")) - expected).abs().max() < 1e-4
    assert (logits(AutoModelForCausalLM.from_pretrained(base).eval()) - expected).abs().max() > 1e-2


def test_an_adapter_beside_the_script_is_found_from_anywhere(made, tmp_path, monkeypatch):
    base = made("qwen3")
    make_adapter(tmp_path / "script" / "out" / "adapter", base, target_modules=["q_proj"])
    monkeypatch.setattr(script, "HERE", tmp_path / "script")
    monkeypatch.chdir(tmp_path)
    export_gguf(base_model=str(base), lora_weights="out/adapter", output_dir="gguf")
    assert (tmp_path / "gguf" / "model-f16.gguf").exists()


def test_the_tokenizer_and_the_settings(made, tmp_path):
    base, template = made("llama-3.2"), TEMPLATES["alpaca"]
    tokenizer = AutoTokenizer.from_pretrained(base, chat_template={"default": template, "tool_use": "no"})
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    tokenizer.add_tokens(["<plain>"])
    tokenizer.save_pretrained(adapter)
    (adapter / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    export_gguf(base_model=str(base), lora_weights=str(adapter), output_dir=str(tmp_path))
    fields = read_fields(tmp_path / "model-f16.gguf")
    sizes = {"context_length": 256, "embedding_length": 64, "block_count": 2, "feed_forward_length": 96}
    sizes |= {
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 16,
        "rope.freq_base": 5e5,
    }
    assert {name: fields[f"llama.{name}"] for name in sizes} == sizes and fields["general.file_type"] == 1
    assert fields["tokenizer.ggml.pre"] == "llama-bpe" and fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.tokens"][:1402] == tokenizer.convert_ids_to_tokens(range(1402))
    assert fields["tokenizer.ggml.tokens"][1402:] == [f"[PAD{i}]" for i in range(1402, 1536)]
    types = fields["tokenizer.ggml.token_type"]
    assert types[:5] == [3, 3, 3, 3, 1] and types[1401:1403] == [4, 5]  # control; user defined, unused
    assert fields["tokenizer.ggml.bos_token_id"] == 1 and fields["tokenizer.ggml.add_bos_token"]
    assert fields["tokenizer.ggml.eos_token_id"] == 0 and fields["tokenizer.ggml.eot_token_id"] == 2
    assert fields["tokenizer.chat_template"] == template
    assert (tmp_path / "Modelfile-f16").read_text() == (
        'FROM ./model-f16.gguf\nPARAMETER num_ctx 256\nPARAMETER stop "<|endoftext|>"\nPARAMETER stop "<|im_start|>"\n'
    )


def test_no_token_is_made_up_where_the_tokenizer_has_none(made, tmp_path):
    """Without its id, llama.cpp hands the text of token 11 to the template as bos_token."""
    base = made("qwen3")
    AutoTokenizer.from_pretrained(base, chat_template=TEMPLATES["alpaca"]).save_pretrained(tmp_path / "adapter")
    make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    export_gguf(base_model=str(base), lora_weights=str(tmp_path / "adapter"), output_dir=str(tmp_path))
    fields = read_fields(tmp_path / "model-f16.gguf")
    assert "tokenizer.ggml.bos_token_id" not in fields and not fields["tokenizer.ggml.add_bos_token"]
    assert fields["tokenizer.chat_template"] == "{%- set bos_token = '' -%}" + TEMPLATES["alpaca"]


def test_an_earlier_file_stays_until_the_new_one_is_whole(made, tmp_path, monkeypatch, capfd):
    flags = {"base_model": str(made("qwen3")), "output_dir": str(tmp_path)}
    export_gguf(**flags)
    shown, path = capfd.readouterr().out, tmp_path / "model-f16.gguf"
    assert f"llama-server -m {path}" in shown and f"-f {tmp_path}/Modelfile-f16" in shown
    before = path.read_bytes()
    with pytest.raises(ValueError, match="--overwrite"):
        export_gguf(**flags)

    def stop(writer):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(GGUFWriter, "write_kv_data_to_file", stop)
        export_gguf(**flags, overwrite=True)
    assert path.read_bytes() == before and {p.name for p in tmp_path.iterdir()} == {
        "model-f16.gguf",
        "model-f16.gguf.incomplete",
        "Modelfile-f16",
    }
    export_gguf(**flags, overwrite=True)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 2


# -----------------------------------------------------------------------------
# what is refused


def refused(match, out, **flags):
    with pytest.raises(ValueError, match=match):
        export_gguf(output_dir=str(out), **flags)
    assert not out.exists() or not list(out.iterdir())


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ({"outtype": "q4_0"}, "--outtype q4_0: one of f32, f16, bf16, q8_0"),
        ({"pre_tokenizer": "llama"}, "--pre_tokenizer llama: one of llama-bpe, "),
        ({"base_model": "no/such/folder"}, "no/such/folder: no such file or folder"),
        ({"lora_weights": "./nothing"}, "./nothing: no such file or folder"),
    ],
)
def test_flags(flags, match, tmp_path):
    refused(match, tmp_path / "out", **{"base_model": str(BASE)} | flags)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (GPT2Config(vocab_size=1536, n_embd=64, n_layer=1, n_head=4), "type gpt2; written are llama, qwen2, qwen3"),
        (LlamaConfig(**SIZES, hidden_act="gelu"), "activation gelu"),
        (Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=32, max_window_layers=1), "sliding window"),
        (LlamaConfig(**SIZES, rope_parameters={"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0}), "dynamic"),
        (LlamaConfig(**SIZES, rope_parameters=YARN | {"beta_fast": 16.0}), "beta_fast"),
        (LlamaConfig(**SIZES | {"vocab_size": 1000}), "the tokenizer has 1401 tokens, the model 1000"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_models_that_llama_cpp_would_run_otherwise(config, match, made, tmp_path):
    AutoTokenizer.from_pretrained(made("qwen3")).save_pretrained(tmp_path / "base")
    config.save_pretrained(tmp_path / "base")
    refused(match, tmp_path / "out", base_model=str(tmp_path / "base"))


TOKENIZERS = {
    "word_piece": (models.WordPiece(unk_token="[UNK]"), pre_tokenizers.BertPreTokenizer(), None, "neither byte-level"),
    "unigram": (models.Unigram([("a", 0.0)]), pre_tokenizers.Metaspace(), None, "neither byte-level BPE"),
    "byte_fallback": (models.BPE(byte_fallback=True), pre_tokenizers.Metaspace(), None, "with its tokenizer.model"),
    "normalizer": (models.BPE(), script.GPT2, normalizers.Lowercase(), "leaves text as it is"),
    "prefix": (
        models.BPE(),
        pre_tokenizers.ByteLevel(),
        None,
        r"""gpt-2: \["'t", 'is'\] where the tokenizer has \['tis', "Ġ'"\]""",
    ),
    "words": (models.BPE(), pre_tokenizers.Whitespace(), None, "no name for how this tokenizer splits text"),
    "merges": (models.BPE(ignore_merges=True), script.GPT2, None, r"\(ignore_merges counts, too\)"),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokenizers_that_llama_cpp_does_not_have(kind, tmp_path):
    model, splitter, normalizer, match = TOKENIZERS[kind]
    backend = Tokenizer(model)
    backend.pre_tokenizer = splitter
    if normalizer:
        backend.normalizer = normalizer
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "base")
    LlamaConfig(**SIZES).save_pretrained(tmp_path / "base")
    refused(match, tmp_path / "out", base_model=str(tmp_path / "base"))


def test_a_difference_is_shown_and_can_be_accepted(made, tmp_path):
    base = made("qwen3")
    state = json.loads((base / "tokenizer.json").read_text("utf-8"))
    pattern = state["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    pattern["Regex"] = pattern["Regex"].removeprefix("(?i:'s|'t|'re|'ve|'m|'ll|'d)|")
    folder = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(state), "utf-8")
    difference = r"""\n  qwen2: \["'t", 'is'\] where the tokenizer has \["'tis"\]\n.*--pre_tokenizer"""
    refused("(?s)" + difference, tmp_path / "out", base_model=str(folder))
    export_gguf(base_model=str(folder), output_dir=str(tmp_path / "out"), pre_tokenizer="qwen2")
    assert read_fields(tmp_path / "out" / "model-f16.gguf")["tokenizer.ggml.pre"] == "qwen2"


def test_weights_that_are_missing_or_do_not_fit(made, tmp_path):
    base, other = made("qwen3"), made("qwen2, tied")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    refused(
        "of the adapter do not fit|size mismatch", tmp_path / "out", base_model=str(other), lora_weights=str(adapter)
    )
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj", "v_proj"]}))
    refused(
        "4 tensors of the adapter do not fit: .*v_proj",
        tmp_path / "out",
        base_model=str(base),
        lora_weights=str(adapter),
    )
    repeats = make_adapter(tmp_path / "repeats", other, target_modules=["q_proj"], layer_replication=[(0, 2), (1, 2)])
    refused("an adapter repeats", tmp_path / "out", base_model=str(other), lora_weights=str(repeats))
    (adapter / "generation_config.json").write_text("{")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    refused("not a valid JSON file", tmp_path / "out", base_model=str(base), lora_weights=str(adapter))
    llama = made("llama3 without ignore_merges")
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.lm_head.weight.data[5, 5] = 7e4
    model.save_pretrained(tmp_path / "large")
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "large")
    refused("output.weight has NaN, or numbers too large for f16", tmp_path / "out", base_model=str(tmp_path / "large"))
    model.lm_head.weight.data[5, 5] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "nan")
    for outtype in ("f32", "bf16", "q8_0"):
        refused("output.weight has NaN", tmp_path / "out", base_model=str(tmp_path / "nan"), outtype=outtype)
    config = json.loads((tmp_path / "large" / "config.json").read_text())
    (tmp_path / "large" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    refused("tensors are missing: .*layers.2", tmp_path / "out", base_model=str(tmp_path / "large"), outtype="f32")


def test_rows_that_q8_0_cannot_store(made, tmp_path):
    LlamaForCausalLM(LlamaConfig(**SIZES | {"intermediate_size": 80})).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(made("qwen3")).save_pretrained(tmp_path / "base")
    refused(
        "blk.0.ffn_down.weight has rows of 80, which --outtype q8_0 cannot store",
        tmp_path / "out",
        base_model=str(tmp_path / "base"),
        outtype="q8_0",
    )


def test_an_adapter_beside_the_script_is_found_from_elsewhere(made, tmp_path, monkeypatch):
    make_adapter(tmp_path / "script" / "adapter", made("qwen3"), target_modules=["q_proj"])
    monkeypatch.setattr(script, "HERE", tmp_path / "script")
    monkeypatch.chdir(tmp_path)
    export_gguf(base_model=str(made("qwen3")), lora_weights="adapter", output_dir=str(tmp_path))


# -----------------------------------------------------------------------------
# in llama.cpp


def check_log_probs(address, model, ids):
    """Compare the log-probabilities of all tokens, at every fifth place of ids; returns the largest difference."""
    places = range(5, len(ids), 5)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    fields = {"temperature": 0, "n_predict": 1, "n_probs": model.config.vocab_size}
    answers = {n: post(address, "/completion", prompt=ids[:n], cache_prompt=False, **fields) for n in places}
    probabilities = "completion_probabilities"
    # where the likeliest token is a part of a character, the server gives no probabilities
    told = {n: answer[probabilities][0] for n, answer in answers.items() if probabilities in answer}
    got = {n: {entry["id"]: entry["logprob"] for entry in step["top_logprobs"]} for n, step in told.items()}
    assert len(got) > len(places) / 3 and {len(row) for row in got.values()} == {model.config.vocab_size}
    return max(abs(row[i] - expected[n - 1, i].item()) for n, row in got.items() for i in row)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_llama_cpp_sees_the_same_tokens_and_computes_the_same(kind, made, tmp_path):
    base = made(kind)
    export_gguf(base_model=str(base), output_dir=str(tmp_path), outtype="f32")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    special = tokenizer.convert_ids_to_tokens(3)
    texts = [*TEXTS, f"a{special}b {special} c", " Helloworld"]
    if kind == "llama-2":  # transformers 5 puts no space before text that begins with one or follows a special token
        texts = [text for text in TEXTS if text[0] != " "]
    with llama_cpp(tmp_path / "model-f32.gguf", 256) as address:
        for text in texts:
            got = post(address, "/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
            assert got == tokenizer(text).input_ids, text
        worst = check_log_probs(address, model, tokenizer((ROOT / "README.md").read_text("utf-8")).input_ids[:200])
    print(f"{kind}: log-probabilities differ by at most {worst:.1e}")
    assert worst < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama-3.2", "qwen3"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_llama_cpp_makes_the_same_prompts(name, kind, made, tmp_path):
    """Where the tokenizer has a BOS, llama.cpp takes its text off the prompt, and puts its id in front of the ids."""
    base = made(kind)
    tokenizer = AutoTokenizer.from_pretrained(base, chat_template=TEMPLATES[name])
    tokenizer.save_pretrained(tmp_path / "adapter")
    make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    export_gguf(base_model=str(base), lora_weights=str(tmp_path / "adapter"), output_dir=str(tmp_path))
    with llama_cpp(tmp_path / "model-f16.gguf", 256) as address:
        for turns in CONVERSATIONS:
            messages = [{"role": role, "content": content} for role, content in turns]
            expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            prompt = post(address, "/apply-template", messages=messages)["prompt"]
            assert prompt == expected.removeprefix(tokenizer.bos_token or "")
            ids = post(address, "/tokenize", content=prompt, add_special=True, parse_special=True)["tokens"]
            without = tokenizer(expected.removeprefix(tokenizer.bos_token or "")).input_ids
            assert ids == without
