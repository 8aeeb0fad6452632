"""
ppo_gsm8k.py: its formulas by hand and beside verl's own values, rollouts against transformers' own, an update against
a plain PPO loss over whole logits, the script on a tiny run, what must not change a run, exact resume, and bad input.

    .venv/bin/python -m pytest tests/test_ppo.py
"""

import itertools
import json
import math
import random
import re
import shutil
import statistics
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GenerationConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
)

import generate
import ppo_gsm8k as ppo
from ppo_gsm8k import train_ppo

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "data" / "tiny" / "model"
VOCAB = len(AutoTokenizer.from_pretrained(BASE))  # the others of the 1,024 ids pad it
STOPS = [0, 29, 13]  # <|endoftext|>, ":", "*": responses of the embedded model then end at many lengths
Kit = namedtuple("Kit", "folder base adapter train val reward")
REWARD = """
import os

calls = 0


def digits(data_source, solution_str, ground_truth, extra_info):
    return sum(c.isdigit() for c in solution_str) / max(1, len(solution_str))


def digits_until(data_source, solution_str, ground_truth, extra_info):
    global calls
    calls += 1
    if calls > int(os.environ["STOP_AFTER"]):
        raise RuntimeError("stopped by the test")
    return digits(data_source, solution_str, ground_truth, extra_info)


def as_dict(data_source, solution_str, ground_truth, extra_info):
    return {"score": digits(data_source, solution_str, ground_truth, extra_info), "other": 3}


def knows_all(data_source, solution_str, ground_truth, extra_info):
    return float(data_source == "openai/gsm8k" and ground_truth.isdigit() and "question" in extra_info)


def raises(data_source, solution_str, ground_truth, extra_info):
    raise KeyError("no such thing")


def nan(data_source, solution_str, ground_truth, extra_info):
    return float("nan")


def huge(data_source, solution_str, ground_truth, extra_info):
    return 1e25


def nothing(data_source, solution_str, ground_truth, extra_info):
    return None


def no_score(data_source, solution_str, ground_truth, extra_info):
    return {"acc": 1.0}


def two_arguments(solution_str, ground_truth):
    return 1.0


not_a_function = 3
"""


def make_kit(folder):
    """Make what a tiny run needs: a base whose generation config would spoil sampling, an adapter, rows, a reward."""
    kit = Kit(folder, *(folder / name for name in "base adapter train.jsonl val.jsonl reward.py".split()))
    shutil.copytree(BASE, kit.base)
    leak = {"eos_token_id": STOPS, "do_sample": True, "temperature": 0.2, "top_k": 2, "repetition_penalty": 3.0}
    (kit.base / "generation_config.json").write_text(json.dumps(leak))
    shutil.copy(ROOT / "templates" / "alpaca.jinja", kit.base / "chat_template.jinja")
    config = json.loads((kit.base / "config.json").read_text())
    (kit.base / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.3}))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(kit.base, dtype=torch.float32)
    targets = ["q_proj", "v_proj", "down_proj"]
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.3, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(kit.adapter)
    lines = (ROOT / "data" / "tiny" / "train.jsonl").read_text().splitlines(keepends=True)
    kit.train.write_text("".join(lines[:11]))
    kit.val.write_text("".join(lines[100:105]))
    kit.reward.write_text(REWARD)
    return kit


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    return make_kit(tmp_path_factory.mktemp("kit"))


@pytest.fixture(autouse=True)
def no_plots(monkeypatch, request):
    """Most runs are compared, not looked at: the charts of one are enough."""
    if "plain" not in request.fixturenames:
        monkeypatch.setattr(ppo, "plot_curves", lambda records, path: path.touch())


def settings(kit, **flags):
    """Return the flags of a run of 3 steps of 6 responses, two mini-batches each, with about everything on."""
    made = {
        "base_model": str(kit.base),
        "lora_weights": str(kit.adapter),
        "train_files": str(kit.train),
        "reward": f"{kit.reward}:digits",
        "train_batch_size": 6,
        "ppo_mini_batch_size": 3,
        "max_response_length": 16,
        "total_training_steps": 3,
        "actor_lr": 3e-4,
        "critic_lr": 2e-3,
        "kl_coef": 0.1,
        "gamma": 0.99,
        "lam": 0.95,
        "lr_scheduler_type": "constant",
        "temperature": 0.9,
        "entropy_coeff": 0.01,
        "kl_loss_coef": 0.1,
        "save_freq": 0,
    }
    return made | flags


def run(kit, folder, **flags):
    """Run train_ppo; returns its records without the clock's."""
    train_ppo(output_dir=str(folder), **settings(kit, **flags))
    return curve(folder)


def read_log(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def curve(folder):
    records = read_log(Path(folder) / "log.jsonl")
    return [{k: v for k, v in r.items() if not k.startswith(("timing_s/", "perf/"))} for r in records]


def weights(folder, name="adapter"):
    files = sorted(Path(folder, name).glob("*.safetensors"))
    assert files
    return {k: v for file in files for k, v in load_file(file).items()}


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def ragged(lengths, width=None, seed=0):
    """Return (random numbers [B, R], mask) of rows with these lengths; the numbers go on where the mask ends."""
    width = width or max(lengths)
    x = torch.randn(len(lengths), width, generator=torch.Generator().manual_seed(seed))
    return x, torch.arange(width) < torch.tensor(lengths)[:, None]


# -----------------------------------------------------------------------------
# reward


@pytest.mark.parametrize(
    "text, strict, flexible",
    [
        ("so it is\n#### 42", 1, 1),
        ("#### 42.", 0, 0),  # "42." is not "42", in verl, too
        ("#### 42.00", 0, 0),
        ("#### $42", 0, 1),
        ("####42", 0, 1),
        ("####  42", 0, 1),
        ("#### 4,2", 1, 0),  # strict drops commas, flexible does not
        ("#### -42", 0, 0),
        ("#### 41\n#### 42", 1, 1),
        ("#### 42\n#### 41", 0, 0),
        ("#### 42 apples, not 7", 1, 0),
        ("42", 0, 1),
        ("it is 42 .", 0, 1),
        ("it is 42, or so", 0, 0),
        ("it is 42 , or so", 0, 0),  # a lone comma counts as a number, in verl, too
        ("", 0, 0),
        ("no number", 0, 0),
        ("#### 42" + "x" * 293, 1, 1),
        ("#### 42" + "x" * 294, 0, 1),  # the last 300 characters begin at the second #
        ("#### 42" + "x" * 299, 0, 0),
        ("#### 42\n" + "word " * 80, 0, 0),
    ],
)
def test_compute_score_on_odd_answers(text, strict, flexible):
    assert ppo.compute_score(text, "42") == ppo.compute_score(text, "42", method="strict") == strict
    assert ppo.compute_score(text, "42", method="flexible") == flexible
    assert generate.compute_score(text, "42", "strict") == strict
    assert generate.compute_score(text, "42", "flexible") == flexible


def test_thousands_and_signs():
    assert ppo.compute_score("#### 1,000", "1000") == 1 and ppo.compute_score("#### 1,000", "1000", "flexible") == 0
    assert ppo.compute_score("#### -3", "-3") == ppo.compute_score("-3", "-3", "flexible") == 1


def test_a_reward_function_of_the_users_gets_verls_arguments(kit):
    problem = {"data_source": "openai/gsm8k", "ground_truth": "3", "extra_info": {"question": "?"}, "where": "here"}
    assert ppo.score_response(ppo.load_reward(f"{kit.reward}:knows_all"), problem, "text") == 1
    assert ppo.score_response(ppo.load_reward(f"{kit.reward}:as_dict"), problem, "a1b2") == 0.5
    assert ppo.score_response(ppo.load_reward("strict"), problem, "#### 3") == 1
    assert ppo.score_response(ppo.load_reward("strict"), problem, "3") == 0
    assert ppo.score_response(ppo.load_reward("flexible"), problem, "3") == 1


# -----------------------------------------------------------------------------
# advantages


def gae_by_hand(rewards, values, gamma, lam):
    """A_t = sum_k (gamma lam)^k delta_{t+k}, one response, no recursion."""
    after = [*values[1:], 0.0]
    deltas = [r + gamma * nxt - v for r, v, nxt in zip(rewards, values, after)]
    n = len(deltas)
    return [sum((gamma * lam) ** k * deltas[t + k] for k in range(n - t)) for t in range(n)]


def test_gae_of_one_response_by_hand():
    # delta = (0 + .9*.4 - .5, 0 + .9*.2 - .4, 1 - .2) = (-.14, -.22, .8); gamma lam = .72
    advantages, returns = ppo.compute_gae(
        torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.4, 0.2]]), torch.ones(1, 3, dtype=torch.bool), 0.9, 0.8
    )
    torch.testing.assert_close(advantages, torch.tensor([[0.11632, 0.356, 0.8]]), rtol=0, atol=1e-6)
    torch.testing.assert_close(returns, torch.tensor([[0.61632, 0.756, 1.0]]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.97, 0.9), (1.0, 0.0), (0.5, 1.0)])
def test_gae_of_rows_of_different_length(gamma, lam):
    lengths = [7, 1, 4, 6]
    rewards, mask = ragged(lengths)
    values, _ = ragged(lengths, seed=1)  # what stands behind a response must not matter
    advantages, returns = ppo.compute_gae(rewards * mask, values, mask, gamma, lam)
    for i, n in enumerate(lengths):
        own = values[i, :n].tolist()
        expected = gae_by_hand(rewards[i, :n].tolist(), own, gamma, lam)
        assert advantages[i, :n].tolist() == pytest.approx(expected, abs=1e-6)
        assert returns[i, :n].tolist() == pytest.approx([a + v for a, v in zip(expected, own)], abs=1e-6)
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_gae_with_gamma_and_lambda_1_returns_the_sum_of_the_rewards_ahead():
    rewards, mask = ragged([5, 3])
    _, returns = ppo.compute_gae(rewards * mask, torch.randn(2, 5), mask, 1.0, 1.0)
    assert returns[1, :3].tolist() == pytest.approx([rewards[1, t:3].sum().item() for t in range(3)], abs=1e-6)


def test_whitening_is_that_of_the_true_entries_with_the_unbiased_variance():
    x, mask = ragged([5, 2, 3])
    inside = x[mask].tolist()
    mean, variance = statistics.fmean(inside), statistics.variance(inside)
    expected = [(v - mean) / math.sqrt(variance + 1e-8) for v in x.flatten().tolist()]
    assert ppo.masked_whiten(x, mask).flatten().tolist() == pytest.approx(expected, abs=1e-5)
    white = ppo.masked_whiten(x, mask)[mask]
    assert white.mean().item() == pytest.approx(0, abs=1e-6) and white.var().item() == pytest.approx(1, abs=1e-5)
    other = x.masked_fill(~mask, 1e3)  # what stands behind a response must not matter
    torch.testing.assert_close(ppo.masked_whiten(other, mask)[mask], white)
    constant = ppo.masked_whiten(torch.full((2, 3), 5.0), torch.ones(2, 3, dtype=torch.bool))
    assert constant.isfinite().all() and constant.abs().max() < 1e-2
    assert ppo.masked_whiten(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool)).isfinite().all()


