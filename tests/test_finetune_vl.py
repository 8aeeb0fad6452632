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
import re
import shutil
import traceback
import weakref
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
from finetune_vl import IGNORE, LoraTrainer, encode, open_image, pack, pack_model, see, with_image_tokens

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data" / "tiny_vl"
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
    return [json.loads(line) for line in Path(path).read_text("utf-8").split("\n")[:-1]]


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


def assert_same_curve(one, other, losses=4e-6, norms=1e-5):
    """Relative tolerances; measured: 7.3e-7 of losses and 1.1e-6 of gradient norms."""
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
    """Return messages whose content is transformers' list of parts; images are paths.

    Where transformers itself opens a file, it forgets what is transparent; a PIL image it lays on white.
    """
    told, left = [], list(images)
    for message in messages:
        parts = []
        for text in re.split("(<image>)", message["content"]):
            if text == "<image>":
                path = left.pop(0)
                image = Image.open(path)
                parts.append({"type": "image", "image": image if image.has_transparency_data else path})
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


def row_of(examples, processor, model):
    """Return the row that the model takes, with its images, as it is made when a micro-batch runs."""
    return see(pack(examples, processor, model), processor, model)


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
    batch = row_of([example], processor, model.model)
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
    both = [row_of([one], processor, base.model)["pixel_values"] for one in (example, from_bytes)]
    assert torch.equal(*both)
    if name in ("on its side.jpg", "mirrored.jpg"):
        assert grid[0, 1] > grid[0, 2]  # 90 x 35 as it is stored


@pytest.mark.parametrize(
    "limits", [{"max_pixels": 1024}, {"min_pixels": 9000}, {"min_pixels": 2000, "max_pixels": 4000}], ids=str
)
def test_limits_of_the_pixels_are_those_of_transformers(album, tokenizer, base, limits):
    processor = AutoImageProcessor.from_pretrained(BASE, **limits)
    areas = set()
    for name in ("plain.png", "dot.png", "photo.jpg", "large.png"):
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


@pytest.fixture(
    scope="module",
    params=[(kind, dtype) for kind in KINDS for dtype in (torch.float32, torch.float64)],
    ids=lambda param: f"{param[0]}-{param[1]}",
)
def parity(request, album, tokenizer, processor):
    """(a packed model, its output layer, its packed examples, and one by one in the model as it was:
    logits [L, V], nll and gradients of each conversation of TALKS, and of all of them)."""
    kind, dtype = request.param
    model = tiny(kind, tokenizer).to(dtype)
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
    collate = functools.partial(row_of, processor=processor, model=model.get_base_model().model)
    head = pack_model(model.get_base_model(), collate, examples)
    model.train()
    logits = [some.detach() for some in logits]
    return model, head, collate, examples, logits, nlls, gradients


def assert_packed_is_one_by_one(parity, chosen):
    """Relative tolerances; measured over all kinds in float32: 0 of logits, 1.4e-7 of losses (which are float32 sums),
    2.1e-6 of a weight's gradient (7.7e-6 on another machine); in float64 1.5e-16, 9.6e-8 and 1.1e-15: it is rounding.
    """
    model, head, collate, examples, logits, nlls, gradients = parity
    exact = model.dtype == torch.float64
    batch = collate([examples[k] for k in chosen])
    labels = batch.pop("labels")[0]
    hidden = model(**batch).logits[0]
    got, wanted = F.linear(hidden, head.weight), torch.cat([logits[k] for k in chosen])
    assert got.shape == wanted.shape and (got - wanted).norm() <= (1e-14 if exact else 1e-6) * wanted.norm()
    nll = head(hidden, labels)[0]
    expected = sum(nlls[k] for k in chosen)
    assert nll.item() == pytest.approx(expected.item(), rel=1e-6)
    model.zero_grad()
    nll.backward()
    for name, p in model.named_parameters():
        wanted = [gradients[k][name] for k in chosen if name in gradients[k]]
        if not p.requires_grad:
            assert p.grad is None and not wanted, name
        elif wanted:
            assert (p.grad - sum(wanted)).norm() <= (1e-13 if exact else 1e-5) * sum(wanted).norm(), name
        else:  # nothing is learned from a blank image, but there is a gradient, of zeros: DDP waits for one
            assert p.grad is not None and not p.grad.any(), name
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


@pytest.mark.parametrize(
    "dtype, fault",  # what a model in half precision rounds may hide the images of others
    [(torch.float32, fault) for fault in ("leak", "positions", "images")]
    + [(torch.bfloat16, fault) for fault in ("leak", "positions")],
    ids=str,
)
def test_pack_model_sees_what_packing_changes(album, tokenizer, processor, monkeypatch, dtype, fault):
    examples = []
    for messages, names in TALKS[:3]:
        images = [str(album / name) for name in names]
        examples.append(example_of(messages, images, tokenizer, processor))

    def packed(fault=None):
        model = AutoModelForImageTextToText.from_pretrained(BASE, dtype=dtype)
        known = FlatPositions(model.model) if fault == "positions" else model.model
        collate = functools.partial(row_of, processor=processor, model=known)

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


