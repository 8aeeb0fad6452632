"""
generate.py: its answers against transformers' own, its scores against verl's rule, what must not change an answer,
and bad input.

    .venv/bin/python -m pytest tests/test_generate.py
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from statistics import mean

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin, LlamaConfig, LlamaForCausalLM

import generate as script
from generate import compute_score, final_number, generate, mean_and_error, score_answer

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "data" / "tiny" / "model"
DATA = ROOT / "data" / "tiny" / "test.jsonl"
TEST_ROWS = [json.loads(line) for line in DATA.read_text().splitlines()]
END = 0  # <|endoftext|> of the embedded tokenizer
tokenizer = AutoTokenizer.from_pretrained(BASE)


def answers(folder="out/generate"):
    text = (Path(folder) / "predictions.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.strip("\n").split("\n")]


def ask(**flags):
    """Answer the first 24 test problems, or what `flags` say, afresh; returns the rows of the prediction file."""
    flags = {"data_path": str(DATA), "max_samples": 24, "max_new_tokens": 40, "output_dir": "out/generate"} | flags
    for log in Path(flags["output_dir"]).glob("answers-*.jsonl"):
        log.unlink()
    generate(**flags)
    return answers(flags["output_dir"])


def texts(rows):
    return [(row["prediction"], row["cut"]) for row in rows]


def write(path, *rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prompt_ids(conversation, template="alpaca"):
    """The ids that transformers makes of a conversation: one call, template and tokens together."""
    text = (ROOT / "templates" / f"{template}.jinja").read_text(encoding="utf-8")
    return tokenizer.apply_chat_template(conversation, chat_template=text, add_generation_prompt=True).input_ids


def expected(model, conversation, max_new_tokens=40, **settings):
    """The answer of transformers' own generate to one conversation, and whether it was cut."""
    ids = torch.tensor([prompt_ids(conversation)])
    settings = {"do_sample": False, "eos_token_id": END, "pad_token_id": 1} | settings
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, **settings)
    new = out[0, ids.shape[1] :].tolist()
    return tokenizer.decode(new[: new.index(END)] if END in new else new, skip_special_tokens=True), END not in new


def make_adapter(folder, base=BASE, **config):
    """Save a LoRA adapter of random weights that changes the answers; returns its folder."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | config
    get_peft_model(model, LoraConfig(**config)).save_pretrained(folder)
    return str(folder)


def make_base(folder, generation=None, **tokenizer_config):
    """Copy the embedded model, with changes to generation_config.json and tokenizer_config.json."""
    shutil.copytree(BASE, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | tokenizer_config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return str(folder)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test runs in an empty folder: what it reads of the project is found from the script's own place."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


@pytest.fixture(scope="module")
def base():
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return make_adapter(tmp_path_factory.mktemp("adapter"), task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def greedy(tmp_path_factory):
    """The rows that the base model answers by default."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("greedy"))
        return ask()


@pytest.fixture
def no_model(monkeypatch):
    """A function after whose call no model may be loaded any more."""
    return lambda: monkeypatch.setattr(
        script.AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("the model was loaded")
    )


@pytest.fixture
def seen(monkeypatch):
    """The prompts that reach the model, as lists of ids without their padding."""
    prompts, real = [], GenerationMixin.generate

    def spy(self, **kwargs):
        pairs = zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True)
        prompts.extend(ids[mask.bool()].tolist() for ids, mask in pairs)
        return real(self, **kwargs)

    monkeypatch.setattr(GenerationMixin, "generate", spy)
    return prompts


# -----------------------------------------------------------------------------
# scores


@pytest.mark.parametrize(
    "text, strict, flexible",
    [
        ("so it is\n#### 42", "42", "42"),
        ("#### 1,234,567", "1234567", "1,234,567"),  # verl's flexible rule leaves commas in
        ("#### -5", "-5", "-5"),
        ("#### 0.25", "0.25", "0.25"),
        ("#### 1\n#### 2\nand 3", "2", "3"),
        ("#### $42", None, "42"),  # the dollar sign hides the number from the strict rule
        ("####42", None, "42"),
        ("### 42", None, "42"),
        ("it is 42.", None, "42."),
        ("#### 42.", "42.", "42."),
        ("#### 42 . . .", "42", "42"),
        ("#### 42, I think", "42", "42,"),
        ("42 , yes", None, ","),  # a lone comma counts as a number, a lone period does not
        ("no number here.", None, None),
        ("", None, None),
    ],
)
def test_final_number_is_verls(text, strict, flexible):
    assert final_number(text, "strict") == strict and final_number(text, "flexible") == flexible


def test_compute_score_compares_text_and_reads_the_last_300_characters():
    assert compute_score("#### 1,000", "1000") == 1.0 and compute_score("#### 1,000", "1000", "flexible") == 0.0
    assert compute_score("7 eggs", "7") == 0.0 and compute_score("7 eggs", "7", "flexible") == 1.0
    assert compute_score("#### 7.0", "7") == 0.0
    assert compute_score("#### 7" + "x" * 294, "7") == 1.0 and compute_score("#### 7" + "x" * 295, "7") == 0.0
    assert compute_score("7" + "x" * 299, "7", "flexible") == 1.0
    assert compute_score("7" + "x" * 300, "7", "flexible") == 0.0


def test_score_answer_takes_the_number_of_the_reference():
    def score(answer, reference, name):
        return score_answer({"index": 0, "prediction": answer, "reference": reference}, name, "here")["score"]

    reference = "a long way" + " to go" * 100 + " 3\n#### 1,024"
    assert score("#### 1024", reference, "gsm8k_strict") == 1.0
    assert score("it is 1024", reference, "gsm8k_strict") == 0.0
    assert score("it is 1024", reference, "gsm8k_flexible") == 1.0
    assert score(" yes\n", "yes", "exact") == 1.0 and score("Yes", "yes", "exact") == 0.0


def chrf_by_hand(answer, reference):
    """The F2 of the mean precision and recall of n-grams of 1 to 6 characters, white space left out (Popovic 2015)."""
    answer, reference = ("".join(text.split()) for text in (answer, reference))
    precision, recall = [], []
    for n in range(1, 7):
        a, b = (Counter(text[k : k + n] for k in range(len(text) - n + 1)) for text in (answer, reference))
        if a and b:
            common = (a & b).total()
            precision.append(common / a.total())
            recall.append(common / b.total())
    precision, recall = mean(precision), mean(recall)
    return 5 * precision * recall / (4 * precision + recall)


