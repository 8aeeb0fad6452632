"""
Ask a base model, with or without a LoRA adapter: one question, a chat, a file of questions, or a page for a browser.

    reads    --base_model, --lora_weights (an adapter folder of finetune.py or ppo_gsm8k.py, or any PEFT adapter)
             --prompt, or --data_path: any data file that finetune.py reads (OUT/validation.jsonl of a run)
    writes   the answer to the terminal; for a file --output_dir/predictions.jsonl (a line a row) and summary.json
    then     export_hf_checkpoint.py, or a closer look at the predictions

    one      python generate.py --prompt "Tom has 6 boxes with 7 coins in each. How many coins does Tom have now?"
    a chat   python generate.py --chat
    a file   python generate.py --data_path data/tiny/test.jsonl --score gsm8k_strict
    a page   python generate.py --ui
    an image python generate.py --lora_weights out/finetune_vl/adapter --image formula.png --prompt "..."
    a GPU    python generate.py --lora_weights out/mine/adapter --data_path out/mine/validation.jsonl --score chrf

The prompt goes through the chat template that the adapter or checkpoint carries, so the model sees the tokens that
it was trained on; it stops at the token that ended its training answers. A file that was stopped, even with kill -9,
goes on with the same command.
"""

import csv
import functools
import hashlib
import importlib.util
import io
import json
import logging
import math
import os
import re
import runpy
import statistics
import sys
import threading
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_type_hints

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # when it is imported, it asks for an optional package

import datasets
import fire
import sacrebleu
import torch
import transformers
from PIL import Image, ImageOps
from pyarrow import parquet
from rapidfuzz.distance import Levenshtein
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    TextIteratorStreamer,
)

HERE = Path(__file__).resolve().parent
ROLE_NAMES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "human": "user",
    "gpt": "assistant",
}
BUILT_IN_SCORES = ("gsm8k_strict", "gsm8k_flexible", "exact", "chrf", "latex")

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


def local_path(path):
    """Return `path` as a Path where it exists, seen from here or from this script's folder; otherwise None.

    What is not there may be the id of a model or data set of the hub (owner/name), or it is an error.
    """
    for place in (Path(path), HERE / path):
        if place.exists():
            return place
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) or Path(path).parent.is_dir():
        raise ValueError(f"{path}: no such file or folder, and no id of the hub (owner/name)")
    return None


def write_json(path, value):
    """Write `value` as JSON beside `path` and rename it, so that `path` is never half written."""
    partial = Path(f"{path}.incomplete")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def load_rows(source):
    """Return the rows of a json, jsonl, csv or parquet file, or of the train split of a hub data set."""
    path, rows = local_path(source), []
    try:
        if path is None:
            rows = datasets.load_dataset(source, split="train").to_list()
        elif path.suffix == ".parquet":
            rows = parquet.read_table(path).to_pylist()
        elif path.suffix == ".csv":
            csv.field_size_limit(2**31 - 1)  # the default is 131,072 characters
            with open(path, newline="", encoding="utf-8-sig") as file:
                rows.extend(csv.DictReader(file, strict=True))  # not strict, a stray quote swallows rows
        elif path.suffix == ".json":
            rows = json.loads(path.read_text("utf-8-sig"))
        elif path.suffix == ".jsonl":
            for line in path.read_text("utf-8-sig").split("\n"):  # splitlines() also cuts at U+2028
                if line.strip():
                    rows.append(json.loads(line))
        else:
            raise ValueError("neither json, jsonl, csv nor parquet: python data/prepare.py reads folders and more")
    except Exception as error:  # of pyarrow, csv, json, and dozens of the hub client
        raise ValueError(f"{source}, row {len(rows) + 1}: cannot be read: {error}") from None
    if not rows or not isinstance(rows, list):
        raise ValueError(f"{source}: no rows in it")
    return rows


