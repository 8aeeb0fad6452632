"""
ppo_gsm8k.py: its formulas by hand, rollouts against transformers' own, an update against a plain PPO loss over whole
logits, the script on a tiny run, what must not change a run, exact resume, and bad input.

    .venv/bin/python -m pytest tests/test_ppo.py
"""

import functools
import itertools
import json
import math
import random
import re
import shutil
import statistics
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
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
STOPS = [0, 29, 13]  # <|endoftext|>, ":", "*": responses of the embedded model then end at many lengths
LOWEST = torch.finfo(torch.float32).min
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
        monkeypatch.setattr(ppo, "plot_metrics", lambda records, folder: None)


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
        "kl_ctrl": "adaptive",
        "target_kl": 0.01,
        "kl_horizon": 40,
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


def curve(folder):
    records = ppo.read_log(Path(folder) / "log.jsonl")
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
    problem = {"data_source": "openai/gsm8k", "ground_truth": "3", "extra_info": {"question": "?"}, "where": str}
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


def test_group_advantages_by_hand():
    # prompt 0: rewards 1, 0, 0, 1; prompt 1: 3, 5; prompt 2 alone: 0.5
    totals, group = [1.0, 0.0, 0.0, 1.0, 3.0, 5.0, 0.5], torch.tensor([0, 0, 0, 0, 1, 1, 2])
    mask = torch.arange(3) < torch.tensor([3, 1, 2, 3, 2, 1, 3])[:, None]
    token_rewards = torch.zeros(7, 3)
    token_rewards[:, 0] = torch.tensor(totals) + 0.25  # split over two tokens where there are two
    token_rewards[torch.arange(7), mask.sum(-1) - 1] -= 0.25
    std = math.sqrt(1 / 3)  # unbiased, of 1, 0, 0, 1
    expected = {
        ("grpo", True): [0.5 / (std + 1e-6), -0.5 / (std + 1e-6)] * 2,
        ("grpo", False): [0.5, -0.5] * 2,
        ("rloo", True): [1 - 1 / 3, 0 - 2 / 3] * 2,
    }
    for (estimator, by_std), of_first in expected.items():
        of_first = [of_first[0], of_first[1], of_first[1], of_first[0]]
        of_second = [-2.0, 2.0] if estimator == "rloo" else [-1.0, 1.0]
        of_second = [x / (math.sqrt(2) + 1e-6) for x in of_second] if estimator == "grpo" and by_std else of_second
        advantages, returns = ppo.compute_group_advantage(token_rewards, mask, group, estimator, by_std)
        for row, own, a in zip(advantages, mask, of_first + of_second + [0.5], strict=True):
            assert row[own].tolist() == pytest.approx([a] * int(own.sum()), abs=1e-5), (estimator, by_std)
        assert not advantages[~mask].any() and torch.equal(advantages, returns)


def test_a_group_of_equal_rewards_has_no_advantage():
    mask = torch.ones(3, 2, dtype=torch.bool)
    advantages, _ = ppo.compute_group_advantage(torch.full((3, 2), 0.5), mask, torch.zeros(3), "grpo", True)
    assert advantages.abs().max() < 1e-3


def test_reinforce_plus_plus_by_hand():
    lengths, gamma = [4, 2, 1], 0.9
    rewards, mask = ragged(lengths)
    advantages, returns = ppo.compute_reinforce_plus_plus_advantage(rewards * mask, mask, gamma)
    expected = [
        [sum(gamma ** (k - t) * rewards[i, k].item() for k in range(t, n)) for t in range(n)]
        for i, n in enumerate(lengths)
    ]
    flat = list(itertools.chain(*expected))
    mean, variance = statistics.fmean(flat), statistics.variance(flat)
    assert returns[mask].tolist() == pytest.approx(flat, abs=1e-6)
    assert advantages[mask].tolist() == pytest.approx([(r - mean) / math.sqrt(variance + 1e-8) for r in flat], abs=1e-5)
    assert not advantages[~mask].any() and not returns[~mask].any()


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
        "seq-mean-token-sum-norm": sum(map(sum, rows)) / horizon,
    }[mode]


def rows_of(x, mask):
    return [row[own].tolist() for row, own in zip(x, mask, strict=True)]


@pytest.mark.parametrize("mode", ppo.LOSS_AGG_MODES)
def test_agg_loss_and_that_the_parts_of_a_batch_add_up(mode):
    lengths = [6, 1, 4, 2, 6, 3]
    loss, mask = ragged(lengths)
    whole = agg_by_hand(rows_of(loss, mask), mode, 6)
    assert ppo.agg_loss(loss, mask, mode).item() == pytest.approx(whole, abs=1e-6)
    rng = random.Random(0)
    plain_sums = []
    for _ in range(5):
        order = rng.sample(range(6), 6)
        cuts = sorted(rng.sample(range(1, 6), 2))
        parts = [order[a:b] for a, b in zip([0, *cuts], [*cuts, 6])]
        got = plain = 0.0
        for part in parts:
            width = max(lengths[i] for i in part)  # a micro-batch is only as wide as it must be
            own = loss[part, :width], mask[part, :width]
            got += ppo.agg_loss(*own, mode, num_tokens=22, num_sequences=6, horizon=6).item()
            plain += ppo.agg_loss(*own, mode).item() / len(parts)
        assert got == pytest.approx(whole, abs=1e-6), parts
        plain_sums.append(plain)
    assert any(abs(plain - whole) > 1e-3 for plain in plain_sums)  # the mean of the parts' means is something else


def test_agg_loss_refuses_another_mode_and_survives_an_empty_row():
    with pytest.raises(ValueError, match="token-mean, seq-mean-token-sum"):
        ppo.agg_loss(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool), "mean")
    mask = torch.tensor([[True, True], [False, False]])
    assert ppo.agg_loss(torch.ones(2, 2), mask, "seq-mean-token-mean").item() == pytest.approx(0.5)


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
    got = ppo.compute_policy_loss(-one, math.log(ratio) - one, advantage * one, one.bool(), 0.2, 0.2, 3.0)
    assert [x.item() for x in got] == pytest.approx([loss, clipped, -math.log(ratio), lower], abs=1e-5)


@pytest.mark.parametrize("mode", ppo.LOSS_AGG_MODES)
@pytest.mark.parametrize("low, high, c", [(0.2, 0.2, 3.0), (0.1, 0.3, 1.5)])
def test_policy_loss_of_a_batch(mode, low, high, c):
    lengths = [6, 2, 5, 1, 6]
    (old, mask), (new, _), (advantages, _) = (ragged(lengths, seed=seed) for seed in range(3))
    advantages = advantages * 2
    tokens = [
        [policy_by_hand(o, n, a, low, high, c) for o, n, a in zip(*rows, strict=True)]
        for rows in zip(rows_of(old, mask), rows_of(new, mask), rows_of(advantages, mask), strict=True)
    ]
    flat = list(itertools.chain(*tokens))
    expected = [agg_by_hand([[token[0] for token in row] for row in tokens], mode, 6)]
    expected += [statistics.fmean(token[k] for token in flat) for k in (1, 2, 3)]
    assert 0 < expected[1] < 1 and 0 < expected[3] < 1  # both clips are seen
    got = ppo.compute_policy_loss(old, new, advantages, mask, low, high, c, mode)
    assert [x.item() for x in got] == pytest.approx(expected, abs=1e-5)


def test_policy_loss_of_a_ratio_beyond_all_numbers_is_finite():
    old, new = torch.tensor([[-500.0, 0.0]]), torch.tensor([[0.0, -500.0]], requires_grad=True)
    for sign in (1.0, -1.0):
        loss, *_ = ppo.compute_policy_loss(old, new, torch.full((1, 2), sign), torch.ones(1, 2, dtype=torch.bool))
        assert loss.isfinite() and torch.autograd.grad(loss, new)[0].isfinite().all()


def test_clipped_tokens_have_no_gradient():
    old = torch.zeros(1, 4)
    new = torch.tensor([0.5, -0.5, 2.0, 0.05]).requires_grad_()
    advantages = torch.tensor([[1.0, -1.0, -1.0, 1.0]])
    loss, *_ = ppo.compute_policy_loss(old, new[None], advantages, torch.ones(1, 4, dtype=torch.bool))
    gradient = torch.autograd.grad(loss, new)[0]
    assert gradient[:3].tolist() == [0, 0, 0] and gradient[3].item() == pytest.approx(-math.exp(0.05) / 4, abs=1e-6)


def test_value_loss():
    lengths = [5, 1, 3]
    (old, mask), (new, _), (returns, _) = (ragged(lengths, seed=seed) for seed in range(3))
    errors, clipped = [], []
    for o, v, r in zip(old[mask].tolist(), new[mask].tolist(), returns[mask].tolist(), strict=True):
        near = min(max(v, o - 0.5), o + 0.5)
        errors.append(max((v - r) ** 2, (near - r) ** 2))
        clipped.append(float((near - r) ** 2 > (v - r) ** 2))
    assert 0 < sum(clipped) < len(clipped)
    loss, clipfrac = ppo.compute_value_loss(new, old, returns, mask, 0.5)
    assert loss.item() == pytest.approx(0.5 * statistics.fmean(errors), abs=1e-6)
    assert clipfrac.item() == pytest.approx(statistics.fmean(clipped), abs=1e-6)
    part = ppo.compute_value_loss(new, old, returns, mask, 0.5, num_tokens=90)[0]
    assert part.item() == pytest.approx(loss.item() * 9 / 90, abs=1e-6)


