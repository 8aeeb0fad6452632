"""
finetune.py, from a row to a batch: chat templates, token ids and labels, micro-batches, packed rows.

    .venv/bin/python -m pytest tests/test_encode.py

Expected values are written out by hand, on a tokenizer whose tokens are single bytes. The property that matters is
tested on trained tokenizers as well: the ids before an answer are what a server computes for the same conversation.
Every other form of data: tests/test_prepare.py.
"""

import json
import math

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

from finetune import IGNORE, MicroBatches, encode, end_of_answers, load_rows, pack, to_messages, use_template

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


def said(function, *args, **kwargs):
    """Return the message of the ValueError that a call raises."""
    with pytest.raises(ValueError) as error:
        function(*args, **kwargs)
    return str(error.value)


# -----------------------------------------------------------------------------
# rows

ROWS = [{"instruction": "Ask – 1", "output": "A\n1"}, {"instruction": "Ask, 2", "output": '"\u2028"'}]
CSV = 'instruction,output\nAsk – 1,"A\n1"\n"Ask, 2","""\u2028"""\n'


def jsonl(rows, end="\n"):
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.json", json.dumps(ROWS)),
        ("a.jsonl", jsonl(ROWS)),
        ("windows.jsonl", "\r\n" + jsonl(ROWS, end="\r\n\r\n")),
        ("a.csv", CSV),
        ("bom.json", "\ufeff" + json.dumps(ROWS)),
        ("bom.jsonl", "\ufeff" + jsonl(ROWS)),
        ("bom.csv", "\ufeff" + CSV),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    assert load_rows(str(tmp_path / name)) == ROWS


def test_parquet_and_hub_rows(tmp_path, monkeypatch):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert load_rows(str(tmp_path / "a.parquet")) == ROWS
    asked = []
    hub = lambda *args, **kwargs: asked.append((args, kwargs)) or datasets.Dataset.from_list(ROWS)
    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert load_rows("owner/name") == ROWS and asked == [(("owner/name",), {"split": "train"})]


def test_values_are_the_texts_that_are_written_there(tmp_path):
    """What reading csv by guessing types would change."""
    path = tmp_path / "a.csv"
    path.write_text("question,answer\n007,2024-01-31\nNA,1.0\n" + "q," + "a" * 140_000 + "\n")
    rows = [("007", "2024-01-31"), ("NA", "1.0"), ("q", "a" * 140_000)]
    assert load_rows(str(path)) == [{"question": question, "answer": answer} for question, answer in rows]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", "", ": no rows in it"),
        ("a.jsonl", "\n \n", ": no rows in it"),
        ("a.json", "[]", ": no rows in it"),
        ("a.json", '{"question": "q", "answer": "a"}', ": no rows in it"),
        ("a.csv", "question,answer\n", ": no rows in it"),
        ("a.csv", 'question,answer\nq,a\nq,"a\nq,a\n', ", row 2: cannot be read: unexpected end of data"),
        ("a.csv", 'question,answer\nq,a\n"q" or,a\n', ", row 2: cannot be read: ',' expected after"),
        ("a.json", "", ", row 1: cannot be read: Expecting value"),
        ("a.json", "[" * 100_000, ", row 1: cannot be read: maximum recursion depth"),
        ("a.jsonl", '\n{"a": 1}\n\n{"a": }\n', ", row 2: cannot be read: Expecting value"),
        ("a.jsonl", '{"question": "é"}'.encode("latin-1"), ": cannot be read: 'utf-8' codec"),
        ("a.parquet", "PAR1 and then nothing of the kind", ": cannot be read: "),
        ("a.txt", "text", "neither json, jsonl, csv nor parquet: python data/prepare.py reads folders and more"),
        ("folder", None, "neither json, jsonl, csv nor parquet: python data/prepare.py reads folders and more"),
    ],
)
def test_unreadable_files_say_what_is_wrong(tmp_path, name, content, message):
    path = tmp_path / name
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    text = said(load_rows, str(path))
    assert text.startswith(str(path)) and message in text


