"""
data/prepare.py: every kind of source and form to conversations, what is refused, and what is written.

    .venv/bin/python -m pytest tests/test_prepare.py

No network, no torch: the hub is a stand-in, and templates are rendered with jinja2 alone.
"""

import ast
import importlib.util
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import jinja2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("prepare_data", ROOT / "data" / "prepare.py")
prepare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare)

ROWS = [{"instruction": "Ask – 1", "output": "A\n1"}, {"instruction": "Ask, 2", "output": '"\u2028"'}]
QUESTION = {"question": "q", "answer": "a"}


def talk(*turns, system=None):
    """Return a conversation: user, assistant, user, ..."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    return messages + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def write(path, content):
    """Write text, bytes or rows, in the form that the suffix of `path` names; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_bytes(content.encode())
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(content), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content), encoding="utf-8")
    else:
        path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Run in an empty folder, so that relative paths and hub ids mean nothing local."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


@pytest.fixture(autouse=True)
def hub(monkeypatch):
    """A stand-in for the datasets library: what it gives can be set, its calls are recorded."""
    stub = types.ModuleType("datasets")
    stub.calls, stub.result = [], [QUESTION]

    def load_dataset(*args, **kwargs):
        stub.calls.append((args, kwargs))
        if isinstance(stub.result, Exception):
            raise stub.result
        return stub.result

    stub.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", stub)
    return stub


