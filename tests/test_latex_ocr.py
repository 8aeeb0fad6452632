"""
data/latex_ocr.py: formulas and their images, and files made from them and from a data set. No network.

    .venv/bin/python -m pytest tests/test_latex_ocr.py
"""

import importlib.util
import io
import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import finetune_vl

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("latex_ocr_data", ROOT / "data" / "latex_ocr.py")
latex_ocr = importlib.util.module_from_spec(spec)
spec.loader.exec_module(latex_ocr)

PROMPT = "Using LaTeX to perform OCR on the image."
COMMANDS = {r"\frac", r"\sqrt", *latex_ocr.GREEK, *latex_ocr.FUNCTIONS}
TOKENS = {*latex_ocr.LETTERS, *"0123456789+-=(){}^_", *COMMANDS}


def tokens_of(text):
    """Return the LaTeX tokens of a text, as TeX reads it: a command ends where its letters do."""
    return re.findall(r"\\[A-Za-z]+|\S", text)


@pytest.fixture(scope="module")
def formulas():
    return latex_ocr.draw_images(random.Random(0), 180, 10)


def write(out, **flags):
    """Run the script; return {split: its rows}."""
    latex_ocr.write_latex_ocr(output_dir=str(out), **flags)
    return {path.stem: finetune_vl.load_rows(str(path)) for path in out.glob("*.jsonl")}


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -----------------------------------------------------------------------------
# formulas and images


def test_formulas_are_of_known_tokens_and_balanced():
    rng = random.Random(1)
    seen = Counter()
    for _ in range(2000):
        tokens = latex_ocr.draw_formula(rng)
        seen.update(tokens)
        for open_, close in ("{}", "()"):
            depth = 0
            for token in tokens:
                depth += (token == open_) - (token == close)
                assert depth >= 0, tokens
            assert depth == 0, tokens
        for k, token in enumerate(tokens):
            if token in ("^", "_", r"\sqrt", r"\frac"):
                assert tokens[k + 1] == "{" and tokens[k + 2] != "}", tokens
    assert seen.keys() == TOKENS


def test_lengths_are_2_to_max_length_and_about_as_frequent(formulas):
    lengths = Counter(len(tokens) for tokens, _ in formulas.values())
    assert lengths.keys() == set(range(2, 11))
    del lengths[2]  # there are few of it
    assert max(lengths.values()) < 3 * min(lengths.values())
    assert {len(tokens) for tokens, _ in latex_ocr.draw_images(random.Random(0), 9, 3).values()} == {2, 3}
    for text, (tokens, _) in formulas.items():
        assert text == " ".join(tokens) != latex_ocr.compact(tokens)


def test_draw_images_leaves_out_what_is_excluded(formulas):
    again = latex_ocr.draw_images(random.Random(0), 180, 10)
    assert list(again) == list(formulas)
    others = latex_ocr.draw_images(random.Random(0), 180, 10, exclude=formulas)
    assert len(others) == 180 and not others.keys() & formulas.keys()


@pytest.mark.parametrize(
    "text, short",
    [
        (r"\pi x", r"\pi x"),
        (r"\pi 2", r"\pi2"),
        (r"x \pi y", r"x\pi y"),
        (r"\sin \alpha", r"\sin\alpha"),
        (r"x ^ { 2 } + \frac { a } { b }", r"x^{2}+\frac{a}{b}"),
        (r"\sqrt { \pi }", r"\sqrt{\pi}"),
        ("a b", "ab"),
    ],
)
def test_compact_writes_the_spaces_that_are_needed(text, short):
    assert latex_ocr.compact(text.split()) == short


def test_compact_formulas_are_the_same_tokens_and_no_space_can_go():
    rng = random.Random(2)
    spaces = 0
    for _ in range(500):
        tokens = latex_ocr.draw_formula(rng)
        text = latex_ocr.compact(tokens)
        assert tokens_of(text) == tokens
        for space in re.finditer(" ", text):
            spaces += 1
            assert tokens_of(text[: space.start()] + text[space.end() :]) != tokens, text
    assert spaces > 50


