"""
ppo_gsm8k.py with rollout servers: against a small server of this file, which speaks vLLM's HTTP and can die, restart
and refuse; and (slow) against vLLM itself, in an environment of its own.

    .venv/bin/python -m pytest tests/test_ppo_servers.py
    make .venv-vllm/installed && .venv/bin/python -m pytest -m slow tests/test_ppo_servers.py
"""

import copy
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from test_ppo import BASE, STOPS, VOCAB, assert_same_weights, curve, logprobs_of, make_kit, run, tokens_of, weights
from transformers import AutoModelForCausalLM

import ppo_gsm8k as ppo

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    return make_kit(tmp_path_factory.mktemp("kit"))


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(ppo, "RETRIES", 2)
    monkeypatch.setattr(ppo, "PATIENCE", 20)


class Server:
    """As much of a vLLM server as ppo_gsm8k.py needs: adapters by name and path, completions of token ids."""

    def __init__(self, base, max_model_len=1024, max_lora_rank=16):
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self.max_model_len, self.max_lora_rank = max_model_len, max_lora_rank
        self.dead = False
        self.paths, self.asked, self.unloaded, self.lock = {}, [], [], threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_POST(self):
                if server.dead:  # connections that are open stay so
                    return self.connection.shutdown(socket.SHUT_RDWR)
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    status, answer = server.answer(self.path, body)
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, path, body):
        if path == "/v1/load_lora_adapter":
            rank = json.loads(Path(body["lora_path"], "adapter_config.json").read_text())["r"]
            if rank > self.max_lora_rank:
                return 400, {"error": f"LoRA rank {rank} is greater than max_lora_rank {self.max_lora_rank}."}
            self.paths[body["lora_name"]] = body["lora_path"]
            return 200, {}
        if path == "/v1/unload_lora_adapter":
            self.unloaded.append(body["lora_name"])
            return (200, {}) if self.paths.pop(body["lora_name"], None) else (404, {})
        self.asked.append(body)
        if body["model"] not in self.paths:
            return 404, {"error": f"The model `{body['model']}` does not exist."}
        if len(body["prompt"]) + body["max_tokens"] > self.max_model_len:
            return 400, {"error": f"maximum context length is {self.max_model_len}"}
        assert set(body["logit_bias"]) == {str(i) for i in range(VOCAB, 1024)}
        model = PeftModel.from_pretrained(copy.deepcopy(self.model), self.paths[body["model"]])
        greedy = body["temperature"] == 0
        role = ppo.Role(model, "default", torch.float32, 1.0 if greedy else body["temperature"], VOCAB)
        uniforms = None if greedy else np.random.default_rng(body["seed"]).random((1, body["max_tokens"]), np.float32)
        rollout = ppo.LocalRollout(role.eval(), body["stop_token_ids"])
        (pairs,) = rollout.generate([body["prompt"]], body["max_tokens"], uniforms)
        tokens, logprobs = zip(*pairs, strict=True)
        return 200, {"choices": [{"token_ids": tokens, "logprobs": {"token_logprobs": logprobs}}]}

    def stop(self):
        self.dead = True
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server(kit):
    made = []

    def start(**settings):
        made.append(Server(kit.base, **settings))
        return made[-1]

    yield start
    for one in made:
        one.stop()


FLAGS = {"train_batch_size": 4, "ppo_mini_batch_size": 2, "total_training_steps": 2, "max_response_length": 6}
FLAGS |= {"save_freq": 1, "kl_loss_coef": 0.0, "entropy_coeff": 0.0}


def test_a_run_samples_from_each_steps_actor(kit, server, tmp_path):
    one, two = server(), server()
    flags = FLAGS | {"val_files": str(kit.val), "test_freq": 1}
    records = run(kit, tmp_path, rollout_urls=f"{one.url},{two.url}", **flags)
    for record in records[1:]:  # the log-probabilities are those of the trainer's actor: nothing is stale
        assert record["training/rollout_probs_diff_max"] < 1e-5
    names = list(dict.fromkeys(body["model"] for body in one.asked))
    assert len(names) == 3 and [name[:6] for name in names] == ["step-0", "step-1", "step-2"]
    assert one.unloaded == two.unloaded == names[:2]
    assert [path.name for path in (tmp_path / "rollout").iterdir()] == names[2:]
    assert abs(len(one.asked) - len(two.asked)) <= 4 and all(body["temperature"] in (0, 0.9) for body in one.asked)
    seeds = [body["seed"] for body in one.asked + two.asked if "seed" in body]
    assert len(set(seeds)) == len(seeds) == 8
    last = tmp_path / "rollout" / names[2]
    assert_same_weights(weights(last.parent, last.name), weights(tmp_path))
    shutil.rmtree(tmp_path / "rollout")
    again = run(kit, tmp_path, rollout_urls=one.url, overwrite=True, **flags)
    assert again == records  # whatever server answers


