"""
Answering speed: generate.py's batches of like length beside plain one-by-one `model.generate`, both in one run.

    reads    data/tiny (model and problems), and the adapter that the default runs have left in out/, if any
    writes   nothing: the figures and their ratio go to the terminal; prompts and answers lie in a temporary folder

    no GPU   python benchmarks/generation.py
    engines  python benchmarks/generation.py --continuous --rounds 1

All sides load the model and answer the same prompts greedily in float32; their answers must be equal.
"""

import contextlib
import functools
import io
import json
import random
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import get_type_hints

import fire
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import generate as script  # noqa: E402 (the script under test, one folder up)

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


def write_prompts(path, count, seed):
    """Write `count` questions as rows: a geometric number of the embedded problems in one, 8 at most."""
    rng = random.Random(seed)
    rows = [json.loads(line) for line in (ROOT / "data" / "tiny" / "test.jsonl").read_text().splitlines()]
    lengths = [min(8, 1 + int(rng.expovariate(0.5))) for _ in range(count)]
    questions = [" ".join(row["question"] for row in rng.choices(rows, k=length)) for length in lengths]
    lines = [json.dumps({"question": question}) + "\n" for question in questions]
    Path(path).write_text("".join(lines), encoding="utf-8")


def in_batches(prompts, model, max_new_tokens, micro_batch_size):
    """Answer a file of prompts with generate.py itself."""
    flags = {"dtype": "float32", "max_new_tokens": max_new_tokens, "micro_batch_size": micro_batch_size}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        script.generate(base_model=model[0], lora_weights=model[1], data_path=prompts, output_dir=folder, **flags)
        rows = (Path(folder) / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(row)["prediction"] for row in rows]


def with_generate(prompts, model, max_new_tokens, answer_all):
    """Answer a file of prompts as one does without generate.py; `answer_all(model, ids, config)` gives ids."""
    base, lora_weights = script.local_path(model[0]), model[1]
    tokenizer = script.AutoTokenizer.from_pretrained(lora_weights or base)
    script.use_template(tokenizer, "")
    model = script.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = (script.attach_adapter(model, lora_weights) if lora_weights else model).eval()
    config = script.GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=[tokenizer.eos_token_id], pad_token_id=0
    )
    turns = [script.to_messages(row) for row in script.load_rows(prompts)]
    ids = [tokenizer.apply_chat_template(turn, add_generation_prompt=True).input_ids for turn in turns]
    return [tokenizer.decode(new, skip_special_tokens=True) for new in answer_all(model, ids, config)]


def each_alone(model, prompts, config):
    """Call model.generate once a prompt."""
    for ids in prompts:
        row = torch.tensor([ids])
        yield model.generate(row, attention_mask=torch.ones_like(row), generation_config=config)[0, len(ids) :]


def continuously(model, prompts, config):
    """Call transformers' continuous batching, its cache limited to what the prompts can need."""
    from transformers import ContinuousBatchingConfig

    limits = ContinuousBatchingConfig(num_blocks=1024)
    made = model.generate_batch(prompts, generation_config=config, continuous_batching_config=limits, warmup=False)
    return [made[name].generated_tokens for name in sorted(made, key=lambda name: int(name.rpartition("_")[2]))]


def compare_answering(
    *,
    prompts: int = 200,
    max_new_tokens: int = 128,
    micro_batch_size: int = 32,
    lora_weights: str = "",
    continuous: bool = False,
    rounds: int = 3,
    seed: int = 0,
):
    """Answer the same prompts in all ways, in turn, and print the ratio of the CPU seconds.

    Args:
        prompts: prompts of mixed length.
        max_new_tokens: longest answer, in tokens.
        micro_batch_size: prompts of a batch.
        lora_weights: folder of an adapter. Empty: the model that generate.py takes without flags.
        continuous: measure transformers' continuous batching, too.
        rounds: times that the sides take turns.
        seed: of the prompts.
    """
    script.transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)  # as generate.py does for a model of this size
    model = script.find_model("", lora_weights)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "prompts.jsonl")
        write_prompts(path, prompts, seed)
        sides = {"in batches": lambda: in_batches(path, model, max_new_tokens, micro_batch_size)}
        sides["one by one"] = lambda: with_generate(path, model, max_new_tokens, each_alone)
        if continuous:
            sides["continuous"] = lambda: with_generate(path, model, max_new_tokens, continuously)
        sides["in batches"]()  # imports and first touches are nobody's time
        ratios = []
        for n in range(rounds):
            seconds, made = {}, {}
            for name in sides if n % 2 else reversed(sides):
                started = time.process_time()
                made[name] = sides[name]()
                seconds[name] = time.process_time() - started
            for name in sides:  # the same answers, or the comparison means nothing
                assert made[name] == made["one by one"], f"{name} answers otherwise than one by one"
            ratios.append(seconds["one by one"] / seconds["in batches"])
            line = ", ".join(f"{name} {seconds[name]:.1f} CPU s" for name in sides)
            print(f"round {n + 1}: {line}, ratio {ratios[-1]:.2f}", flush=True)
    ratio, name = statistics.median(ratios), " + ".join(filter(None, model))
    print(f"{name}: equal answers, median of {rounds} rounds, one by one / in batches\nratio {ratio:.2f}")
    return {"ratio": ratio, "ratios": ratios}


if __name__ == "__main__":
    run_cli(compare_answering)