def test_images_are_black_on_white_and_fit(formulas):
    for text, (_, image) in formulas.items():
        assert image.dtype == np.uint8 and image.shape[0] == 32
        assert image.shape[1] in range(16, 129, 16), text
        assert image.min() < 60 and image.max() == 255 and (image == 255).mean() > 0.5
        ink = np.nonzero(image.min(0) < 255)[0]
        assert ink[0] >= 2 and ink[-1] < image.shape[1] - 1 and image.shape[1] - 1 - ink[-1] < 16 + 4  # no wider


def test_images_tell_formulas_apart_and_share_a_baseline(formulas):
    images = {image.tobytes() + bytes(image.shape) for _, image in formulas.values()}
    assert len(images) >= len(formulas) - 2  # two ways to write one picture are rare
    bottom = {np.nonzero(latex_ocr.render([letter]).min(1) < 128)[0][-1] for letter in "acemnuvx"}
    assert len(bottom) <= 2
    assert latex_ocr.render(["x", "^", "{", "2", "}"]) is not None
    above = np.nonzero(latex_ocr.render(["x", "^", "{", "2", "}"]).min(1) < 128)[0][0]
    below = np.nonzero(latex_ocr.render(["x", "_", "{", "2", "}"]).min(1) < 128)[0][-1]
    assert above < np.nonzero(latex_ocr.render(["x"]).min(1) < 128)[0][0] and below > max(bottom)


def test_what_does_not_fit_has_no_image():
    assert latex_ocr.render(["x", "+"] * 12) is None  # too wide
    tower = ["x"]
    for _ in range(6):
        tower = [r"\frac", "{", *tower, "}", "{", "y", "}"]
    assert latex_ocr.render(tower) is None  # too high


def test_png_is_the_image():
    image = latex_ocr.render(["x", "+", r"\pi"])
    assert (np.asarray(Image.open(io.BytesIO(latex_ocr.png(image)))) == image).all()


# -----------------------------------------------------------------------------
# files: rendered


def test_files_of_rendered_formulas_are_those_that_finetune_vl_reads(tmp_path, capsys):
    splits = write(tmp_path / "out", train_size=12, test_size=5, max_length=6)
    said = capsys.readouterr().out
    assert "{'train': 12, 'test': 5}, 0 dropped" in said and f"--data_path {tmp_path}/out/train.jsonl" in said
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 12, "test": 5}
    names = {"train.jsonl", "test.jsonl"}
    for name, rows in splits.items():
        lines = (tmp_path / "out" / f"{name}.jsonl").read_text("utf-8").splitlines()
        assert [json.loads(line) for line in lines] == rows
        for row in rows:
            messages, images = finetune_vl.to_conversation(row, "unused", tmp_path / "out")
            assert [message["role"] for message in messages] == ["user", "assistant"]
            assert messages[0]["content"] == f"<image>{PROMPT}"
            tokens = messages[1]["content"].split(" ")
            assert 2 <= len(tokens) <= 6 and TOKENS >= set(tokens)
            shown = np.asarray(finetune_vl.open_image(images[0]))
            assert (shown == latex_ocr.render(tokens)).all()
            names.add(row["images"][0])
    assert files_of(tmp_path / "out").keys() == names and len(names) == 19
    assert not list(tmp_path.glob("*.incomplete"))


def answers(rows):
    return [row["messages"][1]["content"] for row in rows]


def test_the_seed_decides_and_train_and_test_are_disjoint(tmp_path):
    flags = {"train_size": 100, "test_size": 60, "max_length": 2}  # so few that independent draws would meet
    first = write(tmp_path / "first", **flags)
    write(tmp_path / "again", **flags)
    assert files_of(tmp_path / "first") == files_of(tmp_path / "again")
    other = write(tmp_path / "other", **flags, seed=1)
    assert answers(other["test"]) != answers(first["test"])
    texts = answers(first["train"]) + answers(first["test"])
    assert len(set(texts)) == 160
    assert set(answers(other["train"])) & set(answers(first["test"]))  # as those of another seed do


