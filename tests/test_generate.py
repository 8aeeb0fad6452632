"""
generate.py: its answers against transformers' own, its scores against verl's rule, what must not change an answer,
and bad input.

    .venv/bin/python -m pytest tests/test_generate.py
"""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin, LlamaConfig, LlamaForCausalLM

import generate as script
from generate import compute_score, final_number, generate, read_prompts, score_answer

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "data" / "tiny" / "model"
DATA = ROOT / "data" / "tiny" / "test.jsonl"
TEST_ROWS = [json.loads(line) for line in DATA.read_text().splitlines()]
END = 0  # <|endoftext|> of the embedded tokenizer
tokenizer = AutoTokenizer.from_pretrained(BASE)


def answers(path="out/generate/predictions.jsonl"):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").strip("\n").split("\n")]


def ask(**flags):
    """Answer the first 24 test problems, or what `flags` say; returns the rows of the prediction file."""
    generate(**({"data_path": str(DATA), "max_samples": 24, "max_new_tokens": 40} | flags))
    return answers(flags.get("output_path", "out/generate/predictions.jsonl"))


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
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    return model


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
    reference = "a long way" + " to go" * 100 + " 3\n#### 1,024"
    assert score_answer("#### 1024", reference, "gsm8k_strict") == 1.0
    assert score_answer("it is 1024", reference, "gsm8k_strict") == 0.0
    assert score_answer("it is 1024", reference, "gsm8k_flexible") == 1.0
    assert score_answer(" yes\n", "yes", "exact") == 1.0 and score_answer("Yes", "yes", "exact") == 0.0


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
    assert whole == {"answer": greedy[0]["prediction"], "cut": False} and "cut" not in capsys.readouterr().out
    cut = generate(prompt=question, max_new_tokens=full)
    assert cut == {"answer": greedy[0]["prediction"], "cut": True}
    assert capsys.readouterr().out.endswith(f"\n(cut at --max_new_tokens {full})\n")
    rows = ask(max_samples=1, max_new_tokens=4)
    assert rows[0]["cut"] and tokenizer(rows[0]["prediction"]).input_ids == tokenizer("8*14 makes").input_ids


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
    assert texts(ask(max_samples=2)) == [("TomTom", False), ("TomTomTom", True)]


@pytest.mark.parametrize("kind", ["base", "adapter", "adapter of no task type"])
def test_the_models_own_generation_config_does_not_leak_in(tmp_path, base, adapter, kind):
    leak = {"do_sample": True, "temperature": 5.0, "top_k": 3, "repetition_penalty": 1.8, "num_beams": 3, "min_p": 0.3}
    leak |= {"no_repeat_ngram_size": 2, "suppress_tokens": [328], "min_new_tokens": 30, "forced_eos_token_id": 4}
    leak |= {"stop_strings": ["1"], "max_length": 8, "eos_token_id": END}
    folder = make_base(tmp_path / "leaky", generation=leak)
    flags = {} if kind == "base" else {"lora_weights": adapter}
    if kind == "adapter of no task type":
        flags = {"lora_weights": make_adapter(tmp_path / "adapter")}
        assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["task_type"] is None
    assert texts(ask(base_model=folder, max_samples=8, **flags)) == texts(ask(max_samples=8, **flags))


def test_every_end_token_of_the_checkpoint_stops_an_answer(tmp_path, greedy, capsys):
    period = tokenizer.convert_tokens_to_ids(".")
    folder = make_base(tmp_path / "base", generation={"eos_token_id": [period, 9]})
    rows = ask(base_model=folder)
    assert [row["prediction"] for row in rows] == [row["prediction"].partition(".")[0] for row in greedy]
    assert not any(row["cut"] for row in rows)


def test_the_adapters_end_tokens_replace_the_checkpoints(tmp_path, adapter):
    shutil.copytree(adapter, tmp_path / "adapter")
    plain = ask(lora_weights=adapter, max_samples=8)
    often = tokenizer.convert_tokens_to_ids("*")
    (tmp_path / "adapter" / "generation_config.json").write_text(json.dumps({"eos_token_id": often}))
    folder = make_base(tmp_path / "base", generation={"eos_token_id": [END, tokenizer.convert_tokens_to_ids("1")]})
    rows = ask(base_model=folder, lora_weights=str(tmp_path / "adapter"), max_samples=8)
    assert [row["prediction"] for row in rows] == [row["prediction"].partition("*")[0] for row in plain]
    assert sum("*" in row["prediction"] for row in plain) > 4


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


