"""
Make the embedded default: word problems, a tokenizer and a small Llama that knows how to solve them, in another style.

    reads    nothing: everything comes from --seed
    writes   --output_dir    train.jsonl, dev.jsonl, test.jsonl (GSM8K's raw form), demonstrations.jsonl (the first rows
                             of train.jsonl), model/ (weights, config, tokenizer)
    then     python finetune.py, which uses the committed copy in data/tiny

    no GPU   python data/tiny.py

The model is pretrained on the same family of problems, with the answers told in words ("6*7 makes 42. 42+5 makes 47.
Answer: 47"), and on drills of single calculations with GSM8K's signs. So it has the skill, but not GSM8K's answer
format. A few demonstrations teach the format, and only a part of the skill comes along; reinforcement learning on many
problems, of which it is told the final answers alone, brings more of it.

Shapes in comments: B sequences, T tokens, V vocabulary entries.
"""

import functools
import json
import math
import random
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

NUMBERS = 400  # every number below is a single token
LARGEST = 99  # number in a problem or its solution
NAMES = "Tom Anna Ben Mia Sam Lucy Max Nina Leo Ruth Omar Ivy Paul Rosa Hugo Jane".split()
THINGS = "apples books coins stamps cards pens shells cookies marbles eggs tickets stickers roses beads".split()
GROUPS = "boxes bags baskets rows packs jars".split()
VERBS = {
    "+": "finds buys wins collects earns gathers gets borrows makes unpacks inherits orders adds picks".split(),
    "-": "loses sells donates drops lends trades returns discards misplaces wastes mails hides breaks ships".split(),
    "*": "has owns keeps stores holds guards".split(),
    "/": "shares splits divides deals spreads distributes".split(),
}
# Llama 3's split, for which llama.cpp has a rule: words with their space, up to three digits, punctuation with newlines
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
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
# problems: a question, and steps [(expression, result), ...] that solve it


def calculate(left, sign, right):
    """Return the result of a calculation, or None where it is no whole number from 1 to LARGEST."""
    if sign == "/":
        return left // right if left % right == 0 else None
    result = {"+": left + right, "-": left - right, "*": left * right}[sign]
    return result if 0 < result <= LARGEST else None


def draw_problem(rng):
    """Return a problem (question, steps) of 1 to 3 calculations, the results of which are whole numbers."""
    name, friend = rng.sample(NAMES, 2)
    thing, wanted, steps = rng.choice(THINGS), rng.choice([1, 2, 2, 3, 3]), []
    if rng.random() < 0.3:
        left, right = rng.randint(2, 9), rng.randint(2, 9)
        text = [f"{name} has {left} {rng.choice(GROUPS)} with {right} {thing} in each."]
        total = left * right
        steps.append((f"{left}*{right}", total))
    else:
        total = rng.randint(5, 70)
        text = [f"{name} has {total} {thing}."]
    ask = f"How many {thing} does {name} have now?"
    while len(steps) < wanted:
        sign = rng.choice("++++----**//")
        verb, number = rng.choice(VERBS[sign]), rng.randint(2, 5 if sign in "*/" else 30)
        result = calculate(total, sign, number)
        if result is None:
            continue
        steps.append((f"{total}{sign}{number}", result))
        total = result
        if sign == "*":
            text.append(f"{friend} {verb} {number} times as many {thing}.")
            ask = f"How many {thing} does {friend} have?"
            break  # the story goes on about somebody else
        if sign == "/":
            text.append(f"{name} {verb} them equally among {number} friends.")
            ask = f"How many {thing} does each friend get?"
            break
        text.append(f"{rng.choice(['Then', 'Later', 'Today'])} {name} {verb} {number} {thing}.")
    return " ".join([*text, ask]), steps


def solution(steps):
    """Return the calculations in GSM8K's notation, a line each, then #### and the result."""
    lines = [f"{expression} = <<{expression}={result}>>{result}" for expression, result in steps]
    return "\n".join([*lines, f"#### {steps[-1][1]}"])


def told(steps):
    """Return the calculations in the words of the pretraining text."""
    said = [f"{expression} makes {result}." for expression, result in steps]
    return " ".join([*said, f"Answer: {steps[-1][1]}"])


def drill(rng):
    """Return a numbered sheet of single calculations: GSM8K's signs in another use."""
    lines = [f"#### {rng.randint(1, LARGEST)}"]
    while len(lines) < 9:
        sign = rng.choice("++++----**//")
        left, right = rng.randint(1, LARGEST), rng.randint(2, 9 if sign in "*/" else 30)
        result = calculate(left, sign, right)
        if result:
            lines.append(f"{left}{sign}{right} = <<{left}{sign}{right}={result}>>{result}")
    return "\n".join(lines)


def pretraining_text(rng, held_out):
    """Return one document of the pretraining text: a told problem in one of three layouts, or a drill."""
    if rng.random() < 0.35:
        return drill(rng)
    question, steps = draw_problem(rng)
    while question in held_out:
        question, steps = draw_problem(rng)
    layout = rng.choice(["{}\n", "Question: {}\nAnswer: ", ALPACA_PROMPT])
    return layout.format(question) + told(steps)


