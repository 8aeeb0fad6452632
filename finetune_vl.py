"""
LoRA and QLoRA supervised fine-tuning of Qwen2-VL, Qwen2.5-VL and Qwen3-VL on conversations with images.

    reads    --data_path     rows of messages and images, or of image and text with --prompt (json, jsonl, parquet, hub
                             id); data/latex_ocr.py makes such files
    writes   --output_dir    run.json (what was used, versions, results), log.jsonl (a line a step), adapter/,
                             checkpoint-N/ (the best and the last), validation.jsonl and images/, plots/, runs/
                             (TensorBoard)
    then     generate.py --lora_weights OUT/adapter --image page.png

    1 GPU    python finetune_vl.py --base_model Qwen/Qwen2-VL-2B-Instruct --data_path out/latex_ocr/train.jsonl
    8 GPUs   torchrun --standalone --nproc_per_node=8 finetune_vl.py --base_model ...
    sharded  torchrun --nproc_per_node=8 finetune_vl.py --deepspeed deepspeed/zero3.json --base_model ...
    no GPU   python finetune_vl.py

finetune.py with images: an example's images are opened when it is tokenized, for their size, opened again when its
micro-batch runs, and forgotten after it. The examples of a micro-batch lie end to end in one row
without padding and attend to themselves only, each with its own rotary positions; the output layer sees the labeled
positions only, in chunks; every label of a step weighs the same, however the step is split.

Shapes in comments: N tokens of a packed row, L labels, H heads, D hidden or head size, V vocabulary, P image patches.
"""

import contextlib
import csv
import dataclasses
import functools
import hashlib
import io
import json
import logging
import math
import os
import random
import re
import shutil
import subprocess
import sys
import traceback
import warnings
from pathlib import Path
from typing import get_type_hints

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # when it is imported, it asks for an optional package

import datasets
import fire
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate.utils import gather_object
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from pyarrow import parquet
from torch.nn.attention.varlen import varlen_attn
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, Trainer, TrainingArguments
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

HERE = Path(__file__).resolve().parent
ROLE_NAMES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "human": "user",
    "gpt": "assistant",
}
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
BLANK = b"P5 1 1 255\n\0"  # a file of one black pixel
IGNORE = -100  # label of a token that carries no loss (the default of F.cross_entropy)

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


# -----------------------------------------------------------------------------
# data: from conversations to token ids and labels


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


def end_of_answers(tokenizer, add_eos_token=True):
    """Return the text of the special token that ends an answer in the chat template; "" if none does.

    Refused are templates that lose the user's words and, with add_eos_token, those that never end an answer.
    """
    probe = [{"role": "user", "content": "prompt-7309"}, {"role": "assistant", "content": "answer-2846"}]
    text = tokenizer.apply_chat_template(probe, tokenize=False)
    if "prompt-7309" not in text or "answer-2846" not in text:
        raise ValueError(f"the chat template drops what was said; it rendered {text!r}")
    tail = text.rpartition("answer-2846")[2]
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
    end = min((token for token in special if token in tail), key=tail.index, default="")
    if add_eos_token and not end:
        raise ValueError(
            "after an answer the chat template writes no special token of the tokenizer, so a model would never learn "
            f"to stop; it rendered {text!r}. Take another template: finetune.py --prompt_template, or --noadd_eos_token"
        )
    return end


def encode(messages, tokenizer, end, train_on_inputs=False, add_eos_token=True):
    """Tokenize a conversation with the tokenizer's chat template; return [(input_ids, labels)], mostly of length 1.

    Both are lists of one length; labels are IGNORE where nothing is learned. The tokens before an answer are those
    that a server computes for the same prompt, or the conversation is refused; `end` is the token that ends an answer.
    Where the template tells an earlier turn differently once a later one is there (Qwen3 drops old reasoning), each
    answer becomes an example of its own.
    """
    examples = []
    for k, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = tokenizer.apply_chat_template(messages[:k], add_generation_prompt=True).input_ids
        text = tokenizer.apply_chat_template(messages[: k + 1], tokenize=False)
        stop = text.rfind(end)
        ids = tokenizer(text[: stop + len(end)], add_special_tokens=False).input_ids
        first, last = len(asked), len(ids) - bool(end)  # of the answer, without the token that ends it
        if stop < 0 or ids[:first] != asked or last < first:
            raise ValueError(
                "the chat template does not go on from the prompt that it asks with, or the answer merges with it into "
                f"other tokens: it asks with {tokenizer.decode(asked[-9:])!r} and tells {text[-200:]!r}. Take the "
                "white space off the answer (data/prepare.py does), or another template: finetune.py --prompt_template"
            )
        labels = list(ids) if train_on_inputs else [IGNORE] * len(ids)
        labels[first:last] = ids[first:last]
        if end:
            labels[last] = ids[last] if add_eos_token else IGNORE
        if examples and ids[: len(examples[-1][0])] == examples[-1][0]:
            earlier = examples.pop()[1]
            labels[: len(earlier)] = earlier
        examples.append((ids, labels))
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"no answer to learn: {messages!r:.150}")
    return examples


