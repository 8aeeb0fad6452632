"""
PPO speed and memory: ppo_gsm8k.py beside TRL's PPO trainer, and its rollout beside `model.generate`, in one run.

    reads    data/tiny (model and problems); other models are made in a temporary folder
    writes   nothing: the figures and their ratios go to the terminal

    step     pip install --no-deps trl==1.11.0, then python benchmarks/ppo.py --measure step
    rollout  python benchmarks/ppo.py --measure rollout, or --measure mixed
    memory   python benchmarks/ppo.py --measure memory

rollout: prompts are problems, of like length; mixed: each after 0 to 4 solved ones, about 45 to 380 tokens. Both sides
draw with the same numbers at temperature 1, and must give the same answers. All times are CPU seconds.
step: a whole PPO step from the same model, with the same batch, mini-batches and longest response, LoRA of the same
rank on the actor. 1.11.0 is the last TRL release with a PPO trainer. It scores with a network and not with a function,
so it is given one of the policy's shape, and the time of that is measured and taken off. The model is the embedded one
with --vocab entries, by default as many as Qwen2.5 has; the added ones are never likely.
"""

import contextlib
import functools
import gc
import io
import itertools
import json
import math
import resource
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
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    Qwen2Config,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import ppo_gsm8k  # noqa: E402 (the script under test, one folder up)

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
# both sides


