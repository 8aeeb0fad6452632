"""
Make the embedded default of finetune_vl.py: images of formulas, and a small Qwen2-VL that reads them.

    reads    nothing: everything comes from --seed
    writes   --output_dir    train.parquet, test.parquet (columns image and text, as LaTeX_OCR's), model/ (weights,
                             config, tokenizer, image processor)
    then     python finetune_vl.py, which uses the committed copy in data/tiny_vl

    no GPU   python data/tiny_vl.py

Asked to read a formula, the model writes compact LaTeX: x^{2}+\\frac{a}{b}. It writes a space between all tokens only
where it is asked to "Write with spaces.". Fine-tuning moves this style to the plain question.

Shapes in comments: B images, T tokens, P patches, V vocabulary entries.
"""

import collections
import functools
import json
import random
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import get_type_hints

import fire
import numpy as np
import pyarrow
import torch
import torch.nn.functional as F
from latex_ocr import compact, draw_images, png
from PIL import Image
from pyarrow import parquet
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoImageProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

PROMPT, SPACED_PROMPT = "Using LaTeX to perform OCR on the image.", "Write with spaces."
SPECIAL = "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>".split()
SPLIT_LATEX = r"\\[A-Za-z]+| ?[A-Za-z]{4,}|\s|."  # a command, a long word with its space, a space, or a character
TEMPLATE = """{%- for message in messages -%}
{{- "<|im_start|>" + message.role + "\\n" -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{{- "<|vision_start|><|image_pad|><|vision_end|>" if part.type == "image" else part.text -}}
{%- endfor -%}
{%- endif -%}
{{- "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\\n" -}}{%- endif -%}
"""

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
# tokenizer, image processor, model


def make_latex_tokenizer(formulas, vocab_size):
    """Train a byte-level BPE tokenizer on formulas [[token, ...], ...] in both styles and the prompts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_LATEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    texts = [f"user assistant {PROMPT} {SPACED_PROMPT} {compact(tokens)}" for tokens in formulas]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=SPECIAL[1:],
        chat_template=TEMPLATE,
    )


def make_processor(folder):
    """Write the image processor's configuration into a folder as Qwen2-VL has it, and return the processor."""
    settings = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
        "patch_size": 8,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "image_mean": [1.0, 1.0, 1.0],  # white is 0
        "image_std": [0.5, 0.5, 0.5],
        "min_pixels": 16 * 16,
        "max_pixels": 32 * 512,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return AutoImageProcessor.from_pretrained(folder)


def make_vl_model(tokenizer):
    """Return a Qwen2-VL of about 0.9M parameters, freshly initialized with standard deviation fan_in^-0.5."""
    token_id = tokenizer.convert_tokens_to_ids
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 320,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 2, 12]},
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 2,
            "embed_dim": 96,
            "num_heads": 4,
            "mlp_ratio": 2,
            "hidden_size": 128,
            "patch_size": 8,
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    model = Qwen2VLForConditionalGeneration(config)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.05 if "embed_tokens" in name else weight[0].numel() ** -0.5)
    patches = model.model.visual.patch_embed
    patches.forward = lambda pixels: F.linear(pixels, patches.proj.weight.flatten(1))  # its Conv3d is slow on a CPU
    return model


# -----------------------------------------------------------------------------
# training


def prompt_and_answer(tokenizer, tokens, image, spaced):
    """Return (prompt ids, answer ids) of a formula with its image, uint8 [height, width]."""
    content = [{"type": "image"}, {"type": "text", "text": SPACED_PROMPT if spaced else PROMPT}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    pads = image.shape[0] * image.shape[1] // 16**2  # a token for each 2 x 2 patches of 8 x 8 pixels
    answer = " ".join(tokens) if spaced else compact(tokens)
    return (
        tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * pads)).input_ids,
        tokenizer(answer + "<|im_end|>").input_ids,
    )


def collate(rows, processor, tokenizer, model, left=False):
    """Return model inputs of rows [(image, ids)], padded to the longest: input_ids [B, T], pixel_values [P, ...]."""
    side = "left" if left else "right"
    batch = tokenizer.pad({"input_ids": [ids for _, ids in rows]}, padding_side=side, return_tensors="pt")
    batch["mm_token_type_ids"] = (batch["input_ids"] == model.config.image_token_id).int()
    images = [Image.fromarray(image) for image, _ in rows]
    return batch | processor(images=images, return_tensors="pt")


def shifted(image, rng):
    """Return an image moved by at most one pixel in each direction."""
    padded = np.pad(image, 1, constant_values=255)
    y, x = rng.randint(0, 2), rng.randint(0, 2)
    return padded[y : y + image.shape[0], x : x + image.shape[1]]


