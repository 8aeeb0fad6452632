"""
finetune.py in processes of its own: several ranks and machines, accelerate, DeepSpeed, kill -9. All slow.

    .venv/bin/python -m pytest -m slow tests/test_finetune_ranks.py

DeepSpeed's tests skip themselves without `make .venv/installed-deepspeed`, and compile its CPU operators once: run
them as `make slow` does, with .venv/bin in PATH and TORCH_EXTENSIONS_DIR set.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.integrations import is_deepspeed_available

ROOT = Path(__file__).resolve().parent.parent
FLAGS = "--data_path data/tiny/test.jsonl --max_samples 52 --val_set_size 9 --batch_size 16 --num_epochs 2".split()
FLAGS += "--save_steps 2 --learning_rate 3e-3".split()  # 43 examples: the last step of an epoch is short and uneven
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
# what the clock says, and a count that has two filler tokens for each empty micro-batch of an epoch's last step
CLOCK = {"train_runtime", "train_tokens_per_second", "num_input_tokens_seen"}
pytestmark = pytest.mark.slow
needs_deepspeed = pytest.mark.skipif(not is_deepspeed_available(), reason="deepspeed is not installed")


def launch(folder, *flags, ranks=0, launcher=None, script="finetune.py"):
    """Start finetune.py in `folder`: plainly, with `ranks` under torchrun, or with a launcher. Returns the process."""
    if ranks:
        launcher = [*TORCHRUN, "--standalone", f"--nproc_per_node={ranks}"]
    command = [*(launcher or [sys.executable]), script, "--output_dir", str(folder), *FLAGS, *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process, code=0):
    """Wait for a process, and return what it said."""
    said = process.communicate(timeout=900)[0]
    assert process.returncode == code, said[-6000:]
    return said


def wait_for(reached, process, seconds=240):
    """Wait until `reached()` is true, or fail with what the process said."""
    started = time.time()
    while not reached():
        if process.poll() is not None or time.time() - started > seconds:
            process.kill()
            pytest.fail(f"it did not come so far: {process.communicate()[0][-6000:]}")
        time.sleep(0.002)


def kill(process):
    """kill -9 a process and, under torchrun, its ranks."""
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    for pid in [process.pid, *map(int, children)]:
        os.kill(pid, signal.SIGKILL)
    process.communicate()


def curve(folder, without=CLOCK):
    """Return the records of a run's log.jsonl without what may differ."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in without} for record in records]


def record_of(folder):
    return json.loads((folder / "run.json").read_text())


def weights(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_same_curve(one, other, losses=1e-6, norms=5e-6):
    """Relative tolerances; measured on ranks, machines and accelerate: 3.6e-7 of losses, 2.2e-6 of gradient norms."""
    assert [record.keys() for record in one] == [record.keys() for record in other]
    for a, b in zip(one, other, strict=True):
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=norms if name == "grad_norm" else losses), (name, a, b)