def test_another_prompt(tmp_path):
    splits = write(tmp_path / "out", train_size=1, test_size=1, prompt="Lies – vor.")
    assert splits["train"][0]["messages"][0]["content"] == "<image>Lies – vor."


# -----------------------------------------------------------------------------
# files: from a data set


def picture(kind="PNG", size=(20, 10), color=7):
    file = io.BytesIO()
    Image.new("RGB", size, (color, 0, 0)).save(file, kind)
    return {"bytes": file.getvalue(), "path": None}


ROWS = [
    {"image": picture(color=1), "text": " x ^ { 2 } \n"},
    {"image": picture("JPEG", color=2), "text": "\\alpha – \u2028 y"},
    {"image": picture(color=3), "text": "z"},
]
BAD = {
    "no text": {"image": picture(), "text": "  "},
    "null text": {"image": picture(), "text": None},
    "no image": {"image": None, "text": "x"},
    "broken": {"image": {"bytes": b"no image", "path": None}, "text": "x"},
    "empty": {"image": {"bytes": b"", "path": None}, "text": "x"},
    "half": {"image": {"bytes": picture(size=(200, 100))["bytes"][:60], "path": None}, "text": "x"},
    "half a jpeg": {"image": {"bytes": picture("JPEG", (200, 100))["bytes"][:-300], "path": None}, "text": "x"},
}


