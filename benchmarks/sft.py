"""
Fine-tuning speed and memory on a CPU: finetune.py beside a padded Trainer, and beside TRL's SFTTrainer.

    reads    data/tiny (words and tokenizer), or --data_path and --tokenizer; models are made in a temporary folder
    writes   nothing but .venv/trl (--measure trl): figures go to the terminal, and last the median of their ratios

    speed    python benchmarks/sft.py --measure speed
             python benchmarks/sft.py --measure speed --vocab 151936 --hidden 128 --layers 2 --steps 3
    memory   python benchmarks/sft.py --measure memory
    TRL      python benchmarks/sft.py --measure trl

Each side runs in a process of its own, on one thread, and trains the same adapter on the same tokens and labels at
the same constant learning rate; only packed rows of TRL put other examples into a step. Counted are tokens that are
no padding, and the CPU seconds of all steps but the first, from which other work on the machine takes nothing away.
The padded recipe is alpaca-lora's (DataCollatorForSeq2Seq, the model's own loss) on today's API.
"""

import functools
import gc
import json
import logging
import math
import os
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

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # when it is imported, it asks for an optional package

import fire
import numpy as np
import peft
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import finetune  # noqa: E402 (the script under test, one folder up)

OURS = "finetune.py"
TRL_MODES = ["TRL padded", "TRL padding_free", "TRL packing"]
MEASURES = {  # what is not given: hidden size, layers, vocabulary, examples of a step and of a micro-batch, steps
    "speed": (256, 4, 32000, 32, 8, 5),
    "memory": (128, 2, 151936, 32, 8, 2),
    "trl": (576, 30, 49152, 8, 4, 5),  # SmolLM2-135M's shape
}

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


# -----------------------------------------------------------------------------
# what is trained


def write_model(folder, hidden, layers, vocab, seed):
    """Write a randomly initialized Llama."""
    torch.manual_seed(seed)
    heads = hidden // 64
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=128 * math.ceil(hidden / 48),  # 8/3, rounded up
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=math.isqrt(heads),
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def made_rows(like, count, seed):
    """Return `count` rows out of the embedded problems, in whose words the tiny tokenizer has few tokens.

    Their lengths are spread as alpaca's (most are short, a few ten times as long: a geometric number of sentences,
    a log-normal one of lines), or as GSM8K's: some 55 tokens of question and 108 of answer, log-normal with the
    sigmas that they have there, 0.35 and 0.43.
    """
    rng = random.Random(seed)
    sentences, lines, rows = [], [], []
    for problem in finetune.load_rows(ROOT / "data" / "tiny" / "train.jsonl"):
        sentences += re.split(r"(?<=[.?]) ", problem["question"])
        lines += problem["answer"].split("\n")[:-1]
    for _ in range(count):
        row = {}
        if like == "gsm8k":
            asked, told = round(rng.lognormvariate(1.8, 0.35)), round(rng.lognormvariate(2.1, 0.43))
        else:
            asked, told = min(12, 1 + int(rng.expovariate(0.5))), round(rng.lognormvariate(0.9, 1.1))
            row["input"] = " ".join(rng.choices(sentences, k=2)) if rng.random() < 0.4 else ""
        row["instruction"] = " ".join(rng.choices(sentences, k=asked))
        row["output"] = "\n".join(rng.choices(lines, k=min(40, max(1, told))))
        rows.append(row)
    return rows


def examples_in_order(folder, tokenizer, seed):
    """Return the examples of folder/rows.jsonl as finetune.py tokenizes them, in the order in which it takes them."""
    _, separator = finetune.use_template(tokenizer, "")
    end, examples = finetune.end_of_answers(tokenizer), []
    for row in finetune.load_rows(folder / "rows.jsonl"):
        for ids, labels in finetune.encode(finetune.to_messages(row, separator), tokenizer, end):
            examples.append({"input_ids": ids[:1024], "labels": labels[:1024]})
    order = np.random.default_rng([seed, 0]).permutation(len(examples))
    return [examples[i] for i in order]


# -----------------------------------------------------------------------------
# the sides