def test_masked_mean():
    x, mask = ragged([4, 1])
    assert ppo.masked_mean(x, mask).item() == pytest.approx(statistics.fmean(x[mask].tolist()), abs=1e-6)
    assert ppo.masked_mean(x, torch.zeros_like(mask)).item() == 0


def rewards_of(totals, lengths):
    """Return (token-level rewards [B, T], mask) that add up to totals, over two tokens where there are two."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    rewards = torch.zeros(mask.shape)
    rewards[:, 0] = torch.tensor(totals) + 0.25
    rewards[torch.arange(len(lengths)), mask.sum(-1) - 1] -= 0.25
    return rewards, mask


def test_group_advantages_by_hand():
    rewards, mask = rewards_of([1.0, 0.0, 0.0, 1.0, 3.0, 5.0, 3.0, 5.0], [3, 1, 2, 3, 2, 1, 3, 1])
    std, other = math.sqrt(1 / 3) + 1e-6, math.sqrt(4 / 3) + 1e-6  # unbiased
    expected = {
        "grpo": [0.5 / std, -0.5 / std, -0.5 / std, 0.5 / std, -1 / other, 1 / other, -1 / other, 1 / other],
        "rloo": [1 - 1 / 3, -2 / 3, -2 / 3, 1 - 1 / 3, 3 - 13 / 3, 5 - 11 / 3, 3 - 13 / 3, 5 - 11 / 3],
    }
    for estimator, values in expected.items():
        batch = {"token_level_rewards": rewards, "mask": mask}
        advantages, returns = ppo.compute_advantages(batch, estimator, rollout_n=4)
        for row, own, a in zip(advantages, mask, values, strict=True):
            assert row[own].tolist() == pytest.approx([a] * int(own.sum()), abs=1e-5), estimator
        assert not advantages[~mask].any() and torch.equal(advantages, returns)


def test_a_group_of_equal_rewards_has_no_advantage():
    rewards, mask = rewards_of([1.0, 1.0, 1.0], [2, 1, 2])
    advantages, _ = ppo.compute_advantages({"token_level_rewards": rewards, "mask": mask}, "grpo", rollout_n=3)
    assert advantages.abs().max() < 1e-3


def test_reinforce_plus_plus_by_hand():
    lengths, gamma = [4, 2, 1], 0.9
    rewards, mask = ragged(lengths)
    batch = {"token_level_rewards": rewards * mask, "mask": mask}
    advantages, returns = ppo.compute_advantages(batch, "reinforce_plus_plus", gamma=gamma, lam=0.5)
    expected = [
        [sum(gamma ** (k - t) * rewards[i, k].item() for k in range(t, n)) for t in range(n)]
        for i, n in enumerate(lengths)
    ]
    flat = list(itertools.chain(*expected))
    mean, variance = statistics.fmean(flat), statistics.variance(flat)
    assert returns[mask].tolist() == pytest.approx(flat, abs=1e-6)
    assert advantages[mask].tolist() == pytest.approx([(r - mean) / math.sqrt(variance + 1e-8) for r in flat], abs=1e-5)
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_prompts_before_the_responses_change_no_advantage():
    rewards, mask = ragged([4, 2, 3])
    values = ragged([4, 2, 3], seed=1)[0]
    shifted = [torch.nn.functional.pad(x, (5, 0)) for x in (rewards * mask, values, mask)]
    for estimator in ("gae", "reinforce_plus_plus", "grpo"):
        plain = {"token_level_rewards": rewards * mask, "values": values, "mask": mask}
        moved = dict(zip(("token_level_rewards", "values", "mask"), shifted, strict=True))
        one = ppo.compute_advantages(plain, estimator, 3, 0.97, 0.9)
        other = ppo.compute_advantages(moved, estimator, 3, 0.97, 0.9)
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(b[:, 5:], a, rtol=0, atol=1e-6)
            assert not b[:, :5].any()


def test_explained_variance():
    returns, mask = ragged([4, 2, 5])
    values = 0.7 * returns + 0.1 * ragged([4, 2, 5], seed=3)[0]
    r, v = returns[mask].tolist(), values[mask].tolist()
    expected = 1 - statistics.variance([a - b for a, b in zip(r, v)]) / (statistics.variance(r) + 1e-5)
    assert ppo.explained_variance(values, returns, mask) == pytest.approx(expected, abs=1e-5)
    assert ppo.explained_variance(returns + 3, returns, mask) == pytest.approx(1, abs=1e-4)
    assert ppo.explained_variance(torch.full_like(returns, 9), returns, mask) == pytest.approx(0, abs=1e-4)
    assert ppo.explained_variance(-returns, returns, mask) == pytest.approx(-3, abs=1e-3)


# -----------------------------------------------------------------------------
# losses


def agg_by_hand(rows, mode, horizon):
    """Aggregate lists of per-token losses, one list a response."""
    return {
        "token-mean": sum(map(sum, rows)) / sum(map(len, rows)),
        "seq-mean-token-sum": statistics.fmean(map(sum, rows)),
        "seq-mean-token-mean": statistics.fmean(sum(row) / len(row) for row in rows),
        "seq-mean-token-sum-norm": statistics.fmean(map(sum, rows)) / horizon,
    }[mode]


def rows_of(x, mask):
    return [row[own].tolist() for row, own in zip(x, mask, strict=True)]


WHOLE = {"num_tokens": 22, "num_sequences": 6, "horizon": 6}  # of rows of 6, 1, 4, 2, 6 and 3 tokens


@pytest.mark.parametrize("mode", ppo.CHOICES["loss_agg_mode"])
def test_agg_loss_and_that_the_parts_of_a_batch_add_up(mode):
    lengths = [6, 1, 4, 2, 6, 3]
    loss, mask = ragged(lengths)
    whole = agg_by_hand(rows_of(loss, mask), mode, 6)
    assert ppo.agg_loss(loss, mask, mode, **WHOLE).item() == pytest.approx(whole, abs=1e-6)
    rng = random.Random(0)
    for _ in range(5):
        order = rng.sample(range(6), 6)
        cuts = sorted(rng.sample(range(1, 6), 2))
        parts = [order[a:b] for a, b in zip([0, *cuts], [*cuts, 6])]
        got = 0.0
        for part in parts:
            width = max(lengths[i] for i in part)  # a micro-batch is only as wide as it must be
            got += ppo.agg_loss(loss[part, :width], mask[part, :width], mode, **WHOLE).item()
        assert got == pytest.approx(whole, abs=1e-6), parts


def test_agg_loss_survives_an_empty_row():
    mask = torch.tensor([[True, True], [False, False]])
    counts = {"num_tokens": 2, "num_sequences": 2, "horizon": 2}
    assert ppo.agg_loss(torch.ones(2, 2), mask, "seq-mean-token-mean", **counts).item() == pytest.approx(0.5)


def policy_by_hand(old, new, advantage, low, high, c):
    """Return (loss, clipped, kl, clipped by the dual clip) of a token."""
    d = min(max(new - old, -20), 20)
    ratio = math.exp(d)
    plain, clipped = -advantage * ratio, -advantage * min(max(ratio, 1 - low), 1 + high)
    worse, bound = max(plain, clipped), -advantage * c
    loss = min(worse, bound) if advantage < 0 else worse
    return loss, float(clipped > plain), -d, float(advantage < 0 and worse > bound)


@pytest.mark.parametrize(
    "advantage, ratio, loss, clipped, lower",
    [
        (2.0, 1.0, -2.0, 0, 0),
        (2.0, 1.5, -2.4, 1, 0),  # no more than 1 + 0.2
        (2.0, 0.5, -1.0, 0, 0),  # a pessimistic bound: no clip downwards
        (-2.0, 0.5, 1.6, 1, 0),  # no less than 1 - 0.2
        (-2.0, 1.5, 3.0, 0, 0),
        (-2.0, 5.0, 6.0, 0, 1),  # dual clip: no more than 3
        (-2.0, 3.0, 6.0, 0, 0),
        (0.0, 9.0, 0.0, 0, 0),
    ],
)
def test_policy_loss_of_one_token(advantage, ratio, loss, clipped, lower):
    one = torch.ones(1, 1)
    got = ppo.compute_policy_loss(-one, math.log(ratio) - one, advantage * one, 0.2, 0.2, 3.0)
    assert [x.item() for x in got] == pytest.approx([loss, clipped, math.log(ratio), lower], abs=1e-5)


@pytest.mark.parametrize("low, high, c", [(0.2, 0.2, 3.0), (0.1, 0.3, 1.5)])
def test_policy_loss_of_a_batch(low, high, c):
    (old, mask), (new, _), (advantages, _) = (ragged([6, 2, 5, 1, 6], seed=seed) for seed in range(3))
    got = ppo.compute_policy_loss(old, new, 2 * advantages, low, high, c)
    rows = zip(*(x[mask].tolist() for x in (old, new, 2 * advantages, *got)), strict=True)
    for o, n, a, loss, clipped, log_ratio, bounded in rows:
        assert (loss, clipped, -log_ratio, bounded) == pytest.approx(policy_by_hand(o, n, a, low, high, c), abs=1e-5)
    assert got[1][mask].any() and got[3][mask].any()  # both clips are seen


def test_policy_loss_of_a_ratio_beyond_all_numbers_is_finite():
    old, new = torch.tensor([[-500.0, 0.0]]), torch.tensor([[0.0, -500.0]], requires_grad=True)
    for sign in (1.0, -1.0):
        loss = ppo.compute_policy_loss(old, new, torch.full((1, 2), sign))[0].mean()
        assert loss.isfinite() and torch.autograd.grad(loss, new)[0].isfinite().all()


def test_clipped_tokens_have_no_gradient():
    new = torch.tensor([0.5, -0.5, 2.0, 0.05]).requires_grad_()
    losses, *_ = ppo.compute_policy_loss(torch.zeros(1, 4), new[None], torch.tensor([[1.0, -1.0, -1.0, 1.0]]))
    gradient = torch.autograd.grad(losses.mean(), new)[0]
    assert gradient[:3].tolist() == [0, 0, 0] and gradient[3].item() == pytest.approx(-math.exp(0.05) / 4, abs=1e-6)


def test_value_loss():
    (old, mask), (new, _), (returns, _) = (ragged([5, 1, 3], seed=seed) for seed in range(3))
    losses, clipped = ppo.compute_value_loss(new, old, returns)
    rows = zip(*(x[mask].tolist() for x in (old, new, returns, losses, clipped)), strict=True)
    for o, v, r, loss, was_clipped in rows:
        near = min(max(v, o - 0.5), o + 0.5)
        assert loss == pytest.approx(0.5 * max((v - r) ** 2, (near - r) ** 2), abs=1e-6)
        assert was_clipped == ((near - r) ** 2 > (v - r) ** 2)
    assert clipped[mask].any() and not clipped[mask].all()


def test_values_that_did_not_move_are_not_clipped():
    values, returns = torch.randn(40, 30), torch.randn(40, 30)  # rounding must not count
    assert not ppo.compute_value_loss(values, values, returns)[1].any()


def test_low_var_kl():
    new, ref = torch.tensor([-1.0, -2.0, -0.5, -30.0, -1.0]), torch.tensor([-1.5, -1.0, -0.5, -1.0, -40.0])
    k3 = [math.exp(-0.5) + 0.5 - 1, math.e - 1 - 1, 0.0, 10.0, 10.0]  # d = ref - new, e^d - d - 1, at most 10
    assert ppo.low_var_kl(new, ref).tolist() == pytest.approx(k3, abs=1e-6)
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    exact = sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist()))
    assert (p * ppo.low_var_kl(p.log(), q.log())).sum().item() == pytest.approx(exact, abs=1e-6)  # unbiased


# -----------------------------------------------------------------------------
# verl's own values: tests/verl_values.json says which version made them


@pytest.fixture(scope="module")
def verl():
    found = json.loads((ROOT / "tests" / "verl_values.json").read_text())
    given = {name: torch.tensor(rows) for name, rows in found["inputs"].items()}
    given["mask"] = given["mask"].bool()
    return given, found["outputs"]


def same(found, expected):
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.97, 0.9)])
def test_gae_is_verls(verl, gamma, lam):
    given, expected = verl
    same(torch.stack(ppo.compute_advantages(given, "gae", 1, gamma, lam)), expected[f"gae {gamma} {lam}"])


def test_the_other_advantages_are_verls(verl):
    given, expected = verl
    for estimator in ("grpo", "rloo"):
        same(ppo.compute_advantages(given, estimator, rollout_n=3)[0], expected[estimator])
    found = ppo.compute_advantages(given, "reinforce_plus_plus", gamma=0.97)
    same(torch.stack(found), expected["reinforce_plus_plus 0.97"])


@pytest.mark.parametrize("low, high, c", [(0.2, 0.2, 3.0), (0.1, 0.3, 1.5)])
@pytest.mark.parametrize("mode", ppo.CHOICES["loss_agg_mode"])
def test_policy_loss_and_its_gradient_are_verls(verl, mode, low, high, c):
    given, expected = verl
    mask, new = given["mask"], given["logprobs"].clone().requires_grad_()
    found = ppo.compute_policy_loss(given["old_logprobs"], new, given["advantages"], low, high, c)
    counts = {"num_tokens": mask.sum(), "num_sequences": len(mask), "horizon": mask.shape[1]}
    loss = ppo.agg_loss(found[0], mask, mode, **counts)
    loss.backward()
    clipped, kl, bounded = (ppo.masked_mean(x.float(), mask) for x in (found[1], -found[2], found[3]))
    recorded = expected[f"policy {mode} {low} {high} {c}"]
    for one, other in zip((loss, new.grad, clipped, kl, bounded), recorded, strict=True):
        same(one.detach(), other)


def test_value_loss_and_its_gradient_are_verls(verl):
    given, expected = verl
    mask = given["mask"]
    counts = {"num_tokens": mask.sum(), "num_sequences": len(mask), "horizon": mask.shape[1]}
    for old, name in ((given["old_values"], "value"), (given["values"], "value of no step")):
        values = given["values"].clone().requires_grad_()
        losses, clipped = ppo.compute_value_loss(values, old, given["returns"])
        loss = ppo.agg_loss(losses, mask, "token-mean", **counts)
        loss.backward()
        found = [loss.detach(), values.grad, ppo.masked_mean(clipped.float(), mask)]
        for one, other in zip([found[0], found[2]], [expected[name][0], expected[name][-1]], strict=True):
            same(one, other)
        if name == "value":
            same(found[1], expected[name][1])


def test_low_var_kl_and_its_gradient_are_verls(verl):
    given, expected = verl
    new = given["logprobs"].clone().requires_grad_()
    kl = ppo.low_var_kl(new, given["ref_logprobs"]) * given["mask"]
    (kl.sum() / given["mask"].sum()).backward()
    same(kl.detach(), expected["low_var_kl"][0])
    same(new.grad, expected["low_var_kl"][1])
    same((given["logprobs"] - given["ref_logprobs"]) * given["mask"], expected["k1"][0])


# -----------------------------------------------------------------------------
# sampling


LOWEST = torch.finfo(torch.float32).min


@pytest.mark.parametrize("count", [1000, 997])
def test_draws_have_the_probabilities_of_the_distribution(count):
    probs = [0.1, 0.0, 0.25, 0.0, 0.6499, 0.0001, 0.0]
    logits = torch.tensor([[math.log(p) if p else LOWEST for p in probs]])
    tokens, logprobs = ppo.pick_tokens(logits.expand(count, -1), (torch.arange(count) + 0.5) / count)
    found = torch.bincount(tokens, minlength=7).tolist()
    for p, n in zip(probs, found, strict=True):
        assert n == 0 if p == 0 else abs(n - p * count) <= 1  # evenly spaced numbers leave no chance
    torch.testing.assert_close(logprobs, logits[0, tokens])


@pytest.mark.parametrize("u", [0.0, 0.999, 1 - 2**-24, np.nextafter(1.0, 0), 1.0])
def test_no_number_draws_a_token_of_probability_zero(u):
    for vocab in (7, 50_001):  # in a large vocabulary the sums are rounded
        logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(0))
        logits[0, [0, 3, vocab - 2, vocab - 1]] = LOWEST
        token, logprob = ppo.pick_tokens(logits, torch.tensor([u], dtype=torch.float64))
        assert token.item() not in (0, 3, vocab - 2, vocab - 1) and logprob.item() > -100
        assert u > 0 or token.item() == 1
    only = torch.full((1, 5), LOWEST)
    only[0, 2] = 0.0
    assert ppo.pick_tokens(only, torch.tensor([u]))[0].item() == 2


def test_a_small_probability_in_a_large_vocabulary_is_not_lost():
    logits = torch.full((1, 150_000), -40.0)
    logits[0, 0] = 0.0
    logits[0, -1] = math.log(1e-6)
    token, _ = ppo.pick_tokens(logits, torch.tensor([1 - 5e-7]))
    assert token.item() == 149_999


def test_a_token_depends_on_its_own_number_alone():
    generator = torch.Generator().manual_seed(0)
    logits, uniforms = torch.randn(40, 33, generator=generator), torch.rand(40, generator=generator)
    tokens, logprobs = ppo.pick_tokens(logits, uniforms)
    for i in range(40):
        assert ppo.pick_tokens(logits[i : i + 1], uniforms[i : i + 1])[0].item() == tokens[i]
    order = torch.randperm(40, generator=generator)
    assert torch.equal(ppo.pick_tokens(logits[order], uniforms[order])[0], tokens[order])
    greedy, greedy_logprobs = ppo.pick_tokens(logits)
    assert torch.equal(greedy, logits.argmax(-1)) and not torch.equal(greedy, tokens)
    torch.testing.assert_close(greedy_logprobs, logits.log_softmax(-1).max(-1).values)


# -----------------------------------------------------------------------------
# rollouts


def tiny_model(kind):
    """Return a model with random weights, biases among them, that has something to say."""
    shape = {"vocab_size": 110, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_dropout": 0.5}
    config = {
        "llama": LlamaConfig(**shape),
        "qwen2, biases": Qwen2Config(**shape, tie_word_embeddings=True),
        "mistral, window 5": MistralConfig(**shape, sliding_window=5),
        "mistral, one head of keys": MistralConfig(**(shape | {"num_key_value_heads": 1}), sliding_window=5),
    }[kind]
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3 if p.dim() > 1 else 0.5)
    model.generation_config = GenerationConfig(temperature=0.1, top_k=1, repetition_penalty=9.0, do_sample=True)
    return model


KINDS = ["llama", "qwen2, biases", "mistral, window 5", "mistral, one head of keys"]
PROMPTS = [np.random.default_rng([7, n]).integers(100, size=n).tolist() for n in (3, 17, 1, 9, 9, 30, 6, 12)]
LONGEST = 30


def own_greedy(model, prompts, stops, length):
    """Return what `generate` of transformers itself answers to each prompt alone."""
    config = GenerationConfig(max_new_tokens=length, do_sample=False, eos_token_id=stops, pad_token_id=0)
    model.generation_config = GenerationConfig()
    bad = torch.arange(model.config.vocab_size) >= 100  # what pads the vocabulary

    def unpadded(ids, scores):
        return scores.masked_fill(bad, -math.inf)

    def answer(prompt):
        ids = torch.tensor([prompt])  # with its mask: a prompt may hold the padding token
        given = {"attention_mask": torch.ones_like(ids), "logits_processor": [unpadded]}
        return model.generate(ids, generation_config=config, **given)[0, len(prompt) :].tolist()

    return [answer(prompt) for prompt in prompts]


def make_rollout(model, stops, temperature=1.0):
    actor = ppo.Role(model, "", torch.float32, temperature, 100)
    return actor, ppo.LocalRollout(actor, stops)


def tokens_of(answers):
    return [[token for token, _ in answer] for answer in answers]


def logprobs_of(answers):
    return [logprob for answer in answers for _, logprob in answer]


def common_tokens(rows):
    """Return the two tokens to stop at that leave responses of the most different lengths."""
    every = sorted(set(itertools.chain(*rows)))

    def ends(stops):
        return [next((i for i, token in enumerate(row, 1) if token in stops), len(row)) for row in rows]

    return max(itertools.combinations(every, 2), key=lambda stops: (len(set(ends(stops))), stops))


@pytest.fixture(scope="module", params=KINDS)
def spoken(request):
    """Return (model, stops, greedy responses by transformers) of a kind of model."""
    model = tiny_model(request.param)
    free = own_greedy(model, PROMPTS, None, 20)
    stops = list(common_tokens(free))
    return model, stops, own_greedy(model, PROMPTS, stops, 20)


def test_greedy_rollouts_are_transformers_own(spoken):
    model, stops, expected = spoken
    assert len(set(map(len, expected))) >= 4  # rows end at different times
    _, rollout = make_rollout(model, stops)
    assert tokens_of(rollout.generate(PROMPTS, 20)) == expected
    assert tokens_of(rollout.generate(PROMPTS[::-1], 20)) == expected[::-1]
    assert tokens_of(rollout.generate(PROMPTS, 5)) == [row[:5] for row in expected]
    assert tokens_of(rollout.generate(PROMPTS[2:3], 1)) == [expected[2][:1]]
    assert rollout.generate([], 20) == []


@pytest.mark.parametrize("rows_at_once", [1, 3])
def test_the_batch_changes_no_rollout(spoken, rows_at_once, monkeypatch):
    model, stops, expected = spoken
    uniforms = np.random.default_rng(5).random((len(PROMPTS), 20), np.float32)
    _, rollout = make_rollout(model, [*stops, *range(9)])
    together = rollout.generate(PROMPTS, 20, uniforms)
    assert len(set(map(len, together))) > 2  # rows left the batch here
    monkeypatch.setattr(ppo, "ROWS_AT_ONCE", rows_at_once)
    alone = rollout.generate(PROMPTS, 20, uniforms)
    assert tokens_of(alone) == tokens_of(together)
    np.testing.assert_allclose(logprobs_of(alone), logprobs_of(together), atol=1e-5)
    assert tokens_of(make_rollout(model, stops)[1].generate(PROMPTS, 20)) == expected


def test_prompts_of_unlike_length_are_answered_apart(monkeypatch):
    seen, model, decode = [], tiny_model("llama"), ppo.decode

    def spy(actor, prompts, *args):
        seen.append(prompts)
        return decode(actor, prompts, *args)

    monkeypatch.setattr(ppo, "decode", spy)
    _, rollout = make_rollout(model, [0])
    prompts = [[5] * n for n in (40, 30, 30, 25, 24, 23, 22, 21, 19, 4, 3)]
    answers = rollout.generate(prompts, 3)
    assert [[len(prompt) for prompt in batch] for batch in seen] == [[40, 30, 30, 25, 24, 23, 22, 21], [19, 4, 3]]
    assert tokens_of(answers) == [tokens_of(rollout.generate([prompt], 3))[0] for prompt in prompts]


def batch_of(prompts, answers):
    """Return a batch as roll_out makes it: right-padded rows."""
    rows = [torch.tensor(p + r) for p, r in zip(prompts, answers, strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    starts, ends = torch.tensor([len(p) for p in prompts]), torch.tensor([len(row) for row in rows])
    columns = torch.arange(ids.shape[1])
    return {"input_ids": ids, "mask": (columns >= starts[:, None]) & (columns < ends[:, None])}


@pytest.mark.parametrize("temperature", [0.6, 1.3])
def test_log_probabilities_of_a_rollout_are_those_of_training_and_of_the_models_own_forward(spoken, temperature):
    model, stops, _ = spoken
    actor, rollout = make_rollout(model, stops, temperature)
    answers = rollout.generate(PROMPTS, 20, np.random.default_rng(8).random((len(PROMPTS), 20), np.float32))
    batch = batch_of(PROMPTS, tokens_of(answers))
    logprobs, entropy = actor(ppo.response_logprobs, batch, True)
    own, own_entropy = [], []
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for prompt, response in zip(PROMPTS, tokens_of(answers), strict=True):
            logits = model(torch.tensor([prompt + response]), use_cache=False).logits[0, :, :100]
            for t, token in enumerate(response):
                probs = (logits[len(prompt) + t - 1] / temperature).softmax(-1)
                own.append(probs[token].log().item())
                own_entropy.append(-torch.xlogy(probs, probs).sum().item())
    model.set_attn_implementation("sdpa")
    assert logprobs[batch["mask"]].tolist() == pytest.approx(own, abs=1e-4)
    assert logprobs_of(answers) == pytest.approx(own, abs=1e-4)
    assert entropy[batch["mask"]].tolist() == pytest.approx(own_entropy, abs=1e-4)
    assert not logprobs[~batch["mask"]].any()


def test_every_end_token_ends_a_response_and_stands_in_it(spoken):
    model, stops, expected = spoken
    for row in expected:
        assert not set(row[:-1]) & set(stops)
    uniforms = np.random.default_rng(9).random((len(PROMPTS), 20), np.float32)
    for row in tokens_of(make_rollout(model, stops)[1].generate(PROMPTS, 20, uniforms)):
        assert not set(row[:-1]) & set(stops) and (len(row) == 20 or row[-1] in stops)
    all_stop = make_rollout(model, list(range(100)))[1].generate(PROMPTS, 20)
    assert [len(row) for row in all_stop] == [1] * len(PROMPTS)


def test_the_padded_vocabulary_is_never_drawn():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[100:] *= 100  # ids that the tokenizer lacks are the likeliest by far
    _, rollout = make_rollout(model, [0], temperature=1.5)
    answers = rollout.generate(PROMPTS, 20, np.random.default_rng(4).random((len(PROMPTS), 20), np.float32))
    assert max(itertools.chain(*tokens_of(answers))) < 100


@pytest.mark.parametrize("rows", [1, 4, 1000])
def test_log_probabilities_in_chunks(monkeypatch, rows):
    model = tiny_model("qwen2, biases")
    actor, _ = make_rollout(model, [0], temperature=0.7)
    batch = batch_of([[1, 2, 3], [4]], [[5, 6, 7], [8, 9]])
    weight = torch.randn(2, 2, 6)
    logits = (model(batch["input_ids"]).logits[:, :-1, :100] / 0.7).log_softmax(-1)
    picked = logits.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    entropy = -(logits.exp() * logits).sum(-1)
    expected = torch.nn.functional.pad(torch.stack([picked, entropy]), (1, 0)) * batch["mask"]
    (expected * weight).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    monkeypatch.setattr(ppo, "LOGITS_AT_ONCE", 100 * rows)
    sizes, logits_of = [], actor.logits
    monkeypatch.setattr(actor, "logits", lambda hidden: sizes.append(len(hidden)) or logits_of(hidden))
    got = torch.stack(actor(ppo.response_logprobs, batch, True))
    assert max(sizes) == min(rows, 5)
    torch.testing.assert_close(got, expected)
    (got * weight).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-5)
    assert not actor(ppo.response_logprobs, batch)[1].any()  # entropies that nobody asked for


# -----------------------------------------------------------------------------
# batches


def test_rows_of_a_step_are_a_window_of_shuffled_epochs():
    rows = [i for step in range(1, 23) for i in ppo.rows_of_step(step, 11, 4, 42)]  # 88 = 8 epochs of 11
    for epoch in range(8):
        assert sorted(rows[11 * epoch : 11 * epoch + 11]) == list(range(11))
    assert len({tuple(rows[11 * e : 11 * e + 11]) for e in range(8)}) == 8  # each shuffled anew
    assert rows[:11] != [i for step in range(1, 4) for i in ppo.rows_of_step(step, 11, 4, 43)][:11]
    assert ppo.rows_of_step(3, 11, 4, 42) == rows[8:12]  # of any step alone, as a resumed run asks for it
    assert [i for step in range(1, 12) for i in ppo.rows_of_step(step, 11, 8, 42)] == rows
    many = ppo.rows_of_step(1, 3, 8, 0)  # more than two epochs in one batch
    assert sorted(many[:3]) == sorted(many[3:6]) == [0, 1, 2]


def test_split_by_tokens():
    lengths = [5, 9, 3, 30, 3, 7, 1]
    for limit in (1, 9, 10, 16, 1000):
        parts = ppo.split_by_tokens(lengths, limit)
        assert sorted(i for part in parts for i in part) == list(range(7))
        assert all(lengths[part[0]] * len(part) <= limit or len(part) == 1 for part in parts)
        order = [lengths[i] for part in parts for i in part]
        assert order == sorted(lengths, reverse=True)
    assert ppo.split_by_tokens([], 10) == [] and len(ppo.split_by_tokens(lengths, 1000)) == 1
    assert ppo.split_by_tokens([4, 4, 4], 8) == [[0, 1], [2]]
    assert ppo.split_by_tokens([9] * 9 + [5], 1000) == [list(range(9)), [9]]  # eight and more are not widened for one


def ranks_of(rank, world_size):
    return SimpleNamespace(process_index=rank, num_processes=world_size)


def test_plans_of_any_number_of_ranks_have_the_same_mini_batches():
    rng = random.Random(1)
    lengths = [rng.randint(1, 50) for _ in range(12)]
    for world_size in (1, 2, 5):
        plans = [ppo.plan_batches(lengths, 4, 60, ranks_of(rank, world_size)) for rank in range(world_size)]
        for mini, of_ranks in enumerate(zip(*plans, strict=True)):
            assert all(rows == list(range(4 * mini, 4 * mini + 4)) for rows, _ in of_ranks)
            assert sorted(i for _, parts in of_ranks for part in parts for i in part) == of_ranks[0][0]
            assert len({len(parts) for _, parts in of_ranks}) == 1  # sharded models need it
            for _, parts in of_ranks:
                assert all(max(lengths[i] for i in part) * len(part) <= 60 or len(part) == 1 for part in parts if part)


def test_ranks_have_about_as_many_tokens():
    rng = random.Random(2)
    lengths = [rng.randint(1, 100) for _ in range(40)]
    plans = [ppo.plan_batches(lengths, 40, 10**6, ranks_of(rank, 4)) for rank in range(4)]
    totals = [sum(lengths[i] for part in plan[0][1] for i in part) for plan in plans]
    assert max(totals) - min(totals) <= 100


def test_a_micro_batch_is_as_wide_as_its_rows_and_an_empty_one_does_not_count():
    batch = batch_of([[1], [2], [3]], [[1], [2, 2], [3, 3, 3]])
    micro = ppo.micro_batch(batch, [1, 0])
    assert micro["mask"].tolist() == [[False, True, True], [False, True, False]]
    assert micro["input_ids"].tolist() == [[2, 2, 2], [1, 1, 0]]
    empty = ppo.micro_batch(batch, [])
    assert len(empty["input_ids"]) == 1 and not empty["mask"].any()


def test_a_micro_batch_without_rows_adds_nothing(kit):
    model = tiny_model("llama")
    actor = ppo.Role(model, "", torch.float32, 1.0, 100)
    batch = batch_of(PROMPTS[:2], [[5, 6], [7]])
    zeros = torch.zeros(batch["mask"].shape)
    batch |= {"old_logprobs": zeros, "advantages": zeros + 1, "ref_logprobs": zeros}
    flags = {"loss_agg_mode": "token-mean", "entropy_coeff": 0.1, "kl_loss_coef": 0.1}
    flags |= {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2}
    loss, metrics = ppo.actor_loss(actor, ppo.micro_batch(batch, []), flags, num_tokens=3, num_sequences=2, horizon=9)
    loss.backward()
    assert loss.item() == 0 and all(not p.grad.any() for p in model.parameters() if p.grad is not None)
    assert all(value.isfinite().all() for value in metrics.values() if value.is_floating_point())


def test_the_optimizer_step_clips_as_torch_does_and_skips_what_is_not_finite():
    torch.manual_seed(0)
    one = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5)), torch.nn.Parameter(torch.ones(2))]
    other = [torch.nn.Parameter(p.detach().clone()) for p in one]
    for p, q in zip(one[:2], other[:2], strict=True):  # the third has no gradient
        p.grad = torch.randn_like(p) * 9
        q.grad = p.grad.clone()
    mine, theirs = (torch.optim.AdamW(params, lr=0.1, weight_decay=0.0) for params in (one, other))
    expected = torch.nn.utils.clip_grad_norm_(other, 1.0)
    theirs.step()
    assert ppo.optimizer_step(mine, one) == pytest.approx(expected.item(), rel=1e-6)
    assert all(p.grad is None for p in one)
    for p, q in zip(one, other, strict=True):
        torch.testing.assert_close(p, q)
    before, state = [p.detach().clone() for p in one], mine.state[one[0]]["exp_avg"].clone()
    for bad in (math.inf, math.nan):
        one[0].grad = torch.full((3, 4), bad)
        assert not math.isfinite(ppo.optimizer_step(mine, one))
        assert all(torch.equal(p, q) for p, q in zip(one, before, strict=True)) and one[0].grad is None
        assert torch.equal(mine.state[one[0]]["exp_avg"], state)


# -----------------------------------------------------------------------------
# an update beside plain PPO: padded rows, whole logits, the formulas once more


class Spy:
    """Keeps what each update of a run was given, and the gradient of each of its mini-batches."""

    def __init__(self, monkeypatch):
        self.updates, step, update = [], ppo.optimizer_step, ppo.update

        def spy_update(role, optimizer, batch, plan, *args):
            of = {id(p): name for name, p in role.named_parameters()}
            names = [of[id(p)].removeprefix("model.") for p in optimizer.param_groups[0]["params"]]
            name = "critic" if "value_head.weight" in names else "actor"
            self.updates.append({"role": name, "names": names, "batch": dict(batch), "plan": plan, "gradients": []})
            return update(role, optimizer, batch, plan, *args)

        def spy_step(optimizer, parameters):
            grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
            self.updates[-1]["gradients"].append(dict(zip(self.updates[-1]["names"], grads, strict=True)))
            return step(optimizer, parameters)

        monkeypatch.setattr(ppo, "update", spy_update)
        monkeypatch.setattr(ppo, "optimizer_step", spy_step)

    def first(self, role):
        """Return (the batch, its gradients) of a role's first update."""
        found = next(u for u in self.updates if u["role"] == role)
        return found["batch"], found["gradients"]


