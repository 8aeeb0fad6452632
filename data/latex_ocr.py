"""
Images of formulas with their LaTeX: rendered here, or those of the LaTeX_OCR data set.

    reads    --data_path     hub id, or a local parquet file or folder with columns image and text; empty: renders
    writes   --output_dir    {train,test,...}.jsonl, rows of messages and images, and images/
    then     python finetune_vl.py --base_model ... --data_path OUT/train.jsonl

    render   python data/latex_ocr.py
    hub      python data/latex_ocr.py --data_path linxy/LaTeX_OCR --subset human_handwrite

The text has a space between all LaTeX tokens, as in LaTeX_OCR: x ^ { 2 } + \\frac { a } { b }.
"""

import functools
import io
import json
import random
import re
import shutil
import sys
import traceback
from pathlib import Path
from typing import get_type_hints

import datasets
import fire
import numpy as np
from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import MathTextParser
from PIL import Image

HERE = Path(__file__).resolve().parent
LETTERS = "a b c d e f g h k m n p t u v x y".split()
GREEK = r"\alpha \beta \gamma \theta \lambda \pi \sigma \omega".split()
ATOMS = [*LETTERS, *LETTERS, *GREEK, *"0123456789"]
FUNCTIONS = r"\sin \cos \log \sum".split()
HEIGHT, BASELINE, STEP, WIDEST = 32, 22, 16, 128  # of the images, in pixels; widths are multiples of STEP

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


# -----------------------------------------------------------------------------
# formulas


def draw_formula(rng, depth=1):
    """Return the LaTeX tokens of a random formula: one to four terms, joined by an operator or by nothing."""
    tokens = []
    for k in range(rng.choice([1, 1, 2, 2, 3, 4])):
        if k and rng.random() < 0.6:
            tokens.append(rng.choice("+-="))
        kind = rng.random() if depth else 1.0
        if kind < 0.12:
            above, below = (rng.choices(ATOMS, k=rng.choice([1, 1, 2])) for _ in range(2))
            tokens += [r"\frac", "{", *above, "}", "{", *below, "}"]
        elif kind < 0.22:
            tokens += [r"\sqrt", "{", *draw_formula(rng, depth - 1), "}"]
        elif kind < 0.28:
            tokens += ["(", *draw_formula(rng, depth - 1), ")"]
        elif kind < 0.42:
            tokens += [rng.choice(FUNCTIONS), rng.choice(ATOMS)]
        elif kind < 0.62:
            tokens += [rng.choice(ATOMS), rng.choice("^_"), "{", rng.choice(ATOMS), "}"]
        else:
            tokens.append(rng.choice(ATOMS))
    return tokens


def compact(tokens):
    r"""Return LaTeX without spaces but for the one that keeps a command off a letter: \pi x, x^{2}."""
    text = ""
    for before, token in zip(["", *tokens], tokens):
        if before[:1] == "\\" and token.isalpha():
            text += " "
        text += token
    return text


@functools.cache
def mathtext():
    """Return matplotlib's parser of formulas and its font, Computer Modern."""
    return MathTextParser("agg"), FontProperties(size=12, math_fontfamily="cm")