def to_messages(row, separator="\n"):
    """Return the messages [{"role", "content"}, ...] of a row, whose form is told by the names of its fields.

    separator stands between the instruction and the input of an alpaca row. Without an answer the user comes last.
    """
    try:
        # None is where csv puts cells beyond the header's
        if any(row.get(name) for name in ("history", "tools", "image", "images", "videos", None)):
            raise LookupError
        turns = row.get("messages", row.get("conversations"))
        if not turns:
            ask, answer = ("instruction", "output") if "instruction" in row else ("question", "answer")
            question = separator.join(part for part in ("" + row[ask], row.get("input")) if part)
            turns = [{"role": "user", "content": question}]
            if row.get(answer) is not None:
                turns.append({"role": "assistant", "content": row[answer]})
        if row.get("system"):
            turns = [{"role": "system", "content": row["system"]}, *turns]
        messages = []
        for turn in turns:
            if turn.get("tool_calls") or turn.get("function_call"):
                raise LookupError
            role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
            messages.append({"role": ROLE_NAMES[role], "content": content + ""})  # an error unless it is text
    except (AttributeError, LookupError, TypeError):
        raise ValueError(
            "not alpaca (instruction, input, output), messages, conversations or question and answer, all text; no "
            f"videos, tools or history: {row!r:.150}. python data/prepare.py reads more forms, and says what is wrong"
        ) from None
    return messages


def use_template(tokenizer, name):
    """Give the tokenizer the chat template `name`: "" its own, or alpaca if it has none; a name; a .jinja file.

    Returns the name of what was taken, and what the template puts between an instruction and its input.
    """
    name = name or ("" if tokenizer.chat_template else "alpaca")
    if name:
        path = Path(name) if name.endswith(".jinja") else HERE / "templates" / f"{name}.jinja"
        if not path.exists():
            known = ", ".join(sorted(template.stem for template in (HERE / "templates").glob("*.jinja")))
            raise ValueError(f"--prompt_template {name}: no such template; there are {known}, or give a .jinja file")
        tokenizer.chat_template = path.read_text("utf-8")
    found = re.search(r'set input_separator = ("(?:[^"\\]|\\.)*")', tokenizer.get_chat_template())
    return name or "the model's own", json.loads(found[1]) if found else "\n"


def final_number(text, method):
    """Return the number that a GSM8K answer ends in, or None if there is none; as verl's reward_score/gsm8k.py does.

    strict takes the last "#### number" and leaves its commas out; flexible the last number of any kind, as it stands.
    """
    if method == "strict":
        found = [number.replace(",", "") for number in re.findall(r"#### (\-?[0-9\.\,]+)", text)]
    else:
        found = [number for number in re.findall(r"(\-?[0-9\.\,]+)", text) if number != "."]
    return found[-1] if found else None


def compute_score(solution_str, ground_truth, method="strict"):
    """Return 1.0 if an answer's final number is `ground_truth` (a string without commas), else 0.0.

    Only the last 300 characters of the answer are read, as in verl.
    """
    return float(final_number(solution_str[-300:], method) == ground_truth)


def open_image(image):
    """Return the PIL image of a file's bytes or of a path, turned as its EXIF header says.

    This decodes it, so that half a file is refused before the model is loaded.
    """
    try:
        opened = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
        ImageOps.exif_transpose(opened, in_place=True)
    except Exception as error:  # of PIL and of the file system
        raise ValueError(f"image {image!r:.200}: cannot be read: {error}") from None
    return opened


def to_conversation(row, prompt, folder, separator="\n"):
    """Return (messages, images) of a row: messages as of `to_messages`, an image as its file's bytes or its path.

    A row of image and text becomes the prompt with this image and the text as its answer; paths are seen from `folder`.
    """
    images = []
    for image in row.get("images") or filter(None, [row.get("image")]):
        known = image if isinstance(image, dict) else {"path": image}
        images.append(known.get("bytes") or str(folder / known["path"]))
    if row.get("text"):
        row = {"question": f"<image>{prompt}", "answer": row["text"]} | row  # which may have messages besides
    messages = to_messages(row | {"image": None, "images": None}, separator)
    marks = re.findall(r"<image>|<\|image_pad\|>", " ".join(message["content"] for message in messages))
    if marks != ["<image>"] * len(images):
        raise ValueError(f"{marks} in the text, and {len(images)} images: each needs one <image>")
    return messages, images


