"""
finetune.py in process: packed rows on tiny random models, the whole script on the embedded default, what must not
change a run, killed runs, and bad input.

    .venv/bin/python -m pytest tests/test_finetune.py

Whole processes, several ranks and DeepSpeed: tests/test_finetune_ranks.py.
"""

import gc
import json
import math
import re
import shutil
import traceback
from pathlib import Path
from types import SimpleNamespace

import datasets
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

import finetune
from finetune import IGNORE, LoraTrainer, pack, pack_model, packed_rows_attention, plot, sums_of_hidden, sums_of_logits

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "data" / "tiny" / "model"
SMALL = {  # a run of 6 steps on 44 examples, 2 epochs of which the last step is short, in about a second
    "base_model": str(BASE),
    "data_path": str(ROOT / "data" / "tiny" / "test.jsonl"),
    "max_samples": 52,
    "val_set_size": 8,
    "batch_size": 16,
    "num_epochs": 2,
    "save_steps": 2,
    "learning_rate": 3e-3,
}
# what the clock says, and a count that has two filler tokens for each empty micro-batch of an epoch's last step
CLOCK = {"train_runtime", "train_tokens_per_second", "num_input_tokens_seen"}
gc.freeze()  # Trainer collects garbage at the end of each run: not through the modules as well


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Draw no plots, which take a third of a small run: the module's fixtures, set up earlier, do."""
    monkeypatch.setattr(finetune, "plot", lambda records, folder: None)


def curve(folder, without=CLOCK):
    """Return the records of a run's log.jsonl without what may differ."""
    records = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in without} for record in records]


def record_of(folder):
    return json.loads((Path(folder) / "run.json").read_text())


def run(folder, **flags):
    """Run `train` in a folder; returns its curve."""
    finetune.train(output_dir=str(folder), **(SMALL | flags))
    return curve(folder)


def losses_of(records, name="loss"):
    return [record[name] for record in records if name in record]


def assert_same_curve(one, other, tolerance=1e-5):
    """tolerance is relative, ten times as much for gradient norms (measured for float32: 2.4e-5)."""
    assert [record.keys() for record in one] == [record.keys() for record in other]
    for a, b in zip(one, other, strict=True):
        for name in a:
            rel = 10 * tolerance if name == "grad_norm" else tolerance
            assert a[name] == pytest.approx(b[name], rel=rel), (name, a, b)