def distance(one, other):
    """Return the largest difference of two gradients, as a share of the largest gradient there is."""
    assert one.keys() == other.keys()
    scale = max(g.abs().max() for g in other.values())
    return (max((one[name] - other[name]).abs().max() for name in one) / scale).item()


@pytest.fixture(scope="module")
def one_step(kit, tmp_path_factory):
    """A run that was stopped after its first step: from there the actor is no longer the reference."""
    folder = tmp_path_factory.mktemp("one_step")
    run(kit, folder, total_training_steps=1)
    return folder


def second_step(kit, one_step, folder, monkeypatch, **flags):
    """Do step 2 of a copy of `one_step`; returns what the updates were given, and their gradients."""
    shutil.copytree(one_step, folder)
    with monkeypatch.context() as patch:
        spy = Spy(patch)
        run(kit, folder, total_training_steps=2, **flags)
    return spy


@pytest.fixture(scope="module")
def usual(kit, one_step, tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        return second_step(kit, one_step, tmp_path_factory.mktemp("usual") / "run", monkeypatch)


def trained(kit, checkpoint, role):
    """Return (model with the role's adapter of a checkpoint, value head), by peft and torch alone."""
    model = AutoModelForCausalLM.from_pretrained(kit.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, checkpoint / "adapter", is_trainable=True).eval()
    head = torch.nn.Linear(128, 1)
    adapter = "default" if role == "actor" else role
    state = {}
    for name, p in model.named_parameters():
        if "lora_" in name:
            state[f"model.{name.replace('.default.', f'.{adapter}.')}"] = {"value": p.data}
    if role == "critic":
        state |= {f"value_head.{name}": {"value": p.data} for name, p in head.named_parameters()}
    torch.distributed.checkpoint.load({role: state}, checkpoint_id=checkpoint)
    return model, head


def by_row(model, batch, temperature=0.9):
    """Return (log-probabilities [R, V], hidden states [R, D]) before each response token, a row of the batch each."""
    found = []
    for ids, mask in zip(batch["input_ids"], batch["mask"], strict=True):
        places = mask.nonzero()[:, 0]
        out = model(ids[None, : places[-1] + 1], output_hidden_states=True)
        logits = out.logits[0, places - 1, :VOCAB] / temperature
        found.append((logits.log_softmax(-1), out.hidden_states[-1][0, places - 1]))
    return found


def responses_of(batch):
    return [ids[mask] for ids, mask in zip(batch["input_ids"], batch["mask"], strict=True)]


def chosen(rows, batch):
    return [lp[torch.arange(len(r)), r] for (lp, _), r in zip(rows, responses_of(batch), strict=True)]


def test_what_the_updates_are_given_is_what_the_formulas_make_of_the_responses(kit, one_step, usual):
    batch, _ = usual.first("critic")
    responses = responses_of(batch)
    assert len(set(map(len, responses))) > 1
    assert all(r[-1] in STOPS or len(r) == 16 for r in responses)
    tokenizer = AutoTokenizer.from_pretrained(kit.base)
    problems = [json.loads(line)["question"] for line in kit.train.read_text().splitlines()]
    picked = [problems[i] for i in ppo.rows_of_step(2, 11, 6, 42)]
    texts = [tokenizer.decode(ids) for ids in batch["input_ids"]]
    assert all(question in text for question, text in zip(picked, texts, strict=True))

    checkpoint = one_step / "checkpoint-1"
    with torch.no_grad():
        old = [x.tolist() for x in chosen(by_row(trained(kit, checkpoint, "actor")[0], batch), batch)]
        base = AutoModelForCausalLM.from_pretrained(kit.base, dtype=torch.float32)
        reference = PeftModel.from_pretrained(base, kit.adapter).eval()
        ref = [x.tolist() for x in chosen(by_row(reference, batch), batch)]
        critic, head = trained(kit, checkpoint, "critic")
        values = [head(hidden)[:, 0].tolist() for _, hidden in by_row(critic, batch)]
    assert max(abs(v) for row in values for v in row) > 1e-3  # the critic has learned something by now
    rewards, advantages = [], []
    for row, o, r, v in zip(responses, old, ref, values, strict=True):
        text = tokenizer.decode(row, skip_special_tokens=True)
        rewards.append([-0.1 * (a - b) for a, b in zip(o, r, strict=True)])
        rewards[-1][-1] += sum(c.isdigit() for c in text) / max(1, len(text))
        advantages.append(gae_by_hand(rewards[-1], v, 0.99, 0.95))
    flat = list(itertools.chain(*advantages))
    mean, variance = statistics.fmean(flat), statistics.variance(flat)

    def given(name, expected, tolerance=2e-5):
        flat = list(itertools.chain(*expected))
        assert batch[name][batch["mask"]].tolist() == pytest.approx(flat, abs=tolerance), name
        assert not batch[name][~batch["mask"]].any(), name

    given("old_logprobs", old)
    given("rollout_logprobs", old)
    given("ref_logprobs", ref)
    given("values", values)
    given("token_level_rewards", rewards)
    given("returns", [[a + v for a, v in zip(*rows, strict=True)] for rows in zip(advantages, values, strict=True)])
    given("advantages", [[(a - mean) / math.sqrt(variance + 1e-8) for a in row] for row in advantages], 1e-3)


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_the_gradient_of_an_update_is_that_of_plain_ppo(kit, one_step, usual, role):
    batch, gradients = usual.first(role)
    model, head = trained(kit, one_step / "checkpoint-1", role)
    first = {name: tensor[:3] for name, tensor in batch.items()}  # the first mini-batch
    rows, responses = by_row(model, first), responses_of(first)
    loss, kl = torch.zeros(()), []
    for i, (logprobs, hidden) in enumerate(rows):
        old, ref, advantages, returns = (
            first[name][i][first["mask"][i]] for name in ("old_logprobs", "ref_logprobs", "advantages", "returns")
        )
        if role == "critic":
            loss = loss + (0.5 * (head(hidden)[:, 0] - returns) ** 2).sum()  # nothing is clipped yet
            continue
        own = logprobs[torch.arange(len(responses[i])), responses[i]]
        loss = loss - (advantages * (own - old).exp()).sum()  # nor here
        loss = loss + 0.01 * (logprobs.exp() * logprobs).sum()
        kl.append((ref - own).exp() - (ref - own) - 1)
        loss = loss + 0.1 * kl[-1].sum()
    assert role == "critic" or max(x.max() for x in kl) > 1e-4  # the actor is no longer the reference
    (loss / first["mask"].sum()).backward()
    adapter = "default" if role == "actor" else role
    expected = {n.replace(".default.", f".{adapter}."): p.grad for n, p in model.named_parameters() if "lora_" in n}
    if role == "critic":
        expected |= {f"value_head.{n}": p.grad for n, p in head.named_parameters()}
    assert distance(gradients[0], expected) < 2e-4  # in rows of one example
    assert distance(gradients[1], expected) > 0.05


@pytest.mark.parametrize(
    "flags",
    [{"ppo_max_tokens": 1}, {"ppo_max_tokens": 150}, {"activation_checkpointing": True, "ppo_max_tokens": 1}],
    ids=str,
)
def test_micro_batches_and_checkpointing_change_no_gradient(kit, one_step, usual, tmp_path, monkeypatch, flags):
    got = second_step(kit, one_step, tmp_path / "run", monkeypatch, **flags)
    assert len(got.updates[0]["plan"][0][1]) > len(usual.updates[0]["plan"][0][1]) == 1
    for role in ("actor", "critic"):
        for mini, expected in enumerate(usual.first(role)[1]):
            assert distance(got.first(role)[1][mini], expected) < (1e-4 if mini else 1e-5), (role, mini)


def test_the_order_of_the_rows_of_a_mini_batch_changes_no_gradient(kit, one_step, usual, tmp_path, monkeypatch):
    plan_batches = ppo.plan_batches

    def otherwise(lengths, mini_batch_size, max_tokens, ranks):
        plan = plan_batches(lengths, mini_batch_size, 1, ranks)
        return [(rows, [part[::-1] for part in parts[::-1]]) for rows, parts in plan]

    monkeypatch.setattr(ppo, "plan_batches", otherwise)
    got = second_step(kit, one_step, tmp_path / "run", monkeypatch)
    for role in ("actor", "critic"):
        assert distance(got.first(role)[1][0], usual.first(role)[1][0]) < 1e-5


def test_ranks_add_up_to_one_process(kit, one_step, usual, tmp_path, monkeypatch):
    """The gradients of rank 0 and rank 1 of two, each computed here, are together those of one process."""
    plan_batches, found = ppo.plan_batches, []
    for rank in (0, 1):
        with monkeypatch.context() as patch:
            spy = Spy(patch)
            shutil.copytree(one_step, tmp_path / str(rank))
            update = ppo.update

            def of_update(role, optimizer, batch, plan, *args, rank=rank, update=update):
                lengths = [int(row.nonzero().max()) + 1 for row in batch["mask"]]
                return update(role, optimizer, batch, plan_batches(lengths, 3, 16384, ranks_of(rank, 2)), *args)

            patch.setattr(ppo, "update", of_update)
            run(kit, tmp_path / str(rank), total_training_steps=2)
            found.append(spy)
    for role in ("actor", "critic"):
        one, two = (spy.first(role)[1][0] for spy in found)
        together = {name: one[name] + two[name] for name in one}
        assert distance(together, usual.first(role)[1][0]) < 1e-5
        assert max(distance(x, usual.first(role)[1][0]) for x in (one, two)) > 0.05


@pytest.mark.parametrize("mode", ["seq-mean-token-mean", "seq-mean-token-sum-norm"])  # the default: above
def test_no_way_of_aggregating_depends_on_the_micro_batches(kit, tmp_path, monkeypatch, mode):
    found = []
    for tokens in (16384, 1):
        with monkeypatch.context() as patch:
            spy = Spy(patch)
            run(kit, tmp_path / str(tokens), total_training_steps=1, loss_agg_mode=mode, ppo_max_tokens=tokens)
            found.append(spy.first("actor")[1][0])
    assert distance(*found) < 1e-5


# -----------------------------------------------------------------------------
# the script


@pytest.fixture(scope="module")
def plain(kit, tmp_path_factory):
    """The run that others are compared with, charts and validation and all: (folder, records, roles)."""
    folder, made, load_roles = tmp_path_factory.mktemp("plain"), [], ppo.load_roles
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(ppo, "load_roles", lambda *args: made.append(load_roles(*args)) or made[-1])
        run(kit, folder, val_files=str(kit.val), test_freq=2, save_freq=1)
    return folder, curve(folder), made[0]


def test_a_run_writes_these_files(plain):
    folder = plain[0]
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert len([name for name in found if name.startswith("tensorboard/events.")]) == 1
    adapter = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    carried = {"chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    expected = {"run.json", "log.jsonl", "curves.png"} | {f"adapter/{name}" for name in adapter | carried}
    expected |= {f"val_generations/step-{step:05d}.jsonl" for step in (0, 2, 3)}
    state = {".metadata", "__0_0.distcp"} | {f"adapter/{name}" for name in adapter}
    expected |= {f"checkpoint-{n}/{name}" for n in (2, 3) for name in state}
    assert {name for name in found if not name.startswith("tensorboard/")} == expected
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_log_has_a_record_a_step_that_says_what_it_should(plain):
    folder, records, _ = plain
    assert [r["training/global_step"] for r in records] == [0, 1, 2, 3]
    assert ["val-core/openai/gsm8k/reward/mean@1" in r for r in records] == [True, False, True, True]
    first = records[1]
    assert first["actor/reward_kl_penalty"] == 0  # exactly
    assert first["critic/values/max"] == first["critic/values/min"] == 0  # the value head starts at zero
    assert first["critic/vf_explained_var"] == pytest.approx(0, abs=0.05)  # but for the 1e-5 in it
    assert 0 < first["critic/vf_loss"] <= 0.5
    for record in records[1:]:
        assert record["training/rollout_probs_diff_mean"] < 1e-5 and record["training/rollout_probs_diff_max"] < 1e-4
        assert record["critic/advantages/mean"] == pytest.approx(0, abs=1e-5)
        assert record["actor/skipped_updates"] == record["critic/skipped_updates"] == 0
        assert record["actor/ppo_kl"] != 0 and record["critic/grad_norm"] > 0 and record["actor/entropy"] > 0
        assert 1 <= record["response_length/min"] < record["response_length/max"] == 16
        assert all(math.isfinite(value) for value in record.values())
    assert all(r["actor/reward_kl_penalty"] != 0 for r in records[2:])
    for record in read_log(folder / "log.jsonl")[1:]:
        assert 0 < record["timing_s/gen"] < record["timing_s/step"] and record["perf/throughput"] > 0
    of_run = json.loads((folder / "run.json").read_text())
    assert of_run["status"] == "finished" and of_run["flags"]["seed"] == 42
    assert of_run["counts"] == {"train": 11, "val": 5, "left_out": 0}
    assert of_run["results"] == read_log(folder / "log.jsonl")[-1]  # with the last validation


def metrics_table(text):
    """Return {metric: the row of the metrics table in docs/ppo_gsm8k.md that it stands in}."""
    section = text.partition("\n## Logged metrics\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    return {name: row for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])}


def metric_problems(seen, text):
    """Return (metrics seen that the table lacks, metrics of the table that were neither seen nor are a GPU's)."""
    table = metrics_table(text)
    elsewhere = {name for name, row in table.items() if re.search(r"GPU only|known GPUs only", row.split("|")[2])}
    return sorted(seen - table.keys()), sorted(table.keys() - seen - elsewhere)


def test_the_metrics_table_of_the_docs_is_the_log(plain):
    seen = {
        name.replace("/openai/gsm8k/", "/<data_source>/")
        for record in read_log(plain[0] / "log.jsonl")
        for name in record
    }
    text = (ROOT / "docs" / "ppo_gsm8k.md").read_text()
    assert metric_problems(seen, text) == ([], [])
    for name, row in metrics_table(text).items():  # without its row each would be missed
        missing, _ = metric_problems(seen, text.replace(row, ""))
        assert name in missing or name not in seen


def test_one_base_serves_all_and_is_not_touched(kit, plain):
    roles = plain[2]
    assert len({id(role.model) for role in roles.values()}) == 1 and list(roles) == ["actor", "critic", "reference"]
    parameters = dict(roles["actor"].model.named_parameters())
    base = load_file(kit.base / "model.safetensors")
    own = {n.removeprefix("base_model.model.").replace(".base_layer", ""): p for n, p in parameters.items()}
    own = {name: p for name, p in own.items() if "lora_" not in name}
    assert own.keys() == base.keys()
    assert all(torch.equal(p, base[name].float()) and not p.requires_grad for name, p in own.items())
    for name, p in weights(kit.folder).items():
        of = [parameters[name.replace(".weight", f".{role}.weight")] for role in ("default", "critic", "reference")]
        assert [torch.equal(tensor, p) for tensor in of] == [False, False, True]


def greedy_answers(model, kit, folder, stops=STOPS):
    """Return what generate.py answers greedily to the problems to validate on."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generate.use_template(tokenizer, "")
    rows = [json.loads(line) for line in kit.val.read_text().splitlines()]
    batch = [
        tokenizer(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": row["question"]}], tokenize=False, add_generation_prompt=True
            ),
            add_special_tokens=False,
        ).input_ids
        for row in rows
    ]
    config = generate.to_generation_config(
        stops, temperature=0, top_p=1.0, top_k=0, seed=0, max_new_tokens=16, num_beams=1, repetition_penalty=1.0
    )
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=0)
    return [
        (tokenizer.decode(ids, skip_special_tokens=True), cut)
        for ids, cut in generate.answer_batch(model, batch, config)
    ]


def test_the_adapter_answers_in_generate_as_it_did_here(kit, plain):
    folder = plain[0]
    base = AutoModelForCausalLM.from_pretrained(str(kit.base), dtype=torch.float32)
    base.generation_config = GenerationConfig()
    model = generate.attach_adapter(base, str(folder / "adapter")).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    assert json.loads((folder / "adapter" / "generation_config.json").read_text())["eos_token_id"] == sorted(STOPS)
    ends = {"", *(tokenizer.decode([stop], skip_special_tokens=True) for stop in STOPS)}  # here, it is in the text
    said = {}
    for step in (0, 3):
        lines = (folder / "val_generations" / f"step-{step:05d}.jsonl").read_text().splitlines()
        said[step] = [json.loads(line) for line in lines]
    for row, (text, _) in zip(said[3], greedy_answers(model, kit, folder / "adapter"), strict=True):
        assert row["response"].startswith(text) and row["response"][len(text) :] in ends
        assert row["score"] == pytest.approx(sum(c.isdigit() for c in row["response"]) / len(row["response"]))
    model.load_adapter(str(kit.adapter), "start")
    model.set_adapter("start")
    for row, (text, _) in zip(said[0], greedy_answers(model, kit, folder / "adapter"), strict=True):
        assert row["response"].startswith(text)
    truths = [json.loads(line)["answer"].rpartition("#### ")[2] for line in kit.val.read_text().splitlines()]
    assert [row["ground_truth"] for row in said[3]] == truths
    score = statistics.fmean(row["score"] for row in said[3])
    assert plain[1][-1]["val-core/openai/gsm8k/reward/mean@1"] == pytest.approx(score)


def test_a_second_run_is_the_first_and_another_seed_is_not(kit, plain, tmp_path, monkeypatch):
    monkeypatch.setattr(ppo, "ROWS_AT_ONCE", 2)
    again = run(kit, tmp_path / "again", val_files=str(kit.val), test_freq=2)
    same_but = [{k: v for k, v in r.items() if "rollout_probs" not in k} for r in again]
    assert same_but == [{k: v for k, v in r.items() if "rollout_probs" not in k} for r in plain[1]]  # bit for bit
    assert_same_weights(weights(tmp_path / "again"), weights(plain[0]))
    assert not list((tmp_path / "again").glob("checkpoint-[12]"))
    other = run(kit, tmp_path / "other", seed=43, total_training_steps=1)
    assert other[0]["critic/score/mean"] != plain[1][1]["critic/score/mean"]


def test_dropout_in_the_configuration_changes_nothing(kit, plain, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(kit.base, base)
    shutil.copytree(kit.adapter, adapter)
    for path, name in ((base / "config.json", "attention_dropout"), (adapter / "adapter_config.json", "lora_dropout")):
        config = json.loads(path.read_text())
        assert config[name] == 0.3
        path.write_text(json.dumps(config | {name: 0.0}))
    flags = {"base_model": str(base), "lora_weights": str(adapter), "total_training_steps": 1}
    assert run(kit, tmp_path / "run", **flags)[0] == plain[1][1]


VARIANTS = {
    "grpo": {"adv_estimator": "grpo", "rollout_n": 2},
    "rloo": {"adv_estimator": "rloo", "rollout_n": 3, "loss_agg_mode": "seq-mean-token-sum", "train_batch_size": 3},
    "reinforce++": {"adv_estimator": "reinforce_plus_plus", "ppo_epochs": 2},
    "no kl": {"kl_coef": 0.0, "kl_loss_coef": 0.0, "entropy_coeff": 0.0},
    "base alone": {"lora_weights": "", "lora_r": 2},
    "one mini-batch": {"ppo_mini_batch_size": 6},
    "a response of one token": {"max_response_length": 1},
    "bfloat16": {"dtype": "bfloat16"},
    "more than an epoch a step": {"train_batch_size": 24, "ppo_mini_batch_size": 12, "max_response_length": 4},
    "falling rates": {"lr_scheduler_type": "linear"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(kit, tmp_path, variant, monkeypatch):
    flags = VARIANTS[variant] | {"total_training_steps": 2, "save_freq": 0}
    spy = Spy(monkeypatch)
    records = run(kit, tmp_path, **flags)
    assert len(records) == 2
    for record in records:
        assert all(math.isfinite(value) for value in record.values()), record
        assert record["training/rollout_probs_diff_mean"] < (5e-3 if variant == "bfloat16" else 1e-5)
    assert records[0].get("actor/reward_kl_penalty", 0.0) == 0
    has_critic = flags.get("adv_estimator", "gae") == "gae"
    assert [u["role"] for u in spy.updates] == (["critic", "actor"] if has_critic else ["actor"]) * 2
    assert ("critic/vf_loss" in records[0]) == has_critic
    batch, gradients = spy.first("actor")
    n, prompts = flags.get("rollout_n", 1), flags.get("train_batch_size", 6)
    assert len(batch["input_ids"]) == n * prompts
    assert len(gradients) == flags.get("ppo_epochs", 1) * prompts // flags.get("ppo_mini_batch_size", 3)
    assert any(g.any() for g in gradients[0].values())
    pairs = zip(batch["input_ids"], batch["mask"], strict=True)
    starts = [tuple(ids[: mask.nonzero()[0]].tolist()) for ids, mask in pairs]
    if n > 1:
        assert all(starts[i] == starts[i - i % n] for i in range(n * prompts))
        assert len({tuple(r.tolist()) for r in responses_of(batch)}) > prompts  # each its own draw
        groups = batch["advantages"].max(-1).values + batch["advantages"].min(-1).values
        torch.testing.assert_close(groups.view(prompts, n).sum(-1), torch.zeros(prompts), atol=1e-4, rtol=0)
    if variant == "one mini-batch":
        assert records[0]["actor/ppo_kl"] == records[1]["actor/ppo_kl"] == records[0]["actor/kl_loss"] == 0
    if variant == "no kl":
        assert "ref_logprobs" not in batch and not any("kl_loss" in name or "reward_kl" in name for name in records[0])
    if variant == "base alone":
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert (
            config["r"] == 2 and "down_proj" in config["target_modules"] and "lm_head" not in config["target_modules"]
        )
    if variant == "more than an epoch a step":
        assert len(set(starts)) == 11
    if variant == "falling rates":
        assert [r["actor/lr"] for r in records] == pytest.approx([3e-4, 1.5e-4])


def test_all_weights_from_a_merged_adapter(kit, tmp_path):
    flags = {"lora_r": 0, "total_training_steps": 2, "val_files": str(kit.val), "test_freq": 2, "actor_lr": 1e-4}
    records = run(kit, tmp_path, **flags)
    assert records[1]["actor/reward_kl_penalty"] == 0 and records[2]["actor/reward_kl_penalty"] != 0
    assert not (tmp_path / "adapter").exists() and not (tmp_path / "checkpoint-2" / "adapter").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto").eval()
    assert model.dtype == torch.float32 and model.get_input_embeddings().weight is model.lm_head.weight
    base = AutoModelForCausalLM.from_pretrained(kit.base, dtype=torch.float32)
    start = PeftModel.from_pretrained(base, kit.adapter).merge_and_unload().eval()
    before = dict(start.named_parameters())
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())
    for step, loaded in ((0, start), (2, model)):
        lines = (tmp_path / "val_generations" / f"step-{step:05d}.jsonl").read_text().splitlines()
        answers = greedy_answers(loaded, kit, tmp_path / "model")
        assert all(json.loads(row)["response"].startswith(text) for row, (text, _) in zip(lines, answers, strict=True))
    config = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert config["eos_token_id"] == sorted(STOPS) and "temperature" not in config
    run(kit, tmp_path, **flags)  # finished: nothing is left to do


# -----------------------------------------------------------------------------
# resuming


class Killed(BaseException):
    """Stands for a kill: nothing of the script catches it."""


def kill_at(monkeypatch, name, when):
    """Make the function `name` of the script die where when(its arguments) is true."""
    whole = getattr(ppo, name)

    def dies(*args, **kwargs):
        if when(*args):
            raise Killed
        return whole(*args, **kwargs)

    monkeypatch.setattr(ppo, name, dies)


MOMENTS = {
    "before step 1": ("rows_of_step", lambda step, *args: step == 1),
    "in checkpoint 2": ("save_actor", lambda actor, folder: "checkpoint-2.incomplete" in str(folder)),
    "in the update of step 3": ("optimizer_step", None),
    "at the end": ("save_actor", lambda actor, folder: folder.name == "actor.incomplete"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_resumed_is_uninterrupted(kit, plain, tmp_path, monkeypatch, moment):
    flags = {"val_files": str(kit.val), "test_freq": 2, "save_freq": 1}
    name, when = MOMENTS[moment]
    calls = itertools.count(1)
    with monkeypatch.context() as patch:
        kill_at(patch, name, when or (lambda *args: next(calls) == 11))  # 4 a step: the actor's first of step 3
        with pytest.raises(Killed):
            run(kit, tmp_path, **flags)
    assert curve(tmp_path) != plain[1] or moment == "at the end"
    if moment.startswith("in checkpoint"):
        assert (tmp_path / "checkpoint-2.incomplete").exists() and not (tmp_path / "checkpoint-2").exists()
    assert run(kit, tmp_path, **flags) == plain[1]  # bit for bit, validation included
    assert_same_weights(weights(tmp_path), weights(plain[0]))
    assert ppo.list_checkpoints(tmp_path) == [2, 3]
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "finished"
    assert not list(tmp_path.glob("*.incomplete"))


def test_a_run_goes_on_beyond_its_end(kit, plain, tmp_path):
    flags = {"val_files": str(kit.val), "test_freq": 2, "save_freq": 1}
    run(kit, tmp_path, total_training_steps=2, **flags)
    assert run(kit, tmp_path, **flags) == plain[1]
    assert_same_weights(weights(tmp_path), weights(plain[0]))
    before = (tmp_path / "log.jsonl").read_bytes()
    run(kit, tmp_path, **flags)  # nothing is left to do
    assert (tmp_path / "log.jsonl").read_bytes() == before and ppo.list_checkpoints(tmp_path) == [2, 3]


def test_the_log_starts_empty_where_nothing_is_resumed(kit, plain, one_step, tmp_path):
    for name in ("log.jsonl", "run.json"):  # of a run that was killed before its first checkpoint
        shutil.copy(plain[0] / name, tmp_path / name)
    assert run(kit, tmp_path, total_training_steps=1) == curve(one_step)


def test_a_reward_function_that_fails_late_does_not_lose_the_run(kit, plain, tmp_path, monkeypatch):
    monkeypatch.setenv("STOP_AFTER", "14")  # in step 3
    with pytest.raises(ValueError, match=r"train.jsonl, row \d+: RuntimeError\('stopped by the test'\); the response"):
        run(kit, tmp_path, save_freq=1, reward=f"{kit.reward}:digits_until")
    assert ppo.list_checkpoints(tmp_path) == [1, 2]
    monkeypatch.setenv("STOP_AFTER", "1000")
    got = run(kit, tmp_path, save_freq=1, reward=f"{kit.reward}:digits_until")
    assert got == [{k: v for k, v in r.items() if not k.startswith("val-")} for r in plain[1][1:]]
    assert_same_weights(weights(tmp_path), weights(plain[0]))


def test_ctrl_c_says_how_to_go_on(kit, tmp_path, monkeypatch, capsys):
    def interrupt(step, *args):
        raise KeyboardInterrupt

    monkeypatch.setattr(ppo, "rows_of_step", interrupt)
    with pytest.raises(SystemExit) as stopped:
        run(kit, tmp_path)
    assert stopped.value.code == 130 and "the same command, without --overwrite, goes on" in capsys.readouterr().out


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=repr)
def test_what_ends_a_run_within_a_checkpoint_is_said(kit, tmp_path, monkeypatch, capsys, error):
    saved = torch.save
    calls = itertools.count(1)

    def fails(*args, **kwargs):
        if next(calls) > 40:  # in the first checkpoint, which has about 170 tensors
            raise error
        return saved(*args, **kwargs)

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(SystemExit) as stopped:
        run(kit, tmp_path, save_freq=1)
    said = capsys.readouterr().out
    assert (
        stopped.value.code == 130
        and "the same command, without --overwrite, goes on" in said
        and "checkpoint-1.incomplete" in said
    )
    assert type(error).__name__ in said or "No space left" in said
    assert ppo.list_checkpoints(tmp_path) == []


@pytest.fixture
def no_model(monkeypatch):
    monkeypatch.setattr(ppo, "load_roles", lambda *args: pytest.fail("a model was loaded"))


@pytest.fixture
def finished(one_step, tmp_path):
    shutil.copytree(one_step, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    "flags, named",
    [
        ({"gamma": 0.5}, "gamma"),
        ({"lora_weights": ""}, "lora_weights"),
        ({"train_batch_size": 12}, "train_batch_size"),
        ({"temperature": 1.0}, "temperature"),
        ({"lr_scheduler_type": "linear", "total_training_steps": 9}, "schedule_steps"),
        ({"train_files": "other rows"}, "sha256"),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_configuration_is_refused(kit, finished, no_model, tmp_path, flags, named):
    if "train_files" in flags:
        flags = {"train_files": str(tmp_path / "other.jsonl")}
        lines = kit.train.read_text().splitlines(keepends=True)
        (tmp_path / "other.jsonl").write_text("".join(lines[1:] + lines[:1]))  # the same rows in another order
    with pytest.raises(ValueError, match=f"another run .*{named}"):
        run(kit, finished, **flags)


def test_an_adapter_that_changed_between_two_runs_is_refused(kit, finished, no_model):
    path = kit.adapter / "adapter_model.safetensors"
    before = path.read_bytes()
    try:
        save_file({name: 2 * p for name, p in load_file(path).items()}, path)
        with pytest.raises(ValueError, match="another run {.sha256"):
            run(kit, finished)
    finally:
        path.write_bytes(before)
    with pytest.raises(pytest.fail.Exception, match="a model was loaded"):  # as it was, it may go on
        run(kit, finished)


def test_the_same_data_elsewhere_and_what_only_costs_time_may_change(kit, finished, tmp_path):
    shutil.copy(kit.train, tmp_path / "moved.jsonl")
    flags = {"ppo_max_tokens": 300, "save_freq": 2, "test_freq": 1, "val_files": str(kit.val)}
    records = run(kit, finished, train_files=str(tmp_path / "moved.jsonl"), **flags)
    assert len(records) == 3 and ppo.list_checkpoints(finished) == [2, 3]


def test_a_finished_run_without_checkpoints_is_not_lost(kit, finished, no_model):
    shutil.rmtree(finished / "checkpoint-1")
    log = (finished / "log.jsonl").read_bytes()
    with pytest.raises(ValueError, match="holds another run"):
        run(kit, finished)
    assert (finished / "log.jsonl").read_bytes() == log


def test_overwrite_starts_over(kit, one_step, finished):
    (finished / "notes.txt").write_text("mine")
    (finished / "val_generations" / "step-00020.jsonl").write_text("of the longer run before")
    got = run(kit, finished, overwrite=True, total_training_steps=1, gamma=0.5)
    assert got != curve(one_step) and (finished / "notes.txt").exists() and ppo.list_checkpoints(finished) == [1]
    assert not list((finished / "val_generations").iterdir())


# -----------------------------------------------------------------------------
# gradients that are no numbers


def poison(monkeypatch, bad):
    """Make the actor's losses of these mini-batches infinite, numbered from 0 through the whole run, two a step."""
    calls, loss_of = itertools.count(), ppo.actor_loss

    def spoiled(*args, **counts):
        loss, metrics = loss_of(*args, **counts)
        return loss * (math.inf if next(calls) in bad else 1), metrics

    monkeypatch.setattr(ppo, "actor_loss", spoiled)


def test_a_gradient_that_is_not_finite_skips_its_step_and_is_counted(kit, tmp_path, monkeypatch):
    poison(monkeypatch, (1, 2))
    records = run(kit, tmp_path)
    assert [r["actor/skipped_updates"] for r in records] == [1, 1, 0]
    assert [r["critic/skipped_updates"] for r in records] == [0] * 3
    assert all(p.isfinite().all() for p in weights(tmp_path).values())
    assert all(math.isfinite(r["actor/grad_norm"]) for r in records)


def test_a_step_without_any_finite_gradient_stops_the_run(kit, tmp_path, monkeypatch):
    poison(monkeypatch, (2, 3))
    with pytest.raises(ValueError, match="no mini-batch of this step had a finite gradient: lower the learning rates"):
        run(kit, tmp_path, save_freq=1)
    assert ppo.list_checkpoints(tmp_path) == [1]


# -----------------------------------------------------------------------------
# bad input


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"train_batch_size": 10, "ppo_mini_batch_size": 4}, "train_batch_size must be a multiple of --ppo_mini_b"),
        ({"train_batch_size": 4, "ppo_mini_batch_size": 8}, "must be a multiple"),
        ({"train_batch_size": 0}, "--train_batch_size 0: it must be above 0"),
        ({"adv_estimator": "a2c"}, "--adv_estimator a2c: one of gae, grpo, rloo, reinforce_plus_plus"),
        ({"adv_estimator": "grpo"}, "compare responses to one prompt: --rollout_n 2"),
        ({"loss_agg_mode": "mean"}, "--loss_agg_mode mean: one of token-mean"),
        ({"temperature": 0.0}, "--temperature 0.0: it must be above 0"),
        ({"temperature": math.nan}, "--temperature nan: it must be above 0"),
        ({"lam": -0.1}, "--lam -0.1: it must be at least 0"),
        ({"actor_lr": math.nan}, "--actor_lr nan: it must be at least 0"),
        ({"ppo_epochs": 0}, "--ppo_epochs 0: it must be above 0"),
        ({"test_freq": 0}, "--test_freq 0: it must be above 0"),
        ({"lora_r": 0, "rollout_urls": "http://127.0.0.1:1"}, "there is no adapter to give to a server"),
        ({"dtype": "int8"}, "--dtype int8: one of auto"),
        ({"base_model": "no/such/thing/at/all"}, "--base_model no/such/thing/at/all, --lora_weights"),
        ({"train_files": "no/such/thing.jsonl"}, "no/such/thing.jsonl is no jsonl or parquet file"),
        ({"train_files": "data/tiny"}, "is no jsonl or parquet file: python data/gsm8k.py --source data/tiny"),
        ({"reward": "exact"}, "--reward exact: neither strict, flexible nor file.py:function"),
        ({"reward": "nowhere.py:f"}, "FileNotFoundError"),
        ({"reward": "REWARD:absent"}, "KeyError.'absent'"),
        ({"max_response_length": 5000}, "more than the 1024 positions of the model"),
        ({"max_prompt_length": 3}, "no prompt of at most --max_prompt_length 3 tokens"),
    ],
    ids=str,
)
def test_bad_flags_are_refused_before_a_model_is_loaded(kit, tmp_path, no_model, flags, message):
    if "REWARD" in flags.get("reward", ""):
        flags = {"reward": flags["reward"].replace("REWARD", str(kit.reward))}
    with pytest.raises(ValueError, match=message):
        run(kit, tmp_path, **flags)
    assert not list(tmp_path.iterdir())