def with_image_tokens(messages, images, processor):
    """Return messages in which each <image> is what Qwen's chat templates write for one, with all of its tokens.

    images is an iterator of PIL images, processor transformers' Qwen2VLImageProcessor: a token for each
    merge_size^2 patches.
    """

    def tokens(mark):
        image = next(images)
        pads = processor.get_number_of_image_patches(image.height, image.width) // processor.merge_size**2
        return f"<|vision_start|>{'<|image_pad|>' * pads}<|vision_end|>"

    return [message | {"content": re.sub("<image>", tokens, message["content"])} for message in messages]


# -----------------------------------------------------------------------------
# scores


def latex(answer, reference):
    """Return exact match, edit distance over the longer one's length, and BLEU-4 over LaTeX tokens of a formula.

    The first two also without white space, which means nothing in LaTeX but where a letter follows a command.
    """
    tokens, tight = [], []
    for text in (answer, reference):
        tokens.append(" ".join(re.findall(r"\\[A-Za-z]+|\S", text)))
        tight.append(re.sub(r"\s", "", text))
    return {
        "score": float(answer == reference),
        "edit_distance": Levenshtein.normalized_distance(answer, reference),
        "bleu4": sacrebleu.sentence_bleu(tokens[0], tokens[1:], tokenize="none").score / 100,
        "score_without_spaces": float(tight[0] == tight[1]),
        "edit_distance_without_spaces": Levenshtein.normalized_distance(*tight),
    }


def score_answer(item, score, source):
    """Return {"score": ..., and what else the score gives} of one answer; score is a name or a function.

    A function is called as verl calls one (its reward_score), with the source, the reference and {"index": ...}. It
    returns a number or a dict with a number as `score`.
    """
    answer, reference = item["prediction"], item.get("reference")
    if score == "exact":
        return {"score": float(answer.strip() == reference.strip())}
    if score == "chrf":
        return {"score": sacrebleu.sentence_chrf(answer, [reference]).score / 100}
    if score == "latex":
        return latex(answer, reference)
    if not callable(score):
        return {"score": compute_score(answer, final_number(reference, "strict"), score.removeprefix("gsm8k_"))}
    found = score(
        data_source=source,
        solution_str=answer,
        ground_truth=reference,
        extra_info={"index": item["index"]},
    )
    if not isinstance(found, dict):
        found = {"score": found}
    return found | {"score": float(found["score"])}


def mean_and_error(values):
    """Return the mean of a list of numbers and its standard error (of one number: None)."""
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), spread


# -----------------------------------------------------------------------------
# model


def find_model(base_model, lora_weights):
    """Return (base_model, lora_weights), filled in where they were not given.

    An adapter names its base. Neither of them means the adapter of the last stage that was run with its defaults, PPO's
    or else the fine-tuned one, or else the embedded base.
    """
    if not base_model and not lora_weights:
        for folder in ("out/finetune/adapter", "out/ppo_gsm8k/adapter"):
            if (Path(folder) / "adapter_config.json").exists():
                lora_weights = folder
        base_model = "" if lora_weights else "data/tiny/model"
    if not base_model:
        try:
            config = json.loads((Path(lora_weights) / "adapter_config.json").read_text("utf-8"))
            base_model = config["base_model_name_or_path"] + ""  # an error if it is None
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ValueError(f"--lora_weights {lora_weights}: no adapter that names its base: {error!r}") from None
    return base_model, lora_weights


def attach_adapter(model, lora_weights):
    """Return `model` with the adapter of a folder, once every tensor of it has found its place."""
    from peft import PeftModel

    try:
        (Path(lora_weights) / "adapter_model.safetensors").stat()  # peft would look for a missing file on the hub
        model = PeftModel.from_pretrained(model, lora_weights)
        loaded = model.load_adapter(lora_weights, "default")  # once more: this returns what did not fit
    except Exception as error:  # peft, torch and safetensors have their own kinds; torch lists every tensor
        raise ValueError(f"--lora_weights {lora_weights} does not fit this base model: {error!s:.300}") from error
    odd = loaded.missing_keys + loaded.unexpected_keys
    if odd:
        raise ValueError(f"--lora_weights {lora_weights} does not fit this base model: {', '.join(odd[:3])}, ...")
    return model


