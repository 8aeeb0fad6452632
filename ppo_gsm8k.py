"""
PPO of a causal language model with a critic and a rule-based reward on GSM8K: one copy of the weights, all roles.

    reads    --train_files, --val_files   verl's rows (data/gsm8k.py writes them), or question and answer
             --base_model, --lora_weights the policy to start from, usually an adapter of finetune.py
    writes   --output_dir    run.json (what was used, versions, results), log.jsonl (a line a step), adapter/,
                             curves.png, checkpoint-N/, val_generations/, tensorboard/
    then     generate.py --base_model BASE --lora_weights OUT/adapter, or export_hf_checkpoint.py

    no GPU   python finetune.py --data_path data/tiny/demonstrations.jsonl --num_epochs 40 --learning_rate 2e-3 \\
                 --val_set_size 0 --output_dir out/few && python ppo_gsm8k.py
    1 GPU    python ppo_gsm8k.py --base_model Qwen/Qwen2.5-0.5B-Instruct --train_files data/gsm8k/train.parquet \\
                 --val_files data/gsm8k/test.parquet
    8 GPUs   torchrun --standalone --nproc_per_node=8 ppo_gsm8k.py --base_model ...
    servers  python ppo_gsm8k.py --rollout_urls http://one:8000,http://two:8000 --base_model ...   (vLLM samples)

A step samples responses to a batch of prompts, scores them, computes advantages, and updates the policy: Schulman et
al. 2017 (arXiv:1707.06347) with generalized advantages (arXiv:1506.02438), as in verl's PPO quickstart. No generator
has a state: order and samples of step s are functions of --seed and s, whatever the number of ranks.

Shapes in comments: B sequences, T tokens, R response tokens, L predicted tokens, D hidden, V vocabulary.
"""

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_type_hints

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # when it is imported, it asks for an optional package

import fire
import numpy as np
import torch
import torch.distributed.checkpoint as distributed_checkpoint
import torch.nn.functional as F
import transformers
import urllib3
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from matplotlib.figure import Figure
from pyarrow import parquet
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig, set_seed

HERE = Path(__file__).resolve().parent
TINY = HERE / "data" / "tiny"
START = (  # what makes the adapter that the embedded default starts from
    "python finetune.py --data_path data/tiny/demonstrations.jsonl --num_epochs 40 --learning_rate 2e-3 "
    "--val_set_size 0 --output_dir out/few"
)
LOGITS_AT_ONCE = 2**26  # entries of a chunk of logits: 256 MB in float32
ROWS_AT_ONCE = 256  # sequences that one device decodes at a time
PATIENCE = 300  # seconds in which a rollout server must answer
RETRIES = 8  # of a request to a server that is not there: after 0, 2, 4, 8, ... 120 seconds, 4 minutes in all
CHOICES = {
    "adv_estimator": ("gae", "grpo", "rloo", "reinforce_plus_plus"),
    "lr_scheduler_type": ("linear", "constant"),
    "loss_agg_mode": ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"),
    "dtype": ("auto", "bfloat16", "float32"),
}
ABOVE_ZERO = (
    "train_batch_size max_prompt_length max_response_length rollout_n lora_alpha ppo_mini_batch_size ppo_epochs "
    "ppo_max_tokens test_freq temperature total_epochs"
).split()
PLOTTED = "score/mean|reward_kl_penalty|entropy|response_length/mean|explained_var|mean@1"
# flags that may differ where a run goes on: they change neither what is sampled nor what is learned from it
FREE = set(
    "output_dir overwrite train_files val_files rollout_urls total_epochs total_training_steps test_freq save_freq "
    "ppo_max_tokens activation_checkpointing".split()
)

# -----------------------------------------------------------------------------
# shared with the other scripts, word for word: tests/test_copies.py compares them


def run_cli(fn):
    """Call `fn` with the flags on the command line, once every flag has been checked against its type.

    By itself fire calls the function first and reports unknown flags afterwards (python-fire#168), and reads
    `--bf16 false` as a text that is true. So it is handed a stand-in that records the call. Flags are `--name value`,
    booleans `--name` or `--noname`. An error that the script itself raises (ValueError) is shown as its
    message alone; any other keeps its traceback.
    """
    hints, call = get_type_hints(fn), {}

    @functools.wraps(fn)
    def record(**flags):
        call.update(flags)

    if {"--help", "-h"} & set(sys.argv[1:]):
        fire.Fire(record, command=["--help"])  # leaves here
    fire.decorators.SetParseFn(str)(record)
    fire.Fire(record, command=[arg for arg in sys.argv[1:] if arg != "--"])  # leaves here on an unknown flag
    for name, text in call.items():
        hint = hints[name]
        if (hint is bool) != (text in ("True", "False")):  # what fire records for a flag that nothing follows
            raise SystemExit(f"--{name} {text}: a switch is --{name} or --no{name} alone, others need a value")
        try:
            call[name] = text == "True" if hint is bool else hint(text)
        except ValueError:
            raise SystemExit(f"--{name} takes {hint.__name__}, got {text!r}") from None
    try:
        return fn(**call)
    except ValueError as error:
        if traceback.extract_tb(error.__traceback__)[-1].filename != fn.__code__.co_filename:
            raise
        raise SystemExit(f"error: {error}") from None