def test_greedy_answers_are_those_of_the_model_itself(kit, server, tmp_path):
    flags = FLAGS | {"val_files": str(kit.val), "total_training_steps": 1, "test_freq": 1}
    run(kit, tmp_path / "servers", rollout_urls=server().url, **flags)
    run(kit, tmp_path / "own", **flags)
    name = Path("val_generations") / "step-00000.jsonl"
    assert (tmp_path / "servers" / name).read_text() == (tmp_path / "own" / name).read_text()


def test_a_server_that_forgot_the_adapter_is_given_it_again(kit, server, tmp_path, monkeypatch):
    one, update = server(), ppo.update

    def restarted(*args):
        one.paths.clear()
        return update(*args)

    monkeypatch.setattr(ppo, "update", restarted)
    expected = run(kit, tmp_path / "a", rollout_urls=server().url, **FLAGS)
    assert run(kit, tmp_path / "b", rollout_urls=one.url, **FLAGS) == expected


def test_a_server_that_dies_ends_the_run_and_the_same_command_goes_on(kit, server, tmp_path, monkeypatch):
    one, two, update, calls = server(), server(), ppo.update, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 4:  # in the second step's last update
            one.stop()
        return update(*args)

    expected = run(kit, tmp_path / "whole", rollout_urls=two.url, **FLAGS | {"total_training_steps": 3})
    with monkeypatch.context() as patch:
        patch.setattr(ppo, "update", dies)
        started = time.time()
        with pytest.raises(ValueError, match=f"--rollout_urls {one.url}: no answer .*same command then goes on"):
            run(kit, tmp_path / "run", rollout_urls=one.url, **FLAGS | {"total_training_steps": 3})
        assert time.time() - started < 60
    assert ppo.list_checkpoints(tmp_path / "run") == [1]
    assert run(kit, tmp_path / "run", rollout_urls=two.url, **FLAGS | {"total_training_steps": 3}) == expected


@pytest.mark.parametrize(
    "settings, flags, message",
    [
        (
            {"max_lora_rank": 2},
            {},
            "it takes no adapter: .*LoRA rank 4 is greater than max_lora_rank 2(.|\\n)*vllm serve ",
        ),
        ({"max_model_len": 40}, {}, "maximum context length is 40"),
    ],
)
def test_a_server_that_cannot_do_it_is_refused(kit, server, tmp_path, settings, flags, message):
    with pytest.raises(ValueError, match=f"--rollout_urls http.*{message}"):
        run(kit, tmp_path, rollout_urls=server(**settings).url, **FLAGS, **flags)
    assert not (tmp_path / "checkpoint-1").exists()


@pytest.mark.parametrize("answer", ["<html>", {"choices": [{"text": "7", "logprobs": None}]}], ids=str)
def test_a_server_that_is_no_vllm_or_an_old_one_is_refused(kit, server, tmp_path, monkeypatch, answer):
    monkeypatch.setattr(Server, "answer", lambda self, path, body: (200, answer))
    with pytest.raises(ValueError, match="--rollout_urls http.*it answered 200, .*(<html>|choices)"):
        run(kit, tmp_path, rollout_urls=server().url, **FLAGS)
    assert not (tmp_path / "checkpoint-1").exists()


def test_a_server_with_another_base_is_refused_before_anything_is_trained(kit, server, tmp_path):
    one = server()
    with torch.no_grad():
        one.model.model.layers[0].mlp.down_proj.weight.mul_(-1)
    with pytest.raises(ValueError, match="it serves another base: log-probabilities are"):
        run(kit, tmp_path / "run", rollout_urls=one.url, **FLAGS)
    assert not (tmp_path / "run" / "checkpoint-1").exists()


# -----------------------------------------------------------------------------
# vLLM itself


VLLM = ROOT / ".venv-vllm" / "bin" / "vllm"


