"""
finetune_vl.py in process: image tokens, positions and packed rows beside transformers' own processor and models, the
whole script on the embedded default, forms of data, killed runs, and bad input.

    .venv/bin/python -m pytest tests/test_finetune_vl.py

Whole processes and several ranks: tests/test_finetune_vl_ranks.py.
"""

import functools
import gc
import io
import json
import os
import random
import re
import shutil
import traceback
from pathlib import Path

import datasets
import numpy as np
import peft
import pyarrow
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor

import finetune_vl
from finetune_vl import IGNORE, LoraTrainer, encode, open_image, pack, pack_model, with_image_tokens

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("TINY_VL", ROOT / "data" / "tiny_vl"))
BASE = DATA / "model"
SMALL = {  # a run of 4 steps on 16 examples, 2 epochs, in less than a second
    "base_model": str(BASE),
    "data_path": str(DATA / "train.parquet"),
    "max_samples": 20,
    "val_set_size": 4,
    "batch_size": 8,
    "num_epochs": 2,
    "save_steps": 2,
    "learning_rate": 3e-3,
}
# what the clock says, and a count that has the tokens of blank images and of empty micro-batches
CLOCK = {"train_runtime", "train_tokens_per_second", "num_input_tokens_seen"}
PROMPT = "Using LaTeX to perform OCR on the image."
gc.freeze()  # Trainer collects garbage at the end of each run: not through the modules as well


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Draw no plots, which take longer than a small run: the module's fixtures, set up earlier, do."""
    monkeypatch.setattr(finetune_vl, "plot", lambda records, folder: None)


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def curve(folder, without=CLOCK):
    """Return the records of a run's log.jsonl without what may differ."""
    records = lines_of(Path(folder) / "log.jsonl")
    return [{name: value for name, value in record.items() if name not in without} for record in records]


def record_of(folder):
    return json.loads((folder / "run.json").read_text())


def run(folder, **flags):
    """Run `train` in a folder; returns its curve."""
    finetune_vl.train(output_dir=str(folder), **(SMALL | flags))
    return curve(folder)


def losses_of(records, name="loss"):
    return [record[name] for record in records if name in record]


def assert_same_curve(one, other, losses=1e-6, norms=1e-5):
    """Relative tolerances; measured: LOSSES of losses and NORMS of gradient norms."""
    assert [record.keys() for record in one] == [record.keys() for record in other]
    for a, b in zip(one, other, strict=True):
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=norms if name == "grad_norm" else losses), (name, a, b)


def adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_same_run(folder, other):
    """Bit for bit, blank images included."""
    clock = CLOCK - {"num_input_tokens_seen"}
    assert curve(folder, clock) == curve(other, clock)
    one, other = adapter(folder), adapter(other)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert record_of(folder)["status"] == "finished"


# -----------------------------------------------------------------------------
# images: what transformers' own processor makes of the same conversation


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def processor():
    return AutoImageProcessor.from_pretrained(BASE)


