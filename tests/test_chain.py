"""
The stages in a row on the embedded model: finetune -> ppo -> export -> state dict, same answers throughout.

    .venv/bin/python -m pytest tests/test_chain.py -m slow
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_export_state_dict import meta_logits, read

import export_hf_checkpoint
import export_state_dict
import finetune
import ppo_gsm8k
from generate import generate

ROOT = Path(__file__).resolve().parent.parent
TEST = ROOT / "data" / "tiny" / "test.jsonl"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the adapters of a short fine-tune (out/finetune) and of a short PPO run that goes on from it."""
    folder = tmp_path_factory.mktemp("chain")
    finetune.train(output_dir=str(folder / "out/finetune"), num_epochs=1, val_set_size=0)
    ppo_gsm8k.train_ppo(
        base_model="data/tiny/model",
        lora_weights=str(folder / "out/finetune/adapter"),
        output_dir=str(folder / "out/ppo_gsm8k"),
        train_batch_size=32,
        ppo_mini_batch_size=16,
        total_training_steps=3,
        actor_lr=1e-3,
        max_response_length=64,
    )
    return folder


def answers(folder, **model):
    """The greedy answers of generate.py to the first 12 test problems."""
    out = folder / "answers"
    shutil.rmtree(out, ignore_errors=True)
    generate(data_path=str(TEST), max_samples=12, output_dir=str(out), max_new_tokens=64, **model)
    return [json.loads(line)["prediction"] for line in (out / "predictions.jsonl").read_text().splitlines()]


def greedy(logits_of, ids, stops):
    """Go on with the likeliest token until one of `stops`."""
    made = []
    while len(made) < 64:
        token = int(logits_of(torch.tensor([ids + made]))[0, -1].argmax())
        if token in stops:
            break
        made.append(token)
    return made


@pytest.mark.parametrize("stage", ["finetune", "ppo_gsm8k"])
def test_every_form_answers_as_the_adapter_does(trained, tmp_path, stage):
    adapter = str(trained / "out" / stage / "adapter")
    base = str(ROOT / "data/tiny/model")
    expected = answers(tmp_path, base_model=base, lora_weights=adapter)
    assert expected != answers(tmp_path, base_model=base) and len(set(expected)) > 6

    merged = tmp_path / "merged"
    flags = {"base_model": base, "lora_weights": adapter, "save_dtype": "float32"}
    export_hf_checkpoint.export(**flags, output_dir=str(merged))
    assert answers(tmp_path, base_model=str(merged)) == expected

    tokenizer = finetune.AutoTokenizer.from_pretrained(str(merged))
    stops = json.loads((merged / "generation_config.json").read_text())["eos_token_id"]
    stops = set(stops if isinstance(stops, list) else [stops])
    rows = [json.loads(line) for line in TEST.read_text().splitlines()[:12]]
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": row["question"]}], add_generation_prompt=True)
        for row in rows
    ]
    prompts = [list(ids["input_ids"]) if not isinstance(ids, list) else ids for ids in prompts]
    export_state_dict.export_meta(**flags, output_dir=str(tmp_path / "from_adapter"))
    export_state_dict.export_meta(base_model=str(merged), output_dir=str(tmp_path / "from_merged"))
    forms = {}
    for name in ("from_adapter", "from_merged"):
        stored, params = read(tmp_path / name)
        forms[name] = lambda ids, stored=stored, params=params: meta_logits(stored, params, ids)
    with torch.no_grad():
        for name, logits_of in forms.items():
            said = [tokenizer.decode(greedy(logits_of, ids, stops), skip_special_tokens=True) for ids in prompts]
            assert said == expected, name


def test_ppo_changed_what_finetune_made(trained):
    stages = [trained / "out" / stage / "adapter" / "adapter_model.safetensors" for stage in ("finetune", "ppo_gsm8k")]
    one, other = (load_file(path) for path in stages)
    assert one.keys() == other.keys() and any(not torch.equal(one[name], other[name]) for name in one)