def test_a_hub_that_does_not_answer(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise RuntimeError("Couldn't reach it")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert said(load_rows, "owner/name") == "owner/name, row 1: cannot be read: Couldn't reach it"


@pytest.mark.parametrize("source", ["nowhere", "a/b/c", "data/none", "tests/none.jsonl", "./owner/name"])
def test_a_mistyped_path_never_asks_the_hub(monkeypatch, source):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("asked the hub"))
    assert said(load_rows, source).startswith(f"{source}: no such file or folder, and no id of the hub (owner/name)")


OPENAI = [{"role": "system", "content": "S"}, *talk("q", "f()"), {"role": "tool", "content": "7"}, *talk("r", "a")]
NAMES = {"system": "system", "user": "human", "assistant": "gpt", "tool": "tool"}
SHAREGPT = [{"from": NAMES[turn["role"]], "value": turn["content"]} for turn in OPENAI]
FORMS = {
    "alpaca": ({"instruction": "q", "output": "a"}, talk("q", "a")),
    "alpaca empty input": ({"instruction": "q", "input": "", "output": "a"}, talk("q", "a")),
    "alpaca null input": ({"instruction": "q", "input": None, "output": ""}, talk("q", "")),
    "alpaca input": ({"instruction": "q", "input": "x", "output": "a"}, talk("q|x", "a")),
    "alpaca only input": ({"instruction": "", "input": "x", "output": "a"}, talk("x", "a")),
    "alpaca system": ({"instruction": "q", "output": "a", "system": "S"}, talk("q", "a", system="S")),
    "alpaca nulls": ({"instruction": "q", "output": "a", "system": None, "history": None}, talk("q", "a")),
    "alpaca no answer": ({"instruction": "q"}, talk("q")),
    "question": ({"question": "q", "answer": "a"}, talk("q", "a")),
    "question no answer": ({"question": "q", "answer": None}, talk("q")),
    "messages": ({"messages": OPENAI}, OPENAI),
    "conversations": ({"conversations": SHAREGPT}, OPENAI),
    "conversations as role and content": ({"conversations": OPENAI}, OPENAI),
    "conversations with a system column": ({"conversations": SHAREGPT[1:], "system": "S"}, OPENAI),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms(name):
    row, messages = FORMS[name]
    before = json.dumps(row)
    assert to_messages(row, separator="|") == messages
    assert json.dumps(row) == before


@pytest.mark.parametrize(
    "row",
    [
        {"text": "q"},
        ["q", "a"],
        "q",
        {"instruction": "q", "output": 7},
        {"instruction": "q", "output": ["a"]},
        {"instruction": "q", "input": 1, "output": "a"},
        {"instruction": None, "output": "a"},  # and no empty prompt
        {"instruction": None, "input": "q", "output": "a"},
        {"question": 0, "answer": "a"},
        {"instruction": "q", "output": "a", "history": [["q", "a"]]},
        {"question": "q", "answer": "a", None: ["surplus"]},  # a csv row with too many cells
        {"messages": "q"},
        {"messages": [None]},
        {"messages": []},
        {"messages": [OPENAI[0], {"role": "assistant", "content": "", "tool_calls": [{"type": "function"}]}]},
        {"messages": [OPENAI[1], {"role": "assistant", "content": "", "function_call": {"name": "f"}}]},
        {"messages": [{"role": "bot", "content": "a"}]},
        {"messages": [{"role": ["user"], "content": "q"}]},
        {"messages": [{"role": "user"}]},
        {"messages": OPENAI, "tools": "[]"},
        {"messages": OPENAI, "images": ["a.png"]},
        {"messages": OPENAI, "image": "a.png"},
        {"conversations": [{"from": "human", "value": None}]},
        {"conversations": [{"from": "function_call", "value": "f()"}]},
        {"prompt": [{"role": "user", "content": "q"}], "extra_info": {"answer": "a"}},
    ],
    ids=str,
)
def test_rows_of_other_forms_are_shown_and_sent_to_prepare(row):
    message = said(to_messages, row)
    assert repr(row)[:100] in message and "python data/prepare.py" in message


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
        messages = to_messages(row, separator)
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
    path = tmp_path / "mine.jinja"
    path.write_text('{% set input_separator = "\\t\\"x\\" " %}{{ messages }}')
    assert use_template(letters, str(path)) == (str(path), '\t"x" ')
    letters.chat_template = own = "{{ messages[0].content }}"
    assert use_template(letters, "") == ("the model's own", "\n") and letters.chat_template == own
    message = said(use_template, letters, "alpacca")
    assert "--prompt_template alpacca: no such template" in message
    assert "alpaca, alpaca_short, chatml, vigogne" in message
    assert "no such template" in said(use_template, letters, str(tmp_path / "none.jinja"))
    assert letters.chat_template == own


def test_a_template_that_came_with_the_tokenizer_keeps_its_separator(letters):
    use_template(letters, "vigogne")
    assert use_template(letters, "") == ("the model's own", "\n\n### Entrée:\n")


TURN = "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' }}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def loop(turn, ask=ASK):
    return "{% for message in messages %}" + turn + "{% endfor %}" + ask


@pytest.mark.parametrize(
    "template, message",
    [
        (loop("{{ message.role }}: {{ message.contents }}<|im_end|>"), "the chat template drops what was said"),
        ("{{ messages[0].content }}<|im_end|>", "the chat template drops what was said"),
        ("{{ messages[-1].content }}<|im_end|>", "the chat template drops what was said"),
        (loop("{{ message.role + ': ' + message.content + '\n' }}"), "never learn to stop"),
        (loop("{{ message.role + ': ' + message.content + '</s>' }}"), "never learn to stop"),  # no token of these
        (loop("<|im_end|>{{ message.role + ': ' + message.content }}", ""), "never learn to stop"),  # before it
    ],
)
def test_templates_that_cannot_teach_are_refused(bpe, template, message):
    bpe.chat_template = template
    text = said(end_of_answers, bpe)
    assert message in text and "it rendered " in text


def test_the_token_that_ends_an_answer(letters, llama):
    for name in TEMPLATES:
        use_template(letters, name)
        assert end_of_answers(letters) == END[name] == end_of_answers(letters, add_eos_token=False)
    use_template(llama, "alpaca")
    assert end_of_answers(llama) == "</s>"
    letters.chat_template = loop("{{ message.content + '\n<|im_end|><|endoftext|>' }}")  # the first of them
    assert end_of_answers(letters) == "<|im_end|>"
    letters.chat_template = loop("{{ message.content + '\n' }}", "")
    assert end_of_answers(letters, add_eos_token=False) == ""


def test_white_space_ends_no_answer():
    tokenizer = make_letters()
    tokenizer.add_tokens([AddedToken("\n", normalized=False)])
    tokenizer.chat_template = loop("{{ message.role + ': ' + message.content + '\n' }}", "")
    assert end_of_answers(tokenizer, add_eos_token=False) == ""


# -----------------------------------------------------------------------------
# token ids and what is learned of them


def serve(tokenizer, messages, ask):
    """Return the ids that vLLM and `transformers serve` compute."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=ask, tokenize=True, return_dict=False)


def encoded(messages, tokenizer, **flags):
    """Return what `encode` makes of a conversation as [(ids, learned)]: arrays, the second of booleans."""
    end = end_of_answers(tokenizer, flags.get("add_eos_token", True))
    examples = []
    for ids, labels in encode(messages, tokenizer, end, **flags):
        assert len(ids) == len(labels) and all(label in (IGNORE, token) for token, label in zip(ids, labels))
        examples.append((np.array(ids), np.array(labels) != IGNORE))
    return examples


def runs(learned):
    """Return the (start, stop) of each run of learned tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], learned.astype(int), [0]])))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def assert_as_served(tokenizer, messages):
    """Check that one example holds every answer of the conversation, each after the ids that a server asks with."""
    ((ids, learned),) = encoded(messages, tokenizer)
    answers = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    end = tokenizer.convert_tokens_to_ids(end_of_answers(tokenizer))
    for (start, stop), k in zip(runs(learned), answers, strict=True):
        assert ids[:start].tolist() == serve(tokenizer, messages[:k], ask=True)
        assert ids[:stop].tolist() == serve(tokenizer, messages[: k + 1], ask=False)[:stop]
        assert ids[stop - 1] == end and (ids[start:stop] == end).sum() == 1
        said = tokenizer.decode(ids[start : stop - 1])
        assert said == messages[k]["content"] or "▁" in tokenizer.get_vocab() and " " + said == messages[k]["content"]
    assert stop == len(ids)  # and nothing after the last answer
    if tokenizer.bos_token:
        assert (ids == tokenizer.bos_token_id).sum() == (tokenizer.bos_token in render(tokenizer, messages))


