"""
finetune.py in processes of its own: several ranks, DeepSpeed, kill -9, torch.compile. All slow.

    .venv/bin/python -m pytest -m slow tests/test_finetune_ranks.py
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import transformers

from finetune import read_log

ROOT = Path(__file__).resolve().parent.parent
FLAGS = "--data_path data/tiny/test.jsonl --max_samples 52 --val_set_size 9 --batch_size 16 --num_epochs 2".split()
FLAGS += "--save_steps 2 --learning_rate 3e-3".split()
CLOCK = ("seconds", "tokens_per_second", "eval_seconds")
pytestmark = pytest.mark.slow


def launch(folder, *flags, ranks=0):
    """Start finetune.py in `folder`: under torchrun with `ranks` processes, or plainly with 0. Returns the process."""
    python = [sys.executable]
    if ranks:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*python, "finetune.py", "--output_dir", str(folder), *FLAGS, *flags]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process, code=0):
    said = process.communicate(timeout=900)[0]
    assert process.returncode == code, said[-6000:]
    return said


def curve(folder):
    return [{k: v for k, v in r.items() if k not in CLOCK} for r in read_log(folder / "log.jsonl")]


def assert_same_curve(one, other, tolerance):
    assert [(r["step"], *r) for r in one] == [(r["step"], *r) for r in other]
    for a, b in zip(one, other, strict=True):
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=tolerance, abs=1e-7), (name, a, b)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    finish(launch(folder))
    return folder


@pytest.mark.parametrize("flags", [[], ["--micro_batch_size", "2"], ["--nopacking"]], ids=str)
def test_two_ranks_are_one(plain, tmp_path, flags):
    finish(launch(tmp_path, *flags, ranks=2))
    assert_same_curve(curve(tmp_path), curve(plain), 1e-4)  # 43 examples: the last step is short and uneven
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["status"] == "finished" and record["device"].startswith("2 x")
    assert {p.name for p in tmp_path.glob("checkpoint-*/rng_state_*.pth")} == {"rng_state_0.pth", "rng_state_1.pth"}


def test_ranks_may_change_between_kill_and_resume(plain, tmp_path):
    process = launch(tmp_path, "--max_steps", "6", ranks=2)
    wait_for(tmp_path / "checkpoint-2", process)
    kill(process)
    finish(launch(tmp_path, "--max_steps", "6", "--resume_from_checkpoint", "auto"))
    assert_same_curve(curve(tmp_path), curve(plain), 1e-4)


@pytest.mark.skipif(not transformers.integrations.is_deepspeed_available(), reason="deepspeed is not installed")
@pytest.mark.parametrize("zero, ranks", [("zero1", 2), ("zero2", 2), ("zero3", 2), ("zero2_offload", 1)])
def test_deepspeed_changes_nothing_but_memory(plain, tmp_path, zero, ranks):
    finish(launch(tmp_path, "--deepspeed", f"deepspeed/{zero}.json", ranks=ranks))
    got, expected = curve(tmp_path), curve(plain)
    # DeepSpeed reports the gradient's norm of the step before, and its own learning rate
    for record in [*got, *expected]:
        record.pop("grad_norm", None)
        record.pop("learning_rate", None)
    assert_same_curve(got, expected, 1e-4)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["counts"]["trainable"] == json.loads((plain / "run.json").read_text())["counts"]["trainable"]
    said = subprocess.run(
        [sys.executable, "generate.py", "--base_model", "data/tiny/model", "--lora_weights", str(tmp_path / "adapter")]
        + ["--prompt", "Tom has 3 boxes with 7 coins in each.", "--max_new_tokens", "8"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert said.returncode == 0, said.stderr


@pytest.mark.skipif(not transformers.integrations.is_deepspeed_available(), reason="deepspeed is not installed")
def test_deepspeed_resumes(plain, tmp_path):
    flags = ["--deepspeed", "deepspeed/zero2.json"]
    process = launch(tmp_path, *flags, ranks=1)
    wait_for(tmp_path / "checkpoint-2", process)
    kill(process)
    finish(launch(tmp_path, *flags, "--resume_from_checkpoint", "auto", ranks=1))
    got, expected = curve(tmp_path), curve(plain)
    for record in [*got, *expected]:
        record.pop("grad_norm", None)
        record.pop("learning_rate", None)
    assert_same_curve(got, expected, 1e-4)


def wait_for(path, process, seconds=240):
    """Wait until `path` exists, or fail with what the process said."""
    started = time.time()
    while not path.exists():
        if process.poll() is not None or time.time() - started > seconds:
            process.kill()
            pytest.fail(f"{path.name} did not appear: {process.communicate()[0][-6000:]}")
        time.sleep(0.02)


def kill(process):
    """kill -9 a process and, under torchrun, its ranks."""
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    for pid in [process.pid, *map(int, children)]:
        os.kill(pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize("moment", ["run.json", "log.jsonl", "checkpoint-2", "checkpoint-4.incomplete", "adapter"])
def test_kill_9_and_resume_is_the_run_that_was_never_killed(plain, tmp_path, moment):
    process = launch(tmp_path)
    wait_for(tmp_path / moment, process)
    kill(process)
    finish(launch(tmp_path, "--resume_from_checkpoint", "auto"))
    assert curve(tmp_path) == curve(plain)  # bit for bit
    adapters = [(folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (tmp_path, plain)]
    assert adapters[0] == adapters[1]


def test_ctrl_c_says_how_to_go_on(plain, tmp_path):
    process = launch(tmp_path)
    wait_for(tmp_path / "checkpoint-2", process)
    process.send_signal(signal.SIGINT)
    assert "--resume_from_checkpoint auto" in finish(process, code=130)
    finish(launch(tmp_path, "--resume_from_checkpoint", "auto"))
    assert curve(tmp_path) == curve(plain)


def test_torch_compile_runs_and_learns_the_same(plain, tmp_path):
    finish(launch(tmp_path, "--torch_compile", "--max_steps", "2", "--val_set_size", "0"))
    losses = [r["loss"] for r in curve(tmp_path)]
    assert len(losses) == 2
    finish(launch(tmp_path / "eager", "--max_steps", "2", "--val_set_size", "0"))
    assert losses == pytest.approx([r["loss"] for r in curve(tmp_path / "eager")], rel=1e-4)


def test_a_fresh_process_refuses_a_bad_flag_before_it_loads_anything():
    started = time.time()
    said = subprocess.run(
        [sys.executable, "finetune.py", "--learning_rte", "1"], cwd=ROOT, capture_output=True, text=True
    )
    assert said.returncode == 1 and "did you mean --learning_rate?" in said.stderr, said.stderr
    assert time.time() - started < 60