@pytest.mark.parametrize(
    "answer, reference",
    [
        ("the cat sat on the mat", "the cat lay on the mat"),
        ("it is 4.5, no?", "it is 4 5 no"),
        ("甲乙丙丁戊己庚", "甲乙丁戊己庚辛壬"),
        ("เชียงใหม่เป็นเมือง", "เชียงใหม่คือเมือง"),
    ],
)
def test_chrf_by_hand(answer, reference):
    row = {"index": 0, "prediction": answer, "reference": reference}
    found = score_answer(row, "chrf", "here")["score"]
    assert 0.2 < found < 1 and found == pytest.approx(chrf_by_hand(answer, reference))
    assert score_answer(row | {"prediction": reference}, "chrf", "here")["score"] == 1
    assert score_answer(row | {"prediction": ""}, "chrf", "here")["score"] == 0


def test_the_standard_error_is_that_of_a_mean():
    values = [0.1, 0.5, 0.9, 0.4]
    expected = (0.475, math.sqrt(sum((v - 0.475) ** 2 for v in values) / 3 / 4))
    assert mean_and_error(values) == pytest.approx(expected)
    assert mean_and_error([1.0]) == (1.0, None)


SCORER = """
def check(data_source, solution_str, ground_truth, extra_info=None):
    assert isinstance(solution_str, str)
    return {"score": len(ground_truth), "source": data_source, "info": extra_info, "twice": 2.0}
def number(data_source, solution_str, ground_truth, extra_info=None):
    return True
def fails(data_source, solution_str, ground_truth, extra_info=None):
    return 1 / 0 if extra_info["index"] == 1 else 0
"""


def test_a_function_of_ones_own_is_called_as_verl_calls_it(capsys):
    Path("mine.py").write_text(SCORER)
    path = write("rows.jsonl", {"question": "2+3?", "answer": "5"}, {"question": "1+1?", "answer": "#### 2"})
    flags = {"data_path": path, "max_new_tokens": 4}
    summary = generate(**flags, score="mine.py:check")
    assert [row["score"] for row in answers()] == [1, 6]
    assert summary["score"] == {"mean": 3.5, "standard_error": 2.5} and summary["twice"]["mean"] == 2.0
    assert [row["source"] for row in answers()] == [path, path]
    assert [row["info"] for row in answers()] == [{"index": 0}, {"index": 1}]
    assert "mine.py:check 350.00% +- 250.00% of 2 rows\ntwice 200.00% +- 0.00%" in capsys.readouterr().out
    assert generate(**flags, score="mine.py:number")["score"]["mean"] == 1.0
    with pytest.raises(ValueError, match="mine.py:none cannot be loaded: KeyError: 'none'"):
        generate(**flags, score="mine.py:none")
    Path("broken.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(ValueError, match="broken.py:f cannot be loaded: ModuleNotFoundError"):
        generate(**flags, score="broken.py:f")


def test_what_a_function_returns_is_written_and_takes_no_name_that_is_taken(tmp_path):
    Path("mine.py").write_text(
        "import numpy as np\n"
        "def f(**kwargs):\n"
        "    return {'score': np.float32(0.5), 'close': np.bool_(True), 'tokens': 99, 'rows': 7, 'prediction': 'x'}\n"
    )
    path = write("rows.jsonl", {"question": "2+3?", "answer": "5"})
    plain = generate(data_path=path, max_new_tokens=4)
    (row,) = answers()
    summary = generate(data_path=path, max_new_tokens=4, score="mine.py:f")
    assert answers() == [row | {"score": 0.5, "close": 1.0, "rows": 7}]
    assert summary == plain | {"score": {"mean": 0.5, "standard_error": None}}


def test_half_a_character_in_a_row_costs_no_other_row():
    half = {"question": "a \ud800 b", "answer": "5"}
    path = write("rows.jsonl", {"question": "2+3?", "answer": "5"}, half, {"question": "q", "answer": "\ud800"})
    summary = generate(data_path=path, max_new_tokens=4)
    first, second, third = answers()
    assert summary["answered"] == 2 and "cannot render" in second["error"]
    assert third["reference"] == "\ud800" and second["messages"][0]["content"] == half["question"]
    assert "prediction" in first and "prediction" in third


def test_a_score_function_that_fails_loses_no_answers(no_model):
    Path("mine.py").write_text(SCORER)
    flags = {"data_path": str(DATA), "max_samples": 3, "max_new_tokens": 4}
    with pytest.raises(ZeroDivisionError):
        generate(**flags, score="mine.py:fails")
    no_model()
    assert generate(**flags, score="mine.py:number")["answered"] == 3 == len(answers())


# -----------------------------------------------------------------------------
# answers


def test_answers_are_those_of_transformers_own_generate(base, greedy):
    for row, problem in zip(greedy, TEST_ROWS, strict=False):
        assert row["messages"] == [{"role": "user", "content": problem["question"]}]
        assert (row["prediction"], row["cut"]) == expected(base, row["messages"])
    assert len(greedy) == 24 and len({row["prediction"] for row in greedy}) > 20
    assert not any(row["cut"] or "<|" in row["prediction"] for row in greedy)


def test_an_answer_is_cut_at_max_new_tokens_and_says_so(greedy, capsys):
    full = len(tokenizer(greedy[0]["prediction"], add_special_tokens=False).input_ids)
    question = greedy[0]["messages"][0]["content"]
    whole = generate(prompt=question, max_new_tokens=full + 1)  # the end token is one of them
    assert whole == greedy[0]["prediction"] and "cut" not in capsys.readouterr().out
    assert generate(prompt=question, max_new_tokens=full) == greedy[0]["prediction"]
    assert capsys.readouterr().out.endswith(f"\n(cut at --max_new_tokens {full})\n")
    rows = ask(max_samples=1, max_new_tokens=4)
    assert rows[0]["cut"] and rows[0]["prediction"] == greedy[0]["prediction"].partition(".")[0].rpartition(" ")[0]


@pytest.mark.parametrize("flags", [{}, {"repetition_penalty": 1.3}, {"num_beams": 3}, {"lora": True}], ids=str)
def test_micro_batches_of_mixed_lengths_do_not_change_the_answers(adapter, flags):
    flags = {"lora_weights": adapter} if "lora" in flags else flags
    assert len({len(prompt_ids([{"role": "user", "content": row["question"]}])) for row in TEST_ROWS[:12]}) > 5
    alone = ask(micro_batch_size=1, max_samples=12, **flags)
    assert texts(ask(micro_batch_size=5, max_samples=12, **flags)) == texts(alone)


def test_padding_is_not_the_tokenizers_whose_token_the_model_may_not_have(tmp_path, greedy):
    folder = make_base(tmp_path / "base")
    grown = AutoTokenizer.from_pretrained(folder)
    grown.add_tokens([f"<extra_{i}>" for i in range(200)])
    grown.pad_token = "<extra_199>"
    grown.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).pad_token_id >= 1024  # rows of the embedding
    assert texts(ask(base_model=folder)) == texts(greedy)


