"""
finetune.py: its pure helpers by hand, the whole script on the embedded default, and what must not change a run.

    .venv/bin/python -m pytest tests/test_finetune.py
"""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import finetune
from finetune import IGNORE, head_loss, make_packed, pack, pad, train

ROOT = Path(__file__).resolve().parent.parent
SMALL = {  # a run of 6 steps on 44 examples, 2 epochs of which the last step is short, in about a second
    "data_path": "data/tiny/test.jsonl",
    "max_samples": 52,
    "val_set_size": 8,
    "batch_size": 16,
    "num_epochs": 2,
    "save_steps": 2,
    "learning_rate": 3e-3,
}


def run(folder, **flags):
    """Run `train` in a folder; returns its log records without the clock, and the run's record."""
    result = train(output_dir=str(folder), **(SMALL | flags))
    return curve(folder), result["run"]


def curve(folder):
    """Return the records of a run's log.jsonl without what the clock says."""
    clock = ("seconds", "tokens_per_second", "eval_seconds")
    return [{k: v for k, v in r.items() if k not in clock} for r in finetune.read_log(Path(folder) / "log.jsonl")]


def assert_same_curve(one, other, tolerance=1e-5):
    assert [r.keys() for r in one] == [r.keys() for r in other]
    for a, b in zip(one, other, strict=True):
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=tolerance, abs=1e-7), (name, a, b)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The run that the others are compared with: (folder, curve, run record)."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, *run(folder)


@pytest.fixture
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def examples(*lengths, vocab=101, learned_from=2):
    torch.manual_seed(sum(lengths))
    made = []
    for n in lengths:
        ids = torch.randint(vocab, (n,))
        labels = ids.clone()
        labels[:learned_from] = IGNORE
        made.append({"input_ids": ids, "labels": labels})
    return made


# -----------------------------------------------------------------------------
# packed rows and the loss


def padded_loss(model, rows):
    """The summed nll of padded rows by the model's own forward, [B, T, V] logits and all."""
    batch = pad(rows, pad_id=0)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORE, reduction="sum")


@pytest.mark.parametrize("kind", ["llama", "sliding window"])
def test_packed_forward_has_the_loss_and_gradients_of_padded_rows(llama, kind):
    model = llama
    if kind == "sliding window":
        config = {k: getattr(llama.config, k) for k in ("vocab_size", "hidden_size", "intermediate_size")}
        model = MistralForCausalLM(
            MistralConfig(**config, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, sliding_window=5)
        )
    rows = examples(3, 17, 9)
    expected = padded_loss(model, rows)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    make_packed(model)
    model.train()
    loss = model(**pack(rows), num_items_in_batch=1)["loss"]
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-5)


