"""
Memory and time of an export: export_hf_checkpoint.py beside PEFT's merge_and_unload, on one random model in one run.

    reads    nothing: a Llama of 1.3 GB in bfloat16 and a LoRA adapter for it are made in a temporary folder
    writes   nothing: the figures go to the terminal

    no GPU   TMPDIR=/dev/shm python benchmarks/export.py    the files in memory, so that no disk is measured
    a disk   TMPDIR=. python benchmarks/export.py           with what the file system needs for them

Each side runs in a process of its own. Memory is the peak above what the process has after its imports (Linux), with
the pages of mapped files. Two bars for the merge with --max_shard_size 200MB: at most 600 MB, and at most 3 times the
CPU seconds of copying the checkpoint with cp and of the matrix products B A themselves.
"""

import contextlib
import functools
import gc
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import get_type_hints

import fire
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import export_hf_checkpoint  # noqa: E402 (the script under test, one folder up)

# -----------------------------------------------------------------------------
# shared with the other scripts, word for word: tests/test_copies.py compares them


def run_cli(fn):
    """Call `fn` with the flags on the command line, once every flag has been checked against its type.

    By itself fire calls the function first and reports unknown flags afterwards (python-fire#168), and reads
    `--bf16 false` as a text that is true. So it is handed a stand-in that records the call. Flags are `--name value`,
    booleans `--name` or `--noname`. An error that the script itself raises (ValueError) is shown as its
    message alone; any other keeps its traceback.
    """
    hints, call = get_type_hints(fn), {}

    @functools.wraps(fn)
    def record(**flags):
        call.update(flags)

    if {"--help", "-h"} & set(sys.argv[1:]):
        fire.Fire(record, command=["--help"])  # leaves here
    fire.decorators.SetParseFn(str)(record)
    fire.Fire(record, command=[arg for arg in sys.argv[1:] if arg != "--"])  # leaves here on an unknown flag
    for name, text in call.items():
        hint = hints[name]
        if (hint is bool) != (text in ("True", "False")):  # what fire records for a flag that nothing follows
            raise SystemExit(f"--{name} {text}: a switch is --{name} or --no{name} alone, others need a value")
        try:
            call[name] = text == "True" if hint is bool else hint(text)
        except ValueError:
            raise SystemExit(f"--{name} takes {hint.__name__}, got {text!r}") from None
    try:
        return fn(**call)
    except ValueError as error:
        if traceback.extract_tb(error.__traceback__)[-1].filename != fn.__code__.co_filename:
            raise
        raise SystemExit(f"error: {error}") from None


def peak_memory(device):
    """Start measuring; the function returned gives the peak since then, in bytes above what was in use."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return lambda: torch.cuda.max_memory_allocated() - before
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far (Linux)

    def resident(name):
        found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) * 1024

    before = resident("VmRSS")
    return lambda: resident("VmHWM") - before


def write_pair(folder, hidden, layers, vocab, rank, dora, seed):
    """Write folder/base, a random Llama in bfloat16 and files of 400 MB, and folder/adapter, LoRA on all its layers."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu").to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    model.save_pretrained(folder / "base", max_shard_size="400MB")
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", use_dora=dora, init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(folder / "adapter")


def streamed(folder, max_shard_size, check):
    """Export with export_hf_checkpoint.py, and with the self-check if `check`."""
    flags = {"base_model": str(folder / "base"), "lora_weights": str(folder / "adapter"), "check": check}
    flags |= {"output_dir": str(folder / "out"), "overwrite": True, "max_shard_size": max_shard_size}
    with contextlib.redirect_stdout(io.StringIO()):
        export_hf_checkpoint.export(**flags)


def unloaded(folder, max_shard_size):
    """Export as PEFT's documentation does: load all, merge_and_unload, save."""
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload()
    model.save_pretrained(folder / "out", max_shard_size=max_shard_size)


def matrix_products(folder):
    """Compute every update B A, and nothing else."""
    from safetensors.torch import load_file

    weights = load_file(folder / "adapter" / "adapter_model.safetensors")
    for name, a in weights.items():
        if ".lora_A." in name:
            weights[name.replace("lora_A", "lora_B")].float() @ a.float()