def stop_tokens(model, tokenizer):
    """Return every token id that ends an answer: the checkpoint's, the template's and the tokenizer's."""
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    turns = [{"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"}]
    tail = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("pong")[2]
    ids = tokenizer(tail, add_special_tokens=False).input_ids
    special = [i for i in ids if i in tokenizer.added_tokens_decoder]
    return sorted({*stops, *special[:1], tokenizer.eos_token_id} - {None})


def changed_at(folder):
    """Return when a file of a folder was last written, in nanoseconds; 0 for what is no folder of this machine."""
    return max((path.stat().st_mtime_ns for path in Path(folder).glob("*")), default=0)


# -----------------------------------------------------------------------------
# answers


def check_sampling(max_new_tokens, temperature, top_p, top_k, num_beams, repetition_penalty, seed):
    """Refuse settings that are out of their range, and those that would do nothing."""
    if not (0 <= min(temperature, top_k, seed) and 0 < repetition_penalty and 0 < top_p <= 1):
        raise ValueError("--temperature, --top_k, --seed not below 0, --repetition_penalty above 0, --top_p in (0, 1]")
    if min(num_beams, max_new_tokens) < 1:
        raise ValueError("--num_beams and --max_new_tokens must be at least 1")
    if not temperature and (top_p != 1 or top_k):
        raise ValueError("--top_p and --top_k do nothing at --temperature 0: set a temperature")


def to_generation_config(stops, temperature, top_p, top_k, seed, **settings):
    """Return the GenerationConfig of the sampling flags; nothing of the model's own leaks into it."""
    if temperature:
        settings |= {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    # padding is masked, and what follows a stop is dropped: any token of the model does
    return GenerationConfig(**settings, eos_token_id=stops, pad_token_id=0)


def encode_prompt(messages, images, tokenizer, processor, max_new_tokens, context):
    """Return the ids of a conversation as the chat template renders it, up to where the answer starts.

    images are those of its <image> marks.
    """
    try:
        messages = with_image_tokens(messages, map(open_image, images), processor) if images else messages
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True).input_ids
    except Exception as error:  # jinja2 has its own kinds, a template can raise, and half a character has no ids
        raise ValueError(f"the chat template cannot render {messages!r:.200}: {error}") from error
    if len(ids) + max_new_tokens > context:
        raise ValueError(f"{len(ids)} tokens of prompt and {max_new_tokens} new ones exceed the {context} positions")
    return ids


def answer_batch(model, batch, config, **kwargs):
    """Return [(the ids of the answer without its end token, whether it was cut before one)] of prompts (ids).

    With images in them, kwargs have pixel_values and image_grid_thw.
    """
    rows = [torch.tensor(ids) for ids in batch]
    ids = pad_sequence(rows, batch_first=True, padding_value=-1, padding_side="left").to(model.device)  # [B, T]
    mask = ids >= 0
    if "pixel_values" in kwargs:
        kwargs["mm_token_type_ids"] = ids.eq(model.config.image_token_id).int()
    out = model.generate(
        input_ids=torch.where(mask, ids, ids[:, -1:]),  # not a token of its own: a repetition penalty counts it
        attention_mask=mask.long(),
        generation_config=config,
        **kwargs,
    )
    answers = []
    for row in out[:, ids.shape[1] :].tolist():
        ends = [i for i, token in enumerate(row) if token in config.eos_token_id]
        answers.append((row[: ends[0]], False) if ends else (row, True))
    return answers