def test_penalty_and_beams_are_transformers(base, greedy):
    for flags in ({"repetition_penalty": 1.5}, {"num_beams": 4}):
        rows = ask(**flags)
        assert texts(rows) != texts(greedy)
        assert texts(rows[:8]) == [expected(base, row["messages"], **flags) for row in greedy[:8]]


# -----------------------------------------------------------------------------
# files


def test_a_file_of_answers_has_rows_references_scores_and_a_summary(tmp_path, capsys):
    right = [row["answer"] for row in TEST_ROWS[:6]]
    # the base model's own style, told as a reference: half of the exact scores are 1
    own = [row["prediction"] for row in ask(max_samples=3)]
    rows = [{"question": row["question"], "answer": a} for row, a in zip(TEST_ROWS, own + right[3:], strict=False)]
    capsys.readouterr()
    path = str(tmp_path / "deep" / "er" / "p.1.jsonl")
    found = ask(data_path=write(tmp_path / "data.jsonl", *rows), output_path=path, score="exact", micro_batch_size=4)
    assert [row["index"] for row in found] == [0, 1, 2, 3, 4, 5]
    assert [row["messages"][0]["content"] for row in found] == [row["question"] for row in rows]
    assert [row["reference"] for row in found] == [row["answer"] for row in rows]
    assert [row["score"] for row in found] == [1, 1, 1, 0, 0, 0]
    assert all(set(row) == {"index", "messages", "prediction", "cut", "reference", "score"} for row in found)
    assert {p.name for p in Path(path).parent.iterdir()} == {"p.1.jsonl", "p.1.summary.json"}
    summary = json.loads((tmp_path / "deep" / "er" / "p.1.summary.json").read_text())
    tokens = sum(len(tokenizer(row["prediction"], add_special_tokens=False).input_ids) for row in found)
    assert summary["mean"] == 0.5 and summary["standard_error"] == pytest.approx(0.5 / math.sqrt(6))
    assert (summary["rows"], summary["cut"], summary["tokens"], summary["score"]) == (6, 0, tokens, "exact")
    assert summary["generation_config"]["max_new_tokens"] == 40
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "generate.py  data/tiny/model + no adapter    cpu  float32  template alpaca"
    rate = f"{tokens / summary['seconds']:,.0f} tok/s"
    assert said[1] == f"6 answers, {tokens:,} tokens in {summary['seconds']:.1f} s, {rate}"
    assert said[2:] == ["exact 50.0% +- 20.4% (3 of 6)", f"wrote {path}"]


def test_the_base_model_knows_the_numbers_but_not_the_form():
    flexible = generate(data_path=str(DATA), max_samples=24, max_new_tokens=60, score="gsm8k_flexible")
    strict = generate(data_path=str(DATA), max_samples=24, max_new_tokens=60, score="gsm8k_strict")
    assert flexible["mean"] > 0.3 and strict["mean"] == 0 == strict["standard_error"]
    for row in answers():
        assert row["score"] == 0 and "####" not in row["prediction"]


def test_the_lines_of_a_text_file_are_prompts(tmp_path, seen):
    text = "\ufeffAdd 2 and 3.\r\n\r\n  \r\nOne\u2028line\x0c\nlast"
    path = tmp_path / "prompts.txt"
    path.write_bytes(text.encode())
    lines = ["Add 2 and 3.", "One\u2028line\x0c", "last"]
    conversations = [[{"role": "user", "content": line}] for line in lines]
    assert read_prompts(str(path), "\n", 0) == (conversations, [None, None, None])
    assert read_prompts(str(path), "\n", 2) == (conversations[:2], [None, None])
    rows = ask(data_path=str(path), max_new_tokens=2)
    assert [row["messages"] for row in rows] == conversations
    assert all(set(row) == {"index", "messages", "prediction", "cut"} for row in rows)
    assert sorted(seen) == sorted(prompt_ids(c) for c in conversations)