FITS = [(kind, name) for kind in ("bpe", "llama") for name in TEMPLATES if (kind, name) != ("llama", "chatml")]


@pytest.mark.parametrize("tokenizer, name", FITS, indirect=["tokenizer"])
def test_training_sees_what_serving_sees(tokenizer, name):
    _, separator = use_template(tokenizer, name)
    merges = {"newline", "newlines"} if tokenizer.bos_token == "<|begin|>" else set()  # SentencePiece's are bytes
    for kind, answer in ANSWERS.items():
        for question in ("Add 12 and 30.", separator.join(["Add.", " 12 and 30 😀"]), "别", "```\n  def f():\n", ""):
            messages = talk(question, answer)
            if kind in merges:
                assert "the answer merges with it into other tokens" in said(encoded, messages, tokenizer)
            else:
                assert_as_served(tokenizer, messages)
    turns = [turn for kind, answer in ANSWERS.items() if kind not in merges for turn in ("And now? ", answer)]
    assert_as_served(tokenizer, talk(*turns, system="Be brief.\n"))
    assert_as_served(tokenizer, talk(*turns))


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("answer", ["ok.", "😀é", "", " a\n"])
def test_ids_and_labels_by_hand(letters, name, answer):
    use_template(letters, name)
    ((ids, learned),) = encoded(talk("q", answer), letters)
    asked = spell(letters, PROMPTS[name][0].format(instruction="q"))
    answered = spell(letters, answer + END[name])
    assert ids.tolist() == asked + answered
    assert learned.tolist() == [False] * len(asked) + [True] * len(answered)


