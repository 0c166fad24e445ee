"""The gradient of a real step against loops over sequences and tokens: not that runs agree, but that they are right."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import ROOT, completions, metrics, train
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_dist.model.toy import toy_path

REWARD = '''
import json

def steps(completion_ids, log_extra, **columns):
    """One number a token, none at every third; for completions of odd length one number, for one in five none."""
    log_extra("ids", [json.dumps(ids) for ids in completion_ids])
    return [value(ids) for ids in completion_ids]

def value(ids):
    if sum(ids) % 5 == 0:
        return None
    return ids[0] / 7 if len(ids) % 2 else [None if t % 3 == 2 else (i * (t + 1) % 11) / 7 for t, i in enumerate(ids)]
'''
GAMMA, LAMBDA, KL, CRITIC, WEIGHT = 0.9, 0.8, 0.04, 0.3, 0.5
OPTIONS = (
    "--rewards", f'[{{name: math}}, {{name: "own:steps", weight: {WEIGHT}}}]', "--train.num_train_steps", "2",
    "--train.batch_size", "3", "--rollout.group_size", "4", "--train.save_every", "1", "--loss.gamma", str(GAMMA),
    "--loss.kl_coeff", str(KL), "--optim.max_grad_norm", "1e6", "--train.max_tokens_per_pack", "100",
)  # fmt: skip
CRITIC_OPTIONS = (
    "--advantage.baseline", "critic", "--advantage.scale", "batch", "--critic.gae_lambda", str(LAMBDA),
    "--critic.loss_coeff", str(CRITIC), "--critic.learning_rate", "0.05",
)  # fmt: skip
NONE = math.nan


def rewards_of(row: dict[str, Any], ids: list[int]) -> list[float]:
    """The weighted reward of each token, NONE where none was given: an outcome is given at the last."""
    space: dict[str, Any] = {}
    exec(REWARD, space)
    given, last = space["value"](ids), len(ids) - 1
    rewards = [NONE] * len(ids)
    rewards[last] = row["reward/math"]
    for t, number in enumerate(given if isinstance(given, list) else []):
        if number is not None:
            rewards[t] = WEIGHT * number + (rewards[t] if t == last else 0.0)
    if isinstance(given, float):
        rewards[last] += WEIGHT * given
    return rewards


def relative(rewards: list[list[float]], groups: list[int]) -> list[list[float]]:
    """Discounted sums of rewards normalised within their group."""
    result = []
    for own, g in zip(rewards, groups, strict=True):
        pool = torch.tensor([r for each, h in zip(rewards, groups, strict=True) if h == g for r in each if r == r])
        normalised = [0.0 if r != r else float((r - pool.mean()) / (pool.std() + 1e-4)) for r in own]
        result.append([sum(GAMMA ** (k - t) * normalised[k] for k in range(t, len(own))) for t in range(len(own))])
    return result


def generalised(rewards: list[list[float]], values: list[list[float]]) -> list[list[float]]:
    """GAE, token by token; beyond a completion's end lies nothing."""
    result = []
    for own, value in zip(rewards, values, strict=True):
        errors = [(0.0 if r != r else r) + GAMMA * after - before
                  for r, before, after in zip(own, value, [*value[1:], 0.0], strict=True)]  # fmt: skip
        result.append([sum((GAMMA * LAMBDA) ** (k - t) * errors[k] for k in range(t, len(own)))
                       for t in range(len(own))])  # fmt: skip
    return result


def expected_gradient(directory: Path, has_critic: bool) -> dict[str, Tensor]:
    """Gradient of the second step's loss at the first step's checkpoint, one sequence at a time."""
    state = load_file(directory / "checkpoints" / "step_1" / "state.safetensors")
    base = AutoModelForCausalLM.from_pretrained(toy_path(), dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=32, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = state[f"weight/model.{name}"]
    head = [state[f"weight/value_head.{name}"].requires_grad_() for name in ("weight", "bias")] if has_critic else []
    encode = AutoTokenizer.from_pretrained(toy_path()).encode
    rows = [row for row in completions(directory) if row["step"] == 2]
    ids = [json.loads(row["reward/steps/ids"]) for row in rows]
    rewards = [rewards_of(row, own) for row, own in zip(rows, ids, strict=True)]
    scored, references, values = [], [], []
    for row, own in zip(rows, ids, strict=True):
        prompt = encode(row["prompt"])
        output = model(torch.tensor([prompt + own]), output_hidden_states=True)
        with torch.no_grad(), model.disable_adapter():
            plain = model(torch.tensor([prompt + own]))
        places, targets = slice(len(prompt) - 1, -1), torch.tensor(own)[:, None]
        scored.append(torch.log_softmax(output.logits[0, places], -1).gather(-1, targets)[:, 0])
        references.append(torch.log_softmax(plain.logits[0, places], -1).gather(-1, targets)[:, 0])
        if has_critic:
            values.append(output.hidden_states[-1][0, places] @ head[0][0] + head[1])
    if has_critic:
        returns = advantages = generalised(rewards, [value.tolist() for value in values])
        returns = [torch.tensor(a) + value.detach() for a, value in zip(returns, values, strict=True)]
        pool = torch.tensor([a for each in advantages for a in each])
        advantages = [[float((a - pool.mean()) / (pool.std() + 1e-4)) for a in each] for each in advantages]
    else:
        advantages = relative(rewards, [row["group"] for row in rows])
    loss = torch.zeros(())
    for n, logprobs in enumerate(scored):
        ratio = (logprobs - logprobs.detach()).exp()
        gap = references[n] - logprobs
        per_token = -ratio * torch.tensor(advantages[n]) + KL * (gap.exp() - 1 - gap)
        if has_critic:
            per_token = per_token + CRITIC * (values[n] - returns[n]) ** 2 / 2
        loss = loss + per_token.mean() / len(rows)
    assert metrics(directory)[2]["loss"] == pytest.approx(loss.item(), rel=1e-3, abs=1e-5)
    loss.backward()
    gradient = {f"model.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return gradient | {f"value_head.{name}": p.grad for name, p in zip(("weight", "bias"), head, strict=False)}


def taken_gradient(directory: Path) -> dict[str, Tensor]:
    """The gradient that the second step took, out of the means that Adam held before and after it."""
    before, after = (load_file(directory / "checkpoints" / f"step_{n}" / "state.safetensors") for n in (1, 2))
    return {name.removeprefix("exp_avg/"): (after[name] - 0.9 * before[name]) / 0.1
            for name in after if name.startswith("exp_avg/")}  # fmt: skip


@pytest.mark.parametrize(("baseline", "strategy", "num_processes"), [("mean", "ddp", 2), ("critic", None, 1)])
def test_process_rewards(
    baseline: str, strategy: str | None, num_processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.py").write_text(REWARD)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    options = OPTIONS + (CRITIC_OPTIONS if baseline == "critic" else ())
    run = train(strategy, num_processes, tmp_path / "run", *options)
    expected, taken = expected_gradient(run, baseline == "critic"), taken_gradient(run)
    assert taken.keys() == expected.keys() and len(taken) > 10
    for name, gradient in expected.items():
        assert float((taken[name] - gradient).norm()) <= 1e-3 * float(gradient.norm()) + 1e-7, name
        assert float(gradient.norm()) > 0
