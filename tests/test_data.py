"""
finetune.py, from a data file to a batch: rows, dataset_info.json, templates, token ids and labels, micro-batches.

    .venv/bin/python -m pytest tests/test_data.py

Expected values are written out by hand, on a tokenizer whose tokens are single bytes. The property that matters is
tested on trained tokenizers as well: the ids before an answer are what a server computes for the same conversation.
"""

import json
import math
import random

import datasets
import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

import finetune
from finetune import (
    IGNORE,
    Examples,
    MicroBatches,
    check_template,
    detect_form,
    encode,
    end_of_turn,
    find_dataset,
    pack,
    pad,
    read_conversations,
    read_file,
    read_rows,
    split_rows,
    to_messages,
    use_template,
)

SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # Llama 3's
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SENTENCES = [
    "Below is an instruction that describes a task, paired with an input that provides further context.",
    "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd the two numbers.",
    "\n\n### Input:\n12 and 30\n\n### Response:\nThe sum of 12 and 30 is 42.\n\n\nDone.",
    "Ci-dessous se trouve une instruction qui décrit une tâche.\n\n### Réponse:\nÉcrivez une réponse.",
    "user\nassistant\nsystem\n```python\nprint(12 + 30)\n```\n  indented  twice\n",
    "小姐，别的秀女都在求中选。嘘，都说许愿说破是不灵的。",
] * 3
ANSWERS = {  # starts and ends that are hard to place
    "words": "The sum is 42.",
    "space": " leading and trailing ",
    "spaces": "  two",
    "chinese": "嘘都说许愿说破是不灵的",
    "emoji": "😀 is 👩‍👩‍👧",
    "rare": "𝔘é",
    "code": "```python\nprint(1)\n```",
    "newline": "\nThe sum",
    "newlines": "\n\n\n",
    "empty": "",
    "header": "### Response:\nnot the end",
}
TEMPLATES = ("alpaca", "alpaca_short", "vigogne", "chatml")


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


def load(path, separator="\n", form=None, num_samples=None, max_samples=0, seed=0):
    return read_conversations([(str(path), "train", None, form, num_samples)], separator, max_samples, seed)


def said(function, *args, **kwargs):
    """Return the message of the ValueError that a call raises."""
    with pytest.raises(ValueError) as error:
        function(*args, **kwargs)
    return str(error.value)


# -----------------------------------------------------------------------------
# reading

ROWS = [{"instruction": "Ask – 1", "output": "A\n1"}, {"instruction": "Ask, 2", "output": '"\u2028"'}]


@pytest.mark.parametrize(
    "name, content",
    [
        ("rows.json", ROWS),
        ("rows.jsonl", ROWS),
        ("rows.parquet", ROWS),
        ("rows.csv", 'instruction,output\nAsk – 1,"A\n1"\n"Ask, 2","""\u2028"""\n'),
        ("windows.jsonl", "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\r\n"),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name, content):
    path = write(tmp_path / name, content)
    assert read_file(path) == ROWS
    rows, where = read_rows(str(path))
    assert rows == ROWS and where(1).startswith(str(path))


def test_a_single_json_object_is_a_file_of_one_row(tmp_path):
    assert read_file(write(tmp_path / "one.json", ROWS[0])) == ROWS[:1]


def test_a_folder_is_its_train_files_or_all_files_in_order(tmp_path):
    row = lambda text: [{"question": text, "answer": text}]
    write(tmp_path / "data" / "train-00001.jsonl", row("b"))
    write(tmp_path / "data" / "train-00000.parquet", row("a"))
    write(tmp_path / "data" / "deeper" / "train.csv", "question,answer\nd,d\n")
    write(tmp_path / "data" / "test.jsonl", row("c"))
    write(tmp_path / "data" / "notes.txt", "no data")
    rows, where = read_rows(str(tmp_path / "data"))
    assert [r["question"] for r in rows] == ["d", "a", "b"]
    assert [where(i).removeprefix(f"{tmp_path}/data/") for i in range(3)] == [
        "deeper/train.csv, line 2",
        "train-00000.parquet, row 1",
        "train-00001.jsonl, line 1",
    ]
    assert [r["question"] for r in read_rows(str(tmp_path / "data"), split="test")[0]] == ["c"]
    assert [r["question"] for r in read_rows(str(tmp_path / "data"), split="other")[0]] == ["d", "c", "a", "b"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", "", "a.jsonl: no rows in it"),
        ("a.jsonl", "\n \n", "a.jsonl: no rows in it"),
        ("a.json", "[]", "a.json: no rows in it"),
        ("a.csv", "question,answer\n", "a.csv: no rows in it"),
        ("a.json", "", "a.json, line 1: not valid JSON: Expecting value (column 1)"),
        ("a.json", '[\n {"a": 1},\n {"a" 2}]', "a.json, line 3: not valid JSON: Expecting ':' delimiter (column 7)"),
        ("a.json", '{"a": 1}\n{"a": 2}\n', "a.json, line 2: not valid JSON: Extra data (column 1)"),
        ("a.jsonl", '\n{"a": 1}\n\n{"a": }\n', "a.jsonl, line 4: not valid JSON: Expecting value (column 7)"),
        ("a.jsonl", '{"a": 1}\n\n["b"]\n', "a.jsonl, line 3: a row must be an object with named fields, got ['b']"),
        ("a.json", '[\n{"a": 1},\n\n  7]', "a.json, line 4: a row must be an object with named fields, got 7"),
        ("a.json", '"text"', "a.json, line 1: a row must be an object with named fields, got 'text'"),
        ("a.jsonl", '{"question": "é"}'.encode("latin-1"), "a.jsonl: cannot be read: 'utf-8' codec"),
        ("a.txt", "text", "a.txt: not a data file; one of .json, .jsonl, .csv, .parquet, or a folder"),
    ],
)
def test_unreadable_files_say_where(tmp_path, name, content, message):
    assert f"{tmp_path}/{message}" in said(read_rows, str(write(tmp_path / name, content)))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", '\n{"question": "q", "answer": "a"}\n\n{"question": "q"}\n', "line 4: no text in field 'answer': "),
        ("a.jsonl", '{"question": "q", "answer": 7}\n', "line 1: no text in field 'answer': it is 7"),
        ("a.jsonl", '{"question": "q", "answer": null}\n', "line 1: no text in field 'answer': it is None"),
        ("a.jsonl", '{"instruction": "q", "output": ["a"]}', "line 1: no text in field 'output': it is ['a']"),
        ("a.jsonl", '{"instruction": "q", "response": "a"}', "'output': the row has 'instruction', 'response'"),
        ("a.jsonl", '{"instruction": "q", "input": 1, "output": "a"}', "line 1: no text in field 'input': it is 1"),
        ("a.jsonl", '{"instruction": "q", "output": "a", "history": [["q"]]}', "line 1: field 'history' must list"),
        ("a.jsonl", '{"text": "q"}', "line 1: none of the known forms has the fields 'text'; a row has instruction"),
        ("a.jsonl", '{"messages": "q"}', "line 1: no list of messages in field 'messages'"),
        ("a.jsonl", '{"messages": []}', "line 1: the conversation has no answer to learn"),
        ("a.jsonl", '{"messages": [{"role": "bot", "content": "a"}]}', "must be one of user, assistant, system, tool"),
        ("a.jsonl", '{"conversations": [{"from": "human", "value": null}]}', "line 1: no text in field 'value': it is"),
        (
            "a.json",
            '[\n  {\n    "question": "q, [1]",\n    "answer": "a"\n  },\n\n  {\n    "question": "q"\n  }\n]',
            "line 7: no text in field 'answer'",
        ),
        ("a.json", '\n\n{"question": "q"}', "line 3: no text in field 'answer'"),
        ("a.csv", 'question,answer\n"q\n1",a\n\nq\n', "line 5: no text in field 'answer': it is None"),
        ("a.parquet", [{"question": "q", "answer": "a"}, {"question": "q", "answer": None}], "row 2: no text in field"),
    ],
)
def test_bad_rows_say_file_and_line(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    text = said(load, path)
    assert text.startswith(f"{path}, ") and message in text


@pytest.mark.parametrize(
    "source, message",
    [
        ("nowhere", "nowhere: no such file or folder, and not the name of a hub data set (owner/name)"),
        ("", ": no such file or folder"),
        ("a/b/c", "a/b/c: no such file or folder, and not the name of a hub data set"),
        ("folder/file.json", "folder/file.json: no such file"),
    ],
)
def test_unknown_sources_never_ask_the_hub(monkeypatch, source, message):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("asked the hub"))
    assert said(read_rows, source).startswith(message)