def test_several_turns_by_hand(letters):
    use_template(letters, "chatml")
    ((ids, learned),) = encoded(talk("q", "a", "r", "", system="S"), letters)
    parts = [
        ("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", False),
        ("a<|im_end|>", True),
        ("\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n", False),
        ("<|im_end|>", True),
    ]
    assert ids.tolist() == spell(letters, "".join(text for text, _ in parts))
    assert learned.tolist() == [flag for text, flag in parts for _ in spell(letters, text)]


def test_what_is_returned_are_plain_lists(letters):
    use_template(letters, "chatml")
    ((ids, labels),) = encode(talk("q", "a"), letters, "<|im_end|>")
    prompt = spell(letters, "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n")
    assert ids == prompt + spell(letters, "a<|im_end|>")
    assert labels == [IGNORE] * len(prompt) + spell(letters, "a<|im_end|>")


def test_learning_the_prompts_too(letters):
    use_template(letters, "chatml")
    ((ids, learned),) = encoded(talk("q", "a", "r", "b"), letters, train_on_inputs=True)
    ((same, _),) = encoded(talk("q", "a", "r", "b"), letters)
    assert ids.tolist() == same.tolist() and learned.all()


def test_without_the_end_token(letters):
    use_template(letters, "chatml")
    ((ids, learned),) = encoded(talk("q", "a😀", "r", "b"), letters, add_eos_token=False)
    ((same, with_end),) = encoded(talk("q", "a😀", "r", "b"), letters)
    assert ids.tolist() == same.tolist()
    assert (with_end & ~learned).sum() == 2 and set(ids[with_end & ~learned]) == {2} and not (learned & ~with_end).any()
    ask = "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    letters.chat_template = loop("{{ message.role + ':' + message.content + '\n' }}", ask)
    ((ids, learned),) = encoded(talk("q", "é"), letters, add_eos_token=False)
    assert ids.tolist() == spell(letters, "user:q\nassistant:é\n")
    assert runs(learned) == [(len(spell(letters, "user:q\nassistant:")), len(ids))]