def to_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pq.write_table(pa.Table.from_pylist(rows, pa.schema({"image": image, "text": pa.string()})), path)
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """datasets keeps a copy of what it reads: not beside that of the user."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def assert_rows(folder, rows, wanted, name="train"):
    for k, (row, want) in enumerate(zip(rows, wanted, strict=True)):
        messages, images = finetune_vl.to_conversation(row, "unused", folder)
        text = want["text"].strip()
        assert messages == [
            {"role": "user", "content": f"<image>{PROMPT}"},
            {"role": "assistant", "content": text},
        ]
        assert Path(images[0]).read_bytes() == want["image"]["bytes"]  # not encoded again
        assert row["images"][0].startswith(f"images/{name}-") and (folder / row["images"][0]).exists(), k


def test_a_parquet_file_becomes_a_split_of_its_name(tmp_path, capsys):
    data = to_parquet(tmp_path / "human.parquet", ROWS)
    splits = write(tmp_path / "out", data_path=str(data))
    assert splits.keys() == {"human"}
    assert_rows(tmp_path / "out", splits["human"], ROWS, "human")
    names = [row["images"][0] for row in splits["human"]]
    assert names == ["images/human-000001.png", "images/human-000002.jpeg", "images/human-000003.png"]
    assert "{'human': 3}, 0 dropped" in capsys.readouterr().out


def test_a_folder_becomes_the_splits_that_datasets_sees(tmp_path):
    for name, rows in (("train", ROWS), ("validation", ROWS[:1]), ("test", ROWS[1:])):
        to_parquet(tmp_path / "data" / f"{name}-00000-of-00001.parquet", rows)
    splits = write(tmp_path / "out", data_path=str(tmp_path / "data"))
    assert splits.keys() == {"train", "validation", "test"}
    for name, rows in (("train", ROWS), ("validation", ROWS[:1]), ("test", ROWS[1:])):
        assert_rows(tmp_path / "out", splits[name], rows, name)


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_row_is_named_or_counted(tmp_path, capsys, bad):
    rows = [*ROWS[:2], BAD[bad], ROWS[2]]
    data = to_parquet(tmp_path / "human.parquet", rows)
    with pytest.raises(ValueError, match=rf"--data_path {data}, human split, row 3: .*--skip_bad_rows leaves it out"):
        write(tmp_path / "out", data_path=str(data))
    assert not (tmp_path / "out").exists()
    splits = write(tmp_path / "out", data_path=str(data), skip_bad_rows=True)
    assert "{'human': 3}, 1 dropped" in capsys.readouterr().out
    assert_rows(tmp_path / "out", splits["human"], ROWS, "human")
    assert not list(tmp_path.glob("*.incomplete"))


def test_only_bad_rows_and_other_columns_are_refused(tmp_path):
    data = to_parquet(tmp_path / "bad.parquet", [BAD["broken"]])
    with pytest.raises(ValueError, match=f"--data_path {data}: no rows in it"):
        write(tmp_path / "out", data_path=str(data), skip_bad_rows=True)
    pq.write_table(pa.table({"picture": [1], "text": ["x"]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"columns \['picture', 'text'\], image and text are needed"):
        write(tmp_path / "out", data_path=str(tmp_path / "other.parquet"))
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="--data_path .*torn.parquet, --subset default: "):
        write(tmp_path / "out", data_path=str(tmp_path / "torn.parquet"))
    assert not (tmp_path / "out").exists()


def test_an_id_of_the_hub_is_asked_for_its_subset(tmp_path, monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        splits = {"train": ROWS, "test": ROWS[:1]}
        made = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
        return datasets.DatasetDict(
            {name: split.cast_column("image", datasets.Image()) for name, split in made.items()}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    splits = write(tmp_path / "out", data_path="linxy/LaTeX_OCR", subset="human_handwrite")
    assert asked == [(("linxy/LaTeX_OCR", "human_handwrite"), {})]
    assert_rows(tmp_path / "out", splits["train"], ROWS)
    assert_rows(tmp_path / "out", splits["test"], ROWS[:1], "test")


def test_what_the_hub_says_is_the_message(tmp_path, monkeypatch):
    def load_dataset(*args, **kwargs):
        raise RuntimeError("BuilderConfig 'fulll' not found")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = "--data_path linxy/LaTeX_OCR, --subset fulll: BuilderConfig 'fulll' not found"
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "out", data_path="linxy/LaTeX_OCR", subset="fulll")
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        write(tmp_path / "out", data_path="nowhere")


def test_an_output_folder_is_kept_unless_told_otherwise(tmp_path):
    flags = {"train_size": 2, "test_size": 1, "max_length": 4}
    write(tmp_path / "out", **flags)
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match=f"--output_dir {tmp_path}/out exists: --overwrite replaces it"):
        write(tmp_path / "out", **flags, seed=1)
    assert files_of(tmp_path) == before
    data = to_parquet(tmp_path / "bad.parquet", [ROWS[0], BAD["broken"]])
    before = files_of(tmp_path / "out")
    with pytest.raises(ValueError, match="row 2"):  # a failed run replaces nothing
        write(tmp_path / "out", data_path=str(data), overwrite=True)
    assert files_of(tmp_path / "out") == before
    splits = write(tmp_path / "out", **flags | {"train_size": 1}, overwrite=True)
    assert len(splits["train"]) == 1 and len(files_of(tmp_path / "out")) == 4
    (tmp_path / "out" / "adapter").mkdir()
    with pytest.raises(ValueError, match="out: --overwrite would delete adapter, not written by this script"):
        write(tmp_path / "out", **flags, overwrite=True)
    assert (tmp_path / "out" / "adapter").exists()
    assert not list(tmp_path.glob("*.incomplete"))


def test_a_folder_of_something_else_is_never_replaced(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="theirs: --overwrite would delete thesis.tex, not written by this script"):
        write(tmp_path / "theirs", train_size=1, test_size=1, overwrite=True)
    assert (tmp_path / "theirs" / "thesis.tex").exists()


@pytest.mark.parametrize("flags", [{"train_size": 0}, {"test_size": 0}, {"max_length": 1}, {"max_length": 17}], ids=str)
def test_sizes_out_of_range_are_refused(tmp_path, flags):
    with pytest.raises(ValueError, match="--train_size and --test_size must be at least 1, --max_length 2 to 16"):
        write(tmp_path / "out", **flags)
    assert not list(tmp_path.iterdir())


def test_the_command_line(tmp_path):
    script = str(ROOT / "data" / "latex_ocr.py")
    flags = ["--train_size", "2", "--test_size", "1", "--output_dir", "out"]
    done = subprocess.run([sys.executable, script, *flags], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Next: python finetune_vl.py --data_path out/train.jsonl" in done.stdout
    assert len(finetune_vl.load_rows(str(tmp_path / "out" / "train.jsonl"))) == 2
