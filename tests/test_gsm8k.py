"""data/gsm8k.py: its helpers by hand, and whole runs on a few rows written here. No network, no torch."""

import importlib.util
import json
import os
import sys
import types
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("prepare_gsm8k", ROOT / "data" / "gsm8k.py")
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


def expected(rows, split, suffix=SUFFIX, data_source="openai/gsm8k"):
    return [
        {
            "data_source": data_source,
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
        gsm8k.prepare(output_dir=str(output), **{key: str(value) for key, value in flags.items()})
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
    with pytest.raises(ValueError, match='no "#### " in the answer'):
        gsm8k.extract_solution(answer)


@pytest.mark.parametrize("after", ["", "forty", "42.", "42 apples", "1/2", "5%", "--5", "-$-5", ",", "- 5", "4 2", "٤"])
def test_extract_solution_that_is_no_plain_number(after):
    with pytest.raises(ValueError, match="not a plain number"):
        gsm8k.extract_solution(f"Because.\n#### {after}")


def test_to_row():
    row = dict(TRAIN[1])
    assert gsm8k.to_row(row, "train", 7) == {
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
    other = gsm8k.to_row(row, "test", 0, data_source="mine", instruction="")
    assert other["data_source"] == "mine"
    assert other["prompt"][0]["content"] == "What is the house worth?"  # no space either


# -----------------------------------------------------------------------------
# runs


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_folder(tmp_path, capsys, suffix):
    write(tmp_path / "raw" / f"train{suffix}", TRAIN)
    write(tmp_path / "raw" / f"test{suffix}", TEST)
    output = tmp_path / "made" / "here"
    gsm8k.prepare(source=str(tmp_path / "raw"), output_dir=str(output))
    assert sorted(contents(output)) == ["test.parquet", "train.parquet"]
    assert read(output / "train.parquet") == expected(TRAIN, "train")
    assert read(output / "test.parquet") == expected(TEST, "test")
    said = capsys.readouterr().out
    assert "3 rows" in said and "1 rows" in said and str(output / "train.parquet") in said and "Next: " in said


def test_schema(tmp_path):
    gsm8k.prepare(source=str(write(tmp_path / "x.json", TRAIN)), split="train", output_dir=str(tmp_path))
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
    gsm8k.prepare(source=str(path), split=split, output_dir=str(tmp_path / "out"))
    rows = read(tmp_path / "out" / f"{split}.parquet")
    assert [row["extra_info"]["split"] for row in rows] == [split] * 3
    assert [row["extra_info"]["index"] for row in rows] == [0, 1, 2]
    assert [row["reward_model"]["ground_truth"] for row in rows] == TRUTHS["train"]
    assert not (tmp_path / "out" / f"{other}.parquet").exists()


def test_flags_reach_the_rows(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", TRAIN)
    gsm8k.prepare(
        source=str(path), split="train", output_dir=str(tmp_path), instruction="", data_source="my/own", max_samples=2
    )
    assert read(tmp_path / "train.parquet") == expected(TRAIN[:2], "train", "", "my/own")
    assert "2 rows of 3" in capsys.readouterr().out
    gsm8k.prepare(source=str(path), split="train", output_dir=str(tmp_path), instruction="Go.")
    assert read(tmp_path / "train.parquet") == expected(TRAIN, "train", " Go.")


def test_json_lines_in_any_suffix_with_blank_lines_crlf_and_bom(tmp_path):
    text = "\ufeff" + "\r\n\r\n".join(json.dumps(row) for row in TRAIN) + "\r\n"
    (tmp_path / "rows.json").write_bytes(text.encode())
    gsm8k.prepare(source=str(tmp_path / "rows.json"), split="train", output_dir=str(tmp_path))
    assert read(tmp_path / "train.parquet") == expected(TRAIN, "train")


def test_files_named_as_on_the_hub(tmp_path):
    for split, rows in (("train", TRAIN), ("test", TEST)):
        write(tmp_path / "main" / f"{split}-00000-of-00001.parquet", rows)
    gsm8k.prepare(source=str(tmp_path / "main"), output_dir=str(tmp_path / "out"))
    assert read(tmp_path / "out" / "train.parquet") == expected(TRAIN, "train")


def test_twice_into_the_folder_of_the_source(tmp_path):
    write(tmp_path / "train.jsonl", TRAIN)
    write(tmp_path / "test.jsonl", TEST)
    for _ in range(2):
        gsm8k.prepare(source=str(tmp_path), output_dir=str(tmp_path))
        assert read(tmp_path / "train.parquet") == expected(TRAIN, "train")


@pytest.mark.parametrize("config", ["main", "socratic"])
def test_hub(tmp_path, monkeypatch, hub, config):
    monkeypatch.chdir(tmp_path)
    gsm8k.prepare(config=config)
    assert hub.calls == [(("openai/gsm8k", config), {})]
    assert read(tmp_path / "data/gsm8k/train.parquet") == expected(TRAIN, "train")
    assert read(tmp_path / "data/gsm8k/test.parquet") == expected(TEST, "test")


def test_hub_other_name_one_split(tmp_path, hub):
    hub.result = {"test": TEST}
    gsm8k.prepare(source="some-one/gsm8k.v2", split="test", output_dir=str(tmp_path))
    assert hub.calls == [(("some-one/gsm8k.v2", "main"), {})]
    assert sorted(contents(tmp_path)) == ["test.parquet"]
    assert read(tmp_path / "test.parquet") == expected(TEST, "test")  # data_source is a flag of its own


def test_local_source_never_asks_the_hub(tmp_path, hub):
    gsm8k.prepare(source=str(write(tmp_path / "x.json", TEST)), split="test", output_dir=str(tmp_path))
    assert hub.calls == []


def test_command_line(tmp_path, monkeypatch):
    path = write(tmp_path / "x.json", TEST)
    argv = ["gsm8k.py", "--source", str(path), "--split", "test", "--output_dir", str(tmp_path), "--instruction", ""]
    monkeypatch.setattr(sys, "argv", argv)
    gsm8k.run_cli(gsm8k.prepare)
    assert read(tmp_path / "test.parquet") == expected(TEST, "test", "")
    path.write_text("[\n{}\n]")
    with pytest.raises(SystemExit, match=r'error: .*x\.json:2: the row has no "question"'):
        gsm8k.run_cli(gsm8k.prepare)


# -----------------------------------------------------------------------------
# errors


BAD = [
    ({"answer": "#### 1"}, ['no "question"', "['answer']"]),
    ({"question": "Why?"}, ['no "answer"', "['question']"]),
    ({"question": " ", "answer": "#### 1"}, ["\"question\" is ' '"]),
    ({"question": "Why?", "answer": None}, ['"answer" is None']),
    ({"question": "Why?", "answer": "It is 5."}, ['no "#### "', "'It is 5.'"]),
    ({"question": "Why?", "answer": "It is\n#### 5 apples"}, ["'5 apples'", "not a plain number"]),
]


@pytest.mark.parametrize("bad, parts", BAD)
def test_bad_row(tmp_path, bad, parts):
    lines = [json.dumps(TRAIN[0]), "", json.dumps(TRAIN[1]), json.dumps(bad)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    refuse(tmp_path, f"{path}:4: ", *parts, source=path, split="train")

    # a list, with rows over several lines and two on one line; \n inside a string is no line of the file
    path = tmp_path / "rows.json"
    first, second, bad_text = (json.dumps(row, indent=1) for row in (TRAIN[0], TRAIN[1], bad))
    path.write_text(f"\n[\n\n{first},{second}\n\n,\n {bad_text}\n]\n")
    refuse(tmp_path, f"{path}:13: ", *parts, source=path, split="train")

    path = tmp_path / "rows.parquet"
    if len(bad) == 2:  # in a table, every row has every column
        write(path, [TRAIN[0], bad])
        refuse(tmp_path, f"{path}, row 1 (from 0): ", *parts, source=path, split="train")
    else:
        write(path, [bad, bad])
        refuse(tmp_path, f"{path}, row 0 (from 0): ", *parts, source=path, split="train")


def test_bad_row_of_the_hub(tmp_path, hub):
    hub.result = {"train": TRAIN, "test": [*TEST, {"question": "Why?", "answer": "5"}]}
    refuse(tmp_path, "openai/gsm8k (socratic), test row 1 (from 0): ", 'no "#### "', config="socratic")


def test_a_row_that_is_no_object(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[\n"one",\n"two"]')
    refuse(tmp_path, f"{path}:2: 'one' is not a row", source=path, split="train")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(TEST[0]) + "\n7\n")
    refuse(tmp_path, f"{path}:2: 7 is not a row", source=path, split="train")


def test_invalid_json(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(TRAIN[0]) + '\n{"question": oops}\n')
    refuse(tmp_path, f"{path}:2: invalid JSON", "column 14", "oops", "one a line", source=path, split="train")
    path = tmp_path / "rows.json"
    path.write_text(f"[\n{json.dumps(TRAIN[0])},\n{json.dumps(TRAIN[1])[:-5]}\n]")
    refuse(tmp_path, f"{path}:3: invalid JSON", source=path, split="train")
    path.write_bytes(b'[\n{"question": "caf\xe9"}]')
    refuse(tmp_path, f"{path}:2: byte 0xe9 is not UTF-8", source=path, split="train")
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 but not really")
    refuse(tmp_path, f"{path}: cannot be read as parquet", source=path, split="train")


@pytest.mark.parametrize("name, text", [("a.json", ""), ("a.json", " []\n"), ("a.jsonl", ""), ("a.jsonl", "\n \n")])
def test_empty_file(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    refuse(tmp_path, f"{tmp_path / name}: no rows", source=tmp_path / name, split="train")


def test_empty_parquet_and_empty_hub_split(tmp_path, hub):
    path = write(tmp_path / "a.parquet", TRAIN)
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    refuse(tmp_path, f"{path}: no rows", source=path, split="train")
    hub.result = {"train": TRAIN, "test": []}
    refuse(tmp_path, "openai/gsm8k (main), test: no rows")


def test_unknown_flag_values(tmp_path, hub):
    path = write(tmp_path / "rows.jsonl", TRAIN)
    refuse(tmp_path, "--split 'valid'", "train, test", source=path, split="valid")
    refuse(tmp_path, "--config 'sokratic'", "main or socratic", config="sokratic")
    refuse(tmp_path, "add --split train or --split test", source=path)
    refuse(tmp_path, "--data_source is empty", data_source="")
    with pytest.raises(ValueError, match="--max_samples -1"):
        gsm8k.prepare(max_samples=-1, output_dir=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="is a file: pass a folder"):
        gsm8k.prepare(source=str(path), split="train", output_dir=str(path))
    assert hub.calls == []


@pytest.mark.parametrize("source", ["gsm8k", "raw/train.jsonl", "./raw/gsm8k", "/no/such/place", "a/b/c", "~/nowhere"])
def test_source_that_is_neither_local_nor_a_hub_id(tmp_path, hub, source):
    refuse(tmp_path, repr(source), "no such file or folder", "owner/name", source=source)
    assert hub.calls == []


def test_local_files_that_do_not_fit(tmp_path):
    (tmp_path / "rows.csv").write_text("question,answer\n")
    refuse(tmp_path, "'.csv'", ".json, .jsonl, .parquet", source=tmp_path / "rows.csv", split="train")
    raw = tmp_path / "raw"
    write(raw / "train.jsonl", TRAIN)
    refuse(tmp_path, "no test.json, .jsonl or .parquet", "--split", source=raw)
    write(raw / "test.jsonl", TEST)
    write(raw / "train.json", TRAIN)
    refuse(tmp_path, "train.json and train.jsonl", "pass the file itself", source=raw)
    gsm8k.prepare(source=str(raw), split="test", output_dir=str(tmp_path / "out"))
    assert sorted(contents(tmp_path / "out")) == ["test.parquet"]


def test_the_source_is_not_replaced(tmp_path):
    write(tmp_path / "out" / "train.parquet", TRAIN)
    write(tmp_path / "out" / "test.parquet", TEST)
    refuse(tmp_path, "would be replaced", source=tmp_path / "out")
    refuse(tmp_path, "would be replaced", source=tmp_path / "out" / "train.parquet", split="train")


def test_hub_that_does_not_answer(tmp_path, hub):
    hub.result = ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub")
    parts = [
        "--source openai/gsm8k",
        "ConnectionError: Couldn't reach",
        "hf download openai/gsm8k",
        "--source DIR/socratic",
    ]
    refuse(tmp_path, *parts, config="socratic")
    hub.result = ValueError("BuilderConfig 'main' not found")
    refuse(tmp_path, "no such file or folder", "--config main", "BuilderConfig", source="data/gsm9k")
    hub.result = {"train": TRAIN, "validation": TEST}
    refuse(tmp_path, "no split 'test'", "train, validation")


# -----------------------------------------------------------------------------
# writing


def test_existing_output_is_kept_upon_error(tmp_path):
    output = tmp_path / "out"
    write(tmp_path / "raw" / "train.jsonl", TRAIN)
    write(tmp_path / "raw" / "test.jsonl", TEST)
    gsm8k.prepare(source=str(tmp_path / "raw"), output_dir=str(output))
    write(tmp_path / "raw" / "train.jsonl", TRAIN[:1])  # a good split is not written either
    write(tmp_path / "raw" / "test.jsonl", [{"question": "Why?", "answer": "5"}])
    refuse(tmp_path, "test.jsonl:1: ", source=tmp_path / "raw")  # compares the folder before and after
    assert read(output / "train.parquet") == expected(TRAIN, "train")
    assert read(output / "test.parquet") == expected(TEST, "test")


def test_renamed_onto_the_target_once_complete(tmp_path, monkeypatch):
    output = tmp_path / "out"
    write(tmp_path / "raw" / "train.jsonl", TRAIN)
    write(tmp_path / "raw" / "test.jsonl", TEST)
    renamed, replace = [], os.replace

    def record(source, target):
        assert Path(source).parent == Path(target).parent == output
        assert sorted(contents(output)) == sorted(
            {"train.parquet.incomplete", "test.parquet.incomplete"} ^ set(renamed)
        )
        read(source)  # complete, with its footer
        replace(source, target)
        renamed.extend([Path(source).name, Path(target).name])

    monkeypatch.setattr(gsm8k.os, "replace", record)
    gsm8k.prepare(source=str(tmp_path / "raw"), output_dir=str(output))
    assert len(renamed) == 4
    assert sorted(contents(output)) == ["test.parquet", "train.parquet"]


def test_a_disk_that_fills_up_leaves_the_old_files(tmp_path, monkeypatch):
    output = tmp_path / "out"
    write(tmp_path / "raw" / "train.jsonl", TRAIN)
    write(tmp_path / "raw" / "test.jsonl", TEST)
    gsm8k.prepare(source=str(tmp_path / "raw"), output_dir=str(output))
    before, write_table = contents(output), pq.write_table

    def fail_on_test(table, path):
        write_table(table.slice(0, 1), path)
        if "test" in path.name:
            raise OSError("No space left on device")

    monkeypatch.setattr(gsm8k.pq, "write_table", fail_on_test)
    with pytest.raises(OSError, match="No space left"):
        gsm8k.prepare(source=str(tmp_path / "raw"), output_dir=str(output))
    assert contents(output) == before


def test_imports_nothing_heavy():
    """Reads the source: the test session may have torch loaded already."""
    imported = [
        line for line in (ROOT / "data" / "gsm8k.py").read_text().split("\n") if line.startswith(("import", "from"))
    ]
    assert not [line for line in imported if line.split()[1] in ("torch", "transformers", "datasets")]