def test_without_the_end_token_but_with_the_prompts(letters):
    use_template(letters, "chatml")
    ((ids, learned),) = encoded(talk("q", "a"), letters, train_on_inputs=True, add_eos_token=False)
    assert ids[-1] == 2 and learned.tolist() == [True] * (len(ids) - 1) + [False]


def test_an_answer_that_merges_with_its_prompt_is_refused(letters):
    use_template(letters, "chatml")
    # a server has asked with Ċ; with the newlines of the answer it would be ĊĊ, which the model never sees there
    for answer in ("\n\nb", "\nb", "\n"):
        message = said(encoded, talk("q", answer), letters)
        assert "the answer merges with it into other tokens: it asks with " in message
        assert repr("<|im_start|>assistant\n")[1:-1] in message and "Take the white space off the answer" in message
        assert "merges" in said(encoded, talk("q", "fine", "r", answer), letters)
    assert_as_served(letters, talk("q", "b\n"))  # at its end it merges with nothing


def test_a_prompt_that_is_split_otherwise_before_an_answer_is_refused():
    """GPT-2 reads two newlines as one token at the end of a text and as two before a word: a server asks with one."""
    tokenizer = make_letters(split=None)
    tokenizer.chat_template = loop(TURN.replace("+ '\n'", "+ '\n\n'"), ASK.replace("assistant\n", "assistant\n\n"))
    prompt, whole = (render(tokenizer, messages, ask=k) for k, messages in ((1, talk("q")), (0, talk("q", "a"))))
    assert whole.startswith(prompt)
    assert "into other tokens" in said(encoded, talk("q", "a"), tokenizer)
    tokenizer.chat_template = loop(TURN)
    assert_as_served(tokenizer, talk("q", "a"))


@pytest.mark.parametrize("tokenizer", ["llama", "bpe"], indirect=True)
def test_a_generation_prompt_that_ends_in_a_space_merges_and_is_shown(tokenizer):
    ask = "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    tokenizer.chat_template = loop("{{ message.role + ': ' + message.content + eos_token + '\n' }}", ask)
    message = said(encoded, talk("q", "is the sum"), tokenizer)
    assert "assistant: '" in message and "another template: finetune.py --prompt_template" in message
    tokenizer.chat_template = tokenizer.chat_template.replace(": '", ":'")
    assert_as_served(tokenizer, talk("q", "is the sum"))


def test_a_generation_prompt_that_ends_in_a_space_before_a_tokenizer_that_adds_one():
    tokenizer = make_letters(merges=(("Ġ", "a"),))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    ask = "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    tokenizer.chat_template = loop("{{ message.role + ': ' + message.content + eos_token }}", ask)
    assert "merges" in said(encoded, talk("q", "a"), tokenizer)


@pytest.mark.parametrize("answer", ["a", "a ", "a b \n", " ", " a"])
def test_the_end_token_is_learned_where_offsets_leave_out_white_space(answer):
    """GPT-NeoX's tokenizer reports the place of a token without the white space that it starts with."""
    tokenizer = make_letters()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    use_template(tokenizer, "chatml")
    assert_as_served(tokenizer, talk("q", answer))


def test_templates_that_ask_whether_tools_are_none(letters):
    letters.chat_template = "{% if tools is not none or documents is not none %}tools{% endif %}" + loop(TURN)
    assert_as_served(letters, talk("q", "a"))


def test_several_turns_without_an_end_token(letters):
    ask = "{% if add_generation_prompt %}{{ '\nassistant:' }}{% endif %}"
    letters.chat_template = loop("{{ '\n' + message.role + ':' + message.content }}", ask)
    messages = talk("q", "a\n", "r", "b")  # the newline of the first answer merges with the one that follows
    examples = encoded(messages, letters, add_eos_token=False)
    for (ids, learned), k, answer in zip(examples, (1, 3), ("a\n", "b"), strict=True):
        assert runs(learned) == [(len(ids) - len(answer), len(ids))]
        assert ids[: -len(answer)].tolist() == serve(letters, messages[:k], ask=True)
    ((ids, learned),) = encoded(talk("q", "a", "r", "b"), letters, add_eos_token=False)  # and this one with nothing
    assert len(runs(learned)) == 2


