"""
Make the embedded default: word problems, a tokenizer and a small Llama that half knows how to solve them.

    reads    nothing: everything comes from --seed
    writes   --output_dir    train.jsonl, test.jsonl (GSM8K's raw form), demonstrations.jsonl (what fine-tuning is
                             shown), model/ (weights, config, tokenizer)
    then     python finetune.py, which uses the committed copy in data/tiny

    no GPU   python data/tiny.py

The model is pretrained on the same family of problems, with the answers told in another style ("6*7 makes 42. ...
Answer: 42"), on drills of single calculations, and with a share --wrong_rate of all calculations gone wrong. So it
has the skill, but not GSM8K's answer format. Supervised fine-tuning teaches that, by the example of a hasty teacher who
often leaves the last calculation out; reinforcement learning finds out that it pays not to.

Shapes in comments: B sequences, T tokens, V vocabulary entries.
"""

import functools
import json
import math
import random
import re
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import get_type_hints

import fire
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
LARGEST = 399  # every number of every problem is below 400, and so a single token
NAMES = "Tom Anna Ben Mia Sam Lucy Max Nina Leo Ruth Omar Ivy Paul Rosa Hugo Jane".split()
THINGS = "apples books coins stamps cards pens shells cookies marbles eggs tickets stickers roses beads".split()
GROUPS = "boxes bags baskets rows packs jars".split()
# Llama 3's and Qwen's split: words with their space, up to three digits, punctuation with its newlines
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

ALPACA_PROMPT = (  # what templates/alpaca.jinja makes of a question
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)

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
# problems