def stream_answer(model, tokenizer, ids, config, **pixels):
    """Yield (the answer so far, None) as tokens come, and at the end (the answer, whether it was cut).

    The model works in a thread, which stops at its next token once the caller no longer listens.
    """
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    closed, text = threading.Event(), ""

    def stopped(ids, scores, **kwargs):
        return torch.full((len(ids),), closed.is_set(), device=ids.device)

    kwargs = pixels | {"stopping_criteria": [stopped]}
    if config.num_beams == 1:  # beams are known at the end only
        kwargs["streamer"] = streamer
    with ThreadPoolExecutor() as pool:
        work = pool.submit(answer_batch, model, [ids], config, **kwargs)
        work.add_done_callback(lambda work: streamer.end())  # after an error, too
        try:
            for piece in streamer:
                text += piece
                yield text, None
        finally:
            closed.set()
        answer, cut = work.result()[0]
    yield tokenizer.decode(answer, skip_special_tokens=True), cut


def print_answer(stream, limit):
    """Print an answer as it comes, and return it. Ctrl-C ends it where it is."""
    shown, cut = "", None
    try:
        for text, cut in stream:  # noqa: B007
            print(text[len(shown) :], end="", flush=True)
            shown = text
    except KeyboardInterrupt:
        stream.close()
    print(f"\n(cut at --max_new_tokens {limit})" if cut else "")
    return shown


def chat_in_terminal(stream, prompt, marks, limit):
    """Ask, answer, and remember, until /exit or the end of the input; returns the messages.

    marks, an <image> for each of --image, stand before the first question of a conversation.
    """
    print("/new forgets the conversation, /exit ends it, Ctrl-C ends an answer")
    messages = []
    while True:
        try:
            text = prompt or input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            text = "/exit"
        prompt = ""
        if text == "/exit":
            return messages
        if text == "/new":
            messages = []
        elif text:
            asked = [*messages, {"role": "user", "content": text if messages else marks + text}]
            try:
                answer = print_answer(stream(asked), limit)
            except ValueError as error:
                print(f"error: {error}, or /new")
                continue
            messages = [*asked, {"role": "assistant", "content": answer}]


# -----------------------------------------------------------------------------
# a file that can be stopped


def read_batches(log):
    """Return the batches of answers in a log, a line each; what a killed process left unfinished is cut off."""
    with open(log, "ab+") as file:
        file.seek(0)
        data = file.read()
        file.truncate(data.rfind(b"\n") + 1)
    return [json.loads(line) for line in data.split(b"\n")[:-1]]


# -----------------------------------------------------------------------------
# a page