def read(path):
    """Return the conversations in a file that prepare wrote."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    rows = [json.loads(line) for line in lines]
    assert all(list(row) == ["messages"] for row in rows)
    return [row["messages"] for row in rows]


def load(path="", **flags):
    """Return the conversations that prepare makes of a source."""
    prepare.prepare(data_path=str(path), output_path="made.jsonl", overwrite=True, **flags)
    return read("made.jsonl")


def said(path="", **flags):
    """Return the message with which prepare refuses a source, having written nothing."""
    Path("made.jsonl").unlink(missing_ok=True)
    with pytest.raises(ValueError) as error:
        load(path, **flags)
    assert list(Path().iterdir()) == []
    return str(error.value)


# -----------------------------------------------------------------------------
# reading


@pytest.mark.parametrize(
    "name, content",
    [
        ("rows.json", ROWS),
        ("rows.jsonl", ROWS),
        ("rows.parquet", ROWS),
        ("rows.csv", 'instruction,output\nAsk – 1,"A\n1"\n"Ask, 2","""\u2028"""\n'),
        ("windows.jsonl", "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\r\n"),
        ("windows.csv", 'instruction,output\r\nAsk – 1,"A\n1"\r\n"Ask, 2","""\u2028"""\r\n'),
        ("mac.csv", 'instruction,output\rAsk – 1,"A\n1"\r"Ask, 2","""\u2028"""\r'),
    ],
)
def test_every_kind_of_file_gives_the_same_conversations(tmp_path, name, content):
    expected = [talk("Ask – 1", "A\n1"), talk("Ask, 2", '"\u2028"')]
    assert load(write(tmp_path / name, content)) == expected


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_texts_stay_what_they_are(tmp_path, suffix):
    texts = ["007", "NA", "2024-01-31", "1e5", "true", "null", "", "N/A", " two ", "a\r\nb", "C:\\new"]
    rows = [{"question": text, "answer": "a"} for text in texts]
    if suffix == ".csv":
        rows = "question,answer\n" + "".join(f'"{text}",a\n' for text in texts)
    assert [messages[0]["content"] for messages in load(write(tmp_path / f"a{suffix}", rows))] == texts


def test_a_folder_is_its_train_files_or_all_files_in_order(tmp_path, capsys):
    row = lambda text: [{"question": text, "answer": text}]
    data = tmp_path / "data"
    write(data / "train-00001.jsonl", row("b"))
    write(data / "train-00000.parquet", row("a"))
    write(data / "deeper" / "train.csv", "question,answer\nd,d\n")
    write(data / "test.jsonl", row("c"))
    write(data / "notes.txt", "no data")
    asked = lambda **flags: [messages[0]["content"] for messages in load(data, **flags)]
    assert asked() == ["d", "a", "b"]
    printed = capsys.readouterr().out
    for name in ("deeper/train.csv", "train-00000.parquet", "train-00001.jsonl"):
        assert f"read 1 rows of {data}/{name}\n" in printed
    assert asked(split="test") == ["c"]
    assert asked(split="other") == ["d", "c", "a", "b"]
    assert load(f"{data}/") == load(data)


@pytest.mark.parametrize("train, test", [("train/0.jsonl", "test/0.jsonl"), ("gsm_train.jsonl", "gsm_test.jsonl")])
def test_the_split_in_a_folders_or_files_name_is_seen(tmp_path, train, test):
    write(tmp_path / "data" / train, ROWS[:1])
    write(tmp_path / "data" / test, ROWS[1:])
    assert load(tmp_path / "data") == [talk("Ask – 1", "A\n1")]


def test_a_split_is_a_whole_word_of_the_name(tmp_path):
    write(tmp_path / "data" / "retrained.jsonl", ROWS)
    write(tmp_path / "data" / "train.jsonl", ROWS[:1])
    assert len(load(tmp_path / "data")) == 1


def test_hidden_folders_are_no_data(tmp_path):
    write(tmp_path / "data" / "train.jsonl", ROWS)
    write(tmp_path / "data" / ".ipynb_checkpoints" / "train-checkpoint.jsonl", ROWS)
    write(tmp_path / "data" / "._train.jsonl", "what some systems leave behind")
    assert len(load(tmp_path / "data")) == len(ROWS)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", "", "a.jsonl: no rows in it"),
        ("a.jsonl", "\n \n", "a.jsonl: no rows in it"),
        ("a.json", "[]", "a.json: no rows in it"),
        ("a.csv", "question,answer\n", "a.csv: no rows in it"),
        ("a.csv", "", "a.csv: no rows in it"),
        ("a.json", "", "a.json cannot be read as .json: Expecting value: line 1 column 1"),
        (
            "a.json",
            '[\n {"a": 1},\n {"a" 2}]',
            "a.json cannot be read as .json: Expecting ':' delimiter: line 3 column 7",
        ),
        ("a.json", '{"a": 1}\n{"a": 2}\n', "a.json cannot be read as .json: Extra data: line 2 column 1"),
        ("a.jsonl", '{"question": "é"}'.encode("latin-1"), "a.jsonl cannot be read as .jsonl: 'utf-8' codec"),
        ("a.json", "null", "a.json: no rows in it"),
        ("a.csv", 'question,answer\nq,"a\nq,a\n', "a.csv cannot be read as .csv: unexpected end of data"),
        ("a.csv", "question\né".encode("utf-16"), "a.csv cannot be read as .csv: 'utf-8' codec"),
        ("a.parquet", b"PAR1 and then nothing of the kind", "a.parquet cannot be read as .parquet: "),
        ("a.txt", "text", "a.txt is no data file (.json, .jsonl, .csv, .parquet), no folder of them, and no hub id"),
        ("a.jsonl.gz", b"\x1f\x8b", "a.jsonl.gz is no data file"),
    ],
)
@pytest.mark.parametrize("skip", [False, True])
def test_unreadable_files_say_where(tmp_path, name, content, message, skip):
    assert said(write(tmp_path / name, content), skip_bad_rows=skip).startswith(f"{tmp_path}/{message}")


def test_a_folder_without_data(tmp_path):
    write(tmp_path / "data" / "notes.txt", "no data")
    assert said(tmp_path / "data").startswith(f"{tmp_path}/data is no data file")


@pytest.mark.parametrize(
    "source, message",
    [
        ("nowhere", "nowhere is no data file (.json, .jsonl, .csv, .parquet), no folder of them, and no hub id"),
        ("a/b/c", "a/b/c is no data file"),
        ("folder/file.json", "folder/file.json cannot be read as .json: [Errno 2] No such file or directory"),
        ("./name", "./name is no data file"),
        ("../name", "../name is no data file"),
        ("here/nothing", "here/nothing is no data file"),
    ],
)
def test_a_mistyped_path_never_asks_the_hub(hub, monkeypatch, tmp_path, source, message):
    (tmp_path / "elsewhere" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=re.escape(message)):
        prepare.prepare(data_path=source)
    assert hub.calls == []


def test_a_local_name_goes_before_the_hub(hub):
    write(Path("owner/name/train.jsonl"), [QUESTION])
    assert load("owner/name") == [talk("q", "a")]
    assert hub.calls == []


def test_the_hub(hub, capsys):
    assert load("owner/name-1.5") == [talk("q", "a")]
    assert load("owner/name", split="test[:1]", subset="main") == [talk("q", "a")]
    assert hub.calls == [
        (("owner/name-1.5", None), {"split": "train"}),
        (("owner/name", "main"), {"split": "test[:1]"}),
    ]
    assert "read 1 rows of owner/name (test[:1])\n" in capsys.readouterr().out
    hub.result = [QUESTION, {"question": "q", "answer": None}]
    assert said("owner/name").startswith("owner/name (train), row 2: no str in field 'answer': it is None")
    hub.result = []
    assert said("owner/name") == "owner/name (train): no rows in it"


def test_a_hub_that_does_not_answer_is_asked_once(hub):
    hub.result = ConnectionError("Couldn't reach 'owner/gone' on the Hub")
    message = said("owner/gone")
    assert message.startswith(
        "owner/gone is no local file or folder, and the hub could not give its split 'train': Could"
    )
    assert "hf download owner/gone --repo-type dataset" in message
    assert len(hub.calls) == 1


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.json", '[{"question": "q", "answer": "a"}]'),
        ("a.jsonl", '{"question": "q", "answer": "a"}\n'),
        ("a.csv", "question,answer\nq,a\n"),
    ],
)
def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path, name, text):
    assert load(write(tmp_path / name, b"\xef\xbb\xbf" + text.encode())) == [talk("q", "a")]


def test_csv_fields_may_be_long(tmp_path):
    assert load(write(tmp_path / "a.csv", "question,answer\nq," + "a" * 140_000 + "\n")) == [talk("q", "a" * 140_000)]


# -----------------------------------------------------------------------------
# bad rows

BAD = [
    (
        "a.jsonl",
        '\n{"question": "q", "answer": "a"}\n\n{"question": "q"}\n',
        "row 2: no str in field 'answer': it is None",
    ),
    ("a.jsonl", '{"question": "q", "answer": 7}\n', "row 1: no str in field 'answer': it is 7"),
    ("a.jsonl", '{"question": "q", "answer": null}\n', "row 1: no str in field 'answer': it is None"),
    ("a.jsonl", '{"question": "", "answer": []}\n', "row 1: no str in field 'answer': it is []"),
    ("a.jsonl", '{"instruction": null, "output": "a"}\n', "row 1: no str in field 'instruction': it is None"),
    ("a.jsonl", '{"instruction": "q", "output": ["a"]}', "row 1: no str in field 'output': it is ['a']"),
    ("a.jsonl", '{"instruction": "q", "response": "a"}', "'output': it is None; there are instruction, response"),
    ("a.jsonl", '{"instruction": "q", "input": 1, "output": "a"}', "row 1: no str in field 'input': it is 1"),
    ("a.jsonl", '{"instruction": "q", "input": 0, "output": "a"}', "row 1: no str in field 'input': it is 0"),
    ("a.jsonl", '{"instruction": "q", "system": [], "output": "a"}', "row 1: no str in field 'system': it is []"),
    ("a.jsonl", '{"instruction": "q", "output": "a", "history": [["q"]]}', "row 1: field 'history' must list pairs"),
    ("a.jsonl", '{"instruction": "q", "output": "a", "history": [["q", 1]]}', "row 1: field 'history' must list pairs"),
    ("a.jsonl", '{"instruction": "q", "output": "a", "history": ["qa"]}', "row 1: field 'history' must list pairs"),
    ("a.jsonl", '{"instruction": "q", "output": "a", "history": 5}', "row 1: no list in field 'history': it is 5"),
    ("a.jsonl", '{"text": "q"}', "row 1: fields text: no form of data/README.md"),
    ("a.jsonl", '{"prompt": "q", "completion": "a"}', "row 1: fields prompt, completion: no form of data/README.md"),
    ("a.jsonl", "{}", "row 1: fields : no form of data/README.md"),
    ("a.jsonl", '{"messages": "q"}', "row 1: no list in field 'messages'"),
    ("a.jsonl", '{"messages": []}', "row 1: a conversation begins with the user's message and ends in an answer"),
    ("a.jsonl", '{"messages": [null]}', "row 1: a message must be an object with a role and a text, not None"),
    ("a.jsonl", '{"messages": ["user"]}', "row 1: a message must be an object with a role and a text, not 'user'"),
    ("a.jsonl", '{"messages": [{"role": ["user"], "content": "q"}]}', "row 1: no str in field 'role': it is ['user']"),
    ("a.jsonl", '{"messages": [{"content": "q"}]}', "row 1: no str in field 'role': it is None"),
    ("a.jsonl", '{"messages": [{"role": "bot", "content": "a"}]}', "row 1: 'bot' is none of the roles system"),
    ("a.jsonl", '{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', "row 1: no str in field 'content'"),
    ("a.jsonl", '{"conversations": [{"from": "human", "value": null}]}', "row 1: no str in field 'value': it is None"),
    ("a.jsonl", '{"messages": [{"role": "user", "content": "q"}]}', "row 1: a conversation begins with"),
    ("a.jsonl", '{"messages": [{"role": "system", "content": "S"}]}', "row 1: a conversation begins with"),
    ("a.jsonl", '{"conversations": [{"from": "gpt", "value": "Hello!"}]}', "row 1: a conversation begins with"),
    ("a.jsonl", '{"prompt": "q", "extra_info": {"answer": "a"}}', "row 1: no list in field 'prompt': it is 'q'"),
    ("a.jsonl", '{"prompt": [{"content": "q"}], "extra_info": {"answer": "a"}}', "row 1: no str in field 'role'"),
    ("a.jsonl", '{"prompt": [{"role": "user", "content": "q"}], "extra_info": null}', "no dict in field 'extra_info'"),
    ("a.jsonl", '{"prompt": [{"role": "user", "content": "q"}], "extra_info": {}}', "row 1: no str in field 'answer'"),
    ("a.jsonl", '{"question": "q \\ud83d", "answer": "a"}', "row 1: 'utf-8' codec can't encode character '\\ud83d'"),
    ("a.jsonl", '{"a": 1}\n\n["b"]\n', "row 1: fields a: no form"),
    ("a.jsonl", '["b"]\n', "row 1: no object with named fields, or more cells than the header has names for: ['b']"),
    (
        "a.jsonl",
        '{"question": "q", "answer": "a"}\n\n{"a": }\n',
        "row 2: no object with named fields, or more cells than the header has names for: "
        "'line 3 is not valid JSON: Expecting value (column 7)'",
    ),
    ("a.json", '[{"question": "q", "answer": "a"}, 7]', "row 2: no object with named fields"),
    ("a.csv", 'question,answer\n"q\n1",a\n\nq\n', "row 2: no str in field 'answer': it is None"),
    (
        "a.csv",
        "question,answer\nq,a\nq,a, and more\n",
        "row 2: no object with named fields, or more cells than the header",
    ),
    ("a.parquet", [QUESTION, {"question": "q", "answer": None}], "row 2: no str in field 'answer'"),
]


@pytest.mark.parametrize("name, content, message", BAD)
def test_a_bad_row_stops_with_its_file_number_and_reason(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    text = said(path)
    assert (
        text.startswith(f"{path}, row ") and message in text and text.endswith("; --skip_bad_rows leaves such rows out")
    )


@pytest.mark.parametrize("name, content, message", BAD)
def test_bad_rows_can_be_left_out(tmp_path, capsys, name, content, message):
    write(tmp_path / "data" / name, content)
    write(tmp_path / "data" / "z.jsonl", [{"question": "last", "answer": "a"}])
    conversations = load(tmp_path / "data", skip_bad_rows=True)
    assert conversations[-1] == talk("last", "a") and all(messages[-1]["content"] == "a" for messages in conversations)
    printed = capsys.readouterr().out
    assert message in printed and re.search(f"{len(conversations)} conversations, [12] bad rows left out", printed)


def test_the_first_few_bad_rows_are_named(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [{"question": "q"}] * 5 + [QUESTION] + [{"question": 7, "answer": "a"}])
    assert load(path, skip_bad_rows=True) == [talk("q", "a")]
    printed = capsys.readouterr().out
    assert [f"{path}, row {n}: " in printed for n in range(1, 8)] == [True] * 3 + [False] * 4
    assert "1 conversations, 6 bad rows left out" in printed


def test_an_empty_result_is_not_written(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "q"}])
    assert said(path, skip_bad_rows=True) == "no row is left to write"


def test_calls_that_are_no_text_are_not_dropped(tmp_path):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    row = {"messages": [{"role": "user", "content": "q"}, call]}
    assert "a message must be an object with a role and a text" in said(write(tmp_path / "a.jsonl", [row]))
    row["messages"][1] = {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": "{}"}}
    assert "a message must be an object with a role and a text" in said(write(tmp_path / "a.jsonl", [row]))
    row["messages"][1] = call | {"tool_calls": None}
    assert load(write(tmp_path / "a.jsonl", [row])) == [talk("q", "")]


# -----------------------------------------------------------------------------
# forms

SHAREGPT = [
    {"from": "system", "value": "S"},
    {"from": "human", "value": "q"},
    {"from": "function_call", "value": "f()"},
    {"from": "observation", "value": "7"},
    {"from": "gpt", "value": "a"},
]
OPENAI = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "q"},
    {"role": "function_call", "content": "f()"},
    {"role": "tool", "content": "7"},
    {"role": "assistant", "content": "a"},
]
TOOLS = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "f()"},
    {"role": "tool", "content": "7"},
    {"role": "assistant", "content": "a"},
]
FORMS = {
    "alpaca": ({"instruction": "q", "output": "a"}, talk("q", "a")),
    "alpaca empty input": ({"instruction": "q", "input": "", "output": "a"}, talk("q", "a")),
    "alpaca null input": ({"instruction": "q", "input": None, "output": ""}, talk("q", "")),
    "alpaca input": ({"instruction": "q", "input": "x", "output": "a"}, talk("q|x", "a")),
    "alpaca only input": ({"instruction": "", "input": "x", "output": "a"}, talk("x", "a")),
    "alpaca all": (
        {"instruction": "q", "input": "x", "output": "a", "system": "S", "history": [["q0", "a0"], ["q1", "a1"]]},
        talk("q0", "a0", "q1", "a1", "q|x", "a", system="S"),
    ),
    "alpaca nulls": ({"instruction": "q", "output": "a", "system": None, "history": None}, talk("q", "a")),
    "question": ({"question": "q", "answer": "a"}, talk("q", "a")),
    "messages": ({"messages": OPENAI}, TOOLS),
    "messages beside other fields": ({"prompt": "q", "messages": OPENAI, "id": 7}, TOOLS),
    "messages as from and value": ({"messages": SHAREGPT}, TOOLS),
    "conversations": ({"conversations": SHAREGPT}, TOOLS),
    "conversations as role and content": ({"conversations": OPENAI}, TOOLS),
    "conversations with a system column": ({"conversations": SHAREGPT[1:], "system": "S"}, TOOLS),
    "an own system message": ({"conversations": SHAREGPT, "system": "column"}, TOOLS),
    "an own system message that is empty": (
        {"messages": talk("q", "a", system=""), "system": "column"},
        talk("q", "a", system=""),
    ),
    "an answer to every question": ({"messages": talk("q0", "a0", "q", "a")}, talk("q0", "a0", "q", "a")),
    "verl": (
        {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": "q"}],
            "reward_model": {"style": "rule", "ground_truth": "7"},
            "extra_info": {"answer": "a", "question": "raw"},
        },
        talk("q", "a"),
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms(tmp_path, name):
    row, messages = FORMS[name]
    before = json.dumps(row)
    assert load(write(tmp_path / "a.jsonl", [row]), input_separator="|") == [messages]
    turns = prepare.to_turns(row, {}, "|")
    assert turns == [(message["role"], message["content"]) for message in messages]
    assert json.dumps(row) == before  # left as it was


@pytest.mark.parametrize("name", FORMS)
def test_forms_survive_parquet(tmp_path, name):
    row, messages = FORMS[name]
    assert load(write(tmp_path / "a.parquet", [row, row]), input_separator="|") == [messages] * 2


def test_a_file_may_mix_forms(tmp_path):
    rows = [row for row, _ in FORMS.values()]
    expected = [messages for _, messages in FORMS.values()]
    assert load(write(tmp_path / "a.jsonl", rows), input_separator="|") == expected


def test_what_is_written_is_read_again_as_it_is(tmp_path):
    rows = [row for row, _ in FORMS.values()]
    once = load(write(tmp_path / "a.jsonl", rows))
    again = Path("made.jsonl").replace(tmp_path / "again.jsonl")
    assert load(again) == once


TOOL_TEXT = '[{"name": "f", "parameters": {"é": 1}}]'
TOLD = f"You have access to the following tools:\n{TOOL_TEXT}"


@pytest.mark.parametrize("tools", [TOOL_TEXT, json.loads(TOOL_TEXT)])
@pytest.mark.parametrize(
    "row, system",
    [
        ({"conversations": SHAREGPT}, f"S\n\n{TOLD}"),
        ({"conversations": SHAREGPT[1:], "system": "column"}, f"column\n\n{TOLD}"),
        ({"messages": OPENAI[1:]}, TOLD),
    ],
)
def test_tools_are_told_in_the_system_message(tmp_path, row, system, tools):
    made = load(write(tmp_path / "a.jsonl", [row | {"tools": tools}]))
    assert made == [[{"role": "system", "content": system}, *TOOLS[1:]]]


@pytest.mark.parametrize("tools", ["", "[]", " [ ] ", None, []])
def test_no_tools_are_not_told(tmp_path, tools):
    assert load(write(tmp_path / "a.jsonl", [{"conversations": SHAREGPT[1:], "tools": tools}])) == [TOOLS[1:]]


def test_tools_of_an_alpaca_row(tmp_path):
    row = {"instruction": "q", "output": "a", "tools": TOOL_TEXT}
    assert load(write(tmp_path / "a.jsonl", [row])) == [talk("q", "a", system=TOLD)]


def test_answers_are_stripped_and_empty_ones_kept_and_both_are_counted(tmp_path, capsys):
    rows = [
        {"question": " q\n", "answer": "\n a \n"},
        {"question": "q", "answer": "a b"},
        {"question": "q", "answer": ""},
        {"question": "q", "answer": " \n"},
        {"messages": [*talk(" q0", " a0", " q "), {"role": "tool", "content": " 7 "}, *talk("", "a\t")[1:]]},
    ]
    tool = {"role": "tool", "content": " 7 "}
    assert load(write(tmp_path / "a.jsonl", rows)) == [
        talk(" q\n", "a"),
        talk("q", "a b"),
        talk("q", ""),
        talk("q", ""),
        [*talk(" q0", "a0", " q "), tool, {"role": "assistant", "content": "a"}],
    ]
    assert "5 conversations, 0 bad rows left out, 4 answers stripped, 2 empty" in capsys.readouterr().out


# -----------------------------------------------------------------------------
# the same as finetune.py by itself


def separator_of(template):
    """Return a template's input_separator as finetune.py reads it."""
    found = re.search(r'set input_separator = ("(?:[^"\\]|\\.)*")', (ROOT / "templates" / template).read_text())
    return json.loads(found[1]) if found else "\n"