class Meter(transformers.TrainerCallback):
    """Takes down the loss of each step, and the CPU seconds, tokens and memory of a training run."""

    def __init__(self):
        self.losses, self.seconds, self.tokens, self.peak = [], [], [], 0.0

    def resident(self, name):
        """Return a figure of this process (Linux), in MiB."""
        found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) / 1024

    def on_train_begin(self, args, state, control, model, **kwargs):
        for weight in model.parameters():
            weight.sum()  # reads what is still on the disk: all of the loaded model is in memory
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        self.before = self.resident("VmRSS")

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.process_time())
        self.tokens.append(state.num_input_tokens_seen)

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])

    def on_train_end(self, args, state, control, **kwargs):
        self.peak = self.resident("VmHWM") - self.before

    def result(self):
        speed = (self.tokens[-1] - self.tokens[0]) / (self.seconds[-1] - self.seconds[0])
        return {"speed": speed, "peak": self.peak, "losses": self.losses, "tokens": self.tokens[-1]}


def our_side(folder, meter, batch_size, micro_batch_size, steps, seed):
    """Train with finetune.py."""
    finetune.LoraTrainer = functools.partial(finetune.LoraTrainer, callbacks=[meter])
    finetune.train(
        base_model=str(folder),
        data_path=str(folder / "rows.jsonl"),
        output_dir=str(folder / "finetune"),
        val_set_size=0,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        max_steps=steps,
        learning_rate=3e-4,
        lr_scheduler_type="constant",
        warmup_ratio=0,
        save_steps=steps,
        overwrite=True,
        seed=seed,
    )