def starting_model(folder, vocab, seed):
    """Write the embedded base with `vocab` entries, and an adapter of it; return the merged model and the tokenizer."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/tiny/model")
    tokenizer.chat_template = (ROOT / "templates/alpaca.jinja").read_text(encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(ROOT / "data/tiny/model", dtype=torch.float32)
    if vocab > model.config.vocab_size:
        old = model.config.vocab_size
        with torch.no_grad():
            hidden = model.model(**tokenizer("12*3 = <<12*3=36>>36", return_tensors="pt")).last_hidden_state[0].mean(0)
            model.resize_token_embeddings(vocab, mean_resizing=False)
            model.get_input_embeddings().weight[old:] = -20 * hidden / hidden.norm() ** 2
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=1e-3)
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    tokenizer.save_pretrained(folder / "adapter")
    return model.merge_and_unload(), tokenizer


def write_problems_of_mixed_length(path, count, seed):
    """Write `count` problems in verl's schema, each after 0 to 4 solved ones: prompts of about 45 to 380 tokens."""
    rng = np.random.default_rng(seed)
    rows = [json.loads(line) for line in (ROOT / "data/tiny/train.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = []
    for row in rows[:count]:
        turns = []
        for i in rng.integers(len(rows), size=rng.integers(5)):
            turns += [{"role": "user", "content": rows[i]["question"]}]
            turns += [{"role": "assistant", "content": rows[i]["answer"]}]
        turns.append({"role": "user", "content": row["question"]})
        truth = {"ground_truth": row["answer"].rpartition("#### ")[2]}
        lines.append(json.dumps({"data_source": "openai/gsm8k", "prompt": turns, "reward_model": truth}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def our_steps(folder, start, batch_size, response_length, steps):
    """Return the CPU seconds of each PPO step of ppo_gsm8k.py, and its mean response length."""
    marks, rows_of_step = [], ppo_gsm8k.rows_of_step

    def marked(*args):
        marks.append(time.process_time())
        return rows_of_step(*args)

    ppo_gsm8k.rows_of_step = marked
    with contextlib.redirect_stdout(io.StringIO()):
        ppo_gsm8k.train_ppo(
            base_model=str(start / "base"),
            lora_weights=str(start / "adapter"),
            train_files=str(ROOT / "data/tiny/train.jsonl"),
            output_dir=str(folder),
            overwrite=True,
            train_batch_size=batch_size,
            ppo_mini_batch_size=batch_size // 4,
            temperature=1.0,
            max_response_length=response_length,
            total_training_steps=steps + 1,  # a step ends where the next begins
            save_freq=0,
        )
    ppo_gsm8k.rows_of_step = rows_of_step
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = [after - before for before, after in itertools.pairwise(marks)]
    return seconds, statistics.mean(record["response_length/mean"] for record in records)


def trl_steps(folder, problems, model, tokenizer, batch_size, response_length, steps, seed):
    """Return the CPU seconds of each PPO step of TRL's trainer, less those of its reward network."""
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    policy = type(model)(model.config)
    policy.load_state_dict(model.state_dict())
    model.save_pretrained(folder / "network")
    value, reward = (
        AutoModelForSequenceClassification.from_pretrained(folder / "network", num_labels=1) for _ in range(2)
    )
    spent, forward, seconds = [0.0], reward.base_model.forward, []

    def timed(*args, **kwargs):
        started = time.process_time()
        out = forward(*args, **kwargs)
        spent[0] += time.process_time() - started
        return out

    class StepTimes(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seconds.append(time.process_time() - self.began - spent[0])
            self.began, spent[0] = time.process_time(), 0.0

    reward.base_model.forward = timed
    rows = Dataset.from_dict({"input_ids": [problem["prompt"] for problem in problems]})
    tokenizer.padding_side = "left"
    config = PPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=batch_size // 4,
        gradient_accumulation_steps=4,
        num_mini_batches=4,
        num_ppo_epochs=1,
        total_episodes=batch_size * steps,
        response_length=response_length,
        stop_token="eos",
        temperature=1.0,
        local_rollout_forward_batch_size=batch_size,
        num_sample_generations=0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        seed=seed,
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=reward,
        value_model=value,
        train_dataset=rows,
        eval_dataset=rows.select(range(8)),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    times = StepTimes()
    trainer.add_callback(times)
    with contextlib.redirect_stdout(io.StringIO()):
        times.began = time.process_time()
        trainer.train()
    return seconds


def our_rollout(model, tokenizer, prompts, uniforms):
    """Return (CPU seconds, responses) of ppo_gsm8k's rollout at temperature 1."""
    actor = ppo_gsm8k.Role(model.eval(), "", torch.float32, 1.0, model.config.vocab_size)
    rollout = ppo_gsm8k.LocalRollout(actor, [tokenizer.eos_token_id])
    started = time.process_time()
    answers = rollout.generate(prompts, uniforms.shape[1], uniforms)
    seconds = time.process_time() - started
    return seconds, [[token for token, _ in answer] for answer in answers]


def library_rollout(model, tokenizer, prompts, uniforms):
    """Return (CPU seconds, responses) of model.generate on the same prompts, padded on the left, and numbers."""
    longest, stop = max(map(len, prompts)), tokenizer.eos_token_id
    ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    draws = torch.from_numpy(uniforms)

    def drawn(ids, scores):
        tokens, _ = ppo_gsm8k.pick_tokens(scores, draws[:, ids.shape[1] - longest])
        return torch.full_like(scores, -math.inf).scatter(1, tokens[:, None], 0.0)

    config = GenerationConfig(
        max_new_tokens=uniforms.shape[1], do_sample=False, eos_token_id=stop, pad_token_id=tokenizer.pad_token_id
    )
    started = time.process_time()
    with torch.no_grad():
        rows = model.generate(ids, attention_mask=mask, generation_config=config, logits_processor=[drawn])
    seconds = time.process_time() - started
    rows = rows[:, longest:].tolist()
    return seconds, [row[: row.index(stop) + 1] if stop in row else row for row in rows]


def memory_of_step(folder):
    """Print the peak memory of a PPO step on the model in `folder`, above what importing took, in bytes."""
    import matplotlib.figure  # noqa: F401 (what a run imports on its way)
    import peft  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401

    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.redirect_stdout(io.StringIO()):
        ppo_gsm8k.train_ppo(
            base_model=str(folder / "model"),
            train_files=str(ROOT / "data/tiny/train.jsonl"),
            output_dir=str(folder / "out"),
            overwrite=True,
            train_batch_size=8,
            ppo_mini_batch_size=4,
            max_response_length=32,
            ppo_max_tokens=512,
            activation_checkpointing=True,
            total_training_steps=1,
            save_freq=0,
        )
    print(json.dumps(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)))


def compare_memory(folder, hidden, layers, seed):
    """Print the peak memory of a PPO step beside what copies of the weights take."""
    config = Qwen2Config(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=hidden * 4864 // 896,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 448),
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        eos_token_id=0,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/tiny/model")
    tokenizer.chat_template = (ROOT / "templates/alpaca.jinja").read_text(encoding="utf-8")
    tokenizer.save_pretrained(folder / "model")
    one = sum(p.numel() * p.element_size() for p in model.parameters())
    del model
    gc.collect()
    command = [sys.executable, __file__, "--measure", "memory_of_step", "--folder", str(folder)]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        raise RuntimeError(made.stderr[-3000:])
    above = json.loads(made.stdout.strip().splitlines()[-1]) - one
    print(f"one copy of the base: {one / 2**20:,.0f} MiB; four: {4 * one / 2**20:,.0f} MiB")
    print(f"peak of a PPO step above one copy: {above / 2**20:,.0f} MiB, {above / (4 * one):.2f} of four copies")
    return {"one": one, "above": above}


def compare_ppo(
    *,
    measure: str = "step",
    vocab: int = 151936,
    batch_size: int = 0,
    response_length: int = 64,
    steps: int = 3,
    rounds: int = 3,
    hidden: int = 896,
    layers: int = 8,
    folder: str = "",
    seed: int = 0,
):
    """Measure ppo_gsm8k.py beside TRL's PPO trainer or model.generate, or its memory beside copies of the weights.

    Args:
        measure: step, rollout, mixed or memory.
        vocab: entries of the vocabulary in --measure step; 0 for the embedded model's own 1,024.
        batch_size: prompts of a step or of a rollout; 0 for 16 and 64.
        response_length: longest response, in tokens.
        steps: PPO steps of a round; the first, which warms up, is not counted.
        rounds: both sides are measured in turn this many times.
        hidden: hidden size of the model whose memory is measured.
        layers: layers of that model.
        folder: of the model whose memory is measured: for the process that this script starts.
        seed: of models and prompts.
    """
    if measure not in ("step", "rollout", "mixed", "memory", "memory_of_step"):
        raise ValueError(f"--measure {measure}: step, rollout, mixed or memory")
    batch_size = batch_size or (16 if measure == "step" else 64)
    if min(batch_size, response_length, rounds, hidden, layers) < 1 or steps < 2 or batch_size % 4 or hidden % 64:
        raise ValueError("--steps must be at least 2, --batch_size a multiple of 4, --hidden of 64, the others above 0")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if measure == "memory_of_step":
        return memory_of_step(Path(folder))
    with tempfile.TemporaryDirectory() as temporary:
        temporary = Path(temporary)
        if measure == "memory":
            return compare_memory(temporary, hidden, layers, seed)
        torch.set_num_threads(1)
        model, tokenizer = starting_model(temporary, vocab if measure == "step" else 0, seed)
        made = ROOT / "data/tiny/train.jsonl"
        if measure == "mixed":
            made = temporary / "problems.jsonl"
            write_problems_of_mixed_length(made, 1000, seed)
        problems, _ = ppo_gsm8k.read_problems(str(made), tokenizer, 512)
        ours, others = [], []
        for number in range(rounds):
            gc.collect()
            if measure == "step":
                took, length = our_steps(temporary / "ours", temporary, batch_size, response_length, steps)
                theirs = trl_steps(temporary, problems, model, tokenizer, batch_size, response_length, steps, seed)
                ours, others = [*ours, statistics.mean(took[1:])], [*others, statistics.mean(theirs[1:])]
                what = f"mean response {length:.0f} tokens"
            else:
                picked = np.random.default_rng(seed + number).permutation(len(problems))[:batch_size]
                prompts = [problems[i]["prompt"] for i in picked]
                uniforms = np.random.default_rng([seed, number]).random((batch_size, response_length), np.float32)
                (took, mine), (theirs, other) = (
                    rollout(model, tokenizer, prompts, uniforms) for rollout in (our_rollout, library_rollout)
                )
                if sum(one != two for one, two in zip(mine, other, strict=True)) > 1:  # rounding may turn one
                    raise RuntimeError("the responses differ")
                ours, others = [*ours, took], [*others, theirs]
                lengths = sorted(map(len, mine))
                sizes = sorted(map(len, prompts))
                what = f"prompts of {sizes[0]} to {sizes[-1]} tokens, responses of {lengths[0]} to {lengths[-1]}, equal"
            print(f"round {number + 1}: {what}; {ours[-1]:.2f} CPU s beside {others[-1]:.2f}", flush=True)
        ratio = statistics.median(b / a for a, b in zip(ours, others, strict=True))
        print(
            f"{'TRL' if measure == 'step' else 'model.generate'} takes {ratio:.2f} times as long (median of {rounds})"
        )
        return {"ours": ours, "others": others, "ratio": ratio}


if __name__ == "__main__":
    run_cli(compare_ppo)