def adapter_bytes(folder):
    return (Path(folder) / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The folder of the run that the others are compared with."""
    folder = tmp_path_factory.mktemp("plain")
    run(folder)
    return folder


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """The losses of a run of three steps."""
    return losses_of(run(tmp_path_factory.mktemp("three"), max_steps=3))


@pytest.fixture
def copy(plain, tmp_path):
    """A copy of the plain run, to change."""
    return Path(shutil.copytree(plain, tmp_path / "copy"))


# -----------------------------------------------------------------------------
# packed rows and the loss

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"intermediate_size": 48, "eos_token_id": 0, "pad_token_id": 1, "bos_token_id": 2}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
KINDS = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "gemma3": (
        "Gemma3",
        {"head_dim": 8, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "bloom": ("Bloom", {}),  # its attention knows where a token stands from the mask alone
    "gemma2": ("Gemma2", {"head_dim": 8}),  # softcapping
    "gpt_oss": ("GptOss", {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),  # attention sinks
    "qwen3_next": (
        "Qwen3Next",
        {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
        | {"shared_expert_intermediate_size": 16}
        | LINEAR
        | EXPERTS,
    ),
}


def tiny(kind, vocab_size=101):
    """Return a random model of a kind."""
    torch.manual_seed(0)
    name, more = KINDS[kind]
    config = getattr(transformers, name + ("TextConfig" if kind == "gemma3" else "Config"))
    model = getattr(transformers, f"{name}ForCausalLM")
    return model(config(vocab_size=vocab_size, **SIZES | more)).train()


def examples(*lengths, vocab=101, learned_from=2):
    torch.manual_seed(sum(lengths))
    made = []
    for length in lengths:
        ids = torch.randint(3, vocab, (length,))
        labels = ids.clone()
        labels[:learned_from] = IGNORE
        made.append({"input_ids": ids.numpy(), "labels": labels.numpy()})
    return made


def one_by_one(model, rows):
    """Return (logits [L, V] at the labels, summed nll) of examples, each on its own in the model as it is."""
    logits, labels = [], []
    for row in rows:
        ids, targets = torch.tensor(row["input_ids"])[None], torch.tensor(row["labels"])[1:]
        logits.append(model(input_ids=ids).logits[0, :-1][targets != IGNORE])
        labels.append(targets[targets != IGNORE])
    logits = torch.cat(logits).float()
    return logits, F.cross_entropy(logits, torch.cat(labels), reduction="sum")


def packed(model, head, rows):
    """Return (logits, summed nll) of the same examples in one row of a packed model, as train() computes them."""
    batch = pack(rows)
    labels = batch.pop("labels")
    hidden = model(**batch).logits[0]
    return F.linear(hidden, head.weight, head.bias), head(hidden, labels[0])[0]


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "lora"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma3", "mistral"])
def test_packed_rows_have_the_logits_loss_and_gradients_of_examples_one_by_one(kind, lora):
    model = base = tiny(kind)
    if lora:
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
        model = peft.get_peft_model(model, config)
    rows = examples(3, 17, 9, 2, 6)  # longer and shorter than a window of 5
    logits, expected = one_by_one(model, rows)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert len(gradients) > 10 and all(gradient.any() for gradient in gradients.values())
    model.zero_grad()
    head = pack_model(base)
    model.train()
    got, nll = packed(model, head, rows)
    torch.testing.assert_close(got, logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(nll, expected, rtol=1e-6, atol=0)
    nll.backward()
    for name, gradient in gradients.items():
        got = model.get_parameter(name).grad
        assert (got - gradient).norm() <= 2e-6 * gradient.norm(), name


@pytest.mark.parametrize("kind", ["bloom", "gemma2", "gpt_oss", "qwen3_next"])
def test_models_that_packed_rows_would_change_are_refused_and_train_one_by_one(tmp_path, kind):
    model = tiny(kind, vocab_size=1024)
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path / "base")
    flags = {"base_model": str(tmp_path / "base"), "max_steps": 2, "val_set_size": 4, "learning_rate": 0.01}
    with pytest.raises(ValueError, match="--micro_batch_size 1"):
        run(tmp_path / "out", micro_batch_size=2, **flags)
    losses = losses_of(run(tmp_path / "out", micro_batch_size=1, **flags))
    assert losses[1] < losses[0]
    # and on what: the first step's loss is that of the base model on the 16 examples of that step
    assert losses[0] == pytest.approx(math.log(1024), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pack_model_sees_attention_that_forgets_where_examples_start(dtype):
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=dtype)
    pack_model(model)  # as it is, it may be packed
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=dtype)

    def forget(module, args, kwargs):
        starts = kwargs.get("cu_seq_lens_q")
        return args, kwargs if starts is None else kwargs | {"cu_seq_lens_q": starts[[0, -1]]}

    for layer in model.model.layers:
        layer.register_forward_pre_hook(forget, with_kwargs=True)
    with pytest.raises(ValueError, match="packed rows do not work for this model.*--micro_batch_size 1"):
        pack_model(model)


def test_softcapping_is_refused_in_half_precision_where_it_changes_logits_little():
    with pytest.raises(ValueError, match="no softcapping: --micro_batch_size 1"):
        pack_model(tiny("gemma2").to(torch.bfloat16))


def test_an_output_layer_with_an_adapter_is_refused_and_trains_one_by_one(tmp_path):
    flags = {"lora_target_modules": "lm_head"}
    with pytest.raises(ValueError, match="packed rows need a plain output layer .*: --micro_batch_size 1"):
        run(tmp_path, **flags)
    losses = losses_of(run(tmp_path, micro_batch_size=1, **flags))
    assert losses[-1] < losses[0]


def test_a_row_without_a_label_has_a_loss_of_zero_that_still_reaches_the_parameters():
    model = tiny("llama")
    head = pack_model(model)
    model.train()
    _, nll = packed(model, head, [])
    nll.backward()
    assert nll.item() == 0
    assert not any(p.grad.any() for p in model.parameters())  # and there is a gradient, of zeros: DDP waits for one


@pytest.mark.parametrize("window", [None, 4])
def test_attention_within_examples_by_hand(window):
    torch.manual_seed(0)
    lengths, (heads, groups, size) = [5, 1, 9], (4, 2, 8)
    total = sum(lengths)
    query = torch.randn(1, heads, total, size)
    key, value = torch.randn(2, 1, groups, total, size)
    starts = torch.tensor([0, 5, 6, 15], dtype=torch.int32)
    out, _ = packed_rows_attention(
        None, query, key, value, None, scaling=0.3, cu_seq_lens_q=starts, max_length_q=9, sliding_window=window
    )
    number = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    place = torch.arange(total)
    seen = (number[:, None] == number) & (place[:, None] >= place)
    if window:
        seen &= place[:, None] - place < window
    scores = query[0] @ key[0].repeat_interleave(heads // groups, dim=0).transpose(1, 2) * 0.3
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    expected = weights @ value[0].repeat_interleave(heads // groups, dim=0)
    torch.testing.assert_close(out, expected.transpose(0, 1)[None])


@pytest.mark.parametrize("labels", [700, 256, 1, 0])
@pytest.mark.parametrize("bias", [True, False])
def test_sums_of_hidden_are_those_of_the_logits(labels, bias):
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 1111, bias=bias)
    hidden, targets = torch.randn(labels, 16, requires_grad=True), torch.randint(1111, (labels,))
    targets[: labels // 2] = head(hidden)[: labels // 2].argmax(-1)  # half of the guesses are right
    expected, right = sums_of_logits(head(hidden), targets)
    assert right >= labels // 2
    wanted = torch.autograd.grad(expected, [hidden, *head.parameters()])
    nll, none = sums_of_hidden(head, hidden, targets)
    assert none is None
    torch.testing.assert_close(nll, expected)
    for got, gradient in zip(torch.autograd.grad(nll, [hidden, *head.parameters()]), wanted, strict=True):
        torch.testing.assert_close(got, gradient, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        nll, counted = sums_of_hidden(head, hidden, targets)
    assert counted == right
    torch.testing.assert_close(nll, expected.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_many_labels_do_not_round_or_overflow_in_half_precision(dtype):
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 1111, bias=False).to(dtype)
    hidden, targets = torch.randn(12000, 16, dtype=dtype), torch.randint(1111, (12000,))
    expected, _ = sums_of_logits(head(hidden), targets)
    assert expected > 65504  # where float16 ends
    nll, _ = sums_of_hidden(head, hidden.requires_grad_(), targets)
    torch.testing.assert_close(nll, expected, rtol=1e-4, atol=0)
    assert nll.dtype == torch.float32 and torch.isfinite(torch.autograd.grad(nll, hidden)[0]).all()


@pytest.mark.parametrize(
    "model_type, hidden, rate",
    # tinker-cookbook's figures: Llama-3.2-1B, Llama-3.1-8B, Qwen3-8B
    [("llama", 2048, 4.908e-4), ("llama", 4096, 2.857e-4), ("qwen3", 4096, 4.730e-4)],
)
def test_default_learning_rate_is_the_published_fit(model_type, hidden, rate):
    config = type("Config", (), {"model_type": model_type, "hidden_size": hidden})
    assert finetune.default_learning_rate(config) == pytest.approx(rate, rel=1e-3)


def rates(tmp_path, steps, **flags):
    """Return the learning rates of the steps of a run whose peak is 1."""
    args = transformers.TrainingArguments(str(tmp_path), learning_rate=1.0, use_cpu=True, report_to=[], **flags)
    trainer = LoraTrainer(model=torch.nn.Linear(1, 1), args=args)
    scheduler = trainer.create_scheduler(steps, trainer.create_optimizer())
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        scheduler.step()
    return found


def test_schedules_start_and_end_above_zero(tmp_path):
    # the steps are 1 to 10 of a schedule that is 0 at steps 0 and 11, and whose warmup is 0.3 of 11 steps: 4
    linear = [1 / 4, 2 / 4, 3 / 4, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7]
    assert rates(tmp_path, 10, lr_scheduler_type="linear", warmup_steps=0.3) == pytest.approx(linear)
    cosine = linear[:4] + [(1 + math.cos(math.pi * k / 7)) / 2 for k in range(1, 7)]
    assert rates(tmp_path, 10, lr_scheduler_type="cosine", warmup_steps=0.3) == pytest.approx(cosine)
    assert rates(tmp_path, 4, lr_scheduler_type="constant", warmup_steps=0.3) == [1, 1, 1, 1]
    assert rates(tmp_path, 1, lr_scheduler_type="cosine", warmup_steps=0.03) == [1]
    assert rates(tmp_path, 2, lr_scheduler_type="cosine", warmup_steps=0.03) == [1, pytest.approx(0.5)]


# -----------------------------------------------------------------------------
# the whole script


def test_a_run_writes_exactly_these_files(plain):
    files = {str(path.relative_to(plain)) for path in plain.rglob("*") if path.is_file() and "runs" not in path.parts}
    tokenizer = {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
    weights = {"adapter_config.json", "adapter_model.safetensors"}
    state = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin", "README.md"}
    plots = {"loss.png", "learning_rate.png", "eval_loss.png", "eval_token_acc.png"}
    expected = {"run.json", "log.jsonl", "validation.jsonl"} | {f"plots/{name}" for name in plots}
    expected |= {f"adapter/{name}" for name in tokenizer | weights | {"generation_config.json"}}
    for checkpoint in ("checkpoint-4", "checkpoint-6"):  # the best is the last, and the one before is kept
        expected |= {f"{checkpoint}/{name}" for name in tokenizer | weights | state}
    assert files == expected
    for name in plots:
        assert (plain / "plots" / name).read_bytes()[:4] == b"\x89PNG"


def test_log_and_run_record_agree(plain):
    records, record = curve(plain), record_of(plain)
    steps = [r for r in records if "loss" in r]
    evals = [r for r in records if "eval_loss" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6] and [r["step"] for r in evals] == [2, 4, 6]
    assert steps[-1]["epoch"] == 2 and steps[2]["epoch"] == 1
    assert record["status"] == "finished"
    assert record["counts"] == {"rows": 52, "train": 44, "validation": 8, "cut": 0, "left_out": 0}
    best = min(evals, key=lambda r: r["eval_loss"])
    assert record["best_checkpoint"] == f"checkpoint-{best['step']}"
    metrics = record["metrics"]
    assert (metrics["eval_loss"], metrics["eval_token_acc"]) == (evals[-1]["eval_loss"], evals[-1]["eval_token_acc"])
    assert metrics["train_loss"] == pytest.approx(sum(losses_of(steps)) / 6) and metrics["train_runtime"] > 0
    assert record["versions"] == {"torch": torch.__version__, "transformers": transformers.__version__}
    assert record["git"] and record["versions"]
    seen = [r["num_input_tokens_seen"] for r in curve(plain, ()) if "loss" in r]
    tokenizer = AutoTokenizer.from_pretrained(plain / "adapter")
    lengths = [len(ids) for ids, _ in encoded_rows(tokenizer)]
    held_out = [len(encode_one(tokenizer, row["messages"])[0]) for row in validation_rows(plain)]
    # 44 examples in 3 steps of 16 leave 4 of the last step's 4 micro-batches non-empty: nothing is filled
    assert seen[2] == sum(lengths) - sum(held_out) and seen[5] == 2 * seen[2]


def validation_rows(folder):
    return [json.loads(line) for line in (folder / "validation.jsonl").read_text("utf-8").splitlines()]


def encode_one(tokenizer, messages):
    """Return (ids, length of the prompt) of a conversation of two, by transformers alone."""
    text = tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("\n")
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True).input_ids
    return tokenizer(text, add_special_tokens=False).input_ids, len(prompt)


def encoded_rows(tokenizer, count=52):
    rows = [json.loads(line) for line in Path(SMALL["data_path"]).read_text().splitlines()[:count]]
    names = {"question": "user", "answer": "assistant"}
    return [encode_one(tokenizer, [{"role": names[k], "content": row[k]} for k in names]) for row in rows]


def test_the_saved_adapter_and_template_give_the_logged_evaluation(plain):
    best = min((r for r in curve(plain) if "eval_loss" in r), key=lambda r: r["eval_loss"])
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, plain / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(plain / "adapter")
    nll, right, tokens = 0.0, 0, 0
    for row in validation_rows(plain):  # one by one, with transformers alone
        ids, prompt = encode_one(tokenizer, row["messages"])
        ids = torch.tensor([ids])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, prompt - 1 : -1].double()
        nll += F.cross_entropy(logits, ids[0, prompt:], reduction="sum").item()
        right += logits.argmax(-1).eq(ids[0, prompt:]).sum().item()
        tokens += len(logits)
    assert len(validation_rows(plain)) == 8
    assert best["eval_loss"] == pytest.approx(nll / tokens, rel=1e-6)
    assert best["eval_token_acc"] == right / tokens


def test_stop_tokens_and_template_travel_with_the_adapter(plain):
    stops = json.loads((plain / "adapter" / "generation_config.json").read_text())["eos_token_id"]
    assert stops in (0, [0])  # <|endoftext|>, which ends the alpaca template's answers
    template = (plain / "adapter" / "chat_template.jinja").read_text()
    assert template == (ROOT / "templates" / "alpaca.jinja").read_text()


def test_tensorboard_has_every_step(plain):
    events = EventAccumulator(str(plain / "runs")).Reload()
    records = curve(plain)
    for tag, name in (("train/loss", "loss"), ("eval/loss", "eval_loss")):
        expected = [(r["step"], pytest.approx(r[name])) for r in records if name in r]
        assert [(event.step, event.value) for event in events.Scalars(tag)] == expected


def test_what_train_returns_is_what_run_json_says(tmp_path):
    metrics = finetune.train(output_dir=str(tmp_path), **SMALL | {"max_steps": 1})
    assert metrics == record_of(tmp_path)["metrics"]


def test_flags_in_run_json_are_what_was_used(tmp_path):
    records = run(tmp_path, learning_rate=0.0, max_steps=2)
    record = record_of(tmp_path)
    rate = 5e-4 * (2000 / 128) ** 0.781
    assert record["flags"]["learning_rate"] == pytest.approx(rate)
    assert records[0]["learning_rate"] == pytest.approx(rate)  # the warmup is one step
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    on_gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    assert record["flags"]["dtype"] == ("bfloat16" if on_gpu else "float32")
    assert (
        record["flags"]["prompt_template"] == "alpaca" and config["lora_alpha"] == record["flags"]["lora_alpha"] == 32
    )
    assert len(record["flags"]["data_sha256"]) == 64
    names = set(finetune.train.__kwdefaults__)
    assert set(record["flags"]) == names | {"data_sha256"}


@pytest.mark.parametrize(
    "flags",
    [*({"micro_batch_size": size} for size in (1, 2, 16)), {"activation_checkpointing": True, "micro_batch_size": 16}],
    ids=str,
)
def test_what_must_not_change_a_run(plain, tmp_path, flags):
    layers = []  # the MLP of each layer that ran while a gradient was wanted

    def count(module, args):
        if type(module).__name__ == "LlamaMLP" and torch.is_grad_enabled():
            layers.append(module)

    hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        assert_same_curve(run(tmp_path, **flags), curve(plain))
    finally:
        hook.remove()
    micro_batches = 2 * 3 * 16 // flags["micro_batch_size"]
    times = 2 if "activation_checkpointing" in flags else 1  # each layer runs again in the backward pass
    assert len(layers) == micro_batches * 4 * times


def test_same_seed_same_run_and_another_seed_another(plain, tmp_path):
    assert run(tmp_path / "same") == curve(plain)
    assert adapter_bytes(tmp_path / "same" / "adapter") == adapter_bytes(plain / "adapter")
    other = run(tmp_path / "other", seed=1, max_steps=1)
    assert other[0]["loss"] != curve(plain)[0]["loss"]
    assert validation_rows(tmp_path / "other") != validation_rows(plain)


@pytest.mark.parametrize("flags", [{"use_dora": True}, {"use_rslora": True}, {"lora_dropout": 0.1}], ids=str)
def test_variants_of_the_adapter_train(three, tmp_path, flags):
    losses = losses_of(run(tmp_path, max_steps=3, **flags))
    assert losses[0] == pytest.approx(three[0], rel=1e-5)  # an adapter starts as no change
    assert losses[2] < losses[1] < losses[0] and losses[1] != pytest.approx(three[1], rel=1e-4)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert {name: config[name] for name in flags} == flags


@pytest.mark.parametrize("size", [1, 4])
def test_neftune_noise_has_the_scale_of_the_mean_example(tmp_path, monkeypatch, size):
    class Seen(Exception):
        pass

    def step(self, model, inputs, num_items_in_batch=None):
        embed, ids = model.train().get_input_embeddings(), inputs["input_ids"]
        noise = (embed(ids) - F.embedding(ids, embed.weight)).abs()
        mean_length = ids.numel() / size
        bound = 5.0 / math.sqrt(mean_length * noise.shape[-1])  # arXiv:2310.05914: alpha / sqrt(T D)
        assert 0.99 * bound < noise.max() <= bound * (1 + 1e-4)
        assert noise.mean() == pytest.approx(bound / 2, rel=0.05)  # uniform
        model.eval()
        assert not (embed(ids) - F.embedding(ids, embed.weight)).any()
        raise Seen

    with monkeypatch.context() as patch:
        patch.setattr(LoraTrainer, "training_step", step)
        with pytest.raises(Seen):
            run(tmp_path / "seen", neftune_noise_alpha=5.0, micro_batch_size=size)
    losses = losses_of(run(tmp_path / "run", neftune_noise_alpha=5.0, micro_batch_size=size, max_steps=3))
    assert losses[2] < losses[0]


@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
def test_quantized_bases_train_on_a_cpu_and_packing_changes_nothing(three, tmp_path, bits):
    flags = {"max_steps": 3, bits: True}
    records = run(tmp_path, **flags)
    losses = losses_of(records)
    assert losses[0] == pytest.approx(three[0], rel=0.05) and losses[0] != pytest.approx(three[0], rel=1e-5)
    assert losses[2] < losses[1] < losses[0]
    one_by_one = run(tmp_path / "one", micro_batch_size=1, **flags)
    assert losses == pytest.approx(losses_of(one_by_one), rel=1e-5)  # measured 3.4e-7
    # int8 rounds activations by what else is in their batch when it is evaluated: measured 1.4e-3
    assert_same_curve(records, one_by_one, tolerance=5e-3 if bits == "load_in_8bit" else 1e-5)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_checkpoint_that_is_quantized_already_is_read_as_one(three, tmp_path, kind):
    """With quantization_config=None transformers would take its integers for weights: a loss of 6.7, and no error."""
    from export_hf_checkpoint import export

    export(base_model=str(BASE), output_dir=str(tmp_path / "base"), quantize=kind)
    losses = losses_of(run(tmp_path / "run", base_model=str(tmp_path / "base"), max_steps=3))
    assert losses[0] == pytest.approx(three[0], rel=0.05) and losses[2] < losses[0]


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 1e-2), ("float16", 2e-3)])
def test_half_precision_bases_train_on_a_cpu(three, tmp_path, dtype, tolerance):
    losses = losses_of(run(tmp_path, dtype=dtype, max_steps=3))
    assert losses == pytest.approx(three, rel=tolerance) and losses != pytest.approx(three, rel=1e-5)
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_of_one_or_two_steps_learns(tmp_path, steps):
    records = run(tmp_path, max_steps=steps, save_steps=0.1)
    assert [r["step"] for r in records if "loss" in r] == list(range(1, steps + 1))
    assert all(rate > 0 for rate in losses_of(records, "learning_rate"))
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(weight.any() for name, weight in weights.items() if "lora_B" in name)
    best = min((r for r in records if "eval_loss" in r), key=lambda r: r["eval_loss"])
    assert record_of(tmp_path)["best_checkpoint"] == f"checkpoint-{best['step']}"


def test_the_best_and_the_last_checkpoint_are_kept_and_the_adapter_is_the_best(tmp_path):
    flags = {"learning_rate": 0.02, "lr_scheduler_type": "constant", "save_steps": 1, "max_steps": 8}
    records = run(tmp_path, **flags)
    losses = losses_of(records, "eval_loss")
    best = losses.index(min(losses)) + 1
    assert best < 7  # or this test shows nothing
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{best}", "checkpoint-8"}
    assert record_of(tmp_path)["best_checkpoint"] == f"checkpoint-{best}"
    assert adapter_bytes(tmp_path / "adapter") == adapter_bytes(tmp_path / f"checkpoint-{best}")
    assert adapter_bytes(tmp_path / "adapter") != adapter_bytes(tmp_path / "checkpoint-8")


def test_the_last_step_is_evaluated_and_saved_even_between_the_others(tmp_path):
    records = run(tmp_path, save_steps=4)
    assert [r["step"] for r in records if "eval_loss" in r] == [4, 6]
    assert "eval_loss" in record_of(tmp_path)["metrics"] and (tmp_path / "checkpoint-6").exists()


@pytest.mark.parametrize("size", [0, 0.001])
def test_without_validation_the_last_adapter_is_kept(tmp_path, size):
    records = run(tmp_path, val_set_size=size, max_steps=2)
    assert [r["step"] for r in records] == [1, 2] and not losses_of(records, "eval_loss")
    assert record_of(tmp_path)["best_checkpoint"] == "checkpoint-2"
    assert adapter_bytes(tmp_path / "adapter") == adapter_bytes(tmp_path / "checkpoint-2")
    assert (tmp_path / "validation.jsonl").read_text() == ""
    assert record_of(tmp_path)["counts"]["train"] == 52


def test_what_there_is_is_drawn(plain, tmp_path):
    plot([record for record in curve(plain) if "loss" in record], tmp_path / "plots")
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"loss.png", "learning_rate.png"}


# -----------------------------------------------------------------------------
# data, from the file to the trainer


class Ready(Exception):
    """train() is about to start: (trainer,)."""


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """Return a function that runs train() up to its first step: it gives (trainer, run.json)."""

    def stop(self, **kwargs):
        raise Ready(self)

    def call(folder="out", **flags):
        with monkeypatch.context() as patch, pytest.raises(Ready) as ready:
            patch.setattr(LoraTrainer, "train", stop)
            run(tmp_path / folder, **flags)
        return ready.value.args[0], record_of(tmp_path / folder)

    return call


def rows_file(folder, rows, name="data.json"):
    path = folder / name
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


def texts(trainer, dataset):
    return [trainer.processing_class.decode(example["input_ids"]) for example in dataset]


def test_cut_and_left_out_examples_are_counted_and_said(prepare, tmp_path, capsys):
    rows = [{"instruction": f"Say {i}", "output": "yes " * i} for i in range(12)]
    rows[5]["instruction"] = "Say 5, and now a question that fills the rest of the example with its own words alone"
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    finetune.use_template(tokenizer, "alpaca")
    talks = [
        [{"role": "user", "content": r["instruction"]}, {"role": "assistant", "content": r["output"]}] for r in rows
    ]
    encoded = [encode_one(tokenizer, talk) for talk in talks]
    limit = encoded[7][1] + 8
    full = sum(prompt >= limit for _, prompt in encoded)
    cut = sum(len(ids) > limit for ids, _ in encoded)
    assert full == 1 and 1 < cut < 11
    trainer, record = prepare(data_path=rows_file(tmp_path, rows), cutoff_len=limit, val_set_size=0)
    counts = record["counts"]
    assert (counts["rows"], counts["train"], counts["left_out"]) == (12, 11, 1)
    assert counts["cut"] == cut - full  # "3 at --cutoff_len, 1 more left out" makes 4
    kept = [(ids, prompt) for ids, prompt in encoded if prompt < limit]
    for example, (ids, prompt) in zip(trainer.train_dataset, kept, strict=True):
        assert example["input_ids"].tolist() == ids[:limit]
        assert example["labels"].tolist() == ([IGNORE] * prompt + ids[prompt:])[:limit]
    said = capsys.readouterr().out
    assert f"cut         {counts['cut']} at --cutoff_len {limit}; 1 more left out" in said


def test_a_cut_between_turns_keeps_the_first_answer(prepare, tmp_path):
    turns = [("user", "q"), ("assistant", "a"), ("user", "long question"), ("assistant", "b")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    whole, _ = prepare("whole", data_path=rows_file(tmp_path, [row]), val_set_size=0)
    (example,) = whole.train_dataset
    length = len(example["input_ids"])
    cut, record = prepare("cut", data_path=rows_file(tmp_path, [row]), val_set_size=0, cutoff_len=length - 5)
    (shorter,) = cut.train_dataset
    for name in example:
        assert shorter[name].tolist() == example[name][:-5].tolist()
    assert (shorter["labels"] != IGNORE).sum() == 2 and record["counts"]["cut"] == 1  # a, and the end token


def test_every_row_is_either_trained_on_or_held_out(prepare, tmp_path):
    trainer, record = prepare(val_set_size=0.25)
    held_out = validation_rows(tmp_path / "out")
    assert len(held_out) == len(trainer.eval_dataset) == record["counts"]["validation"] == 13
    assert len(trainer.train_dataset) == record["counts"]["train"] == 39
    rows = [json.loads(line) for line in Path(SMALL["data_path"]).read_text().splitlines()[:52]]
    questions = [row["question"] for row in rows]
    asked = [row["messages"][0]["content"] for row in held_out]
    assert asked == [question for question in questions if question in asked]  # in the order of the file
    for text, question in zip(texts(trainer, trainer.eval_dataset), asked, strict=True):
        assert question in text
    rest = [question for question in questions if question not in asked]
    for text, question in zip(texts(trainer, trainer.train_dataset), rest, strict=True):
        assert question in text
    again, _ = prepare("again", val_set_size=13)
    assert texts(again, again.eval_dataset) == texts(trainer, trainer.eval_dataset)


def test_what_is_learned_follows_the_flags(prepare, capsys):
    row, _ = prepare(max_samples=3, val_set_size=1)[0].train_dataset
    learned = row["labels"] != IGNORE
    assert 2 < learned.sum() < len(learned) and learned[-1] and not learned[0]
    assert "<|endoftext|>" in capsys.readouterr().out  # the line that shows what is learned
    inputs, _ = prepare("inputs", max_samples=3, val_set_size=1, train_on_inputs=True)[0].train_dataset
    assert (inputs["labels"] == row["input_ids"]).all() and (inputs["input_ids"] == row["input_ids"]).all()
    no_end, _ = prepare("no_end", max_samples=3, val_set_size=1, add_eos_token=False)[0].train_dataset
    assert (no_end["labels"][:-1] == row["labels"][:-1]).all() and no_end["labels"][-1] == IGNORE


def test_an_alpaca_input_follows_the_separator_of_the_template(prepare, tmp_path):
    data = rows_file(tmp_path, [{"instruction": "Sort.", "input": "3 1", "output": "1 3"}] * 2)
    trainer, _ = prepare(data_path=data, val_set_size=1, prompt_template="alpaca_short")
    expected = "### Instruction:\nSort.\n\n### Input:\n3 1\n\n### Response:\n1 3<|endoftext|>"
    assert texts(trainer, trainer.train_dataset) == [expected]
    asked = "Sort.\n\n### Input:\n3 1"
    assert validation_rows(tmp_path / "out")[0]["messages"][0] == {"role": "user", "content": asked}


# -----------------------------------------------------------------------------
# killed runs


def interrupt_at(monkeypatch, step, error):
    """Make the process die with `error` at the start of optimizer step `step`."""
    real = finetune.Report.on_step_begin

    def die(self, args, state, control, **kwargs):
        if state.global_step == step - 1:
            raise error
        return real(self, args, state, control, **kwargs)

    monkeypatch.setattr(finetune.Report, "on_step_begin", die)


def killed(monkeypatch, folder, step, **flags):
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        interrupt_at(patch, step, MemoryError("killed"))
        run(folder, **flags)


def assert_same_run(folder, other):
    """Bit for bit, filler tokens included."""
    clock = CLOCK - {"num_input_tokens_seen"}
    assert curve(folder, clock) == curve(other, clock)
    assert adapter_bytes(folder / "adapter") == adapter_bytes(other / "adapter")
    assert record_of(folder)["status"] == "finished"
    assert record_of(folder)["best_checkpoint"] == record_of(other)["best_checkpoint"]


@pytest.mark.parametrize("step", [1, 4, 6])
def test_a_resumed_run_is_the_run_that_was_never_killed(plain, tmp_path, monkeypatch, step):
    killed(monkeypatch, tmp_path, step)
    assert record_of(tmp_path)["status"] == "running"
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # what a kill leaves of a line
    run(tmp_path, resume_from_checkpoint="auto")
    assert_same_run(tmp_path, plain)
    events = EventAccumulator(str(tmp_path / "runs")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]


def test_resume_goes_on_within_an_epoch_and_after_its_end_with_dropout_and_noise(tmp_path, monkeypatch):
    flags = {"max_samples": 36, "val_set_size": 4, "save_steps": 1, "lora_dropout": 0.1, "neftune_noise_alpha": 5.0}
    run(tmp_path / "whole", **flags)
    assert [r["epoch"] for r in curve(tmp_path / "whole") if "loss" in r] == [0.5, 1, 1.5, 2]
    for step in (3, 4):  # after the checkpoints at the end of the first epoch and in the middle of the second
        killed(monkeypatch, tmp_path / str(step), step, **flags)
        run(tmp_path / str(step), resume_from_checkpoint="auto", **flags)
        assert_same_run(tmp_path / str(step), tmp_path / "whole")


def test_a_moved_run_may_be_split_otherwise_when_it_goes_on(plain, tmp_path, monkeypatch):
    killed(monkeypatch, tmp_path / "first", 4)
    (tmp_path / "first").rename(tmp_path / "second")
    data = str(shutil.copy(SMALL["data_path"], tmp_path / "same.jsonl"))
    run(tmp_path / "second", resume_from_checkpoint="auto", micro_batch_size=1, data_path=data)
    assert_same_curve(curve(tmp_path / "second"), curve(plain))
    kept = {path.name for path in (tmp_path / "second").glob("checkpoint-*")}
    assert kept == {"checkpoint-4", "checkpoint-6"}


def test_a_finished_run_resumes_to_nothing_left_to_do(copy, plain, monkeypatch):
    shutil.rmtree(copy / "adapter")
    (copy / "adapter.incomplete").mkdir()  # what a kill at the very end leaves
    steps = []
    real = LoraTrainer.training_step
    monkeypatch.setattr(LoraTrainer, "training_step", lambda *args, **kw: steps.append(1) or real(*args, **kw))
    run(copy, resume_from_checkpoint="auto")
    assert_same_run(copy, plain)
    assert not steps and not (copy / "adapter.incomplete").exists()
    metrics, before = record_of(copy)["metrics"], record_of(plain)["metrics"]
    assert metrics["eval_loss"] == before["eval_loss"] and metrics["eval_token_acc"] == before["eval_token_acc"]


def test_resume_from_the_last_checkpoint_by_its_name(plain, tmp_path, monkeypatch):
    killed(monkeypatch, tmp_path, 6)
    run(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same_run(tmp_path, plain)


@pytest.mark.parametrize("torn", [None, "", '{"global_step": 6, "epo'], ids=["none", "empty", "half"])
def test_a_torn_checkpoint_is_skipped_and_refused_by_its_name(copy, plain, torn):
    state = copy / "checkpoint-6" / "trainer_state.json"
    if torn is None:
        state.unlink()
    else:
        state.write_text(torn)
    message = (
        f"--resume_from_checkpoint {copy}/checkpoint-6: the last whole checkpoint is {copy}/checkpoint-4: give auto"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        run(copy, resume_from_checkpoint=str(copy / "checkpoint-6"))
    with pytest.raises(ValueError, match="checkpoint-99: the last whole checkpoint is"):
        run(copy, resume_from_checkpoint=str(copy / "checkpoint-99"))
    assert curve(copy) == curve(plain)  # nothing was lost by asking
    (copy / "checkpoint-6" / "optimizer.pt").write_bytes(b"torn")
    run(copy, resume_from_checkpoint="auto")
    assert_same_run(copy, plain)
    assert json.loads(state.read_text())["global_step"] == 6


def test_only_the_last_whole_checkpoint_goes_on(copy):
    with pytest.raises(ValueError, match="checkpoint-4: the last whole checkpoint is .*checkpoint-6: give auto"):
        run(copy, resume_from_checkpoint=str(copy / "checkpoint-4"))


def test_where_no_checkpoint_is_whole_auto_starts_afresh(copy, plain, capsys):
    for state in copy.glob("checkpoint-*/trainer_state.json"):
        state.unlink()
    run(copy, resume_from_checkpoint="auto")
    assert_same_run(copy, plain)
    assert "from the first step" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, changed",
    [
        ({"learning_rate": 1e-3}, "'learning_rate': 0.003"),
        ({"learning_rate": 0.0}, "'learning_rate': 0.003"),
        ({"max_steps": 9}, "'max_steps': 0"),
        ({"num_epochs": 3}, "'num_epochs': 2"),
        ({"batch_size": 8}, "'batch_size': 16"),
        ({"seed": 1}, "'seed': 42"),
        ({"lora_r": 8}, "'lora_r': 16"),
        ({"prompt_template": "vigogne"}, "'prompt_template': 'alpaca'"),
        ({"dtype": "bfloat16"}, "'dtype': 'float32'"),
        ({"data_path": str(ROOT / "data" / "tiny" / "dev.jsonl")}, "'data_sha256': '"),
        ({"max_samples": 51}, "'data_sha256': '"),
    ],
    ids=str,
)
def test_other_flags_and_other_data_are_refused_by_name(plain, flags, changed):
    before = sorted((path, path.stat().st_mtime_ns) for path in plain.rglob("*"))
    with pytest.raises(ValueError, match=re.escape(changed)) as error:
        run(plain, resume_from_checkpoint="auto", **flags)
    assert "was another run" in str(error.value)
    assert sorted((path, path.stat().st_mtime_ns) for path in plain.rglob("*")) == before


def test_another_text_of_the_template_is_refused(tmp_path, monkeypatch):
    template = tmp_path / "mine.jinja"
    template.write_text((ROOT / "templates" / "alpaca.jinja").read_text())
    killed(monkeypatch, tmp_path / "out", 4, prompt_template=str(template))
    template.write_text((ROOT / "templates" / "alpaca_short.jinja").read_text())
    with pytest.raises(ValueError, match="was another run, with {'data_sha256'"):
        run(tmp_path / "out", resume_from_checkpoint="auto", prompt_template=str(template))


FULL = [
    (torch, "save", RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")),
    (peft.peft_model, "safe_save_file", SafetensorError("Error while serializing: I/O error: No space left on device")),
    (transformers.TrainerState, "save_to_json", OSError(28, "No space left on device")),
]


@pytest.mark.parametrize("owner, name, error", FULL, ids=["torch", "safetensors", "state"])
def test_a_full_disk_is_a_message_and_costs_no_earlier_checkpoint(plain, tmp_path, monkeypatch, owner, name, error):
    real = getattr(owner, name)

    def full(*args, **kwargs):
        if any("checkpoint-4" in str(arg) for arg in [*args, *kwargs.values()] if isinstance(arg, str | Path)):
            raise error
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        with pytest.raises(ValueError, match="checkpoint-4 could not be written: ") as raised:
            run(tmp_path)
    assert str(error) in str(raised.value) and "--resume_from_checkpoint auto" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").exists()
    run(tmp_path, resume_from_checkpoint="auto")
    assert_same_run(tmp_path, plain)


def test_interrupting_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    interrupt_at(monkeypatch, 4, KeyboardInterrupt())
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path)
    said = capsys.readouterr().out
    assert stopped.value.code == 130
    assert "interrupted after step 3" in said and "--resume_from_checkpoint auto" in said


# -----------------------------------------------------------------------------
# bad input


@pytest.fixture
def no_model(monkeypatch):
    """Fail a test that loads a model."""
    refuse = lambda *args, **kwargs: pytest.fail("a model was loaded")
    monkeypatch.setattr(finetune.AutoModelForCausalLM, "from_pretrained", refuse)


def assert_refused(folder, message, **flags):
    """The message is shown alone, without a traceback, by run_cli; and nothing is written."""
    with pytest.raises(ValueError, match=message) as error:
        run(folder, **flags)
    assert traceback.extract_tb(error.value.__traceback__)[-1].filename == finetune.__file__
    assert not folder.exists() or not list(folder.iterdir())


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"batch_size": 10}, r"--batch_size 10 must be a multiple of 4 = --micro_batch_size 4 x 1 ranks: 12 is one"),
        ({"batch_size": 2}, r"--batch_size 2 must be a multiple of 4 .*: 4 is one"),
        ({"batch_size": 0}, "--batch_size 0: must be above 0"),
        ({"micro_batch_size": 0}, "--micro_batch_size 0: must be above 0"),
        ({"num_epochs": 0.0}, "--num_epochs 0.0: must be above 0"),
        ({"cutoff_len": 0}, "--cutoff_len 0: must be above 0"),
        ({"lora_r": 0}, "--lora_r 0: must be above 0"),
        ({"save_steps": 0.0}, "--save_steps 0.0: must be above 0"),
        ({"save_steps": 1.5}, "must be an integer"),
        ({"learning_rate": -1.0}, "--learning_rate -1.0: must not be negative"),
        ({"learning_rate": math.nan}, "--learning_rate nan: must not be negative"),
        ({"learning_rate": math.inf}, "--learning_rate inf: must not be negative"),
        ({"weight_decay": -0.1}, "--weight_decay -0.1: must not be negative"),
        ({"max_steps": -1}, "--max_steps -1: must not be negative"),
        ({"val_set_size": -1.0}, "--val_set_size -1.0: must not be negative"),
        ({"load_in_8bit": True, "load_in_4bit": True}, "load_in_[48]bit.*load_in_[48]bit"),
        ({"dtype": "half"}, "--dtype half: one of auto, bfloat16, float16, float32"),
        ({"lr_scheduler_type": "cosin"}, "cosin is not a valid SchedulerType.*'cosine'"),
        ({"deepspeed": "deepspeed/zero2.json"}, "--deepspeed needs a launcher: torchrun"),
        ({"base_model": "nowhere"}, "nowhere: no such file or folder, and no id of the hub"),
        ({"base_model": "data"}, "--base_model data, .*model_type"),
        ({"prompt_template": "alpacca"}, "no such template; there are alpaca, alpaca_short, chatml, vigogne"),
        ({"prompt_template": "none.jinja"}, "--prompt_template none.jinja: no such template"),
        ({"data_path": "data/none.jsonl"}, "data/none.jsonl: no such file"),
        ({"val_set_size": 52.0}, "--val_set_size 52 .*leaves no label to learn"),
        ({"val_set_size": 60.0}, "--val_set_size 60 .*leaves no label to learn"),
        ({"cutoff_len": 20}, "--cutoff_len 20 leaves no label to learn"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_flags_are_refused_before_a_model_is_loaded(tmp_path, no_model, flags, message):
    assert_refused(tmp_path / "out", message, **flags)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"lora_target_modules": "q_proj,qkv"}, "has no qkv"),
        ({"lora_target_modules": "qkv"}, "--lora flags: .*qkv"),
        ({"lora_target_modules": ""}, "--lora flags"),
        ({"lora_target_modules": "norm"}, "--lora flags: .*Norm"),
        ({"lora_target_modules": "all-linear,q_proj"}, "all-linear"),
        ({"lora_dropout": 1.5}, "dropout"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_bad_adapters_are_refused(tmp_path, flags, message):
    assert_refused(tmp_path / "out", message, **flags)


def test_a_seed_that_numpy_cannot_take_is_refused(tmp_path, no_model):
    with pytest.raises(ValueError, match="[Ss]eed"):
        run(tmp_path / "out", seed=2**32)


@pytest.mark.parametrize("name", ["out/nothing", "data/none", "nowhere", "./owner/name"])
def test_a_mistyped_path_never_asks_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for folder in ("out", "data"):
        (tmp_path / folder).mkdir()
    for owner, method in (
        (transformers.AutoConfig, "from_pretrained"),
        (finetune.AutoTokenizer, "from_pretrained"),
        (datasets, "load_dataset"),
    ):
        monkeypatch.setattr(owner, method, lambda *args, **kwargs: pytest.fail("asked the hub"))
    assert_refused(tmp_path / "new", f"{name}: no such file or folder", base_model=name)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("asked the hub"))
    assert_refused(tmp_path / "new", f"{name}: no such file or folder", data_path=name)


def test_bases_that_are_none(plain, tmp_path, no_model):
    assert_refused(tmp_path / "out", "--base_model .*adapter", base_model=str(plain / "adapter"))
    hub = {"base_model": "owner/not-there"}  # tests/conftest.py takes the network away
    assert_refused(tmp_path / "out", "--base_model owner/not-there", **hub)


def test_a_base_with_missing_weights_is_refused(tmp_path):
    shutil.copytree(BASE, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    assert_refused(tmp_path / "out", r"--base_model .* has no model\.layers\.4\.", base_model=str(tmp_path / "base"))


GOOD = {"question": "q", "answer": "a"}
TURN = "{{ message.role + ': ' + message.content + eos_token }}"
LOOP = (
    "{% for message in messages %}" + TURN + "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.mark.parametrize(
    "rows, flags, message",
    [
        ([GOOD, {"text": "q"}], {}, r"data\.json, row 2: not alpaca .*\{'text': 'q'\}.* python data/prepare\.py"),
        ([GOOD, GOOD, {"question": "q"}], {}, r"data\.json, row 3: no answer to learn"),
        ([GOOD, {"messages": []}], {}, r"data\.json, row 2: "),
        ([GOOD, {"question": "q", "answer": "half \ud83d"}], {}, r"data\.json, row 2: "),
        ([GOOD, {"question": "q", "answer": "\n\na"}], {"prompt_template": "chatml"}, r"data\.json, row 2: .*merges"),
        (
            [{"messages": [{"role": "tool", "content": "7"}, {"role": "assistant", "content": "a"}]}],
            {},
            "row 1: the alpaca",
        ),
        ([], {}, r"data\.json: no rows in it"),
        ("text", {}, r"data\.json: no rows in it"),
    ],
    ids=["form", "no answer", "no messages", "surrogate", "merges", "template", "empty", "text"],
)
def test_bad_rows_are_named_before_a_model_is_loaded(tmp_path, no_model, monkeypatch, rows, flags, message):
    if "prompt_template" in flags:  # the embedded tokenizer has no <|im_end|>, and a token for each newline
        template = tmp_path / "merging.jinja"
        template.write_text(LOOP)
        rows = [GOOD | {"answer": "1"}, GOOD | {"answer": "is"}]
        flags = {"prompt_template": str(template)}
    assert_refused(tmp_path / "out", message, data_path=rows_file(tmp_path, rows), val_set_size=0, **flags)


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ messages[0].content }}{{ eos_token }}", "drops what was said"),
        ("{% for message in messages %}{{ message.content }}{% endfor %}", "never learn to stop"),
        ("{% for message in messages %}{{ message.nothing.here }}{% endfor %}", "--prompt_template .*nothing"),
        ("{{ raise_exception('not today') }}", "--prompt_template .*not today"),
        ("{% for", "--prompt_template "),
    ],
)
def test_templates_that_cannot_teach_are_refused_before_data_is_read(
    tmp_path, no_model, monkeypatch, template, message
):
    monkeypatch.setattr(finetune, "load_rows", lambda source: pytest.fail("data was read"))
    (tmp_path / "mine.jinja").write_text(template)
    assert_refused(tmp_path / "out", message, prompt_template=str(tmp_path / "mine.jinja"))


def test_an_output_folder_that_holds_a_run_is_kept_unless_told_otherwise(copy, tmp_path):
    (copy / "notes.txt").write_text("mine")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    message = "holds a run: one of --overwrite and --resume_from_checkpoint auto"
    with pytest.raises(ValueError, match=message):
        run(copy)
    with pytest.raises(ValueError, match=message):
        run(copy, overwrite=True, resume_from_checkpoint="auto")
    with pytest.raises(ValueError, match="qkv"):  # with --overwrite, too, nothing goes before all is checked
        run(copy, overwrite=True, lora_target_modules="qkv")
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    (tmp_path / "theirs" / "checkpoint-500").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds a run"):
        run(tmp_path / "theirs")
    with pytest.raises(ValueError, match="the last whole checkpoint is None"):
        run(tmp_path / "new", resume_from_checkpoint=str(copy / "checkpoint-6"))
    records = run(copy, overwrite=True, max_steps=2)
    assert len(records) == 3 and (copy / "notes.txt").read_text() == "mine"
    assert {path.name for path in copy.glob("checkpoint-*")} == {"checkpoint-2"}
    assert len(list((copy / "runs").iterdir())) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path, monkeypatch, value):
    monkeypatch.setattr(finetune, "sums_of_hidden", lambda head, hidden, targets: (hidden.sum() * 0 + value, None))
    with pytest.raises(ValueError, match=f"the loss is {value} at step 1: lower --learning_rate"):
        run(tmp_path)
    assert not (tmp_path / "log.jsonl").read_text()


def test_the_log_is_json_where_a_gradient_is_not_finite(tmp_path, capsys):
    """float16's loss scaler skips such a step, and the run goes on."""
    report, lines = finetune.Report(), []
    report.training_bar = SimpleNamespace(write=lines.append)
    args, state = SimpleNamespace(output_dir=tmp_path), SimpleNamespace(global_step=1, max_steps=9, log_history=[])
    state.is_world_process_zero = True
    for norm in (math.inf, math.nan, 0.5):
        logs = {"loss": 1.5, "grad_norm": norm}
        state.log_history.append(logs | {"step": 1})  # as Trainer.log does, and what a resumed run writes again
        report.on_log(args, state, None, logs)
    refuse = lambda name: pytest.fail(f"{name} is no JSON")
    logged = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["loss"] for record in logged] == [1.5] * 3 and logged[2]["grad_norm"] == 0.5
    assert [record["grad_norm"] for record in state.log_history] == [None, None, 0.5]
    assert logged == state.log_history and "loss 1.5 | grad_norm inf" in lines[0]


# -----------------------------------------------------------------------------
# the page


def test_the_table_of_metrics_lists_the_keys_of_the_log(plain):
    page = (ROOT / "docs" / "finetune.md").read_text(encoding="utf-8")
    table = page.partition("## Logged metrics")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert listed == {name for record in curve(plain, ()) for name in record}