def assert_same_weights(folder, other, tolerance=5e-3):
    """Adam divides by the gradient's size, so a gradient near zero moves its weight by what it is rounded: 6.7e-4."""
    one, other = weights(folder), weights(other)
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert (weight - other[name]).norm() <= tolerance * other[name].norm(), name


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The folder of the run of one process that the others are compared with."""
    folder = tmp_path_factory.mktemp("plain")
    finish(launch(folder))
    return folder


# -----------------------------------------------------------------------------
# ranks and machines


def ranks_of(folder):
    """Return how many ranks wrote the last checkpoint."""
    return len(list((folder / "checkpoint-6").glob("rng_state*.pth")))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_two_ranks_are_one(plain, tmp_path, size):
    finish(launch(tmp_path, "--micro_batch_size", str(size), ranks=2))
    assert_same_curve(curve(tmp_path), curve(plain))
    assert_same_weights(tmp_path, plain)
    assert record_of(tmp_path)["status"] == "finished" and ranks_of(tmp_path) == 2 and ranks_of(plain) == 1


def test_two_machines_are_two_ranks(plain, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    rendezvous = ["--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}", "--rdzv_id=7"]
    agents = []
    for rank in (0, 1):
        launcher = [*TORCHRUN, "--nnodes=2", f"--node_rank={rank}", *rendezvous, "--nproc_per_node=1"]
        agents.append(launch(tmp_path, launcher=launcher))
    said = [finish(agent) for agent in agents]
    assert_same_curve(curve(tmp_path), curve(plain))
    assert_same_weights(tmp_path, plain)
    assert ranks_of(tmp_path) == 2 and sum("wrote " in text for text in said) == 1


def test_accelerate_launch(plain, tmp_path):
    accelerate = Path(sys.executable).parent / "accelerate"
    # --multi_gpu is its word for several processes, with gloo where there is no GPU; with --cpu it starts one
    finish(launch(tmp_path, launcher=[accelerate, "launch", "--multi_gpu", "--num_processes", "2"]))
    assert_same_curve(curve(tmp_path), curve(plain))
    assert ranks_of(tmp_path) == 2


def test_variants_train_on_two_ranks(tmp_path):
    flags = ["--use_dora", "--activation_checkpointing", "--lora_dropout", "0.1", "--neftune_noise_alpha", "5"]
    finish(launch(tmp_path, *flags, ranks=2))
    losses = [record["loss"] for record in curve(tmp_path) if "loss" in record]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_ranks_may_change_between_kill_and_resume(plain, tmp_path, before, after):
    process = launch(tmp_path, ranks=before)
    wait_for((tmp_path / "checkpoint-2" / "trainer_state.json").exists, process)
    kill(process)
    finish(launch(tmp_path, "--resume_from_checkpoint", "auto", ranks=after))
    assert_same_curve(curve(tmp_path), curve(plain))
    assert_same_weights(tmp_path, plain)


# -----------------------------------------------------------------------------
# DeepSpeed


ZERO = {"losses": 2e-6, "norms": 2e-5}  # measured: 1.2e-7 and 2.0e-6, with the offloaded optimizer 8.4e-7 and 5.1e-6


@needs_deepspeed
@pytest.mark.parametrize(
    "zero, ranks",
    [("zero1", 2), ("zero2", 2), ("zero3", 2), ("zero2_offload", 1), ("zero3_offload", 2)],
)
def test_deepspeed_changes_nothing_but_memory(plain, tmp_path, zero, ranks):
    finish(launch(tmp_path, "--deepspeed", f"deepspeed/{zero}.json", ranks=ranks))
    assert_same_curve(curve(tmp_path), curve(plain), **ZERO)
    assert_same_weights(tmp_path, plain)
    assert record_of(tmp_path)["best_checkpoint"] == record_of(plain)["best_checkpoint"]


@needs_deepspeed
def test_deepspeed_zero3_with_activation_checkpointing_and_one_by_one(plain, tmp_path):
    flags = ["--deepspeed", "deepspeed/zero3.json", "--activation_checkpointing"]
    for size in ("1", "4"):
        finish(launch(tmp_path / size, *flags, "--micro_batch_size", size, ranks=2))
        assert_same_curve(curve(tmp_path / size), curve(plain), **ZERO)


@needs_deepspeed
@pytest.mark.parametrize("zero, ranks", [("zero2", 1), ("zero3", 2)])
def test_deepspeed_resumes(plain, tmp_path, zero, ranks):
    flags = ["--deepspeed", f"deepspeed/{zero}.json"]
    process = launch(tmp_path, *flags, ranks=ranks)
    wait_for((tmp_path / "checkpoint-2" / "trainer_state.json").exists, process)
    kill(process)
    finish(launch(tmp_path, *flags, "--resume_from_checkpoint", "auto", ranks=ranks))
    assert_same_curve(curve(tmp_path), curve(plain), **ZERO)
    assert_same_weights(tmp_path, plain)


@needs_deepspeed
def test_deepspeed_without_a_launcher_is_refused(tmp_path):
    said = finish(launch(tmp_path, "--deepspeed", "deepspeed/zero2.json"), code=1)
    assert said.strip().endswith(
        "--deepspeed needs a launcher: torchrun --nproc_per_node=1, and the script with its flags"
    )


# -----------------------------------------------------------------------------
# killed runs

SLOW_DISK = """
import sys, time, transformers
sys.path.insert(0, ".")
import finetune
real = transformers.TrainerState.save_to_json
def save(self, path):
    if "checkpoint-4" in path:
        open(path, "w").write('{"global_step": 4, "epo') if TORN else None
        time.sleep(60)
    real(self, path)