def test_examples_of_a_packed_row_do_not_see_each_other(llama):
    make_packed(llama)
    llama.eval()
    first, second, other = examples(7, 12, 5)
    with torch.no_grad():
        alone = llama(**pack([second]))["nll"]
        behind_first = llama(**pack([first, second]))["nll"] - llama(**pack([first]))["nll"]
        behind_other = llama(**pack([other, second]))["nll"] - llama(**pack([other]))["nll"]
    torch.testing.assert_close(behind_first, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(behind_other, alone, rtol=1e-5, atol=1e-5)


def test_a_packed_row_without_a_label_has_a_loss_of_zero_that_still_reaches_the_parameters(llama):
    make_packed(llama)
    llama.train()
    loss = llama(**pack([]))["loss"]
    loss.backward()
    assert loss.item() == 0
    assert not any(p.grad.any() for p in llama.model.layers.parameters())  # and there is a gradient, of zeros


def test_head_loss_is_cross_entropy_with_and_without_accuracy():
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 1111, bias=True)
    hidden, targets = torch.randn(700, 16, requires_grad=True), torch.randint(1111, (700,))
    expected = F.cross_entropy(head(hidden), targets, reduction="sum")
    (gradient,) = torch.autograd.grad(expected, hidden)
    nll, right = head_loss(head, hidden, targets)
    assert right is None
    torch.testing.assert_close(nll, expected)
    torch.testing.assert_close(torch.autograd.grad(nll, hidden)[0], gradient, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        nll, right = head_loss(head, hidden, targets, with_accuracy=True)
        assert right == (head(hidden).argmax(-1) == targets).sum()
    torch.testing.assert_close(nll, expected.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_head_loss_of_many_labels_does_not_round_or_overflow_in_half_precision(dtype):
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 1111, bias=False).to(dtype)
    hidden, targets = torch.randn(12000, 16, dtype=dtype), torch.randint(1111, (12000,))
    expected = F.cross_entropy(head(hidden).float(), targets, reduction="sum")  # about 84,000, float16 ends at 65,504
    nll, _ = head_loss(head, hidden.requires_grad_(), targets)
    torch.testing.assert_close(nll, expected, rtol=1e-4, atol=0)
    assert nll.dtype == torch.float32 and torch.isfinite(torch.autograd.grad(nll, hidden)[0]).all()


def test_neftune_noise_has_each_examples_own_scale(llama):
    seen = {}
    make_packed(llama, neftune_noise_alpha=5.0)
    llama.model.register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
    llama.train()
    rows = examples(4, 64)
    llama(**pack(rows))
    noise = (seen["inputs_embeds"] - llama.get_input_embeddings()(pack(rows)["input_ids"]))[0].abs()
    for part, length in ((noise[:4], 4), (noise[4:], 64)):
        bound = 5.0 / math.sqrt(length * 32)
        assert 0.8 * bound < part.max() <= bound * (1 + 1e-5)
    llama.eval()
    llama(**pack(rows))
    torch.testing.assert_close(seen["inputs_embeds"], llama.get_input_embeddings()(pack(rows)["input_ids"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_check_packed_refuses_a_model_that_packing_would_change(dtype):
    llama = AutoModelForCausalLM.from_pretrained(ROOT / "data/tiny/model", dtype=dtype).train()
    make_packed(llama)
    finetune.check_packed(llama, 101, "cpu")
    assert llama.training and llama.config._attn_implementation == "packed"
    make_packed(llama)  # again, with attention that forgets where examples start

    def forget(module, args, kwargs):
        ends = kwargs.get("cu_seq_lens")
        return args, kwargs if ends is None else kwargs | {"cu_seq_lens": ends[[0, -1]]}

    for layer in llama.model.layers:
        layer.register_forward_pre_hook(forget, with_kwargs=True)
    with pytest.raises(ValueError, match="packed rows do not work for this model.*--nopacking"):
        finetune.check_packed(llama, 101, "cpu")


@pytest.mark.parametrize(
    "model_type, hidden, rate",
    # tinker-cookbook's figures: Llama-3.2-1B, Llama-3.1-8B, Qwen3-8B
    [("llama", 2048, 4.908e-4), ("llama", 4096, 2.857e-4), ("qwen3", 4096, 4.730e-4)],
)
def test_default_learning_rate_is_the_published_fit(model_type, hidden, rate):
    config = type("Config", (), {"model_type": model_type, "hidden_size": hidden})
    assert finetune.default_learning_rate(config) == pytest.approx(rate, rel=1e-3)


# -----------------------------------------------------------------------------
# the whole script


def test_a_run_writes_exactly_these_files(plain):
    folder, records, record = plain
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and "runs" not in p.parts}
    adapter = {"adapter_config.json", "adapter_model.safetensors", "README.md", "generation_config.json"}
    adapter |= {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
    state = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "manifest.json"}
    plots = {"loss.png", "learning_rate.png", "eval_loss.png", "eval_token_acc.png"}
    expected = {"run.json", "log.jsonl"} | {f"adapter/{n}" for n in adapter} | {f"plots/{n}" for n in plots}
    for checkpoint in {record["best_checkpoint"], record["last_checkpoint"]}:
        expected |= {f"{checkpoint}/{n}" for n in adapter | state}
    assert files == expected
    assert len(list((folder / "runs").iterdir())) == 1
    for name in plots:
        assert (folder / "plots" / name).read_bytes()[:4] == b"\x89PNG"


def test_log_and_run_record_agree(plain):
    folder, records, record = plain
    assert json.loads((folder / "run.json").read_text()) == json.loads(json.dumps(record))
    steps = [r for r in records if "loss" in r]
    evals = [r for r in records if "eval_loss" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6] and [r["step"] for r in evals] == [2, 4, 6]
    assert steps[-1]["epoch"] == 2 and steps[2]["epoch"] == 1
    assert steps[-1]["tokens"] == 2 * record["counts"]["tokens"]
    assert record["counts"]["train"]["examples"] == 44 and record["counts"]["eval"]["examples"] == 8
    assert record["status"] == "finished" and record["steps"] == 6
    best = min(evals, key=lambda r: r["eval_loss"])
    assert record["best_checkpoint"] == f"checkpoint-{best['step']}" and record["last_checkpoint"] == "checkpoint-6"
    metrics = record["metrics"]
    assert metrics["eval_loss"] == evals[-1]["eval_loss"] and metrics["best_eval_loss"] == best["eval_loss"]
    assert metrics["train_loss"] == pytest.approx(sum(r["loss"] for r in steps) / 6)
    assert metrics["train_tokens"] == steps[-1]["tokens"] and metrics["total_flos"] > 0
    assert steps[0]["learning_rate"] == 0 and max(r["learning_rate"] for r in steps) == pytest.approx(3e-3)


def test_the_saved_adapter_is_the_best_checkpoint_and_gives_its_eval_loss(plain):
    from peft import PeftModel
    from transformers import AutoTokenizer

    folder, records, record = plain
    adapter = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    assert adapter == (folder / record["best_checkpoint"] / "adapter_model.safetensors").read_bytes()
    model = AutoModelForCausalLM.from_pretrained(ROOT / "data/tiny/model", dtype=torch.float32)
    model = PeftModel.from_pretrained(model, folder / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    rows = finetune.read_conversations([("data/tiny/test.jsonl", "train", None, None, None)], "\n", 52, 42)
    _, held_out = finetune.split_rows(52, 8, 42)
    nll, tokens = 0.0, 0
    for i in held_out:  # one by one, through the template that was saved, with transformers' own mask of the prompt
        text = tokenizer.apply_chat_template(rows[i], tokenize=False)
        prompt = tokenizer.apply_chat_template(rows[i][:1], add_generation_prompt=True).input_ids
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        labels = ids.clone()
        labels[0, : len(prompt)] = IGNORE
        count = int((labels != IGNORE).sum())
        with torch.no_grad():
            nll += model(input_ids=ids, labels=labels).loss.item() * count
        tokens += count
    assert nll / tokens == pytest.approx(record["metrics"]["best_eval_loss"], rel=1e-5)


def test_stop_tokens_and_template_travel_with_the_adapter(plain):
    folder = plain[0]
    stops = json.loads((folder / "adapter" / "generation_config.json").read_text())["eos_token_id"]
    assert stops == [0] or stops == 0  # <|endoftext|>, which ends the alpaca template's answers
    template = (folder / "adapter" / "chat_template.jinja").read_text()
    assert template == (ROOT / "templates" / "alpaca.jinja").read_text()


@pytest.mark.parametrize(
    "flags",
    [{"micro_batch_size": 1}, {"micro_batch_size": 2}, {"micro_batch_size": 16}, {"packing": False}]
    + [{"packing": False, "micro_batch_size": 8}, {"activation_checkpointing": True}],
    ids=str,
)
def test_what_must_not_change_a_run(plain, tmp_path, flags):
    records, _ = run(tmp_path, **flags)
    assert_same_curve(records, plain[1], tolerance=1e-4)


def test_same_seed_same_run_and_another_seed_another(plain, tmp_path):
    assert run(tmp_path / "same")[0] == plain[1]
    assert run(tmp_path / "other", seed=1)[0] != plain[1]


def test_group_by_length_trains_on_the_same_examples_in_another_order(plain, tmp_path):
    records, _ = run(tmp_path, group_by_length=True)
    assert records[-1]["step"] == 6 and records != plain[1]
    assert [r["tokens"] for r in records if r["step"] in (3, 6) and "loss" in r] == [
        r["tokens"] for r in plain[1] if r["step"] in (3, 6) and "loss" in r
    ]


@pytest.mark.parametrize("flags", [{"use_dora": True}, {"use_rslora": True}, {"neftune_noise_alpha": 5.0}], ids=str)
def test_variants_of_the_adapter_train(plain, tmp_path, flags):
    records, record = run(tmp_path, max_steps=3, warmup_ratio=0.0, **flags)
    losses = [r["loss"] for r in records if "loss" in r]
    assert len(losses) == 3 and losses[2] < losses[0] and losses[2] != plain[1][3]["loss"]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["use_dora"] == flags.get("use_dora", False) and config["use_rslora"] == flags.get("use_rslora", False)


@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
def test_quantized_bases_train_on_a_cpu(plain, tmp_path, bits):
    records, record = run(tmp_path, max_steps=3, **{bits: True})
    losses = [r["loss"] for r in records if "loss" in r]
    assert losses[0] == pytest.approx(plain[1][0]["loss"], rel=0.05) and losses[0] != plain[1][0]["loss"]
    assert losses[2] < losses[0]


@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
def test_packing_changes_nothing_for_a_quantized_base(tmp_path, bits):
    flags = {"max_steps": 4, "warmup_ratio": 0.0, bits: True}
    packed, _ = run(tmp_path / "packed", **flags)
    padded, _ = run(tmp_path / "padded", packing=False, **flags)
    assert_same_curve(packed, padded, tolerance=5e-3)


def test_a_base_with_missing_weights_is_refused(tmp_path):
    shutil.copytree(ROOT / "data/tiny/model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(ValueError, match=r"9 tensors of its configuration are not in its files.*layers\.4\."):
        run(tmp_path / "out", base_model=str(tmp_path / "model"))


def test_early_stopping_keeps_the_best_and_the_last(tmp_path):
    flags = {"learning_rate": 0.02, "lr_scheduler_type": "constant", "save_steps": 1, "num_epochs": 20}
    records, record = run(tmp_path, early_stopping_patience=3, **flags)
    losses = [r["eval_loss"] for r in records if "eval_loss" in r]
    assert record["status"] == "stopped early" and len(losses) == losses.index(min(losses)) + 1 + 3
    kept = {p.name for p in tmp_path.glob("checkpoint-*")}
    assert kept == {f"checkpoint-{losses.index(min(losses)) + 1}", f"checkpoint-{len(losses)}"}
    assert record["best_checkpoint"] in kept and record["last_checkpoint"] in kept


def test_without_validation_the_last_adapter_is_kept(tmp_path):
    records, record = run(tmp_path, val_set_size=0, max_steps=2)
    assert [r["step"] for r in records] == [1, 2] and record["best_checkpoint"] == record["last_checkpoint"]
    assert not (tmp_path / "plots" / "eval_loss.png").exists()


# -----------------------------------------------------------------------------
# killed runs


def interrupt_at(monkeypatch, step, error):
    """Make the process die with `error` in the middle of optimizer step `step`."""
    real = finetune.Report.on_step_begin

    def die(self, args, state, control, **kwargs):
        if state.global_step == step - 1:
            raise error
        return real(self, args, state, control, **kwargs)

    monkeypatch.setattr(finetune.Report, "on_step_begin", die)


@pytest.mark.parametrize("step", [1, 4, 6])
def test_a_resumed_run_is_the_run_that_was_never_killed(plain, tmp_path, monkeypatch, step):
    with monkeypatch.context() as patch:
        interrupt_at(patch, step, MemoryError("killed"))
        with pytest.raises(MemoryError):
            run(tmp_path)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # what a kill leaves of a line
    records, record = run(tmp_path, resume_from_checkpoint="auto")
    assert records == plain[1]  # bit for bit
    one, other = ((f / "adapter" / "adapter_model.safetensors").read_bytes() for f in (plain[0], tmp_path))
    assert one == other and record["status"] == "finished"


def test_resume_goes_on_after_an_epochs_end_and_with_dropout(tmp_path, monkeypatch):
    flags = {"lora_dropout": 0.1, "save_steps": 3}
    whole, _ = run(tmp_path / "whole", **flags)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5, MemoryError("killed"))
        with pytest.raises(MemoryError):
            run(tmp_path / "killed", **flags)
    assert run(tmp_path / "killed", resume_from_checkpoint="auto", **flags)[0] == whole


def test_a_finished_run_resumes_to_nothing_left_to_do(plain, tmp_path):
    shutil.copytree(plain[0], tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "adapter")
    records, record = run(tmp_path / "copy", resume_from_checkpoint="auto")
    assert records == plain[1] and (tmp_path / "copy" / "adapter" / "adapter_model.safetensors").exists()


def test_a_death_while_a_checkpoint_is_written_leaves_the_one_before(plain, tmp_path, monkeypatch):
    real = finetune.write_json

    def die(path, value):
        if path.name == "manifest.json" and path.parent.name == "checkpoint-4.incomplete":
            raise MemoryError("killed")
        real(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "write_json", die)
        with pytest.raises(MemoryError):
            run(tmp_path)
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4.incomplete"}
    assert run(tmp_path, resume_from_checkpoint="auto")[0] == plain[1]
    assert not list(tmp_path.glob("*.incomplete"))


def test_a_full_disk_is_a_message_and_costs_no_earlier_checkpoint(plain, tmp_path, monkeypatch):
    real = torch.save

    def full(value, path, *args, **kwargs):
        if "checkpoint-4.incomplete" in str(path):
            raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
        return real(value, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(ValueError, match=r"checkpoint-4 could not be written \(\d+ MB free\).*--resume_from"):
            run(tmp_path)
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-2"}
    assert run(tmp_path, resume_from_checkpoint="auto")[0] == plain[1]


def test_checkpoints_that_cannot_be_resumed_say_why(plain, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(plain[0], folder)
    (folder / "checkpoint-99").mkdir()
    (folder / "checkpoint-99" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="checkpoint-99/manifest.json is damaged"):
        run(folder, resume_from_checkpoint="auto")
    shutil.rmtree(folder / "checkpoint-99")
    with pytest.raises(ValueError, match="checkpoint-99 is not a whole checkpoint.*there are: checkpoint-"):
        run(folder, resume_from_checkpoint=str(folder / "checkpoint-99"))
    with pytest.raises(ValueError, match="another configuration .learning_rate: 0.003 then, 0.001 now"):
        run(folder, resume_from_checkpoint="auto", learning_rate=1e-3)
    with pytest.raises(ValueError, match="another configuration .*data_sha256"):
        run(folder, resume_from_checkpoint="auto", data_path="data/tiny/demonstrations.jsonl")
    torn = folder / "checkpoint-6" / "optimizer.pt"
    torn.write_bytes(torn.read_bytes()[:-100])
    with pytest.raises(ValueError, match="checkpoint-6 is damaged: optimizer.pt"):
        run(folder, resume_from_checkpoint="auto")
    assert curve(folder) == plain[1]  # nothing was lost by asking


def test_interrupting_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    interrupt_at(monkeypatch, 4, KeyboardInterrupt())
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path)
    assert stopped.value.code == 130 and "--resume_from_checkpoint auto" in capsys.readouterr().out


# -----------------------------------------------------------------------------
# bad input


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"batch_size": 10}, r"--batch_size 10 must be a multiple of 4 = --micro_batch_size 4 x 1 ranks.*8 or 12"),
        ({"batch_size": 2}, r"--batch_size 2 must be a multiple of 4.*Nearest that fit: 4$"),
        ({"dataset": "tiny"}, "--data_path data/tiny/test.jsonl and --dataset tiny: give one of them"),
        ({"learning_rate": -1.0}, "--learning_rate must not be negative"),
        ({"learning_rate": math.nan}, "--learning_rate must not be negative"),
        ({"lora_dropout": 1.5}, "--lora_dropout 1.5 must be below 1"),
        ({"early_stopping_patience": 2, "val_set_size": 0}, "needs a validation set"),
        ({"load_in_8bit": True, "load_in_4bit": True}, "give one of them"),
        ({"dtype": "half"}, "--dtype half: one of auto, bfloat16"),
        ({"lr_scheduler_type": "cosin"}, "--lr_scheduler_type cosin: one of .*cosine"),
        ({"deepspeed": "zero9.json"}, "--deepspeed zero9.json: no such file"),
        ({"base_model": "nowhere"}, "--base_model nowhere: no such folder"),
        ({"base_model": "data"}, "--base_model data: no model is in this folder"),
        ({"prompt_template": "alpacca"}, "no such template; there are: alpaca, alpaca_short, chatml, vigogne"),
        ({"data_path": "data/none.jsonl"}, "data/none.jsonl: no such file"),
        ({"val_set_size": 52.0}, "--val_set_size 52 takes 52 of 52 rows and leaves none"),
        ({"cutoff_len": 20}, "no label is left in any of the 44 train rows.*--cutoff_len 20"),
        ({"lora_target_modules": ["q_proj", "qkv"]}, "the model has no qkv; its linear layers are .*q_proj"),
        ({"lora_target_modules": []}, "the model has no such name"),
        ({"lora_target_modules": ["all-linear", "q_proj"]}, "all-linear stands alone"),
        ({"lora_target_modules": ["norm"]}, "--lora_target_modules .*norm"),
        ({"dataset": ",", "data_path": ""}, "no name in it"),
        ({"seed": 2**32}, "--seed 4294967296 must be below"),
        ({"max_steps": 1}, "a run of one step learns nothing.*--warmup_ratio 0"),
        ({"overwrite": True, "resume_from_checkpoint": "auto"}, "give one of them"),
        ({"val_set_size": 0.001, "early_stopping_patience": 1}, "--val_set_size 0.001 of these rows is none"),
        (
            {"lora_target_modules": ["lm_head"]},
            "packed rows need a plain linear output layer, this model's is peft.*--nopacking",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_flags_are_refused(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", **flags)
    assert not (tmp_path / "out" / "adapter").exists()


def test_an_output_folder_that_holds_another_run_is_kept_unless_told_otherwise(plain, tmp_path):
    shutil.copytree(plain[0], tmp_path / "copy")
    (tmp_path / "copy" / "notes.txt").write_text("mine")
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="holds another run: continue it with --resume_from_checkpoint auto"):
        run(tmp_path / "copy")
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before
    with pytest.raises(ValueError, match="no qkv"):  # with --overwrite, too, nothing goes before all is checked
        run(tmp_path / "copy", overwrite=True, lora_target_modules=["qkv"])
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before
    (tmp_path / "theirs" / "checkpoint-500").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds another run"):
        run(tmp_path / "theirs")
    with pytest.raises(ValueError, match="is not in --output_dir"):
        run(tmp_path / "new", resume_from_checkpoint=str(tmp_path / "copy" / "checkpoint-6"))
    records, _ = run(tmp_path / "copy", overwrite=True, max_steps=2)
    assert len(records) == 3 and (tmp_path / "copy" / "notes.txt").read_text() == "mine"


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "head_loss", lambda head, hidden, targets, **kw: (hidden.sum() * math.nan, None))
    monkeypatch.setattr(finetune, "check_packed", lambda *args: None)
    with pytest.raises(ValueError, match="the loss is nan at step 1"):
        run(tmp_path)


def test_empty_answers_and_cut_examples_are_counted_and_said(tmp_path, capsys):
    rows = [{"instruction": f"Say {i}", "output": "yes " * i} for i in range(12)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    run(tmp_path / "out", data_path=str(tmp_path / "data.json"), cutoff_len=60, max_steps=2, val_set_size=0)
    said = capsys.readouterr().out
    assert "cut at --cutoff_len 60" in said and "1 answers are empty" in said


# -----------------------------------------------------------------------------
# the page


def test_the_table_of_metrics_lists_the_keys_of_the_log(plain):
    page = (ROOT / "docs" / "finetune.md").read_text(encoding="utf-8")
    table = page.partition("## Logged metrics")[2].partition("\nAt the end")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert listed == {name for record in finetune.read_log(plain[0] / "log.jsonl") for name in record}
    at_end = page.partition("\nAt the end")[2].partition("\n## ")[0]
    assert set(re.findall(r"`(\w+)`", at_end)) - {"max_memory_allocated_gb"} == set(plain[2]["metrics"])