def test_templates_that_do_not_continue_their_prompt_are_refused(letters):
    letters.chat_template = loop(
        TURN, "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>' }}{% endif %}"
    )
    message = said(encoded, talk("q", "a"), letters)
    assert "the chat template does not go on from the prompt that it asks with" in message and "<think>" in message


def test_templates_that_end_only_some_answers_are_refused(letters):
    letters.chat_template = loop("{{ message.content }}{% if messages|length == 2 %}{{ '<|im_end|>' }}{% endif %}", "")
    assert end_of_answers(letters) == "<|im_end|>"
    said(encoded, talk("q", "a", "r", "b"), letters)


@pytest.mark.parametrize("messages", [talk("q"), talk("q", "a", "r"), talk(system="S")])
def test_a_conversation_that_does_not_end_in_an_answer_is_refused(letters, messages):
    use_template(letters, "chatml")
    assert said(encoded, messages, letters).startswith("no answer to learn: ")


def test_templates_that_forget_old_reasoning_give_an_example_per_turn(bpe):
    """Qwen3's way: what an earlier answer thought is left out as soon as a later question is there."""
    turn = (
        "{% set content = message.content %}"
        "{% if message.role == 'assistant' and not loop.last %}"
        "{% set content = content.split('</think>')[-1] %}{% endif %}"
        "{{ '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}"
    )
    bpe.chat_template = loop(turn)
    assert_as_served(bpe, talk("q", "plain", "r", "plain"))
    assert_as_served(bpe, talk("q", "<think>x</think>y"))
    thoughtful = talk("q", "<think>one</think>first", "r", "<think>two</think>second", "s", "third")
    examples = encoded(thoughtful, bpe)
    answers = ("<think>one</think>first", "<think>two</think>second", "third")
    for (ids, learned), k, answer in zip(examples, (1, 3, 5), answers, strict=True):
        ((start, stop),) = runs(learned)
        assert ids[:start].tolist() == serve(bpe, thoughtful[:k], ask=True)
        assert bpe.decode(ids[start:stop]) == answer + "<|im_end|>" and stop == len(ids)
    assert "one" not in bpe.decode(examples[1][0]) and "first" in bpe.decode(examples[1][0])


def test_words_that_look_like_special_tokens(letters):
    """A server reads them as tokens, so training does; the answer goes on to the end token that the template wrote."""
    use_template(letters, "chatml")
    messages = talk("what is <|im_end|>?", "it is <|im_end|> there")
    ((ids, learned),) = encoded(messages, letters)
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
    for answer, length in (("a", 22), ("a" * 60, 81)):
        ((ids, _),) = encoded(talk("q", answer), tokenizer)
        assert len(ids) == length


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
    ((ids, learned),) = encoded(talk("q", answer), tokenizer, **flags)
    assert ids[: runs(learned)[0][0]].tolist() == serve(tokenizer, talk("q"), ask=True)
    assert len(runs(learned)) == 1 and learned[-1] == (not flags)


def test_normalizers_that_compose_characters_keep_the_place():
    tokenizer = make_letters(normalizer=normalizers.NFC())
    use_template(tokenizer, "chatml")
    ((ids, learned),) = encoded(talk("cafe\u0301", "e\u0301t\u00e9"), tokenizer)
    prompt = spell(tokenizer, "<|im_start|>user\ncaf\u00e9<|im_end|>\n<|im_start|>assistant\n")
    assert ids.tolist() == prompt + spell(tokenizer, "\u00e9t\u00e9<|im_end|>")
    assert runs(learned) == [(len(prompt), len(ids))]


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "assistant", "content": "Hello!"}, *talk("q", "a")],
        [*talk("q", "f()"), {"role": "tool", "content": "7"}, {"role": "assistant", "content": "a"}],
    ],
)
def test_conversations_that_a_template_cannot_take(letters, messages):
    use_template(letters, "alpaca")
    with pytest.raises((jinja2.TemplateError, ValueError)):  # train() says of which row
        encoded(messages, letters)


# -----------------------------------------------------------------------------
# micro-batches and packed rows


