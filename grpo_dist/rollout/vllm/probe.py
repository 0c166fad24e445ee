"""The probe: one fixed row, scored by a server and by the trainer after each change of the policy.

A server that samples from other weights than the policy's would train on without a word. It may have an older adapter,
another scaling, another base, or log-probabilities of another kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...model.fixed_row import TOKENS, fixed_ids, fixed_logits
from ..engine import Request
from ..sampling import Sampling
from .messages import Answer, completion_message

STOPS = {"float32": 5e-3, "bfloat16": 0.5}
"""Largest gap (nats) with which a run goes on, by the policy's dtype; the alarm `probe_gap` rings earlier."""
CHANGED = {"float32": 1e-4, "bfloat16": 2e-2}
"""The trainer's scores have changed for certain where one has by more (nats)."""


@dataclass(frozen=True)
class Expected:
    """What the trainer computes for the fixed row."""

    ids: list[int]
    logprobs: list[float]
    """Of each token but the first, at temperature 1 (nats)."""
    next_logprobs: list[float]
    """(V,) of the token after the last one, at the temperature of sampling (nats)."""
    dtype: str
    """The policy's dtype."""


def expected_scores(model: nn.Module, sampling: Sampling, longest: int, dtype: str) -> Expected:
    """The trainer's scores, for servers whose sequences have at most `longest` tokens."""
    most = min(TOKENS, longest - 1)
    ids, logits = fixed_ids(model, most), fixed_logits(model, most)
    rows = torch.log_softmax(logits, -1)
    scores = rows[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
    following = torch.log_softmax(logits[-1] / sampling.temperature, -1)
    return Expected(ids, scores.tolist(), following.tolist(), dtype)


def question(model: str, expected: Expected, sampling: Sampling, end_ids: list[int]) -> dict[str, Any]:
    """The message that asks a server for its scores, and for one token that it samples."""
    request = Request(0, 0, expected.ids, key=0, ignore_end=True)
    return completion_message(model, request, sampling, end_ids, most=1, scores_prompt=True)


def largest_gap(expected: Expected, answer: Answer) -> float:
    """The largest difference of the log-probability of a token of the row, and of the one sampled after it (nats)."""
    pairs = [*zip(expected.logprobs, answer.prompt_logprobs, strict=True),
             (expected.next_logprobs[answer.ids[0]], answer.logprobs[0])]  # fmt: skip
    return max(abs(ours - theirs) for ours, theirs in pairs)


def is_stale(before: tuple[Expected, Answer], now: tuple[Expected, Answer]) -> bool:
    """Whether a server scores the row as before the update, bit for bit, while the trainer's scores have changed."""
    (old, old_answer), (new, answer) = before, now
    moved = max(abs(a - b) for a, b in zip(old.logprobs, new.logprobs, strict=True))
    return moved > CHANGED[new.dtype] and answer.prompt_logprobs == old_answer.prompt_logprobs