def write_json(path, value):
    """Write `value` as JSON beside `path` and rename it, so that `path` is never half written."""
    partial = Path(f"{path}.incomplete")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def write_jsonl(path, records):
    """Write records as JSON lines."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def default_learning_rate(config):
    """Return the LoRA learning rate for a model: 5e-4 (2000 / hidden size)^p, p by family.

    The fit of Schulman et al., "LoRA Without Regret" (Thinking Machines 2025), as in tinker-cookbook's
    hyperparam_utils: p is 0.0775 for Qwen, 0.781 for Llama, and here for every other family. It was made with
    lora_alpha 32 on models from 1B to 70B parameters.
    """
    exponent = 0.0775 if config.model_type.startswith("qwen") else 0.781
    return 5e-4 * (2000 / config.hidden_size) ** exponent


# -----------------------------------------------------------------------------
# data: problems and their prompts


def to_problem(row, tokenizer):
    """Return the problem in a row of verl's, or in one with question and answer.

    A problem is {"prompt": token ids, "ground_truth", "data_source", "extra_info"}.
    """
    if "prompt" in row:
        messages = row["prompt"]
        truth = row["reward_model"]["ground_truth"]
    else:
        messages = [{"role": "user", "content": row["question"]}]
        truth = final_number(row["answer"], "strict")
    if truth is None:
        raise ValueError("no ground_truth, or an answer that does not end in '#### number'")
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return {
        "prompt": tokenizer(text, add_special_tokens=False).input_ids,
        "ground_truth": str(truth) if type(truth) is int else truth,  # scores compare texts
        "data_source": row.get("data_source", "openai/gsm8k"),
        "extra_info": row.get("extra_info", row),
    }


def read_problems(source, tokenizer, max_prompt_length):
    """Return (problems, number of those left out because their prompt is longer than max_prompt_length tokens)."""
    path = Path(source)
    problems = []
    number = 0
    if not path.is_file() or path.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"{source} is no jsonl or parquet file: python data/gsm8k.py --source {source} makes two")
    try:
        if path.suffix == ".parquet":
            rows = parquet.read_table(path).to_pylist()
        else:
            rows = path.read_text("utf-8-sig").strip().split("\n")
        for row in rows:
            number += 1
            row = json.loads(row) if path.suffix == ".jsonl" else row
            problem = to_problem(row, tokenizer) | {"where": f"{source}, row {number}"}
            if len(problem["prompt"]) <= max_prompt_length:
                problems.append(problem)
    except Exception as error:  # ours, json's, pyarrow's, and whatever a row of another form leads to
        raise ValueError(
            f"{source}, row {number}: neither verl's prompt and reward_model, as data/gsm8k.py writes, nor question "
            f"and answer: {error!r}"
        ) from error
    if not problems:
        raise ValueError(f"{source}: no prompt of at most --max_prompt_length {max_prompt_length} tokens in it")
    return problems, number - len(problems)


def rows_of_step(step, num_rows, batch_size, seed):
    """Return the row numbers of step `step` (from 1): a window of one endless row of shuffled epochs, [batch_size].

    No row is dropped at an epoch's end; a batch may hold the end of one epoch and the start of the next.
    """
    rows = []
    for place in range((step - 1) * batch_size, step * batch_size):
        order = np.random.default_rng([seed, 0, place // num_rows]).permutation(num_rows)
        rows.append(int(order[place % num_rows]))
    return rows


# -----------------------------------------------------------------------------
# reward


def final_number(text, method):
    """Return the number that a GSM8K answer ends in, or None if there is none; as verl's reward_score/gsm8k.py does.

    strict takes the last "#### number" and leaves its commas out; flexible the last number of any kind, as it stands.
    """
    if method == "strict":
        found = [number.replace(",", "") for number in re.findall(r"#### (\-?[0-9\.\,]+)", text)]
    else:
        found = [number for number in re.findall(r"(\-?[0-9\.\,]+)", text) if number != "."]
    return found[-1] if found else None


def compute_score(solution_str, ground_truth, method="strict"):
    """Return 1.0 if an answer's final number is `ground_truth` (a string without commas), else 0.0.

    Only the last 300 characters of the answer are read, as in verl.
    """
    return float(final_number(solution_str[-300:], method) == ground_truth)


def load_reward(reward):
    """Return the reward function that --reward names: strict, flexible, or a user's as path/to/file.py:function.

    It is called with verl's arguments (data_source, solution_str, ground_truth, extra_info) and returns a number, or
    a dict with the number as "score".
    """
    if reward in ("strict", "flexible"):
        return lambda data_source, solution_str, ground_truth, extra_info: compute_score(
            solution_str, ground_truth, reward
        )
    path, _, name = reward.rpartition(":")
    try:
        return runpy.run_path(path)[name]
    except Exception as error:  # whatever the file does
        raise ValueError(f"--reward {reward}: neither strict, flexible nor file.py:function: {error!r}") from error


def score_response(reward_fn, problem, text):
    """Return the reward of a response text as a finite float; ValueError names the problem and shows the response."""
    try:
        score = reward_fn(
            data_source=problem["data_source"],
            solution_str=text,
            ground_truth=problem["ground_truth"],
            extra_info=problem["extra_info"],
        )
        score = float(score["score"] if isinstance(score, dict) else score)
        if not abs(score) < 1e12:  # nan is not, either; the critic squares it, in float32
            raise ArithmeticError(f"it returned {score}")
    except Exception as error:  # whatever the user's function raises
        raise ValueError(
            f"the reward function failed on {problem['where']}: {error!r}; the response was {text!r:.300}"
        ) from error
    return score


# -----------------------------------------------------------------------------
# advantages: token-level rewards in, advantages and returns out, all over the global batch


def masked_mean(x, mask):
    """Return the mean of x where mask is True (0 where it never is)."""
    return (x * mask).sum() / (mask.sum() + 1e-8)


def masked_whiten(x, mask):
    """Return x with mean 0 and variance 1 over the True entries of mask, as verl does; other entries move along.

    The variance is the unbiased one. Both are those of what is given: give the global batch.
    """
    mean = masked_mean(x, mask)
    count = mask.sum()
    variance = masked_mean((x - mean) ** 2, mask) * count / (count - 1).clamp(min=1)
    return (x - mean) * torch.rsqrt(variance + 1e-8)


def compute_gae(token_rewards, values, mask, gamma, lam):
    """Return (advantages, returns) by generalized advantage estimation, Schulman et al. 2015, eq. 16; both [B, R].

    token_rewards, values  [B, R] float
    mask                   [B, R] bool, True on response tokens: a run of True, then False

    The value after the last response token is 0, whether the response ended or was cut. Advantages are not whitened
    yet, and 0 where mask is False.
    """
    advantages = torch.zeros_like(values)
    next_value = running = torch.zeros_like(values[:, 0])  # [B]
    for t in reversed(range(values.shape[1])):
        delta = token_rewards[:, t] + gamma * next_value - values[:, t]
        running = (delta + gamma * lam * running) * mask[:, t]
        next_value = values[:, t] * mask[:, t]
        advantages[:, t] = running
    return advantages, (advantages + values) * mask


def compute_advantages(
    batch,
    adv_estimator,
    rollout_n=1,
    gamma=1.0,
    lam=1.0,
):
    """Return (advantages, returns) [B, T] of the global batch, by verl's name of the estimator.

    batch has token_level_rewards, mask, and, for gae, values. gae: whitened over the batch. reinforce_plus_plus (Hu et
    al. 2025, arXiv:2501.03262): the discounted rewards ahead, which is gae with lambda 1 of a critic that always says
    0, whitened. The others compare the rollout_n (at least 2) responses to one prompt, which are rows in turn. grpo
    (Shao et al. 2024, arXiv:2402.03300, sec. 4.1.2): reward less the group's mean, over its unbiased standard
    deviation. rloo (Ahmadian et al. 2024, arXiv:2402.14740, eq. 8): reward less the mean of the others.
    """
    rewards = batch["token_level_rewards"]
    mask = batch["mask"]
    if adv_estimator in ("gae", "reinforce_plus_plus"):
        values = batch["values"] if adv_estimator == "gae" else torch.zeros_like(rewards)
        lam = lam if adv_estimator == "gae" else 1.0
        advantages, returns = compute_gae(rewards, values, mask, gamma, lam)
        return masked_whiten(advantages, mask) * mask, returns
    rewards = rewards.sum(-1).view(-1, rollout_n)  # [prompts, rollout_n]
    advantages = rewards - rewards.mean(-1, keepdim=True)
    if adv_estimator == "rloo":
        advantages = advantages * rollout_n / (rollout_n - 1)
    else:
        advantages = advantages / (rewards.std(-1, keepdim=True) + 1e-6)
    advantages = advantages.view(-1, 1) * mask
    return advantages, advantages


def explained_variance(values, returns, mask):
    """Return 1 - Var(returns - values) / Var(returns) over the True entries of mask; 1 is perfect, 0 a constant."""
    errors = (returns - values)[mask]
    return 1 - (errors.var() / (returns[mask].var() + 1e-5)).item()


# -----------------------------------------------------------------------------
# losses


def agg_loss(
    loss,
    mask,
    mode,
    num_tokens,
    num_sequences,
    horizon,
):
    """Return the per-token losses [B, T] as one number, by verl's name of the way.

    token-mean: over all tokens. seq-mean-token-sum, seq-mean-token-mean: a response's sum or mean, then the mean over
    responses. seq-mean-token-sum-norm: the former over the longest possible response (Dr. GRPO, arXiv:2503.20783). The
    counts are those of the whole mini-batch: then its parts' losses add up to its loss, however it is cut.
    horizon is the longest possible response.
    """
    sums = (loss * mask).sum(-1)  # [B]
    if mode == "token-mean":
        return sums.sum() / num_tokens
    if mode == "seq-mean-token-mean":
        sums = sums / mask.sum(-1).clamp(min=1)
    if mode == "seq-mean-token-sum-norm":
        sums = sums / horizon
    return sums.sum() / num_sequences


def compute_policy_loss(
    old_logprobs,
    logprobs,
    advantages,
    clip_ratio_low=0.2,
    clip_ratio_high=0.2,
    clip_ratio_c=3.0,
):
    """Return (losses, clipped, log-ratios, clipped lower) of PPO's clipped objective; everything is [B, T].

    Schulman et al. 2017, eq. 7, with the ratio clipped to [1 - clip_ratio_low, 1 + clip_ratio_high]; where the
    advantage is negative the loss is at most -advantage * clip_ratio_c (dual clip, Ye et al. 2020, arXiv:1912.09729,
    eq. 5). Clipped is 1 where the clipped term counts, clipped lower where the dual clip does.
    """
    log_ratio = (logprobs - old_logprobs).clamp(-20, 20)  # exp stays finite
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_ratio_low, 1 + clip_ratio_high)
    worse = torch.maximum(plain, clipped)
    bound = -advantages * clip_ratio_c
    bounded = (worse > bound) & (advantages < 0)
    return torch.where(bounded, bound, worse), clipped > plain, log_ratio, bounded


def compute_value_loss(values, old_values, returns, cliprange_value=0.5):
    """Return (losses, clipped) of the critic, half the squared errors; everything is [B, T].

    A value that moved more than cliprange_value from old_values is clipped there, and the larger of both errors
    counts (OpenAI baselines' ppo2).
    """
    clipped = values.clamp(old_values - cliprange_value, old_values + cliprange_value)
    plain_error = (values - returns) ** 2
    clipped_error = (clipped - returns) ** 2
    return 0.5 * torch.maximum(plain_error, clipped_error), clipped_error > plain_error


def low_var_kl(logprobs, ref_logprobs):
    """Return an estimate of KL(policy || reference) per token, [B, T]: Schulman's k3 (joschu.net/blog/kl-approx).

    It is unbiased and never negative; the other one here, k1, is the log-ratio itself.
    """
    inverse = (ref_logprobs - logprobs).clamp(-20, 20)
    return (inverse.exp() - inverse - 1).clamp(-10, 10)


def actor_loss(actor, micro, flags, **counts):
    """Return a micro-batch's share of the actor's loss, and {metric: per-token values [B, T], or a share of a loss}."""
    mask = micro["mask"]
    aggregate = functools.partial(agg_loss, mask=mask, mode=flags["loss_agg_mode"], **counts)
    logprobs, entropy = actor(response_logprobs, micro, flags["entropy_coeff"] > 0)
    losses, clipped, log_ratio, bounded = compute_policy_loss(
        micro["old_logprobs"],
        logprobs,
        micro["advantages"],
        flags["clip_ratio_low"],
        flags["clip_ratio_high"],
    )
    loss = aggregate(losses)
    metrics = {
        "pg_loss": loss,
        "pg_clipfrac": clipped,
        "pg_clipfrac_lower": bounded,
        "ppo_kl": -log_ratio,
    }
    loss = loss - flags["entropy_coeff"] * aggregate(entropy)
    if flags["kl_loss_coef"]:
        kl = low_var_kl(logprobs, micro["ref_logprobs"])
        metrics["kl_loss"] = aggregate(kl)
        loss = loss + flags["kl_loss_coef"] * metrics["kl_loss"]
    return loss, metrics


def critic_loss(critic, micro, flags, **counts):
    """Return a micro-batch's share of the critic's loss, and its metrics, as actor_loss does."""
    (values,) = critic(response_values, micro)
    losses, clipped = compute_value_loss(values, micro["values"], micro["returns"])
    loss = agg_loss(losses, micro["mask"], "token-mean", **counts)
    metrics = {
        "vf_loss": loss,
        "vf_clipfrac": clipped,
        "vpred_mean": values,
    }
    return loss, metrics


# -----------------------------------------------------------------------------
# model: actor, critic and reference


class Role(torch.nn.Module):
    """A model as actor, critic or reference: with LoRA an adapter on the base that all share, else a model of its own.

    Calling it with a function of this file runs that function with the role's adapter active and no other, in the
    run's precision, and, where FSDP2 shards the model over the ranks, with its weights at hand.
    """

    def __init__(self, model, adapter, dtype, temperature, vocab_size):
        super().__init__()
        self.model = model
        self.adapter = adapter
        self.dtype = dtype
        self.temperature = temperature
        self.vocab_size = vocab_size

    def forward(self, function, *args):
        if self.adapter in getattr(self.model, "peft_config", ()):
            self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(self.adapter, inference_mode=self.adapter == "reference")
        elif self.adapter:  # the reference without one is the bare base
            self.model.base_model.disable_adapter_layers()
        with torch.autocast(self.model.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return function(self, *args)

    def hidden(self, input_ids, **inputs):
        """Return the last hidden states [B, T, D] of token ids [B, T]."""
        model = self.model.get_base_model() if self.adapter else self.model
        return model.get_decoder()(input_ids, **inputs).last_hidden_state

    def logits(self, hidden):
        """Return the logits [..., vocab_size] that are sampled from, float32, at hidden states [..., D].

        Divided by the temperature, and without the ids that pad the vocabulary. Sampling and log-probabilities both
        go through here, so they agree.
        """
        logits = self.model.get_output_embeddings()(hidden)
        return logits[..., : self.vocab_size].float() / self.temperature


def token_logprobs(role, hidden, targets, with_entropy):
    """Return (log-probabilities [L], entropies [L], 0 without with_entropy) of targets [L], float32."""
    logprobs = role.logits(hidden).log_softmax(-1)
    picked = logprobs.gather(-1, targets[:, None])[:, 0]
    entropy = -(logprobs.exp() * logprobs).sum(-1) if with_entropy else torch.zeros_like(picked)
    return picked, entropy


def response_states(role, micro):
    """Return the last hidden states [L, D] that predict the response tokens of a `micro_batch`."""
    hidden = role.hidden(micro["input_ids"], use_cache=False)
    return hidden[:, :-1][micro["mask"][:, 1:]]


def unflatten(flat, mask):
    """Return the values [L] of response tokens as [B, T], 0 where mask [B, T] is False."""
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat)


def response_logprobs(role, micro, with_entropy=False):
    """Return [log-probabilities, entropies], each [B, T], of the response tokens of a `micro_batch`.

    There are never [L, V] logits: a chunk's are computed again in the backward pass.
    """
    rows = LOGITS_AT_ONCE // role.vocab_size
    states = response_states(role, micro).split(rows)
    targets = micro["input_ids"][micro["mask"]].split(rows)
    parts = []
    for chunk, ids in zip(states, targets, strict=True):
        parts.append(
            checkpoint(
                token_logprobs,
                role,
                chunk,
                ids,
                with_entropy,
                use_reentrant=False,
            )
        )
    return [unflatten(torch.cat(part), micro["mask"]) for part in zip(*parts, strict=True)]


def response_values(critic, micro):
    """Return [the critic's values before each response token, [B, T]] of a `micro_batch`, float32."""
    head = critic.value_head  # by hand: autocast would make it half precision
    values = (response_states(critic, micro) * head.weight).sum(-1) + head.bias
    return [unflatten(values, micro["mask"])]


# -----------------------------------------------------------------------------
# rollout engines: sync(step) gives them the actor of now, generate(prompts, max_tokens, uniforms) samples from it


def pick_tokens(logits, uniforms=None):
    """Return (tokens [B], log-probabilities [B]): the likeliest of logits [B, V], or one drawn by uniforms [B].

    A draw inverts the cumulative distribution, so a token depends on its own uniform number in [0, 1) alone, not on
    who is in the batch. The sums are float64: the small probabilities of a large vocabulary would be lost in float32.
    """
    logprobs = logits.log_softmax(-1)
    tokens = logits.argmax(-1)
    if uniforms is not None:
        cumulative = logprobs.double().exp().cumsum(-1)
        # a little below the whole: the last token with any probability is the last that can be drawn
        targets = uniforms.double()[:, None] * cumulative[:, -1:] * (1 - 2**-40)
        tokens = torch.searchsorted(cumulative, targets, right=True)[:, 0]
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


def decode(actor, prompts, max_tokens, uniforms, stops):
    """Return [(token, log-probability), ...] for each prompt; a sequence that has ended leaves the batch."""
    cache = DynamicCache()
    made = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    ids = [torch.tensor(prompt) for prompt in prompts]
    ids = pad_sequence(ids, batch_first=True, padding_value=-1, padding_side="left").to(actor.model.device)
    mask = (ids >= 0).long()
    ids = ids.clamp(0)
    for t in range(max_tokens):
        hidden = actor.hidden(
            ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :],
            past_key_values=cache,
            use_cache=True,
        )
        drawn = None if uniforms is None else uniforms[rows, t]
        tokens, logprobs = pick_tokens(actor.logits(hidden[:, -1]), drawn)
        alive = []
        for k, pair in enumerate(zip(tokens.tolist(), logprobs.tolist(), strict=True)):
            made[rows[k]].append(pair)
            if pair[0] not in stops:
                alive.append(k)
        if not alive:
            break
        if len(alive) < len(rows):
            index = torch.tensor(alive, device=mask.device)
            cache.batch_select_indices(index)
            mask, tokens = mask[index], tokens[index]
            rows = [rows[k] for k in alive]
        mask = F.pad(mask, (0, 1), value=1)
        ids = tokens[:, None]
    return made


class LocalRollout:
    """Samples with the actor itself."""

    def __init__(self, actor, stops):
        self.actor = actor
        self.stops = stops

    def sync(self, step):
        """Do nothing: it is the actor."""

    @torch.no_grad()
    def generate(self, prompts, max_tokens, uniforms=None):
        """Return [[(token, log-probability), ...], ...] for prompts (lists of ids): up to and with the end token.

        uniforms [B, max_tokens] in [0, 1) decide what is drawn; without them the likeliest token is taken. A response
        without an end token was cut at max_tokens. Prompts of like length are answered together.
        """
        made = {}
        lengths = [len(prompt) for prompt in prompts]
        layers = [module for module in self.actor.modules() if isinstance(module, FSDPModule)][1:]

        def function(actor):
            for layer in layers:  # whole meanwhile, as ranks decode unequally long
                layer.unshard()
                layer.set_reshard_after_forward(False)
            for rows in split_by_tokens(lengths, ROWS_AT_ONCE * max(lengths, default=0), shortest=0.5):
                drawn = None if uniforms is None else torch.as_tensor(uniforms[rows], device=actor.model.device)
                answers = decode(actor, [prompts[row] for row in rows], max_tokens, drawn, self.stops)
                made.update(zip(rows, answers, strict=True))
            for layer in layers:
                layer.set_reshard_after_forward(True)
                layer.reshard()

        self.actor(function)
        return [made[row] for row in range(len(prompts))]


def serve_command(base, lora_r, dtype):
    """Return the command that starts a vLLM server for this run."""
    rank = min(size for size in (8, 16, 32, 64, 128, 256) if size >= lora_r)
    return (
        f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve {base} --enable-lora --max-lora-rank {rank} --max-loras 2 "
        f"--logprobs-mode processed_logprobs --generation-config vllm --dtype {dtype}"
    )


class ServerRollout:
    """Samples on vLLM servers, to which each step's adapter goes as a folder under a name of its own.

    A name that came back with other weights would meet the old ones in vLLM's prefix cache. A server that is gone has
    some minutes to come back, and is given the adapter again. Ranks share the servers out.
    """

    def __init__(self, actor, stops, urls, folder, padding):
        self.actor = actor
        self.urls = urls
        self.folder = folder
        self.name = ""
        self.sampling = {
            "temperature": actor.temperature,
            "top_p": 1.0,
            "top_k": -1,
            "repetition_penalty": 1.0,
            "logprobs": 0,
            "return_token_ids": True,
            "stop_token_ids": stops,
            "logit_bias": dict.fromkeys(padding, -100.0),  # ids that the tokenizer lacks
        }
        retries = urllib3.Retry(
            RETRIES,
            read=2,
            backoff_factor=1,
            status_forcelist=[500, 502, 503],
            allowed_methods=None,
        )
        self.pool = urllib3.PoolManager(maxsize=ROWS_AT_ONCE, retries=retries, timeout=PATIENCE)

    def post(self, url, path, **body):
        """Return (status, text) of a server's answer, asked again for some minutes where there is none."""
        try:
            answer = self.pool.request("POST", url + path, json=body)
            return answer.status, answer.data.decode()
        except urllib3.exceptions.HTTPError as error:
            raise ValueError(
                f"--rollout_urls {url}: no answer ({error!s:.300}). Start the server again; the same command then goes "
                "on from the last checkpoint"
            ) from error

    def load(self, url):
        """Give a server the adapter of now."""
        status, text = self.post(
            url,
            "/v1/load_lora_adapter",
            lora_name=self.name,
            lora_path=str((self.folder / self.name).resolve()),
        )
        if status != 200 and "already" not in text:
            model = self.actor.model
            rank, dtype = model.peft_config["default"].r, str(self.actor.dtype).removeprefix("torch.")
            command = serve_command(model.name_or_path, rank, dtype)
            raise ValueError(f"--rollout_urls {url}: it takes no adapter: {text:.500}. Start it with\n  {command}")

    def sync(self, step):
        """Write the actor of now as a new adapter, and give it to the servers in place of the one before."""
        old = self.name
        self.name = gather_object([f"step-{step}-{time.time_ns()}"])[0]
        if PartialState().is_main_process:
            for url in self.urls if old else []:
                self.post(url, "/v1/unload_lora_adapter", lora_name=old)
            shutil.rmtree(self.folder, ignore_errors=True)  # nobody samples now
            save_actor(self.actor, self.folder / self.name)
            for url in self.urls:
                self.load(url)
        PartialState().wait_for_everyone()

    def generate(self, prompts, max_tokens, uniforms=None):
        """Return what LocalRollout.generate does; here uniforms give each sequence its seed."""

        def ask(i):
            url = self.urls[(PartialState().process_index + i) % len(self.urls)]
            body = self.sampling | {
                "model": self.name,
                "prompt": prompts[i],
                "max_tokens": max_tokens,
            }
            if uniforms is None:
                body["temperature"] = 0.0
            else:
                body["seed"] = int(uniforms[i, 0] * 2**31)
            status, text = self.post(url, "/v1/completions", **body)
            if status == 404:  # it was started again, and does not know the adapter
                self.load(url)
                status, text = self.post(url, "/v1/completions", **body)
            try:
                choice = json.loads(text)["choices"][0]
                return list(zip(choice["token_ids"], choice["logprobs"]["token_logprobs"], strict=True))
            except Exception as error:  # it refused, or is no vLLM, or one too old to say the tokens' ids
                raise ValueError(f"--rollout_urls {url}: {error!r}; it answered {status}, {text:.500}") from error

        with ThreadPoolExecutor(ROWS_AT_ONCE) as pool:
            return list(pool.map(ask, range(len(prompts))))


# -----------------------------------------------------------------------------
# batches: who processes what


def split_by_tokens(lengths, max_tokens, shortest=0.75):
    """Return the row numbers of each micro-batch: rows sorted by length, longest first, at most max_tokens padded.

    A row longer than that stands alone. Eight rows or more take none in that is shorter than `shortest` of their first.
    """
    parts = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        part = parts[-1] if parts else []
        longest = lengths[part[0]] if part else 0
        too_short = len(part) >= 8 and lengths[i] < shortest * longest
        if not part or too_short or (len(part) + 1) * longest > max_tokens:
            parts.append([])
        parts[-1].append(i)
    return parts


def plan_batches(lengths, mini_batch_size, max_tokens, ranks):
    """Return [(rows of a mini-batch, this rank's micro-batches of it)], all as row numbers.

    Mini-batches are consecutive rows, the same for any number of ranks and any max_tokens. Each is dealt out by length,
    and cut at the same places for every rank: sharded models need equally many micro-batches. The last may be empty.
    """
    plan = []
    for start in range(0, len(lengths), mini_batch_size):
        rows = list(range(start, start + mini_batch_size))
        order = sorted(rows, key=lambda row: -lengths[row])
        parts = []
        mine = order[ranks.process_index :: ranks.num_processes]
        for deals in split_by_tokens([lengths[row] for row in order[:: ranks.num_processes]], max_tokens):
            parts.append([mine[deal] for deal in deals if deal < len(mine)])
        plan.append((rows, parts))
    return plan


def micro_batch(batch, part):
    """Return the rows `part` of the batch, no wider than they are; of an empty part a row that does not count."""
    rows = part or [0]
    longest = batch["mask"][rows].nonzero()[:, 1].max() + 1
    micro = {name: tensor[rows, :longest] for name, tensor in batch.items()}
    micro["mask"] = micro["mask"] & bool(part)
    return micro


def roll_out(
    rollout,
    problems,
    uniforms,
    reward_fn,
    tokenizer,
    max_response_length,
):
    """Answer and score problems; return the global batch on every rank, [B, T] tensors of right-padded rows.

    A row is a prompt and its response. input_ids; mask: True on response tokens; rollout_logprobs of these, as they
    were sampled; token_level_scores: the reward, at the last token. uniforms [B, max_response_length]: see generate.
    """
    ranks = PartialState()
    mine = list(range(ranks.process_index, len(problems), ranks.num_processes))
    prompts = [problems[i]["prompt"] for i in mine]
    answers = rollout.generate(prompts, max_response_length, None if uniforms is None else uniforms[mine])
    own = {}
    rows = {}
    batch = {}
    for i, prompt, answer in zip(mine, prompts, answers, strict=True):
        tokens, logprobs = zip(*answer, strict=True)
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        score = score_response(reward_fn, problems[i], text)
        own[i] = {
            "input_ids": [*prompt, *tokens],
            "mask": [False] * len(prompt) + [True] * len(tokens),
            "rollout_logprobs": [0.0] * len(prompt) + [*logprobs],
            "token_level_scores": [0.0] * (len(prompt) + len(tokens) - 1) + [score],
        }
    for part in gather_object([own]):
        rows |= part
    for name in rows[0]:
        column = [torch.tensor(rows[i][name]) for i in range(len(problems))]
        batch[name] = pad_sequence(column, batch_first=True).to(rollout.actor.model.device)
    return batch


@torch.no_grad()
def forward_all(batch, plan, role, function, *args):
    """Return what role(function, micro-batch, *args) returns, [outputs, B, T], of the global batch on every rank."""
    found = 0
    for _, parts in plan:
        for part in parts:
            outputs = torch.stack(role(function, micro_batch(batch, part), *args))
            padded = outputs.new_zeros(len(outputs), *batch["mask"].shape)
            padded[:, part or [0], : outputs.shape[-1]] = outputs
            found = found + padded
    return reduce(found, "sum")


def optimizer_step(optimizer, parameters):
    """Add up the ranks' gradients, clip their norm to 1, and step; returns the norm before, the same on every rank.

    Where it is not finite, no rank steps.
    """
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        if isinstance(p, DTensor):
            p.grad *= PartialState().num_processes  # FSDP2 has taken the mean
        else:
            p.grad = reduce(p.grad, "sum")
    norm = whole(torch.nn.utils.clip_grad_norm_(parameters, 1.0)).item()
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return norm


def update(
    role,
    optimizer,
    batch,
    plan,
    flags,
    micro_loss,
):
    """Do PPO's epochs over the mini-batches of `plan`, an optimizer step each, and return their metrics.

    micro_loss(role, micro-batch, flags, num_tokens=, num_sequences=, horizon=) returns its share of the mini-batch's
    loss, and metrics as actor_loss does. They become means over all tokens, losses means over mini-batches.
    """
    parameters = optimizer.param_groups[0]["params"]
    steps = flags["ppo_epochs"] * len(plan)
    sums = {}
    norms = []
    role.train()  # recomputes activations if it is to; there is no dropout
    for rows, parts in plan * flags["ppo_epochs"]:
        counts = {
            "num_tokens": int(batch["mask"][rows].sum()),
            "num_sequences": len(rows),
            "horizon": flags["max_response_length"],
        }
        for part in parts:
            micro = micro_batch(batch, part)
            loss, metrics = micro_loss(role, micro, flags, **counts)
            loss.backward()
            for name, value in metrics.items():
                if value.dim():  # of tokens
                    value = (value * micro["mask"]).sum() / batch["mask"].sum() * len(plan)
                sums[name] = sums.get(name, 0.0) + value.detach().double() / steps
        norms.append(optimizer_step(optimizer, parameters))
    role.eval()
    finite = [norm for norm in norms if math.isfinite(norm)]
    if not finite:
        raise ValueError("no mini-batch of this step had a finite gradient: lower the learning rates")
    sums = dict(zip(sums, reduce(torch.stack([*sums.values()]), "sum").tolist(), strict=True))
    return sums | {"grad_norm": sum(finite) / len(finite), "skipped_updates": steps - len(finite)}


# -----------------------------------------------------------------------------
# build, validate, save, resume


def load_policy(base, dtype, lora_weights, flags):
    """Return a model with the adapter of lora_weights, or a new one; with --lora_r 0 without, the adapter merged."""
    import peft

    try:
        model, info = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, output_loading_info=True)
        if info["missing_keys"]:
            raise ValueError(f"there is no {', '.join(sorted(info['missing_keys']))}")
        probe = torch.tensor([[1]])
        logits = model.get_output_embeddings()(model.get_decoder()(probe)[0])
        if (model(probe).logits - logits).abs().max() > 0.01:
            raise ValueError("it caps or scales its logits, as Gemma 2, Granite and Cohere do: this is not done here")
        if lora_weights:
            model = peft.PeftModel.from_pretrained(model, lora_weights)
    except Exception as error:  # of transformers, peft and safetensors
        raise ValueError(f"--base_model {base}, --lora_weights {lora_weights}: {error!s:.500}") from error
    if flags["lora_r"] and not lora_weights:
        lora = peft.LoraConfig(
            task_type="CAUSAL_LM",
            target_modules="all-linear",
            r=flags["lora_r"],
            lora_alpha=flags["lora_alpha"],
        )
        model = peft.get_peft_model(model, lora)
    if lora_weights and not flags["lora_r"]:
        model = model.merge_and_unload()
    if flags["activation_checkpointing"]:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def load_roles(
    names,
    base,
    dtype,
    device,
    lora_weights,
    flags,
    vocab_size,
):
    """Return {name: Role}: with LoRA one base with adapters, with --lora_r 0 a model each.

    An adapter in lora_weights is what actor and critic start from, and the reference. In full fine-tuning what is
    trained is float32, and FSDP2 shards every model over the ranks.
    """
    roles = {}
    full = not flags["lora_r"]
    for name in names:
        if full or name == "actor":
            model = load_policy(base, torch.float32 if full and name != "reference" else dtype, lora_weights, flags)
        elif lora_weights:
            model.load_adapter(lora_weights, name, is_trainable=name == "critic")
        elif name == "critic":
            model.add_adapter(name, model.peft_config["default"])
        adapter = "default" if name == "actor" else name
        role = Role(model, "" if full else adapter, dtype, flags["temperature"], vocab_size)
        if name == "critic":
            role.value_head = torch.nn.Linear(model.config.get_text_config().hidden_size, 1)
            for p in role.value_head.parameters():
                torch.nn.init.zeros_(p)  # a random head would begin with values of +-10
        for module in model.modules():  # no dropout: what samples, what is compared and what is trained are one
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            for key, value in vars(module).items():
                if "dropout" in key and type(value) is float:
                    setattr(module, key, 0.0)
        if full and PartialState().num_processes > 1:
            for layer in model.get_decoder().layers:
                fully_shard(layer)
            fully_shard(role)
        roles[name] = role.to(device).eval()
    return roles


