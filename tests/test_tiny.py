"""
The embedded default: every solution is right by a reading of its question that shares no code with data/tiny.py, the
splits are apart, the committed files are what the script makes, and the pretraining text is right.

    python -m pytest tests/test_tiny.py
"""

import collections
import importlib.util
import itertools
import json
import random
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "data" / "tiny"
SPLITS = ("train", "dev", "test")
spec = importlib.util.spec_from_file_location("tiny", ROOT / "data" / "tiny.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
GAINS = "finds buys wins collects earns gathers gets borrows makes unpacks inherits orders adds picks".split()
LOSSES = "loses sells donates drops lends trades returns discards misplaces wastes mails hides breaks ships".split()


def read(name, folder=FOLDER):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines()]


def answer_by_hand(question):
    """Solve a question by its words."""
    first, *sentences = question.split(". ")
    groups = re.fullmatch(r"\w+ has (\d+) \w+ with (\d+) \w+ in each", first)
    total = int(groups[1]) * int(groups[2]) if groups else int(re.fullmatch(r"\w+ has (\d+) \w+", first)[1])
    for sentence in sentences[:-1]:
        number = int(re.search(r"\d+", sentence)[0])
        if "times as many" in sentence:
            total *= number
        elif "equally among" in sentence:
            assert total % number == 0
            total //= number
        else:
            verb = sentence.split()[2]
            assert (verb in GAINS) != (verb in LOSSES)
            total += number if verb in GAINS else -number
    return total


@pytest.mark.parametrize("name", [*SPLITS, "demonstrations"])
def test_every_solution_is_right(name):
    signs = collections.Counter()
    for row in read(name):
        *lines, last = row["answer"].split("\n")
        result = None
        for line in lines:
            left, sign, right, again = re.fullmatch(r"(\d+)([-+*/])(\d+) = <<\1\2\3=(\d+)>>\4", line).groups()
            assert result is None or int(left) == result
            result = int(again)
            assert result == {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__truediv__}[sign](
                int(left), int(right)
            )
            signs[sign] += 1
        assert last == f"#### {result}" and result == answer_by_hand(row["question"]) and 0 < result < 100
        assert len(lines) == len(re.findall(r"\d+", row["question"])) - 1
    assert len(signs) == 4


def test_the_splits_are_apart_and_the_demonstrations_the_first_of_train():
    questions = {name: {row["question"] for row in read(name)} for name in SPLITS}
    assert {name: len(found) for name, found in questions.items()} == {"train": 2000, "dev": 512, "test": 512}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not questions[one] & questions[other]
    shown = read("demonstrations")
    assert shown == read("train")[: len(shown)] and len(shown) == 32


def test_the_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "model")
    assert all(len(tokenizer(str(n)).input_ids) == 1 for n in range(400))
    assert not tokenizer.chat_template and len(tokenizer) <= 1024
    text = "Ünïcode 好 😀\n\n#### 7"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_calculating_by_hand():
    results = [script.calculate(*of) for of in ((8, "+", 5), (8, "-", 5), (8, "*", 5), (8, "/", 4), (8, "/", 5))]
    assert results == [13, 3, 40, 2, None]
    assert [script.calculate(*of) for of in ((5, "-", 5), (50, "+", 50), (50, "*", 2))] == [None] * 3


def test_the_pretraining_text_is_right_and_has_another_format():
    texts = [script.pretraining_text(random.Random(seed), set()) for seed in range(500)]
    drills = [text for text in texts if text.startswith("#### ")]
    assert 125 < len(drills) < 225
    for text in texts:
        for left, sign, right, result in re.findall(r"(\d+)([-+*/])(\d+)(?: makes |=)(\d+)", text):
            assert script.calculate(int(left), sign, int(right)) == int(result)
        if text not in drills:
            question = re.search(r"[A-Z]\w+ has .*\?", text)[0]
            assert text.endswith(f"Answer: {answer_by_hand(question)}") and "\n#### " not in text
            assert "<<" not in text


def test_no_held_out_problem_is_in_the_pretraining_text():
    for seed in range(20):
        text = script.pretraining_text(random.Random(seed), set())
        for question in re.findall(r"[A-Z]\w+ has .*\?", text):
            assert question not in script.pretraining_text(random.Random(seed), {question})


@pytest.mark.parametrize("name", ["tiny", "tiny_vl"])
def test_a_folder_of_something_else_is_never_replaced(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "data")
    make = getattr(importlib.import_module(name), f"make_{name}")
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is there, and not made by this script: name another folder"):
        make(output_dir=str(tmp_path))
    assert (tmp_path / "thesis.tex").exists()


def test_the_committed_files_are_what_the_script_makes(tmp_path):
    script.make_tiny(output_dir=str(tmp_path / "tiny"), steps=1, batch_size=1)
    for name in [*(f"{split}.jsonl" for split in SPLITS), "demonstrations.jsonl", "model/tokenizer.json"]:
        assert (tmp_path / "tiny" / name).read_bytes() == (FOLDER / name).read_bytes(), name
    assert (tmp_path / "tiny/model/config.json").read_text() == (FOLDER / "model/config.json").read_text()
    sizes = [(folder / "model/model.safetensors").stat().st_size for folder in (tmp_path / "tiny", FOLDER)]
    assert sizes[0] == sizes[1] < 2_000_000