def open_page(stream, title, sampling, takes_images):
    """Serve a chat page until Ctrl-C; `stream(messages, images, **sampling)` yields answers as stream_answer does."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio

    def reply(asked, history, *values):
        messages, images = [], []
        content = [{"text": asked["text"] if takes_images else asked}]
        if takes_images:
            content += [{"file": {"path": path}} for path in asked["files"]]
        for turn in [*history, {"role": "user", "content": content}]:
            text = ""
            for part in turn["content"]:
                if "file" in part:
                    images.append(part["file"]["path"])
                    text = "<image>" + text
                else:
                    text += part["text"]
            messages.append({"role": turn["role"], "content": text})
        try:
            given = {}
            for name, value in zip(sampling, values, strict=True):
                given[name] = type(sampling[name])(value)
            check_sampling(**given)
            for answer, cut in stream(messages, images, **given):  # noqa: B007
                yield answer
        except (ValueError, TypeError) as error:  # an empty field is None
            raise gradio.Error(str(error)) from error
        if cut:
            gradio.Info("The answer was cut at max new tokens.")

    controls = []
    for name, value in sampling.items():
        controls.append(gradio.Number(value, label=name.replace("_", " ")))
    gradio.ChatInterface(
        reply,
        title=title,
        multimodal=takes_images,
        # as the model wrote it: Markdown would take "#### 42" for a heading
        chatbot=gradio.Chatbot(render_markdown=False, buttons=["copy", "copy_all"]),  # and none that shares it
        additional_inputs=controls,
        additional_inputs_accordion="sampling",
        api_visibility="private",
    ).launch(
        server_name="127.0.0.1",  # whatever GRADIO_SERVER_NAME says: nobody is asked for a password
        share=False,
        theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),  # none of another site
    )


def generate(
    *,
    base_model: str = "",
    lora_weights: str = "",
    prompt: str = "",
    input: str = "",
    image: str = "",
    chat: bool = False,
    data_path: str = "",
    output_dir: str = "out/generate",
    score: str = "",
    prompt_template: str = "",
    # sampling
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    num_beams: int = 1,
    repetition_penalty: float = 1.0,
    seed: int = 42,
    # a page
    ui: bool = False,
    # memory and speed
    max_samples: int = 0,
    micro_batch_size: int = 32,
    dtype: str = "auto",
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
):
    """Answer one prompt, a chat, every prompt of a file, or a page in the browser, with a model and its chat template.

    Without any flag it asks the embedded model a question, with the adapter of out/ppo_gsm8k or else out/finetune if
    one is there.

    Args:
        base_model: hub id or folder of the model.
        lora_weights: folder of a LoRA adapter. Empty: the base model alone.
        prompt: the question; with --data_path, what is asked where a row has only image and text.
        input: further text that the question is about, as in alpaca's rows.
        image: files of images that the question is about, with commas between them.
        chat: talk in the terminal, over several turns; --prompt is then the first.
        data_path: data file or hub id, in any of the forms of data/README.md.
        output_dir: where everything of this run is written.
        score: compare with the file's answers: gsm8k_strict, gsm8k_flexible, exact, chrf, latex or path.py:function.
        prompt_template: chat template: a name of templates/ or a .jinja file. Empty: what the model carries, or alpaca.
        max_new_tokens: longest answer, in tokens.
        temperature: of sampling; 0 takes the likeliest token. Above 0, --micro_batch_size changes what is drawn.
        top_p: sample among the likeliest tokens that together have this probability; 1 for all.
        top_k: sample among so many likeliest tokens; 0 for all.
        num_beams: beams of a beam search; 1 for none.
        repetition_penalty: above 1 makes tokens that are there already less likely.
        seed: of everything random.
        ui: open a chat page for browsers on this machine; needs gradio (requirements-ui.txt).
        max_samples: use only the first so many rows of each source; 0 for all.
        micro_batch_size: examples that one device processes at a time; only rounding, memory and speed depend on it.
        dtype: of the base weights: auto (bfloat16 on a GPU that has it, else float32), bfloat16, float16 or float32.
        load_in_8bit: quantize the base to int8 with bitsandbytes.
        load_in_4bit: quantize the base to NF4 with bitsandbytes (QLoRA).
    """
    # 1. check flags
    sampling = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "num_beams": num_beams,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    check_sampling(**sampling)
    if chat + bool(data_path) + ui > 1:
        raise ValueError("--prompt or --chat, --data_path, --ui: one at a time")
    if (score or max_samples) and not data_path:
        raise ValueError("--score and --max_samples go with --data_path")
    if (input or image) and (data_path or not prompt):
        raise ValueError("--input and --image go with --prompt")
    if micro_batch_size < 1 or max_samples < 0:
        raise ValueError(f"--micro_batch_size {micro_batch_size} is below 1, or --max_samples {max_samples} below 0")
    scorer = score
    if ".py:" in score:
        path, _, name = score.rpartition(":")
        try:
            scorer = runpy.run_path(path)[name]
        except Exception as error:  # whatever the user's file does
            raise ValueError(f"--score {score} cannot be loaded: {type(error).__name__}: {error}") from error
    elif score and score not in BUILT_IN_SCORES:
        raise ValueError(f"--score {score}: one of {', '.join(BUILT_IN_SCORES)}, or path.py:function")
    if ui and not importlib.util.find_spec("gradio"):
        raise ValueError("--ui needs gradio: pip install gradio, or the exact set of requirements-ui.txt")
    device = str(torch.accelerator.current_accelerator(True) or "cpu")
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" and torch.cuda.is_bf16_supported(False) else "float32"
    if dtype not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"--dtype {dtype}: one of auto, bfloat16, float16, float32")
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # peft asks for a renamed property
    base_model, lora_weights = find_model(base_model, lora_weights)
    base = str(local_path(base_model) or base_model)
    carries = lora_weights and (Path(lora_weights) / "tokenizer_config.json").exists()
    source = lora_weights if carries else base  # of the tokenizer and its template
    processor, images = None, image.split(",") if image else []
    try:
        config = transformers.AutoConfig.from_pretrained(base).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(source)
        if "_vl" in config.model_type:
            processor = AutoImageProcessor.from_pretrained(source)
        template, separator = use_template(tokenizer, prompt_template)
    except Exception as error:  # transformers and huggingface_hub have their own kinds
        raise ValueError(f"--base_model {base_model}, --prompt_template {prompt_template}: {error!s:.500}") from error
    if config.hidden_size < 512 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # a small model gains little from a second thread, and waits for it on a busy machine
    if prompt and (ui or data_path and not processor):
        raise ValueError("--prompt or --chat, --data_path, --ui: one at a time; rows of image and text take a --prompt")
    if images and not processor:
        raise ValueError(f"--image {image}: {base_model} reads text only")
    for path in images:
        open_image(path)  # an error before the model is loaded
    context = getattr(config, "max_position_embeddings", None) or 2**20
    print(f"generate.py  {base_model} + {lora_weights or 'no adapter'}    {device}  {dtype}  template {template}")

    # 2. the rows of a file: prompts, references, and what is wrong with a row
    rows, items, requests, answered, scores = [], [], [], [], []
    if data_path:
        rows, folder = load_rows(data_path), (local_path(data_path) or HERE).resolve().parent
    for index, row in enumerate(rows[: max_samples or None]):
        item, row_images = {"index": index}, []
        items.append(item)
        try:
            if processor:
                messages, row_images = to_conversation(row, prompt, folder, separator)
            else:
                messages = to_messages(row, separator)
            item["messages"] = messages
            if messages[-1]["role"] == "assistant":
                item["reference"] = messages.pop()["content"]
            ids = encode_prompt(messages, row_images, tokenizer, processor, max_new_tokens, context)
            number = final_number(item.get("reference", ""), "strict")
            if "reference" not in item and score in BUILT_IN_SCORES or score.startswith("gsm8k") and number is None:
                raise ValueError(f"--score {score}: the row has nothing to compare with (answer, '#### number')")
            requests.append((ids, row_images, item))
        except ValueError as error:
            item["error"] = str(error)
            print(f"  left out row {index + 1}: {error}")
    if data_path and not requests:
        raise ValueError(f"{data_path}, row 1: {items[0]['error']}")
    # batches of like length, the longest first: what does not fit into memory fails at once
    requests.sort(key=lambda request: -len(request[0]))
    batches = [requests[at : at + micro_batch_size] for at in range(0, len(requests), micro_batch_size)]
    # the log is named by a digest of all that may change an answer, so other answers are in other files
    settings = sampling | {
        "base_model": base_model,
        "lora_weights": lora_weights,
        "data_path": data_path,
        "prompt_template": template,
        "micro_batch_size": micro_batch_size,
        "dtype": [device, dtype, load_in_8bit, load_in_4bit],
        "versions": [torch.__version__, transformers.__version__],
    }
    digest = hashlib.sha256(repr([settings, changed_at(base), changed_at(lora_weights or base)]).encode())
    for ids, row_images, _ in requests:
        digest.update(repr([ids, row_images]).encode())
    out = Path(output_dir)
    log = out / f"answers-{digest.hexdigest()[:12]}.jsonl"
    if data_path:
        out.mkdir(parents=True, exist_ok=True)
        answered = read_batches(log)

    # 3. model
    if not data_path or len(answered) < len(batches):
        quantization = {}  # not None: that would switch off how a quantized checkpoint is read
        try:
            if load_in_8bit or load_in_4bit:
                quantization["quantization_config"] = transformers.BitsAndBytesConfig(
                    load_in_8bit=load_in_8bit,
                    load_in_4bit=load_in_4bit,
                    bnb_4bit_quant_type="nf4",
                    bnb_4bit_use_double_quant=True,
                    bnb_4bit_compute_dtype=dtype,
                )
            auto = AutoModelForImageTextToText if processor else AutoModelForCausalLM
            model, info = auto.from_pretrained(base, dtype=dtype, output_loading_info=True, **quantization)
            stops = stop_tokens(model, tokenizer)
        except Exception as error:  # of transformers, safetensors and jinja2
            raise ValueError(f"--base_model {base_model}, template {template}: {error!s:.500}") from error
        if info["missing_keys"]:
            raise ValueError(f"--base_model {base_model} has no {', '.join(sorted(info['missing_keys']))}")
        if not quantization:
            model.to(device)
        model.generation_config = GenerationConfig()  # nothing of the model's own leaks in
        model = attach_adapter(model, lora_weights).eval() if lora_weights else model.eval()

    def image_inputs(paths):
        """Return what the model takes of images."""
        opened = [open_image(path) for path in paths]
        return processor(images=opened, return_tensors="pt").to(device) if opened else {}

    def stream(messages, images=images, **changed):
        """Yield the answer to a conversation, as stream_answer does."""
        given = sampling | changed
        ids = encode_prompt(messages, images, tokenizer, processor, given["max_new_tokens"], context)
        transformers.set_seed(given["seed"])
        yield from stream_answer(model, tokenizer, ids, to_generation_config(stops, **given), **image_inputs(images))

    # 4. one answer, a chat or a page
    if ui:
        return open_page(stream, f"{base_model} + {lora_weights or 'no adapter'}", sampling, bool(processor))
    question = separator.join(text for text in (prompt, input) if text)
    marks = "<image>" * len(images)
    if chat:
        return chat_in_terminal(stream, question, marks, max_new_tokens)
    if not data_path:
        question = question or "Tom has 6 boxes with 7 coins in each. How many coins does Tom have now?"
        print(f"> {question}", flush=True)
        return print_answer(stream([{"role": "user", "content": marks + question}]), max_new_tokens)

    # 5. a file
    try:
        with open(log, "a", encoding="utf-8") as file:
            for n in tqdm(range(len(answered), len(batches)), disable=None):
                # each batch has its own draws: the same ones in a run that was stopped and one that was not
                transformers.set_seed(seed + 100003 * n)
                prompts, row_images, _ = zip(*batches[n], strict=True)
                pixels = image_inputs(sum(row_images, []))
                records = []
                for ids, cut in answer_batch(model, prompts, to_generation_config(stops, **sampling), **pixels):
                    text = tokenizer.decode(ids, skip_special_tokens=True)
                    records.append({"prediction": text, "cut": cut, "tokens": len(ids)})
                answered.append(records)
                file.write(json.dumps(records) + "\n")  # a batch is whole, or not there
                file.flush()
    except KeyboardInterrupt:
        raise SystemExit(f"stopped: what is answered is in {log}, and the same command goes on") from None
    answers = sum(answered, [])
    for (_, _, item), record in zip(requests, answers, strict=True):
        item.update(record)
        if score:
            scores.append(score_answer(item, scorer, data_path))
            item.update(scores[-1] | item)  # its own fields stay
    summary = settings | {
        "rows": len(items),
        "answered": len(answers),
        "cut": sum(record["cut"] for record in answers),
        "tokens": sum(record["tokens"] for record in answers),
    }
    print(f"{len(answers):,} answers, {summary['tokens']:,} tokens")
    for name in scores[0] if scores else []:
        if isinstance(scores[0][name], int | float):
            mean, error = mean_and_error([one[name] for one in scores])
            summary.setdefault(name, {"mean": mean, "standard_error": error})
            label = score if name == "score" else name
            print(f"{label} {mean:.2%} +- {math.nan if error is None else error:.2%} of {len(scores):,} rows")
    partial = out / "predictions.jsonl.incomplete"
    # numbers of numpy and others become floats, half a character (a lone surrogate) its escape
    lines = [json.dumps(item, ensure_ascii=False, default=float) + "\n" for item in items]
    partial.write_text("".join(lines), "utf-8", "backslashreplace")
    partial.replace(out / "predictions.jsonl")
    write_json(out / "summary.json", summary)
    print(f"{summary['cut']:,} cut at --max_new_tokens {max_new_tokens}, {len(items) - len(answers):,} rows left out")
    print(f"wrote {out}/predictions.jsonl and summary.json")
    return summary


if __name__ == "__main__":
    run_cli(generate)