def render(template, messages):
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = lambda message: pytest.fail(message)
    text = (ROOT / "templates" / template).read_text(encoding="utf-8")
    return environment.from_string(text).render(messages=messages, bos_token="<s>", eos_token="</s>")


def test_by_default_instruction_and_input_are_joined_as_for_a_model_without_a_template(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"instruction": "q", "input": "x", "output": "a"}])
    assert load(path) == [talk(f"q{separator_of('alpaca.jinja')}x", "a")]
    assert "paired with an input" in render("alpaca.jinja", load(path)[0])


@pytest.mark.parametrize("given", ["\n", r"\n"])
def test_the_separator_of_chat_models(tmp_path, given):
    path = write(tmp_path / "a.jsonl", [{"instruction": "q", "input": "x", "output": "a"}])
    assert load(path, input_separator=given) == [talk(f"q{separator_of('chatml.jinja')}x", "a")] == [talk("q\nx", "a")]


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "q", "output": "a"},
        {"instruction": "q", "input": "", "output": "a"},
        {"instruction": "q", "input": "x\ny", "output": "a"},
        {"instruction": "q", "input": "x", "output": "a", "system": "S"},
        {"question": "q", "answer": "a"},
        {"messages": talk("q0", "a0", "q", "a", system="S")},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "S"},
    ],
    ids=lambda row: " ".join(row),
)
def test_the_same_conversation_as_finetune_makes_of_the_row(tmp_path, row):
    tree = ast.parse((ROOT / "finetune.py").read_text(encoding="utf-8"))
    tables = [node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)]
    function = [node for node in tree.body if getattr(node, "name", "") == "to_messages"]
    names = {}
    exec(compile(ast.Module(tables + function, []), "finetune.py", "exec"), names)  # without importing torch
    direct = names["to_messages"](row, separator_of("alpaca.jinja"))
    assert load(write(tmp_path / "a.jsonl", [row])) == [direct]