# -----------------------------------------------------------------------------
# tokenizer and model


def make_tokenizer(texts, vocab_size):
    """Train a byte-level BPE tokenizer on `texts`; every number below NUMBERS becomes one token."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet)
    numbers = " ".join(str(n) for n in range(NUMBERS))
    tokenizer.train_from_iterator([*texts, *[numbers] * len(texts)], trainer)
    split_up = [n for n in range(NUMBERS) if len(tokenizer.encode(str(n)).ids) > 1]
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


def make_optimizers(model, learning_rate):
    """Return Muon for the matrices of the layers, and AdamW for all else."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [model.get_input_embeddings().weight, *(p for p in model.parameters() if p.ndim == 1)]
    return (
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1),
    )


def told_accuracy(model, tokenizer, problems):
    """Return the share of `problems` that the model solves in its own style, greedily, one batch."""
    texts = [f"{question}\n" for question, _ in problems]
    prompts = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    out = model.generate(**prompts, max_new_tokens=48, do_sample=False)
    answers = tokenizer.batch_decode(out[:, prompts.input_ids.shape[1] :], skip_special_tokens=True)
    right = [answer.endswith(f"Answer: {steps[-1][1]}") for answer, (_, steps) in zip(answers, problems)]
    return sum(right) / len(right)


def write_rows(path, problems):
    """Write problems with their solutions as rows of question and answer."""
    rows = [json.dumps({"question": question, "answer": solution(steps)}) + "\n" for question, steps in problems]
    path.write_text("".join(rows), encoding="utf-8")


def make_tiny(
    *,
    output_dir: str = "data/tiny",
    train_size: int = 2000,
    demonstrations: int = 32,
    dev_size: int = 512,
    test_size: int = 512,
    vocab_size: int = 1024,
    steps: int = 1000,
    batch_size: int = 24,
    context: int = 256,
    learning_rate: float = 3e-3,
    seed: int = 0,
):
    """Make the problems, the tokenizer and the pretrained base model of the embedded default.

    Args:
        output_dir: folder to write to; one of an earlier run is replaced once everything is made.
        train_size: problems in train.jsonl.
        demonstrations: how many of them, the first, are in demonstrations.jsonl too.
        dev_size: problems in dev.jsonl.
        test_size: problems in test.jsonl; none of dev.jsonl and test.jsonl is in another file or the pretraining text.
        vocab_size: entries of the tokenizer, numbers below 400 and 256 bytes among them.
        steps: optimizer steps of the pretraining.
        batch_size: rows of a pretraining step.
        context: tokens of a row; problems are packed end to end.
        learning_rate: peak, reached after 100 steps, then a cosine to a tenth.
        seed: of everything random.
    """
    target = Path(output_dir)
    if target.exists() and not (target / "train.jsonl").exists():
        raise ValueError(f"--output_dir {target} is there, and not made by this script: name another folder")
    rng = random.Random(seed)
    torch.manual_seed(seed)
    problems = {}
    while len(problems) < train_size + dev_size + test_size:
        question, calculations = draw_problem(rng)
        problems[question] = calculations
    problems = list(problems.items())
    train, held_out = problems[:train_size], {question for question, _ in problems[train_size:]}

    texts = [f"{pretraining_text(rng, held_out)}\n{solution(calculations)}" for _, calculations in train]
    tokenizer = make_tokenizer(texts, vocab_size)
    model = make_model(vocab_size, tokenizer)
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(problems)} problems, {len(tokenizer)} tokens, {num_parameters:,} parameters", flush=True)

    optimizers = make_optimizers(model, learning_rate)
    stream, started = [], time.process_time()
    for step in range(steps):
        while len(stream) < batch_size * context:
            documents = [pretraining_text(rng, held_out) + "<|endoftext|>" for _ in range(64)]
            for ids in tokenizer(documents).input_ids:
                stream += ids
        rows = torch.tensor(stream[: batch_size * context]).view(batch_size, context)  # [B, T]
        stream = stream[batch_size * context :]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(rows[:, :-1]).logits  # [B, T-1, V]
            loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = learning_rate * min(1, (step + 1) / 100) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            right, took = told_accuracy(model, tokenizer, train[:128]), time.process_time() - started
            print(
                f"step {step + 1}/{steps} | loss {loss:.4f} | solved, own style {right:.3f} | {took:.0f} CPU s",
                flush=True,
            )

    partial = Path(f"{target}.incomplete")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_rows(partial / "train.jsonl", train)
    write_rows(partial / "demonstrations.jsonl", train[:demonstrations])
    write_rows(partial / "dev.jsonl", problems[train_size : train_size + dev_size])
    write_rows(partial / "test.jsonl", problems[train_size + dev_size :])
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(torch.bfloat16).save_pretrained(partial / "model")
    tokenizer.save_pretrained(partial / "model")
    if (target / "README.md").exists():
        shutil.copy(target / "README.md", partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    print(f"wrote {target}. Next: python finetune.py --overwrite")


if __name__ == "__main__":
    run_cli(make_tiny)