def test_hub_rows_and_hub_errors(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        if args[0] == "owner/gone":
            raise RuntimeError("404")
        return datasets.Dataset.from_list([{"question": "q", "answer": "a"}, {"question": "q", "answer": None}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows, where = read_rows("owner/name", "test", "main")
    assert rows[0] == {"question": "q", "answer": "a"} and where(1) == "owner/name (test), row 2"
    assert calls == [(("owner/name", "main"), {"split": "test"})]
    assert said(load, "owner/name") == "owner/name (train), row 2: no text in field 'answer': it is None"
    assert said(read_rows, "owner/gone").endswith("and the hub could not give it: 404")


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


def test_a_csv_row_is_named_by_its_first_line(tmp_path):
    path = write(tmp_path / "a.csv", 'question,answer,more\nq,a,\n"q\n1\n2"\n')
    assert said(load, path).startswith(f"{path}, line 3: ")


def test_a_damaged_parquet_file_is_a_message_of_ours(tmp_path):
    path = write(tmp_path / "a.parquet", b"PAR1 and then nothing of the kind")
    assert said(read_file, path).startswith(f"{path}: cannot be read")


def test_hidden_folders_are_no_data(tmp_path):
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / ".ipynb_checkpoints" / "train-checkpoint.jsonl", ROWS)
    assert len(read_rows(str(tmp_path))[0]) == len(ROWS)


@pytest.mark.parametrize("train, test", [("train/0.jsonl", "test/0.jsonl"), ("gsm_train.jsonl", "gsm_test.jsonl")])
def test_the_split_in_a_folders_or_files_name_is_seen(tmp_path, train, test):
    write(tmp_path / train, ROWS[:1])
    write(tmp_path / test, ROWS[1:])
    assert read_rows(str(tmp_path))[0] == ROWS[:1]


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
    "messages as from and value": ({"messages": SHAREGPT}, TOOLS),
    "conversations": ({"conversations": SHAREGPT}, TOOLS),
    "conversations as role and content": ({"conversations": OPENAI}, TOOLS),
    "conversations with a system column": ({"conversations": SHAREGPT[1:], "system": "S"}, TOOLS),
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
def test_forms(name):
    row, messages = FORMS[name]
    before = json.dumps(row)
    assert to_messages(row, detect_form(row), separator="|") == messages
    assert to_messages(row, detect_form(row), separator="|", need_response=False) == messages[:-1]
    assert json.dumps(row) == before


@pytest.mark.parametrize("row", [{"instruction": "q"}, {"question": "q"}, {"messages": OPENAI[:2]}])
def test_only_learning_needs_an_answer(row):
    said(to_messages, row, detect_form(row))
    assert to_messages(row, detect_form(row), need_response=False)[-1] == {"role": "user", "content": "q"}


def test_verl_rows_survive_parquet(tmp_path):
    path = write(tmp_path / "train.parquet", [FORMS["verl"][0]] * 2)
    assert load(path) == [talk("q", "a")] * 2


def test_a_file_may_mix_forms(tmp_path):
    rows = [row for name, (row, _) in FORMS.items() if name != "alpaca input"]
    assert load(write(tmp_path / "a.jsonl", rows), separator="|") == [
        messages for name, (_, messages) in FORMS.items() if name != "alpaca input"
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [None]},
        {"messages": [{"role": ["user"], "content": "q"}]},
        {"prompt": "What is 6*7?", "extra_info": {"answer": "42"}},
        {"prompt": [{"content": "q"}], "extra_info": {"answer": "a"}},
        {"prompt": [{"role": "user", "content": "q"}], "extra_info": None},
        {"instruction": "q", "output": "a", "history": 5},
    ],
    ids=lambda row: json.dumps(row),
)
def test_rows_of_a_wrong_shape_say_file_and_line(tmp_path, row):
    path = write(tmp_path / "a.jsonl", [row])
    assert said(load, path).startswith(f"{path}, line 1: ")


def test_a_conversation_has_one_system_message():
    row = {"conversations": SHAREGPT, "system": "column"}
    assert to_messages(row, detect_form(row)) == TOOLS


def test_an_answer_to_nothing_is_refused_where_it_stands(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"conversations": [{"from": "gpt", "value": "Hello!"}]}])
    assert said(load, path).startswith(f"{path}, line 1: ")


# -----------------------------------------------------------------------------
# dataset_info.json


def info(folder, **entries):
    write(folder / "dataset_info.json", entries)
    return str(folder)


def first(folder, name):
    """Return the first conversation of a named data set."""
    return read_conversations([find_dataset(name, folder)], "|", 0, 0)[0]


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
    assert find_dataset("plain", folder)[:3] == (str(tmp_path / "a.json"), "train", None)
    assert find_dataset("plain", folder)[4] is None
    assert first(folder, "plain") == talk("q|x", "a")  # system and history have no default column
    assert first(folder, "renamed") == talk("q0", "a0", "q|x", "a", system="S")
    assert first(folder, "partial") == talk("q", "a")  # with columns, what is not listed is not read