def whole_processor(tokenizer, processor):
    """Return transformers' Qwen2VLProcessor of the two, without the part for videos, which needs torchvision."""
    whole = object.__new__(Qwen2VLProcessor)
    whole.tokenizer, whole.image_processor, whole.video_processor = tokenizer, processor, None
    whole.chat_template = tokenizer.chat_template
    for name in ("image", "video"):
        setattr(whole, f"{name}_token", f"<|{name}_pad|>")
        setattr(whole, f"{name}_token_id", tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>"))
    return whole


def listed(messages, images):
    """Return messages whose content is transformers' list of parts, images taken from the list in their order."""
    told, left = [], list(images)
    for message in messages:
        parts = []
        for text in re.split("(<image>)", message["content"]):
            if text == "<image>":
                image = left.pop(0)
                parts.append({"type": "image", "path" if isinstance(image, str) else "image": image})
            elif text:
                parts.append({"type": "text", "text": text})
        told.append(message | {"content": parts})
    return told


def by_transformers(messages, images, tokenizer, processor):
    """Return (model inputs, labels [T]) of a conversation, made by transformers alone."""
    whole = whole_processor(tokenizer, processor)
    told = listed(messages, images)
    render = functools.partial(whole.apply_chat_template, tokenize=True, return_dict=True, return_tensors="pt")
    inputs = render(told)
    labels = torch.full_like(inputs["input_ids"][0], IGNORE)
    for k, message in enumerate(messages):
        if message["role"] == "assistant":
            first = render(told[:k], add_generation_prompt=True)["input_ids"].shape[1]
            last = render(told[: k + 1])["input_ids"].shape[1] - 1  # without the newline after <|im_end|>
            labels[first:last] = inputs["input_ids"][0, first:last]
    return inputs, labels


def by_hand(ids, grids, pad):
    """Return the positions [3][T] of ids, in which each image [1, rows, columns] of patches has its run of pads."""
    positions, left, now, k = [], [list(grid) for grid in grids], 0, 0
    while k < len(ids):
        if ids[k] != pad:
            positions.append([now] * 3)
            now, k = now + 1, k + 1
            continue
        _, height, width = left.pop(0)
        rows, columns = height // 2, width // 2
        positions += [[now, now + row, now + column] for row in range(rows) for column in range(columns)]
        now, k = now + max(rows, columns), k + rows * columns
    return torch.tensor(positions).T.tolist()


def talk(*turns):
    return [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(turns)]


def example_of(messages, images, tokenizer, processor):
    """Return the example that train() makes of a conversation."""
    told = with_image_tokens(messages, map(open_image, images), processor)
    ((ids, labels),) = encode(told, tokenizer, "<|im_end|>")
    return {"input_ids": np.array(ids), "labels": np.array(labels), "images": images}


def noise(width, height, seed=0):
    """Return an image of smooth random colors, RGB."""
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def image_bytes(image, kind="PNG", **more):
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


def rotated(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif}


IMAGES = {  # name of a file: its bytes
    "plain.png": image_bytes(noise(51, 33)),
    "photo.jpg": image_bytes(noise(70, 41), "JPEG"),
    "see-through.png": image_bytes(Image.merge("RGBA", [*noise(51, 33).split(), noise(51, 33, 1).getchannel(0)])),
    "palette.png": image_bytes(noise(40, 90).quantize(16)),
    "see-through palette.png": image_bytes(noise(40, 90).quantize(16), transparency=3),
    "grey.png": image_bytes(noise(99, 32).convert("L")),
    "grey and alpha.png": image_bytes(noise(99, 32).convert("LA")),
    "bits.png": image_bytes(noise(45, 45).convert("1")),
    "16 bits.png": image_bytes(Image.fromarray(np.arange(40 * 60, dtype=np.uint16).reshape(40, 60) * 20)),
    "print.jpg": image_bytes(noise(64, 50).convert("CMYK"), "JPEG"),
    "web.webp": image_bytes(noise(30, 61), "WEBP"),
    "moving.gif": image_bytes(noise(60, 30), "GIF", save_all=True, append_images=[noise(60, 30, 1)]),
    "on its side.jpg": image_bytes(noise(90, 35), "JPEG", **rotated(6)),
    "on its head.png": image_bytes(noise(90, 35), "PNG", **rotated(3)),
    "mirrored.jpg": image_bytes(noise(90, 35), "JPEG", **rotated(7)),
    "dot.png": image_bytes(noise(1, 1)),
    "line.png": image_bytes(noise(200, 1)),
    "column.png": image_bytes(noise(3, 600)),
    "large.png": image_bytes(noise(700, 431)),
    "rounds down.png": image_bytes(noise(119, 40)),  # half of 16, from where Python rounds to the even one
    "rounds up.png": image_bytes(noise(121, 24)),
}


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """A folder with the files of IMAGES."""
    folder = tmp_path_factory.mktemp("album")
    for name, content in IMAGES.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def base():
    return AutoModelForImageTextToText.from_pretrained(BASE, dtype=torch.float32)


def assert_like_transformers(messages, images, tokenizer, processor, model):
    example = example_of(messages, images, tokenizer, processor)
    inputs, labels = by_transformers(messages, images, tokenizer, processor)
    assert example["input_ids"].tolist() == inputs["input_ids"][0, :-1].tolist()
    assert example["labels"].tolist() == labels[:-1].tolist()
    batch = pack([example], processor=processor, model=model.model)
    assert torch.equal(batch["pixel_values"], inputs["pixel_values"])
    assert torch.equal(batch["image_grid_thw"], inputs["image_grid_thw"])
    pads = example["input_ids"].tolist().count(model.config.image_token_id)
    assert pads * 4 == len(batch["pixel_values"]) == inputs["image_grid_thw"].prod(1).sum()
    grid, types = inputs["image_grid_thw"], inputs["mm_token_type_ids"]
    theirs, _ = model.model.get_rope_index(inputs["input_ids"], types, image_grid_thw=grid)
    assert torch.equal(batch["position_ids"], theirs[:, :, :-1])
    hand = by_hand(example["input_ids"].tolist(), grid.tolist(), model.config.image_token_id)
    assert batch["position_ids"][:, 0].tolist() == hand
    return example, grid


@pytest.mark.parametrize("name", IMAGES)
def test_tokens_pixels_and_positions_of_an_image_are_those_of_transformers(album, tokenizer, processor, base, name):
    images = [str(album / name)]
    example, grid = assert_like_transformers(talk("<image>What?", "x^{2}"), images, tokenizer, processor, base)
    from_bytes = example_of(talk("<image>What?", "x^{2}"), [IMAGES[name]], tokenizer, processor)
    assert from_bytes["input_ids"].tolist() == example["input_ids"].tolist()
    both = [pack([one], processor=processor, model=base.model)["pixel_values"] for one in (example, from_bytes)]
    assert torch.equal(*both)
    if name in ("on its side.jpg", "mirrored.jpg"):
        assert grid[0, 1] > grid[0, 2]  # 90 x 35 as it is stored


@pytest.mark.parametrize(
    "limits", [{"max_pixels": 1024}, {"min_pixels": 9000}, {"min_pixels": 2000, "max_pixels": 3000}], ids=str
)
def test_limits_of_the_pixels_are_those_of_transformers(album, tokenizer, base, limits):
    processor = AutoImageProcessor.from_pretrained(BASE, **limits)
    areas = set()
    for name in ("plain.png", "dot.png", "line.png", "large.png"):
        _, grid = assert_like_transformers(talk("<image>What?", "x"), [str(album / name)], tokenizer, processor, base)
        areas.add(int(grid.prod()) * 64)
    low, high = limits.get("min_pixels", 256), limits.get("max_pixels", 16384)
    assert low <= min(areas) and max(areas) <= high


def test_conversations_with_several_images_are_those_of_transformers(album, tokenizer, processor, base):
    paths = [str(album / name) for name in ("plain.png", "column.png", "photo.jpg", "dot.png")]
    one = talk("<image><image>Which is wider?", "the first", "And <image> of\nthese <image>?", "none")
    example, _ = assert_like_transformers(one, paths, tokenizer, processor, base)
    learned = example["labels"][example["labels"] != IGNORE]
    assert tokenizer.decode(learned) == "the first<|im_end|>none<|im_end|>"
    early = [{"role": "system", "content": "Look at <image> and read."}, *talk("<image>", "x")]
    assert_like_transformers(early, paths[:2], tokenizer, processor, base)


# -----------------------------------------------------------------------------
# packed rows

TEXT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT |= {"intermediate_size": 48, "max_position_embeddings": 512, "bos_token_id": None}
SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1]}}
KINDS = {  # transformers' name, and of the vision tower what is its own
    "qwen2_vl": ("Qwen2VL", SECTIONS, {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        SECTIONS,
        # windows of 2 x 2 tokens in the first layer
        {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48}
        | {"window_size": 32, "fullatt_block_indexes": [1]},
    ),
    "qwen3_vl": (
        "Qwen3VL",
        SECTIONS | {"head_dim": 8},
        {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48}
        | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
    ),
}


def tiny(kind, tokenizer):
    """Return a random model of a kind, in which a token notices the others."""
    name, text, vision = KINDS[kind]
    ids = {f"{role}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>") for role, token in TOKENS.items()}
    text = TEXT | text | {"vocab_size": len(tokenizer), "eos_token_id": 2, "pad_token_id": 0}
    vision = {"depth": 2, "num_heads": 2, "patch_size": 8} | vision
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision, **ids)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(model, lora).train()


