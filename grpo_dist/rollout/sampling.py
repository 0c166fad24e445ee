"""Sampling by counters alone: the same completion is drawn on whatever rank and in whatever batch it lands.

Each completion owns a 64-bit key made of (seed, step, prompt, sample); the noise of its token at position t is one
uniform number, a hash of (key, t). The token is read off the cumulative distribution at that number, so a step costs
one pass over the vocabulary and no random state exists that a checkpoint would have to hold. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..algorithm.hashing import uniforms
from ..config.schema import RolloutConfig

BLOCK = 128
"""Tokens of the vocabulary whose probabilities are summed at once."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    greedy: bool = False
    """Take the likeliest token; the other fields but the temperature are then without effect."""


def sampling_of(rollout: RolloutConfig) -> Sampling:
    """How a config has completions of a training drawn."""
    return Sampling(rollout.temperature, rollout.top_p, rollout.top_k, rollout.min_p)


def allowed(logprobs: Tensor, sampling: Sampling) -> Tensor | None:
    """Which tokens may be drawn: (B, V) bool, or None for all of them.

    Top-k, top-p and min-p are each judged on the untruncated distribution at the sampling temperature and then
    intersected, so their order does not matter; ties at a threshold are all kept.
    """
    keep = None
    if 0 < sampling.top_k < logprobs.shape[-1]:
        keep = logprobs >= logprobs.topk(sampling.top_k, dim=-1).values[..., -1:]
    if sampling.min_p > 0:
        likely = logprobs.exp() >= sampling.min_p * logprobs.amax(-1, keepdim=True).exp()
        keep = likely if keep is None else keep & likely
    if sampling.top_p < 1:
        ordered, _ = logprobs.sort(dim=-1, descending=True)
        probs = ordered.exp()
        inside = probs.cumsum(-1) - probs < sampling.top_p  # the token that crosses the threshold is kept
        threshold = torch.where(inside, ordered, torch.inf).amin(-1, keepdim=True)
        nucleus = logprobs >= threshold
        keep = nucleus if keep is None else keep & nucleus
    return keep


def draw(logits: Tensor, keys: Tensor, positions: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draw one token per row.

    `logits` (B, V), `keys` and `positions` (B,) int64. Returns token ids (B,) int64 and their log-probabilities (B,)
    float32 under the untruncated distribution at the sampling temperature, which is what the trainer computes too.
    """
    logprobs = torch.log_softmax(logits.float() / sampling.temperature, dim=-1)
    if sampling.greedy:
        tokens = logprobs.argmax(-1)
    else:
        keep = allowed(logprobs, sampling)
        probs = logprobs.exp()
        if keep is not None:
            probs *= keep
        tokens = _inverse_cdf(probs, uniforms(keys, positions))
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


def _inverse_cdf(probs: Tensor, u: Tensor) -> Tensor:
    """The token at which the running sum of unnormalised probabilities (B, V) passes `u` (B,) of its total: (B,) int64.

    Running sums are float64, but only those of blocks and of the one block that is hit exist: one over a large
    vocabulary would be most of what sampling costs. A token of probability 0 is never returned.
    """
    rows, size = probs.shape
    blocks = (pad(probs, (0, -size % BLOCK)) if size % BLOCK else probs).view(rows, -1, BLOCK)
    sums = blocks.sum(-1).double()
    cumulative = sums.cumsum(-1)
    target = u[:, None] * cumulative[:, -1:]
    chosen = _first_above(cumulative, sums, target)
    inside = blocks.gather(1, chosen[..., None].expand(-1, -1, BLOCK))[:, 0].double()
    running = inside.cumsum(-1)
    # as a share of the block, because its sum was rounded in float32
    share = (target - (cumulative - sums).gather(1, chosen)) / sums.gather(1, chosen)
    return (chosen * BLOCK + _first_above(running, inside, share * running[:, -1:]))[:, 0]


def _first_above(cumulative: Tensor, parts: Tensor, target: Tensor) -> Tensor:
    """The first place where the running sum of `parts` (B, K) is above `target` (B, 1), as (B, 1); its part is above 0.

    A target that rounding has put at the total or beyond is answered with the last such part.
    """
    places = torch.arange(parts.shape[1], device=parts.device)
    last = torch.where(parts > 0, places, 0).amax(-1, keepdim=True)
    return torch.minimum(torch.searchsorted(cumulative, target, right=True), last)
