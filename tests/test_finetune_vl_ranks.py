"""
finetune_vl.py in processes of its own: several ranks, DeepSpeed ZeRO-3, kill -9. All slow.

    .venv/bin/python -m pytest -m slow tests/test_finetune_vl_ranks.py

DeepSpeed's tests skip themselves without `make .venv/installed-deepspeed`, and compile its CPU operators once: run
them as `make slow` does, with .venv/bin in PATH and TORCH_EXTENSIONS_DIR set.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file
from transformers.integrations import is_deepspeed_available

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data" / "tiny_vl"
FLAGS = f"--base_model {DATA}/model --val_set_size 5 --batch_size 16 --num_epochs 2 --save_steps 2".split()
FLAGS += "--learning_rate 1e-3 --lora_vision".split()
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
# what the clock says, and a count that has the tokens of blank images and of empty micro-batches
CLOCK = {"train_runtime", "train_tokens_per_second", "num_input_tokens_seen"}
pytestmark = pytest.mark.slow
needs_deepspeed = pytest.mark.skipif(not is_deepspeed_available(), reason="deepspeed is not installed")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The path of 48 rows, of which a third has no image: 43 examples, so that an epoch's last step is short."""
    rows = []
    for k, row in enumerate(parquet.read_table(DATA / "train.parquet").to_pylist()[:48]):
        mark, images = ("<image>", [row["image"]]) if k % 3 else ("", [])
        turns = [("user", f"{mark}Using LaTeX"), ("assistant", row["text"])]
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns], "images": images})
    path = tmp_path_factory.mktemp("data") / "mixed.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def launch(data, folder, *flags, ranks=0, script="finetune_vl.py"):
    """Start finetune_vl.py in `folder`, plainly or with `ranks` under torchrun. Returns the process."""
    launcher = [*TORCHRUN, "--standalone", f"--nproc_per_node={ranks}"] if ranks else [sys.executable]
    command = [*launcher, script, "--output_dir", str(folder), "--data_path", data, *FLAGS, *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process, code=0):
    """Wait for a process, and return what it said."""
    said = process.communicate(timeout=900)[0]
    assert process.returncode == code, said[-6000:]
    return said


def kill_when(reached, process, seconds=240):
    """kill -9 a process and, under torchrun, its ranks, as soon as `reached()` is true."""
    started = time.time()
    while not reached():
        if process.poll() is not None or time.time() - started > seconds:
            process.kill()
            pytest.fail(f"it did not come so far: {process.communicate()[0][-6000:]}")
        time.sleep(0.002)
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


def assert_same_curve(one, other, losses=2e-6, norms=1e-5):
    """Relative tolerances; measured on two ranks: 6.8e-7 of losses, 1.2e-6 of gradient norms."""
    assert [record.keys() for record in one] == [record.keys() for record in other]
    for a, b in zip(one, other, strict=True):
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=norms if name == "grad_norm" else losses), (name, a, b)


def assert_same_weights(folder, other, tolerance=5e-3):
    """Adam divides by the gradient's size, so a gradient near zero moves its weight by what it is rounded: 2.2e-4."""
    one, other = weights(folder), weights(other)
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert (weight - other[name]).norm() <= tolerance * other[name].norm(), name


