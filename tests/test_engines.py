"""
The embedded model, fine-tuned for some steps, in llama.cpp and vLLM: tokens, prompts and answers are generate.py's.

    make .venv-llamacpp/installed .venv-vllm/installed
    .venv/bin/python -m pytest tests/test_engines.py -m slow
"""

import json
import re
import shlex
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from engines import llama_cpp, post, vllm
from test_export_gguf import CONVERSATIONS, TEMPLATES, TEXTS, check_log_probs
from test_flags import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

import export_hf_checkpoint
import finetune
from export_gguf import export_gguf
from generate import generate

pytestmark = pytest.mark.slow
BASE, TEST = ROOT / "data/tiny/model", ROOT / "data/tiny/test.jsonl"
QUESTIONS = [json.loads(line)["question"] for line in TEST.read_text("utf-8").splitlines()]


def as_messages(question):
    return [{"role": "user", "content": question}]


def ask(address, model, questions=QUESTIONS):
    """Return a server's greedy answers; several at once, which llama.cpp puts into a queue."""

    def answer(question):
        fields = {"model": model, "messages": as_messages(question), "temperature": 0, "max_tokens": 64}
        return post(address, "/v1/chat/completions", **fields)["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(answer, questions))


def equal(one, other):
    return sum(a == b for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The folder of an adapter after 30 steps: it answers in GSM8K's form, and its answers end."""
    folder = tmp_path_factory.mktemp("tuned")
    finetune.train(output_dir=str(folder), max_steps=30, val_set_size=0, save_steps=1)
    return str(folder / "adapter")


@pytest.fixture(scope="module")
def answers(adapter, tmp_path_factory):
    """Return a function that gives generate.py's greedy answers to the 512 test problems."""
    made = {}

    def get(dtype="float32", base=str(BASE), lora_weights=adapter):
        if (dtype, base) not in made:
            out = tmp_path_factory.mktemp("answers")
            flags = {"data_path": str(TEST), "output_dir": str(out), "max_new_tokens": 64, "dtype": dtype}
            generate(base_model=base, lora_weights=lora_weights, **flags)
            lines = (out / "predictions.jsonl").read_text("utf-8").splitlines()
            made[dtype, base] = [json.loads(line)["prediction"] for line in lines]
        return made[dtype, base]

    return get


def test_llama_cpp_with_the_adapter_merged(adapter, answers, tmp_path):
    export_gguf(base_model=str(BASE), lora_weights=adapter, output_dir=str(tmp_path), outtype="f32")
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    model.load_adapter(adapter)
    with llama_cpp(tmp_path / "model-f32.gguf") as address:
        for text in (*QUESTIONS, *TEXTS, "a<|im_end|>b"):
            got = post(address, "/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
            assert got == tokenizer(text).input_ids, text
        worst = 0.0
        for question in QUESTIONS[:4]:
            messages = as_messages(question)
            prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            assert post(address, "/apply-template", messages=messages)["prompt"] == prompt
            worst = max(worst, check_log_probs(address, model, tokenizer(prompt).input_ids))
        assert ask(address, "any") == answers() and len(set(answers())) > 100
    print(f"log-probabilities differ by at most {worst:.1e}")
    assert worst < 1e-4


@pytest.mark.parametrize("name", TEMPLATES)
def test_llama_cpp_makes_the_prompts_of_every_template(name, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(BASE, chat_template=TEMPLATES[name])
    AutoModelForCausalLM.from_pretrained(BASE).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    export_gguf(base_model=str(tmp_path / "base"), output_dir=str(tmp_path))
    with llama_cpp(tmp_path / "model-f16.gguf") as address:
        for turns in CONVERSATIONS:
            messages = [{"role": role, "content": content} for role, content in turns]
            expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            assert post(address, "/apply-template", messages=messages)["prompt"] == expected


@pytest.mark.parametrize("kind", ["bf16", "q8_0"])
def test_llama_cpp_with_less_precision(kind, adapter, answers, tmp_path):
    """As many answers are those of float32 as where transformers computes with these weights, within 12."""
    export_gguf(base_model=str(BASE), lora_weights=adapter, output_dir=str(tmp_path), outtype=kind)
    with llama_cpp(tmp_path / f"model-{kind}.gguf") as address:
        got = equal(ask(address, "any"), answers())
    if kind == "bf16":
        own = equal(answers("bfloat16"), answers())
    else:
        read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model-q8_0.gguf", dtype=torch.float32)
        del read.config.quantization_config  # it is float32 now
        model = AutoModelForCausalLM.from_config(read.config)
        model.load_state_dict(read.state_dict())
        model.save_pretrained(tmp_path / "read")
        AutoTokenizer.from_pretrained(adapter).save_pretrained(tmp_path / "read")
        own = equal(answers("float32", str(tmp_path / "read"), ""), answers())
    print(f"{kind}: {got} of 512 answers are those of float32; in transformers {own}")
    assert got >= own - 12


def test_vllm_with_the_adapter(adapter, answers, tmp_path):
    """By the command of docs/generate.md, in float32."""
    text = (ROOT / "docs/generate.md").read_text("utf-8")
    command = re.search(r"^vllm serve .*--lora-modules .*", text, re.M)[0]
    command = command.replace("Qwen/Qwen2.5-0.5B", str(BASE)).replace("out/mine/adapter", adapter)
    with vllm([*shlex.split(command), "--dtype", "float32"], tmp_path) as address:
        assert equal(ask(address, "adapter"), answers()) == 512


def test_vllm_with_the_merged_model(adapter, answers, tmp_path, capfd):
    """By the command that export_hf_checkpoint.py prints."""
    flags = {"lora_weights": adapter, "output_dir": str(tmp_path / "merged"), "save_dtype": "float32"}
    export_hf_checkpoint.export(base_model=str(BASE), **flags)
    command = re.search(r"^ *(vllm serve .*)", capfd.readouterr().out, re.M)[1]
    with vllm(shlex.split(command), tmp_path) as address:
        assert equal(ask(address, str(tmp_path / "merged")), answers()) == 512


@pytest.mark.parametrize("quantize", ["int8", "fp8"])
def test_vllm_with_a_quantized_model(quantize, adapter, answers, tmp_path, capfd):
    """The first 32 problems: vLLM makes 6 tokens a second of fp8 on a CPU, and of any quantization in float32."""
    flags = {"lora_weights": adapter, "output_dir": str(tmp_path / "merged"), "save_dtype": "float32"}
    export_hf_checkpoint.export(base_model=str(BASE), quantize=quantize, **flags)
    command = re.search(r"^ *(vllm serve .*)", capfd.readouterr().out, re.M)[1]
    with vllm(shlex.split(command), tmp_path) as address:
        got = equal(ask(address, str(tmp_path / "merged"), QUESTIONS[:32]), answers()[:32])
    print(f"{quantize}: {got} of 32 answers are those of float32")
    assert got >= 26