def test_kl_estimates():
    new, ref = torch.tensor([-1.0, -2.0, -0.5, -30.0, -1.0]), torch.tensor([-1.5, -1.0, -0.5, -1.0, -40.0])
    assert ppo.kl_penalty(new, ref, "k1").tolist() == pytest.approx([0.5, -1.0, 0.0, -29.0, 39.0], abs=1e-5)
    assert ppo.kl_penalty(new, ref, "k2").tolist() == pytest.approx([0.125, 0.5, 0.0, 420.5, 760.5], abs=1e-3)
    k3 = [math.exp(-0.5) + 0.5 - 1, math.e - 1 - 1, 0.0, 10.0, 10.0]  # d = ref - new, e^d - d - 1, at most 10
    assert ppo.kl_penalty(new, ref, "k3").tolist() == pytest.approx(k3, abs=1e-6)
    assert torch.equal(ppo.kl_penalty(new, ref, "k3"), ppo.kl_penalty(new, ref, "low_var_kl"))
    with pytest.raises(ValueError, match="k1, k2, k3"):
        ppo.kl_penalty(new, ref, "kl")


def test_kl_estimates_are_of_the_kl():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    exact = sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist()))
    for kind in ("k1", "k3"):  # the expectation under the policy
        assert (p * ppo.kl_penalty(p.log(), q.log(), kind)).sum().item() == pytest.approx(exact, abs=1e-6)


def test_kl_controllers():
    adaptive = ppo.AdaptiveKLController(0.1, 0.05, 1000)
    adaptive.update(0.055, 100)  # 10 % above its target: + 0.1 * 100 / 1000
    assert adaptive.value == pytest.approx(0.1 * 1.01, rel=1e-12)
    adaptive.update(9.0, 100)  # at most 20 %
    assert adaptive.value == pytest.approx(0.1 * 1.01 * 1.02, rel=1e-12)
    adaptive.update(-1.0, 500)
    assert adaptive.value == pytest.approx(0.1 * 1.01 * 1.02 * 0.9, rel=1e-12)
    fixed = ppo.FixedKLController(0.1)
    fixed.update(9.0, 100)
    assert fixed.value == 0.1


# -----------------------------------------------------------------------------
# sampling


def test_the_padded_vocabulary_and_what_top_k_and_top_p_leave_out_are_never_drawn():
    logits = torch.log(torch.tensor([[0.1, 0.25, 0.05, 0.4, 0.2, 50.0, 50.0]]))
    for (top_k, top_p), kept in {
        (0, 1.0): [0, 1, 2, 3, 4],
        (2, 1.0): [1, 3],
        (1, 1.0): [3],
        (99, 1.0): [0, 1, 2, 3, 4],
        (0, 0.5): [1, 3],
        (0, 0.399): [3],  # the likeliest alone has it already
        (0, 0.41): [1, 3],
        (0, 1e-9): [3],
        (3, 0.7): [1, 3],  # of 0.85 that top-k leaves, 0.47 + 0.29 are enough
        (3, 0.8): [1, 3, 4],
    }.items():
        made = ppo.sampled_logits(logits, 1.0, 5, top_k, top_p)
        probs = made.softmax(-1)[0]
        assert made.shape[-1] == 5 and probs.nonzero()[:, 0].tolist() == kept, (top_k, top_p)
        assert probs.sum().item() == pytest.approx(1, abs=1e-6)
        share = logits.exp()[0, kept] / logits.exp()[0, kept].sum()
        torch.testing.assert_close(probs[kept], share)
        drawn, logprobs = ppo.pick_tokens(made.expand(500, -1), (torch.arange(500) + 0.5) / 500)
        assert sorted(set(drawn.tolist())) == kept
        torch.testing.assert_close(logprobs, probs[drawn].log())


def test_temperature_divides_before_anything_else():
    logits = torch.randn(3, 9, dtype=torch.bfloat16)
    got = ppo.sampled_logits(logits, 0.7, 9)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, logits.float() / 0.7)
    # the nucleus is that of the distribution at this temperature: colder, one token is enough
    logits = torch.log(torch.tensor([0.4, 0.35, 0.25]))
    kept = [(ppo.sampled_logits(logits, t, 3, 0, 0.5) > LOWEST).sum().item() for t in (0.1, 1.0)]
    assert kept == [1, 2]


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


def make_rollout(model, stops, max_rows=64, prefill_tokens=40, length=20, **sampling):
    policies = ppo.Policies({"actor": model}, torch.nn.Linear(48, 1), torch.float32, "cpu")
    to_logits = functools.partial(ppo.sampled_logits, **({"temperature": 1.0, "vocab_size": 100} | sampling))
    return policies, to_logits, ppo.Rollout(policies, to_logits, stops, LONGEST + length, max_rows, prefill_tokens)


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
    _, _, rollout = make_rollout(model, stops)
    for _ in range(2):  # the cache of an earlier batch lies there: nothing of it may be seen
        assert rollout.generate(PROMPTS, 20)[0] == expected
    assert rollout.generate(PROMPTS[::-1], 20)[0] == expected[::-1]
    assert rollout.generate(PROMPTS, 5)[0] == [row[:5] for row in expected]
    assert rollout.generate(PROMPTS[2:3], 1)[0] == [expected[2][:1]]
    assert rollout.generate([], 20) == ([], [])


@pytest.mark.parametrize("max_rows, prefill_tokens", [(1, 40), (3, 1), (8, 10**6), (64, 7)])
def test_neither_the_batch_nor_the_prefill_changes_a_rollout(spoken, max_rows, prefill_tokens, monkeypatch):
    model, stops, expected = spoken
    uniforms = np.random.default_rng(5).random((len(PROMPTS), 20), np.float32)
    _, _, one = make_rollout(model, [*stops, *range(9)])
    kept = []
    keep = ppo.KVCache.keep
    monkeypatch.setattr(ppo.KVCache, "keep", lambda self, index: (kept.append(len(index)), keep(self, index))[1])
    tokens, logprobs = one.generate(PROMPTS, 20, uniforms)
    assert kept and len(set(map(len, tokens))) > 2  # rows left the batch here
    _, _, other = make_rollout(model, [*stops, *range(9)], max_rows, prefill_tokens)
    found, found_logprobs = other.generate(PROMPTS, 20, uniforms)
    assert found == tokens
    np.testing.assert_allclose(np.concatenate(found_logprobs), np.concatenate(logprobs), atol=1e-5)
    _, _, other = make_rollout(model, stops, max_rows, prefill_tokens)
    assert other.generate(PROMPTS, 20)[0] == expected


def test_rows_that_leave_the_batch_change_nothing(spoken, monkeypatch):
    model, stops, _ = spoken
    uniforms = np.random.default_rng(6).random((len(PROMPTS), 20), np.float32)
    _, _, rollout = make_rollout(model, [*stops, *range(9)])
    compacted = rollout.generate(PROMPTS, 20, uniforms)
    monkeypatch.setattr(ppo.Rollout, "bucket", lambda self, num: len(PROMPTS))  # all of them to the end
    monkeypatch.setattr(ppo.KVCache, "keep", lambda self, index: pytest.fail("a row left"))
    whole = rollout.generate(PROMPTS, 20, uniforms)
    assert compacted[0] == whole[0]
    np.testing.assert_allclose(np.concatenate(compacted[1]), np.concatenate(whole[1]), atol=1e-5)


@pytest.mark.parametrize("sampling", [{"temperature": 0.6}, {"temperature": 1.3, "top_k": 5, "top_p": 0.8}], ids=str)
def test_log_probabilities_of_a_rollout_are_those_of_the_packed_and_of_the_models_own_forward(spoken, sampling):
    model, stops, _ = spoken
    policies, to_logits, rollout = make_rollout(model, stops, **sampling)
    uniforms = np.random.default_rng(8).random((len(PROMPTS), 20), np.float32)
    responses, logprobs = rollout.generate(PROMPTS, 20, uniforms)
    packed, entropy = policies.logprobs("actor", ppo.pack_responses(PROMPTS, responses, "cpu"), to_logits, True)
    model.set_attn_implementation("eager")
    own, own_entropy = [], []
    with torch.no_grad():
        for prompt, response in zip(PROMPTS, responses, strict=True):
            logits = model(torch.tensor([prompt + response]), use_cache=False).logits[0]
            for t, token in enumerate(response):
                scores = logits[len(prompt) + t - 1, :100] / sampling["temperature"]
                if "top_k" in sampling:
                    ranked = scores.sort(descending=True)
                    kept, total = [], 0.0
                    shares = ranked.values[:5].softmax(-1).tolist()
                    for i, share in zip(ranked.indices[:5].tolist(), shares, strict=True):
                        if total < 0.8:
                            kept.append(i)
                        total += share
                    scores = torch.full_like(scores, -math.inf).index_copy(0, torch.tensor(kept), scores[kept])
                probs = scores.softmax(-1)
                own.append(probs[token].log().item())
                own_entropy.append(-torch.xlogy(probs, probs).sum().item())
    model.set_attn_implementation("cached")
    assert packed.tolist() == pytest.approx(own, abs=1e-4)
    assert np.concatenate(logprobs).tolist() == pytest.approx(own, abs=1e-4)
    assert entropy.tolist() == pytest.approx(own_entropy, abs=1e-4)


def test_every_end_token_ends_a_response_and_stands_in_it(spoken):
    model, stops, expected = spoken
    ended = [row for row in expected if row[-1] in stops]
    assert {row[-1] for row in ended} == set(stops) and any(row not in ended for row in expected) or len(ended) > 2
    for row in expected:
        assert not set(row[:-1]) & set(stops)
    uniforms = np.random.default_rng(9).random((len(PROMPTS), 20), np.float32)
    _, _, rollout = make_rollout(model, stops)
    for row in rollout.generate(PROMPTS, 20, uniforms)[0]:
        assert not set(row[:-1]) & set(stops) and (len(row) == 20 or row[-1] in stops)
    _, _, all_stop = make_rollout(model, list(range(100)))
    assert [len(row) for row in all_stop.generate(PROMPTS, 20)[0]] == [1] * len(PROMPTS)