def test_dataset_info_sharegpt_and_openai(tmp_path):
    write(tmp_path / "s.json", [{"conversations": SHAREGPT, "talk": SHAREGPT[1:], "sys": "S"}])
    write(tmp_path / "o.json", [{"messages": OPENAI}])
    write(tmp_path / "t.json", [{"chat": [{"who": "U", "says": "q"}, {"who": "A", "says": "a"}]}])
    tags = {"role_tag": "who", "content_tag": "says", "user_tag": "U", "assistant_tag": "A"}
    roles = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
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
        tags={"file_name": "t.json", "formatting": "sharegpt", "columns": {"messages": "chat"}, "tags": tags},
        wrong={"file_name": "o.json", "formatting": "sharegpt", "columns": {"messages": "messages"}},
    )
    assert first(folder, "plain") == first(folder, "columns") == first(folder, "openai") == TOOLS
    assert first(folder, "roles") == TOOLS
    assert first(folder, "partial") == TOOLS[1:]
    assert first(folder, "tags") == talk("q", "a")
    assert f"{tmp_path}/o.json, line 1: a message's 'from' must be one of human, gpt" in said(first, folder, "wrong")


def test_dataset_info_hub(tmp_path, monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.Dataset.from_list([{"q": "ask", "a": "say"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    columns = {"prompt": "q", "response": "a"}
    hub = {"hf_hub_url": "owner/name", "file_name": "not_here.json", "ms_hub_url": "other/name", "columns": columns}
    folder = info(tmp_path, plain=hub, part=hub | {"subset": "main", "split": "test[:50]"})
    assert first(folder, "plain") == first(folder, "part") == talk("ask", "say")
    assert calls == [(("owner/name", None), {"split": "train"}), (("owner/name", "main"), {"split": "test[:50]"})]


def test_dataset_info_hub_folder(tmp_path, monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append(kwargs)
        return datasets.Dataset.from_list([{"instruction": "q", "output": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    try:
        first(info(tmp_path, x={"hf_hub_url": "owner/name", "folder": "python"}), "x")
    except ValueError as error:  # refusing it would do as well
        assert "folder" in str(error)
    else:
        assert calls[0]["data_dir"] == "python"


@pytest.mark.parametrize(
    "name, message",
    [
        ("nope", "--dataset nope: not in {}/dataset_info.json, which has: form, gone, hub, lost, pairs"),
        ("pairs", "--dataset pairs: holds preference pairs (ranking)"),
        ("gone", "--dataset gone: {0}/dataset_info.json names x/y.json, and {0}/x/y.json does not exist"),
        ("hub", "--dataset hub: {}/dataset_info.json gives ms_hub_url; only hf_hub_url and file_name can be read"),
        ("lost", "--dataset lost: {}/dataset_info.json gives no source at all"),
        ("form", "--dataset form: formatting 'chatty' in {}/dataset_info.json; known: alpaca, sharegpt, openai"),
    ],
)
def test_dataset_info_refusals(tmp_path, name, message):
    folder = info(
        tmp_path,
        pairs={"file_name": "a.json", "ranking": True},
        gone={"file_name": "x/y.json"},
        hub={"ms_hub_url": "owner/name"},
        lost={"formatting": "alpaca"},
        form={"hf_hub_url": "owner/name", "formatting": "chatty"},
    )
    assert said(find_dataset, name, folder).startswith(message.format(tmp_path))


def test_without_dataset_info(tmp_path):
    message = f"--dataset x: there is no {tmp_path}/dataset_info.json; see --dataset_dir"
    assert said(find_dataset, "x", str(tmp_path)) == message
    write(tmp_path / "dataset_info.json", '{\n "x": {]}')
    assert said(find_dataset, "x", str(tmp_path)).startswith(f"{tmp_path}/dataset_info.json, line 2: not valid JSON")


def test_several_names_with_commas(tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    def stop(*args):
        seen.append(args)
        raise Stop

    seen = []
    write(tmp_path / "a.json", ROWS)
    write(tmp_path / "b.json", ROWS)
    folder = info(tmp_path, a={"file_name": "a.json", "num_samples": 1}, b={"file_name": "b.json"})
    monkeypatch.setattr(finetune, "read_conversations", stop)
    with pytest.raises(Stop):
        finetune.train(
            dataset="b, a,",
            dataset_dir=folder,
            output_dir=str(tmp_path / "out"),
            max_samples=5,
            prompt_template="alpaca",
        )
    sources, separator, max_samples, seed = seen[0]
    assert [source for source, *_ in sources] == [str(tmp_path / "b.json"), str(tmp_path / "a.json")]
    assert [num_samples for *_, num_samples in sources] == [None, 1]
    assert (separator, max_samples, seed) == ("\n\n### Input:\n", 5, 42)


def test_samples(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": str(i), "answer": "a"} for i in range(5)])
    asked = lambda *args, **kwargs: [int(messages[0]["content"]) for messages in load(path, *args, **kwargs)]
    assert asked() == [0, 1, 2, 3, 4]
    assert asked(max_samples=2) == [0, 1] and asked(max_samples=9) == [0, 1, 2, 3, 4]
    few = asked(num_samples=3)
    assert (
        len(set(few)) == 3
        and few == asked(num_samples=3)
        and len({tuple(asked(num_samples=3, seed=s)) for s in range(9)}) > 1
    )
    assert sorted(asked(num_samples=5)) == [0, 1, 2, 3, 4]
    many = asked(num_samples=12)  # twice all, and two more
    assert sorted(many.count(i) for i in range(5)) == [2, 2, 2, 3, 3]
    assert asked(num_samples=12, max_samples=4) == many[:4]
    sources = [(str(path), "train", None, None, None)] * 2
    assert [m[0]["content"] for m in read_conversations(sources, "\n", 2, 0)] == ["0", "1", "0", "1"]


def test_split_rows():
    for size, count in [(0.1, 10), (0.5, 50), (7, 7), (2.9, 2), (0, 0), (0.004, 0)]:
        train, held_out = split_rows(100, size, seed=1)
        assert len(held_out) == count
        assert sorted(train + held_out) == list(range(100))
        assert train == sorted(train) and held_out == sorted(held_out)
    assert split_rows(100, 10, 1) == split_rows(100, 10, 1) == split_rows(100, 0.1, 1)
    assert split_rows(100, 10, 1) != split_rows(100, 10, 2)
    assert said(split_rows, 5, 5, 1) == "--val_set_size 5 takes 5 of 5 rows and leaves none to train on"
    assert said(split_rows, 5, 0.95, 1) == "--val_set_size 0.95 takes 5 of 5 rows and leaves none to train on"


# -----------------------------------------------------------------------------
# tokenizers to test with


def fast(backend, **kwargs):
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=SPECIAL[0], pad_token=SPECIAL[0], extra_special_tokens=SPECIAL[1:], **kwargs
    )


def byte_level(split=SPLIT):
    """Return Llama 3's pre-tokenizer, or with split None GPT-2's."""
    if split is None:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = pre_tokenizers.Split(Regex(split), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def make_letters(split=SPLIT, normalizer=None, merges=(("Ċ", "Ċ"),), **kwargs):
    """Return a tokenizer with a token per byte (Ċ is the newline), and one for two newlines."""
    tokens = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in merges]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, list(merges)))
    backend.pre_tokenizer = byte_level(split)
    if normalizer:
        backend.normalizer = normalizer
    return fast(backend, **kwargs)


@pytest.fixture(scope="session")
def letters():
    return make_letters()


@pytest.fixture(scope="session")
def bpe():
    """A byte-level BPE tokenizer, as Llama 3 and Qwen have it, with a BOS token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = byte_level()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [*SPECIAL, "<|begin|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=450, special_tokens=special, initial_alphabet=alphabet, min_frequency=1, show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return fast(backend, bos_token="<|begin|>")


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A SentencePiece tokenizer, as Llama 2 has it: BOS, EOS, a prefix space, and bytes for what it does not know."""
    folder = tmp_path_factory.mktemp("llama")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in SENTENCES for line in text.split("\n") if line),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        character_coverage=0.98,  # leaves some characters to the bytes
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("<s>sum 😀\n")[-5:] == ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "<0x0A>"]
    assert tokenizer.bos_token == "<s>" and tokenizer.tokenize("sum")[0].startswith("▁")
    return tokenizer


@pytest.fixture
def tokenizer(request):
    return request.getfixturevalue(request.param)


def spell(tokenizer, text):
    """Return the ids of a text in the letters tokenizer, by hand: special tokens, then a token per byte."""
    ids = []
    while text:
        special = next((token for token in SPECIAL if text.startswith(token)), None)
        piece = special or ("\n\n" if text.startswith("\n\n") else text[0])
        letters = [special] if special else ["ĊĊ"] if piece == "\n\n" else map(BYTES.get, piece.encode())
        ids += [tokenizer.get_vocab()[letter] for letter in letters]
        text = text[len(piece) :]
    return ids


# GPT-2's letters for bytes: printable ones stand for themselves, the others are counted up from 256
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = {byte: chr(byte) for byte in PRINTABLE} | {
    byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in PRINTABLE)
}


# -----------------------------------------------------------------------------
# templates

PROMPTS = {  # the prompts of tloen/alpaca-lora's templates/*.json
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:\n",
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
    ),
    "alpaca_short": (
        "### Instruction:\n{instruction}\n\n### Response:\n",
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
    ),
    "vigogne": (
        "Ci-dessous se trouve une instruction qui décrit une tâche. Écrivez une réponse qui complète correctement la "
        "demande.\n\n### Instruction:\n{instruction}\n\n### Réponse:\n",
        "Ci-dessous se trouve une instruction qui décrit une tâche, associée à une entrée qui fournit un contexte "
        "supplémentaire. Écrivez une réponse qui complète correctement la demande.\n\n"
        "### Instruction:\n{instruction}\n\n### Entrée:\n{input}\n\n### Réponse:\n",
    ),
    "chatml": (
        "<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\n{instruction}\n{input}<|im_end|>\n<|im_start|>assistant\n",
    ),
}
END = {"alpaca": "<|endoftext|>", "alpaca_short": "<|endoftext|>", "vigogne": "<|endoftext|>", "chatml": "<|im_end|>"}
RESPONSE = {"alpaca": "### Response:\n", "alpaca_short": "### Response:\n", "vigogne": "### Réponse:\n"}


def render(tokenizer, messages, ask=False):
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_write_the_prompts_of_the_originals(letters, name):
    _, separator = use_template(letters, name)
    for more, prompt in zip(("", "{x}\n7"), PROMPTS[name]):
        row = {"instruction": "Add {a}\nand b.", "input": more, "output": " It is\n7 "}
        messages = to_messages(row, detect_form(row), separator)
        prompt = prompt.replace("{instruction}", row["instruction"]).replace("{input}", more)
        assert render(letters, messages[:1], ask=True) == prompt
        tail = "\n" if name == "chatml" else ""
        assert render(letters, messages) == prompt + " It is\n7 " + END[name] + tail


@pytest.mark.parametrize("name", RESPONSE)
@pytest.mark.parametrize("more", ["", "x"])
def test_alpaca_templates_with_a_system_message_and_several_turns(letters, name, more):
    _, separator = use_template(letters, name)
    text = separator.join(["q", more]) if more else "q"
    asked, response = f"### Instruction:\n{text}\n\n", RESPONSE[name]
    assert render(letters, talk(text, system="S"), ask=True) == f"S\n\n{asked}{response}"
    plain = PROMPTS[name][bool(more)].format(instruction="q", input=more)
    two = f"{plain}a<|endoftext|>\n\n### Instruction:\nq2\n\n{response}"
    assert render(letters, talk(text, "a", "q2"), ask=True) == two
    assert render(letters, talk(text, "a", "q2", "a2")) == two + "a2<|endoftext|>"
    assert render(letters, talk(text, "a", "q2", "a2", system="S")).startswith(f"S\n\n{asked}{response}a<|endoftext|>")


def test_chatml_with_a_system_message_and_several_turns(letters):
    use_template(letters, "chatml")
    assert render(letters, talk("q", "a", "q2", system="S"), ask=True) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
        "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("name", RESPONSE)
def test_alpaca_templates_write_bos_once_and_refuse_what_they_cannot_say(llama, bpe, name):
    for tokenizer, bos in ((llama, "<s>"), (bpe, "<|begin|>")):
        use_template(tokenizer, name)
        text = render(tokenizer, talk("q", "a", "q2", "a2", system="S"))
        assert text.startswith(f"{bos}S\n\n### Instruction:\nq") and text.count(bos) == 1
        assert text.count(tokenizer.eos_token) == 2
        for messages in (talk("q", "a") + [{"role": "tool", "content": "7"}], talk("q", "a") + talk(system="S")):
            with pytest.raises(jinja2.TemplateError, match="knows user, assistant and a leading system message"):
                render(tokenizer, messages)


def test_use_template(letters, tmp_path):
    letters.chat_template = None
    assert use_template(letters, "") == ("alpaca", "\n\n### Input:\n")
    assert use_template(letters, "vigogne") == ("vigogne", "\n\n### Entrée:\n")
    assert use_template(letters, "chatml") == ("chatml", "\n")
    path = write(tmp_path / "mine.jinja", '{% set input_separator = "\\t\\"x\\" " %}{{ messages }}')
    assert use_template(letters, str(path)) == (str(path), '\t"x" ')
    letters.chat_template = own = "{{ messages[0].content }}"
    assert use_template(letters, "") == ("the tokenizer's own", "\n") and letters.chat_template == own
    letters.chat_template = {"default": own, "tool_use": own}
    assert "several chat templates" in said(use_template, letters, "")
    assert use_template(letters, "chatml")[0] == "chatml"
    message = said(use_template, letters, "alpacca")
    assert "--prompt_template alpacca: no such template" in message and "alpaca, alpaca_short, chatml" in message
    assert "no such template" in said(use_template, letters, str(tmp_path / "none.jinja"))


def test_a_template_that_came_with_the_tokenizer_has_its_own_name(letters):
    use_template(letters, "vigogne")
    assert use_template(letters, "")[0] != "alpaca"


TURN = "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' }}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def loop(turn, ask=ASK):
    return "{% for message in messages %}" + turn + "{% endfor %}" + ask


@pytest.mark.parametrize(
    "template, message",
    [
        (loop("{{ message.role }}: {{ message.contents }}<|im_end|>"), "the chat template drops the prompt"),
        ("{{ messages[0].content }}<|im_end|>", "the chat template drops the answer"),
        (loop("{{ message.role + ': ' + message.content + '\n' }}"), "never learn to stop"),
        (loop("{{ message.role + ': ' + message.content + '</s>' }}"), "never learn to stop"),  # no token of these
        (loop("{{ message.content + nothing.here }}"), "the chat template does not render"),
        (loop("{{ raise_exception('not today') }}"), "the chat template does not render: not today"),
        ("{{ bos_token + bos_token }}" + loop(TURN), "starts with two BOS tokens"),
    ],
)
def test_templates_that_cannot_teach_are_refused(bpe, template, message):
    bpe.chat_template = template
    text = said(check_template, bpe, add_eos_token=True)
    assert text.startswith("--prompt_template: ") and message in text


def test_the_token_that_ends_an_answer(letters):
    for name in TEMPLATES:
        use_template(letters, name)
        assert end_of_turn(letters) == (END[name], SPECIAL.index(END[name]))
        assert check_template(letters, add_eos_token=True) == end_of_turn(letters)
    letters.chat_template = loop("{{ message.content + '\n<|im_end|><|endoftext|>' }}")  # the first of them
    assert end_of_turn(letters) == ("<|im_end|>", 2)
    letters.chat_template = loop("{{ message.content + '\n' }}")
    assert end_of_turn(letters) == ("", None) == check_template(letters, add_eos_token=False)


def test_white_space_ends_no_answer():
    tokenizer = make_letters()
    tokenizer.add_tokens([AddedToken("\n", normalized=False)])
    tokenizer.chat_template = loop("{{ message.role + ': ' + message.content + '\n' }}", "")
    assert end_of_turn(tokenizer) == ("", None)


# -----------------------------------------------------------------------------
# token ids and what is learned of them


def runs(learned):
    """Return the (start, stop) of each run of learned tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], learned.astype(int), [0]])))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def serve(tokenizer, messages, ask):
    """Return the ids that vLLM and `transformers serve` compute."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=ask, tokenize=True, return_dict=False)


def assert_as_served(tokenizer, messages, apart=False):
    """Check that one example holds every answer of the conversation, each after the ids that a server asks with.

    `apart` for an answer that would merge with its prompt if the text were tokenized whole.
    """
    examples, counts = encode([messages], tokenizer)
    assert len(examples) == 1 and counts["left_out"] == counts["cut"] == 0
    (ids, learned), answers = examples[0], [k for k, m in enumerate(messages) if m["role"] == "assistant"]
    assert ids.dtype == np.int32 and learned.dtype == bool and ids.shape == learned.shape
    end = end_of_turn(tokenizer)[1]
    assert len(runs(learned)) == len(answers)
    for (start, stop), k in zip(runs(learned), answers, strict=True):
        assert ids[:start].tolist() == serve(tokenizer, messages[:k], ask=True)
        assert ids[stop - 1] == end and (ids[start:stop] == end).sum() == 1
        if not apart:  # and goes on as the template tells it
            assert ids[:stop].tolist() == serve(tokenizer, messages[: k + 1], ask=False)[:stop]
        said = tokenizer.decode(ids[start : stop - 1])
        assert said == messages[k]["content"] or "▁" in tokenizer.get_vocab() and " " + said == messages[k]["content"]
    bos = tokenizer.bos_token
    if bos:
        assert (ids == tokenizer.bos_token_id).sum() == (bos in render(tokenizer, messages))
    return ids, learned, counts


FITS = [(kind, name) for kind in ("bpe", "llama") for name in TEMPLATES if (kind, name) != ("llama", "chatml")]


@pytest.mark.parametrize("tokenizer, name", FITS, indirect=["tokenizer"])
def test_training_sees_what_serving_sees(tokenizer, name):
    _, separator = use_template(tokenizer, name)
    merges = isinstance(tokenizer, PreTrainedTokenizerFast) and not isinstance(tokenizer, LlamaTokenizer)
    for kind, answer in ANSWERS.items():
        for question in ("Add 12 and 30.", separator.join(["Add.", " 12 and 30 😀"]), "别", ""):
            apart = merges and kind in ("newline", "newlines")
            *_, counts = assert_as_served(tokenizer, talk(question, answer), apart)
            assert counts["empty"] == (kind == "empty")
    several = [answer for kind, answer in ANSWERS.items() if not kind.startswith("newline")]
    turns = [turn for answer in several for turn in ("And now? ", answer)]
    assert_as_served(tokenizer, talk(*turns, system="Be brief.\n"))
    assert_as_served(tokenizer, talk(*turns))


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("answer", ["ok.", "😀é", "", " a\n"])
def test_ids_and_labels_by_hand(letters, name, answer):
    use_template(letters, name)
    prompt, end = PROMPTS[name][0].format(instruction="q"), END[name]
    (ids, learned), counts = only(encode([talk("q", answer)], letters))
    asked, answered = spell(letters, prompt), spell(letters, answer + end)
    assert ids.tolist() == asked + answered
    assert learned.tolist() == [False] * len(asked) + [True] * len(answered)
    assert counts == {"conversations": 1, "examples": 1, "cut": 0, "left_out": 0, "empty": int(not answer)}


def only(result):
    """Return the only example and the counts of what `encode` returned."""
    (example,), counts = result
    return example, counts


def test_several_turns_by_hand(letters):
    use_template(letters, "chatml")
    (ids, learned), _ = only(encode([talk("q", "a", "r", "", system="S")], letters))
    parts = [
        ("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", False),
        ("a<|im_end|>", True),
        ("\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n", False),
        ("<|im_end|>", True),
    ]
    assert ids.tolist() == spell(letters, "".join(text for text, _ in parts))
    assert learned.tolist() == [flag for text, flag in parts for _ in spell(letters, text)]


def test_learning_the_prompts_too(letters):
    use_template(letters, "chatml")
    for answer in ("a", "\na"):
        (ids, learned), _ = only(encode([talk("q", answer)], letters, train_on_inputs=True))
        assert len(ids) > 20 and learned.all()


def test_without_the_end_token(letters):
    use_template(letters, "chatml")
    (ids, learned), _ = only(encode([talk("q", "a😀", "r", "b")], letters, add_eos_token=False))
    (same, with_end), _ = only(encode([talk("q", "a😀", "r", "b")], letters))
    assert ids.tolist() == same.tolist()
    assert (with_end & ~learned).sum() == 2 and set(ids[with_end & ~learned]) == {2} and not (learned & ~with_end).any()
    letters.chat_template = loop("{{ message.role + ':' + message.content + '\n' }}", "{{ 'assistant:' }}").replace(
        "{{ 'assistant:' }}", "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    (ids, learned), counts = only(encode([talk("q", "é")], letters, add_eos_token=False))
    assert ids.tolist() == spell(letters, "user:q\nassistant:é\n") and counts["empty"] == 0
    assert runs(learned) == [(len(spell(letters, "user:q\nassistant:")), len(ids))]


def test_without_the_end_token_but_with_the_prompts(letters):
    use_template(letters, "chatml")
    (ids, learned), _ = only(encode([talk("q", "a")], letters, train_on_inputs=True, add_eos_token=False))
    assert not learned[-1] and ids[-1] == 2


def test_an_answer_that_merges_with_its_prompt_is_tokenized_apart(letters):
    use_template(letters, "chatml")
    examples, counts = encode([talk("q", "\n\nb"), talk("q", "b\n")], letters)
    prompt = spell(letters, "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n")
    vocab = letters.get_vocab()
    ids, learned = examples[0]
    # together the three newlines would be ĊĊ Ċ; a server has asked with Ċ, and the answer is ĊĊ b
    assert ids.tolist() == prompt + [vocab["ĊĊ"], vocab["b"], 2]
    assert learned.tolist() == [False] * len(prompt) + [True] * 3
    assert counts["examples"] == 2


def test_the_turn_after_an_answer_that_merges(letters):
    use_template(letters, "chatml")
    messages = talk("q", "\nb", "r", "c")
    ids, learned = encode([messages], letters)[0][-1]
    assert ids[: runs(learned)[-1][0]].tolist() == serve(letters, messages[:3], ask=True)


def test_a_prompt_that_is_split_otherwise_before_an_answer():
    """GPT-2 reads two newlines as one token at the end of a text and as two before a word: a server asks with one."""
    tokenizer = make_letters(split=None)
    tokenizer.chat_template = loop(TURN, "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}")
    tokenizer.chat_template = tokenizer.chat_template.replace("message.role + '\n'", "message.role + '\n\n'")
    assert_as_served(tokenizer, talk("q", "a"), apart=True)
    ids, learned, _ = assert_as_served(tokenizer, talk("q", "\nab"), apart=True)
    assert ids[learned].tolist() == spell(tokenizer, "\nab<|im_end|>")


def test_a_generation_prompt_that_ends_in_a_space(llama, bpe):
    turn = "{{ message.role + ': ' + message.content + eos_token + '\n' }}"
    ask = "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    llama.chat_template = bpe.chat_template = loop(turn, ask)
    message = said(encode, [talk("q", "is the sum")], llama)
    assert "ends in" in message and "which this tokenizer merges with the answer" in message
    (ids, learned), counts = only(encode([talk("q", "is the sum")], bpe))
    assert counts["examples"] == 1 and bpe.decode(ids[learned]) == "is the sum<|endoftext|>"
    assert ids[: runs(learned)[0][0]].tolist() == serve(bpe, talk("q"), ask=True)


def test_the_message_shows_where_the_generation_prompt_ends(llama):
    ask = "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    llama.chat_template = loop("{{ message.role + ': ' + message.content + eos_token + '\n' }}", ask)
    assert "assistant: ', which" in said(encode, [talk("q", "is the sum")], llama)


def test_a_generation_prompt_that_ends_in_a_space_before_a_tokenizer_that_adds_one():
    tokenizer = make_letters(merges=(("Ġ", "a"),))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    ask = "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    tokenizer.chat_template = loop("{{ message.role + ': ' + message.content + eos_token }}", ask)
    assert "which this tokenizer merges with the answer" in said(encode, [talk("q", "a")], tokenizer)


def test_templates_that_ask_whether_tools_are_none(letters):
    letters.chat_template = "{% if tools is not none or documents is not none %}tools{% endif %}" + loop(TURN)
    assert_as_served(letters, talk("q", "a"))


def test_several_turns_without_an_end_token(letters):
    ask = "{% if add_generation_prompt %}{{ '\nassistant:' }}{% endif %}"
    letters.chat_template = loop("{{ '\n' + message.role + ':' + message.content }}", ask)
    messages = talk("q", "a\n", "r", "b")
    ids, learned = encode([messages], letters, add_eos_token=False)[0][-1]
    assert ids[: runs(learned)[-1][0]].tolist() == serve(letters, messages[:3], ask=True)


def test_templates_that_do_not_continue_their_prompt_are_refused(letters):
    letters.chat_template = loop(
        TURN, "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>' }}{% endif %}"
    )
    message = said(encode, [talk("q", "a")], letters)
    assert "does not continue the prompt it asks with" in message and "<think>" in message


@pytest.mark.parametrize("train_on_inputs", [False, True])
def test_cutoff(letters, train_on_inputs):
    use_template(letters, "chatml")
    prompt = len(spell(letters, "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"))
    for room, cut, learned_tokens in [(4, 0, 4), (3, 1, 3), (1, 1, 1), (0, 1, 0), (-1, 1, 0)]:
        examples, counts = encode([talk("q", "abc")], letters, train_on_inputs, cutoff_len=prompt + room)
        assert counts["cut"] == cut and counts["conversations"] == 1
        if learned_tokens:  # an example of a prompt alone is left out, even if prompts are learned
            ((ids, learned),) = examples
            assert len(ids) == prompt + room and counts["left_out"] == 0 and counts["examples"] == 1
            assert learned[prompt:].sum() == learned_tokens and learned[:prompt].all() == train_on_inputs
            assert (ids[-1] == 2) == (room == 4)
        else:
            assert examples == [] and counts["left_out"] == 1 and counts["examples"] == 0


def test_cutoff_between_turns_keeps_the_first_answer(letters):
    use_template(letters, "chatml")
    whole = encode([talk("q", "a", "long question", "b")], letters)[0][0]
    (ids, learned), counts = only(
        encode([talk("q", "a", "long question", "b")], letters, cutoff_len=len(whole[0]) - 10)
    )
    assert ids.tolist() == whole[0][:-10].tolist() and learned.sum() == 2 and counts["cut"] == 1


def test_templates_that_forget_old_reasoning_give_an_example_per_turn(bpe):
    """Qwen3's way: what an earlier answer thought is left out as soon as a later question is there."""
    turn = (
        "{% set content = message.content %}"
        "{% if message.role == 'assistant' and not loop.last %}"
        "{% set content = content.split('</think>')[-1] %}{% endif %}"
        "{{ '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}"
    )
    bpe.chat_template = loop(turn)
    thoughtful = talk("q", "<think>one</think>first", "r", "<think>two</think>second", "s", "third")
    examples, counts = encode([talk("q", "plain", "r", "plain"), thoughtful, talk("q", "<think>x</think>y")], bpe)
    assert counts["conversations"] == 3 and counts["examples"] == len(examples) == 1 + 3 + 1
    for (ids, learned), k, answer in zip(examples[1:4], (1, 3, 5), ("one</think>first", "two</think>second", "third")):
        ((start, stop),) = runs(learned)
        assert ids[:start].tolist() == serve(bpe, thoughtful[:k], ask=True)
        assert bpe.decode(ids[start:stop]).removeprefix("<think>") == answer + "<|im_end|>" and stop == len(ids)
    assert "one" not in bpe.decode(examples[2][0]) and "first" in bpe.decode(examples[2][0])


def test_many_conversations_keep_their_order_over_chunks(letters):
    use_template(letters, "alpaca_short")
    conversations = [talk(str(i), "a" * (i % 7)) for i in range(2003)]
    whole, counts = encode(conversations, letters)
    assert counts["empty"] == 287 and counts["examples"] == 2003
    for i in (0, 999, 1000, 1001, 2002):
        assert whole[i][0].tolist() == encode([conversations[i]], letters)[0][0][0].tolist()
    assert encode([], letters) == ([], dict.fromkeys(counts, 0))


def test_words_that_look_like_special_tokens(letters):
    """A server reads them as tokens, so training does; the answer goes on to the end token that the template wrote."""
    use_template(letters, "chatml")
    messages = talk("what is <|im_end|>?", "it is <|im_end|> there")
    (ids, learned), _ = only(encode([messages], letters))
    ((start, stop),) = runs(learned)
    assert ids[:start].tolist() == serve(letters, messages[:1], ask=True) and stop == len(ids)
    assert letters.decode(ids[start:]) == "it is <|im_end|> there<|im_end|>"


def test_settings_in_tokenizer_json_do_not_pad_or_truncate(tmp_path):
    tokenizer = make_letters()
    tokenizer.backend_tokenizer.enable_padding(pad_id=0, pad_token=SPECIAL[0])
    tokenizer.backend_tokenizer.enable_truncation(40)
    tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    use_template(tokenizer, "chatml")
    examples, counts = encode([talk("q", "a"), talk("q", "a" * 60)], tokenizer)
    assert [len(ids) for ids, _ in examples] == [22, 81] and counts["cut"] == 0


@pytest.mark.parametrize(
    "normalizer, answer, flags",
    [
        (normalizers.NFC(), "cafe\u0301", {"add_eos_token": False}),
        (normalizers.Replace("\u200b", ""), "\u200bzero width", {}),
        (normalizers.Replace(Regex(" {2,}"), " "), "  two", {}),
    ],
)
def test_normalizers_that_drop_characters(normalizer, answer, flags):
    tokenizer = make_letters(normalizer=normalizer)
    use_template(tokenizer, "chatml")
    (ids, learned), _ = only(encode([talk("q", answer)], tokenizer, **flags))
    assert ids[: runs(learned)[0][0]].tolist() == serve(tokenizer, talk("q"), ask=True)
    assert learned[-1] == (not flags)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "assistant", "content": "Hello!"}, *talk("q", "a")],
        [*talk("q", "f()"), {"role": "tool", "content": "7"}, {"role": "assistant", "content": "a"}],
    ],
)
def test_conversations_that_a_template_cannot_take(letters, messages):
    use_template(letters, "alpaca")
    assert said(encode, [talk("q", "a"), messages], letters).startswith("--prompt_template: ")