def render(tokens):
    """Return a formula as an image, grey on white, uint8 [32, width]; None where it does not fit into 32 x 128."""
    parser, font = mathtext()
    drawn = parser.parse(f"${compact(tokens)}$", dpi=100, prop=font)
    ink = np.asarray(drawn.image)  # [rows, columns], 255 is black
    top = BASELINE - round(drawn.height - drawn.depth)
    width = -(-(ink.shape[1] + 4) // STEP) * STEP
    if top < 0 or top + ink.shape[0] > HEIGHT or width > WIDEST:
        return None
    image = np.full((HEIGHT, width), 255, np.uint8)
    image[top : top + ink.shape[0], 2 : 2 + ink.shape[1]] -= ink
    return image


def draw_images(rng, count, max_length, exclude=()):
    """Return `count` different formulas {text with spaces: (tokens, image)} of 2 to max_length tokens.

    None has the same text without spaces, as \\sin x would have.
    Every length is as frequent as the others, as far as there are so many formulas of it.
    """
    found = {}
    while len(found) < count:
        length = rng.randint(2, max_length)
        tokens = []
        while len(tokens) != length:
            tokens = draw_formula(rng)
        text = " ".join(tokens)
        if text in found or text in exclude or text == compact(tokens):
            continue
        image = render(tokens)
        if image is not None:
            found[text] = tokens, image
    return found


def png(image):
    """Return an image, uint8 [height, width], as the bytes of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", optimize=True)
    return file.getvalue()


# -----------------------------------------------------------------------------
# files


def rendered(train_size, test_size, max_length, seed):
    """Yield (split, row number, bytes of a PNG file, text) of random formulas, none of the test split in the other."""
    rng = random.Random(seed)
    test = draw_images(rng, test_size, max_length)
    train = draw_images(rng, train_size, max_length, exclude=test)
    for name, found in (("train", train), ("test", test)):
        for number, (text, (_, image)) in enumerate(found.items(), 1):
            yield name, number, png(image), text


def loaded(data_path, subset):
    """Yield (split, row number, bytes of an image file or None, text) of a data set with columns image and text."""
    path = local_path(data_path)
    try:
        if path is not None and path.is_file():
            splits = datasets.load_dataset("parquet", data_files={path.stem: str(path)})
        else:
            splits = datasets.load_dataset(str(path or data_path), subset)
    except Exception as error:  # of datasets and huggingface_hub, which have no common ancestor
        raise ValueError(f"--data_path {data_path}, --subset {subset}: {error!s:.500}") from error
    for name, split in splits.items():
        if not {"image", "text"} <= set(split.column_names):
            raise ValueError(f"--data_path {data_path}: columns {split.column_names}, image and text are needed")
        for number, row in enumerate(split.cast_column("image", datasets.Image(decode=False)), 1):
            image, text = row["image"] or {}, row["text"] or ""
            yield name, number, image.get("bytes"), text.strip()


def write_latex_ocr(
    *,
    data_path: str = "",
    subset: str = "default",
    output_dir: str = "out/latex_ocr",
    prompt: str = "Using LaTeX to perform OCR on the image.",
    train_size: int = 2000,
    test_size: int = 512,
    max_length: int = 10,
    skip_bad_rows: bool = False,
    overwrite: bool = False,
    seed: int = 0,
):
    """Write images of formulas and their LaTeX as rows for finetune_vl.py.

    Args:
        data_path: hub id (linxy/LaTeX_OCR), or a local parquet file or folder; empty: formulas are rendered.
        subset: of a data set on the hub: default, small, full, synthetic_handwrite, human_handwrite.
        output_dir: folder to write to.
        prompt: what the user asks about each image.
        train_size: formulas to render for train.jsonl.
        test_size: formulas to render for test.jsonl, none of which is in train.jsonl.
        max_length: LaTeX tokens of the longest rendered formula.
        skip_bad_rows: count rows without a readable image or without text and leave them out, instead of an error.
        overwrite: replace what an earlier run left in --output_dir.
        seed: of the rendered formulas.
    """
    out = Path(output_dir)
    if out.exists() and not overwrite:
        raise ValueError(f"--output_dir {out} exists: --overwrite replaces it")
    others = [path.name for path in out.glob("*") if path.suffix != ".jsonl" and path.name != "images"]
    if others:
        raise ValueError(
            f"--output_dir {out}: --overwrite would delete {', '.join(others)}, not written by this script"
        )
    if not data_path and (min(train_size, test_size) < 1 or not 2 <= max_length <= 16):
        raise ValueError("--train_size and --test_size must be at least 1, --max_length 2 to 16")
    partial, counts, dropped = Path(f"{out}.incomplete"), {}, 0
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "images").mkdir(parents=True)
    if data_path:
        rows = loaded(data_path, subset)
    else:
        rows = rendered(train_size, test_size, max_length, seed)
    for name, number, content, text in rows:
        try:
            if not text:
                raise ValueError("no text")
            image = Image.open(io.BytesIO(content or b""))
            image.load()  # finetune_vl.py would stop at half a file
        except Exception as error:  # of PIL
            if not skip_bad_rows:
                raise ValueError(
                    f"--data_path {data_path}, {name} split, row {number}: {error}. --skip_bad_rows leaves it out"
                ) from None
            dropped += 1
            continue
        counts[name] = counts.get(name, 0) + 1
        file = f"images/{name}-{number:06d}.{image.format.lower()}"
        (partial / file).write_bytes(content)
        messages = [
            {"role": "user", "content": f"<image>{prompt}"},
            {"role": "assistant", "content": text},
        ]
        with open(partial / f"{name}.jsonl", "a", encoding="utf-8") as lines:
            lines.write(json.dumps({"messages": messages, "images": [file]}, ensure_ascii=False) + "\n")
    if not counts:
        raise ValueError(f"--data_path {data_path}: no rows in it")
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    first = next(iter(counts))
    print(f"{data_path or 'rendered'}: {counts}, {dropped} dropped\nwrote {out}")
    print(f"Next: python finetune_vl.py --data_path {out}/{first}.jsonl")


if __name__ == "__main__":
    run_cli(write_latex_ocr)