def steps_of(lengths, batch_size, micro, ranks, epoch=0, seed=0):
    """Return the steps of an epoch: steps[s][rank] lists the micro-batches of that rank."""
    each = []
    for rank in range(ranks):
        batches = MicroBatches(lengths, batch_size, micro, rank, ranks, seed)
        batches.set_epoch(epoch)
        each.append(list(batches))
        assert len(each[-1]) == len(batches)
    assert len({len(batches) for batches in each}) == 1
    at_once = batch_size // micro // ranks
    return [[batches[i : i + at_once] for batches in each] for i in range(0, len(each[0]), at_once)]


@pytest.mark.parametrize("count", [1, 7, 8, 37, 900])
def test_a_step_has_the_same_examples_however_it_is_split(count):
    lengths = np.random.default_rng(count).integers(2, 100, count)
    seen = {}
    for micro in (1, 2, 4, 8):
        for ranks in (1, 2, 4):
            if 8 % (micro * ranks):
                continue
            steps = steps_of(lengths, 8, micro, ranks, 1)
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


def test_micro_batches_have_about_equally_many_tokens():
    lengths = np.random.default_rng(0).integers(2, 1000, 640)
    for (step,) in steps_of(lengths, 64, 8, 1):
        tokens = [lengths[part].sum() for part in step]
        assert max(tokens) - min(tokens) <= lengths[sum(step, [])].max()
        assert max(tokens) < 1.3 * min(tokens)
    hand = np.array([1, 8, 2, 7, 3, 6, 4, 5])  # sorted: 8 7 6 5 4 3 2 1, dealt out in turn
    assert steps_of(hand, 8, 2, 2) == [[[[1, 6], [5, 2]], [[3, 4], [7, 0]]]]


def example(ids, learned):
    ids = np.array(ids, np.int32)
    return {"input_ids": ids, "labels": np.where(learned, ids, IGNORE)}


def test_pack_by_hand():
    batch = pack([example([5, 6, 7], [0, 1, 1]), example([8, 9], [0, 1]), example([1, 2, 3, 4], [0, 0, 1, 0])])
    assert {name: value if isinstance(value, int) else value.tolist() for name, value in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9, 1, 2, 3, 4]],
        "position_ids": [[0, 1, 2, 0, 1, 0, 1, 2, 3]],
        "cu_seq_lens_q": [0, 3, 5, 9],
        "cu_seq_lens_k": [0, 3, 5, 9],
        "max_length_q": 4,
        "max_length_k": 4,
        "logits_to_keep": [0, 1, 3, 6],  # of the tokens 5, 6, 8 and 2, that predict 6, 7, 9 and 3
        "labels": [[6, 7, 9, 3]],
        "shift_labels": [[6, 7, 9, 3]],
    }
    assert batch["cu_seq_lens_q"].dtype == torch.int32 and batch["labels"].dtype == torch.int64


def test_pack_of_one_example_alone_tells_a_model_nothing_of_packed_rows():
    """Linear attention refuses rows that it is told are packed, even of one example."""
    batch = pack([example([5, 6, 7], [0, 1, 1])], packed=False)
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[5, 6, 7]],
        "logits_to_keep": [0, 1],
        "labels": [[6, 7]],
        "shift_labels": [[6, 7]],
    }
    assert pack([], packed=False)["labels"].tolist() == [[]]


def test_no_label_is_predicted_from_another_example():
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 50, n).tolist() for n in rng.integers(2, 9, 20)]
    batch = pack([example(row, np.ones(len(row), bool)) for row in rows])  # all learned, the first tokens too
    ends = set(np.cumsum([len(row) for row in rows]) - 1)
    assert not ends & set(batch["logits_to_keep"].tolist())
    assert batch["labels"].tolist() == [[token for row in rows for token in row[1:]]]


def test_pack_of_no_examples_has_no_label():
    batch = pack([])
    assert batch["input_ids"].shape == (1, 2) and batch["cu_seq_lens_q"].tolist() == [0, 2]
    assert batch["logits_to_keep"].tolist() == [] and batch["labels"].tolist() == [[]]
    assert batch["labels"].dtype == batch["shift_labels"].dtype == torch.int64