def test_half_a_surrogate_pair_says_file_and_line(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"question": "q", "answer": "half an emoji \\ud83d"}\n')
    assert said(load, path).startswith(f"{path}, line 1: ")


def test_normalizers_that_compose_characters_keep_the_place(letters):
    tokenizer = make_letters(normalizer=normalizers.NFC())
    use_template(tokenizer, "chatml")
    (ids, learned), _ = only(encode([talk("cafe\u0301", "e\u0301t\u00e9")], tokenizer))
    prompt = spell(tokenizer, "<|im_start|>user\ncaf\u00e9<|im_end|>\n<|im_start|>assistant\n")
    assert ids.tolist() == prompt + spell(tokenizer, "\u00e9t\u00e9<|im_end|>")
    assert runs(learned) == [(len(prompt), len(ids))]


# -----------------------------------------------------------------------------
# examples and batches


def test_examples_on_disk(tmp_path):
    pairs = [([5, 6, 7], [True, False, True]), ([8, 9], [False, True])]
    Examples.save(tmp_path / "train", [(np.array(ids, np.int32), np.array(mask)) for ids, mask in pairs])
    examples = Examples(tmp_path / "train")
    assert len(examples) == 2 and examples.lengths().tolist() == [3, 2]
    assert {name: tensor.tolist() for name, tensor in examples[0].items()} == {
        "input_ids": [5, 6, 7],
        "labels": [IGNORE, IGNORE, 7],  # nothing predicts the first token, learned or not
    }
    assert examples[1]["labels"].tolist() == [IGNORE, 9] and examples[1]["input_ids"].dtype == torch.int64
    Examples.save(tmp_path / "other", [(np.array(ids, np.int32), np.array(mask)) for ids, mask in pairs[::-1]])
    assert len(examples.sha256()) == 64 and examples.sha256() != Examples(tmp_path / "other").sha256()
    Examples.save(tmp_path / "none", [])
    assert len(Examples(tmp_path / "none")) == 0


