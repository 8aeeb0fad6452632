"""
The servers that generate.py names: `transformers serve` gives the same greedy answers from a merged checkpoint.

    .venv/bin/python -m pytest tests/test_generate_serve.py -m slow    needs requirements-ui.txt
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from export_hf_checkpoint import export
from generate import generate, use_template

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "data" / "tiny" / "model"
missing = [name for name in ("fastapi", "uvicorn", "openai") if not importlib.util.find_spec(name)]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing), reason=f"{missing}: see requirements-ui.txt")]


@pytest.fixture
def merged(tmp_path):
    """An export of the embedded model with an adapter merged into it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    config = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config)).save_pretrained(tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    use_template(tokenizer, "alpaca")
    tokenizer.save_pretrained(tmp_path / "adapter")
    flags = {"base_model": str(BASE), "lora_weights": str(tmp_path / "adapter"), "save_dtype": "float32"}
    export(**flags, output_dir=str(tmp_path / "merged"))
    return tmp_path


@pytest.fixture
def server(merged):
    """The address of `transformers serve` with the merged checkpoint, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(merged / "merged"), "--device", "cpu"]
    log = open(merged / "log.txt", "w+")
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    url, started = f"http://127.0.0.1:{port}", time.time()
    while True:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5)
            break
        except OSError:
            log.seek(0)
            assert process.poll() is None and time.time() - started < 180, log.read()
            time.sleep(0.5)
    yield url
    process.terminate()
    process.wait(30)
    log.close()


def test_transformers_serve_answers_as_generate_does(merged, server, monkeypatch):
    monkeypatch.chdir(merged)
    rows = [json.loads(line) for line in (ROOT / "data" / "tiny" / "test.jsonl").read_text().splitlines()[:3]]
    answers = []
    for row in rows:
        given = generate(base_model="merged", prompt=row["question"], max_new_tokens=40)
        # the base without the adapter answers otherwise: the comparison can fail
        assert given != generate(base_model=str(BASE), prompt=row["question"], max_new_tokens=40)
        messages = [{"role": "user", "content": row["question"]}]
        asked = {"model": str(merged / "merged"), "messages": messages, "max_tokens": 40}
        request = urllib.request.Request(f"{server}/v1/chat/completions", json.dumps(asked).encode())
        request.add_header("Content-Type", "application/json")
        try:
            said = json.loads(urllib.request.urlopen(request, timeout=120).read())
        except urllib.error.HTTPError as error:
            pytest.fail(f"{error}: {error.read().decode()}\n{(merged / 'log.txt').read_text()}")
        answers.append(said["choices"][0]["message"]["content"])
        assert answers[-1] == given and said["choices"][0]["finish_reason"] in ("length", "stop")
    assert len(set(answers)) == 3