# -----------------------------------------------------------------------------
# the whole script


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The folder of the run that the others are compared with."""
    folder = tmp_path_factory.mktemp("plain")
    run(folder)
    return folder


@pytest.fixture
def copy(plain, tmp_path):
    """A copy of the plain run, to change."""
    return Path(shutil.copytree(plain, tmp_path / "copy"))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, album):
    """The path of a jsonl of 15 rows with no image, one, and several in one or two turns."""
    folder = tmp_path_factory.mktemp("mixed")
    rows = []
    for k in range(15):
        messages, names = TALKS[k % 5]
        told = [message | {"content": f"{message['content']} {k}".replace(" ", "")} for message in messages]
        rows.append({"messages": told, "images": [str(album / name) for name in names]})
    return write(folder / "mixed.jsonl", rows)


def write(path, rows):
    """Write rows in the form that the suffix of `path` names; returns the path as a text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    else:
        path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


class Ready(Exception):
    """train() is about to start: (trainer,)."""


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """Return a function that runs train() up to its first step: it gives (trainer, run.json)."""

    def stop(self, **kwargs):
        raise Ready(self)

    def call(folder="out", **flags):
        with monkeypatch.context() as patch, pytest.raises(Ready) as ready:
            patch.setattr(LoraTrainer, "train", stop)
            run(tmp_path / folder, **flags)
        return ready.value.args[0], record_of(tmp_path / folder)

    return call