def steps_of(lengths, batch_size, micro, ranks, epoch=0, seed=0, group_by_length=False, packing=True):
    """Return the steps of an epoch: steps[s][rank] lists the micro-batches of that rank."""
    each = []
    for rank in range(ranks):
        batches = MicroBatches(lengths, batch_size, micro, rank, ranks, seed, group_by_length, packing)
        batches.set_epoch(epoch)
        each.append(list(batches))
        assert len(each[-1]) == len(batches)
    assert len({len(batches) for batches in each}) == 1
    at_once = batch_size // micro // ranks
    return [[batches[i : i + at_once] for batches in each] for i in range(0, len(each[0]), at_once)]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("group_by_length", [True, False])
@pytest.mark.parametrize("count", [1, 7, 8, 37, 900])
def test_a_step_has_the_same_examples_however_it_is_split(count, group_by_length, packing):
    lengths = np.random.default_rng(count).integers(2, 100, count)
    seen = {}
    for micro in (1, 2, 4, 8):
        for ranks in (1, 2, 4):
            if 8 % (micro * ranks):
                continue
            steps = steps_of(lengths, 8, micro, ranks, 1, 0, group_by_length, packing)
            assert len(steps) == math.ceil(count / 8)
            micro_batches = [part for step in steps for parts in step for part in parts]
            assert max(map(len, micro_batches)) <= micro
            seen[micro, ranks] = [sorted(i for parts in step for part in parts for i in part) for step in steps]
    assert len(seen) == 9
    one = seen[1, 1]
    assert all(other == one for other in seen.values())
    assert [len(step) for step in one] == [8] * (count // 8) + [count % 8] * (count % 8 > 0)
    assert sorted(i for step in one for i in step) == list(range(count))


def test_epochs_differ_and_seeds_do_and_one_repeats():
    lengths = np.full(64, 10)
    order = lambda **kwargs: [i for step in steps_of(lengths, 8, 8, 1, **kwargs) for i in step[0][0]]
    assert order() == order() == order(epoch=0) and order() != list(range(64))
    assert len({tuple(order(epoch=e, seed=s)) for e in range(3) for s in range(3)}) == 9


def test_packed_micro_batches_have_about_equally_many_tokens():
    lengths = np.random.default_rng(0).integers(2, 1000, 640)
    for (step,) in steps_of(lengths, 64, 8, 1):
        tokens = [lengths[part].sum() for part in step]
        assert max(tokens) - min(tokens) <= lengths[sum(step, [])].max()
        assert max(tokens) < 1.3 * min(tokens)
    hand = np.array([1, 8, 2, 7, 3, 6, 4, 5])  # sorted: 8 7 6 5 4 3 2 1, dealt out in turn
    assert steps_of(hand, 8, 2, 2) == [[[[1, 6], [5, 2]], [[3, 4], [7, 0]]]]


def test_padded_micro_batches_have_like_lengths():
    hand = np.array([1, 8, 2, 7, 3, 6, 4, 5])
    assert steps_of(hand, 8, 2, 2, packing=False) == [[[[1, 3], [6, 4]], [[5, 7], [2, 0]]]]


def test_group_by_length_makes_steps_of_like_length():
    lengths = np.random.default_rng(0).permutation(np.arange(2, 403))  # 401: 51 steps of 8, the last with one
    spread = lambda grouped: [
        np.ptp(lengths[[i for part in step[0] for i in part]]) for step in steps_of(lengths, 8, 8, 1, 0, 0, grouped)
    ]
    # a pool is 50 steps: all lengths but the one that is left for the last step, which may lie between them
    assert max(spread(True)[:-1]) <= 8 and spread(True)[-1] == 0
    assert np.mean(spread(False)) > 200
    longest = [max(lengths[step[0][0]]) for step in steps_of(lengths, 8, 8, 1, 0, 0, True)]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


def example(ids, learned):
    ids = torch.tensor(ids)
    return {"input_ids": ids, "labels": torch.where(torch.tensor(learned, dtype=torch.bool), ids, IGNORE)}


def test_pack_by_hand():
    batch = pack([example([5, 6, 7], [0, 1, 1]), example([8, 9], [0, 1]), example([1, 2, 3, 4], [0, 0, 1, 0])])
    assert {name: value if isinstance(value, int) else value.tolist() for name, value in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9, 1, 2, 3, 4]],
        "position_ids": [[0, 1, 2, 0, 1, 0, 1, 2, 3]],
        "labels": [[IGNORE, 6, 7, IGNORE, 9, IGNORE, IGNORE, 3, IGNORE]],
        "cu_seq_lens": [0, 3, 5, 9],
        "max_length": 4,
        "positions": [0, 1, 3, 6],  # of the tokens 5, 6, 8 and 2, that predict 6, 7, 9 and 3
        "targets": [6, 7, 9, 3],
    }
    assert batch["cu_seq_lens"].dtype == torch.int32 and batch["targets"].dtype == torch.int64