def test_examples_of_a_packed_row_do_not_see_each_other(spoken):
    model, stops, expected = spoken
    policies, to_logits, _ = make_rollout(model, stops)
    packed, _ = policies.logprobs("actor", ppo.pack_responses(PROMPTS, expected, "cpu"), to_logits)
    alone = [
        policies.logprobs("actor", ppo.pack_responses([p], [r], "cpu"), to_logits)[0]
        for p, r in zip(PROMPTS, expected, strict=True)
    ]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-4, rtol=0)
    other = [[(t + 1) % 100 for t in p] for p in PROMPTS]
    changed, _ = policies.logprobs("actor", ppo.pack_responses(other, expected, "cpu"), to_logits)
    assert (changed - packed).abs().max() > 0.1  # and the prompt does matter


@pytest.mark.parametrize("count", [1, 5, 8])
def test_a_gpu_bucket_with_other_rows_in_it_changes_nothing(spoken, monkeypatch, count):
    """The batch sizes of CUDA graphs hold rows that have ended, or never were: do the same here, without a graph."""
    model, stops, expected = spoken
    uniforms = np.random.default_rng(6).random((len(PROMPTS), 20), np.float32)
    _, _, rollout = make_rollout(model, stops)
    drawn = rollout.generate(PROMPTS, 20, uniforms)[0]
    monkeypatch.setattr(ppo.Rollout, "bucket", lambda self, num: max(2, 2 ** (num - 1).bit_length()))
    assert rollout.generate(PROMPTS[:count], 20)[0] == expected[:count]
    tokens, logprobs = rollout.generate(PROMPTS[:count], 20, uniforms[:count])
    assert tokens == drawn[:count] and [len(row) for row in logprobs] == [len(row) for row in tokens]


# -----------------------------------------------------------------------------
# log-probabilities in chunks


@pytest.mark.parametrize("rows", [1, 4, 23, 1000])
def test_log_probabilities_in_chunks(monkeypatch, rows):
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 50, bias=True)
    hidden, targets = torch.randn(23, 16, requires_grad=True), torch.randint(47, (23,))
    weight = torch.randn(23), torch.randn(23)
    logits = (head(hidden)[:, :47] / 0.7).log_softmax(-1)
    expected = logits.gather(-1, targets[:, None])[:, 0], -(logits.exp() * logits).sum(-1)
    (expected[0] @ weight[0] + expected[1] @ weight[1]).backward()
    gradients = [x.grad.clone() for x in (hidden, head.weight, head.bias)]
    for x in (hidden, head.weight, head.bias):
        x.grad = None
    monkeypatch.setattr(ppo, "LOGITS_AT_ONCE", 50 * rows)
    sizes = []
    to_logits = functools.partial(ppo.sampled_logits, temperature=0.7, vocab_size=47)

    def spy(logits):
        sizes.append(len(logits))
        return to_logits(logits)

    got = ppo.token_logprobs(hidden, targets, head, spy, with_entropy=True)
    assert max(sizes) <= rows
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    (got[0] @ weight[0] + got[1] @ weight[1]).backward()
    for x, gradient in zip((hidden, head.weight, head.bias), gradients, strict=True):
        torch.testing.assert_close(x.grad, gradient, rtol=1e-5, atol=1e-6)
    assert ppo.token_logprobs(hidden, targets, head, to_logits)[1] is None


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
        assert all(part for part in parts)
        assert all(sum(lengths[i] for i in part) <= limit or len(part) == 1 for part in parts)
        order = [lengths[i] for part in parts for i in part]
        assert order == sorted(lengths, reverse=True)
    assert ppo.split_by_tokens([], 10) == [] and len(ppo.split_by_tokens(lengths, 1000)) == 1
    assert ppo.split_by_tokens([4, 4, 4], 8) == [[0, 1], [2]]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_deal_gives_every_row_to_one_rank_and_each_about_as_many_tokens(ranks):
    rng = random.Random(ranks)
    lengths = [rng.randint(1, 100) for _ in range(40)]
    hands = ppo.deal(lengths, ranks)
    assert sorted(i for hand in hands for i in hand) == list(range(40)) and len(hands) == ranks
    totals = [sum(lengths[i] for i in hand) for hand in hands]
    assert max(totals) - min(totals) <= 100  # never more than one row apart
    assert [len(hand) for hand in ppo.deal([3], ranks)] == [1] + [0] * (ranks - 1)


def test_plans_of_any_number_of_ranks_have_the_same_mini_batches():
    rng = random.Random(1)
    lengths = [rng.randint(1, 50) for _ in range(12)]
    for ranks in (1, 2, 5):
        plans = [ppo.plan_batches(lengths, 4, 60, rank, ranks) for rank in range(ranks)]
        for mini, of_ranks in enumerate(zip(*plans, strict=True)):
            assert all(list(rows) == list(range(4 * mini, 4 * mini + 4)) for rows, _ in of_ranks)
            assert sorted(i for _, parts in of_ranks for part in parts for i in part) == list(of_ranks[0][0])
            for _, parts in of_ranks:
                assert all(sum(lengths[i] for i in part) <= 60 or len(part) == 1 for part in parts)


def test_pad_rows_unflatten_and_gather_rows():
    padded, mask = ppo.pad_rows([np.array([1.0, 2.0]), np.array([3.0]), np.array([4.0, 5.0, 6.0])])
    assert padded.tolist() == [[1, 2, 0], [3, 0, 0], [4, 5, 6]] and padded.dtype == torch.float32
    assert mask.tolist() == [[True, True, False], [True, False, False], [True, True, True]]
    flat = torch.arange(1.0, 7.0, requires_grad=True)
    assert torch.equal(ppo.unflatten(flat, mask), padded)
    ppo.unflatten(flat, mask).sum().backward()
    assert flat.grad.tolist() == [1] * 6
    assert ppo.gather_rows({2: "c", 0: "a", 1: "b"}, 3) == ["a", "b", "c"]
    assert ppo.sum_over_ranks({"b": 1.0, "a": 2.0}) == {"a": 2.0, "b": 1.0}


def test_pack_responses_points_at_the_states_that_predict_the_response():
    prompts, responses = [[1, 2, 3], [4]], [[5, 6], [7]]
    inputs, positions, targets = ppo.pack_responses(prompts, responses, "cpu")
    assert inputs["input_ids"].tolist() == [[1, 2, 3, 5, 6, 4, 7]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1]]
    assert inputs["cu_seq_lens"].tolist() == [0, 5, 7] and inputs["max_length"] == 5
    assert positions.tolist() == [2, 3, 5] and targets.tolist() == [5, 6, 7]


def test_a_micro_batch_is_as_wide_as_its_longest_response():
    batch = {"prompts": [[1], [2], [3]], "responses": [[1], [2, 2], [3, 3, 3]]}
    batch["mask"] = ppo.pad_rows([[1], [1, 1], [1, 1, 1]])[1]
    micro = ppo.micro_batch(batch, [1, 0], "cpu")
    assert micro["mask"].tolist() == [[True, True], [True, False]]
    assert micro["packed"][2].tolist() == [2, 2, 1]


def test_the_optimizer_step_clips_as_torch_does_and_skips_what_is_not_finite():
    torch.manual_seed(0)
    one = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5))]
    other = [torch.nn.Parameter(p.detach().clone()) for p in one]
    grads = [torch.randn(3, 4) * 9, torch.randn(5)]
    for p, q, grad in zip(one, other, grads, strict=True):
        p.grad, q.grad = grad.clone(), grad.clone()
    mine, theirs = (torch.optim.AdamW(params, lr=0.1) for params in (one, other))
    expected = torch.nn.utils.clip_grad_norm_(other, 0.5)
    theirs.step()
    assert ppo.optimizer_step(mine, one, 0.5) == pytest.approx(expected.item(), rel=1e-6)
    assert all(p.grad is None for p in one)
    for p, q in zip(one, other, strict=True):
        torch.testing.assert_close(p, q)
    before, state = [p.detach().clone() for p in one], json.dumps(mine.state_dict()["state"][0]["exp_avg"].tolist())
    for bad in (math.inf, math.nan):
        one[0].grad, one[1].grad = torch.full((3, 4), bad), torch.ones(5)
        assert not math.isfinite(ppo.optimizer_step(mine, one, 0.5))
        assert all(torch.equal(p, q) for p, q in zip(one, before, strict=True)) and one[0].grad is None
        assert json.dumps(mine.state_dict()["state"][0]["exp_avg"].tolist()) == state


# -----------------------------------------------------------------------------
# an update beside plain PPO: padded rows, whole logits, the formulas once more


class Spy:
    """Keeps what each update of a run was given, and the gradient of each of its mini-batches."""

    def __init__(self, monkeypatch):
        self.updates, step, update = [], ppo.optimizer_step, ppo.update

        def spy_update(parameters, optimizer, batch, plan, *args):
            names = list(parameters)
            batch = {k: v.clone() if torch.is_tensor(v) else list(v) for k, v in batch.items()}
            role = "critic" if "value_head.weight" in names else "actor"
            self.updates.append({"role": role, "names": names, "batch": batch, "plan": plan, "gradients": []})
            return update(parameters, optimizer, batch, plan, *args)

        def spy_step(optimizer, parameters, max_grad_norm):
            grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
            self.updates[-1]["gradients"].append(dict(zip(self.updates[-1]["names"], grads, strict=True)))
            return step(optimizer, parameters, max_grad_norm)

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
    """Return (model with the role's adapter of a checkpoint, value head), by peft alone, in evaluation mode."""
    model = AutoModelForCausalLM.from_pretrained(kit.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, checkpoint / "adapter", is_trainable=True).eval()
    head = torch.nn.Linear(128, 1)
    state = load_file(checkpoint / f"{role}.safetensors")
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data.copy_(state[name.replace(".default.", ".")])
    if role == "critic":
        head.load_state_dict({name: state[f"value_head.{name}"] for name in ("weight", "bias")})
    return model, head