TOKENS = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
TALKS = [  # conversations, and the names of their images
    (talk("<image>What?", "x^{2}"), ["plain.png"]),
    (talk("No picture here.", "\\alpha"), []),
    (talk("<image>and<image>", "a b", "Once more, <image>", "c"), ["column.png", "grey.png", "on its side.jpg"]),
    (talk("Just a word", "1", "and one more", "2"), []),
    (talk("<image>", "\\frac{a}{b}"), ["photo.jpg"]),
]


@pytest.fixture(scope="module", params=KINDS)
def parity(request, album, tokenizer, processor):
    """(a packed model, its output layer, its packed examples, and one by one in the model as it was:
    logits [L, V], nll and gradients of each conversation of TALKS, and of all of them)."""
    model = tiny(request.param, tokenizer)
    logits, nlls, gradients, examples = [], [], [], []
    for messages, names in TALKS:
        images = [str(album / name) for name in names]
        examples.append(example_of(messages, images, tokenizer, processor))
        inputs, labels = by_transformers(messages, images, tokenizer, processor)
        learned = labels[1:] != IGNORE
        logits.append(model(**inputs).logits[0, :-1][learned])
        nlls.append(F.cross_entropy(logits[-1], labels[1:][learned], reduction="sum"))
        model.zero_grad()
        nlls[-1].backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    collate = functools.partial(pack, processor=processor, model=model.get_base_model().model)
    head = pack_model(model.get_base_model(), collate, examples)
    model.train()
    logits = [some.detach() for some in logits]
    return model, head, collate, examples, logits, nlls, gradients


