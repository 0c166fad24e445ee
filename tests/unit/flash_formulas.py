"""What the flash kernels compute, written out in torch's operations: their twin where there is no GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _scores(query: Tensor, key: Tensor, call: Any, scale: float) -> tuple[Tensor, Tensor]:
    """Scores (H, T, K) of `query` (T, H, D) and `key` (K, Hk, D) and which of them count (T, K)."""
    queries, keys = call.queries, call.keys
    repeat = query.shape[1] // key.shape[1]
    places = torch.arange(len(query))[:, None], torch.arange(len(key))[None]
    sequence = torch.searchsorted(queries[1:].long(), places[0], right=True)
    # a sequence without keys begins where the next one does
    seen = (places[1] >= keys.long()[sequence]) & (places[1] < keys.long()[sequence + 1])
    # the last query of a sequence sees its last key
    newest = (places[0] - queries.long()[sequence + 1]) + keys.long()[sequence + 1]
    if call.causal:
        seen &= places[1] <= newest
    if call.window is not None:
        seen &= places[1] > newest - call.window
    scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(repeat, 1)) * scale
    return scores.masked_fill(~seen, -torch.inf), seen


def forward(
    query: Tensor, key: Tensor, value: Tensor, call: Any, scale: float
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """`shared_prefix._flash`; a query without keys has an infinite log-sum, as the kernel writes it."""
    assert (call.most_queries, call.most_keys) == (int(call.queries.diff().max()), int(call.keys.diff().max()))
    scores, seen = _scores(query, key, call, scale)
    sums = scores.logsumexp(-1)
    probs = torch.where(seen, (scores - sums[..., None]).exp(), 0.0)
    repeat = query.shape[1] // key.shape[1]
    output = torch.einsum("hqk,khd->qhd", probs, value.repeat_interleave(repeat, 1))
    state = torch.zeros(0)
    return output, torch.where(seen.any(-1), sums, torch.inf), (state, state)


def backward(
    rows: tuple[Tensor, Tensor], result: tuple[Tensor, Tensor], key: Tensor, value: Tensor, call: Any,
    state: list[Tensor], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`shared_prefix._flash_backward` (arXiv:2307.08691, algorithm 2): probabilities from the sums that are given."""
    (grad, query), (output, sums) = rows, result
    scores, seen = _scores(query, key, call, scale)
    probs = torch.where(seen, (scores - sums[..., None]).exp(), 0.0)
    heads, repeat = key.shape[1], query.shape[1] // key.shape[1]
    products = torch.einsum("qhd,khd->hqk", grad, value.repeat_interleave(repeat, 1))
    slope = probs * (products - (grad * output).sum(-1).T[..., None]) * scale
    summed = [torch.einsum("hqk,qhd->khd", weights, x).unflatten(1, (heads, repeat)).sum(2)
              for weights, x in ((slope, query), (probs, grad))]  # fmt: skip
    return torch.einsum("hqk,khd->qhd", slope, key.repeat_interleave(repeat, 1)), summed[0], summed[1]