def verl_row(**changed):
    row = {"data_source": "openai/gsm8k", "prompt": [{"role": "user", "content": "What is 3 + 4?"}], "ability": "math"}
    row |= {"reward_model": {"style": "rule", "ground_truth": "7"}, "extra_info": {"index": 0}}
    return {name: value for name, value in (row | changed).items() if value is not ...}


def write_parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize(
    "bad",
    [
        verl_row(reward_model=...),
        verl_row(reward_model=None),
        verl_row(reward_model={"style": "rule", "ground_truth": None}),
        verl_row(prompt="What?"),
        {"text": "a"},
        {"question": "?", "answer": "seven"},
        [1],
    ],
    ids=str,
)
def test_rows_without_what_is_needed_are_named(kit, tmp_path, no_model, bad):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (verl_row(), bad)))
    with pytest.raises(ValueError, match="rows.jsonl, row 2: neither verl's prompt and reward_model"):
        run(kit, tmp_path / "out", train_files=str(path))


def test_a_broken_line_is_named(kit, tmp_path, no_model):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(verl_row()) + '\n{"prompt": [\n')
    with pytest.raises(ValueError, match="rows.jsonl, row 2: .*JSONDecodeError"):
        run(kit, tmp_path / "out", train_files=str(path))


def test_parquet_rows_of_verls_schema_train(kit, tmp_path):
    rows = [verl_row(prompt=[{"role": "user", "content": f"What is 3 + {i}?"}]) for i in range(5)]
    rows[3]["data_source"] = "other/source"
    path = write_parquet(tmp_path / "train.parquet", rows)
    flags = {"train_files": path, "val_files": path, "total_training_steps": 1, "reward": "strict"}
    records = run(kit, tmp_path / "out", **flags)
    names = {f"val-core/{source}/reward/mean@1" for source in ("openai/gsm8k", "other/source")}
    assert names <= records[0].keys()
    lines = (tmp_path / "out" / "val_generations" / "step-00001.jsonl").read_text().splitlines()
    assert all(json.loads(line)["ground_truth"] == "7" for line in lines)