def assert_packed_is_one_by_one(parity, chosen):
    """Relative tolerances, measured over all kinds: LOGITS of logits, GRADS of gradients."""
    model, head, collate, examples, logits, nlls, gradients = parity
    batch = collate([examples[k] for k in chosen])
    labels = batch.pop("labels")[0]
    hidden = model(**batch).logits[0]
    got, wanted = F.linear(hidden, head.weight), torch.cat([logits[k] for k in chosen])
    assert got.shape == wanted.shape and (got - wanted).norm() <= 1e-5 * wanted.norm()
    print("LOGITS", ((got - wanted).norm() / wanted.norm()).item())
    nll = head(hidden, labels)[0]
    expected = sum(nlls[k] for k in chosen)
    assert nll.item() == pytest.approx(expected.item(), rel=1e-6)
    print("NLL", abs(nll.item() / expected.item() - 1))
    model.zero_grad()
    nll.backward()
    worst = 0
    for name, p in model.named_parameters():
        wanted = [gradients[k][name] for k in chosen if name in gradients[k]]
        if not p.requires_grad:
            assert p.grad is None and not wanted, name
        elif wanted:
            assert (p.grad - sum(wanted)).norm() <= 1e-5 * sum(wanted).norm(), name
            worst = max(worst, ((p.grad - sum(wanted)).norm() / sum(wanted).norm()).item())
        else:  # nothing is learned from a blank image, but there is a gradient, of zeros: DDP waits for one
            assert p.grad is not None and not p.grad.any(), name
    print("GRAD", worst)
    return batch