def test_tool_calls_render_with_chatml(tmp_path):
    write(tmp_path / "glaive.json", [{"conversations": SHAREGPT[1:], "tools": TOOL_TEXT}])
    columns = {"messages": "conversations", "tools": "tools"}
    folder = info(tmp_path, glaive={"file_name": "glaive.json", "formatting": "sharegpt", "columns": columns})
    assert render("chatml.jinja", load(dataset="glaive", dataset_dir=folder)[0]) == (
        f"<|im_start|>system\n{TOLD}<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nf()<|im_end|>\n"
        "<|im_start|>tool\n7<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    )


# -----------------------------------------------------------------------------
# dataset_info.json


def info(folder, **entries):
    write(folder / "dataset_info.json", entries)
    return str(folder)


def first(folder, name):
    """Return the first conversation of a named data set."""
    return load(dataset=name, dataset_dir=folder, input_separator="|")[0]


def test_dataset_info_alpaca(tmp_path):
    row = {"instruction": "q", "input": "x", "output": "a", "system": "S", "history": [["q0", "a0"]]}
    renamed = {"ask": "q", "more": "x", "say": "a", "sys": "S", "past": [["q0", "a0"]], "instruction": "no"}
    write(tmp_path / "a.json", [row])
    write(tmp_path / "parts" / "train.jsonl", [renamed])
    columns = {"prompt": "ask", "query": "more", "response": "say", "system": "sys", "history": "past"}
    folder = info(
        tmp_path,
        plain={"file_name": "a.json"},
        renamed={"file_name": "parts", "formatting": "alpaca", "columns": columns},
        partial={"file_name": "a.json", "columns": {"prompt": "instruction", "response": "output"}},
    )
    assert first(folder, "plain") == talk("q|x", "a")  # system and history have no default column
    assert first(folder, "renamed") == talk("q0", "a0", "q|x", "a", system="S")
    assert first(folder, "partial") == talk("q", "a")  # with columns, what is not listed is not read


def test_dataset_info_sharegpt_and_openai(tmp_path):
    write(tmp_path / "s.json", [{"conversations": SHAREGPT, "talk": SHAREGPT[1:], "sys": "S", "tools": TOOL_TEXT}])
    write(tmp_path / "o.json", [{"messages": OPENAI}])
    write(tmp_path / "t.json", [{"chat": [{"who": "U", "says": "q"}, {"who": "A", "says": "a"}]}])
    five = [{"who": who, "says": says} for who, says in zip("YUFOA", ("S", "q", "f()", "7", "a"))]
    write(tmp_path / "five.json", [{"chat": five}])
    tags = {"role_tag": "who", "content_tag": "says", "user_tag": "U", "assistant_tag": "A"}
    roles = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    more = {"system_tag": "Y", "function_tag": "F", "observation_tag": "O"}
    chat = {"formatting": "sharegpt", "columns": {"messages": "chat"}}
    folder = info(
        tmp_path,
        plain={"file_name": "s.json", "formatting": "sharegpt"},
        columns={"file_name": "s.json", "formatting": "sharegpt", "columns": {"messages": "talk", "system": "sys"}},
        partial={"file_name": "s.json", "formatting": "sharegpt", "columns": {"messages": "talk"}},
        openai={"file_name": "o.json", "formatting": "openai"},
        roles={
            "file_name": "o.json",
            "formatting": "sharegpt",
            "columns": {"messages": "messages"},
            "tags": roles | {"observation_tag": "tool"},
        },
        tags=chat | {"file_name": "t.json", "tags": tags},
        five=chat | {"file_name": "five.json", "tags": tags | more},
        untagged=chat | {"file_name": "t.json"},
        unknown=chat | {"file_name": "five.json", "tags": tags},
    )
    assert first(folder, "plain") == first(folder, "columns") == first(folder, "openai") == TOOLS
    assert first(folder, "roles") == first(folder, "five") == TOOLS
    assert first(folder, "partial") == TOOLS[1:]  # neither system nor tools, which it does not list
    assert first(folder, "tags") == talk("q", "a")
    assert f"{tmp_path}/t.json, row 1: no str in field 'role': it is None; there are who, says" in said(
        dataset="untagged", dataset_dir=folder
    )
    assert f"{tmp_path}/five.json, row 1: 'Y' is none of the roles" in said(dataset="unknown", dataset_dir=folder)


def test_dataset_info_hub(hub):
    hub.result = [{"q": "ask", "a": "say"}]
    columns = {"prompt": "q", "response": "a"}
    urls = {"hf_hub_url": "owner/name", "file_name": "not_here.json", "ms_hub_url": "other/name", "columns": columns}
    one = {"hf_hub_url": "wiki_qa", "columns": columns}
    folder = info(Path("../there"), plain=urls, part=urls | {"subset": "main", "split": "test[:50]"}, one=one)
    assert first(folder, "plain") == first(folder, "part") == first(folder, "one") == talk("ask", "say")
    load(dataset="plain,part", dataset_dir=folder, split="validation", subset="socratic")
    assert hub.calls == [
        (("owner/name", None), {"split": "train"}),
        (("owner/name", "main"), {"split": "test[:50]"}),
        (("wiki_qa", None), {"split": "train"}),
        (("owner/name", "socratic"), {"split": "validation"}),  # where the entry does not say
        (("owner/name", "main"), {"split": "test[:50]"}),
    ]


@pytest.mark.parametrize(
    "name, message",
    [
        ("nope", "--dataset nope is not in {}, which has: pairs, gone, hub, lost, form, code, part, see, taste"),
        ("pairs", "--dataset pairs: {} gives ranking, which cannot be read"),
        ("gone", "x/y.json cannot be read as .json: [Errno 2] No such file or directory"),
        ("hub", "--dataset hub: {} gives ms_hub_url, columns; it must give hf_hub_url or file_name"),
        ("lost", "--dataset lost: {} gives formatting, columns; it must give hf_hub_url or file_name"),
        ("form", "--dataset form: {} has formatting 'chatty', none of openai, sharegpt, alpaca"),
        ("code", "--dataset code: {} gives script_url, which cannot be read"),
        ("part", "--dataset part: {} gives folder, which cannot be read"),
        ("see", "--dataset see: {} gives images and videos, which cannot be read"),
        ("taste", "--dataset taste: {} gives kto_tag, which cannot be read"),
    ],
)
def test_dataset_info_refusals(hub, tmp_path, name, message):
    sharegpt = {"hf_hub_url": "owner/name", "formatting": "sharegpt"}
    folder = info(
        tmp_path,
        pairs={"file_name": "a.json", "ranking": True},
        gone={"file_name": "x/y.json"},
        hub={"ms_hub_url": "owner/name"},
        lost={"formatting": "alpaca"},
        form={"hf_hub_url": "owner/name", "formatting": "chatty"},
        code={"script_url": "load.py"},
        part={"hf_hub_url": "owner/name", "folder": "python"},
        see=sharegpt | {"columns": {"messages": "messages", "videos": "v", "images": "i"}},
        taste=sharegpt | {"columns": {"messages": "messages", "kto_tag": "label"}},
    )
    assert message.format(f"{tmp_path}/dataset_info.json") in said(dataset=name, dataset_dir=folder)
    assert hub.calls == []


def test_ranking_that_is_false(tmp_path):
    write(tmp_path / "a.json", ROWS)
    assert len(load(dataset="a", dataset_dir=info(tmp_path, a={"file_name": "a.json", "ranking": False}))) == 2


def test_without_dataset_info(tmp_path):
    path = tmp_path / "dataset_info.json"
    assert said(dataset="x", dataset_dir=str(tmp_path)).startswith(f"{path} cannot be read as .json: [Errno 2] No such")
    path.write_text('{\n "x": {]}')
    assert said(dataset="x", dataset_dir=str(tmp_path)).startswith(
        f"{path} cannot be read as .json: Expecting property"
    )


def test_several_names_with_commas(tmp_path, capsys):
    row = lambda text: [{"instruction": text, "output": "a"}] * 3
    write(tmp_path / "a.json", row("a"))
    write(tmp_path / "b.json", row("b"))
    folder = info(tmp_path, a={"file_name": "a.json", "num_samples": 1}, b={"file_name": "b.json"})
    asked = [messages[0]["content"] for messages in load(dataset="b, a,", dataset_dir=folder, max_samples=2)]
    assert asked == ["b", "b", "a"]
    assert f"read 3 rows of {tmp_path}/b.json\nread 3 rows of {tmp_path}/a.json\n3 conv" in capsys.readouterr().out


def test_samples(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"instruction": str(i), "output": "a"} for i in range(5)])

    def asked(num_samples=None, **flags):
        entry = {"file_name": "a.jsonl"} | ({"num_samples": num_samples} if num_samples else {})
        source = {"dataset": "a", "dataset_dir": info(tmp_path, a=entry)}
        return [int(messages[0]["content"]) for messages in load(**source, **flags)]

    assert asked() == [0, 1, 2, 3, 4]
    assert asked(max_samples=2) == [0, 1] and asked(max_samples=9) == [0, 1, 2, 3, 4]
    few = asked(3)
    assert len(set(few)) == 3 and few == asked(3) and len({tuple(asked(3, seed=seed)) for seed in range(9)}) > 1
    assert sorted(asked(5)) == [0, 1, 2, 3, 4]
    many = asked(12)  # twice all, and two more
    assert sorted(many.count(i) for i in range(5)) == [2, 2, 2, 3, 3]
    assert asked(12, max_samples=4) == many[:4]
    assert [messages[0]["content"] for messages in load(path, max_samples=2)] == ["0", "1"]