def by_row(model, batch, temperature=0.9):
    """Return (log-probabilities [R, V], hidden states [R, D]) before each response token, a row of the batch each."""
    found = []
    for prompt, response in zip(batch["prompts"], batch["responses"], strict=True):
        out = model(torch.tensor([prompt + response]), output_hidden_states=True)
        before = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
        logits = out.logits[0, before, :938] / temperature
        found.append((logits.log_softmax(-1), out.hidden_states[-1][0, before]))
    return found


def chosen(rows, batch):
    return [lp[torch.arange(len(r)), torch.tensor(r)] for (lp, _), r in zip(rows, batch["responses"], strict=True)]


def test_what_the_updates_are_given_is_what_the_formulas_make_of_the_responses(kit, one_step, usual):
    batch, _ = usual.first("critic")
    lengths = batch["mask"].sum(-1).tolist()
    assert lengths == [len(r) for r in batch["responses"]] and len(set(lengths)) > 1
    assert all(r[-1] in STOPS or len(r) == 16 for r in batch["responses"])
    tokenizer = AutoTokenizer.from_pretrained(kit.base)
    problems = [json.loads(line)["question"] for line in kit.train.read_text().splitlines()]
    picked = [problems[i] for i in ppo.rows_of_step(2, 11, 6, 42)]
    texts = [tokenizer.decode(prompt) for prompt in batch["prompts"]]
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
    coefficient = json.loads((checkpoint / "state.json").read_text())["kl_coef"]
    assert coefficient != 0.1
    rewards, advantages = [], []
    for row, o, r, v in zip(batch["responses"], old, ref, values, strict=True):
        text = tokenizer.decode(row, skip_special_tokens=True)
        rewards.append([-coefficient * (a - b) for a, b in zip(o, r, strict=True)])
        rewards[-1][-1] += sum(c.isdigit() for c in text) / max(1, len(text))
        advantages.append(gae_by_hand(rewards[-1], v, 0.99, 0.95))
    flat = list(itertools.chain(*advantages))
    mean, variance = statistics.fmean(flat), statistics.variance(flat)

    def same(name, expected, tolerance=2e-5):
        assert batch[name][batch["mask"]].tolist() == pytest.approx(list(itertools.chain(*expected)), abs=tolerance), (
            name
        )
        assert not batch[name][~batch["mask"]].any(), name

    same("old_logprobs", old)
    same("ref_logprobs", ref)
    same("values", values)
    same("returns", [[a + v for a, v in zip(*rows, strict=True)] for rows in zip(advantages, values, strict=True)])
    same("advantages", [[(a - mean) / math.sqrt(variance + 1e-8) for a in row] for row in advantages], 1e-3)


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_the_gradient_of_an_update_is_that_of_plain_ppo(kit, one_step, usual, role):
    batch, gradients = usual.first(role)
    model, head = trained(kit, one_step / "checkpoint-1", role)
    rows = by_row(model, {name: batch[name][:3] for name in ("prompts", "responses")})  # of the first mini-batch
    num_tokens = sum(len(r) for r in batch["responses"][:3])
    loss, kl = torch.zeros(()), []
    for i, (logprobs, hidden) in enumerate(rows):
        n = len(batch["responses"][i])
        old, ref, advantages, returns, values = (
            batch[name][i, :n] for name in ("old_logprobs", "ref_logprobs", "advantages", "returns", "values")
        )
        if role == "critic":
            loss = loss + (0.5 * (head(hidden)[:, 0] - returns) ** 2).sum()  # nothing is clipped yet
            continue
        own = logprobs[torch.arange(n), torch.tensor(batch["responses"][i])]
        loss = loss - (advantages * (own - old).exp()).sum()  # nor here
        loss = loss + 0.01 * (logprobs.exp() * logprobs).sum()
        kl.append((ref - own).exp() - (ref - own) - 1)
        loss = loss + 0.1 * kl[-1].sum()
    assert role == "critic" or max(x.max() for x in kl) > 1e-4  # the actor is no longer the reference
    (loss / num_tokens).backward()
    expected = {n.replace(".default.", "."): p.grad for n, p in model.named_parameters() if "lora_" in n}
    if role == "critic":
        expected |= {f"value_head.{n}": p.grad for n, p in head.named_parameters()}
    assert distance(gradients[0], expected) < 2e-4  # by other kernels: eager attention in rows of one example
    assert distance(gradients[1], expected) > 0.05


@pytest.mark.parametrize(
    "flags",
    [
        {"ppo_max_tokens": 1},
        {"ppo_max_tokens": 150},
        {"activation_checkpointing": True, "ppo_max_tokens": 1, "rollout_batch_size": 3},
    ],
    ids=str,
)
def test_micro_batches_and_checkpointing_change_no_gradient(kit, one_step, usual, tmp_path, monkeypatch, flags):
    got = second_step(kit, one_step, tmp_path / "run", monkeypatch, **flags)
    if "ppo_max_tokens" in flags:
        assert len(got.updates[0]["plan"][0][1]) > len(usual.updates[0]["plan"][0][1]) == 1
    for role in ("actor", "critic"):
        for mini, expected in enumerate(usual.first(role)[1]):
            assert distance(got.first(role)[1][mini], expected) < (1e-4 if mini else 1e-5), (role, mini)


def test_the_order_of_the_rows_of_a_mini_batch_changes_no_gradient(kit, one_step, usual, tmp_path, monkeypatch):
    plan_batches = ppo.plan_batches

    def otherwise(lengths, mini_batch_size, max_tokens, rank, world_size):
        plan = plan_batches(lengths, mini_batch_size, 1, rank, world_size)
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

            def of_update(parameters, optimizer, batch, plan, *args, rank=rank, update=update):
                lengths = [len(p) + len(r) for p, r in zip(batch["prompts"], batch["responses"], strict=True)]
                return update(parameters, optimizer, batch, plan_batches(lengths, 3, 16384, rank, 2), *args)

            patch.setattr(ppo, "update", of_update)
            run(kit, tmp_path / str(rank), total_training_steps=2)
            found.append(spy)
    for role in ("actor", "critic"):
        one, two = (spy.first(role)[1][0] for spy in found)
        together = {name: one[name] + two[name] for name in one}
        assert distance(together, usual.first(role)[1][0]) < 1e-5
        assert max(distance(x, usual.first(role)[1][0]) for x in (one, two)) > 0.05


def test_a_mean_of_micro_batches_would_be_another_gradient(kit, one_step, usual, tmp_path, monkeypatch):
    agg_loss = ppo.agg_loss
    monkeypatch.setattr(ppo, "agg_loss", lambda loss, mask, mode, **counts: agg_loss(loss, mask, mode) / 3)
    got = second_step(kit, one_step, tmp_path / "run", monkeypatch, ppo_max_tokens=1)
    assert distance(got.first("actor")[1][0], usual.first("actor")[1][0]) > 0.01


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
    """The run that others are compared with, charts and validation and all: (folder, records, Policies)."""
    folder, made, load_policies = tmp_path_factory.mktemp("plain"), [], ppo.load_policies
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(ppo, "load_policies", lambda *args: made.append(load_policies(*args)) or made[-1])
        run(kit, folder, val_files=str(kit.val), test_freq=2, save_freq=1)
    return folder, curve(folder), made[0]


