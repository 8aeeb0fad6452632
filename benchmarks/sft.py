"""
Fine-tuning speed and memory: finetune.py beside the plain padded Trainer recipe, both in one run.

    reads    data/tiny (words and tokenizer); models and rows are made in a temporary folder
    writes   nothing: the figures and their ratios go to the terminal

    speed    python benchmarks/sft.py --measure speed
    memory   python benchmarks/sft.py --measure memory

Both sides train the same adapter on the same examples in the same steps; the losses are compared step by step. The
padded recipe is alpaca-lora's (DataCollatorForSeq2Seq, the model's own loss) on today's API.
"""

import contextlib
import functools
import gc
import io
import json
import random
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
import numpy as np
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import finetune  # noqa: E402 (the script under test, one folder up)

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
            raise SystemExit(f"--{name} takes {hint.__name__}, got {text!r}: a switch is --{name} or --no{name} alone")
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


def write_rows(path, count, seed):
    """Write `count` alpaca rows whose lengths are spread as alpaca's are: most are short, a few ten times as long.

    The words are those of the embedded problems, so that the tiny tokenizer does not fall back to bytes. Prompts
    have a geometric number of sentences, answers a log-normal one (sigma 1.1), cut at 40.
    """
    rng = random.Random(seed)
    with open(ROOT / "data" / "tiny" / "train.jsonl", encoding="utf-8") as file:
        problems = [json.loads(line) for line in file]
    questions = [sentence for p in problems for sentence in re.split(r"(?<=[.?]) ", p["question"])]
    answers = [line for p in problems for line in p["answer"].split("\n") if not line.startswith("#")]
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            long = min(40, max(1, round(rng.lognormvariate(0.9, 1.1))))
            row = {
                "instruction": " ".join(rng.choices(questions, k=min(12, 1 + int(rng.expovariate(0.5))))),
                "input": " ".join(rng.choices(questions, k=2)) if rng.random() < 0.4 else "",
                "output": "\n".join(rng.choices(answers, k=long)),
            }
            file.write(json.dumps(row) + "\n")


def write_model(folder, hidden, layers, vocab, seed):
    """Write a randomly initialized Llama with a vocabulary of `vocab` entries and the tiny tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 128),
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "data" / "tiny" / "model").save_pretrained(folder)


class Clock(TrainerCallback):
    """Collects each optimizer step's loss and seconds, as finetune.py's log does."""

    def __init__(self):
        self.losses, self.seconds = [], []

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.time()

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])
            self.seconds.append(time.time() - self.began)


def padded_recipe(model_dir, data_path, batch_size, micro_batch_size, steps, seed):
    """Train as alpaca-lora's finetune.py does, on today's API: padded micro-batches, the model's own loss.

    The same examples in the same steps as finetune.py takes them, the same adapter and schedule. Returns (losses,
    seconds, tokens), a value a step; padding does not count as tokens.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    _, separator = finetune.use_template(tokenizer, "alpaca")
    rows = finetune.read_conversations([(str(data_path), "train", None, None, None)], separator, 0, seed)
    examples, _ = finetune.encode(rows, tokenizer, cutoff_len=1024)
    lengths = np.array([len(ids) for ids, _ in examples])
    order = finetune.MicroBatches(lengths, batch_size, micro_batch_size, 0, 1, seed, False, False).steps(0)[:steps]
    data = []
    for i in np.concatenate(order):
        ids, learned = examples[i]
        labels = np.where(learned, ids, finetune.IGNORE)
        data.append({"input_ids": ids.tolist(), "attention_mask": [1] * len(ids), "labels": labels.tolist()})
    on_gpu = torch.cuda.is_available()
    dtype = finetune.pick_dtype("auto")
    set_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
    model.config.use_cache = False
    set_seed(seed)
    model = finetune.add_lora(model, ["all-linear"], r=16, lora_alpha=32, lora_dropout=0.0)
    clock = Clock()
    trainer = SequentialTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(Path(model_dir) / "padded"),
            per_device_train_batch_size=micro_batch_size,
            gradient_accumulation_steps=batch_size // micro_batch_size,
            max_steps=steps,
            learning_rate=3e-4,
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not on_gpu,
            bf16=dtype == torch.bfloat16,
        ),
        train_dataset=data,
        data_collator=DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8, return_tensors="pt", padding=True),
        callbacks=[clock],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    measure = peak_memory(model.device)
    trainer.train()
    return clock.losses, clock.seconds, [int(lengths[step].sum()) for step in order], measure()