def test_the_embedded_dataset_info(hub):
    flags = {"dataset_dir": str(ROOT / "data"), "max_samples": 3}
    assert all(messages[-1]["content"].count("#### ") == 1 for messages in load(dataset="tiny", **flags))
    hub.result = [QUESTION]
    assert load(dataset="gsm8k", **flags) == [talk("q", "a")]
    hub.result = ROWS
    assert len(load(dataset="alpaca", **flags)) == 2
    assert hub.calls == [
        (("openai/gsm8k", "main"), {"split": "train"}),
        (("yahma/alpaca-cleaned", None), {"split": "train"}),
    ]


# -----------------------------------------------------------------------------
# what is written


def test_where_it_is_written_and_what_comes_next(tmp_path, capsys):
    write(tmp_path / "my.rows.jsonl", [QUESTION])
    folder = info(tmp_path, a={"file_name": "my.rows.jsonl", "columns": {"prompt": "question", "response": "answer"}})
    for flags, name in [
        ({"data_path": str(tmp_path / "my.rows.jsonl")}, "my.rows"),
        ({"data_path": "owner/name"}, "name"),
        ({"dataset": "a,a", "dataset_dir": folder}, "a_a"),
    ]:
        prepare.prepare(**flags)
        assert len(read(f"out/data/{name}.jsonl")) in (1, 2)
        next_line = f"Next: python finetune.py --base_model BASE --data_path out/data/{name}.jsonl\n"
        assert capsys.readouterr().out.endswith(f"wrote out/data/{name}.jsonl\n{next_line}")
    assert sorted(path.name for path in Path("out/data").iterdir()) == ["a_a.jsonl", "my.rows.jsonl", "name.jsonl"]


