"""
ppo_gsm8k.py in processes of its own: two ranks, kill -9, Ctrl-C, a rank without work. All slow.

    .venv/bin/python -m pytest -m slow tests/test_ppo_ranks.py
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_ppo import assert_same_weights, curve, make_kit, settings, weights

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow
REWARD = """
import json
import os

RANK = os.environ.get("RANK", "0")


def digits(data_source, solution_str, ground_truth, extra_info):
    if "DUMP" in os.environ:
        with open(os.environ["DUMP"], "a") as file:
            file.write(json.dumps([extra_info["question"], solution_str]) + "\\n")
    return sum(c.isdigit() for c in solution_str) / max(1, len(solution_str))


def fails_on_rank_1(data_source, solution_str, ground_truth, extra_info):
    if RANK == "1":
        raise RuntimeError("only here")
    return 1.0
"""
# as the script, but the actor's third mini-batch has an infinite loss on the last rank alone
POISONED = """
import itertools
import math
import os

import ppo_gsm8k as ppo

loss_of, calls = ppo.actor_loss, itertools.count()
last = os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)


def spoiled(*args, **counts):
    loss, metrics = loss_of(*args, **counts)
    return loss * (math.inf if next(calls) == 2 and last else 1), metrics


ppo.actor_loss = spoiled
ppo.run_cli(ppo.train_ppo)
"""


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    kit = make_kit(tmp_path_factory.mktemp("kit"))
    kit.reward.write_text(REWARD)
    return kit


def launch(kit, folder, ranks=0, script="ppo_gsm8k.py", env=None, torchrun=(), **flags):
    """Start ppo_gsm8k.py in `folder`: under torchrun with `ranks` processes, or plainly with 0. Returns the process."""
    flags = settings(kit, **({"total_training_steps": 4, "save_freq": 1, "val_files": kit.val, "test_freq": 2} | flags))
    python = [sys.executable]
    if ranks:
        agent = torchrun or ("--standalone",)
        python += ["-m", "torch.distributed.run", *agent, f"--nproc_per_node={ranks}"]
    command = [*python, str(script), "--output_dir", str(folder)]
    for name, value in flags.items():
        command += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | (env or {})
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process, code=0):
    try:
        said = process.communicate(timeout=400)[0]
    except subprocess.TimeoutExpired:
        kill(process)
        pytest.fail("it hangs")
    assert process.returncode == code, said[-6000:]
    return said


def wait_for(path, process, seconds=240):
    """Wait until `path` exists, or fail with what the process said."""
    started = time.time()
    while not path.exists():
        if process.poll() is not None or time.time() - started > seconds:
            process.kill()
            pytest.fail(f"{path.name} did not appear: {process.communicate()[0][-6000:]}")
        time.sleep(0.001)


def kill(process):
    """kill -9 a process and, under torchrun, its ranks."""
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    for pid in [process.pid, *map(int, children)]:
        os.kill(pid, signal.SIGKILL)
    process.communicate()


def assert_close(one, other, tolerance=1e-4):
    """Two curves are equal but for rounding; what is a small difference of large numbers has an absolute tolerance."""
    assert [(r["training/global_step"], sorted(r)) for r in one] == [
        (r["training/global_step"], sorted(r)) for r in other
    ]
    for a, b in zip(one, other, strict=True):
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=tolerance, abs=2e-5), (name, a, b)


@pytest.fixture(scope="module")
def plain(kit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    finish(launch(kit, folder / "run", env={"DUMP": str(folder / "said")}))
    return folder / "run"


@pytest.fixture(scope="module")
def two(kit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    finish(launch(kit, folder / "run", ranks=2, env={"DUMP": str(folder / "said")}))
    return folder / "run"


def said(folder):
    """Return what was scored, in any order: validation, then 6 responses a step."""
    return [json.loads(line) for line in (folder.parent / "said").read_text().splitlines()]


def test_two_ranks_are_one(plain, two):
    assert_close(curve(two), curve(plain))
    assert sorted(said(two)[:11]) == sorted(said(plain)[:11])  # validation before training, and the first step
    generations = [[json.loads(x) for x in (f / "val_generations" / "step-00000.jsonl").open()] for f in (two, plain)]
    assert generations[0] == generations[1]
    one, other = weights(two), weights(plain)
    for name, p in one.items():
        torch.testing.assert_close(p, other[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "flags",
    [
        {"train_batch_size": 1, "ppo_mini_batch_size": 1},  # one rank has nothing to do
        {"ppo_max_tokens": 1, "ppo_mini_batch_size": 3, "train_batch_size": 3},  # 2 micro-batches here, 1 there
        {"lora_r": 0, "actor_lr": 1e-5, "critic_lr": 1e-5},  # FSDP2
        {
            "lora_r": 0,
            "actor_lr": 1e-5,
            "train_batch_size": 1,
            "ppo_mini_batch_size": 1,
            "adv_estimator": "rloo",
            "rollout_n": 3,
            "activation_checkpointing": True,
        },
        {"loss_agg_mode": "seq-mean-token-mean", "adv_estimator": "reinforce_plus_plus", "ppo_epochs": 2},
    ],
    ids=str,
)
def test_uneven_ranks_are_one(kit, tmp_path, flags):
    flags = flags | {"total_training_steps": 2, "save_freq": 0}
    finish(launch(kit, tmp_path / "two", ranks=2, **flags))
    finish(launch(kit, tmp_path / "one", **flags))
    assert_close(curve(tmp_path / "two"), curve(tmp_path / "one"))


def test_two_machines_are_one(kit, plain, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agents = []
    for rank in (0, 1):
        torchrun = ("--nnodes=2", f"--node_rank={rank}", "--master_addr=127.0.0.1", f"--master_port={port}")
        agents.append(launch(kit, tmp_path, ranks=1, torchrun=torchrun))
    for agent in agents:
        finish(agent)
    assert_close(curve(tmp_path), curve(plain))


def test_a_sharded_run_goes_on_with_another_number_of_ranks(kit, tmp_path):
    flags = {"lora_r": 0, "actor_lr": 1e-5, "critic_lr": 1e-5}
    for steps, ranks in ((1, 2), (2, 0), (3, 2)):
        finish(launch(kit, tmp_path / "changing", ranks=ranks, total_training_steps=steps, **flags))
    finish(launch(kit, tmp_path / "one", total_training_steps=3, **flags))
    changing, one = curve(tmp_path / "changing"), curve(tmp_path / "one")
    changing = [record for record in changing if "critic/score/mean" in record]  # validated at the end of each
    one = [record for record in one if "critic/score/mean" in record]
    for records in (changing, one):
        for record in records:
            record.pop("val-core/openai/gsm8k/reward/mean@1", None)
    assert_close(changing, one)
    a, b = weights(tmp_path / "changing", "model"), weights(tmp_path / "one", "model")
    for name, p in a.items():
        torch.testing.assert_close(p, b[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("before, after", [(2, 0), (0, 2)])
def test_ranks_may_change_between_kill_and_resume(kit, plain, tmp_path, before, after):
    process = launch(kit, tmp_path, ranks=before)
    wait_for(tmp_path / "checkpoint-2", process)
    kill(process)
    finish(launch(kit, tmp_path, ranks=after))
    assert_close(curve(tmp_path), curve(plain))


@pytest.mark.parametrize("ranks", [0, 2])
@pytest.mark.parametrize(
    "moment", ["checkpoint-1.incomplete", "checkpoint-2", "checkpoint-3.incomplete", "actor.incomplete"]
)
def test_kill_9_and_the_same_command_is_the_run_that_was_never_killed(kit, plain, two, tmp_path, moment, ranks):
    process = launch(kit, tmp_path, ranks=ranks)
    wait_for(tmp_path / moment, process)
    kill(process)
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "running"
    finish(launch(kit, tmp_path, ranks=ranks))
    whole = two if ranks else plain
    assert curve(tmp_path) == curve(whole)  # bit for bit
    assert_same_weights(weights(tmp_path), weights(whole))
    assert not list(tmp_path.glob("*.incomplete"))


def test_kill_9_before_the_first_step(kit, plain, tmp_path):
    process = launch(kit, tmp_path)
    wait_for(tmp_path / "run.json", process)
    kill(process)
    finish(launch(kit, tmp_path))
    assert curve(tmp_path) == curve(plain)


def test_ctrl_c_says_how_to_go_on(kit, plain, tmp_path):
    process = launch(kit, tmp_path)
    wait_for(tmp_path / "checkpoint-2", process)
    process.send_signal(signal.SIGINT)
    assert "the same command, without --overwrite, goes on from the last checkpoint" in finish(process, code=130)
    finish(launch(kit, tmp_path))
    assert curve(tmp_path) == curve(plain)


def test_an_error_on_one_rank_ends_all_of_them(kit, tmp_path):
    flags = {"reward": f"{kit.reward}:fails_on_rank_1", "val_files": "", "test_freq": 1}
    output = finish(launch(kit, tmp_path, ranks=2, **flags), code=1)
    assert "error: the reward function failed on" in output and "RuntimeError('only here')" in output
    assert "Could not consume arg: --gama" in finish(launch(kit, tmp_path, ranks=2, gama=1), code=1)


def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all(kit, tmp_path):
    (tmp_path / "poisoned.py").write_text(POISONED)
    finish(launch(kit, tmp_path / "run", ranks=2, script=tmp_path / "poisoned.py", total_training_steps=2))
    records = curve(tmp_path / "run")[1:]
    assert sum(r["actor/skipped_updates"] for r in records) == 1
    assert all(p.isfinite().all() for p in weights(tmp_path / "run").values())


def test_a_fresh_process_refuses_a_bad_flag_before_it_loads_anything():
    started = time.time()
    command = [sys.executable, "ppo_gsm8k.py", "--rollout_m", "1"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert output.returncode == 2 and "Could not consume arg: --rollout_m" in output.stderr, output.stderr
    assert time.time() - started < 60