def test_no_target_is_predicted_from_another_example(tmp_path):
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(0, 50, n).astype(np.int32), np.ones(n, bool)) for n in rng.integers(2, 9, 20)]
    Examples.save(tmp_path, pairs)  # everything learned, the first tokens too
    examples = Examples(tmp_path)
    batch = pack([examples[i] for i in range(20)])
    ends = set((batch["cu_seq_lens"][1:] - 1).tolist())
    assert not ends & set(batch["positions"].tolist())
    assert len(batch["targets"]) == sum(len(ids) - 1 for ids, _ in pairs)


def test_pack_and_pad_of_no_examples_have_no_label():
    batch = pack([])
    assert batch["input_ids"].shape == (1, 2) and batch["cu_seq_lens"].tolist() == [0, 2] and batch["max_length"] == 2
    assert batch["positions"].tolist() == batch["targets"].tolist() == [] and (batch["labels"] == IGNORE).all()
    assert batch["targets"].dtype == torch.int64
    batch = pad([], 9)
    assert batch["input_ids"].tolist() == [[9, 9]] and batch["labels"].tolist() == [[IGNORE, IGNORE]]


def test_pad_by_hand():
    batch = pad([example([5, 6], [0, 1]), example([7, 9, 9, 8], [0, 1, 0, 1])], pad_id=9)
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[5, 6, 9, 9], [7, 9, 9, 8]],
        "attention_mask": [[1, 1, 0, 0], [1, 1, 1, 1]],  # by place: the pad id may be a word as well
        "labels": [[IGNORE, 6, IGNORE, IGNORE], [IGNORE, 9, IGNORE, 8]],
    }