def test_an_integer_ground_truth_is_compared_as_text(kit, tmp_path):
    rows = [verl_row(reward_model={"style": "rule", "ground_truth": truth}) for truth in (7, -12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = AutoTokenizer.from_pretrained(kit.base)
    for path in (str(tmp_path / "rows.jsonl"), write_parquet(tmp_path / "rows.parquet", rows)):
        problems, _ = ppo.read_problems(path, tokenizer, 512)
        assert [problem["ground_truth"] for problem in problems] == ["7", "-12"]
        for method, text in (("strict", "#### {}"), ("flexible", "it is {}")):
            reward = ppo.load_reward(method)
            right = [ppo.score_response(reward, problem, text.format(n)) for problem, n in zip(problems, (7, -12))]
            wrong = [ppo.score_response(reward, problem, text.format(n)) for problem, n in zip(problems, (-12, 7))]
            assert right == [1, 1] and wrong == [0, 0]


def test_overlong_prompts_are_left_out_and_counted(kit, tmp_path):
    problems, none = ppo.read_problems(str(kit.train), AutoTokenizer.from_pretrained(kit.base), 512)
    lengths = sorted(len(problem["prompt"]) for problem in problems)
    assert none == 0 and lengths[0] < lengths[6] < lengths[-1]
    kept = sum(n <= lengths[6] for n in lengths)
    run(kit, tmp_path / "run", max_prompt_length=lengths[6], total_training_steps=1)
    counts = json.loads((tmp_path / "run" / "run.json").read_text())["counts"]
    assert (counts["train"], counts["left_out"]) == (kept, 11 - kept)


@pytest.mark.parametrize(
    "function, message",
    [
        ("raises", "KeyError.'no such thing'.; the response was '"),
        ("nan", "it returned nan"),
        ("huge", "it returned 1e.25"),
        ("nothing", "TypeError"),
        ("no_score", "KeyError.'score'"),
        ("two_arguments", "TypeError"),
    ],
)
def test_a_reward_function_that_fails_names_the_sample(kit, tmp_path, function, message):
    with pytest.raises(ValueError, match=f"the reward function failed on .*train.jsonl, row .*{message}") as error:
        run(kit, tmp_path, reward=f"{kit.reward}:{function}")
    assert "the response was '" in str(error.value)


def test_a_reward_file_may_hold_a_dataclass(tmp_path):
    path = tmp_path / "with_dataclass.py"
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n\n@dataclass\nclass Found:\n"
        "    x: int\n\n\ndef score(data_source, solution_str, ground_truth, extra_info):\n    return Found(1).x\n"
    )
    assert ppo.load_reward(f"{path}:score")("", "", "", {}) == 1


def test_a_reward_file_that_cannot_be_imported_says_why(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("import no_such_module\n")
    with pytest.raises(ValueError, match="file.py:function: ModuleNotFoundError.*No module named 'no_such_module'"):
        ppo.load_reward(f"{path}:score")


def test_without_any_flag_and_without_a_fine_tuned_model_it_says_what_to_do(tmp_path, monkeypatch, no_model):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError,
        match="out/few/adapter: no adapter_model.safetensors; the default is made by python finetune.py --data_path",
    ):
        train_ppo()
    assert not list(tmp_path.iterdir())


def test_an_adapter_in_the_old_format_is_refused(kit, tmp_path, no_model):
    shutil.copytree(kit.adapter, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(ValueError, match="--lora_weights .*adapter: no adapter_model.safetensors"):
        run(kit, tmp_path / "out", lora_weights=str(tmp_path / "adapter"))


def test_an_adapter_whose_tensors_find_no_place_is_refused(kit, tmp_path):
    shutil.copytree(kit.adapter, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name.replace("layers.1.", "layers.9."): p for name, p in tensors.items()}, path)
    with pytest.raises(ValueError, match="--lora_weights .*Found missing adapter keys.*layers.1"):
        run(kit, tmp_path / "out", lora_weights=str(tmp_path / "adapter"))
    assert not (tmp_path / "out").exists()


def test_every_part_of_an_adapter_is_trained(kit, tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], modules_to_save=["norm"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(kit.base, dtype=torch.float32), lora)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    run(kit, tmp_path / "out", lora_weights=str(tmp_path / "adapter"), total_training_steps=1)
    before, after = weights(tmp_path), weights(tmp_path / "out")
    assert before.keys() == after.keys() and any("lora_embedding_A" in name for name in after)
    assert not [name for name in after if torch.equal(after[name], before[name])]


def test_a_base_without_an_end_token_or_a_chat_template_is_refused(kit, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(kit.base, base)
    for name, gone in {
        "tokenizer_config.json": "eos_token",
        "config.json": "eos_token_id",
        "generation_config.json": "eos_token_id",
    }.items():
        config = json.loads((base / name).read_text())
        config.pop(gone)
        (base / name).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no response would ever end: set eos_token"):
        run(kit, tmp_path / "out", base_model=str(base))
    (base / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="chat_template|chat template"):
        run(kit, tmp_path / "out", base_model=str(base))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "config, scale",
    [(Gemma2Config, {"final_logit_softcapping": 0.1}), (GraniteConfig, {"logits_scaling": 8.0})],
)
def test_a_base_that_changes_its_logits_after_the_output_layer_is_refused(kit, tmp_path, config, scale):
    shape = {"vocab_size": 1024, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 12}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    model = AutoModelForCausalLM.from_config(config(**shape, **scale))
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=1.0)
    shutil.copytree(kit.base, tmp_path / "base")
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="--base_model .*: it caps or scales its logits"):
        run(kit, tmp_path / "out", base_model=str(tmp_path / "base"), lora_weights="")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [*KINDS, "opt"])  # opt: its layers call F.dropout(training=self.training) themselves
def test_activation_checkpointing_turns_no_dropout_on(kind, tmp_path):
    if kind == "opt":
        shape = {"vocab_size": 110, "hidden_size": 48, "word_embed_proj_dim": 48, "ffn_dim": 64, "dropout": 0.5}
        config = OPTConfig(**shape, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    else:
        model = tiny_model(kind)
    model.generation_config = GenerationConfig()
    model.save_pretrained(tmp_path)
    flags = {"lora_r": 0, "lora_alpha": 1, "activation_checkpointing": True, "temperature": 1.0}
    actor = ppo.load_roles(["actor"], tmp_path, torch.float32, torch.device("cpu"), "", flags, 100)["actor"]
    batch = batch_of(PROMPTS, [[1, 2, 3]] * len(PROMPTS))
    with torch.no_grad():
        expected, _ = actor(ppo.response_logprobs, batch)
    got, _ = actor.train()(ppo.response_logprobs, batch)
    assert torch.equal(got, expected) and got.requires_grad