def test_a_tokenizer_that_adds_a_first_token_does_not_double_the_templates(tmp_path, seen):
    folder = make_base(tmp_path / "base")
    llama = AutoTokenizer.from_pretrained(folder, bos_token="<|im_start|>")
    first = ("<|im_start|>", llama.bos_token_id)
    llama.backend_tokenizer.post_processor = TemplateProcessing(single=f"{first[0]} $A", special_tokens=[first])
    llama.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("Hi").input_ids[0] == llama.bos_token_id
    generate(base_model=folder, prompt="Hi", max_new_tokens=1)
    assert seen == [[llama.bos_token_id, *prompt_ids([{"role": "user", "content": "Hi"}])]]


def test_special_tokens_inside_an_answer_are_left_out_and_only_an_end_token_ends_it(monkeypatch):
    start, word = tokenizer.convert_tokens_to_ids(["<|im_start|>", "Tom"])
    rows = torch.tensor([[word, start, word, END, word], [word, word, start, start, word]])
    monkeypatch.setattr(GenerationMixin, "generate", lambda self, input_ids, **kw: torch.cat([input_ids, rows], 1))
    assert sorted(texts(ask(max_samples=2))) == [("TomTom", False), ("TomTomTom", True)]


@pytest.mark.parametrize("kind", ["base", "adapter", "adapter of no task type"])
def test_the_models_own_generation_config_does_not_leak_in(tmp_path, adapter, kind):
    leak = {"do_sample": True, "temperature": 5.0, "top_k": 3, "repetition_penalty": 1.8, "num_beams": 3, "min_p": 0.3}
    leak |= {"no_repeat_ngram_size": 2, "suppress_tokens": [328], "min_new_tokens": 30, "forced_eos_token_id": 4}
    leak |= {"stop_strings": ["1"], "max_length": 8, "eos_token_id": END}
    folder = make_base(tmp_path / "leaky", generation=leak)
    flags = {} if kind == "base" else {"lora_weights": adapter}
    if kind == "adapter of no task type":
        flags = {"lora_weights": make_adapter(tmp_path / "adapter")}
        assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["task_type"] is None
    assert texts(ask(base_model=folder, max_samples=8, **flags)) == texts(ask(max_samples=8, **flags))


def test_every_end_token_of_the_checkpoint_stops_an_answer(tmp_path, greedy):
    period = tokenizer.convert_tokens_to_ids(".")
    folder = make_base(tmp_path / "base", generation={"eos_token_id": [period, 9]})
    rows = ask(base_model=folder)
    assert [row["prediction"] for row in rows] == [row["prediction"].partition(".")[0] for row in greedy]
    assert not any(row["cut"] for row in rows)


def test_the_end_of_a_turn_in_an_adapters_template_ends_an_answer(tmp_path, adapter):
    shutil.copytree(adapter, tmp_path / "adapter")
    plain = ask(lora_weights=adapter, max_samples=8)
    carried = AutoTokenizer.from_pretrained(BASE)
    carried.add_special_tokens({"additional_special_tokens": ["*"]})
    template = (ROOT / "templates" / "alpaca.jinja").read_text()
    carried.chat_template = template.replace("eos_token", "'*'")
    assert carried.chat_template != template
    carried.save_pretrained(tmp_path / "adapter")
    rows = ask(lora_weights=str(tmp_path / "adapter"), max_samples=8)
    assert [row["prediction"] for row in rows] == [row["prediction"].partition("*")[0] for row in plain]
    assert sum("*" in row["prediction"] for row in plain) > 2


# -----------------------------------------------------------------------------
# sampling


def test_sampling_repeats_with_a_seed_and_differs_with_another(greedy):
    one = texts(ask(temperature=1.0))
    assert one == texts(ask(temperature=1.0)) and one != texts(greedy)
    assert one != texts(ask(temperature=1.0, seed=1))
    assert sum(a == b for a, b in zip(texts(ask(temperature=0.05)), texts(greedy), strict=True)) >= 20  # near ties


@pytest.mark.parametrize("flags", [{"top_k": 1}, {"top_p": 1e-6}], ids=str)
def test_sampling_from_one_token_is_greedy(greedy, flags):
    assert texts(ask(temperature=1.5, **flags)) == texts(greedy)


def test_top_k_bounds_the_choice_and_0_does_not(base, greedy):
    flags = {"temperature": 1e4, "max_new_tokens": 1}  # all but uniform
    conversations = [row["messages"] for row in greedy]
    with torch.no_grad():
        logits = torch.stack([base(torch.tensor([prompt_ids(c)])).logits[0, -1] for c in conversations])
    best = [{tokenizer.decode(i, skip_special_tokens=True) for i in row.topk(50).indices} for row in logits]
    inside = [row["prediction"] in ids for row, ids in zip(ask(top_k=50, **flags), best, strict=True)]
    assert all(inside)
    outside = [row["prediction"] not in ids for row, ids in zip(ask(**flags), best, strict=True)]
    assert sum(outside) > 12  # transformers' own default is 50, and would leak in where 0 were not said


def test_penalty_and_beams_are_transformers(adapter):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), adapter)
    greedy = ask(lora_weights=adapter)  # the base alone is so sure that beams change nothing
    for flags in ({"repetition_penalty": 1.5}, {"num_beams": 4}):
        rows = ask(lora_weights=adapter, **flags)
        assert texts(rows) != texts(greedy)
        assert texts(rows[:8]) == [expected(model, row["messages"], **flags) for row in greedy[:8]]


# -----------------------------------------------------------------------------
# files