@dataclasses.dataclass
class MicroBatches:
    """The example numbers of each micro-batch of this rank, one epoch long, as a DataLoader's batch_sampler.

    An epoch is one permutation of the examples, the same for any number of ranks; a step takes the next batch_size
    of it, the last step of an epoch what is left. Only then is the batch dealt out, by length, so that every way to
    split it trains on the same examples and no rank waits for another. Ranks have equally many micro-batches, of
    which some may be empty in an epoch's last step.
    """

    lengths: np.ndarray  # [examples], in tokens
    batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int
    seed: int
    epoch: int = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        steps = math.ceil(len(self.lengths) / self.batch_size)
        return steps * self.batch_size // self.micro_batch_size // self.world_size

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.lengths))
        parts = self.batch_size // self.micro_batch_size
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            longest_first = batch[np.argsort(-self.lengths[batch], kind="stable")]
            for part in range(self.rank, parts, self.world_size):
                yield longest_first[part::parts].tolist()


def pack(examples, processor, model):
    """Collate examples [{"input_ids": [T], "labels": [T], "images": [...]}] end to end into one row, images as files.

    Returns input_ids [1, N], cu_seq_lens_q (where each starts), max_length_q, images (a list an example), and for the L
    positions that predict a label logits_to_keep [L] and labels [1, L], which Trainer counts as shift_labels. Where no
    example has an image, a blank one, from which nothing learns, keeps every rank, and every shard of ZeRO-3, in the
    vision tower.
    """
    if not any(example["images"] for example in examples):
        pads = processor.get_number_of_image_patches(1, 1) // processor.merge_size**2
        blank = {"input_ids": [model.config.image_token_id] * pads, "labels": [IGNORE] * pads, "images": [BLANK]}
        examples = [*examples, blank]
    batch = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)(examples)
    batch["images"] = [example["images"] for example in examples]
    positions = batch["labels"][0, 1:].ne(IGNORE).nonzero()[:, 0]
    batch["logits_to_keep"] = positions
    batch["labels"] = batch["shift_labels"] = batch["labels"][:, positions + 1]
    return batch


def see(batch, processor, model):
    """Return a row of `pack` as the model takes it: its images are opened now.

    They become pixel_values [P, channels * patch] and image_grid_thw [images, 3]; position_ids [3, 1, N] are time,
    height and width, from 0 in each example. model is transformers' Qwen...VLModel, whose get_rope_index knows them.
    """
    files, positions = batch.pop("images"), []
    seen = processor(images=[open_image(image) for images in files for image in images], return_tensors="pt")
    grids = seen.image_grid_thw.split([len(images) for images in files])
    rows = batch["input_ids"].split(batch["cu_seq_lens_q"].diff().tolist(), dim=1)
    for ids, grid in zip(rows, grids, strict=True):
        positions.append(model.get_rope_index(ids, ids.eq(model.config.image_token_id).int(), image_grid_thw=grid)[0])
    return batch | seen | {"position_ids": torch.cat(positions, dim=2)}


# -----------------------------------------------------------------------------
# model: attention within examples, and a loss without the [L, V] logits