def test_every_form_of_row_becomes_the_prompt_that_it_was_trained_with(tmp_path, seen):
    user = lambda text: {"role": "user", "content": text}
    said = lambda text: {"role": "assistant", "content": text}
    forms = [
        (
            {"instruction": "Count.", "input": "a b", "output": "2"},
            [user("Count.\n\n### Input:\na b")],
            "2",
        ),
        ({"instruction": "Hi", "output": "x", "history": [["a", "b"]]}, [user("a"), said("b"), user("Hi")], "x"),
        ({"messages": [user("1?"), said("1"), user("2?"), said("2")]}, [user("1?"), said("1"), user("2?")], "2"),
        ({"messages": [user("1?"), said("1"), user("2?")]}, [user("1?"), said("1"), user("2?")], None),
        (
            {"system": "Brief.", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            [{"role": "system", "content": "Brief."}, user("q")],
            "a",
        ),
        ({"prompt": [user("q")], "extra_info": {"answer": "#### 4"}}, [user("q")], "#### 4"),
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


def test_of_a_folder_the_test_files_are_answered():
    rows = ask(data_path=str(DATA.parent), max_samples=3, max_new_tokens=1)
    assert [row["reference"] for row in rows] == [row["answer"] for row in TEST_ROWS[:3]]


def test_a_run_that_dies_leaves_the_earlier_answers(tmp_path, monkeypatch):
    path = str(tmp_path / "p.jsonl")
    before = ask(output_path=path, max_samples=4)
    real, calls = GenerationMixin.generate, []

    def die(self, **kwargs):
        calls.append(kwargs["input_ids"].shape[0])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, **kwargs)

    monkeypatch.setattr(GenerationMixin, "generate", die)
    with pytest.raises(KeyboardInterrupt):
        ask(output_path=path, micro_batch_size=3)
    assert answers(path) == before and len(answers(path + ".incomplete")) == 3


# -----------------------------------------------------------------------------
# the terminal, and flags left out


@pytest.mark.parametrize("num_beams", [1, 2])
def test_one_answer_is_printed_as_it_is_returned(num_beams, capsys):
    found = generate(prompt="Tom has 6 boxes with 7 coins in each.", num_beams=num_beams, max_new_tokens=60)
    assert len(found["answer"]) > 10 and not found["cut"]
    said = capsys.readouterr().out.split("\n", 1)[1]
    assert said == f"> Tom has 6 boxes with 7 coins in each.\n{found['answer']}\n"
    assert not list(Path().rglob("*"))


def test_without_any_flag_it_asks_the_first_test_problem(adapter, capsys, greedy):
    assert generate()["answer"] == greedy[0]["prediction"]
    said = capsys.readouterr().out
    assert f"> {TEST_ROWS[0]['question']}\n" in said and "+ no adapter" in said
    trained = Path("out/finetune/adapter")
    trained.mkdir(parents=True)  # as a run leaves it that died early
    assert generate()["answer"] == greedy[0]["prediction"]
    shutil.copytree(adapter, trained, dirs_exist_ok=True)
    capsys.readouterr()
    assert generate()["answer"] != greedy[0]["prediction"]
    assert "+ out/finetune/adapter " in capsys.readouterr().out
    assert generate(base_model=str(BASE))["answer"] == greedy[0]["prediction"]


def test_from_the_command_line_an_error_is_its_message_alone(tmp_path, monkeypatch):
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    for flags, message in [
        (["--score", "bleu", "--data_path", "x"], "error: --score bleu: one of gsm8k_strict, gsm8k_flexible, exact"),
        (["--data_path", str(tmp_path / "bad.txt")], "error: --data_path .*bad.txt: cannot be read: 'utf-8' codec"),
        (["--seed", "-1"], "error: --max_samples and --seed must not be negative"),
        (["--temprature", "1"], "unknown flag --temprature: did you mean --temperature"),
    ]:
        monkeypatch.setattr(sys, "argv", ["generate.py", *flags])
        with pytest.raises(SystemExit, match=message):
            script.run_cli(generate)


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
def test_an_adapter_answers_as_its_merged_model(tmp_path, base, greedy, config):
    folder = make_adapter(tmp_path / "adapter", **config)
    rows = ask(lora_weights=folder, max_samples=6)
    merged = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    merged = PeftModel.from_pretrained(merged, folder).eval()
    if "embed_tokens" not in config.get("target_modules", ""):  # merging would change the tied output layer too
        merged = merged.merge_and_unload()
    assert texts(rows) == [expected(merged, row["messages"]) for row in rows]
    assert texts(rows) != texts(greedy[:6])


def test_an_adapter_of_finetune_brings_its_template(tmp_path, seen, capsys):
    import finetune

    flags = {"data_path": str(DATA), "max_samples": 16, "val_set_size": 0, "batch_size": 8, "max_steps": 1}
    flags["warmup_ratio"] = 0.0
    finetune.train(output_dir="out/finetune", prompt_template="alpaca_short", **flags)
    capsys.readouterr()
    generate(prompt="Count.", input="a b", max_new_tokens=1)
    said = capsys.readouterr().out
    assert "+ out/finetune/adapter " in said and "template the tokenizer's own" in said
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
        ("missing", "does not fit this base model: 1 tensors have no counterpart, .*layers.0.self_attn.q_proj.lora_A"),
        ("renamed", "does not fit this base model: 2 tensors have no counterpart, .*layers.0.self_attn.q_proj.lora_A"),
        ("deep", "does not fit this base model: 8 tensors have no counterpart, .*layers.4"),
        ("shallow", "does not fit this base model: 8 tensors have no counterpart, .*layers.2"),
        ("wide", "is damaged or does not fit this base model: (?s:.*)size mismatch.*layers.0"),
        ("torn", "is damaged or does not fit this base model: .*incomplete metadata"),
        ("no json", "is damaged or does not fit this base model: Expecting property name"),
        ("peft_type", "is damaged or does not fit this base model: 'MAGIC'"),
        ("target_modules", "is damaged or does not fit this base model: Target modules .'c_attn'. not found"),
        ("no weights", "no adapter_config.json and adapter_model.safetensors there"),
        ("no adapter", "no adapter there .adapter_config.json."),
    ],
)
@pytest.mark.filterwarnings("error:Found missing")  # peft names every key; the refusal names three
def test_an_adapter_that_does_not_fit_is_refused(tmp_path, adapter, kind, message):
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    damage(folder, kind)
    with pytest.raises(ValueError, match=f"--lora_weights {folder}:? {message}") as refused:
        generate(lora_weights=str(folder))
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize("bits, kind", [("load_in_8bit", "Linear8bitLt"), ("load_in_4bit", "Linear4bit")])
def test_quantized_bases_answer_on_a_cpu(monkeypatch, adapter, bits, kind):
    models, real = [], script.load_base
    monkeypatch.setattr(script, "load_base", lambda *args: models.append(real(*args)) or models[-1])
    for flags, whole in (({}, ask(max_samples=8)), ({"lora_weights": adapter}, None)):
        rows = ask(max_samples=8, **{bits: True}, **flags)
        assert {type(m).__name__ for n, m in models[-1].named_modules() if n.endswith("up_proj")} == {kind}
        assert whole is None or sum(a == b for a, b in zip(texts(rows), texts(whole), strict=True)) > 2
        assert len({row["prediction"] for row in rows}) > 4