def test_a_file_of_answers_has_rows_references_scores_and_a_summary(tmp_path, capsys):
    right = [row["answer"] for row in TEST_ROWS[:6]]
    # the base model's own style, told as a reference: half of the exact scores are 1
    own = [row["prediction"] for row in ask(max_samples=3)]
    rows = [{"question": row["question"], "answer": a} for row, a in zip(TEST_ROWS, own + right[3:], strict=False)]
    capsys.readouterr()
    out = tmp_path / "deep" / "er"
    found = ask(data_path=write(tmp_path / "data.jsonl", *rows), output_dir=str(out), score="exact", micro_batch_size=4)
    assert [row["index"] for row in found] == [0, 1, 2, 3, 4, 5]
    assert [row["messages"][0]["content"] for row in found] == [row["question"] for row in rows]
    assert [row["reference"] for row in found] == [row["answer"] for row in rows]
    assert [row["score"] for row in found] == [1, 1, 1, 0, 0, 0]
    assert all(set(row) == {"index", "messages", "prediction", "cut", "tokens", "reference", "score"} for row in found)
    (log,) = out.glob("answers-*.jsonl")
    assert {p.name for p in out.iterdir()} == {log.name, "predictions.jsonl", "summary.json"}
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["temperature"], summary["base_model"], summary["versions"][0]) == (
        0,
        "data/tiny/model",
        torch.__version__,
    )
    tokens = [len(tokenizer(row["prediction"], add_special_tokens=False).input_ids) for row in found]
    assert [row["tokens"] for row in found] == tokens
    assert summary["score"] == {"mean": 0.5, "standard_error": pytest.approx(math.sqrt(6 * 0.25 / 5 / 6))}
    assert (summary["rows"], summary["answered"], summary["cut"]) == (6, 6, 0) and summary["tokens"] == sum(tokens)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "generate.py  data/tiny/model + no adapter    cpu  float32  template alpaca"
    assert said[-4] == f"6 answers, {sum(tokens)} tokens"
    assert said[-3] == "exact 50.00% +- 22.36% of 6 rows"
    assert said[-2:] == [
        "0 cut at --max_new_tokens 40, 0 rows left out",
        f"wrote {out}/predictions.jsonl and summary.json",
    ]


def test_the_base_model_knows_the_numbers_but_not_the_form(capsys):
    flexible = generate(data_path=str(DATA), max_samples=24, max_new_tokens=60, score="gsm8k_flexible")
    strict = generate(data_path=str(DATA), max_samples=24, max_new_tokens=60, score="gsm8k_strict")  # the same answers
    assert flexible["score"]["mean"] > 0.3 and strict["score"] == {"mean": 0, "standard_error": 0}
    assert "gsm8k_strict 0.00% +- 0.00% of 24 rows\n" in capsys.readouterr().out
    for row in answers():
        assert row["score"] == 0 and "####" not in row["prediction"]