def start_vllm(base, port, log):
    """Start the command that ppo_gsm8k.py prints, with what a CPU and a shared machine need besides."""
    assert VLLM.exists(), "make .venv-vllm/installed"
    command = ppo.serve_command(base, 16, "float32").split()
    env = dict(word.split("=") for word in command[: command.index("vllm")])
    env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    command = [str(VLLM), *command[command.index("vllm") + 1 :], "--port", str(port), "--host", "127.0.0.1"]
    command += ["--gpu-memory-utilization", "0.15", "--no-enable-chunked-prefill"]
    with open(log, "ab") as file:
        return subprocess.Popen(
            command, env=os.environ | env | {"HF_HUB_OFFLINE": "1"}, stdout=file, stderr=file, start_new_session=True
        )


def wait_for(port, process, log, seconds=400):
    started = time.time()
    while time.time() - started < seconds:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    pytest.fail(f"vLLM did not start: {log.read_text()[-4000:]}")


@pytest.fixture(scope="module")
def vllm(kit, tmp_path_factory):
    """Return {port: process} of two vLLM servers, a function that starts one again among them."""
    folder, ports, processes = tmp_path_factory.mktemp("vllm"), [], {}
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    log = folder / "log.txt"

    def start(port):
        processes[port] = start_vllm(kit.base, port, log)

    for port in ports:
        start(port)
    for port in ports:
        wait_for(port, processes[port], log)
    yield ports, processes, start, lambda port: wait_for(port, processes[port], log)
    for process in processes.values():
        os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_vllm_answers_as_the_model_itself_before_and_after_an_adapter_changed(kit, vllm, tmp_path):
    flags = {"lora_r": 4, "lora_alpha": 8, "activation_checkpointing": False, "temperature": 0.9}
    actor = ppo.load_roles(["actor"], kit.base, torch.float32, torch.device("cpu"), str(kit.adapter), flags, VOCAB)[
        "actor"
    ]
    urls = [f"http://127.0.0.1:{port}" for port in vllm[0]]
    servers = ppo.ServerRollout(actor, STOPS, urls, tmp_path, range(VOCAB, 1024))
    own = ppo.LocalRollout(actor, STOPS)
    tokenizer = ppo.load_config_and_tokenizer(str(kit.base), "")[1]
    problems, _ = ppo.read_problems(str(BASE.parent / "test.jsonl"), tokenizer, 512)
    prompts = [problem["prompt"] for problem in problems[:64]]
    for step in range(2):
        servers.sync(step)
        expected, found = own.generate(prompts, 24), servers.generate(prompts, 24)
        assert tokens_of(found) == tokens_of(expected)
        np.testing.assert_allclose(actor_logprobs(actor, prompts, found, 1.0), logprobs_of(found), rtol=0, atol=1e-4)
        sampled = servers.generate(prompts, 24, np.random.default_rng(step).random((64, 24), np.float32))
        assert max(max(row) for row in tokens_of(sampled)) < VOCAB
        np.testing.assert_allclose(
            actor_logprobs(actor, prompts, sampled, 0.9), logprobs_of(sampled), rtol=0, atol=1e-4
        )
        with torch.no_grad():
            for name, p in actor.named_parameters():
                if "lora_B" in name:
                    p.mul_(-1.5)


def actor_logprobs(actor, prompts, answers, temperature):
    from test_ppo import batch_of

    batch, actor.temperature = batch_of(prompts, tokens_of(answers)), temperature
    with torch.no_grad():
        return actor(ppo.response_logprobs, batch)[0][batch["mask"]].numpy()


@pytest.mark.slow
def test_vllm_is_killed_and_restarted_in_the_middle(kit, vllm, tmp_path, monkeypatch):
    ports, processes, start, wait = vllm
    monkeypatch.setattr(ppo, "RETRIES", 12)
    monkeypatch.setattr(ppo, "PATIENCE", 300)
    update, calls = ppo.update, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 4:
            os.killpg(processes[ports[1]].pid, signal.SIGKILL)
            processes[ports[1]].wait()
            start(ports[1])
        return update(*args)

    monkeypatch.setattr(ppo, "update", killed)
    urls = ",".join(f"http://127.0.0.1:{port}" for port in ports)
    flags = {"save_freq": 1, "val_files": str(kit.val), "test_freq": 2, "rollout_urls": urls}
    records = run(kit, tmp_path, total_training_steps=4, **flags)
    assert [record["training/global_step"] for record in records] == [0, 1, 2, 3, 4]
    assert all(record["training/rollout_probs_diff_max"] < 1e-4 for record in records[1:])
    assert ppo.list_checkpoints(tmp_path) == [3, 4]
    wait(ports[1])
    assert len(run(kit, tmp_path, total_training_steps=5, **flags)) == 6
    assert len(curve(tmp_path)) == 6