def test_a_share_that_rounds_to_no_row_trains_without_validation(tmp_path):
    write(tmp_path / "a.jsonl", ROWS)
    result = finetune.train(data_path=str(tmp_path / "a.jsonl"), output_dir=str(tmp_path / "out"), max_steps=3)
    assert result["run"]["status"] == "finished"


# -----------------------------------------------------------------------------
# tokenizing by word and in several processes


def test_tokenizing_by_word_gives_the_tokenizers_own_ids(bpe):
    backend = bpe.backend_tokenizer
    to_ids = finetune.tokenize_by_word(backend)
    assert to_ids.__code__.co_names == () or "by_word" in to_ids.__code__.co_freevars  # not the fallback
    rng = random.Random(0)
    alphabet = ["a", "B", "the", " ", "  ", "\n", "\t", "é", "e\u0301", "中", "🙂", "1", "234", "'s", ".", "-", "_"]
    alphabet += [
        "<|im_end|>",
        "<|endoftext|>",
        "\u00a0",
        "Say",
        " says",
        "don't",
        "\r\n",
        "#",
        "=",
        " (",
        "<b>",
        "$",
        "'",
        " 7",
    ]
    texts = ["".join(rng.choices(alphabet, k=rng.randint(0, 40))) for _ in range(2000)]
    texts += [" ".join(rng.choices(["one", "two", "Three", "x"], k=9)) for _ in range(200)]
    assert to_ids(texts) == [backend.encode(text, add_special_tokens=False).ids for text in texts]