def test_every_form_of_row_becomes_the_prompt_that_it_was_trained_with(tmp_path, seen):
    user = lambda text: {"role": "user", "content": text}
    said = lambda text: {"role": "assistant", "content": text}
    forms = [
        (
            {"instruction": "Count.", "input": "a b", "output": "2"},
            [user("Count.\n\n### Input:\na b")],
            "2",
        ),
        ({"messages": [user("1?"), said("1"), user("2?"), said("2")]}, [user("1?"), said("1"), user("2?")], "2"),
        ({"messages": [user("1?"), said("1"), user("2?")]}, [user("1?"), said("1"), user("2?")], None),
        (
            {"system": "Brief.", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            [{"role": "system", "content": "Brief."}, user("q")],
            "a",
        ),
        ({"question": "q", "answer": "#### 4"}, [user("q")], "#### 4"),
    ]
    path = write(tmp_path / "rows.jsonl", *[row for row, _, _ in forms])
    rows = ask(data_path=path, max_new_tokens=1, micro_batch_size=1)
    assert [row["messages"] for row in rows] == [messages for _, messages, _ in forms]
    assert [row.get("reference") for row in rows] == [reference for _, _, reference in forms]
    assert sorted(seen) == sorted(prompt_ids(messages) for _, messages, _ in forms)
    assert "paired with an input" in tokenizer.decode(prompt_ids(forms[0][1]))


def test_a_prompt_and_its_input_are_an_alpaca_row(seen):
    generate(prompt="Count.", input="a b", max_new_tokens=1)
    generate(prompt="Count.", input="a b", max_new_tokens=1, prompt_template="chatml")
    assert seen[0] == prompt_ids([{"role": "user", "content": "Count.\n\n### Input:\na b"}])
    assert seen[1] == prompt_ids([{"role": "user", "content": "Count.\na b"}], "chatml")


def test_a_row_that_cannot_be_answered_is_named_and_the_others_are_answered(tmp_path, capsys):
    tool = {"messages": [{"role": "user", "content": "q"}, {"role": "tool", "content": "t"}]}
    good = {"question": "Add 2 and 3.", "answer": "#### 5"}
    rows = [good, {"question": 5}, {"messages": []}, good, {"question": "word " * 600}, tool, {"question": "q"}, good]
    rows.append({"instruction": "q", "history": [["a", "b"]]})
    path = write(tmp_path / "a.jsonl", *rows)
    summary = generate(data_path=path, score="gsm8k_flexible", max_new_tokens=20)
    found = answers()
    assert [row["index"] for row in found] == list(range(9)) and summary["rows"] == 9
    assert [i for i, row in enumerate(found) if "prediction" in row] == [0, 3, 7] and summary["answered"] == 3
    errors = [row["error"] for row in found if "error" in row]
    for error, what in zip(
        errors,
        ["data/prepare.py", "not alpaca", "exceed the 1024", "cannot render .*tool", "nothing to compare with"]
        + ["data/prepare.py"],
        strict=True,
    ):
        assert re.search(what, error), (what, error)
    said = capsys.readouterr().out
    assert "  left out row 2: not alpaca" in said and "6 rows left out\n" in said
    assert generate(data_path=path, score="gsm8k_flexible", max_new_tokens=20) == summary and answers() == found


def test_half_a_character_in_a_row_loses_no_answers(tmp_path):
    rows = [{"question": "Add 2 and 3."}, {"question": "\ud83d"}, {"question": "Add 2 and 3.", "answer": "\ud83d"}]
    generate(data_path=write(tmp_path / "rows.jsonl", *rows), max_new_tokens=4)
    found = answers()
    assert ["prediction" in row for row in found] == [True, False, True] and "cannot render" in found[1]["error"]
    assert found[1]["messages"][0]["content"] == found[2]["reference"] == "\ud83d"


# -----------------------------------------------------------------------------
# a file that is stopped


@pytest.fixture
def stop_after(monkeypatch):
    """A function that lets the next run die in its n-th batch; with None, no run."""
    real = GenerationMixin.generate

    def die_in(n):
        calls = []

        def generate(self, **kwargs):
            calls.append(kwargs)
            if len(calls) == n:
                raise RuntimeError("power cut")
            return real(self, **kwargs)

        monkeypatch.setattr(GenerationMixin, "generate", generate)

    return die_in


MODES = [{}, {"temperature": 1.0, "top_p": 0.9, "top_k": 100}, {"num_beams": 2}, {"repetition_penalty": 1.2}]
MODES += [{"num_beams": 2, "temperature": 1.0}]


@pytest.mark.parametrize("flags", MODES, ids=str)
def test_a_run_that_dies_goes_on_and_ends_as_if_it_had_not(monkeypatch, stop_after, flags):
    flags = {"data_path": str(DATA), "max_samples": 14, "max_new_tokens": 20, "micro_batch_size": 4} | flags
    generate(output_dir="whole", **flags)
    stop_after(3)
    with pytest.raises(RuntimeError, match="power cut"):
        generate(output_dir="stopped", **flags)
    (log,) = Path("stopped").iterdir()
    assert len(log.read_text().splitlines()) == 2  # batches
    with open(log, "a") as file:
        file.write('[{"predic')  # torn
    stop_after(None)
    asked, real = [], script.answer_batch
    monkeypatch.setattr(script, "answer_batch", lambda *args: asked.append(len(args[1])) or real(*args))
    generate(output_dir="stopped", **flags)
    assert asked == [4, 2]
    for name in ("predictions.jsonl", "summary.json", log.name):
        assert Path("stopped", name).read_bytes() == Path("whole", name).read_bytes()


CHANGES = [
    {"temperature": 0.5},
    {"max_new_tokens": 9},
    {"micro_batch_size": 5},
    {"seed": 1},
    {"max_samples": 9},
    {"prompt_template": "chatml"},
    {"dtype": "bfloat16"},
    {"lora": True},
    {"data": True},
    {"model": True},
]


@pytest.mark.parametrize("finished", [False, True])
def test_other_settings_never_mix(tmp_path, no_model, stop_after, adapter, finished):
    data = write(tmp_path / "data.jsonl", *TEST_ROWS[:10])
    model = make_base(tmp_path / "model")
    flags = {"data_path": data, "base_model": model, "max_new_tokens": 8, "micro_batch_size": 4}
    if finished:
        generate(**flags)
    else:
        stop_after(2)
        with pytest.raises(RuntimeError):
            generate(**flags)
    (log,) = Path("out/generate").glob("answers-*.jsonl")
    before, logs = log.read_bytes(), {log}
    kept = Path("out/generate/predictions.jsonl").read_bytes() if finished else b""
    for change in CHANGES:
        changed = flags | change
        if changed.pop("lora", None):
            changed["lora_weights"] = adapter
        if changed.pop("data", None):
            write(data, *TEST_ROWS[1:11])
        if changed.pop("model", None):
            write(data, *TEST_ROWS[:10])
            weights = load_file(f"{model}/model.safetensors")
            times = Path(f"{model}/model.safetensors").stat()
            weights["model.norm.weight"] += 1
            save_file(weights, f"{model}/model.safetensors", {"format": "pt"})
        stop_after(1)
        with pytest.raises(RuntimeError):
            generate(**changed)  # it asks the model again
        (new,) = set(Path("out/generate").glob("answers-*.jsonl")) - logs
        logs.add(new)
        assert new.read_bytes() == b"" and log.read_bytes() == before
        assert not finished or Path("out/generate/predictions.jsonl").read_bytes() == kept
    if finished:  # the first command again: its answers are still there
        os.utime(f"{model}/model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))
        no_model()
        generate(**flags)
        assert Path("out/generate/predictions.jsonl").read_bytes() == kept


def test_a_finished_file_is_scored_again_but_not_answered_again(no_model):
    flags = {"data_path": str(DATA), "max_samples": 12, "max_new_tokens": 40}
    first = generate(**flags, score="gsm8k_flexible")
    kept = Path("out/generate/predictions.jsonl").read_bytes()
    no_model()
    other = generate(**flags, score="chrf")
    assert 0 < other["score"]["mean"] < 1 and other["score"] != first["score"]
    assert other["tokens"] == first["tokens"]
    assert generate(**flags, score="gsm8k_flexible") == first
    assert Path("out/generate/predictions.jsonl").read_bytes() == kept


def test_the_old_predictions_stay_until_the_new_ones_are_there(stop_after):
    before = ask(max_samples=4)
    stop_after(2)
    with pytest.raises(RuntimeError):
        ask(micro_batch_size=3)
    assert answers() == before
    stop_after(None)
    assert len(ask(micro_batch_size=2)) == 24 == len(answers())


def test_ctrl_c_says_what_is_there(monkeypatch):
    real, calls = script.answer_batch, []
    monkeypatch.setattr(
        script, "answer_batch", lambda *args: calls.append(1) or (real(*args) if len(calls) < 3 else interrupt())
    )

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="what is answered is in out/generate/answers-.{12}.jsonl, and the same"):
        ask(max_samples=12, micro_batch_size=3, max_new_tokens=3)


@pytest.mark.slow
def test_kill_9_at_any_moment_then_the_same_command():
    flags = ["--data_path", str(DATA), "--temperature", "0.8", "--micro_batch_size", "16", "--score", "gsm8k_flexible"]
    command = [sys.executable, str(ROOT / "generate.py"), *flags, "--output_dir"]
    subprocess.run([*command, "whole"], check=True, capture_output=True)
    logs, kills = lambda: list(Path("killed").glob("answers-*.jsonl")), 0
    for wanted in (1, 8, 16, 26):  # batches on disk grow: killed in the middle of the file, several times
        process = subprocess.Popen([*command, "killed"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and sum(log.read_bytes().count(b"\n") for log in logs()) < wanted:
            time.sleep(0.01)
        kills += process.poll() is None
        process.kill()
        process.wait()
    assert kills >= 3 and len(logs()) == 1 and not Path("killed/predictions.jsonl").exists()
    subprocess.run([*command, "killed"], check=True, capture_output=True)
    assert Path("killed/predictions.jsonl").read_bytes() == Path("whole/predictions.jsonl").read_bytes()
    summaries = [json.loads(Path(folder, "summary.json").read_text()) for folder in ("whole", "killed")]
    assert summaries[0] == summaries[1] and summaries[0]["rows"] == 512


# -----------------------------------------------------------------------------
# the terminal, and flags left out


@pytest.mark.parametrize("num_beams", [1, 2])
def test_one_answer_is_printed_as_it_is_returned(num_beams, capsys):
    found = generate(prompt="Tom has 6 boxes with 7 coins in each.", num_beams=num_beams, max_new_tokens=60)
    assert len(found) > 10
    assert capsys.readouterr().out.endswith(f"\n> Tom has 6 boxes with 7 coins in each.\n{found}\n")
    assert not list(Path().rglob("*"))


def test_without_any_flag_the_adapter_of_the_last_default_stage_answers(adapter, capsys):
    def used():
        answer = generate(max_new_tokens=30)
        return answer, re.match(r"generate.py  (.*?)    ", capsys.readouterr().out)[1]

    plain, name = used()
    assert name == "data/tiny/model + no adapter"
    Path("out/finetune/adapter").mkdir(parents=True)  # as a run leaves it that died early
    assert used() == (plain, name)
    shutil.copytree(adapter, "out/finetune/adapter", dirs_exist_ok=True)
    answer, name = used()
    assert answer != plain and name == f"{BASE} + out/finetune/adapter"
    other = make_adapter("out/ppo_gsm8k/adapter", r=2)
    answer, name = used()
    assert name == f"{BASE} + out/ppo_gsm8k/adapter" and answer == generate(lora_weights=other, max_new_tokens=30)
    assert generate(base_model=str(BASE), max_new_tokens=30) == plain


def rename_base(folder, name):
    """Write another base model's name into an adapter's configuration."""
    path = Path(folder) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name}))