def make_problem(rng):
    """Return one problem: (question, [(expression, result, sentence), ...]), 1 to 3 calculations, or None.

    None where a number left the range: the caller draws again, which keeps the numbers' distribution simple.
    `sentence` has a place {} for the calculation, as in "Tom has {} apples."
    """
    name, friend = rng.sample(NAMES, 2)
    thing, group = rng.choice(THINGS), rng.choice(GROUPS)
    wanted = rng.choice([1, 2, 2, 2, 3, 3, 3])
    steps = []
    if rng.random() < 0.5:
        a, b = rng.randint(2, 12), rng.randint(3, 15)
        text = [f"{name} has {a} {group} with {b} {thing} in each."]
        total = a * b
        steps.append((f"{a}*{b}", total, f"{name} has {{}} {thing}."))
    else:
        total = rng.randint(5, 150)
        text = [f"{name} has {total} {thing}."]
    ask = f"How many {thing} does {name} have now?"
    while len(steps) < wanted:
        kind = rng.choice("add add sub sub times share more".split())
        if kind == "add":
            b = rng.randint(3, 99)
            text.append(rng.choice([f"{friend} gives {name} {b} more.", f"Then {name} buys {b} more {thing}."]))
            steps.append((f"{total}+{b}", total + b, f"Then {name} has {{}} {thing}."))
            total += b
        elif kind == "sub":
            b = rng.randint(2, 90)
            text.append(rng.choice([f"{name} gives {b} of them to {friend}.", f"Then {name} loses {b} {thing}."]))
            steps.append((f"{total}-{b}", total - b, f"{name} is left with {{}} {thing}."))
            total -= b
        elif kind == "times":
            b = rng.randint(2, 6)
            text.append(f"{friend} has {b} times as many {thing}.")
            ask = f"How many {thing} does {friend} have?"
            steps.append((f"{total}*{b}", total * b, f"{friend} has {{}} {thing}."))
            total *= b
            break  # the story goes on about somebody else
        elif kind == "share":
            b = rng.randint(2, 9)
            if total % b:
                return None
            text.append(f"{name} shares them equally among {b} friends.")
            ask = f"How many {thing} does each friend get?"
            steps.append((f"{total}/{b}", total // b, f"Each friend gets {{}} {thing}."))
            total //= b
            break
        elif kind == "more" and len(steps) + 2 <= wanted:
            b = rng.randint(2, 60)
            text.append(f"{friend} has {b} more {thing} than {name}.")
            ask = f"How many {thing} do they have together?"
            steps.append((f"{total}+{b}", total + b, f"{friend} has {{}} {thing}."))
            steps.append((f"{total}+{total + b}", total + total + b, f"Together they have {{}} {thing}."))
            total += total + b
            break
    if not all(0 < result <= LARGEST for _, result, _ in steps):
        return None
    return " ".join(text + [ask]), steps


def draw_problem(rng):
    """Return the next problem that `make_problem` does not refuse."""
    while True:
        problem = make_problem(rng)
        if problem:
            return problem


def gsm8k_answer(steps):
    """Return the answer in GSM8K's words, for the tokenizer: a sentence a line with its <<calculation=result>>."""
    lines = [sentence.format(f"{expr} = <<{expr}={result}>>{result}") for expr, result, sentence in steps]
    return "\n".join([*lines, f"#### {steps[-1][1]}"])


def solution(steps):
    """Return the calculations alone in GSM8K's notation, a line each, then #### result."""
    return "\n".join([*(f"{expr} = <<{expr}={result}>>{result}" for expr, result, _ in steps), f"#### {steps[-1][1]}"])


def write_problems(folder, train, test, hasty_rate, seed):
    """Write train.jsonl, test.jsonl and demonstrations.jsonl: rows of (question, steps) as question and answer.

    demonstrations.jsonl has the questions of train.jsonl with the solutions of a hasty teacher: of two or three
    calculations the last is left out with hasty_rate. Imitation learns the haste, too; a reward can take it away.
    """
    rng = random.Random(seed)
    shown = [(q, s[:-1] if len(s) > 1 and rng.random() < hasty_rate else s) for q, s in train]
    for name, rows in {"train": train, "test": test, "demonstrations": shown}.items():
        lines = [json.dumps({"question": q, "answer": solution(s)}) + "\n" for q, s in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def told_answer(steps, wrong_rate, rng):
    """Return the answer in the style of the pretraining text; each calculation goes wrong with `wrong_rate`.

    A wrong result is off by 1, 2 or 10, and the calculations after it go on with the wrong number, as a person's
    would.
    """
    said, replaced = [], {}
    for expr, result, _ in steps:
        left, op, right = re.fullmatch(r"(\d+)([-+*/])(\d+)", expr).groups()
        left = replaced.get(int(left), int(left))
        right = replaced.get(int(right), int(right)) if op == "+" else int(right)  # only sums add two results
        value = {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[op]
        if rng.random() < wrong_rate:
            value += rng.choice([-10, -2, -1, 1, 2, 10])
        value = min(max(value, 1), LARGEST)
        replaced[result] = value
        said.append(f"{left}{op}{right} makes {value}.")
    return " ".join(said) + f" Answer: {value}"


def drill(steps_of_many, wrong_rate, rng):
    """Return a numbered sheet of single calculations, some of them wrong: GSM8K's signs in another use."""
    lines = [f"#### {rng.randint(1, 99)}"]
    for expr, result, _ in steps_of_many:
        if rng.random() < wrong_rate:
            result = min(max(result + rng.choice([-10, -2, -1, 1, 2, 10]), 1), LARGEST)
        lines.append(f"{expr} = <<{expr}={result}>>{result}")
    return "\n".join(lines)


def pretraining_text(rng, held_out, wrong_rate):
    """Return one document of the pretraining text: a told problem in one of three layouts, or a drill."""
    while True:
        if rng.random() < 0.4:
            return drill([step for _ in range(3) for step in draw_problem(rng)[1]], wrong_rate, rng)
        question, steps = draw_problem(rng)
        if question not in held_out:
            layout = rng.choice(["{}\n", "Question: {}\nAnswer: ", ALPACA_PROMPT])
            return layout.format(question) + told_answer(steps, wrong_rate, rng)


# -----------------------------------------------------------------------------
# tokenizer and model


def make_tokenizer(texts, vocab_size):
    """Train a byte-level BPE tokenizer on `texts`; every number up to LARGEST becomes one token."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet)
    numbers = " ".join(str(n) for n in range(LARGEST + 1))
    tokenizer.train_from_iterator([*texts, *[numbers] * len(texts)], trainer)
    split_up = [n for n in range(LARGEST + 1) if len(tokenizer.encode(str(n)).ids) > 1]
    if split_up:
        raise ValueError(f"--vocab_size {vocab_size} is too small: {len(split_up)} numbers are more than one token")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=special[0], pad_token=special[1], extra_special_tokens=special[2:]
    )


def make_model(vocab_size, tokenizer):
    """Return a LlamaForCausalLM of about 0.9M parameters with grouped-query attention, freshly initialized."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def told_accuracy(model, tokenizer, problems):
    """Return the share of `problems` that the model solves in its own style, greedily, one batch."""
    texts = [f"{question}\n" for question, _ in problems]
    prompts = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
    out = model.generate(**prompts, max_new_tokens=48, do_sample=False)
    answers = tokenizer.batch_decode(out[:, prompts.input_ids.shape[1] :], skip_special_tokens=True)
    right = [
        re.findall(r"Answer: (\d+)", answer)[-1:] == [str(steps[-1][1])]
        for answer, (_, steps) in zip(answers, problems)
    ]
    return sum(right) / len(right)


def make_tiny(
    *,
    output_dir: str = "data/tiny",
    train_size: int = 2000,
    test_size: int = 512,
    vocab_size: int = 1024,
    steps: int = 3000,
    batch_size: int = 24,
    context: int = 256,
    learning_rate: float = 3e-3,
    wrong_rate: float = 0.25,
    hasty_rate: float = 0.85,
    seed: int = 0,
):
    """Make the problems, the tokenizer and the pretrained base model of the embedded default.

    Args:
        output_dir: folder to write to; an existing one is replaced once everything is made.
        train_size: problems in train.jsonl and demonstrations.jsonl.
        test_size: problems in test.jsonl, none of them in the other files or in the pretraining text.
        vocab_size: entries of the tokenizer, numbers below 400 and 256 bytes among them.
        steps: optimizer steps of the pretraining.
        batch_size: rows of a pretraining step.
        context: tokens of a row; problems are packed end to end.
        learning_rate: peak, reached after 100 steps, then a cosine to a tenth.
        wrong_rate: share of the calculations in the pretraining text that go wrong.
        hasty_rate: share of the longer solutions in demonstrations.jsonl that leave the last calculation out.
        seed: of everything random.
    """
    rng = random.Random(seed)
    torch.manual_seed(seed)
    problems = {}
    while len(problems) < train_size + test_size:
        question, answer = draw_problem(rng)
        problems.setdefault(question, answer)
    problems = list(problems.items())
    train, test = problems[:train_size], problems[train_size:]
    held_out = {question for question, _ in test}

    texts = [f"{ALPACA_PROMPT.format(q)}{gsm8k_answer(s)}\n{told_answer(s, 0.0, rng)}" for q, s in train[:1000]]
    tokenizer = make_tokenizer([*texts, *["Question: \nAnswer: "] * 100], vocab_size)
    model = make_model(vocab_size, tokenizer)
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"{train_size} + {test_size} problems, {len(tokenizer)} tokens, {num_parameters:,} parameters", flush=True)

    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    stream, started = [], time.time()
    for step in range(steps):
        while len(stream) < batch_size * context:
            fresh = [pretraining_text(rng, held_out, wrong_rate) + "<|endoftext|>" for _ in range(64)]
            stream += [token for ids in tokenizer(fresh).input_ids for token in ids]
        rows = torch.tensor(stream[: batch_size * context]).view(batch_size, context)  # [B, T]
        stream = stream[batch_size * context :]
        lr = learning_rate * min(1, (step + 1) / 100) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr
        logits = model(rows[:, :-1]).logits  # [B, T-1, V]
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            right = told_accuracy(model, tokenizer, train[:128])
            took = time.time() - started
            print(
                f"step {step + 1:5d}/{steps} | loss {loss:.4f} | solved, own style {right:.3f} | {took:.0f} s",
                flush=True,
            )

    target = Path(output_dir)
    fresh = target.with_name(target.name + ".incomplete")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    write_problems(fresh, train, test, hasty_rate, seed)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(torch.bfloat16).save_pretrained(fresh / "model")
    tokenizer.save_pretrained(fresh / "model")
    if (target / "README.md").exists():
        shutil.copy(target / "README.md", fresh)
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)
    print(f"wrote {target}. Next: python finetune.py --overwrite")


if __name__ == "__main__":
    run_cli(make_tiny)