def test_a_run_writes_these_files(plain):
    folder = plain[0]
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert len([name for name in found if name.startswith("tensorboard/events.")]) == 1
    adapter = {"adapter_config.json", "adapter_model.safetensors", "README.md", "chat_template.jinja"}
    adapter |= {"generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    state = {"actor.safetensors", "critic.safetensors", "optimizer.pt", "state.json", "manifest.json"}
    expected = {"run.json", "log.jsonl"} | {f"adapter/{name}" for name in adapter}
    expected |= {f"plots/{name}.png" for name in ("reward", "kl", "length", "value", "time")}
    expected |= {f"val_generations/step-{step:05d}.jsonl" for step in (0, 2, 3)}
    expected |= {f"checkpoint-{n}/{name}" for n in (2, 3) for name in state | {f"adapter/{file}" for file in adapter}}
    assert {name for name in found if not name.startswith("tensorboard/")} == expected
    assert all((folder / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in ("reward", "kl"))


def test_the_log_has_a_record_a_step_that_says_what_it_should(plain):
    folder, records, _ = plain
    assert [r["training/global_step"] for r in records] == [0, 1, 2, 3]
    assert [r["training/epoch"] for r in records] == pytest.approx([6 * step / 11 for step in range(4)])
    assert ["val-core/openai/gsm8k/reward/mean@1" in r for r in records] == [True, False, True, True]
    first = records[1]
    assert first["actor/reward_kl_penalty"] == 0 and first["actor/reward_kl_penalty_coeff"] == 0.1
    assert first["critic/values/max"] == first["critic/values/min"] == 0  # the value head starts at zero
    assert first["critic/vf_explained_var"] == pytest.approx(0, abs=0.05)  # but for the 1e-5 in it
    assert 0 < first["critic/vf_loss"] <= 0.5
    for record in records[1:]:
        assert record["actor/first_ratio_diff"] == 0  # exactly
        assert record["training/rollout_probs_diff_mean"] < 1e-5 and record["training/rollout_probs_diff_max"] < 1e-4
        assert record["critic/advantages/mean"] == pytest.approx(0, abs=1e-5)
        assert record["actor/skipped_updates"] == record["critic/skipped_updates"] == 0
        assert record["actor/ppo_kl"] != 0 and record["critic/grad_norm"] > 0 and record["actor/entropy"] > 0
        assert 1 <= record["response_length/min"] < record["response_length/max"] == 16
        assert all(math.isfinite(value) for value in record.values())
    assert all(r["actor/reward_kl_penalty"] != 0 for r in records[2:])
    assert len({r["actor/reward_kl_penalty_coeff"] for r in records[1:]}) > 1  # adaptive: it moves
    for before, after in itertools.pairwise(records[1:]):
        error = min(max(before["actor/reward_kl_penalty"] / 0.01 - 1, -0.2), 0.2)
        coefficient = before["actor/reward_kl_penalty_coeff"] * (1 + error * 6 / 40)
        assert after["actor/reward_kl_penalty_coeff"] == pytest.approx(coefficient, rel=1e-6)
    raw = ppo.read_log(folder / "log.jsonl")
    for record in raw[1:]:
        assert record["perf/throughput"] == pytest.approx(
            record["perf/total_num_tokens"] / record["perf/time_per_step"]
        )
        phases = ["gen", "reward", "old_log_prob", "ref", "values", "adv", "update_critic", "update_actor"]
        assert sum(record[f"timing_s/{name}"] for name in phases) <= record["timing_s/step"]
    of_run = json.loads((folder / "run.json").read_text())
    assert of_run["status"] == "finished" and of_run["flags"]["seed"] == 42
    assert [of_run["counts"][name] for name in ("train", "val", "overlong")] == [11, 5, 0]


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


def test_the_metrics_table_of_the_docs_is_the_log(kit, plain, tmp_path):
    flags = {"reward": "strict", "val_files": str(kit.val), "total_training_steps": 1, "max_response_length": 4}
    run(kit, tmp_path, **flags)
    records = ppo.read_log(plain[0] / "log.jsonl") + ppo.read_log(tmp_path / "log.jsonl")
    seen = {name.replace("/openai/gsm8k/", "/<data_source>/") for record in records for name in record}
    text = (ROOT / "docs" / "ppo_gsm8k.md").read_text()
    assert metric_problems(seen, text) == ([], [])
    for name, row in metrics_table(text).items():  # without its row each would be missed
        missing, _ = metric_problems(seen, text.replace(row, ""))
        assert name in missing or name not in seen
    assert metric_problems(seen, text.replace("`actor/entropy`", "`actor/entrpy`")) == (
        ["actor/entropy"],
        ["actor/entrpy"],
    )
    gpu = {name for name in metrics_table(text) if name not in seen}
    assert metric_problems(seen, text.replace("GPU only", "")) == ([], sorted(n for n in gpu if "max_memory" in n))


def test_one_base_serves_all_and_is_not_touched(kit, plain):
    policies = plain[2]
    assert len({id(model) for model in policies.models.values()}) == 1 and len(policies.models) == 3
    model = policies.models["actor"]
    base = load_file(kit.base / "model.safetensors")
    own = {n.removeprefix("base_model.model.").replace(".base_layer", ""): p for n, p in model.named_parameters()}
    own = {name: p for name, p in own.items() if "lora_" not in name}
    assert own.keys() == base.keys()
    assert all(torch.equal(p, base[name].float()) and not p.requires_grad for name, p in own.items())
    start = weights(kit.folder)
    reference = {n: p for n, p in policies.parameters("reference").items()}
    assert all(torch.equal(p, start[name]) for name, p in reference.items())
    for role in ("actor", "critic"):
        changed = {n: p for n, p in policies.parameters(role).items() if "lora_" in n}
        assert changed.keys() == start.keys() and not any(torch.equal(p, start[n]) for n, p in changed.items())


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
    carried = AutoTokenizer.from_pretrained(folder / "adapter")
    assert set(generate.stop_tokens(base, carried, str(folder / "adapter"))) == set(STOPS)
    base.generation_config = GenerationConfig()
    model = generate.attach_adapter(base, str(folder / "adapter")).eval()
    rows = [json.loads(line) for line in (folder / "val_generations" / "step-00003.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    ends = {"", *(tokenizer.decode([stop], skip_special_tokens=True) for stop in STOPS)}  # here, it is in the text
    answers = greedy_answers(model, kit, folder / "adapter")
    for i, (row, (text, cut)) in enumerate(zip(rows, answers, strict=True)):
        assert row["output"].startswith(text) and row["output"][len(text) :] in ends
        assert row["cut"] == cut and row["index"] == i and row["tokens"] <= 16
        assert row["score"] == sum(c.isdigit() for c in row["output"]) / len(row["output"])
    assert 0 < sum(row["cut"] for row in rows) < 5
    start = [json.loads(line) for line in (folder / "val_generations" / "step-00000.jsonl").read_text().splitlines()]
    model.load_adapter(str(kit.adapter), "start")
    model.set_adapter("start")
    for row, (text, _) in zip(start, greedy_answers(model, kit, folder / "adapter"), strict=True):
        assert row["output"].startswith(text)
    assert [row["output"] for row in start] != [row["output"] for row in rows]
    assert [row["ground_truth"] for row in rows] == [
        json.loads(line)["answer"].rpartition("#### ")[2] for line in kit.val.read_text().splitlines()
    ]
    found = plain[1][-1]
    assert found["val-core/openai/gsm8k/reward/mean@1"] == pytest.approx(statistics.fmean(r["score"] for r in rows))
    assert found["val-aux/response_length/clip_ratio"] == pytest.approx(statistics.fmean(r["cut"] for r in rows))
    assert found["val-aux/response_length/mean"] == pytest.approx(statistics.fmean(r["tokens"] for r in rows))


def test_a_second_run_is_the_first_and_another_seed_is_not(kit, plain, tmp_path):
    again = run(kit, tmp_path / "again", val_files=str(kit.val), test_freq=2, rollout_batch_size=2)
    shared = [{k: v for k, v in r.items() if "rollout_probs" not in k} for r in again]
    first = [{k: v for k, v in r.items() if "rollout_probs" not in k} for r in plain[1]]
    assert shared == first  # bit for bit, and decoded in other batches
    assert_same_weights(weights(tmp_path / "again"), weights(plain[0]))
    assert not list((tmp_path / "again").glob("checkpoint-[12]"))
    other = run(kit, tmp_path / "other", seed=43, total_training_steps=1)
    assert other[0]["critic/score/mean"] != first[1]["critic/score/mean"]


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
    got = run(kit, tmp_path / "checkpointing", total_training_steps=1, activation_checkpointing=True)
    assert got[0]["actor/first_ratio_diff"] == 0


VARIANTS = {
    "grpo": {"adv_estimator": "grpo", "rollout_n": 2},
    "grpo, no std": {"adv_estimator": "grpo", "rollout_n": 3, "norm_adv_by_std_in_grpo": False, "train_batch_size": 3},
    "rloo": {"adv_estimator": "rloo", "rollout_n": 2, "loss_agg_mode": "seq-mean-token-sum"},
    "reinforce++": {"adv_estimator": "reinforce_plus_plus", "ppo_epochs": 2},
    "no kl": {"kl_coef": 0.0, "kl_loss_coef": 0.0, "kl_ctrl": "fixed", "entropy_coeff": 0.0},
    "base alone": {"lora_weights": "", "lora_r": 2, "lora_target_modules": "q_proj,down_proj"},
    "one mini-batch": {"ppo_mini_batch_size": 6, "kl_ctrl": "fixed"},
    "a response of one token": {"max_response_length": 1},
    "bfloat16": {"dtype": "bfloat16"},
    "more than an epoch a step": {"train_batch_size": 24, "ppo_mini_batch_size": 12, "max_response_length": 4},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(kit, tmp_path, variant, monkeypatch):
    flags = VARIANTS[variant] | {"total_training_steps": 2, "save_freq": 0}
    spy = Spy(monkeypatch)
    records = run(kit, tmp_path, **flags)
    assert len(records) == 2
    for record in records:
        assert all(math.isfinite(value) for value in record.values()), record
        assert record["actor/first_ratio_diff"] == 0
        assert record["training/rollout_probs_diff_mean"] < (5e-3 if variant == "bfloat16" else 1e-5)
    assert records[0].get("actor/reward_kl_penalty", 0.0) == 0
    has_critic = flags.get("adv_estimator", "gae") == "gae"
    assert [u["role"] for u in spy.updates] == (["critic", "actor"] if has_critic else ["actor"]) * 2
    assert ("critic/vf_loss" in records[0]) == has_critic
    batch, gradients = spy.first("actor")
    n, prompts = flags.get("rollout_n", 1), flags.get("train_batch_size", 6)
    assert len(batch["prompts"]) == n * prompts
    assert len(gradients) == flags.get("ppo_epochs", 1) * prompts // flags.get("ppo_mini_batch_size", 3)
    assert any(g.any() for g in gradients[0].values())
    if n > 1:
        assert all(batch["prompts"][i] == batch["prompts"][i - i % n] for i in range(n * prompts))
        assert len(set(map(tuple, batch["responses"]))) > prompts  # each its own draw
        groups = batch["advantages"][:, 0].view(prompts, n)
        torch.testing.assert_close(groups.sum(-1), torch.zeros(prompts), atol=1e-4, rtol=0)
    if variant == "one mini-batch":
        assert records[0]["actor/ppo_kl"] == records[1]["actor/ppo_kl"] == records[0]["actor/kl_loss"] == 0
    if variant == "no kl":
        assert "ref_logprobs" not in batch and not any("kl_loss" in name or "reward_kl" in name for name in records[0])
    if variant == "base alone":
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert config["r"] == 2 and sorted(config["target_modules"]) == ["down_proj", "q_proj"]
    if variant == "more than an epoch a step":
        assert len(set(map(tuple, batch["prompts"]))) == 11


def test_top_k_and_top_p_learn_from_the_probabilities_that_were_sampled(kit, tmp_path, monkeypatch):
    spy = Spy(monkeypatch)
    flags = {"top_k": 3, "top_p": 0.8, "kl_coef": 0.0, "kl_loss_coef": 0.0, "kl_ctrl": "fixed", "actor_lr": 0.05}
    records = run(kit, tmp_path, total_training_steps=2, **flags)
    batch, _ = spy.first("actor")
    assert batch["old_logprobs"][batch["mask"]].exp().min() >= 0.8 / 3 * 0.3  # no unlikely token, renormalized
    for record in records:
        assert all(math.isfinite(value) for value in record.values())
        assert record["actor/first_ratio_diff"] == 0 and record["training/rollout_probs_diff_mean"] < 1e-5


def test_critic_warmup_leaves_the_actor_alone(kit, tmp_path):
    records = run(kit, tmp_path, critic_warmup=2, save_freq=1, total_training_steps=3, max_ckpt_to_keep=9)
    assert ["actor/pg_loss" in r for r in records] == [False, False, True]
    assert all("critic/vf_loss" in r and r["actor/entropy"] > 0 for r in records)
    start = weights(kit.folder)
    for n in (1, 2):
        assert_same_weights(weights(tmp_path / f"checkpoint-{n}"), start)
    final = weights(tmp_path)
    assert not any(torch.equal(final[name], start[name]) for name in start)


def test_all_weights_from_a_merged_adapter(kit, tmp_path):
    records = run(kit, tmp_path, lora_r=0, total_training_steps=2, val_files=str(kit.val), test_freq=2, actor_lr=1e-4)
    assert records[1]["actor/reward_kl_penalty"] == 0 and records[2]["actor/reward_kl_penalty"] != 0
    assert records[1]["actor/first_ratio_diff"] == records[2]["actor/first_ratio_diff"] == 0
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
        assert all(json.loads(row)["output"].startswith(text) for row, (text, _) in zip(lines, answers, strict=True))
    config = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert config["eos_token_id"] == STOPS and "temperature" not in config and "repetition_penalty" not in config
    run(kit, tmp_path, lora_r=0, total_training_steps=2, val_files=str(kit.val), test_freq=2, actor_lr=1e-4)  # finished


def test_a_run_with_half_precision_rollouts_samples_from_the_trained_actor(kit, tmp_path, monkeypatch):
    """Rollouts have their own copy of the adapter there: it must be the actor of now, at every step and at the end."""
    seen = []
    generate_rollout = ppo.Rollout.generate

    def spy(self, *args):
        if "rollout" in self.policies.models:
            actor, own = self.policies.parameters("actor"), self.policies.parameters("rollout")
            assert all(torch.equal(p.to(torch.bfloat16), own[name]) for name, p in actor.items())
            assert not any(p.requires_grad for p in own.values())
            seen.append(next(iter(actor.values())).sum().item())
        return generate_rollout(self, *args)

    monkeypatch.setattr(ppo.Rollout, "generate", spy)
    run(kit, tmp_path, dtype="bfloat16", total_training_steps=2, val_files=str(kit.val))
    assert len(set(seen)) == 3  # the start, and after each of two steps


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
    "in checkpoint 2": ("file_sha256", lambda path: "checkpoint-2.incomplete/critic" in str(path)),
    "in the update of step 3": ("optimizer_step", None),
    "at the end": ("export_policy", lambda policies, tokenizer, folder, dtype: folder.name == "adapter.incomplete"),
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
    assert run(kit, tmp_path, **flags) == plain[1]  # bit for bit, the adaptive coefficient and validation included
    assert_same_weights(weights(tmp_path), weights(plain[0]))
    names = ("actor.safetensors", "critic.safetensors", "state.json")
    same = [(tmp_path / "checkpoint-3" / n).read_bytes() == (plain[0] / "checkpoint-3" / n).read_bytes() for n in names]
    assert all(same) and ppo.list_checkpoints(tmp_path) == [2, 3]
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "finished"
    assert not list(tmp_path.glob("*.incomplete"))


def test_an_earlier_checkpoint_may_be_chosen_and_the_run_be_killed_again(kit, plain, tmp_path, monkeypatch):
    shutil.copytree(plain[0], tmp_path / "run")
    flags = {"val_files": str(kit.val), "test_freq": 2, "save_freq": 1}
    calls = itertools.count(1)
    with monkeypatch.context() as patch:
        kill_at(patch, "optimizer_step", lambda *args: next(calls) == 2)
        with pytest.raises(Killed):
            run(kit, tmp_path / "run", resume=str(tmp_path / "run" / "checkpoint-2"), **flags)
    assert run(kit, tmp_path / "run", **flags) == plain[1]


def test_an_earlier_checkpoint_drops_the_later_ones_and_their_records(kit, plain, tmp_path):
    shutil.copytree(plain[0], tmp_path / "run")
    flags = {"resume": str(tmp_path / "run" / "checkpoint-2"), "val_files": str(kit.val), "test_freq": 2}
    with pytest.raises(ValueError, match="another configuration"):
        run(kit, tmp_path / "run", gamma=0.5, **flags)
    assert ppo.list_checkpoints(tmp_path / "run") == [2, 3] and curve(tmp_path / "run") == plain[1]  # still there
    assert run(kit, tmp_path / "run", total_training_steps=2, **flags) == plain[1][:3]
    assert ppo.list_checkpoints(tmp_path / "run") == [2]
    assert_same_weights(weights(tmp_path / "run"), weights(plain[0] / "checkpoint-2"))


def test_the_log_starts_empty_where_nothing_is_resumed(kit, plain, one_step, tmp_path):
    for name in ("log.jsonl", "run.json"):  # of a run that was killed before its first checkpoint
        shutil.copy(plain[0] / name, tmp_path / name)
    assert len(curve(tmp_path)) == 4
    assert run(kit, tmp_path, total_training_steps=1) == curve(one_step)


def test_a_run_goes_on_beyond_its_end(kit, plain, tmp_path):
    flags = {"val_files": str(kit.val), "test_freq": 2, "save_freq": 1}
    run(kit, tmp_path, total_training_steps=2, **flags)
    assert run(kit, tmp_path, **flags) == plain[1]
    assert_same_weights(weights(tmp_path), weights(plain[0]))
    before = (tmp_path / "log.jsonl").read_bytes()
    run(kit, tmp_path, **flags)  # nothing is left to do
    assert (tmp_path / "log.jsonl").read_bytes() == before and ppo.list_checkpoints(tmp_path) == [2, 3]


def test_a_reward_function_that_fails_late_does_not_lose_the_run(kit, plain, tmp_path, monkeypatch):
    monkeypatch.setenv("STOP_AFTER", "14")  # in step 3
    with pytest.raises(ValueError, match=r"train.jsonl, line \d+ with RuntimeError: stopped by the test; the response"):
        run(kit, tmp_path, save_freq=1, reward=f"{kit.reward}:digits_until")
    assert ppo.list_checkpoints(tmp_path) == [1, 2]
    monkeypatch.setenv("STOP_AFTER", "1000")
    got = run(kit, tmp_path, save_freq=1, reward=f"{kit.reward}:digits_until")
    expected = [{k: v for k, v in r.items() if not k.startswith("val-")} for r in plain[1][1:]]
    assert got == expected
    assert_same_weights(weights(tmp_path), weights(plain[0]))


def test_ctrl_c_says_how_to_go_on(kit, tmp_path, monkeypatch, capsys):
    def interrupt(step, *args):
        raise KeyboardInterrupt

    monkeypatch.setattr(ppo, "rows_of_step", interrupt)
    with pytest.raises(SystemExit) as stopped:
        run(kit, tmp_path)
    assert stopped.value.code == 130 and "the same command goes on" in capsys.readouterr().out
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "interrupted"


@pytest.fixture
def no_model(monkeypatch):
    monkeypatch.setattr(ppo, "load_policies", lambda *args: pytest.fail("a model was loaded"))


@pytest.fixture
def finished(one_step, tmp_path):
    shutil.copytree(one_step, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    "file, how",
    [("actor.safetensors", "cut"), ("optimizer.pt", "cut"), ("state.json", "gone"), ("adapter/README.md", "cut")],
)
def test_a_damaged_checkpoint_is_refused(kit, finished, no_model, file, how):
    path = finished / "checkpoint-1" / file
    path.write_bytes(path.read_bytes()[:-5])
    if how == "gone":
        path.unlink()
    with pytest.raises(ValueError, match=rf"checkpoint-1 is damaged: {file} missing or changed"):
        run(kit, finished)


@pytest.mark.parametrize("text", [None, "", "{}", '{"settings": {}}', "[1]"])
def test_a_checkpoint_without_its_manifest_is_refused(kit, finished, no_model, text):
    path = finished / "checkpoint-1" / "manifest.json"
    path.write_text(text) if text is not None else path.unlink()
    with pytest.raises(ValueError, match="manifest.json is missing or damaged"):
        run(kit, finished)


@pytest.mark.parametrize(
    "flags, named",
    [
        ({"gamma": 0.5}, "gamma: 0.99 then, 0.5 now"),
        ({"lora_weights": ""}, "lora_weights"),
        ({"train_batch_size": 12}, "train_batch_size: 6 then, 12 now"),
        ({"seed": 1, "temperature": 1.0}, "temperature: 0.9 then, 1.0 now.*seed: 42 then, 1 now"),
        ({"train_files": "other rows"}, "data_sha256"),
        ({"prompt_template": "alpaca_short"}, "prompt_template"),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_configuration_is_refused(kit, finished, no_model, tmp_path, flags, named):
    if "train_files" in flags:
        flags = {"train_files": str(tmp_path / "other.jsonl")}
        lines = kit.train.read_text().splitlines(keepends=True)
        (tmp_path / "other.jsonl").write_text("".join(lines[1:] + lines[:1]))  # the same rows in another order
    with pytest.raises(ValueError, match=f"another configuration.*{named}"):
        run(kit, finished, **flags)


@pytest.mark.parametrize("changed", ["lora_sha256", "reward_sha256"])
def test_a_file_that_changed_between_two_runs_is_refused(kit, finished, no_model, changed):
    path = kit.reward if changed == "reward_sha256" else kit.adapter / "adapter_model.safetensors"
    before = path.read_bytes()
    settings_then = json.loads((finished / "checkpoint-1" / "manifest.json").read_text())["settings"]
    assert settings_then[changed] == ppo.file_sha256(path)
    try:
        if changed == "reward_sha256":
            path.write_bytes(before + b"# another comment\n")
        else:
            save_file({name: 2 * p for name, p in load_file(path).items()}, path)
        now = ppo.file_sha256(path)
        with pytest.raises(
            ValueError, match=f"another configuration .{changed}: '{settings_then[changed]}' then, '{now}"
        ):
            run(kit, finished)
    finally:
        path.write_bytes(before)
    with pytest.raises(pytest.fail.Exception, match="a model was loaded"):  # as it was, it may go on
        run(kit, finished)


def test_the_same_data_elsewhere_and_what_only_costs_time_may_change(kit, finished, tmp_path):
    shutil.copy(kit.train, tmp_path / "moved.jsonl")
    flags = {"ppo_max_tokens": 300, "max_ckpt_to_keep": 1, "rollout_batch_size": 2, "save_freq": 2, "test_freq": 1}
    records = run(kit, finished, train_files=str(tmp_path / "moved.jsonl"), val_files=str(kit.val), **flags)
    assert len(records) == 3 and ppo.list_checkpoints(finished) == [3]


@pytest.mark.parametrize(
    "resume", ["checkpoint-9", "somewhere", "checkpoint-1.incomplete", "checkpoint-x", "checkpoint-"]
)
def test_resume_from_what_is_no_checkpoint_is_refused(kit, finished, no_model, resume):
    shutil.copytree(finished / "checkpoint-1", finished / "checkpoint-1.incomplete")
    with pytest.raises(ValueError, match="not a checkpoint in --output_dir .* which has: checkpoint-1"):
        run(kit, finished, resume=str(finished / resume))


def test_a_folder_with_another_run_in_it(kit, finished, no_model, tmp_path):
    with pytest.raises(ValueError, match="holds another run: continue it with --resume auto, replace it with"):
        run(kit, finished, resume="never")
    with pytest.raises(ValueError, match="not a checkpoint in --output_dir"):  # another folder's
        run(kit, tmp_path / "new", resume=str(finished / "checkpoint-1"))
    (finished / "log.jsonl").unlink()
    with pytest.raises(ValueError, match="--overwrite starts over and --resume PATH goes on"):
        run(kit, finished, resume=str(finished / "checkpoint-1"), overwrite=True)


def test_a_finished_run_without_checkpoints_is_not_lost(kit, finished, no_model):
    for folder in finished.glob("checkpoint-*"):
        shutil.rmtree(folder)
    log = (finished / "log.jsonl").read_bytes()
    with pytest.raises(ValueError, match="holds another run"):
        run(kit, finished)
    assert (finished / "log.jsonl").read_bytes() == log


def test_a_ground_truth_that_is_no_text_is_refused(kit, no_model, tmp_path):
    row = {"prompt": [{"role": "user", "content": "1+1?"}], "data_source": "a", "reward_model": {"ground_truth": 2.0}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(
        ValueError, match="rows.jsonl, line 1: --reward strict compares texts, and the ground truth is 2.0"
    ):
        run(kit, tmp_path / "out", train_files=str(tmp_path / "rows.jsonl"), reward="strict")


def test_overwrite_starts_over(kit, one_step, finished):
    (finished / "notes.txt").write_text("mine")
    got = run(kit, finished, overwrite=True, total_training_steps=1, gamma=0.5)
    assert got != curve(one_step) and (finished / "notes.txt").exists() and ppo.list_checkpoints(finished) == [1]


def test_a_checkpoint_that_cannot_be_written_leaves_the_others(kit, tmp_path, monkeypatch):
    def full(state, path, save=torch.save, calls=itertools.count(1)):  # noqa: B008
        if next(calls) == 2:
            raise OSError(28, "No space left on device")
        save(state, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ValueError, match=r"checkpoint-2 could not be written \(\d+ MB free\).*No space left"):
        run(kit, tmp_path, save_freq=1)
    assert ppo.list_checkpoints(tmp_path) == [1] and not (tmp_path / "checkpoint-2.incomplete").exists()
    assert len(curve(tmp_path)) == 2


# -----------------------------------------------------------------------------
# gradients that are no numbers


def poison(monkeypatch, actor=(), critic=()):
    """Make the losses of these mini-batches infinite, numbered from 0 through the whole run, two a step."""
    for name, bad in (("compute_policy_loss", actor), ("compute_value_loss", critic)):

        def spoiled(loss_of, calls, bad, *args, **counts):
            loss, *others = loss_of(*args, **counts)
            return loss * (math.inf if next(calls) in bad else 1), *others

        monkeypatch.setattr(ppo, name, functools.partial(spoiled, getattr(ppo, name), itertools.count(), bad))


def of_steps(*steps):
    return [2 * step - 2 + mini for step in steps for mini in (0, 1)]


def test_a_gradient_that_is_not_finite_skips_its_step_and_is_counted(kit, tmp_path, monkeypatch):
    poison(monkeypatch, actor=(1, 2))
    records = run(kit, tmp_path)
    assert [r["actor/skipped_updates"] for r in records] == [1, 1, 0]
    assert [r["critic/skipped_updates"] for r in records] == [0] * 3
    assert all(p.isfinite().all() for p in weights(tmp_path).values())
    assert all(math.isfinite(r["actor/grad_norm"]) for r in records)


def test_steps_without_any_finite_gradient_are_counted_too(kit, tmp_path, monkeypatch):
    """Three in a row would stop the run, counted for each role: here are two of each, and one later."""
    poison(monkeypatch, actor=of_steps(1, 2, 4), critic=of_steps(2, 3))
    records = run(kit, tmp_path, total_training_steps=4, max_response_length=4, save_freq=1, max_ckpt_to_keep=4)
    assert [r["actor/skipped_updates"] for r in records] == [2, 2, 0, 2]
    assert [r["critic/skipped_updates"] for r in records] == [0, 2, 2, 0]
    assert [r["actor/grad_norm"] > 0 for r in records] == [False, False, True, False]
    start = weights(kit.folder)
    of_step = [start, *(weights(tmp_path / f"checkpoint-{n}") for n in (1, 2, 3, 4))]
    moved = [any(not torch.equal(a[n], b[n]) for n in start) for a, b in itertools.pairwise(of_step)]
    assert moved == [False, False, True, False]


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_the_third_step_in_a_row_without_a_finite_gradient_stops_the_run(kit, tmp_path, monkeypatch, role):
    poison(monkeypatch, **{role: of_steps(2, 3, 4)})
    says = "step 4: three times in a row no mini-batch had a finite gradient. Checkpoints are untouched; lower the lear"
    with pytest.raises(ValueError, match=says):
        run(kit, tmp_path, total_training_steps=5, max_response_length=4, save_freq=1)
    assert ppo.list_checkpoints(tmp_path) == [2, 3]
    assert [r[f"{role}/skipped_updates"] for r in curve(tmp_path)] == [0, 2, 2]
    for n in (2, 3):
        assert all(p.isfinite().all() for p in weights(tmp_path / f"checkpoint-{n}").values())


# -----------------------------------------------------------------------------
# bad input


TWO_FILTERS = (
    "--top_k and --top_p with a KL: a token that the reference leaves out would have an infinite one. "
    "Set --kl_coef 0 and --kl_loss_coef 0, or sample from all tokens"
)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"train_batch_size": 10, "ppo_mini_batch_size": 4}, "train_batch_size 10 must be a multiple of --ppo_mini_b"),
        ({"train_batch_size": 4, "ppo_mini_batch_size": 8}, "must be a multiple"),
        ({"train_batch_size": 0}, "--train_batch_size must be at least 1"),
        ({"adv_estimator": "a2c"}, "--adv_estimator a2c: one of gae, grpo, rloo, reinforce_plus_plus"),
        ({"adv_estimator": "grpo"}, "compares responses to one prompt: --rollout_n 2"),
        ({"adv_estimator": "rloo", "rollout_n": 1}, "compares responses"),
        ({"adv_estimator": "rloo", "rollout_n": 2, "critic_warmup": 1}, "--critic_warmup: .* no critic"),
        ({"loss_agg_mode": "mean"}, "--loss_agg_mode mean: one of token-mean"),
        ({"kl_penalty_type": "kl"}, "--kl_penalty_type kl: one of k1"),
        ({"kl_loss_type": "k4"}, "--kl_loss_type k4"),
        ({"kl_ctrl": "auto"}, "--kl_ctrl auto: one of fixed, adaptive"),
        ({"kl_coef": 0.0, "kl_ctrl": "adaptive"}, "starts from --kl_coef, which is 0"),
        ({"top_k": 3, "kl_loss_coef": 0.0}, TWO_FILTERS),
        ({"top_p": 0.9, "kl_coef": 0.0, "kl_ctrl": "fixed"}, TWO_FILTERS),
        ({"temperature": 0.0}, "--temperature must be above 0"),
        ({"temperature": math.nan}, "--temperature must be above 0"),
        ({"top_p": 0.0}, r"--top_p must be in \(0, 1\]"),
        ({"top_p": 1.1}, "--top_p must be in"),
        ({"top_p": math.nan}, "--top_p must be in"),
        ({"top_k": -1}, "--top_k must be at least 0"),
        ({"gamma": 1.1}, "--gamma must be at most 1"),
        ({"lam": -0.1}, "--lam must be at least 0"),
        ({"lam": math.nan}, "--lam must be at least 0"),
        ({"clip_ratio_c": 1.0}, "--clip_ratio_c above 1"),
        ({"clip_ratio_c": math.nan}, "--clip_ratio_c above 1"),
        ({"actor_lr": math.inf}, "--actor_lr must be at least 0"),
        ({"ppo_epochs": 0}, "--ppo_epochs must be at least 1"),
        ({"max_response_length": 0}, "--max_response_length must be at least 1"),
        ({"max_ckpt_to_keep": 0}, "--max_ckpt_to_keep must be at least 1"),
        ({"seed": 2**32}, "--seed below"),
        ({"lora_r": 0, "load_in_4bit": True}, "cannot be quantized"),
        ({"load_in_8bit": True, "load_in_4bit": True}, "give one of them"),
        ({"val_files": "x", "test_freq": 0}, "--test_freq 0 never uses them"),
        ({"wandb_project": "x"}, "not installed"),
        ({"dtype": "int8"}, "--dtype int8: one of auto"),
        ({"base_model": "no/such/thing"}, "--base_model no/such/thing: no such folder"),
        ({"train_files": "no/such/thing.jsonl"}, "no such file"),
        ({"reward": "exact"}, "--reward exact: strict, flexible, or path/to/file.py:function"),
        ({"reward": "nowhere.py:f"}, "there is no file nowhere.py"),
        ({"reward": "REWARD:absent"}, "has no function 'absent'"),
        ({"reward": "REWARD:not_a_function"}, "has no function 'not_a_function'"),
        ({"reward": "REWARD"}, "has no function|path/to/file.py:function"),
        ({"max_response_length": 5000}, "more than the 1024 positions of the model"),
        ({"prompt_template": "absent"}, "no such template"),
    ],
    ids=str,
)
def test_bad_flags_are_refused_before_a_model_is_loaded(kit, tmp_path, no_model, monkeypatch, flags, message):
    monkeypatch.setattr(ppo.importlib.util, "find_spec", lambda name: None)
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
    "bad, message",
    [
        ({"reward_model": ...}, "the row has no reward_model"),
        (
            {"prompt": ..., "reward_model": ...},
            "no prompt and no reward_model; it has 'data_source'.*data/gsm8k.py writes",
        ),
        ({"reward_model": None}, "'reward_model' must be an object with a ground_truth, got None"),
        (
            {"reward_model": {"style": "rule", "ground_truth": None}},
            "'reward_model' must be an object with a ground_truth",
        ),
        ({"prompt": []}, "'prompt' must list messages"),
        ({"prompt": "What?"}, "'prompt' must list messages with role and content, got 'What\\?'"),
        ({"prompt": [{"role": "user", "content": None}]}, "no text in field 'content'"),
    ],
    ids=str,
)
def test_rows_without_what_is_needed_are_named(kit, tmp_path, no_model, bad, message):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (verl_row(), verl_row(**bad))))
    with pytest.raises(ValueError, match=f"rows.jsonl, line 2: .*{message}"):
        run(kit, tmp_path / "out", train_files=str(path))


def test_a_parquet_file_without_the_columns_is_refused_by_row(kit, tmp_path, no_model):
    empty = verl_row(reward_model={"style": "rule", "ground_truth": None})
    for rows, message in (
        ([{"text": "a"}, {"text": "b"}], "row 1: the row has no prompt and no reward_model; it has 'text'"),
        ([verl_row(), empty], "row 2: field 'reward_model' must be an object with a ground_truth"),
    ):
        path = write_parquet(tmp_path / "rows.parquet", rows)
        with pytest.raises(ValueError, match=f"rows.parquet, {message}"):
            run(kit, tmp_path / "out", train_files=path)


def test_questions_without_a_final_number_are_refused(kit, tmp_path, no_model):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "?", "answer": "seven"}))
    with pytest.raises(ValueError, match="rows.jsonl, line 1: the answer must end in '#### number', got 'seven'"):
        run(kit, tmp_path / "out", train_files=str(path))