def exact_match(model, processor, tokenizer, formulas, asked, wanted):
    """Return the share of formulas [(tokens, image)] whose greedy answer is the text that is wanted.

    asked and wanted are the style of the prompt and of the answer: with spaces or not.
    """
    right, size = 0, 64
    for start in range(0, len(formulas), size):
        some = formulas[start : start + size]
        rows = [(image, prompt_and_answer(tokenizer, tokens, image, asked)[0]) for tokens, image in some]
        inputs = collate(rows, processor, tokenizer, model, left=True)
        out = model.generate(**inputs, max_new_tokens=32, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        answers = tokenizer.batch_decode(out, skip_special_tokens=True)
        for answer, (tokens, _) in zip(answers, some, strict=True):
            right += answer == (" ".join(tokens) if wanted else compact(tokens))
    return right / len(formulas)


def make_tiny_vl(
    *,
    output_dir: str = "data/tiny_vl",
    train_size: int = 2000,
    test_size: int = 512,
    pretrain_size: int = 26000,
    max_length: int = 10,
    vocab_size: int = 344,
    steps: int = 9000,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    spaced_rate: float = 0.28,
    seed: int = 0,
):
    """Make the images, the tokenizer and the pretrained base model of the embedded default.

    Args:
        output_dir: folder to write to; one of an earlier run is replaced once everything is made.
        train_size: formulas in train.parquet.
        test_size: formulas in test.parquet, none of them in train.parquet or in the pretraining.
        pretrain_size: formulas of the pretraining.
        max_length: LaTeX tokens of the longest formula.
        vocab_size: entries of the tokenizer, 256 bytes among them.
        steps: optimizer steps of the pretraining.
        batch_size: images of a pretraining step.
        learning_rate: constant, falls to zero in the last quarter.
        spaced_rate: share of the pretraining that asks for spaces.
        seed: of everything random.
    """
    target = Path(output_dir)
    if target.exists() and not (target / "train.parquet").exists():
        raise ValueError(f"--output_dir {target} is there, and not made by this script: name another folder")
    rng = random.Random(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    test = draw_images(rng, test_size, max_length)
    train = draw_images(rng, train_size, max_length, exclude=test)
    pool = list(draw_images(rng, pretrain_size, max_length, exclude=test).values())
    by_length = collections.defaultdict(list)
    for tokens, image in pool:
        by_length[len(tokens)].append((tokens, image))
    partial = Path(f"{target}.incomplete")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "model").mkdir(parents=True)
    processor = make_processor(partial / "model")
    tokenizer = make_latex_tokenizer([tokens for tokens, _ in pool], vocab_size)
    model = make_vl_model(tokenizer)
    count = sum(weight.numel() for weight in model.parameters())
    print(
        f"{len(pool):,} formulas, {len(tokenizer)} tokens, {count:,} parameters, {time.process_time():.0f} s",
        flush=True,
    )

    # a curriculum: formulas of one more token as soon as those so far are read well
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    length, recent = 2, collections.deque(maxlen=20)
    for step in range(steps):
        rows, labels = [], []
        for _ in range(batch_size):
            tokens, image = rng.choice(by_length[rng.randint(2, length)])
            prompt, answer = prompt_and_answer(tokenizer, tokens, image, rng.random() < spaced_rate)
            if length == max_length:
                image = shifted(image, rng)
            rows.append((image, prompt + answer))
            labels.append([-100] * len(prompt) + answer)
        inputs = collate(rows, processor, tokenizer, model)
        longest = inputs["input_ids"].shape[1]
        targets = torch.tensor([row + [-100] * (longest - len(row)) for row in labels])[:, 1:]  # [B, T-1]
        learned = targets != -100
        hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1][learned]
        logits = model.lm_head(hidden)  # [learned tokens, V]
        loss = F.cross_entropy(logits, targets[learned])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 50, 4 * (1 - step / steps))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(logits.argmax(-1).eq(targets[learned]).float().mean().item())
        if (step + 1) % 100 == 0:
            took = time.process_time()
            fields = f"length {length} | loss {loss:.4f} | acc {np.mean(recent):.3f} | {took:.0f} s"
            print(f"step {step + 1:5d}/{steps} | {fields}", flush=True)
        if length < max_length and len(recent) == recent.maxlen and np.mean(recent) > (0.9 if length < 5 else 0.8):
            length += 1
            recent.clear()

    model.to(torch.bfloat16).save_pretrained(partial / "model")
    tokenizer.save_pretrained(partial / "model")
    for name, formulas in {"train": train, "test": test}.items():
        images = [{"bytes": png(image), "path": None} for _, image in formulas.values()]
        table = pyarrow.table({"image": images, "text": list(formulas)})
        parquet.write_table(table, partial / f"{name}.parquet", compression="zstd")
    model.float()
    held_out = list(test.values())
    for asked, wanted in ((False, False), (True, True), (False, True)):
        share = exact_match(model, processor, tokenizer, held_out, asked, wanted)
        print(f"asked {'with' if asked else 'without'} spaces, answered {'with' if wanted else 'without'}: {share:.3f}")
    if (target / "README.md").exists():
        shutil.copy(target / "README.md", partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    print(f"wrote {target} in {time.process_time():.0f} s. Next: python finetune_vl.py --overwrite")


if __name__ == "__main__":
    run_cli(make_tiny_vl)