@pytest.mark.parametrize("chosen", [[0, 1, 2, 3, 4], [2], [1, 0], [1, 3], [1]], ids=str)
def test_packed_rows_have_the_logits_loss_and_gradients_of_examples_one_by_one(parity, chosen):
    batch = assert_packed_is_one_by_one(parity, chosen)
    _, _, _, examples, logits, _, gradients = parity
    pictures = sum(len(examples[k]["images"]) for k in chosen)
    assert len(batch["image_grid_thw"]) == max(1, pictures)
    vision = [name for name in gradients[0] if ".visual." in name]
    assert len(vision) > 10 and all(gradients[0][name].any() for name in gradients[0])  # or nothing is compared
    assert not any(name in gradients[1] for name in vision)


def test_a_row_of_no_examples_reaches_all_parameters(parity):
    model, head, collate = parity[:3]
    batch = collate([])
    labels = batch.pop("labels")[0]
    nll, _ = head(model(**batch).logits[0], labels)
    model.zero_grad()
    nll.backward()
    assert nll.item() == 0 and len(labels) == 0
    for name, p in model.named_parameters():
        assert not p.requires_grad or p.grad is not None and not p.grad.any(), name


def test_a_packed_row_by_its_parts(parity):
    model, _, collate, examples = parity[:4]
    batch = collate(examples)
    lengths = [len(example["input_ids"]) for example in examples]
    starts = np.cumsum([0, *lengths])
    assert batch["cu_seq_lens_q"].tolist() == starts.tolist() and batch["max_length_q"] == max(lengths)
    targets = []
    for start, stop, example in zip(starts[:-1], starts[1:], examples, strict=True):
        alone = collate([example])
        length = stop - start
        assert torch.equal(batch["position_ids"][:, :, start:stop], alone["position_ids"][:, :, :length])
        targets += [(start + k - 1, label) for k, label in enumerate(example["labels"]) if label != IGNORE]
    assert list(zip(batch["logits_to_keep"].tolist(), batch["labels"][0].tolist(), strict=True)) == targets
    assert batch["shift_labels"] is batch["labels"]


def plain_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Causal attention that does not know where examples start."""
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


class FlatPositions:
    """Stands in for a model: all tokens in one line, images, too."""

    def __init__(self, model):
        self.config = model.config

    def get_rope_index(self, ids, types, image_grid_thw=None):
        return torch.arange(ids.shape[1]).expand(3, 1, -1), None


@pytest.mark.parametrize("fault", ["leak", "positions", "images"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pack_model_sees_what_packing_changes(album, tokenizer, processor, monkeypatch, dtype, fault):
    examples = []
    for messages, names in TALKS[:3]:
        images = [str(album / name) for name in names]
        examples.append(example_of(messages, images, tokenizer, processor))

    def packed(fault=None):
        model = AutoModelForImageTextToText.from_pretrained(BASE, dtype=dtype)
        known = FlatPositions(model.model) if fault == "positions" else model.model
        collate = functools.partial(pack, processor=processor, model=known)

        def reversed_images(some):
            batch = collate(some)
            if len(some) > 1:
                batch["pixel_values"] = batch["pixel_values"].flip(0)
            return batch

        pack_model(model, reversed_images if fault == "images" else collate, examples)

    packed()
    if fault == "leak":
        monkeypatch.setattr(finetune_vl, "packed_rows_attention", plain_attention)
    with pytest.raises(ValueError, match="packed rows do not work for this model: they change its logits by"):
        packed(fault)


def test_a_leak_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(finetune_vl, "packed_rows_attention", plain_attention)
    assert_refused(tmp_path / "out", "packed rows do not work for this model")


def assert_refused(folder, message, **flags):
    """The message is shown alone, without a traceback, by run_cli; and nothing is written."""
    with pytest.raises(ValueError, match=message) as error:
        run(folder, **flags)
    assert traceback.extract_tb(error.value.__traceback__)[-1].filename == finetune_vl.__file__
    assert not folder.exists() or not list(folder.iterdir())
    return str(error.value)