def test_it_is_readable_utf_8_with_one_line_a_row(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "嘘\u2028都", "answer": "😀\r\n"}])
    load(path)
    row = '{"messages": [{"role": "user", "content": "嘘\u2028都"}, {"role": "assistant", "content": "😀"}]}\n'
    assert Path("made.jsonl").read_bytes() == row.encode()


def test_what_is_there_is_kept_unless_overwrite(tmp_path, hub):
    path = write(tmp_path / "a.jsonl", [QUESTION])
    Path("made.jsonl").write_text("precious")
    with pytest.raises(ValueError, match="made.jsonl is there already: --overwrite replaces it"):
        prepare.prepare(data_path=str(path), output_path="made.jsonl")
    with pytest.raises(ValueError, match="is there already"):
        prepare.prepare(data_path="owner/name", output_path="made.jsonl")
    assert Path("made.jsonl").read_text() == "precious" and hub.calls == []
    assert load(path) == [talk("q", "a")]


def test_the_input_is_never_replaced(tmp_path):
    path = write(tmp_path / "data" / "train.jsonl", [QUESTION])
    before = path.read_bytes()
    (tmp_path / "link.jsonl").symlink_to(path)
    folder = info(tmp_path, a={"file_name": "data/train.jsonl"})
    for source in ({"data_path": str(path)}, {"data_path": f"{path.parent}"}, {"dataset": "a", "dataset_dir": folder}):
        for output in (path, tmp_path / "link.jsonl", f"{tmp_path}/cwd/../data/train.jsonl"):
            with pytest.raises(ValueError, match="train.jsonl is read, and would be replaced"):
                prepare.prepare(output_path=str(output), overwrite=True, **source)
    assert path.read_bytes() == before