# -----------------------------------------------------------------------------
# bad input


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"prompt": "a", "data_path": "b"}, "--prompt and --data_path: give one of them"),
        ({"input": "a"}, "--input goes with --prompt"),
        ({"score": "exact"}, "--score exact needs --data_path"),
        ({"score": "gsm8k", "data_path": str(DATA)}, "--score gsm8k: one of gsm8k_strict"),
        ({"output_path": "x"}, "--output_path x goes with --data_path"),
        ({"output_path": ".", "data_path": str(DATA)}, "--output_path . is a folder: name a file"),
        ({"output_path": str(DATA), "data_path": str(DATA)}, "is the file of --data_path"),
        ({"temperature": -1.0}, "--temperature and --top_k must not be negative"),
        ({"temperature": math.nan}, "--temperature and --top_k must not be negative"),
        ({"temperature": math.inf}, "--temperature and --top_k must not be negative"),
        ({"temperature": 1.0, "top_k": -1}, "--temperature and --top_k must not be negative"),
        ({"temperature": 1.0, "top_p": 0.0}, r"--top_p in \(0, 1\]"),
        ({"temperature": 1.0, "top_p": 1.1}, r"--top_p in \(0, 1\]"),
        ({"repetition_penalty": 0.0}, "--repetition_penalty above 0"),
        ({"num_beams": 0}, "must be at least 1"),
        ({"max_new_tokens": 0}, "must be at least 1"),
        ({"micro_batch_size": 0}, "must be at least 1"),
        ({"max_samples": -1}, "--max_samples and --seed must not be negative"),
        ({"seed": 2**32}, "--max_samples and --seed must not be negative"),
        ({"top_k": 5}, "--top_p and --top_k do nothing at --temperature 0"),
        ({"top_p": 0.5}, "--top_p and --top_k do nothing at --temperature 0"),
        ({"num_beams": 2, "temperature": 1.0}, "--num_beams 2 searches and --temperature 1.0 samples"),
        ({"load_in_8bit": True, "load_in_4bit": True}, "give one of them"),
        ({"dtype": "half"}, "--dtype half: one of auto, bfloat16"),
        ({"lora_weights": "nowhere"}, "--lora_weights nowhere: no adapter there"),
        ({"base_model": "nowhere"}, "--base_model nowhere: no such folder"),
        ({"data_path": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"data_path": "nowhere.txt"}, "nowhere.txt: no such file"),
        ({"prompt_template": "alpacca"}, "no such template; there are: alpaca, alpaca_short, chatml, vigogne"),
        ({"prompt": "word " * 300, "max_new_tokens": 9}, "prompt 1 has 12.. tokens; with --max_new_tokens 9 .* 1024"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_flags_are_refused_before_the_model_loads(monkeypatch, flags, message):
    monkeypatch.setattr(script, "load_base", lambda *args: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=message):
        generate(**flags)
    assert not list(Path().rglob("*"))


def test_a_prompt_may_fill_the_context_to_the_last_position():
    room = 1024 - len(prompt_ids([{"role": "user", "content": "Add 2 and 3."}]))
    generate(prompt="Add 2 and 3.", max_new_tokens=room)
    with pytest.raises(ValueError, match="more than the 1024 positions"):
        generate(prompt="Add 2 and 3.", max_new_tokens=room + 1)


@pytest.mark.parametrize(
    "name, content, flags, message",
    [
        ("a.jsonl", '{"question": "q", "answer": "#### 1"}\n\n{"question": 5}\n', {}, r"a.jsonl, line 3: no text in"),
        ("a.jsonl", '{"question": "q"}\n{"question": \n', {}, r"a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", '{"text": "q"}\n', {}, r"a.jsonl, line 1: none of the known forms"),
        ("a.jsonl", "\n", {}, r"a.jsonl: no rows in it"),
        ("a.txt", " \n\n", {}, r"--data_path .*a.txt: no lines in it"),
        ("a.md", "hello", {}, r"a.md: not a data file"),
        (
            "a.jsonl",
            '{"question": "q", "answer": "#### 1"}\n{"question": "q", "answer": "one"}\n',
            {"score": "gsm8k_flexible"},
            "--score gsm8k_flexible: the answer in row 2 of .*a.jsonl has no '#### number'",
        ),
        (
            "a.jsonl",
            '{"question": "q", "answer": "one"}\n{"question": "q"}\n',
            {"score": "exact"},
            "--score exact: 1 rows of .*a.jsonl hold no answer",
        ),
        ("a.txt", "hello\nyou\n", {"score": "exact"}, "--score exact: 2 rows of .*a.txt hold no answer"),
        (
            "a.jsonl",
            '{"question": "q"}\n{"messages": [{"role": "user", "content": "q"}, {"role": "tool", "content": "t"}]}\n',
            {},
            "prompt 2: the chat template cannot render .*'tool'.*: the alpaca template knows user, assistant",
        ),
        ("a.jinja", "{{ messages[0].content", {"data_path": str(DATA)}, "prompt 1: the chat template cannot render"),
        (
            "a.jinja",
            "{{- '' -}}",
            {"data_path": str(DATA)},
            "prompt 1: the chat template .*a.jinja makes nothing of it",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_files_are_refused_before_the_model_loads(tmp_path, monkeypatch, name, content, flags, message):
    monkeypatch.setattr(script, "load_base", lambda *args: pytest.fail("the model was loaded"))
    path = tmp_path / name
    path.write_text(content)
    flags = ({"prompt_template": str(path)} if path.suffix == ".jinja" else {"data_path": str(path)}) | flags
    with pytest.raises(ValueError, match=message):
        generate(**flags)
    assert not list(Path().rglob("*"))