transformers.TrainerState.save_to_json = save
finetune.run_cli(finetune.train)
"""
KILLED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
sys.path.insert(0, ROOT)
import finetune
seen = 0
def kill(event, values):
    global seen
    if event == EVENT and str(values[0]).endswith(PATH):
        seen += 1
        if seen == COUNT:
            os.kill(os.getpid(), SIGNAL)
sys.addaudithook(kill)
finetune.run_cli(finetune.train)
"""
MOMENTS = {  # the audit event of Python before which the process dies, the end of the path, which time
    "validation.jsonl": ("open", "validation.jsonl", 1),
    "run.json": ("os.rename", "run.json.incomplete", 1),
    "first log line": ("open", "log.jsonl", 2),
    "checkpoint begun": ("open", "checkpoint-2/README.md", 1),
    "checkpoint whole": ("open", "log.jsonl", 7),
    "last checkpoint": ("open", "checkpoint-6/trainer_state.json", 1),
    "adapter begun": ("os.rename", "adapter.incomplete", 1),
    "adapter whole": ("os.rename", "run.json.incomplete", 2),
}


def assert_same_run(folder, other):
    """Bit for bit, filler tokens included."""
    clock = CLOCK - {"num_input_tokens_seen"}
    assert curve(folder, clock) == curve(other, clock)
    one, other = weights(folder), weights(other)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert record_of(folder)["status"] == "finished"
    assert not list(folder.glob("*.incomplete"))


def signalled(folder, out, event, path, count, number):
    """Start finetune.py so that it gets a signal at the audit event `event` on a path, the count-th time."""
    script = folder / "signalled.py"
    values = {"EVENT": event, "PATH": path, "COUNT": count, "SIGNAL": int(number), "ROOT": str(ROOT)}
    script.write_text("".join(f"{name} = {value!r}\n" for name, value in values.items()) + KILLED)
    return launch(out, script=str(script))


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_9_and_resume_is_the_run_that_was_never_killed(plain, tmp_path, moment):
    out = tmp_path / "out"
    finish(signalled(tmp_path, out, *MOMENTS[moment], signal.SIGKILL), code=-signal.SIGKILL)
    finish(launch(out, "--resume_from_checkpoint", "auto"))
    assert_same_run(out, plain)


@pytest.mark.parametrize("torn", [False, True], ids=["no state", "half a state"])
def test_kill_9_within_a_checkpoint_goes_on_from_the_one_before(plain, tmp_path, torn):
    script = tmp_path / "slow_disk.py"
    script.write_text(SLOW_DISK.replace("TORN", str(torn)))
    out = tmp_path / "out"
    process = launch(out, script=str(script))
    wait_for(lambda: list((out / "checkpoint-4").glob("trainer_state.json" if torn else "rng_state.pth")), process)
    time.sleep(0.2)  # into the sleep
    kill(process)
    assert (out / "checkpoint-4" / "trainer_state.json").exists() == torn
    said = finish(launch(out, "--resume_from_checkpoint", "auto"))
    assert f"from {out}/checkpoint-2" in said
    assert_same_run(out, plain)


def test_kill_9_with_dropout_and_noise_on_two_ranks(tmp_path):
    flags = ["--lora_dropout", "0.1", "--neftune_noise_alpha", "5"]
    finish(launch(tmp_path / "whole", *flags, ranks=2))
    process = launch(tmp_path / "killed", *flags, ranks=2)
    wait_for((tmp_path / "killed" / "checkpoint-4" / "trainer_state.json").exists, process)
    kill(process)
    shutil.rmtree(tmp_path / "killed" / "checkpoint-6", ignore_errors=True)  # it may have come so far
    finish(launch(tmp_path / "killed", *flags, "--resume_from_checkpoint", "auto", ranks=2))
    assert_same_run(tmp_path / "killed", tmp_path / "whole")  # each rank has its own noise again


def test_ctrl_c_says_how_to_go_on(plain, tmp_path):
    out = tmp_path / "out"
    said = finish(signalled(tmp_path, out, "open", "log.jsonl", 5, signal.SIGINT), code=130)  # after checkpoint-2
    assert "--resume_from_checkpoint auto goes on" in said and "Traceback" not in said
    finish(launch(out, "--resume_from_checkpoint", "auto"))
    assert_same_run(out, plain)


# -----------------------------------------------------------------------------
# the command line


@pytest.mark.parametrize(
    "flag, code, message",
    [
        (["--learning_rte", "1"], 2, "Could not consume arg: --learning_rte"),
        (["--learning_rate", "fast"], 1, "--learning_rate takes float, got 'fast'"),
        (["--batch_size", "10"], 1, "error: --batch_size 10 must be a multiple of 4"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_mistake_on_the_command_line_is_one_sentence(tmp_path, flag, code, message):
    said = finish(launch(tmp_path / "out", *flag), code=code)
    assert message in said and "Traceback" not in said and "Loading weights" not in said
    assert not (tmp_path / "out").exists()


def test_importing_the_script_prints_and_creates_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from finetune import encode, pack, use_template"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())