class SequentialTrainer(Trainer):
    """Trainer that takes the examples in the order of the data set."""

    def _get_train_sampler(self, train_dataset=None):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def packed_recipe(model_dir, data_path, batch_size, micro_batch_size, steps, seed):
    """Train with finetune.py itself; returns what `padded_recipe` returns."""
    out = Path(model_dir) / "packed"
    measures = []
    real = finetune.LoraTrainer.train

    def train(self, *args, **kwargs):
        measure = peak_memory(self.args.device)
        result = real(self, *args, **kwargs)
        measures.append(measure())
        return result

    finetune.LoraTrainer.train = train
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            finetune.train(
                base_model=str(model_dir),
                data_path=str(data_path),
                prompt_template="alpaca",
                output_dir=str(out),
                batch_size=batch_size,
                micro_batch_size=micro_batch_size,
                max_steps=steps,
                learning_rate=3e-4,
                val_set_size=0,
                save_steps=steps,
                seed=seed,
                overwrite=True,
            )
    finally:
        finetune.LoraTrainer.train = real
    records = finetune.read_log(out / "log.jsonl")
    tokens = np.diff([0] + [r["tokens"] for r in records]).tolist()
    return [r["loss"] for r in records], [r["seconds"] for r in records], tokens, measures[0]


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


def compare_training(
    *,
    measure: str = "speed",
    hidden: int = 256,
    layers: int = 4,
    vocab: int = 32000,
    batch_size: int = 32,
    micro_batch_size: int = 8,
    steps: int = 5,
    rounds: int = 3,
    seed: int = 0,
    side: str = "",
    folder: str = "",
):
    """Measure both recipes and print their ratio.

    Args:
        measure: speed (tokens a second that are not padding) or memory (peak above the loaded model).
        hidden: hidden size of the model, a multiple of 128.
        layers: layers of the model.
        vocab: vocabulary entries of the model; --measure memory takes 151936 if this is not set otherwise.
        batch_size: examples of an optimizer step.
        micro_batch_size: examples of a micro-batch.
        steps: optimizer steps of a round; the first is a warm-up and does not count for speed.
        rounds: times that the two sides take turns.
        seed: of everything random.
        side: padded or packed: measure this side alone, in this process, and print it as JSON.
        folder: the model and rows of --side.
    """
    if measure not in ("speed", "memory"):
        raise ValueError(f"--measure {measure}: speed or memory")
    if side:
        recipe = {"padded": padded_recipe, "packed": packed_recipe}[side]
        result = recipe(Path(folder), Path(folder) / "rows.jsonl", batch_size, micro_batch_size, steps, seed)
        print(json.dumps(result))
        return
    if measure == "memory" and vocab == 32000:
        vocab = 151936
    finetune.quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        write_model(folder, hidden, layers, vocab, seed)
        write_rows(Path(folder) / "rows.jsonl", batch_size * steps, seed)
        ratios, gaps = [], []
        for n in range(rounds):
            got = {}
            for side in ("padded", "packed") if n % 2 == 0 else ("packed", "padded"):
                if measure == "memory":  # in a process of its own: what one side leaves behind is not the other's peak
                    flags = dict(batch_size=batch_size, micro_batch_size=micro_batch_size, steps=steps, seed=seed)
                    flags |= {"side": side, "folder": folder, "measure": measure}
                    command = [sys.executable, __file__, *(f"--{name}={value}" for name, value in flags.items())]
                    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                    got[side] = json.loads(said.splitlines()[-1])
                else:
                    recipe = {"padded": padded_recipe, "packed": packed_recipe}[side]
                    got[side] = recipe(folder, Path(folder) / "rows.jsonl", batch_size, micro_batch_size, steps, seed)
            losses = [got[side][0] for side in ("padded", "packed")]
            gaps.append(max(abs(a - b) / abs(a) for a, b in zip(*losses, strict=True)))
            if measure == "speed":
                speed = {s: sum(got[s][2][1:]) / sum(got[s][1][1:]) for s in got}
                ratios.append(speed["packed"] / speed["padded"])
                line = ", ".join(f"{s} {speed[s]:,.0f} tokens/s" for s in ("padded", "packed"))
            else:
                peak = {s: got[s][3] / 2**20 for s in got}
                ratios.append(peak["packed"] / peak["padded"])
                line = ", ".join(f"{s} {peak[s]:,.0f} MiB" for s in ("padded", "packed"))
            print(f"round {n + 1}: {line}, ratio {ratios[-1]:.2f}, losses differ by {gaps[-1]:.1e}", flush=True)
    model = (
        f"hidden {hidden}, {layers} layers, vocabulary {vocab:,}, batch {batch_size}, micro-batch {micro_batch_size}"
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    print(f"{measure}: packed / padded = {statistics.median(ratios):.2f} (median of {rounds})    {model}    {device}")
    return {"ratio": statistics.median(ratios), "ratios": ratios, "loss_gap": max(gaps)}


if __name__ == "__main__":
    run_cli(compare_training)