def assert_same_run(folder, other):
    """Bit for bit, blank images included."""
    clock = CLOCK - {"num_input_tokens_seen"}
    assert curve(folder, clock) == curve(other, clock)
    one, two = weights(folder), weights(other)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    for name in ("validation.jsonl", "adapter/preprocessor_config.json"):
        assert (folder / name).read_bytes() == (other / name).read_bytes()
    images = [sorted(path.name for path in (out / "images").iterdir()) for out in (folder, other)]
    assert images[0] == images[1] and record_of(folder)["status"] == "finished"
    assert not list(folder.glob("*.incomplete"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory, data):
    """The folder of the run of one process that the others are compared with."""
    folder = tmp_path_factory.mktemp("plain")
    finish(launch(data, folder))
    return folder


def test_the_run_that_the_others_are_compared_with(plain):
    records = curve(plain)
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert record_of(plain)["counts"] == {"rows": 48, "train": 43, "validation": 5, "cut": 0, "left_out": 0}
    assert any(".visual." in name and "lora_B" in name and weight.any() for name, weight in weights(plain).items())


# -----------------------------------------------------------------------------
# ranks


@pytest.mark.parametrize("size", [1, 8])
def test_two_ranks_are_one(data, plain, tmp_path, size):
    finish(launch(data, tmp_path, "--micro_batch_size", str(size), ranks=2))
    assert_same_curve(curve(tmp_path), curve(plain))
    assert_same_weights(tmp_path, plain)
    assert record_of(tmp_path)["status"] == "finished"
    assert len(list((tmp_path / "checkpoint-6").glob("rng_state*.pth"))) == 2


def test_ranks_may_change_between_kill_and_resume(data, plain, tmp_path):
    process = launch(data, tmp_path, ranks=2)
    kill_when((tmp_path / "checkpoint-2" / "trainer_state.json").exists, process)
    finish(launch(data, tmp_path, "--resume_from_checkpoint", "auto"))
    assert_same_curve(curve(tmp_path), curve(plain))
    assert_same_weights(tmp_path, plain)


@needs_deepspeed
def test_zero3_on_two_ranks_is_one_process(data, plain, tmp_path):
    finish(launch(data, tmp_path, "--deepspeed", "deepspeed/zero3.json", ranks=2))
    assert_same_curve(curve(tmp_path), curve(plain), losses=1e-5, norms=5e-5)
    assert_same_weights(tmp_path, plain)


# -----------------------------------------------------------------------------
# killed runs

KILLED = """
import os, signal, sys
sys.path.insert(0, ROOT)
import finetune_vl
seen = 0
def kill(event, values):
    global seen
    if event == EVENT and str(values[0]).endswith(PATH):
        seen += 1
        if seen == COUNT:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill)
finetune_vl.run_cli(finetune_vl.train)
"""
MOMENTS = {  # the audit event of Python before which the process dies, the end of the path, which time
    "an image of the validation": ("open", "images/1-0.png", 1),
    "validation.jsonl": ("open", "validation.jsonl", 1),
    "checkpoint begun": ("open", "checkpoint-2/README.md", 1),
    "checkpoint whole": ("open", "log.jsonl", 7),
    "last checkpoint": ("open", "checkpoint-6/trainer_state.json", 1),
    "image processor": ("open", "preprocessor_config.json", 2),
    "adapter begun": ("os.rename", "adapter.incomplete", 1),
    "adapter whole": ("os.rename", "run.json.incomplete", 2),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_9_and_resume_is_the_run_that_was_never_killed(data, plain, tmp_path, moment):
    script, out = tmp_path / "killed.py", tmp_path / "out"
    values = dict(zip(("EVENT", "PATH", "COUNT"), MOMENTS[moment], strict=True)) | {"ROOT": str(ROOT)}
    script.write_text("".join(f"{name} = {value!r}\n" for name, value in values.items()) + KILLED)
    finish(launch(data, out, script=str(script)), code=-signal.SIGKILL)
    finish(launch(data, out, "--resume_from_checkpoint", "auto"))
    assert_same_run(out, plain)


# -----------------------------------------------------------------------------
# the command line


def test_a_mistake_on_the_command_line_is_one_sentence(data, tmp_path):
    rows = [{"messages": [{"role": "user", "content": "<image>"}], "images": ["none.png"]}]
    (tmp_path / "bad.json").write_text(json.dumps(rows))
    for flags, code, message in (
        (["--learning_rte", "1"], 2, "Could not consume arg: --learning_rte"),
        (["--batch_size", "10"], 1, "error: --batch_size 10 must be a multiple of 4"),
        (["--data_path", str(tmp_path / "bad.json")], 1, f"error: {tmp_path}/bad.json, row 1: image '{tmp_path}/none"),
    ):
        said = finish(launch(data, tmp_path / "out", *flags), code=code)
        assert message in said and "Traceback" not in said and "Loading weights" not in said
    assert not (tmp_path / "out").exists()


def test_importing_the_script_prints_and_creates_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from finetune_vl import open_image, with_image_tokens"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())
