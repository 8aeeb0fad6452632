"""
data/gsm8k.py: its helpers by hand, and whole runs on a few rows written here. No network, no torch.

    .venv/bin/python -m pytest tests/test_gsm8k.py
"""

import importlib.util
import json
import sys
import types
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("gsm8k_data", ROOT / "data" / "gsm8k.py")
gsm8k = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gsm8k)

SUFFIX = ' Let\'s think step by step and output the final answer after "####".'
TRAIN = [
    {"question": "Tom has 6 boxes of 7.\u2028How many?", "answer": "6*7 = <<6*7=42>>42\n#### 42"},
    {"question": "What is the house worth?", "answer": "It is worth $1,234,567.\n#### 1,234,567"},
    {"question": "How cold is it – in °C?", "answer": "3-10 = <<3-10=-7>>-7\n#### -7"},
]
TEST = [{"question": "How much is left?", "answer": "She has $12.50 left.\n#### $12.50"}]
TRUTHS = {"train": ["42", "1234567", "-7"], "test": ["12.50"]}


def write(path, rows):
    """Write raw rows in the form that the suffix of `path` names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    else:
        path.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    return path


def expected(rows, split, suffix=SUFFIX):
    return [
        {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": row["question"] + suffix}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": truth},
            "extra_info": {"split": split, "index": index, "answer": row["answer"], "question": row["question"]},
        }
        for index, (row, truth) in enumerate(zip(rows, TRUTHS[split]))
    ]


def read(path):
    return pq.read_table(path).to_pylist()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else None


def refuse(tmp_path, *parts, **flags):
    """Run, expect a ValueError whose message holds all `parts`, and nothing written; return the message."""
    output = tmp_path / "out"
    before = contents(output)
    with pytest.raises(ValueError) as error:
        gsm8k.write_gsm8k(output_dir=str(output), **{key: str(value) for key, value in flags.items()})
    for part in parts:
        assert part in str(error.value)
    assert contents(output) == before
    return str(error.value)


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the datasets library: what it returns or raises can be set, its calls are recorded."""
    stub = types.ModuleType("datasets")
    stub.calls, stub.result = [], {"train": TRAIN, "test": TEST}

    def load_dataset(*args, **kwargs):
        stub.calls.append((args, kwargs))
        if isinstance(stub.result, Exception):
            raise stub.result
        return stub.result

    stub.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", stub)
    return stub


# -----------------------------------------------------------------------------
# helpers


@pytest.mark.parametrize(
    "answer, solution",
    [
        ("#### 42", "42"),
        ("6*7=42\n#### 42\n", "42"),
        ("#### 1,234,567", "1234567"),
        ("#### -7", "-7"),
        ("#### -1,234.50", "-1234.50"),
        ("#### $1,200", "1200"),
        ("#### -$5", "-5"),
        ("#### $-5", "-5"),
        ("#### .5", ".5"),
        ("#### 18 \r\n", "18"),
        ("#### First step\n6*7\n#### 42", "42"),  # the last marker counts: a heading is none
        ("Then 5 #### 42\nGoodbye", "42"),
    ],
)
def test_extract_solution(answer, solution):
    assert gsm8k.extract_solution(answer) == solution


@pytest.mark.parametrize("answer", ["42", "####42", "### 42", "The answer is 42.", ""])
def test_extract_solution_without_marker(answer):
    with pytest.raises(ValueError, match='does not end in a line like "#### 42"'):
        gsm8k.extract_solution(answer)


@pytest.mark.parametrize("after", ["", "forty", "42.", "42 apples", "1/2", "5%", "--5", "-$-5", ",", "- 5", "4 2", "٤"])
def test_extract_solution_that_is_no_plain_number(after):
    with pytest.raises(ValueError, match="a plain number, as the reward compares text"):
        gsm8k.extract_solution(f"Because.\n#### {after}")


def test_to_row():
    row = dict(TRAIN[1])
    assert gsm8k.to_row(row, "train", 7, SUFFIX[1:]) == {
        "data_source": "openai/gsm8k",
        "prompt": [
            {
                "role": "user",
                "content": "What is the house worth? Let's think step by step and output the final answer "
                'after "####".',
            }
        ],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "1234567"},
        "extra_info": {
            "split": "train",
            "index": 7,
            "answer": "It is worth $1,234,567.\n#### 1,234,567",
            "question": "What is the house worth?",
        },
    }
    assert row == TRAIN[1]  # left as it was
    assert gsm8k.to_row(row, "test", 0, "")["prompt"][0]["content"] == "What is the house worth?"  # no space either