def test_an_adapter_names_its_base(tmp_path, adapter, capsys):
    shutil.copytree(adapter, tmp_path / "adapter")
    folder, asked = str(tmp_path / "adapter"), {"prompt": "Hi", "max_new_tokens": 1}
    generate(lora_weights=folder, **asked)
    assert f"generate.py  {BASE} + {folder} " in capsys.readouterr().out
    rename_base(folder, "gone/far/away")
    with pytest.raises(ValueError, match="gone/far/away: no such file or folder, and no id of the hub"):
        generate(lora_weights=folder)
    rename_base(folder, None)
    with pytest.raises(ValueError, match="no adapter that names its base"):
        generate(lora_weights=folder)


@pytest.fixture
def typed(monkeypatch):
    """A function that types lines into the terminal: texts, or exceptions for keys such as Ctrl-C."""

    def type_in(*lines):
        lines = iter(lines)

        def answer_prompt(prompt=""):
            line = next(lines, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", answer_prompt)

    return type_in


def test_a_chat_remembers_its_turns(typed, seen, capsys):
    typed("  Count to 3. ", "", "And to 4?", "/new", "Hello", "/exit", "never read")
    messages = generate(chat=True, prompt="Hi", max_new_tokens=6)
    assert [m["content"] for m in messages if m["role"] == "user"] == ["Hello"]
    said = capsys.readouterr().out
    answers = [tokenizer.decode(ids) for ids in seen]
    assert len(seen) == 4
    first = [{"role": "user", "content": "Hi"}]
    assert seen[0] == prompt_ids(first) and seen[3] == prompt_ids([{"role": "user", "content": "Hello"}])
    reply = answers[1].partition("### Response:\n")[2].partition("<|endoftext|>")[0]
    second = [*first, {"role": "assistant", "content": reply}, {"role": "user", "content": "Count to 3."}]
    assert seen[1] == prompt_ids(second) and reply in said
    assert answers[2].count("### Instruction:") == 3 and "(cut at --max_new_tokens 6)" in said


def test_a_chat_survives_what_goes_wrong_in_it(typed, seen, capsys):
    typed("word " * 600, "Add 2 and 3.", KeyboardInterrupt())
    messages = generate(chat=True, max_new_tokens=20)
    said = capsys.readouterr().out
    assert re.search(r"error: \d{4}", said) and "exceed the 1024 positions, or /new" in said
    assert [m["content"] for m in messages if m["role"] == "user"] == ["Add 2 and 3."] and len(seen) == 1


def test_an_answer_comes_in_pieces_each_longer_and_without_half_characters(base):
    config = script.to_generation_config([END], **SAMPLING)
    ids = prompt_ids([{"role": "user", "content": TEST_ROWS[0]["question"]}])
    pieces = [text for text, _ in script.stream_answer(base, tokenizer, ids, config)]
    assert len(pieces) > 10 and all(b.startswith(a) for a, b in zip(pieces, pieces[1:]))
    assert pieces[-1] == expected(base, [{"role": "user", "content": TEST_ROWS[0]["question"]}])[0]


SAMPLING = {"max_new_tokens": 40, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "num_beams": 1, "seed": 0}
SAMPLING |= {"repetition_penalty": 1.0}


def test_bytes_of_one_character_are_shown_together(base, monkeypatch):
    new = tokenizer("é 漢 😀!", add_special_tokens=False).input_ids
    assert len(new) > 8

    def generate(self, input_ids, streamer, **kwargs):
        streamer.put(input_ids)
        for token in [*new, END]:
            streamer.put(torch.tensor([token]))
        streamer.end()
        return torch.cat([input_ids, torch.tensor([[*new, END]])], 1)

    monkeypatch.setattr(GenerationMixin, "generate", generate)
    config = script.to_generation_config([END], **SAMPLING)
    pieces = list(script.stream_answer(base, tokenizer, [5, 6], config))
    assert pieces[-1] == ("é 漢 😀!", False) and not any("\ufffd" in text for text, _ in pieces)


def test_a_stream_that_is_closed_or_fails_ends_its_thread(base, monkeypatch):
    steps, real = [], LlamaForCausalLM.forward
    monkeypatch.setattr(LlamaForCausalLM, "forward", lambda *args, **kw: steps.append(1) or real(*args, **kw))
    config = script.to_generation_config([1023], **SAMPLING | {"max_new_tokens": 900})  # a token that never comes
    before = threading.active_count()
    stream = script.stream_answer(base, tokenizer, [5, 6], config)
    next(stream)
    stream.close()
    assert len(steps) < 800 and threading.active_count() == before
    monkeypatch.setattr(LlamaForCausalLM, "forward", lambda *args, **kw: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(script.stream_answer(base, tokenizer, [5, 6], config))
    assert threading.active_count() == before


# -----------------------------------------------------------------------------
# the validation rows of a fine-tuning run


def test_a_run_gives_its_validation_rows_to_adapter_and_merged_model(tmp_path):
    import finetune

    data = write(tmp_path / "data.jsonl", *TEST_ROWS[:40])
    run = str(tmp_path / "run")
    flags = {"data_path": data, "val_set_size": 12, "batch_size": 4, "max_steps": 8, "prompt_template": "alpaca_short"}
    finetune.train(output_dir=run, seed=7, learning_rate=5e-3, **flags)
    flags = {"data_path": f"{run}/validation.jsonl", "max_new_tokens": 30, "score": "chrf"}
    summary = generate(lora_weights=f"{run}/adapter", output_dir="adapter", **flags)
    rows = answers("adapter")
    questions = [row["question"] for row in TEST_ROWS[:40]]
    assert len(rows) == 12 and {row["messages"][0]["content"] for row in rows} <= set(questions)
    assert all(row["reference"] == TEST_ROWS[questions.index(row["messages"][0]["content"])]["answer"] for row in rows)
    assert 0 < summary["score"]["mean"] < 1

    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    PeftModel.from_pretrained(model, f"{run}/adapter").merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(f"{run}/adapter").save_pretrained(tmp_path / "merged")
    generate(base_model=str(tmp_path / "merged"), output_dir="merged", **flags)
    assert texts(answers("merged")) == texts(rows)


def test_from_the_command_line_an_error_is_its_message_alone(tmp_path, monkeypatch):
    (tmp_path / "bad.jsonl").write_bytes(b"\xff\xfe")
    for flags, message in [
        (["--score", "bleu", "--data_path", "x"], "error: --score bleu: one of gsm8k_strict, gsm8k_flexible, exact"),
        (["--data_path", str(tmp_path / "bad.jsonl")], "error: .*bad.jsonl, row 1: cannot be read: 'utf-8' codec"),
        (["--seed", "-1"], "error: .*--seed not below 0"),
    ]:
        monkeypatch.setattr(sys, "argv", ["generate.py", *flags])
        with pytest.raises(SystemExit) as stop:
            script.run_cli(generate)
        assert re.match(message, str(stop.value.code))


# -----------------------------------------------------------------------------
# adapters


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True, "target_modules": "all-linear", "lora_alpha": 1},
        {"target_modules": ["q_proj", "embed_tokens"], "lora_alpha": 4},
        {"modules_to_save": ["norm"]},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's, of tied embeddings
def test_an_adapter_answers_as_its_merged_model(tmp_path, greedy, config):
    folder = make_adapter(tmp_path / "adapter", **config)
    rows = ask(lora_weights=folder, max_samples=6)
    merged = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    merged = PeftModel.from_pretrained(merged, folder).eval()
    if "embed_tokens" not in config.get("target_modules", ""):  # merging would change the tied output layer too
        merged = merged.merge_and_unload()
    assert texts(rows) == [expected(merged, row["messages"]) for row in rows]
    assert texts(rows) != texts(greedy[:6])


def test_an_adapter_of_finetune_brings_its_template(seen, capsys):
    import finetune

    flags = {"data_path": str(DATA), "max_samples": 16, "val_set_size": 0, "batch_size": 8, "max_steps": 1}
    flags |= {"base_model": "data/tiny/model"}
    finetune.train(output_dir="out/finetune", prompt_template="alpaca_short", **flags)
    capsys.readouterr()
    generate(prompt="Count.", input="a b", max_new_tokens=1)
    said = capsys.readouterr().out
    assert "+ out/finetune/adapter " in said and "template the model's own" in said
    generate(prompt="Count.", input="a b", max_new_tokens=1, prompt_template="vigogne")
    assert seen[0] == prompt_ids([{"role": "user", "content": "Count.\n\n### Input:\na b"}], "alpaca_short")
    assert seen[1] == prompt_ids([{"role": "user", "content": "Count.\n\n### Entrée:\na b"}], "vigogne")


def damage(folder, kind):
    """Damage an adapter, or replace it by one of another base model."""
    tensors, path = load_file(f"{folder}/adapter_model.safetensors"), folder / "adapter_model.safetensors"
    first, config = sorted(tensors)[0], json.loads((folder / "adapter_config.json").read_text())
    if kind == "missing":
        save_file({name: tensor for name, tensor in tensors.items() if name != first}, path)
    elif kind == "renamed":
        save_file({name.replace(first, first.replace("q_proj", "wq")): t for name, t in tensors.items()}, path)
    elif kind == "torn":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "no weights":
        path.unlink()
    elif kind == "no adapter":
        (folder / "adapter_config.json").unlink()
    elif kind == "no json":
        (folder / "adapter_config.json").write_text("{")
    elif kind in ("peft_type", "target_modules"):
        changed = {"peft_type": "MAGIC"} if kind == "peft_type" else {"target_modules": ["c_attn"]}
        (folder / "adapter_config.json").write_text(json.dumps(config | changed))
    else:
        change = {"wide": {"hidden_size": 64}, "deep": {"num_hidden_layers": 6}, "shallow": {"num_hidden_layers": 2}}
        model = LlamaConfig.from_pretrained(BASE)
        for name, value in change[kind].items():
            setattr(model, name, value)
        LlamaForCausalLM(model).save_pretrained(folder.parent / "other")
        make_adapter(folder, folder.parent / "other")


@pytest.mark.parametrize(
    "kind, message",
    [
        ("missing", "does not fit this base model: .*layers.0.self_attn.q_proj.lora_A"),
        ("renamed", "does not fit this base model: .*layers.0.self_attn.q_proj.lora_A"),
        ("deep", "does not fit this base model: .*layers.4"),
        ("shallow", "does not fit this base model: .*layers.2"),
        ("wide", "does not fit this base model: (?s:.*)size mismatch.*layers.0"),
        ("torn", "does not fit this base model: .*incomplete metadata"),
        ("no json", "does not fit this base model: .*"),
        ("peft_type", "does not fit this base model: 'MAGIC'"),
        ("target_modules", "does not fit this base model: Target modules .'c_attn'. not found"),
        ("no weights", "does not fit this base model: .*No such file"),
        ("no adapter", "does not fit this base model: .*"),
    ],
)
@pytest.mark.filterwarnings("ignore:Found missing")
def test_an_adapter_that_does_not_fit_is_refused(tmp_path, adapter, kind, message):
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    damage(folder, kind)
    with pytest.raises(ValueError, match=f"--lora_weights {folder}:? {message}") as refused:
        generate(base_model="data/tiny/model", lora_weights=str(folder))
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize("bits, kind", [("load_in_8bit", "Linear8bitLt"), ("load_in_4bit", "Linear4bit")])
def test_quantized_bases_answer_on_a_cpu(monkeypatch, adapter, bits, kind):
    models, real = [], script.answer_batch
    monkeypatch.setattr(script, "answer_batch", lambda model, *args: models.append(model) or real(model, *args))
    for flags, whole in (({}, ask(max_samples=8)), ({"lora_weights": adapter}, None)):
        rows = ask(max_samples=8, **{bits: True}, **flags)
        assert {type(m).__name__ for n, m in models[-1].named_modules() if n.endswith("up_proj")} == {kind}
        assert whole is None or sum(a == b for a, b in zip(texts(rows), texts(whole), strict=True)) > 2
        assert len({row["prediction"] for row in rows}) > 4


@pytest.mark.parametrize("kind", ["int8", "fp8", "nf4"])
def test_a_quantized_checkpoint_answers_as_what_it_was_made_of(kind, tmp_path):
    from export_hf_checkpoint import export

    export(base_model=str(BASE), output_dir=str(tmp_path / kind), quantize=kind)
    whole, rows = ask(max_samples=8), ask(max_samples=8, base_model=str(tmp_path / kind))
    assert sum(a == b for a, b in zip(texts(rows), texts(whole), strict=True)) > 2


# -----------------------------------------------------------------------------
# bad input


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"prompt": "a", "data_path": "b"}, "--prompt or --chat, --data_path, --ui: one at a time"),
        ({"chat": True, "ui": True}, "one at a time"),
        ({"chat": True, "data_path": "x"}, "one at a time"),
        ({"input": "a"}, "--input and --image go with --prompt"),
        ({"score": "exact"}, "--score and --max_samples go with --data_path"),
        ({"max_samples": 4}, "--score and --max_samples go with --data_path"),
        ({"score": "gsm8k", "data_path": str(DATA)}, "--score gsm8k: one of gsm8k_strict"),
        ({"score": "no.py:f", "data_path": str(DATA)}, "--score no.py:f cannot be loaded: FileNotFoundError"),
        ({"temperature": -1.0}, "--temperature, --top_k, --seed not below 0"),
        ({"temperature": math.nan}, "--temperature, --top_k, --seed not below 0"),
        ({"temperature": 1.0, "top_k": -1}, "--temperature, --top_k, --seed not below 0"),
        ({"temperature": 1.0, "top_p": 0.0}, r"--top_p in \(0, 1\]"),
        ({"temperature": 1.0, "top_p": 1.1}, r"--top_p in \(0, 1\]"),
        ({"repetition_penalty": 0.0}, "--repetition_penalty above 0"),
        ({"num_beams": 0}, "must be at least 1"),
        ({"max_new_tokens": 0}, "must be at least 1"),
        ({"micro_batch_size": 0}, "--micro_batch_size 0 is below 1"),
        ({"max_samples": -1, "data_path": str(DATA)}, "--max_samples -1 below 0"),
        ({"top_k": 5}, "--top_p and --top_k do nothing at --temperature 0"),
        ({"top_p": 0.5}, "--top_p and --top_k do nothing at --temperature 0"),
        ({"dtype": "half"}, "--dtype half: one of auto, bfloat16"),
        ({"lora_weights": "nowhere"}, "--lora_weights nowhere: no adapter"),
        ({"base_model": "nowhere"}, "nowhere: no such file or folder, and no id of the hub"),
        ({"base_model": str(ROOT / "data")}, "--base_model .*data"),
        ({"data_path": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"prompt_template": "alpacca"}, "no such template; there are alpaca, alpaca_short, chatml, vigogne"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_flags_are_refused_before_the_model_loads(no_model, flags, message):
    no_model()
    with pytest.raises(ValueError, match=message):
        generate(**flags)
    assert not list(Path().rglob("*"))


def test_a_configuration_that_cannot_be_is_refused(tmp_path):
    path = Path(make_base(tmp_path / "base")) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": 126}))
    with pytest.raises(ValueError, match=f"(?s)--base_model {path.parent}.*126. is not a multiple") as error:
        generate(base_model=str(path.parent))
    assert error.traceback[-1].path == Path(script.__file__)


def test_what_shows_itself_when_the_model_loads_is_a_sentence(tmp_path):
    (tmp_path / "a.jinja").write_text("{{ messages[0].content")
    with pytest.raises(ValueError, match="template .*a.jinja: unexpected end of template") as error:
        generate(prompt="a", prompt_template=str(tmp_path / "a.jinja"))
    assert error.traceback[-1].path == Path(script.__file__)  # run_cli shows the message alone
    with pytest.raises(ValueError, match="only one can be used") as error:
        generate(prompt="a", load_in_8bit=True, load_in_4bit=True)
    assert error.traceback[-1].path == Path(script.__file__)


def test_a_prompt_may_fill_the_context_to_the_last_position():
    room = 1024 - len(prompt_ids([{"role": "user", "content": "Add 2 and 3."}]))
    generate(prompt="Add 2 and 3.", max_new_tokens=room)
    with pytest.raises(ValueError, match="exceed the 1024 positions"):
        generate(prompt="Add 2 and 3.", max_new_tokens=room + 1)


@pytest.mark.parametrize(
    "name, content, flags, message",
    [
        ("a.jsonl", '\n{"question": 5}\n', {}, r"a.jsonl, row 1: not alpaca .*data/prepare.py"),
        ("a.jsonl", '{"question": "q"}\n{"question": \n', {}, r"a.jsonl, row 2: cannot be read"),
        ("a.csv", "question,answer\nA?,1,2\n", {}, r"a.csv, row 1: not alpaca"),
        ("a.jsonl", "\n", {}, r"a.jsonl: no rows in it"),
        ("a.md", "hello", {}, r"a.md, row 1: cannot be read: neither json, jsonl, csv nor parquet"),
        ("a.txt", "hello\nyou\n", {}, r"a.txt, row 1: cannot be read: neither json, jsonl, csv nor parquet"),
        ("a.csv", "question\nyou\n", {"score": "exact"}, "row 1: --score exact: the row has nothing to compare with"),
        ("a.jsonl", '{"question": "q", "videos": ["a.mp4"]}\n', {}, "row 1: not alpaca .*no videos"),
        (
            "a.jsonl",
            '{"messages": [{"role": "user", "content": "q"}, {"role": "tool", "content": "t"}]}\n',
            {},
            "row 1: the chat template cannot render .*'tool'.*: the alpaca template knows user, assistant",
        ),
        ("a.jinja", "{{ messages[0].content", {"data_path": str(DATA)}, "row 1: the chat template cannot render"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_files_are_refused_before_the_model_loads(tmp_path, no_model, name, content, flags, message):
    no_model()
    path = tmp_path / name
    path.write_text(content)
    flags = ({"prompt_template": str(path)} if path.suffix == ".jinja" else {"data_path": str(path)}) | flags
    with pytest.raises(ValueError, match=message):
        generate(**flags)
    assert not list(Path().rglob("*"))
