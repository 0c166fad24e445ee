"""What the flash kernels compute, written out in torch's operations: their twin where there is no GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def _scores(
    query: Tensor, key: Tensor, queries: Tensor, keys: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Scores (H, T, K) of `query` (T, H, D) and `key` (K, Hk, D) and which of them count (T, K)."""
    repeat = query.shape[1] // key.shape[1]
    places = torch.arange(len(query))[:, None], torch.arange(len(key))[None]
    sequence = torch.searchsorted(queries[1:].long(), places[0], right=True)
    # a sequence without keys begins where the next one does
    seen = (places[1] >= keys.long()[sequence]) & (places[1] < keys.long()[sequence + 1])
    if causal:
        seen &= places[1] <= places[0]
    scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(repeat, 1)) * scale
    return scores.masked_fill(~seen, -torch.inf), seen


def forward(
    query: Tensor, key: Tensor, value: Tensor, queries: Tensor, keys: Tensor, most_queries: int, most_keys: int,
    causal: bool, scale: float,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
    """`shared_prefix._flash`; a query without keys has an infinite log-sum, as the kernel writes it."""
    assert most_queries == int(queries.diff().max()) and most_keys == int(keys.diff().max())
    scores, seen = _scores(query, key, queries, keys, causal, scale)
    sums = scores.logsumexp(-1)
    probs = torch.where(seen, (scores - sums[..., None]).exp(), 0.0)
    repeat = query.shape[1] // key.shape[1]
    output = torch.einsum("hqk,khd->qhd", probs, value.repeat_interleave(repeat, 1))
    state = torch.zeros(0)
    return output, torch.where(seen.any(-1), sums, torch.inf), (state, state)


def backward(
    rows: tuple[Tensor, Tensor], result: tuple[Tensor, Tensor], key: Tensor, value: Tensor, queries: Tensor,
    keys: Tensor, most_queries: int, most_keys: int, causal: bool, state: list[Tensor], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`shared_prefix._flash_backward` (arXiv:2307.08691, algorithm 2): probabilities from the sums that are given."""
    (grad, query), (output, sums) = rows, result
    scores, seen = _scores(query, key, queries, keys, causal, scale)
    probs = torch.where(seen, (scores - sums[..., None]).exp(), 0.0)
    heads, repeat = key.shape[1], query.shape[1] // key.shape[1]
    products = torch.einsum("qhd,khd->hqk", grad, value.repeat_interleave(repeat, 1))
    slope = probs * (products - (grad * output).sum(-1).T[..., None]) * scale
    summed = [torch.einsum("hqk,qhd->khd", weights, x).unflatten(1, (heads, repeat)).sum(2)
              for weights, x in ((slope, query), (probs, grad))]  # fmt: skip
    return torch.einsum("hqk,khd->qhd", slope, key.repeat_interleave(repeat, 1)), summed[0], summed[1]