# -----------------------------------------------------------------------------
# runs


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_folder(tmp_path, capsys, suffix):
    write(tmp_path / "raw" / f"train{suffix}", TRAIN)
    write(tmp_path / "raw" / f"test{suffix}", TEST)
    output = tmp_path / "made" / "here"
    gsm8k.write_gsm8k(source=str(tmp_path / "raw"), output_dir=str(output))
    assert sorted(contents(output)) == ["test.parquet", "train.parquet"]
    assert read(output / "train.parquet") == expected(TRAIN, "train")
    assert read(output / "test.parquet") == expected(TEST, "test")
    said = capsys.readouterr().out
    assert f"wrote 3 rows to {output}/train.parquet\nwrote 1 rows to {output}/test.parquet\nNext: " in said


def test_schema(tmp_path):
    gsm8k.write_gsm8k(source=str(write(tmp_path / "x.json", TRAIN)), split="train", output_dir=str(tmp_path))
    schema = pq.read_schema(tmp_path / "train.parquet")
    assert schema.names == ["data_source", "prompt", "ability", "reward_model", "extra_info"]
    assert schema.field("data_source").type == schema.field("ability").type == pa.string()
    message = schema.field("prompt").type.value_type
    assert {field.name: field.type for field in message} == {"role": pa.string(), "content": pa.string()}
    reward = {field.name: field.type for field in schema.field("reward_model").type}
    assert reward == {"style": pa.string(), "ground_truth": pa.string()}
    extra = {field.name: field.type for field in schema.field("extra_info").type}
    assert extra == {"split": pa.string(), "index": pa.int64(), "answer": pa.string(), "question": pa.string()}


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
@pytest.mark.parametrize("split, other", [("train", "test"), ("test", "train")])
def test_file_is_one_split(tmp_path, suffix, split, other):
    path = write(tmp_path / f"rows{suffix}", TRAIN)
    gsm8k.write_gsm8k(source=str(path), split=split, output_dir=str(tmp_path / "out"))
    rows = read(tmp_path / "out" / f"{split}.parquet")
    assert [row["extra_info"]["split"] for row in rows] == [split] * 3
    assert [row["extra_info"]["index"] for row in rows] == [0, 1, 2]
    assert [row["reward_model"]["ground_truth"] for row in rows] == TRUTHS["train"]
    assert not (tmp_path / "out" / f"{other}.parquet").exists()


def test_flags_reach_the_rows(tmp_path):
    path = write(tmp_path / "rows.jsonl", TRAIN)
    gsm8k.write_gsm8k(source=str(path), split="train", output_dir=str(tmp_path), instruction="", max_samples=2)
    assert read(tmp_path / "train.parquet") == expected(TRAIN[:2], "train", "")
    gsm8k.write_gsm8k(source=str(path), split="train", output_dir=str(tmp_path), instruction="Go.", max_samples=9)
    assert read(tmp_path / "train.parquet") == expected(TRAIN, "train", " Go.")


def test_json_lines_in_any_suffix_with_blank_lines_crlf_and_bom(tmp_path):
    text = "\ufeff" + "\r\n\r\n".join(json.dumps(row) for row in TRAIN) + "\r\n"
    (tmp_path / "rows.json").write_bytes(text.encode())
    gsm8k.write_gsm8k(source=str(tmp_path / "rows.json"), split="train", output_dir=str(tmp_path))
    assert read(tmp_path / "train.parquet") == expected(TRAIN, "train")


def test_files_named_as_on_the_hub(tmp_path):
    for split, rows in (("train", TRAIN), ("test", TEST)):
        write(tmp_path / "main" / f"{split}-00000-of-00001.parquet", rows)
    gsm8k.write_gsm8k(source=str(tmp_path / "main"), output_dir=str(tmp_path / "out"))
    assert read(tmp_path / "out" / "train.parquet") == expected(TRAIN, "train")


@pytest.mark.parametrize("config", ["main", "socratic"])
def test_hub(tmp_path, monkeypatch, hub, config):
    monkeypatch.chdir(tmp_path)
    gsm8k.write_gsm8k(config=config)
    assert hub.calls == [(("openai/gsm8k", config), {})]
    assert read(tmp_path / "data/gsm8k/train.parquet") == expected(TRAIN, "train")
    assert read(tmp_path / "data/gsm8k/test.parquet") == expected(TEST, "test")


def test_hub_other_name_one_split(tmp_path, hub):
    hub.result = {"test": TEST}
    gsm8k.write_gsm8k(source="some-one/gsm8k.v2", split="test", output_dir=str(tmp_path))
    assert hub.calls == [(("some-one/gsm8k.v2", "main"), {})]
    assert sorted(contents(tmp_path)) == ["test.parquet"]
    assert read(tmp_path / "test.parquet") == expected(TEST, "test")  # data_source names the reward


def test_local_source_never_asks_the_hub(tmp_path, hub):
    gsm8k.write_gsm8k(source=str(write(tmp_path / "x.json", TEST)), split="test", output_dir=str(tmp_path))
    assert hub.calls == []