def make_optimizer(role):
    """Return AdamW over what a role trains, its state made, and the tensors of both, by name, for checkpoints."""
    trained = {}
    tensors = {}
    for name, p in role.named_parameters():
        if not role.adapter or f".{role.adapter}." in f"{name}." or "value_head" in name:
            trained[name] = p.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained.values())
    for name, p in trained.items():
        optimizer.state[p] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
        tensors[name] = {"value": p.data} | optimizer.state[p]
    return optimizer, tensors


def whole(tensor):
    """Return a tensor that may be sharded over the ranks whole; every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def validate(rollout, problems, reward_fn, tokenizer, max_response_length):
    """Answer every problem greedily; return (metrics under verl's names, the generations) on every rank."""
    batch = roll_out(rollout, problems, None, reward_fn, tokenizer, max_response_length)
    rows = []
    scores = {}
    metrics = {}
    for i, problem in enumerate(problems):
        rows.append(
            {
                "prompt": tokenizer.decode(problem["prompt"]),
                "response": tokenizer.decode(batch["input_ids"][i][batch["mask"][i]], skip_special_tokens=True),
                "ground_truth": problem["ground_truth"],
                "score": batch["token_level_scores"][i].sum().item(),
            }
        )
        scores.setdefault(problem["data_source"], []).append(rows[-1]["score"])
    for source, found in scores.items():
        metrics[f"val-core/{source}/reward/mean@1"] = sum(found) / len(found)
    return metrics, rows


def save_actor(actor, folder):
    """Write the actor as PEFT and vLLM load it: an adapter, or a whole model. If it is sharded, every rank must ask."""
    is_main_process = PartialState().is_main_process
    if not actor.adapter:
        weights = {name: whole(p.data) for name, p in actor.model.named_parameters()}  # what is tied once
        if is_main_process:
            actor.model.save_pretrained(folder, state_dict=weights)
    elif is_main_process:
        actor.model.save_pretrained(
            folder,
            selected_adapters=["default"],
            save_embedding_layers=False,
        )


def list_checkpoints(out):
    """Return the steps of the checkpoints in a folder, ascending; without .incomplete in its name one is whole."""
    return sorted(int(path.name[11:]) for path in out.glob("checkpoint-*[0-9]"))


def save_checkpoint(out, step, tensors, actor, is_main_process):
    """Write checkpoint-N: what is trained and the optimizers, and adapter/. The last two stay. Every rank must ask."""
    partial = out / f"checkpoint-{step}.incomplete"
    if is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    PartialState().wait_for_everyone()
    try:
        distributed_checkpoint.save(tensors, checkpoint_id=partial)
    except distributed_checkpoint.CheckpointException as error:  # it wraps Ctrl-C and a full disk alike
        raise KeyboardInterrupt(f"in {partial}: {str(error)[-300:]}") from None
    if is_main_process:
        if actor.adapter:
            save_actor(actor, partial / "adapter")
        partial.rename(out / f"checkpoint-{step}")
        for old in list_checkpoints(out)[:-2]:
            shutil.rmtree(out / f"checkpoint-{old}")


def find_start(out, flags):
    """Return the step to start at: 1, or the one after the last checkpoint in `out`, of a run with the same flags."""
    steps = list_checkpoints(out)
    if flags["overwrite"] or not (steps or (out / "curves.png").exists()):
        return 1
    before = json.loads((out / "run.json").read_text("utf-8"))["flags"]
    changed = {name for name in flags.keys() - FREE if flags[name] != before.get(name)}
    if changed or not steps:
        raise ValueError(f"--output_dir {out} holds another run {changed or ''}: --overwrite, or another folder")
    return steps[-1] + 1


def load_config_and_tokenizer(base, lora_weights):
    """Return (config, tokenizer, ids that end an answer) of a model; the latter two of the adapter if it carries them.

    The ids are those of its generation config, and the tokenizer's own.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    carrier = lora_weights if Path(f"{lora_weights}/tokenizer_config.json").exists() else base
    try:
        config = transformers.AutoConfig.from_pretrained(base).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(carrier)
        tokenizer.get_chat_template()  # an error where there is none: python finetune.py gives an adapter one
        stops = tokenizer.eos_token_id
        with contextlib.suppress(OSError):  # there may be no generation_config.json
            stops = GenerationConfig.from_pretrained(carrier).eos_token_id
    except Exception as error:  # of transformers
        raise ValueError(f"--base_model {base}, --lora_weights {lora_weights}: {error!s:.500}") from error
    stops = {tokenizer.eos_token_id, *np.atleast_1d(stops).tolist()} - {None}  # it may be one id, or several
    if not stops:
        raise ValueError(f"{carrier}: no response would ever end: set eos_token in its tokenizer_config.json")
    return config, tokenizer, sorted(stops)


def open_log(out, first, run):
    """Make the files of a run that starts at step `first`; return (the log's records so far, a function that adds one).

    Of what an earlier run logged after its last checkpoint, and of a line that it was killed in, nothing stays.
    """
    if first == 1:
        for path in [*out.glob("checkpoint-*"), *out.glob("tensorboard"), *out.glob("val_generations")]:
            shutil.rmtree(path)
    (out / "val_generations").mkdir(parents=True, exist_ok=True)
    path = out / "log.jsonl"
    records = []
    for line in path.read_text("utf-8").split("\n")[:-1] if first > 1 else []:
        record = json.loads(line)
        if record["training/global_step"] < first:
            records.append(record)
    partial = out / "log.jsonl.incomplete"
    write_jsonl(partial, records)
    partial.rename(path)
    write_json(out / "run.json", run)
    board = SummaryWriter(str(out / "tensorboard"), purge_step=first)

    def write(record):
        records.append(record)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        for name, value in record.items():
            board.add_scalar(name, value, record["training/global_step"])
        board.flush()

    return records, write


def plot_curves(records, path):
    """Draw the metrics of log records that say how a run went, in one picture."""
    names = [name for name in records[-1] if re.search(PLOTTED, name)]
    figure = Figure(figsize=(4 * len(names), 3), layout="constrained")
    for k, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), k + 1, title=name, xlabel="step")
        points = [(record["training/global_step"], record[name]) for record in records if name in record]
        axes.plot(*zip(*points, strict=True), ".-")
    figure.savefig(path)


def batch_metrics(batch, max_response_length):
    """Return what the step's samples were like, over the global batch, under verl's names."""
    mask = batch["mask"]
    lengths = mask.sum(-1).float()
    diff = (batch["rollout_logprobs"].exp() - batch["old_logprobs"].exp()).abs()[mask]
    metrics = {
        "response_length/clip_ratio": (lengths == max_response_length).float().mean().item(),
        "actor/entropy": masked_mean(batch["entropy"], mask).item(),
        "training/rollout_probs_diff_mean": diff.mean().item(),
        "training/rollout_probs_diff_max": diff.max().item(),
    }
    samples = {
        "critic/score": batch["token_level_scores"].sum(-1),
        "critic/advantages": batch["advantages"][mask],
        "critic/returns": batch["returns"][mask],
        "response_length": lengths,
    }
    if "values" in batch:
        samples["critic/values"] = batch["values"][mask]
        metrics["critic/vf_explained_var"] = explained_variance(batch["values"], batch["returns"], mask)
    for name, x in samples.items():
        for kind in ("mean", "max", "min"):
            metrics[f"{name}/{kind}"] = getattr(x, kind)().item()
    return metrics


def check_flags(flags):
    """Refuse flags that cannot be, or that contradict each other."""
    for name, value in flags.items():
        if type(value) in (int, float) and not (value > 0 or value == 0 and name not in ABOVE_ZERO):
            raise ValueError(f"--{name} {value}: it must be {'above' if name in ABOVE_ZERO else 'at least'} 0")
    for name, known in CHOICES.items():
        if flags[name] not in known:
            raise ValueError(f"--{name} {flags[name]}: one of {', '.join(known)}")
    if flags["train_batch_size"] % flags["ppo_mini_batch_size"]:
        raise ValueError("--train_batch_size must be a multiple of --ppo_mini_batch_size")
    if flags["adv_estimator"] in ("grpo", "rloo") and flags["rollout_n"] < 2:
        raise ValueError("--adv_estimator grpo and rloo compare responses to one prompt: --rollout_n 2 or more")
    if flags["rollout_urls"] and not flags["lora_r"]:
        raise ValueError("--rollout_urls: with --lora_r 0 there is no adapter to give to a server")


def train_ppo(
    *,
    base_model: str = "",
    lora_weights: str = "",
    train_files: str = "",
    val_files: str = "",
    output_dir: str = "out/ppo_gsm8k",
    # rollouts
    train_batch_size: int = 128,
    rollout_n: int = 1,
    rollout_urls: str = "",
    max_prompt_length: int = 512,
    max_response_length: int = 512,
    temperature: float = 1.0,
    # reward and advantages
    reward: str = "strict",
    adv_estimator: str = "gae",
    gamma: float = 1.0,
    lam: float = 1.0,
    kl_coef: float = 0.001,
    # update
    ppo_mini_batch_size: int = 32,
    ppo_epochs: int = 1,
    ppo_max_tokens: int = 16384,
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.2,
    loss_agg_mode: str = "token-mean",
    entropy_coeff: float = 0.0,
    kl_loss_coef: float = 0.0,
    actor_lr: float = 0.0,
    critic_lr: float = 0.0,
    lr_scheduler_type: str = "linear",
    # model
    lora_r: int = 16,
    lora_alpha: int = 32,
    dtype: str = "auto",
    activation_checkpointing: bool = False,
    # run
    total_epochs: float = 3.0,
    total_training_steps: int = 0,
    test_freq: int = 10,
    save_freq: int = 1,
    overwrite: bool = False,
    seed: int = 42,
):
    """Train a policy with PPO on problems whose answers a function can check.

    Without any flag it goes on from out/few, the embedded model after few demonstrations, in minutes on a laptop's CPU.
    A run that was stopped goes on when the same command is given again.

    Args:
        base_model: hub id or folder of the model.
        lora_weights: folder of a LoRA adapter. Empty: the base model alone.
        train_files: data file with verl's rows (data/gsm8k.py) or question and answer.
        val_files: the same, to validate on. Empty: none, or the embedded problems.
        output_dir: where everything of this run is written.
        train_batch_size: prompts of a step, over all ranks.
        rollout_n: responses sampled to each prompt.
        rollout_urls: vLLM servers that sample, as http://one:8000,http://two:8000. Empty: the model itself does.
        max_prompt_length: longest prompt, in tokens; longer ones are left out, and counted.
        max_response_length: longest response, in tokens; what is not finished by then is cut, and counted.
        temperature: of sampling; log-probabilities are those at this temperature. Validation is greedy.
        reward: strict or flexible, as verl scores GSM8K, or path/to/file.py:function with verl's arguments.
        adv_estimator: gae, with a critic; or grpo, rloo, reinforce_plus_plus, without one.
        gamma: discount of later rewards.
        lam: lambda of generalized advantage estimation; 1 for no bias, less for less variance.
        kl_coef: weight of the KL to the starting policy that is taken off each token's reward; 0 for none.
        ppo_mini_batch_size: prompts of an optimizer step, over all ranks.
        ppo_epochs: times that a batch is learned from.
        ppo_max_tokens: tokens that one device processes at a time in forward and backward passes.
        clip_ratio_low: the probability ratio is clipped at 1 minus this.
        clip_ratio_high: the probability ratio is clipped at 1 plus this.
        loss_agg_mode: token-mean, seq-mean-token-sum, seq-mean-token-mean or seq-mean-token-sum-norm.
        entropy_coeff: weight of an entropy bonus; 0 for none.
        kl_loss_coef: weight of the KL to the starting policy as a loss; 0 for none.
        actor_lr: first learning rate of the actor; 0 for one that fits the model's family and hidden size.
        critic_lr: the same, of the critic.
        lr_scheduler_type: linear, down to 0 over the run, or constant.
        lora_r: rank of a new adapter (--lora_weights keep theirs); 0 trains all weights, sharded over the ranks.
        lora_alpha: a new adapter is scaled by lora_alpha / lora_r.
        dtype: of the base weights: auto (bfloat16 on a GPU that has it, else float32), bfloat16 or float32.
        activation_checkpointing: recompute activations in the backward pass: less memory, about a third slower.
        total_epochs: passes over the training rows.
        total_training_steps: stop after so many steps; 0 for --total_epochs.
        test_freq: validate every so many steps, and before the first and after the last.
        save_freq: write a checkpoint every so many steps and at the end; 0 for the end alone.
        overwrite: replace what an earlier run left in --output_dir.
        seed: of everything random.
    """
    flags = dict(locals())

    # 1. check flags
    check_flags(flags)
    reward_fn = load_reward(reward)
    out = Path(output_dir)
    if not base_model:
        base_model, lora_weights = f"{TINY}/model", lora_weights or "out/few/adapter"
    if lora_weights and not Path(lora_weights, "adapter_model.safetensors").exists():
        raise ValueError(f"--lora_weights {lora_weights}: no adapter_model.safetensors; the default is made by {START}")
    if not train_files:
        train_files, val_files = f"{TINY}/train.jsonl", val_files or f"{TINY}/test.jsonl"
    if dtype == "auto":
        has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if has_bf16 else "float32"
    warnings.filterwarnings("error", message="Found missing adapter keys")  # an adapter of another base
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing|torch.distributed is disabled")

    # 2. tokenizer, problems
    config, tokenizer, stops = load_config_and_tokenizer(base_model, lora_weights)
    if config.hidden_size < 512 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # a small model gains little from a second thread, and waits for it on a busy machine
    train_set, left_out = read_problems(train_files, tokenizer, max_prompt_length)
    val_set, val_left_out = read_problems(val_files, tokenizer, max_prompt_length) if val_files else ([], 0)
    longest = max(len(problem["prompt"]) for problem in train_set + val_set)
    if longest + max_response_length > config.max_position_embeddings:
        raise ValueError(
            f"--max_response_length {max_response_length} after a prompt of {longest} tokens is more than the "
            f"{config.max_position_embeddings} positions of the model: shorten it, or --max_prompt_length"
        )

    # 3. what is used, and where to start
    total_steps = total_training_steps or math.ceil(total_epochs * len(train_set) / train_batch_size)
    start = Path(train_files).read_bytes()
    if lora_weights:
        start += Path(lora_weights, "adapter_model.safetensors").read_bytes()
    flags |= {
        "base_model": base_model,
        "lora_weights": lora_weights,
        "dtype": dtype,
        "actor_lr": actor_lr or default_learning_rate(config) / 7,
        "critic_lr": critic_lr or default_learning_rate(config) / 4,
        "schedule_steps": 0 if lr_scheduler_type == "constant" else total_steps,
        "sha256": hashlib.sha256(start).hexdigest(),
    }
    first = find_start(out, flags)

    # 4. processes, roles, rollout engine
    ranks = PartialState(cpu=not torch.accelerator.is_available())
    set_seed(seed)
    vocab_size = len(tokenizer)
    names = ["actor"] + ["critic"] * (adv_estimator == "gae") + ["reference"] * bool(kl_coef or kl_loss_coef)
    roles = load_roles(names, base_model, getattr(torch, dtype), ranks.device, lora_weights, flags, vocab_size)
    actor = roles["actor"]
    optimizers = {}
    tensors = {}
    losses = {"critic": critic_loss, "actor": actor_loss}
    for name in losses:
        if name in roles:
            optimizers[name], tensors[name] = make_optimizer(roles[name])
    if first > 1:
        distributed_checkpoint.load(tensors, checkpoint_id=out / f"checkpoint-{first - 1}")
    rollout = LocalRollout(actor, stops)
    if rollout_urls:
        padding = range(vocab_size, config.vocab_size)
        rollout = ServerRollout(actor, stops, rollout_urls.split(","), out / "rollout", padding)
        rollout.sync(first - 1)

    # 5. say what will happen
    per_step = train_batch_size * rollout_n
    run = {
        "status": "running",
        "flags": flags,
        "counts": {"train": len(train_set), "val": len(val_set), "left_out": left_out + val_left_out},
        "git": subprocess.getoutput(f"git -C '{HERE}' describe --always --dirty"),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    records, write = open_log(out, first, run) if ranks.is_main_process else ([], lambda record: None)
    ranks.print(f"ppo_gsm8k.py  {base_model} + {lora_weights or 'nothing'} -> {out}, {ranks.num_processes} x {dtype}")
    ranks.print(f"  data        {train_files}, {val_files or 'no validation'}: {run['counts']}")
    ranks.print(
        f"  batch       {per_step} = {train_batch_size} x {rollout_n}, in mini-batches of {ppo_mini_batch_size} prompts"
    )
    ranks.print(f"  steps       {first} to {total_steps}, at {flags['actor_lr']:.2e}, critic {flags['critic_lr']:.2e}")

    def validation(step):
        metrics, rows = validate(rollout, val_set, reward_fn, tokenizer, max_response_length)
        ranks.print(f"step {step:05d}/{total_steps:05d} | {metrics}")
        if ranks.is_main_process:
            write_jsonl(out / "val_generations" / f"step-{step:05d}.jsonl", rows)
        return metrics

    # 6. train
    try:
        if first == 1 and val_set:
            write({"training/global_step": 0} | validation(0))
        for step in range(first, total_steps + 1):
            metrics, started = {"training/global_step": step}, time.perf_counter()

            # 6.1 sample and score: a batch of problems, rollout_n times each; every rank then knows the whole batch
            picked = rows_of_step(step, len(train_set), train_batch_size, seed)
            problems = [train_set[i] for i in picked for _ in range(rollout_n)]
            uniforms = np.random.default_rng([seed, 2, step]).random((per_step, max_response_length), np.float32)
            batch = roll_out(rollout, problems, uniforms, reward_fn, tokenizer, max_response_length)
            metrics["timing_s/gen"] = time.perf_counter() - started
            mask = batch["mask"]
            lengths = [int(row.nonzero().max()) + 1 for row in mask]
            plan = plan_batches(lengths, ppo_mini_batch_size * rollout_n, ppo_max_tokens, ranks)

            # 6.2 log-probabilities and values before the update
            batch["old_logprobs"], batch["entropy"] = forward_all(batch, plan, actor, response_logprobs, True)
            off = masked_mean((batch["rollout_logprobs"] - batch["old_logprobs"]).abs(), mask)
            if off > 0.05:  # bfloat16 there and float32 here: 0.002
                raise ValueError(
                    f"--rollout_urls {rollout_urls}: it serves another base: log-probabilities are {off:.3f} off"
                )
            if "reference" in roles:
                batch["ref_logprobs"], _ = forward_all(batch, plan, roles["reference"], response_logprobs)
            if "critic" in roles:
                (batch["values"],) = forward_all(batch, plan, roles["critic"], response_values)

            # 6.3 advantages, over the global batch
            kl = 0.0
            if kl_coef:
                kl = (batch["old_logprobs"] - batch["ref_logprobs"]) * mask
                metrics["actor/reward_kl_penalty"] = (kl.sum(-1) / mask.sum(-1)).mean().item()
            batch["token_level_rewards"] = batch["token_level_scores"] - kl_coef * kl
            batch["advantages"], batch["returns"] = compute_advantages(batch, adv_estimator, rollout_n, gamma, lam)

            # 6.4 update
            for name in optimizers:
                lr = flags[f"{name}_lr"]
                if lr_scheduler_type == "linear":
                    lr *= 1 - (step - 1) / total_steps
                optimizers[name].param_groups[0]["lr"] = lr
                found = update(roles[name], optimizers[name], batch, plan, flags, losses[name]) | {"lr": lr}
                metrics |= {f"{name}/{key}": value for key, value in found.items()}
            rollout.sync(step)

            # 6.5 validation, log, checkpoint
            metrics |= batch_metrics(batch, max_response_length)
            metrics["timing_s/step"] = time.perf_counter() - started
            metrics["perf/throughput"] = sum(lengths) / metrics["timing_s/step"] / ranks.num_processes
            if torch.cuda.is_available():
                metrics["perf/max_memory_allocated_gb"] = torch.cuda.max_memory_allocated() / 2**30
            if val_set and (step == total_steps or step % test_freq == 0):
                metrics |= validation(step)
            write(metrics)
            ranks.print(
                f"step {step:05d}/{total_steps:05d} | score {metrics['critic/score/mean']:.3f} | "
                f"kl {metrics.get('actor/reward_kl_penalty', 0):.4f} | entropy {metrics['actor/entropy']:.3f} | "
                f"length {metrics['response_length/mean']:.0f} | {metrics['timing_s/step']:.1f} s"
            )
            if step == total_steps or save_freq and step % save_freq == 0:
                save_checkpoint(out, step, tensors, actor, ranks.is_main_process)
    except KeyboardInterrupt as error:
        ranks.print(f"\ninterrupted {error}; the same command, without --overwrite, goes on from the last checkpoint")
        sys.exit(130)

    # 7. the actor, plots, the summary
    target, partial = out / ("adapter" if lora_r else "model"), out / "actor.incomplete"
    save_actor(actor, partial)
    if ranks.is_main_process:
        tokenizer.save_pretrained(partial)
        GenerationConfig(eos_token_id=stops).save_pretrained(partial)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        plot_curves(records, out / "curves.png")
        write_json(out / "run.json", run | {"status": "finished", "results": records[-1]})
        ranks.print(f"wrote {target}\nNext: python generate.py --{'lora_weights' if lora_r else 'base_model'} {target}")
    ranks.destroy_process_group()


if __name__ == "__main__":
    run_cli(train_ppo)