def packed_rows_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Causal attention within each example of a packed row, as an attention function of transformers.

    query [1, H, N, D], key and value [1, key-value heads, N, D]; returns ([1, N, H, D], None). On a GPU in half
    precision it is one FlashAttention call of torch, elsewhere one scaled_dot_product_attention an example.
    """
    starts, window = kwargs["cu_seq_lens_q"], kwargs.get("sliding_window")
    flash = query.is_cuda and query.dtype != torch.float32 and torch.cuda.get_device_capability() >= (8, 0)
    if flash and not dropout:
        out = varlen_attn(
            query[0].transpose(0, 1),
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            starts,
            starts,
            kwargs["max_length_q"],
            kwargs["max_length_q"],
            scale=scaling,
            window_size=(window - 1 if window else -1, 0),
            enable_gqa=True,
        )
        return out[None], None
    outs = []
    for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        mask, length = None, stop - start
        if window and length > window:
            mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - window)
        out = F.scaled_dot_product_attention(
            query[:, :, start:stop],
            key[:, :, start:stop],
            value[:, :, start:stop],
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=True,
        )
        outs.append(out)
    return torch.cat(outs, dim=2).transpose(1, 2), None


def sums_of_hidden(head, hidden, targets, chunk=256):
    """Return (summed nll, number of right guesses) of an output layer without its [L, V] logits, made in chunks.

    hidden [L, D], targets [L]. Where a gradient is wanted, the guesses are not counted.
    """
    hidden = hidden.to(head.weight.dtype)
    nll = F.linear_cross_entropy(
        hidden,
        head.weight,
        targets,
        linear_bias=head.bias,
        reduction="sum" if hidden.dtype == torch.float32 else "none",  # a sum in half precision keeps three digits
        # not the method "auto", which makes chunks of one or two rows
        options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk, chunking_method=None),
    )
    nll = nll.float().sum()
    if torch.is_grad_enabled():
        return nll, None
    guesses = [F.linear(some, head.weight, head.bias).argmax(-1) for some in hidden.split(chunk)]
    return nll, torch.cat(guesses).eq(targets).sum()


@torch.no_grad()
def pack_model(model, collate, examples):
    """Change a model, in place, to take rows of `pack` and return hidden states [1, L, D] in place of logits.

    Returns its output layer, which called with (hidden, targets) now returns `sums_of_hidden`. The examples in one row
    must have the logits that they have one by one in the model as it was, which finds its positions by itself.
    """
    head, alone = model.get_output_embeddings(), []
    model.eval()
    for example in examples:
        batch = collate([example]).to(model.device)
        batch["position_ids"] = batch["labels"] = None
        types = batch["input_ids"].eq(model.config.image_token_id).int()
        alone.append(model(**batch, mm_token_type_ids=types).logits[0])  # [L, V] each
    AttentionInterface.register("packed_rows", packed_rows_attention)
    AttentionMaskInterface.register("packed_rows", lambda *args, **kwargs: None)
    model.set_attn_implementation({"text_config": "packed_rows", "vision_config": "sdpa"})

    if examples:
        batch = collate(examples).to(model.device)
        del batch["labels"]
        packed = model(**batch).logits[0]  # [L, V]
        gap = (packed - torch.cat(alone)).float().norm() / packed.float().norm()
        # half precision rounds, and int8 rounds activations by what else is in their batch
        exact = model.dtype == torch.float32 and not hasattr(model, "is_quantized")
        if not gap < (1e-4 if exact else 1e-1):
            raise ValueError(f"packed rows do not work for this model: they change its logits by {gap:.1%}")

    def forward(hidden, targets=None):
        # with targets it runs within the layer's own call, in which ZeRO-3 has gathered the weight
        return hidden if targets is None else sums_of_hidden(head, hidden, targets)

    head.forward = forward
    return head


def write_validation(out, conversations):
    """Write conversations as OUT/validation.jsonl; images that are no files yet become some in OUT/images."""
    rows = []
    (out / "images").mkdir(exist_ok=True)
    for conversation in conversations:
        paths = []
        for image in conversation["images"]:
            if isinstance(image, bytes):
                path = out / "images" / f"{len(rows)}-{len(paths)}.{open_image(image).format.lower()}"
                path.write_bytes(image)
                image = f"images/{path.name}"
            paths.append(image)
        rows.append(conversation | {"images": paths})
    write_jsonl(out / "validation.jsonl", rows)


# -----------------------------------------------------------------------------
# training: transformers' Trainer with our order of examples, loss and evaluation


class LoraTrainer(Trainer):
    """transformers.Trainer with the batches of `MicroBatches`, an exact `evaluate`.

    `batches` and `sums` (a function of logits or hidden states and targets) are set after it is made.
    The loss of a step is the nll summed over the labels of all micro-batches and ranks, divided by their number:
    Trainer counts them (num_items_in_batch), and undoes the mean that DDP takes over the ranks.
    """

    def get_train_dataloader(self):
        loader = torch.utils.data.DataLoader(
            self.train_dataset,
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
        )
        loader.set_epoch = self.batches.set_epoch
        return loader

    def create_scheduler(self, num_training_steps, optimizer=None):
        """transformers' schedule from its second value on: the first, and a cosine's last, is a rate of 0."""
        scheduler = super().create_scheduler(num_training_steps + 1, optimizer)
        scheduler.step()
        return scheduler

    @torch.no_grad()
    def evaluate(self, *args, **kwargs):
        """Return the token-weighted eval_loss and eval_token_acc over the whole validation set.

        Sums are taken over all ranks and divided once, so neither the batch size nor the number of ranks matters
        (Trainer's own averages batch means and counts the examples that fill up the last batch).
        """
        size, batches = self.batches.micro_batch_size, self.batches
        model = self.model_wrapped
        model.eval()
        sums = np.zeros(3)
        # ZeRO-3 needs as many forwards of each rank
        for start in range(0, len(self.eval_dataset), size * batches.world_size):
            batch = self.eval_dataset[start + batches.rank * size :][:size]
            inputs = self._prepare_inputs(self.data_collator(batch))
            targets = inputs.pop("labels")[0]
            with self.compute_loss_context_manager():
                nll, right = self.sums(model(**inputs).logits[0], targets)
            sums += float(nll), int(right), len(targets)
        nll, right, tokens = sum(gather_object([sums]))
        metrics = {"eval_loss": nll / tokens, "eval_token_acc": right / tokens}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # trainer_state.json comes next: it says that the checkpoint is whole

    def _save_checkpoint(self, model, trial):
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:  # torch and safetensors wrap a full disk in errors of their own
            raise ValueError(
                f"checkpoint-{self.state.global_step} could not be written: {error}. "
                "Make room, then --resume_from_checkpoint auto"
            ) from error


class Report(transformers.trainer_callback.ProgressCallback):
    """transformers' progress bar, and what is known of a step or an evaluation in log.jsonl and on the console."""

    def on_log(self, args, state, control, logs, **kwargs):
        if not logs.get("loss", 0.0) < math.inf:
            raise ValueError(
                f"the loss is {logs['loss']} at step {state.global_step}: lower --learning_rate or take another --dtype"
            )
        if not state.is_world_process_zero or not logs.keys() & {"loss", "eval_loss"}:
            return
        record = state.log_history[-1]
        if not record.get("grad_norm", 0.0) < math.inf:  # float16's scaler skips such a step, and the run goes on
            record["grad_norm"] = None  # JSON knows no other word for it
        with open(f"{args.output_dir}/log.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
        if "eval_loss" in logs or not state.global_step % max(1, state.max_steps // 20):
            shown = "loss learning_rate grad_norm train_tokens_per_second eval_loss eval_token_acc".split()
            fields = [f"{name} {logs[name]:.4g}" for name in shown if name in logs]
            self.training_bar.write(" | ".join([f"step {state.global_step:05d}/{state.max_steps:05d}", *fields]))


def find_checkpoint(output_dir, resume):
    """Return (folder of the last whole checkpoint, its trainer_state.json); (None, {}) for "auto" where there is none.

    Trainer writes trainer_state.json last: a folder without it, or with a part of it, was not finished.
    """
    whole = {}
    for path in Path(output_dir).glob("checkpoint-*/trainer_state.json"):
        with contextlib.suppress(ValueError):
            whole[path.parent] = json.loads(path.read_text("utf-8"))
    last = max(whole, key=lambda path: whole[path]["global_step"], default=None)
    if resume != "auto" and Path(resume) != last:
        raise ValueError(f"--resume_from_checkpoint {resume}: the last whole checkpoint is {last}: give auto")
    return last, whole.get(last, {})


def plot(records, folder):
    """Draw loss, learning_rate, eval_loss and eval_token_acc of log records, each in a file of its name."""
    folder.mkdir(exist_ok=True)
    for name in ("loss", "learning_rate", "eval_loss", "eval_token_acc"):
        points = [(record["step"], record[name]) for record in records if name in record]
        if points:
            figure = Figure(layout="constrained")
            axes = figure.add_subplot(title=name, xlabel="optimizer step")
            axes.plot(*zip(*points, strict=True), ".-")
            figure.savefig(folder / f"{name}.png")


def write_jsonl(path, records):
    """Write records as JSON lines."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def check_numbers(flags, world_size):
    """Refuse flags that are out of their range, or contradict each other."""
    above_zero = "batch_size micro_batch_size num_epochs cutoff_len lora_r lora_alpha save_steps".split()
    for name, value in flags.items():
        if type(value) in (int, float) and not (0 <= value < math.inf and (value or name not in above_zero)):
            raise ValueError(f"--{name} {value}: must {'be above 0' if name in above_zero else 'not be negative'}")
    at_once = flags["micro_batch_size"] * world_size
    if flags["batch_size"] % at_once:
        raise ValueError(
            f"--batch_size {flags['batch_size']} must be a multiple of {at_once} = --micro_batch_size "
            f"{flags['micro_batch_size']} x {world_size} ranks: {at_once * (flags['batch_size'] // at_once + 1)} is one"
        )
    if flags["dtype"] not in ("auto", "bfloat16", "float16", "float32"):
        raise ValueError(f"--dtype {flags['dtype']}: one of auto, bfloat16, float16, float32")
    if flags["deepspeed"] and "WORLD_SIZE" not in os.environ:
        raise ValueError("--deepspeed needs a launcher: torchrun --nproc_per_node=1, and the script with its flags")


def train(
    *,
    base_model: str = "data/tiny_vl/model",
    data_path: str = "data/tiny_vl/train.parquet",
    output_dir: str = "out/finetune_vl",
    # data
    prompt: str = "Using LaTeX to perform OCR on the image.",
    min_pixels: int = 0,
    max_pixels: int = 0,
    val_set_size: float = 0.05,
    max_samples: int = 0,
    cutoff_len: int = 2048,
    # optimization
    batch_size: int = 32,
    micro_batch_size: int = 4,
    num_epochs: float = 3.0,
    max_steps: int = 0,
    learning_rate: float = 0.0,
    lr_scheduler_type: str = "cosine",
    warmup_ratio: float = 0.03,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    # adapter
    lora_r: int = 16,
    lora_alpha: int = 32,
    lora_dropout: float = 0.0,
    lora_target_modules: str = "all-linear",
    lora_vision: bool = False,
    # memory and speed
    dtype: str = "auto",
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
    activation_checkpointing: bool = False,
    deepspeed: str = "",
    # run
    save_steps: float = 0.1,
    resume_from_checkpoint: str = "",
    overwrite: bool = False,
    seed: int = 42,
):
    """Fine-tune a vision-language model with LoRA on conversations with images.

    Without any flag it trains the embedded tiny model on the embedded formulas, in a minute on a laptop CPU.

    Args:
        base_model: hub id or folder of the model.
        data_path: data file or hub id, in any of the forms of data/README.md.
        output_dir: where everything of this run is written.
        prompt: what the user asks where a row has only image and text.
        min_pixels: smaller images are enlarged to this; 0 for the model's own setting.
        max_pixels: larger images are scaled down to this; 0 for the model's own setting.
        val_set_size: rows held out for validation: a share below 1, a number from 1 on, 0 for none.
        max_samples: use only the first so many rows of each source; 0 for all.
        cutoff_len: longest example in tokens; what is longer is cut at its end, and counted.
        batch_size: examples of an optimizer step, over all ranks and micro-batches.
        micro_batch_size: examples that one device processes at a time; only rounding, memory and speed depend on it.
        num_epochs: passes over the training rows.
        max_steps: stop after so many optimizer steps; 0 for --num_epochs.
        learning_rate: peak, reached after the warmup; 0 for one that fits the model's family and hidden size.
        lr_scheduler_type: transformers' name of a schedule without settings of its own: cosine, linear, constant, ...
        warmup_ratio: share of the steps in which the learning rate rises; from 1 on, their number.
        weight_decay: of AdamW, decoupled.
        max_grad_norm: the gradient's norm is clipped to this; 0 for no clipping.
        lora_r: rank of the adapter matrices.
        lora_alpha: the adapter is scaled by lora_alpha / lora_r.
        lora_dropout: dropout on the adapters' inputs; above 0 the result depends on --micro_batch_size and ranks.
        lora_target_modules: layers that get an adapter, as q_proj,v_proj; all-linear for all but the output layer.
        lora_vision: adapters in the vision tower and the aligner, too, and not only in the language model.
        dtype: of the base weights: auto (bfloat16 on a GPU that has it, else float32), bfloat16, float16 or float32.
        load_in_8bit: quantize the base to int8 with bitsandbytes.
        load_in_4bit: quantize the base to NF4 with bitsandbytes (QLoRA).
        activation_checkpointing: recompute activations in the backward pass: less memory, about a third slower.
        deepspeed: a DeepSpeed config such as deepspeed/zero3.json; needs torchrun and the deepspeed package.
        save_steps: evaluate and save every so many steps; below 1 it is a share of the run.
        resume_from_checkpoint: auto for the last one in --output_dir, or a checkpoint's folder. Empty: start afresh.
        overwrite: replace what an earlier run left in --output_dir.
        seed: of everything random.
    """
    flags = dict(locals())

    # 1. check flags
    out, world_size, on_gpu = Path(output_dir), int(os.environ.get("WORLD_SIZE", 1)), torch.cuda.is_available()
    check_numbers(flags, world_size)
    earlier = [*out.glob("run.json"), *out.glob("checkpoint-*")]
    if earlier and bool(overwrite) == bool(resume_from_checkpoint):
        raise ValueError(f"--output_dir {out} holds a run: one of --overwrite and --resume_from_checkpoint auto")
    checkpoint, state = find_checkpoint(out, resume_from_checkpoint) if resume_from_checkpoint else (None, {})
    if dtype == "auto":
        dtype = "bfloat16" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    transformers.utils.logging.set_verbosity_error()
    # peft asks for a renamed property, and create_scheduler takes a step ahead
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing|Detected call of .lr_scheduler.step")
    base = str(local_path(base_model) or base_model)
    limits = {"min_pixels": min_pixels} if min_pixels else {}
    if max_pixels:
        limits["max_pixels"] = max_pixels
    try:
        config = transformers.AutoConfig.from_pretrained(base)
        if config.model_type not in FAMILIES:
            raise ValueError(f"a {config.model_type}, not one of {', '.join(FAMILIES)}: finetune.py takes texts")
        hidden_size = config.get_text_config().hidden_size
        tokenizer = AutoTokenizer.from_pretrained(base)
        processor = AutoImageProcessor.from_pretrained(base, **limits)
        end = end_of_answers(tokenizer)
    except Exception as error:  # of transformers, jinja2, and templates that raise
        raise ValueError(f"--base_model {base_model}: {error!s:.500}") from error
    # the fit of finetune.py with Llama's exponent, which small models want, too: 6e-4 for 2B, 3e-4 for 7B parameters
    learning_rate = learning_rate or 5e-4 * (2000 / hidden_size) ** 0.781
    if hidden_size < 512 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # a small model gains little from a second thread, and waits for it on a busy machine

    # 2. data
    conversations, train_set, eval_set, counts = [], [], [], {"cut": 0, "left_out": 0}
    digest = hashlib.sha256()  # of texts and, in tokens, of the sizes of images, wherever they are
    rows, folder = load_rows(data_path)[: max_samples or None], (local_path(data_path) or HERE).resolve().parent
    size = round(len(rows) * val_set_size) if val_set_size < 1 else int(val_set_size)
    held_out = set(random.Random(seed).sample(range(len(rows)), min(size, len(rows))))
    for i, row in enumerate(rows):
        try:
            messages, images = to_conversation(row, prompt, folder)
            told = with_image_tokens(messages, map(open_image, images), processor)
            encoded = encode(told, tokenizer, end)
            if config.image_token_id in encoded[-1][0][cutoff_len:]:
                raise ValueError(f"--cutoff_len {cutoff_len} cuts its images: lower --max_pixels, or raise it")
        except Exception as error:  # ours, and those of jinja2, of a template that raises, of text that is no Unicode
            raise ValueError(f"{data_path}, row {i + 1}: {error}") from error
        if i in held_out:
            conversations.append({"messages": messages, "images": images})
        digest.update(repr(encoded).encode())
        for ids, labels in encoded:
            if set(labels[1:cutoff_len]) <= {IGNORE}:  # nothing predicts the first token
                counts["left_out"] += 1
                continue
            counts["cut"] += len(ids) > cutoff_len
            arrays = np.array([ids, labels], np.int32)[:, :cutoff_len]
            seen = images[: ids.count(config.vision_start_token_id)]  # fewer in an example of an early turn
            example = {"input_ids": arrays[0], "labels": arrays[1], "images": seen}
            (eval_set if i in held_out else train_set).append(example)
    if not train_set or held_out and not eval_set:
        raise ValueError(f"--val_set_size {val_set_size:g} or --cutoff_len {cutoff_len} leaves no label to learn")
    lengths = np.array([len(example["input_ids"]) for example in train_set])

    # 3. what is used, and whether the run that is resumed had the same
    flags |= {"learning_rate": learning_rate, "dtype": dtype, "data_sha256": digest.hexdigest()}
    if checkpoint:
        before = json.loads((out / "run.json").read_text("utf-8"))["flags"]
        changed = dict(before.items() - flags.items())
        for name in "output_dir data_path overwrite resume_from_checkpoint micro_batch_size".split():
            changed.pop(name, None)
        if changed:
            raise ValueError(f"--resume_from_checkpoint: {out} was another run, with {changed}")

    # 4. processes (before the model: DeepSpeed ZeRO-3 shards it while it is loaded)
    try:
        args = TrainingArguments(
            output_dir=output_dir,
            per_device_train_batch_size=micro_batch_size,
            gradient_accumulation_steps=batch_size // (micro_batch_size * world_size),
            num_train_epochs=num_epochs,
            max_steps=max_steps or -1,
            learning_rate=learning_rate,
            lr_scheduler_type=lr_scheduler_type,
            warmup_steps=warmup_ratio,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            logging_steps=1,
            logging_nan_inf_filter=False,
            include_num_input_tokens_seen=True,
            eval_strategy="steps" if eval_set else "no",
            eval_steps=save_steps,
            save_steps=save_steps,
            save_total_limit=2,  # the best and the last
            metric_for_best_model="eval_loss",
            seed=seed,
            bf16=dtype == "bfloat16" and on_gpu,
            fp16=dtype == "float16" and on_gpu,
            use_cpu=not torch.accelerator.is_available(),
            ddp_find_unused_parameters=False,
            deepspeed=str(local_path(deepspeed)) if deepspeed else None,
            activation_checkpointing=activation_checkpointing,
            report_to=["wandb"] if "WANDB_PROJECT" in os.environ else [],
        )
    except (ValueError, ImportError) as error:
        raise ValueError(f"transformers refuses the flags: {error}") from error
    args._n_gpu = min(args.n_gpu, 1)  # several GPUs are used through torchrun, not through nn.DataParallel
    if deepspeed:  # its own view of the ranks, which ZeRO-3 needs while the model is loaded
        from deepspeed.comm import init_distributed

        init_distributed(dist_backend="nccl" if on_gpu else "gloo")
    zero3 = transformers.integrations.is_deepspeed_zero3_enabled()
    args.activation_checkpointing_kwargs = {"use_reentrant": zero3}  # ZeRO-3 gathers a layer's weights to recompute it

    # 5. model
    import peft

    transformers.set_seed(seed)
    quantized, targets = {}, re.findall(r"[\w.-]+", lora_target_modules)  # no None: a base may be quantized already
    try:
        if load_in_8bit or load_in_4bit:
            quantized["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_8bit=load_in_8bit,
                load_in_4bit=load_in_4bit,
                bnb_4bit_quant_type="nf4",  # with double quantization as in QLoRA (Dettmers et al. 2023, 2305.14314)
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
                llm_int8_skip_modules=["model.visual", "lm_head"],
            )
        lora = peft.LoraConfig(
            task_type="CAUSAL_LM",
            target_modules=targets if targets != ["all-linear"] else "all-linear",
            exclude_modules=None if lora_vision else ".*visual.*",
            r=lora_r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
        )
        model, info = AutoModelForImageTextToText.from_pretrained(
            base, dtype=dtype, output_loading_info=True, **quantized
        )
        if activation_checkpointing and zero3:
            model.enable_input_require_grads()  # a frozen embedding would cut such layers off the gradient
        # adapters in float32 next to a half-precision base, except where DeepSpeed owns the dtype
        model = peft.get_peft_model(model, lora, autocast_adapter_dtype=not zero3)
    except Exception as error:  # of transformers, safetensors and peft
        raise ValueError(f"--base_model {base_model}, its --load_in or --lora flags: {error!s:.500}") from error
    lost = set(targets) - {name.rpartition(".")[2] for name in model.targeted_module_names} - {lora_target_modules}
    if lost or info["missing_keys"]:
        raise ValueError(f"--base_model {base_model} has no {', '.join(sorted([*lost, *info['missing_keys']]))}")
    model.config.use_cache = False
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # bitsandbytes would repack the weights when they are evaluated
    if not zero3:
        model.to(args.device)
    whole = model.get_base_model()
    collate = functools.partial(pack, processor=processor, model=whole.model)
    look = functools.partial(see, processor=processor, model=whole.model)
    examples = [] if zero3 else sorted(train_set, key=lambda example: not example["images"])  # those with images first
    sums = pack_model(whole, lambda some: look(collate(some)), examples[:3])

    # 6. trainer, files, and what will happen
    def mean_nll(outputs, labels, num_items_in_batch):
        return sums(outputs.logits[0], labels[0])[0] / num_items_in_batch

    trainer = LoraTrainer(
        model=model,
        args=args,
        train_dataset=train_set,
        eval_dataset=eval_set,
        data_collator=collate,
        processing_class=tokenizer,
        compute_loss_func=mean_nll,
    )
    trainer.sums, prepare = sums, trainer._prepare_inputs
    trainer._prepare_inputs = lambda batch: prepare(look(batch))  # opens images when their micro-batch runs
    trainer.batches = MicroBatches(lengths, batch_size, micro_batch_size, args.process_index, world_size, seed)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(Report)
    transformers.set_seed(seed + 100003 * args.process_index)  # dropout and noise are each rank's own
    run = {
        "status": "running",
        "flags": flags,
        "counts": counts | {"rows": len(rows), "train": len(train_set), "validation": len(eval_set)},
        "git": subprocess.getoutput(f"git -C '{HERE}' describe --always --dirty"),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    if not args.process_index:  # not before everything about the new run has been checked
        if overwrite:
            for path in [*out.glob("checkpoint-*"), *out.glob("runs")]:
                shutil.rmtree(path)
        write_validation(out, conversations)
        write_jsonl(out / "log.jsonl", state.get("log_history", []))
        write_json(out / "run.json", run)
        writer = SummaryWriter(out / "runs", purge_step=state.get("global_step", 0) + 1)
        trainer.add_callback(transformers.integrations.TensorBoardCallback(writer))
        print(f"finetune_vl.py  {base_model} -> {out}    {world_size} x {args.device}  {dtype}")
        print(f"  data        {data_path}: {len(train_set):,} examples, {lengths.sum():,} tokens")
        print(f"  validation  {len(eval_set):,} examples, {out}/validation.jsonl")
        print(f"  cut         {counts['cut']:,} at --cutoff_len {cutoff_len}; {counts['left_out']:,} more left out")
        print(f"  batch       {batch_size} = {world_size} x {micro_batch_size} x {args.gradient_accumulation_steps}")
        print(f"  learns      {tokenizer.decode(train_set[0]['labels'][train_set[0]['labels'] != IGNORE])!r:.300}")
        print(f"  starts      at learning rate {learning_rate:.2e} from {checkpoint or 'the first step'}")
        model.print_trainable_parameters()

    # 7. train
    try:
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    except KeyboardInterrupt:
        print(f"\ninterrupted after step {trainer.state.global_step}: --resume_from_checkpoint auto goes on")
        sys.exit(130)

    # 8. the best adapter, plots and the summary
    best = out / f"checkpoint-{trainer.state.best_global_step or trainer.state.global_step}"
    if not args.process_index:
        partial = out / "adapter.incomplete"
        partial.mkdir(exist_ok=True)
        for path in best.glob("adapter_*"):
            shutil.copy(path, partial)
        tokenizer.save_pretrained(partial)
        processor.save_pretrained(partial)
        stops = {tokenizer.convert_tokens_to_ids(end), tokenizer.eos_token_id}
        transformers.GenerationConfig(eos_token_id=sorted(stops)).save_pretrained(partial)
        shutil.rmtree(out / "adapter", ignore_errors=True)
        partial.rename(out / "adapter")
        plot(trainer.state.log_history, out / "plots")
        metrics |= trainer.state.log_history[-2]
        run |= {"status": "finished", "best_checkpoint": best.name, "metrics": metrics}
        write_json(out / "run.json", run)
        print(json.dumps(metrics))
        print(
            f"wrote {out}: adapter/ (from {best.name})\n"
            f"Next: python generate.py --lora_weights {out}/adapter --image FILE --prompt TEXT"
        )
    trainer.accelerator.end_training()  # or a rank may be torn down while its threads run
    return metrics


if __name__ == "__main__":
    run_cli(train)