def test_command_line(tmp_path, monkeypatch):
    path = write(tmp_path / "x.json", TEST)
    argv = ["gsm8k.py", "--source", str(path), "--split", "test", "--output_dir", str(tmp_path), "--instruction", ""]
    monkeypatch.setattr(sys, "argv", argv)
    gsm8k.run_cli(gsm8k.write_gsm8k)
    assert read(tmp_path / "test.parquet") == expected(TEST, "test", "")
    path.write_text("[\n{}\n]")
    with pytest.raises(SystemExit, match=r'error: .*x\.json, test row 1: no text in field "question" of \{\}'):
        gsm8k.run_cli(gsm8k.write_gsm8k)


# -----------------------------------------------------------------------------
# errors


BAD = [
    ({"answer": "#### 1"}, 'no text in field "question" of {'),
    ({"question": "Why?"}, 'no text in field "answer" of {'),
    ({"question": " ", "answer": "#### 1"}, 'no text in field "question" of {'),
    ({"question": "Why?", "answer": None}, 'no text in field "answer" of {'),
    ({"question": "Why?", "answer": "It is 5."}, "the answer 'It is 5.' does not end in a line like"),
    (
        {"question": "Why?", "answer": "It is\n#### 5 apples"},
        "the answer 'It is\\n#### 5 apples' does not end in a line",
    ),
    (7, 'no text in field "question" of 7'),
]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
@pytest.mark.parametrize("bad, message", BAD)
def test_bad_row(tmp_path, suffix, bad, message):
    if suffix == ".parquet":  # in a table every row has every column
        bad = dict.fromkeys(("question", "answer")) | (bad if isinstance(bad, dict) else {})
        message = message.replace("of 7", "of {")
    path = write(tmp_path / f"rows{suffix}", [TRAIN[0], TRAIN[1], bad])
    refuse(tmp_path, f"{path}, train row 3: {message}", source=path, split="train")


def test_bad_row_of_the_hub(tmp_path, hub):
    hub.result = {"train": TRAIN, "test": [*TEST, {"question": "Why?", "answer": "5"}]}
    refuse(tmp_path, "openai/gsm8k, test row 2: ", "does not end in a line", config="socratic")


def test_a_file_that_cannot_be_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(TRAIN[0]) + '\n{"question": oops}\n')
    refuse(tmp_path, f"{path}, train row 2: Expecting value: line 1 column 14", source=path, split="train")
    path = tmp_path / "rows.json"
    path.write_text(f"[\n{json.dumps(TRAIN[0])},\n{json.dumps(TRAIN[1])[:-5]}\n]")
    refuse(tmp_path, f"{path} cannot be read: Invalid control character at: line 3", source=path, split="train")
    path.write_bytes(b'[\n{"question": "caf\xe9"}]')
    refuse(tmp_path, f"{path} cannot be read: 'utf-8' codec can't decode byte 0xe9", source=path, split="train")
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 but not really")
    refuse(tmp_path, f"{path} cannot be read: ", source=path, split="train")