def measure_side(side, folder, max_shard_size):
    """Run one side in this process; returns {"seconds", "cpu": seconds, "peak": bytes above the imports}."""
    import peft  # noqa: F401 (every import that a side makes later)
    from transformers.models.llama import modeling_llama  # noqa: F401

    export_hf_checkpoint.quiet_libraries()
    sides = {"products": matrix_products, "peft": functools.partial(unloaded, max_shard_size=max_shard_size)}
    for name, check in (("streamed", False), ("check", True)):
        sides[name] = functools.partial(streamed, max_shard_size=max_shard_size, check=check)
    measure, started, cpu = peak_memory(torch.device("cpu")), time.time(), time.process_time()
    sides[side](folder)
    return {"seconds": time.time() - started, "cpu": time.process_time() - cpu, "peak": measure()}


def compare_exports(
    *,
    hidden: int = 2048,
    layers: int = 8,
    vocab: int = 32000,
    rank: int = 16,
    use_dora: bool = False,
    max_shard_size: str = "200MB",
    rounds: int = 3,
    seed: int = 0,
    side: str = "",
    folder: str = "",
):
    """Measure both sides, cp and the matrix products, and print the ratios beside the bars.

    Args:
        hidden: hidden size of the model, a multiple of 128.
        layers: layers of the model.
        vocab: vocabulary entries of the model.
        rank: of the adapter, on every linear layer but the output.
        use_dora: make it a DoRA adapter.
        max_shard_size: largest weight file, such as 400MB or 5GB.
        rounds: times that the sides take turns; medians are printed.
        seed: of everything random.
        side: streamed, check, peft or products: measure this side alone, in this process, and print it as JSON.
        folder: the model and adapter of --side.
    """
    if side:
        print(json.dumps(measure_side(side, Path(folder), max_shard_size)))
        return
    got = {name: [] for name in ("cp", "products", "streamed", "check", "peft")}
    with tempfile.TemporaryDirectory() as made:
        made = Path(made)
        write_pair(made, hidden, layers, vocab, rank, use_dora, seed)
        gc.collect()
        size = sum(path.stat().st_size for path in (made / "base").iterdir())
        for n in range(rounds):
            for name in got:
                subprocess.run(["rm", "-rf", made / "copy", made / "out"], check=True)
                subprocess.run(["sync"], check=True)  # what the last side wrote must not slow this one down
                if name == "cp":
                    started, cpu = time.time(), os.times()
                    subprocess.run(["cp", "-r", made / "base", made / "copy"], check=True)
                    cpu = sum(os.times()[2:4]) - sum(cpu[2:4])  # of child processes
                    got[name].append({"seconds": time.time() - started, "cpu": cpu, "peak": 0})
                else:
                    command = [
                        sys.executable,
                        __file__,
                        f"--side={name}",
                        f"--folder={made}",
                        f"--max_shard_size={max_shard_size}",
                    ]
                    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
                    got[name].append(json.loads(said.splitlines()[-1]))
            line = ", ".join(f"{name} {runs[-1]['cpu']:.1f} s" for name, runs in got.items())
            print(f"round {n + 1}: {line}", flush=True)
    peak = {name: statistics.median(run["peak"] for run in runs) / 1e6 for name, runs in got.items()}
    cpu = {name: statistics.median(run["cpu"] for run in runs) for name, runs in got.items()}
    floor = cpu["cp"] + cpu["products"]
    where = tempfile.gettempdir()
    print(f"model     {size / 1e9:.2f} GB in bfloat16, rank {rank}, files of {max_shard_size} in {where}")
    print(f"floor     {floor:.1f} CPU seconds = cp {cpu['cp']:.1f} + products {cpu['products']:.1f}; bars 3 x, 600 MB")
    for name in ("streamed", "check", "peft"):
        print(f"  {name:9s} {cpu[name]:8.1f} CPU seconds {cpu[name] / floor:5.2f} x {peak[name]:8.0f} MB")
    return {"cpu": cpu, "peak_mb": peak, "cpu_ratio": cpu["streamed"] / floor}


if __name__ == "__main__":
    run_cli(compare_exports)