def test_a_run_writes_exactly_these_files_and_learns(plain):
    files = {str(path.relative_to(plain)) for path in plain.rglob("*") if path.is_file() and "runs" not in path.parts}
    tokenizer = {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
    weights = {"adapter_config.json", "adapter_model.safetensors"}
    state = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin", "README.md"}
    plots = {"loss.png", "learning_rate.png", "eval_loss.png", "eval_token_acc.png"}
    expected = {"run.json", "log.jsonl", "validation.jsonl"} | {f"plots/{name}" for name in plots}
    expected |= {f"images/{k}-0.png" for k in range(4)}
    expected |= {f"adapter/{name}" for name in tokenizer | weights}
    expected |= {"adapter/generation_config.json", "adapter/preprocessor_config.json"}
    for checkpoint in ("checkpoint-2", "checkpoint-4"):
        expected |= {f"{checkpoint}/{name}" for name in tokenizer | weights | state}
    assert files == expected and list((plain / "runs").iterdir())
    for name in plots:
        assert (plain / "plots" / name).read_bytes()[:4] == b"\x89PNG"
    records, record = curve(plain), record_of(plain)
    assert [(r["step"], "loss" in r) for r in records] == [(1, True), (2, True), (2, False)] + [
        (3, True),
        (4, True),
        (4, False),
    ]
    losses = losses_of(records)
    assert max(losses[2:]) < min(losses[:2])  # of the second epoch and of the first
    assert losses_of(records, "eval_loss")[1] < losses_of(records, "eval_loss")[0]
    assert record["status"] == "finished" and record["best_checkpoint"] == "checkpoint-4"
    assert record["counts"] == {"rows": 20, "train": 16, "validation": 4, "cut": 0, "left_out": 0}
    assert record["versions"] == {"torch": torch.__version__, "transformers": transformers.__version__}
    assert set(record["flags"]) == set(finetune_vl.train.__kwdefaults__) | {"data_sha256"}
    stops = json.loads((plain / "adapter" / "generation_config.json").read_text())["eos_token_id"]
    assert stops in (2, [2])


def test_the_saved_adapter_and_validation_rows_give_the_logged_evaluation(plain):
    """With transformers and peft alone, one by one."""
    model = AutoModelForImageTextToText.from_pretrained(BASE, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, plain / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(plain / "adapter")
    processor = AutoImageProcessor.from_pretrained(plain / "adapter")
    nll, right, tokens = 0.0, 0, 0
    for row in lines_of(plain / "validation.jsonl"):
        inputs, labels = by_transformers(
            row["messages"], [str(plain / path) for path in row["images"]], tokenizer, processor
        )
        learned = labels[1:] != IGNORE
        with torch.no_grad():
            logits = model(**inputs).logits[0, :-1][learned].double()
        nll += F.cross_entropy(logits, labels[1:][learned], reduction="sum").item()
        right += logits.argmax(-1).eq(labels[1:][learned]).sum().item()
        tokens += int(learned.sum())
    best = min((r for r in curve(plain) if "eval_loss" in r), key=lambda r: r["eval_loss"])
    assert best["eval_loss"] == pytest.approx(nll / tokens, rel=1e-6)
    assert best["eval_token_acc"] == right / tokens


def test_validation_rows_are_those_held_out_and_can_be_read_again(plain, prepare):
    trainer, _ = prepare()
    again, record = prepare("again", data_path=str(plain / "validation.jsonl"), val_set_size=0, prompt="unused")
    assert record["counts"]["train"] == 4
    rows = parquet.read_table(SMALL["data_path"]).to_pylist()[:20]
    texts = [row["text"] for row in rows]
    held_out = lines_of(plain / "validation.jsonl")
    answers = [row["messages"][1]["content"] for row in held_out]
    assert answers == [text for text in texts if text in answers]  # in the order of the file
    for one, other, row in zip(again.train_dataset, trainer.eval_dataset, held_out, strict=True):
        assert one["input_ids"].tolist() == other["input_ids"].tolist()
        assert one["labels"].tolist() == other["labels"].tolist()
        assert Path(one["images"][0]).read_bytes() == other["images"][0]
        assert other["images"][0] == rows[texts.index(row["messages"][1]["content"])]["image"]["bytes"]
        assert row["messages"][0] == {"role": "user", "content": f"<image>{PROMPT}"}


def test_validation_rows_keep_paths_and_kinds_of_images(album, tmp_path):
    names = ["photo.jpg", "moving.gif", "on its side.jpg"]
    images = [str(album / "plain.png"), *map(IMAGES.get, names)]
    conversations = [
        {"messages": talk("no image", "x"), "images": []},
        {"messages": talk("<image><image>", "y", "<image><image>", "z"), "images": images},
    ]
    finetune_vl.write_validation(tmp_path, conversations)
    none, several = [finetune_vl.to_conversation(row, "", tmp_path) for row in lines_of(tmp_path / "validation.jsonl")]
    assert none == (talk("no image", "x"), []) and several[0] == conversations[1]["messages"]
    assert [Path(path).name for path in several[1]] == ["plain.png", "1-1.jpeg", "1-2.gif", "1-3.jpeg"]
    for path, name in zip(several[1], ["plain.png", *names], strict=True):
        assert Path(path).read_bytes() == IMAGES[name]
    assert open_image(several[1][3]).size == (35, 90)


@pytest.mark.parametrize(
    "flags",
    [
        {"micro_batch_size": 1},
        {"micro_batch_size": 2},
        {"micro_batch_size": 8},
        {"activation_checkpointing": True, "micro_batch_size": 8},
    ],
    ids=str,
)
def test_what_must_not_change_a_run(plain, tmp_path, flags):
    layers = []  # the MLP of each layer that ran while a gradient was wanted

    def count(module, args):
        if type(module).__name__ == "Qwen2MLP" and torch.is_grad_enabled():
            layers.append(module)

    hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        assert_same_curve(run(tmp_path, **flags), curve(plain))
    finally:
        hook.remove()
    times = 2 if "activation_checkpointing" in flags else 1  # each layer runs again in the backward pass
    assert len(layers) == 2 * 16 // flags["micro_batch_size"] * 3 * times


@pytest.mark.parametrize("flags", [{}, {"lora_vision": True}], ids=str)
def test_splits_of_rows_with_and_without_images_are_the_same_run(mixed, tmp_path, flags):
    flags |= {"data_path": mixed, "val_set_size": 4, "learning_rate": 1e-3}  # 11 examples: a step of 8, and one of 3
    first, *others = [run(tmp_path / str(size), micro_batch_size=size, **flags) for size in (1, 2, 4, 8)]
    for other in others:
        assert_same_curve(other, first)
    losses = losses_of(first)
    assert losses[3] < losses[0]
    blank = [losses_of(curve(tmp_path / size, ()), "num_input_tokens_seen")[-1] for size in "18"]
    assert blank[0] > blank[1]  # or there was no micro-batch without an image


def test_same_seed_same_run_and_another_seed_another(plain, tmp_path):
    run(tmp_path / "same")
    assert_same_run(tmp_path / "same", plain)
    other = run(tmp_path / "other", seed=1, max_steps=1)
    assert other[0]["loss"] != curve(plain)[0]["loss"]
    assert lines_of(tmp_path / "other" / "validation.jsonl") != lines_of(plain / "validation.jsonl")


def test_the_default_learning_rate_falls_with_the_size(prepare):
    _, record = prepare(learning_rate=0.0)
    assert record["flags"]["learning_rate"] == pytest.approx(5e-4 * (2000 / 128) ** 0.781)


def test_adapters_are_in_the_language_model_and_with_lora_vision_in_the_tower_and_the_merger(plain, tmp_path):
    assert adapter(plain) and all(".language_model.layers." in name for name in adapter(plain))
    records = run(tmp_path, lora_vision=True)
    weights = adapter(tmp_path)
    for part in (".visual.blocks.0.", ".visual.blocks.1.", ".visual.merger.", ".language_model.layers.2."):
        learned = [weight for name, weight in weights.items() if part in name and "lora_B" in name]
        assert len(learned) >= 2 and all(weight.any() for weight in learned), part
    assert weights.keys() > adapter(plain).keys()
    assert not any("patch_embed" in name or "lm_head" in name for name in weights)
    assert losses_of(records)[0] == pytest.approx(losses_of(curve(plain))[0], rel=1e-6)  # adapters start as no change
    assert losses_of(records)[1] != pytest.approx(losses_of(curve(plain))[1], rel=1e-4)


@pytest.mark.parametrize("flags", [{"max_pixels": 512}, {"min_pixels": 4000, "max_pixels": 6000}], ids=str)
def test_limits_of_the_pixels_hold_in_the_run_and_travel_with_the_adapter(plain, tmp_path, flags):
    records = run(tmp_path, max_steps=1, **flags)
    size = AutoImageProcessor.from_pretrained(tmp_path / "adapter").size
    assert size["longest_edge"] == flags["max_pixels"] and size["shortest_edge"] == flags.get("min_pixels", 256)
    seen = losses_of(curve(tmp_path, ()), "num_input_tokens_seen")[0]
    before = losses_of(curve(plain, ()), "num_input_tokens_seen")[0]
    assert seen < before if flags["max_pixels"] == 512 else seen > before
    assert losses_of(records)[0] != pytest.approx(losses_of(curve(plain))[0], rel=1e-4)
    whole = AutoImageProcessor.from_pretrained(plain / "adapter")
    assert whole.to_dict() == AutoImageProcessor.from_pretrained(BASE).to_dict()


@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
def test_quantized_bases_train_on_a_cpu_and_keep_the_vision_tower(plain, tmp_path, prepare, bits):
    trainer, _ = prepare(**{bits: True})
    kinds = {"visual": set(), "layers": set()}
    for name, module in trainer.model.named_modules():
        for part in kinds:
            if isinstance(module, torch.nn.Linear) and f".{part}." in name and ".lora_" not in name:
                kinds[part].add(type(module).__name__)
    assert kinds == {"visual": {"Linear"}, "layers": {"Linear8bitLt" if bits == "load_in_8bit" else "Linear4bit"}}
    assert type(trainer.model.get_base_model().lm_head).__name__ == "Linear"
    records = run(tmp_path / "run", max_steps=2, **{bits: True})
    expected = losses_of(curve(plain))[0]
    assert losses_of(records)[0] == pytest.approx(expected, rel=0.1)
    assert losses_of(records)[0] != pytest.approx(expected, rel=1e-6)
    assert all(weight.any() for name, weight in adapter(tmp_path / "run").items() if "lora_B" in name)


def test_a_half_precision_base_trains_on_a_cpu(plain, tmp_path):
    records = run(tmp_path, dtype="bfloat16", max_steps=2)
    assert losses_of(records) == pytest.approx(losses_of(curve(plain))[:2], rel=2e-2)
    assert {weight.dtype for weight in adapter(tmp_path).values()} == {torch.float32}


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_the_other_families_train(mixed, tmp_path, tokenizer, processor, kind):
    model = tiny(kind, tokenizer).unload()
    for part in (model, tokenizer, processor):
        part.save_pretrained(tmp_path / "base")
    flags = {"data_path": mixed, "learning_rate": 1e-2, "lora_vision": True, "num_epochs": 4, "max_samples": 11}
    first = run(tmp_path / "1", base_model=str(tmp_path / "base"), micro_batch_size=1, **flags)
    other = run(tmp_path / "8", base_model=str(tmp_path / "base"), micro_batch_size=8, **flags)
    assert_same_curve(other, first, norms=1e-4)  # measured 1.5e-5
    assert losses_of(first)[-1] < losses_of(first)[0]


# -----------------------------------------------------------------------------
# data, from the file to the trainer

ROLES = {"user": "human", "assistant": "gpt"}


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """(a folder with images/0.png to 7.png, their texts, from which each form of the same data is made)."""
    folder = tmp_path_factory.mktemp("eight")
    (folder / "images").mkdir()
    rows = parquet.read_table(SMALL["data_path"]).to_pylist()[:8]
    for k, row in enumerate(rows):
        (folder / "images" / f"{k}.png").write_bytes(row["image"]["bytes"])
    return folder, [row["text"] for row in rows]


def messages_of(text):
    return talk(f"<image>{PROMPT}", text)


def conversations_of(text):
    return [{"from": ROLES[turn["role"]], "value": turn["content"]} for turn in messages_of(text)]


def content(path):
    return {"bytes": path.read_bytes(), "path": None}


FORMS = {  # name of the file: a row, of the text and of the image's path, relative and whole
    "image and text.parquet": lambda text, path, whole: {"image": content(whole), "text": text},
    "bytes in messages.parquet": lambda text, path, whole: {"messages": messages_of(text), "images": [content(whole)]},
    "image and text.jsonl": lambda text, path, whole: {"image": path, "text": text},
    "relative.jsonl": lambda text, path, whole: {"messages": messages_of(text), "images": [path]},
    "absolute.json": lambda text, path, whole: {"messages": messages_of(text), "images": [str(whole)]},
    "paths in dicts.jsonl": lambda text, path, whole: {"messages": messages_of(text), "images": [{"path": path}]},
    "swift.jsonl": lambda text, path, whole: {
        "messages": messages_of(text),
        "images": [{"bytes": None, "path": str(whole)}],
    },
    "llama factory.json": lambda text, path, whole: {"conversations": conversations_of(text), "images": [path]},
    "alpaca.json": lambda text, path, whole: {
        "instruction": f"<image>{PROMPT}",
        "input": "",
        "output": text,
        "images": [path],
    },
    "question.jsonl": lambda text, path, whole: {"question": f"<image>{PROMPT}", "answer": text, "image": path},
}
TWO = {"val_set_size": 2, "batch_size": 4, "max_steps": 2, "max_samples": 0}


@pytest.fixture(scope="module")
def form(tmp_path_factory, eight):
    """The curve of the first of FORMS."""
    folder, texts = eight
    rows = [FORMS["image and text.parquet"](text, None, folder / "images" / f"{k}.png") for k, text in enumerate(texts)]
    data = write(folder / "first.parquet", rows)
    return run(tmp_path_factory.mktemp("form"), data_path=data, prompt=PROMPT, **TWO)


@pytest.mark.parametrize("name", FORMS)
def test_all_forms_of_the_same_data_give_the_same_run(eight, form, tmp_path, monkeypatch, name):
    folder, texts = eight
    rows = []
    for k, text in enumerate(texts):
        rows.append(FORMS[name](text, f"images/{k}.png", folder / "images" / f"{k}.png"))
    monkeypatch.chdir(tmp_path)  # paths are seen from the file's folder
    assert run(tmp_path / "out", data_path=write(folder / name, rows), **TWO) == form
    if "image and text" in name:
        other = run(tmp_path / "prompt", data_path=str(folder / name), prompt="Read it.", **TWO)
        assert losses_of(other)[0] != pytest.approx(losses_of(form)[0], rel=1e-3)


def test_a_text_beside_a_conversation_is_not_its_answer(tmp_path):
    row = asked("<image>What?", "a.png") | {"text": "all of it, rendered"}
    assert finetune_vl.to_conversation(row, "unused", tmp_path) == (row["messages"], [str(tmp_path / "a.png")])


def test_a_data_set_of_the_hub_is_the_same_data(eight, form, tmp_path, monkeypatch):
    folder, texts = eight
    rows = [{"image": content(folder / "images" / f"{k}.png"), "text": text} for k, text in enumerate(texts)]

    def load_dataset(name, split):
        assert (name, split) == ("owner/formulas", "train")
        return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert run(tmp_path / "out", data_path="owner/formulas", **TWO) == form


def test_rows_of_text_alone_train_as_in_finetune(prepare, tmp_path, tokenizer):
    rows = [{"instruction": "Say", "input": f"{k}", "output": f"x {k}"} for k in range(6)]
    rows += [{"messages": talk("Say", "y"), "images": []}, {"messages": talk("Say", "y"), "images": None}]
    data = write(tmp_path / "texts.json", rows)
    trainer, record = prepare(data_path=data, val_set_size=2)
    assert record["counts"]["train"] == 6
    for example in [*trainer.train_dataset, *trainer.eval_dataset]:
        text = tokenizer.decode(example["input_ids"])
        assert text.startswith("<|im_start|>user\nSay") and "vision" not in text and example["images"] == []
    records = run(tmp_path / "run", data_path=data, val_set_size=2, batch_size=6, micro_batch_size=3, max_steps=2)
    alone = run(tmp_path / "alone", data_path=data, val_set_size=2, batch_size=6, micro_batch_size=1, max_steps=2)
    assert_same_curve(records, alone)


def test_examples_hold_ids_and_files_and_no_pixels(prepare, mixed, monkeypatch):
    trainers = [prepare(folder, **flags)[0] for folder, flags in (("one", {}), ("two", {"data_path": mixed}))]
    for trainer in trainers:
        shown = [(example.keys(), [*map(type, example["images"])]) for example in trainer.train_dataset]
        trainer.data_collator(trainer.train_dataset[:4])
        for example, (names, kinds) in zip(trainer.train_dataset, shown, strict=True):
            assert example.keys() == names == {"input_ids", "labels", "images"}
            assert [*map(type, example["images"])] == kinds
            for name in ("input_ids", "labels"):
                assert example[name].dtype == np.int32 and example[name].base is not None
    assert {type(image) for example in trainers[0].train_dataset for image in example["images"]} == {bytes}
    assert {type(image) for example in trainers[1].train_dataset for image in example["images"]} == {str}


def test_pixels_live_as_long_as_their_micro_batch(tmp_path, monkeypatch):
    """Of a step of 4 micro-batches each is opened when it runs, and its pixels are gone when the next one is opened."""
    events, alive, pixels, sizes, real = [], [], [], [], finetune_vl.see

    def counted(batch, processor, model):
        gc.collect(0)
        alive.append(sum(ref() is not None for ref in pixels))
        sizes.append(len(batch["images"]))
        batch = real(batch, processor, model)
        pixels.append(weakref.ref(batch["pixel_values"]))
        events.append("see")
        return batch

    def runs(module, args):
        if type(module).__name__ == "Qwen2VLModel":
            events.append("run")

    monkeypatch.setattr(finetune_vl, "see", counted)
    hook = torch.nn.modules.module.register_module_forward_pre_hook(runs)
    try:
        run(tmp_path, micro_batch_size=2, val_set_size=0, max_steps=2)
    finally:
        hook.remove()
    assert sizes == [1, 1, 1, 3] + [2] * (len(sizes) - 4)  # packed by pack_model one by one, and together
    assert len(events) == 2 * (4 + 2 * 4) and events == ["see", "run"] * (len(events) // 2)
    assert max(alive) <= 1


def test_a_cut_leaves_images_whole_and_is_counted(prepare, tmp_path, album):
    rows = [{"messages": talk("<image>q", "x " * 40), "images": [str(album / "plain.png")]}] * 4
    whole, _ = prepare("whole", data_path=write(tmp_path / "long.json", rows), val_set_size=0)
    length = len(whole.train_dataset[0]["input_ids"])
    trainer, record = prepare(
        "cut", data_path=write(tmp_path / "long.json", rows), val_set_size=0, cutoff_len=length - 9
    )
    assert record["counts"] == {"rows": 4, "train": 4, "validation": 0, "cut": 4, "left_out": 0}
    for name in ("input_ids", "labels"):
        assert trainer.train_dataset[0][name].tolist() == whole.train_dataset[0][name][:-9].tolist()


def test_an_example_of_an_earlier_turn_has_only_its_images(prepare, tmp_path, album, tokenizer, processor, base):
    """A template that drops old reasoning, as Qwen3's does, makes an example of each answer."""
    folder = shutil.copytree(BASE, tmp_path / "base")
    template = (folder / "chat_template.jinja").read_text()
    dropping = template.replace("{{- message.content -}}", "{{- DROP -}}", 1)
    assert dropping != template
    drop = 'message.content.split("</think>")[-1] if message.role == "assistant" and not loop.last else message.content'
    (folder / "chat_template.jinja").write_text(dropping.replace("DROP", drop))
    images = [str(album / name) for name in ("plain.png", "photo.jpg", "grey.png")]
    messages = talk("<image>q", "<think>a</think>x", "<image><image>r", "<think>b</think>y")
    data = write(tmp_path / "talk.json", [{"messages": messages, "images": images}] * 2)
    trainer, _ = prepare(data_path=data, val_set_size=0, base_model=str(folder))
    early, late = trainer.train_dataset[:2]
    assert early["images"] == images[:1] and late["images"] == images
    one, both = (row_of([example], processor, base.model) for example in (early, late))
    assert len(one["image_grid_thw"]) == 1 and len(both["image_grid_thw"]) == 3
    assert tokenizer.decode(early["labels"][early["labels"] != IGNORE]) == "<think>a</think>x<|im_end|>"
    assert tokenizer.decode(late["labels"][late["labels"] != IGNORE]) == "<think>b</think>y<|im_end|>"


# -----------------------------------------------------------------------------
# killed runs


def killed(monkeypatch, folder, step, **flags):
    """Run until the start of optimizer step `step`, and die there."""
    real = finetune_vl.Report.on_step_begin

    def die(self, args, state, control, **kwargs):
        if state.global_step == step - 1:
            raise MemoryError("killed")
        return real(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(finetune_vl.Report, "on_step_begin", die)
        run(folder, **flags)


@pytest.mark.parametrize("step", [1, 3, 4])
def test_a_resumed_run_is_the_run_that_was_never_killed(plain, tmp_path, monkeypatch, step):
    killed(monkeypatch, tmp_path, step)
    assert record_of(tmp_path)["status"] == "running"
    run(tmp_path, resume_from_checkpoint="auto")
    assert_same_run(tmp_path, plain)
    assert {path.name for path in (tmp_path / "images").iterdir()} == {f"{k}-0.png" for k in range(4)}


def test_a_run_may_be_split_otherwise_when_it_goes_on(plain, tmp_path, monkeypatch):
    killed(monkeypatch, tmp_path, 3)
    run(tmp_path, resume_from_checkpoint="auto", micro_batch_size=1)
    assert_same_curve(curve(tmp_path), curve(plain))


@pytest.mark.parametrize(
    "flags, changed",
    [
        ({"learning_rate": 1e-3}, "'learning_rate': 0.003"),
        ({"max_steps": 9}, "'max_steps': 0"),
        ({"prompt": "Read."}, "'data_sha256': '"),
        ({"prompt": "Read."}, f"'prompt': '{PROMPT}'"),
        ({"min_pixels": 600}, "'min_pixels': 0"),
        ({"max_pixels": 600}, "'max_pixels': 0"),
        ({"lora_vision": True}, "'lora_vision': False"),
        ({"max_samples": 19}, "'data_sha256': '"),
        ({"data_path": str(DATA / "test.parquet")}, "'data_sha256': '"),
    ],
    ids=str,
)
def test_other_flags_and_other_data_are_refused_by_name(plain, flags, changed):
    before = sorted((path, path.stat().st_mtime_ns) for path in plain.rglob("*"))
    with pytest.raises(ValueError, match=re.escape(changed)) as error:
        run(plain, resume_from_checkpoint="auto", **flags)
    assert "was another run" in str(error.value)
    assert sorted((path, path.stat().st_mtime_ns) for path in plain.rglob("*")) == before


def test_a_resumed_run_finds_the_same_data_in_another_folder(tmp_path, monkeypatch):
    rows = parquet.read_table(SMALL["data_path"]).to_pylist()[:20]
    (tmp_path / "one" / "images").mkdir(parents=True)
    for k, row in enumerate(rows):
        (tmp_path / "one" / "images" / f"{k}.png").write_bytes(row["image"]["bytes"])
    flat = [{"image": f"images/{k}.png", "text": row["text"]} for k, row in enumerate(rows)]
    data = write(tmp_path / "one" / "rows.jsonl", flat)
    run(tmp_path / "whole", data_path=data)
    killed(monkeypatch, tmp_path / "out", 3, data_path=data)
    (tmp_path / "one").rename(tmp_path / "other")
    data = str(tmp_path / "other" / "rows.jsonl")
    run(tmp_path / "out", data_path=data, resume_from_checkpoint="auto")
    assert_same_run(tmp_path / "out", tmp_path / "whole")
    (tmp_path / "other" / "images" / "7.png").write_bytes(image_bytes(noise(90, 60)))
    with pytest.raises(ValueError, match="was another run, with {'data_sha256'"):
        run(tmp_path / "out", data_path=data, resume_from_checkpoint="auto")


def test_an_output_folder_that_holds_a_run_is_kept_unless_told_otherwise(copy, tmp_path):
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    for flags in ({}, {"overwrite": True, "resume_from_checkpoint": "auto"}):
        with pytest.raises(ValueError, match="holds a run: one of --overwrite and --resume_from_checkpoint auto"):
            run(copy, **flags)
    with pytest.raises(ValueError, match="has no qkvz"):  # with --overwrite, too, nothing goes before all is checked
        run(copy, overwrite=True, lora_target_modules="q_proj,qkvz")
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    assert len(run(copy, overwrite=True, max_steps=2)) == 3
    assert {path.name for path in copy.glob("checkpoint-*")} == {"checkpoint-2"}


# -----------------------------------------------------------------------------
# bad input


@pytest.fixture
def no_model(monkeypatch):
    """Fail a test that loads a model."""
    refuse = lambda *args, **kwargs: pytest.fail("a model was loaded")
    monkeypatch.setattr(finetune_vl.AutoModelForImageTextToText, "from_pretrained", refuse)


def assert_refused(folder, message, **flags):
    """The message is shown alone, without a traceback, by run_cli; and nothing is written."""
    with pytest.raises(ValueError, match=message) as error:
        run(folder, **flags)
    assert traceback.extract_tb(error.value.__traceback__)[-1].filename == finetune_vl.__file__
    assert not folder.exists() or not list(folder.iterdir())


def test_the_check_of_packed_rows_takes_examples_with_images(tmp_path, album, prepare, monkeypatch):
    real, checked = finetune_vl.pack_model, []
    monkeypatch.setattr(finetune_vl, "pack_model", lambda *args: checked.extend(args[2]) or real(*args))
    rows = [{"messages": talk(f"No picture {k}.", "x"), "images": []} for k in range(6)]
    rows += [{"messages": talk("<image>?", "x"), "images": [str(album / name)]} for name in ("plain.png", "photo.jpg")]
    prepare(data_path=write(tmp_path / "rows.json", rows), val_set_size=0)
    assert [len(example["images"]) for example in checked] == [1, 1, 0]


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A folder with files that are no images, and some that are."""
    folder = tmp_path_factory.mktemp("broken")
    whole = image_bytes(noise(90, 60))
    files = {"good.png": whole, "half.png": whole[: len(whole) // 2], "text.png": b"no image", "empty.png": b""}
    files |= {"half.jpg": image_bytes(noise(90, 60), "JPEG")[:-200], "long.png": image_bytes(noise(201, 1))}
    files |= {"header.png": whole[:20], "wide.png": image_bytes(noise(400, 60))}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "folder.png").mkdir()
    return folder


def asked(text, *images, answer="x"):
    return {"messages": talk(text, answer), "images": list(images)}


GOOD = asked("<image>", "good.png")
BAD_ROWS = {
    "missing": (asked("<image>", "none.png"), {}, "image '.*/none.png': cannot be read: .*No such file"),
    "a folder": (asked("<image>", "folder.png"), {}, "image '.*/folder.png': cannot be read: .*directory"),
    "text": (asked("<image>", "text.png"), {}, "image '.*/text.png': cannot be read: cannot identify image file"),
    "empty": (asked("<image>", "empty.png"), {}, "image '.*/empty.png': cannot be read: "),
    "header only": (asked("<image>", "header.png"), {}, "image '.*/header.png': cannot be read: "),
    "half a png": (asked("<image>", "half.png"), {}, "image '.*/half.png': cannot be read: .*truncated"),
    "half a jpeg": (asked("<image>", "half.jpg"), {}, "image '.*/half.jpg': cannot be read: .*truncated"),
    "no mark": (asked("What?", "good.png"), {}, r"\[\] in the text, and 1 images: each needs one <image>"),
    "no image": (asked("<image>"), {}, r"\['<image>'\] in the text, and 0 images: each needs one <image>"),
    "more images": (asked("<image>", "good.png", "good.png"), {}, r"\['<image>'\] in the text, and 2 images"),
    "more marks": (asked("<image> <image>", "good.png"), {}, r"\['<image>', '<image>'\] in the text, and 1 images"),
    "mark in an answer": (asked("<image>", "good.png", answer="<image>"), {}, r"\['<image>', '<image>'\] in the text"),
    "a pad as text": (asked("<image><|image_pad|>", "good.png"), {}, r"\['<image>', '<\|image_pad\|>'\] in the text"),
    "only a pad": (asked("<|image_pad|>", "good.png"), {}, r"\['<\|image_pad\|>'\] in the text, and 1 images"),
    "too long a strip": (asked("<image>", "long.png"), {}, "absolute aspect ratio must be smaller than 200, got 201"),
    "does not fit": (
        asked("<image>", "wide.png"),
        {"cutoff_len": 60},
        "--cutoff_len 60 cuts its images: lower --max_p",
    ),
    "no answer": ({"messages": talk("<image>"), "images": ["good.png"]}, {}, "no answer to learn"),
    "no text": ({"image": "good.png", "text": None}, {}, "not alpaca .*"),
    "empty text": ({"image": "good.png", "text": ""}, {}, "not alpaca .*"),
    "no form": ({"picture": "good.png"}, {}, r"not alpaca .*\{'picture': 'good.png'"),
    "no text in a turn": (asked([{"type": "image"}], "good.png"), {}, "not alpaca .*"),
    "a number": (asked("<image>", 7), {}, ""),
    "a video": (asked("<image>", "good.png") | {"videos": ["a.mp4"]}, {}, "not alpaca .*no videos"),
    "an empty dict": (asked("<image>", {}), {}, ""),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_named_before_a_model_is_loaded(tmp_path, broken, no_model, name):
    row, flags, message = BAD_ROWS[name]
    data = write(broken / f"{name}.json", [GOOD, GOOD, row, GOOD])
    assert_refused(tmp_path / "out", rf"^{data}, row 3: {message}", data_path=data, val_set_size=0, **flags)


def test_a_broken_image_among_bytes_is_named_by_its_row(tmp_path, broken, no_model):
    rows = [{"image": content(broken / name), "text": "x"} for name in ("good.png", "half.png")]
    data = write(tmp_path / "rows.parquet", rows)
    assert_refused(tmp_path / "out", rf"^{data}, row 2: image b'.*cannot be read: ", data_path=data, val_set_size=0)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"base_model": str(ROOT / "data" / "tiny" / "model")}, "a llama, not one of qwen2_vl, qwen2_5_vl, qwen3_vl"),
        ({"base_model": "nowhere"}, "nowhere: no such file or folder, and no id of the hub"),
        ({"base_model": "owner/not-there"}, "--base_model owner/not-there"),
        ({"data_path": "data/none.jsonl"}, "data/none.jsonl: no such file"),
        ({"batch_size": 10}, "--batch_size 10 must be a multiple of 4 = --micro_batch_size 4 x 1 ranks: 12 is one"),
        ({"max_pixels": -1}, "--max_pixels -1: must not be negative"),
        ({"cutoff_len": 0}, "--cutoff_len 0: must be above 0"),
        ({"dtype": "half"}, "--dtype half: one of auto, bfloat16, float16, float32"),
        ({"deepspeed": "deepspeed/zero2.json"}, "--deepspeed needs a launcher: torchrun"),
        ({"val_set_size": 20.0}, "--val_set_size 20 .*leaves no label to learn"),
        ({"load_in_8bit": True, "load_in_4bit": True}, "load_in_[48]bit.*load_in_[48]bit"),
    ],
    ids=lambda value: str(value)[-40:],
)
def test_bad_flags_are_refused_before_a_model_is_loaded(tmp_path, no_model, flags, message):
    assert_refused(tmp_path / "out", message, **flags)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"lora_target_modules": "q_proj,nothing"}, "has no nothing"),
        ({"lora_target_modules": "nothing"}, "--lora flags: No modules were targeted"),
        ({"lora_target_modules": "qkv"}, "--lora flags: "),  # of the vision tower
        ({"lora_target_modules": "q_proj,qkv"}, "has no qkv"),
        ({"lora_target_modules": ""}, "--lora flags"),
        ({"lora_dropout": 1.5}, "dropout"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_bad_adapters_are_refused(tmp_path, flags, message):
    assert_refused(tmp_path / "out", message, **flags)


def test_layers_of_the_vision_tower_are_known_with_lora_vision(tmp_path):
    run(tmp_path, lora_target_modules="q_proj,qkv", lora_vision=True, max_steps=1)
    modules = {re.search(r"(\w+)\.lora_", name)[1] for name in adapter(tmp_path)}
    assert modules == {"q_proj", "qkv"}


def test_a_base_with_missing_weights_is_refused(tmp_path):
    shutil.copytree(BASE, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["text_config"] |= {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    assert_refused(tmp_path / "out", r"--base_model .* has no .*layers\.3\.", base_model=str(tmp_path / "base"))