def test_flags_that_do_not_fit(tmp_path, hub):
    path = write(tmp_path / "a.jsonl", [QUESTION])
    assert said() == "--data_path '' and --dataset '': give one of them"
    assert said(path, dataset="x") == f"--data_path '{path}' and --dataset 'x': give one of them"
    assert said(dataset=" , ") == "--data_path '' and --dataset ' , ': give one of them"
    assert said(path, max_samples=-1) == "--max_samples -1 must not be negative; 0 takes all rows"
    for output in ("made.json", "made", "folder/"):
        with pytest.raises(ValueError, match=r"must end in \.jsonl"):
            prepare.prepare(data_path="owner/name", output_path=output)
    assert hub.calls == []


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_the_target_is_never_half_written(tmp_path, monkeypatch, failure):
    path = write(tmp_path / "a.jsonl", [QUESTION] * 2)
    load(path)
    before, write_bytes = Path("made.jsonl").read_bytes(), Path.write_bytes

    def half(self, data):
        write_bytes(self, data[: len(data) // 2])
        raise failure

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(failure if isinstance(failure, type) else OSError):
        prepare.prepare(data_path=str(path), output_path="made.jsonl", overwrite=True)
    assert Path("made.jsonl").read_bytes() == before
    assert [file.name for file in Path().iterdir()] == ["made.jsonl"]


def test_what_a_kill_leaves_behind_does_not_matter(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [QUESTION] * 2)
    write_bytes, unlink = Path.write_bytes, Path.unlink

    def killed(self, data):
        write_bytes(self, data[: len(data) // 2])
        raise SystemExit(137)

    with monkeypatch.context() as patch:  # kill -9: nothing is tidied up
        patch.setattr(Path, "write_bytes", killed)
        patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
        with pytest.raises(SystemExit):
            prepare.prepare(data_path=str(path), output_path="made.jsonl")
    assert [file.name for file in Path().iterdir()] == ["made.jsonl.incomplete"] and Path.unlink is unlink
    assert load(path) == [talk("q", "a")] * 2
    assert [file.name for file in Path().iterdir()] == ["made.jsonl"]


def test_nothing_is_written_before_every_row_is_read(tmp_path):
    path = write(tmp_path / "a.jsonl", [QUESTION] * 50 + [{"question": "q"}])
    said(path)  # which looks whether anything was written


# -----------------------------------------------------------------------------
# command line


def test_command_line(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [{"instruction": "q", "input": "x", "output": "a"}, {"question": "q"}])

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, argv)])
        prepare.run_cli(prepare.prepare)

    run("--data_path", path, "--skip_bad_rows", "--input_separator", r"\n\n", "--output_path=b/made.jsonl")
    assert read("b/made.jsonl") == [talk("q\n\nx", "a")]
    with pytest.raises(SystemExit, match=r"error: .*a\.jsonl, row 2: no str in field 'answer'.*--skip_bad_rows leaves"):
        run("--data_path", path)


def test_as_a_script_from_any_folder(tmp_path):
    write(tmp_path / "a.csv", "question,answer\nq,a\n")
    command = [sys.executable, str(ROOT / "data" / "prepare.py"), "--data_path", "../a.csv"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and read("out/data/a.jsonl") == [talk("q", "a")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: out/data/a.jsonl is there already")


def test_imports_nothing_heavy():
    """Reads the source: the test session may have torch loaded already."""
    lines = (ROOT / "data" / "prepare.py").read_text().split("\n")
    imported = [line.split()[1] for line in lines if line.startswith(("import", "from"))]
    assert not {"torch", "transformers", "datasets", "pandas"} & set(imported)