def test_a_tokenizer_that_joins_words_is_called_on_whole_texts():
    from tokenizers import Tokenizer, models

    letters = {c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyzTBF ")}
    merges = [("g", " "), (" ", "b")]  # "g b" does not stay apart
    vocab = letters | {"g ": 40, " b": 41}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    to_ids = finetune.tokenize_by_word(backend)
    assert to_ids(["ring bell"]) == [backend.encode("ring bell").ids]
    assert backend.encode("ring bell").ids != backend.encode("ring").ids + backend.encode(" bell").ids


def test_several_processes_make_the_same_examples_in_the_same_order(bpe):
    finetune.use_template(bpe, "alpaca")
    conversations = [talk(f"Say {i}", "yes " * (i % 7)) for i in range(2500)]
    alone, counts = finetune.encode(conversations, bpe, cutoff_len=60, workers=1)
    shared, shared_counts = finetune.encode(conversations, bpe, cutoff_len=60, workers=2)
    assert counts == shared_counts and len(alone) == len(shared)
    for (ids, learned), (other_ids, other_learned) in zip(alone, shared):
        assert ids.tolist() == other_ids.tolist() and learned.tolist() == other_learned.tolist()
    with pytest.raises(ValueError, match="cannot render") as error:
        finetune.encode([*conversations, [{"role": "tool", "content": "x"}, *talk("a", "b")]], bpe, workers=2)
    assert error.value.__cause__ is None