def test_parquet_rows_of_verls_schema_train(kit, tmp_path):
    rows = [verl_row(prompt=[{"role": "user", "content": f"What is 3 + {i}?"}]) for i in range(5)]
    rows[3]["data_source"] = "other/source"
    path = write_parquet(tmp_path / "train.parquet", rows)
    flags = {"train_files": path, "val_files": path, "total_training_steps": 1, "reward": "strict"}
    records = run(kit, tmp_path / "out", **flags)
    kinds = ("core/{}/reward", "aux/{}/strict", "aux/{}/flexible")
    names = {f"val-{kind}/mean@1".format(source) for kind in kinds for source in ("openai/gsm8k", "other/source")}
    assert names <= records[0].keys()
    rows = [json.loads(x) for x in (tmp_path / "out" / "val_generations" / "step-00001.jsonl").read_text().splitlines()]
    assert all(row["ground_truth"] == "7" and row["score"] == row["strict"] for row in rows)


def test_an_integer_ground_truth_is_compared_as_text(tmp_path):
    rows = [verl_row(reward_model={"style": "rule", "ground_truth": truth}) for truth in (7, -12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = ppo.load_tokenizer(str(BASE))
    ppo.use_template(tokenizer, "")
    for path in (str(tmp_path / "rows.jsonl"), write_parquet(tmp_path / "rows.parquet", rows)):
        problems, _ = ppo.read_problems(path, "train", tokenizer, 512, True)
        assert [problem["ground_truth"] for problem in problems] == ["7", "-12"]
        for method, text in (("strict", "#### {}"), ("flexible", "it is {}")):
            reward = ppo.load_reward(method)
            right = [ppo.score_response(reward, problem, text.format(n)) for problem, n in zip(problems, (7, -12))]
            wrong = [ppo.score_response(reward, problem, text.format(n)) for problem, n in zip(problems, (-12, 7))]
            assert right == [1, 1] and wrong == [0, 0]


def test_overlong_prompts_are_counted_or_refused(kit, tmp_path, monkeypatch):
    lengths = []
    tokenizer = ppo.load_tokenizer(str(kit.base))
    ppo.use_template(tokenizer, "")
    problems, none = ppo.read_problems(str(kit.train), "train", tokenizer, 512, True)
    lengths = sorted(len(problem["prompt"]) for problem in problems)
    assert none == 0 and lengths[0] < lengths[6] < lengths[-1]
    kept = sum(n <= lengths[6] for n in lengths)
    run(kit, tmp_path / "run", max_prompt_length=lengths[6], total_training_steps=1)
    counts = json.loads((tmp_path / "run" / "run.json").read_text())["counts"]
    assert (counts["train"], counts["overlong"]) == (kept, 11 - kept)
    monkeypatch.setattr(ppo, "load_policies", lambda *args: pytest.fail("a model was loaded"))
    with pytest.raises(
        ValueError, match=rf"train.jsonl, line \d+: the prompt has \d+ tokens, .* {11 - kept} of 11: take a l"
    ):
        run(kit, tmp_path / "refused", max_prompt_length=lengths[6], filter_overlong_prompts=False)
    with pytest.raises(ValueError, match=r"as have 11 of 11: take a larger one$"):
        run(kit, tmp_path / "refused", max_prompt_length=3)


@pytest.mark.parametrize(
    "function, message",
    [
        ("raises", "KeyError: 'no such thing'; the response was '"),
        ("nan", "returned nan on .*train.jsonl, line"),
        ("nothing", "TypeError"),
        ("no_score", "KeyError: 'score'"),
        ("two_arguments", "TypeError: two_arguments"),
    ],
)
def test_a_reward_function_that_fails_names_the_sample(kit, tmp_path, function, message):
    with pytest.raises(ValueError, match=f"the reward function .*train.jsonl, line .*{message}|{message}") as error:
        run(kit, tmp_path, reward=f"{kit.reward}:{function}")
    assert "train.jsonl, line" in str(error.value) and "the response was '" in str(error.value)


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
    with pytest.raises(ValueError, match="cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"):
        ppo.load_reward(f"{path}:score")


def test_without_any_flag_and_without_a_fine_tuned_model_it_says_what_to_do(tmp_path, monkeypatch, no_model):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="run `python finetune.py` first.*or give --base_model"):
        train_ppo()
    assert not list(tmp_path.iterdir())


def test_a_base_without_an_end_token_is_refused(kit, tmp_path):
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
    (tmp_path / "plain.jinja").write_text("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    with pytest.raises(ValueError, match="names an end token, so no response would ever end: set eos_token"):
        run(kit, tmp_path / "out", base_model=str(base), prompt_template=str(tmp_path / "plain.jinja"))
    assert not (tmp_path / "out").exists()


def test_short_prompts_and_responses(kit, tmp_path):
    (tmp_path / "plain.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    rows = [{"question": f"{i}?", "answer": "#### 3"} for i in range(6)]
    (tmp_path / "short.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"train_files": str(tmp_path / "short.jsonl"), "prompt_template": str(tmp_path / "plain.jinja")}
    assert len(run(kit, tmp_path / "out", max_response_length=4, total_training_steps=1, **flags)) == 1


@pytest.mark.parametrize("kind", [*KINDS, "opt"])  # opt: its layers call F.dropout(training=self.training) themselves
def test_activation_checkpointing_turns_no_dropout_on(kind):
    if kind == "opt":
        shape = {"vocab_size": 110, "hidden_size": 48, "word_embed_proj_dim": 48, "ffn_dim": 64, "dropout": 0.5}
        config = OPTConfig(**shape, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    else:
        model = tiny_model(kind)
    policies = ppo.Policies({"actor": model}, torch.nn.Linear(48, 1), torch.float32, "cpu", True)
    assert len(policies.layers) == 2
    packed = ppo.pack_responses(PROMPTS, [[1, 2, 3]] * len(PROMPTS), "cpu")
    to_logits = functools.partial(ppo.sampled_logits, temperature=1.0, vocab_size=100)
    with torch.no_grad():
        expected, _ = policies.logprobs("actor", packed, to_logits)
    got, _ = policies.logprobs("actor", packed, to_logits)
    assert torch.equal(got, expected) and got.requires_grad


def test_a_model_with_another_output_than_its_head_is_refused(kit):
    model = tiny_model("llama")
    policies, to_logits, rollout = make_rollout(model, [0])
    ppo.check_forward(policies, rollout, to_logits, 100)
    forward = model.forward

    def capped(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = 3 * torch.tanh(out.logits / 3)
        return out

    model.forward = capped
    with pytest.raises(ValueError, match="forward of this model is not its own: log-probabilities are"):
        ppo.check_forward(policies, rollout, to_logits, 100)