def other_side(side, folder, meter, batch_size, micro_batch_size, steps, seed):
    """Train with the padded recipe or a mode of TRL."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    examples = examples_in_order(folder, tokenizer, seed)
    transformers.set_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(folder)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=16, lora_alpha=32)
    model = peft.get_peft_model(model, lora)
    settings = dict(
        output_dir=str(folder / "other"),
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=batch_size // micro_batch_size,
        max_steps=steps,
        learning_rate=3e-4,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=seed,
        include_num_input_tokens_seen="non_padding" if "padded" in side else "all",
    )
    if side in TRL_MODES:
        trainer = trl_trainer(side, model, tokenizer, examples, settings)
    else:
        trainer = transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(**settings),
            train_dataset=examples,
            data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8),
        )
    trainer.add_callback(meter)
    trainer.train()


def trl_trainer(side, model, tokenizer, examples, settings):
    """Return TRL's SFTTrainer in one of its modes, with float32 and without checkpointing as in the other sides.

    A packed row is alone in its micro-batch, and has room for the 1,024 tokens that are TRL's default.
    """
    import datasets
    from trl import SFTConfig, SFTTrainer

    settings |= {"bf16": False, "gradient_checkpointing": False, "max_length": None}
    if side == "TRL padding_free":
        settings["padding_free"] = True
    if side == "TRL packing":
        settings |= {"packing": True, "max_length": 1024, "per_device_train_batch_size": 1}
    return SFTTrainer(
        model=model,
        args=SFTConfig(**settings),
        train_dataset=datasets.Dataset.from_list(examples),
        processing_class=tokenizer,
    )


def measure_recipe(side, folder, **sizes):
    """Train one side in this process, and return what its Meter took down."""
    meter = Meter()
    if side == OURS:
        our_side(Path(folder), meter, **sizes)
    else:
        other_side(side, Path(folder), meter, **sizes)
    return meter.result()


# -----------------------------------------------------------------------------
# the comparison


def trl_python():
    """Return the Python of .venv/trl, which has what requirements-trl.txt lists."""
    folder = ROOT / ".venv" / "trl"
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, "-r", ROOT / "requirements-trl.txt"], check=True)
    return python


def run_side(python, **job):
    """Return `measure_recipe(**job)` of a process of its own: what one side leaves behind is not the other's."""
    code = "import json, sys, sft; print(json.dumps(sft.measure_recipe(**json.loads(sys.argv[1]))))"
    done = subprocess.run(
        [python, "-c", code, json.dumps(job)],
        cwd=ROOT / "benchmarks",
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ValueError(f"{job['side']} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare_training(
    *,
    measure: str = "speed",
    hidden: int = 0,
    layers: int = 0,
    vocab: int = 0,
    batch_size: int = 0,
    micro_batch_size: int = 0,
    steps: int = 0,
    rounds: int = 3,
    data_path: str = "",
    tokenizer: str = "data/tiny/model",
    seed: int = 0,
):
    """Measure finetune.py and the other side in turns, and print the median of the ratios.

    Args:
        measure: speed or memory beside the padded recipe, or trl for both beside the best of TRL's modes.
        hidden: hidden size of the model, a multiple of 64; 0 here and below for what the measure takes.
        layers: layers of the model.
        vocab: vocabulary entries of the model.
        batch_size: examples of an optimizer step.
        micro_batch_size: examples of a micro-batch.
        steps: optimizer steps of a round, at least 2; the first does not count for speed.
        rounds: times that the sides take turns.
        data_path: rows to train on, as in finetune.py; empty for made ones, like alpaca's or (trl) GSM8K's.
        tokenizer: folder or hub id of the tokenizer, whose vocabulary must fit the model's.
        seed: of everything random.
    """
    if measure not in MEASURES:
        raise ValueError(f"--measure {measure}: one of {', '.join(MEASURES)}")
    given = (hidden, layers, vocab, batch_size, micro_batch_size, steps)
    sizes = [flag or usual for flag, usual in zip(given, MEASURES[measure], strict=True)]
    hidden, layers, vocab, batch_size, micro_batch_size, steps = sizes
    if steps < 2:
        raise ValueError(f"--steps {steps}: at least 2, the first of which does not count")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    others = TRL_MODES if measure == "trl" else ["padded Trainer"]
    like = "gsm8k" if measure == "trl" else "alpaca"
    python = trl_python() if measure == "trl" else sys.executable
    results = {side: [] for side in [*others, OURS]}
    with tempfile.TemporaryDirectory() as folder:
        write_model(folder, hidden, layers, vocab, seed)
        words = AutoTokenizer.from_pretrained(finetune.local_path(tokenizer) or tokenizer)
        finetune.use_template(words, "alpaca")
        words.save_pretrained(folder)
        count = batch_size * steps
        rows = finetune.load_rows(data_path) if data_path else made_rows(like, count, seed)
        if len(rows) < count:
            raise ValueError(f"--data_path {data_path}: {len(rows):,} rows, and {count:,} are needed")
        lines = [json.dumps(row) + "\n" for row in rows[:count]]
        (Path(folder) / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
        for n in range(rounds):
            for side in list(results)[:: -1 if n % 2 else 1]:
                got = run_side(
                    sys.executable if side == OURS else python,
                    side=side,
                    folder=folder,
                    batch_size=batch_size,
                    micro_batch_size=micro_batch_size,
                    steps=steps,
                    seed=seed,
                )
                results[side].append(got)
                figures = f"{got['speed']:9,.1f} tokens a CPU second {got['peak']:9,.0f} MiB"
                print(f"round {n + 1}  {side:17s} {figures}", flush=True)

    ours, faster, smaller, gap = results[OURS], [], [], 0.0
    for n in range(rounds):
        faster.append(ours[n]["speed"] / max(results[side][n]["speed"] for side in others))
        smaller.append(ours[n]["peak"] / min(results[side][n]["peak"] for side in others))
        for side in set(others) - {"TRL packing"}:
            for loss, other in zip(ours[n]["losses"], results[side][n]["losses"], strict=True):
                gap = max(gap, abs(loss - other) / other)
    batch = f"{steps} steps of {batch_size} examples by {micro_batch_size}"
    print(f"\nhidden {hidden}, {layers} layers, vocabulary {vocab:,}, float32, one thread; {batch}")
    print(f"{count} examples of {ours[0]['tokens'] / count:.0f} tokens in the mean")
    print("median of the rounds  tokens a CPU second  peak above the model, MiB")
    for side, runs in results.items():
        speed, peak = (statistics.median(run[name] for run in runs) for name in ("speed", "peak"))
        print(f"{side:20s} {speed:20,.1f} {peak:27,.0f}")
    print(f"losses of the same examples differ by at most {gap:.1e} of their value")
    if gap > 1e-5:
        raise ValueError("the sides do not compute the same")
    for n in range(rounds):
        print(f"round {n + 1}  {faster[n]:.2f} times the speed, {smaller[n]:.3f} times the memory")
    speed, memory = statistics.median(faster), statistics.median(smaller)
    if measure == "trl":
        print(f"ratio {speed:.2f} of the tokens a CPU second, {memory:.2f} of the peak memory")
    else:
        print(f"ratio {speed:.2f}" if measure == "speed" else f"ratio {memory:.3f}")
    return {"speed": speed, "memory": memory, "loss_gap": gap}


if __name__ == "__main__":
    run_cli(compare_training)