@pytest.mark.parametrize("name, text", [("a.json", ""), ("a.json", " []\n"), ("a.jsonl", ""), ("a.jsonl", "\n \n")])
def test_empty_file(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    refuse(tmp_path, f"{tmp_path / name}: no rows of the split 'train'", source=tmp_path / name, split="train")


def test_empty_parquet_and_empty_or_missing_hub_split(tmp_path, hub):
    path = write(tmp_path / "a.parquet", TRAIN)
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    refuse(tmp_path, f"{path}: no rows", source=path, split="train")
    hub.result = {"train": TRAIN, "test": []}
    refuse(tmp_path, "openai/gsm8k: no rows of the split 'test'")
    hub.result = {"train": TRAIN, "validation": TEST}
    refuse(tmp_path, "openai/gsm8k: no rows of the split 'test'")


def test_flag_values_that_do_not_fit(tmp_path, hub):
    path = write(tmp_path / "rows.jsonl", TRAIN)
    refuse(tmp_path, "--split 'valid' must be train, test or, for both, empty", source=path, split="valid")
    refuse(tmp_path, "add --split train or --split test", source=path)
    with pytest.raises(ValueError, match="--max_samples -1 must be 0 or more"):
        gsm8k.write_gsm8k(max_samples=-1, output_dir=str(tmp_path / "out"))
    assert hub.calls == []


@pytest.mark.parametrize(
    "source", ["gsm8k", "raw/train.jsonl", "./raw/gsm8k", "/no/such/place", "a/b/c", "~/nowhere", "../gsm8k", "raw/no"]
)
def test_source_that_is_neither_local_nor_a_hub_id(tmp_path, monkeypatch, hub, source):
    (tmp_path / "raw").mkdir()
    monkeypatch.chdir(tmp_path)
    refuse(tmp_path, f"--source {Path(source)} must be a file, a hub id (owner/name) or a folder", source=source)
    assert hub.calls == []


def test_folders_without_exactly_one_file_of_a_split(tmp_path):
    raw = tmp_path / "raw"
    write(raw / "train.jsonl", TRAIN)
    refuse(tmp_path, "one test.json, test.jsonl or test.parquet, and 0 are there", "--split test", source=raw)
    write(raw / "test.jsonl", TEST)
    write(raw / "train.json", TRAIN)
    refuse(tmp_path, "and 2 are there: pass the file itself with --split train", source=raw)
    gsm8k.write_gsm8k(source=str(raw), split="test", output_dir=str(tmp_path / "out"))
    assert sorted(contents(tmp_path / "out")) == ["test.parquet"]


def test_the_source_is_not_replaced(tmp_path):
    write(tmp_path / "out" / "train.parquet", TRAIN)
    write(tmp_path / "out" / "test.parquet", TEST)
    refuse(tmp_path, "would be replaced", source=tmp_path / "out")
    refuse(tmp_path, "would be replaced", source=tmp_path / "out" / "train.parquet", split="train")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    refuse(tmp_path, "would be replaced", source=tmp_path / "link")


def test_hub_that_does_not_answer(tmp_path, hub):
    hub.result = ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub")
    parts = ["--source openai/gsm8k", "Couldn't reach", "hf download openai/gsm8k", "--source DIR/socratic"]
    refuse(tmp_path, *parts, config="socratic")
    hub.result = ValueError("BuilderConfig 'sokratic' not found")
    refuse(tmp_path, "no file or folder", "--config sokratic", "BuilderConfig", source="some/gsm9k", config="sokratic")


# -----------------------------------------------------------------------------
# writing


def test_existing_output_is_kept_upon_error(tmp_path):
    output = tmp_path / "out"
    write(tmp_path / "raw" / "train.jsonl", TRAIN)
    write(tmp_path / "raw" / "test.jsonl", TEST)
    gsm8k.write_gsm8k(source=str(tmp_path / "raw"), output_dir=str(output))
    write(tmp_path / "raw" / "train.jsonl", TRAIN[:1])  # a good split is not written either
    write(tmp_path / "raw" / "test.jsonl", [{"question": "Why?", "answer": "5"}])
    refuse(tmp_path, "test.jsonl, test row 1: ", source=tmp_path / "raw")  # compares the folder before and after
    assert read(output / "train.parquet") == expected(TRAIN, "train")
    assert read(output / "test.parquet") == expected(TEST, "test")


def test_renamed_onto_the_target_once_complete(tmp_path, monkeypatch):
    output = tmp_path / "out"
    write(tmp_path / "raw" / "train.jsonl", TRAIN)
    write(tmp_path / "raw" / "test.jsonl", TEST)
    renamed, replace = [], Path.replace

    def record(source, target):
        assert Path(source).parent == Path(target).parent == output
        assert sorted(contents(output)) == sorted(
            {"train.parquet.incomplete", "test.parquet.incomplete"} ^ set(renamed)
        )
        read(source)  # complete, with its footer
        replace(source, target)
        renamed.extend([Path(source).name, Path(target).name])

    monkeypatch.setattr(Path, "replace", record)
    gsm8k.write_gsm8k(source=str(tmp_path / "raw"), output_dir=str(output))
    assert len(renamed) == 4
    assert sorted(contents(output)) == ["test.parquet", "train.parquet"]


def test_a_disk_that_fills_up_leaves_the_old_files(tmp_path, monkeypatch):
    output = tmp_path / "out"
    write(tmp_path / "raw" / "train.jsonl", TRAIN)
    write(tmp_path / "raw" / "test.jsonl", TEST)
    gsm8k.write_gsm8k(source=str(tmp_path / "raw"), output_dir=str(output))
    before, write_table = contents(output), pq.write_table

    def fail_on_test(table, path):
        write_table(table.slice(0, 1), path)
        if "test" in Path(path).name:
            raise OSError("No space left on device")

    monkeypatch.setattr(gsm8k.pq, "write_table", fail_on_test)
    with pytest.raises(OSError, match="No space left"):
        gsm8k.write_gsm8k(source=str(tmp_path / "raw"), output_dir=str(output))
    assert contents(output) == before


def test_imports_nothing_heavy():
    """Reads the source: the test session may have torch loaded already."""
    imported = [
        line for line in (ROOT / "data" / "gsm8k.py").read_text().split("\n") if line.startswith(("import", "from"))
    ]
    assert not [line for line in imported if line.split()[1] in ("torch", "transformers", "datasets")]
