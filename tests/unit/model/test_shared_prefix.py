"""Attention of packs on a GPU, with the kernels' formulas in place of the kernels: equal to
sequences that are computed one by one."""

from __future__ import annotations

import pytest
import torch
from flash_formulas import backward, forward
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpo_dist.model import shared_prefix
from grpo_dist.model.block_attention import block_layout
from grpo_dist.model.layout import AttentionOptions
from grpo_dist.model.shared_prefix import Call, segments, shared_prefix_attention, window_attention, window_of

PIECES = st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(1, 9), max_size=4)), min_size=1, max_size=4)


@pytest.fixture(autouse=True)
def _formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prefix, "_flash", forward)
    monkeypatch.setattr(shared_prefix, "_flash_backward", backward)


def test_formulas_are_softmax_attention() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(5, 1, 4, dtype=torch.float64) for _ in range(3))
    bounds = torch.tensor([0, 2, 5], dtype=torch.int32)
    output, sums, _ = forward(query, key, value, Call(bounds, bounds, 3, 3, causal=True), 0.5)
    mask = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).bool().tril()
    scores = ((query[:, 0] @ key[:, 0].T) * 0.5).masked_fill(~mask, -torch.inf)
    assert torch.allclose(output[:, 0], scores.softmax(-1) @ value[:, 0])
    assert torch.allclose(sums[0], scores.logsumexp(-1))


def dense(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, pieces: list[tuple[int, list[int]]],
    scale: float | None, window: int | None,
) -> Tensor:  # fmt: skip
    """The slow twin: each completion after its prompt as a sequence of its own, one query at a time."""
    repeat, size = query.shape[1] // key.shape[1], query.shape[2]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    rows, start = {}, 0
    for prompt, completions in pieces:
        places, end = list(range(start, start + prompt)), start + prompt
        for own in [[], *(list(range(end + sum(completions[:n]), end + sum(completions[: n + 1])))
                          for n in range(len(completions)))]:  # fmt: skip
            sequence = places + own
            for position, place in enumerate(sequence):
                seen = sequence[max(0, position + 1 - (window or len(sequence))) : position + 1]
                scores = torch.einsum("hd,khd->hk", query[place], key[seen]) * (scale or size**-0.5)
                if sinks is not None:
                    scores = torch.cat([scores, sinks[:, None]], 1)
                rows[place] = torch.einsum("hk,khd->hd", scores.softmax(-1)[:, : len(seen)], value[seen])
        start = end + sum(completions)
    return torch.stack([rows[place] for place in range(start)])


@given(PIECES, st.sampled_from([(2, 2), (4, 2), (3, 1)]), st.sampled_from([None, 0.3]),
       st.sampled_from([None, 1, 2, 3, 7, 12]), st.booleans())  # fmt: skip
@settings(max_examples=25)
def test_equals_every_sequence_alone_and_the_blocks(
    pieces: list[tuple[int, list[int]]], heads: tuple[int, int], scale: float | None, window: int | None,
    has_sinks: bool,
) -> None:  # fmt: skip
    tokens = sum(prompt + sum(completions) for prompt, completions in pieces)
    generator = torch.Generator().manual_seed(tokens)
    shapes = [*((tokens, count, 4) for count in (heads[0], heads[1], heads[1])), *[(heads[0],)] * has_sinks]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    query, key, value, sinks = tensors if has_sinks else (*tensors, None)
    options = AttentionOptions(scale, window, sinks=sinks)
    if window is None:
        output = shared_prefix_attention(query, key, value, segments(pieces), options)
    else:
        output = window_attention(query, key, value, window_of(pieces, window), options)
    rows = [x.transpose(0, 1)[None] for x in (query, key, value)]
    in_blocks = block_layout(pieces, block=8, window=window).attend(0, *rows, options)[0]
    expected = dense(query, key, value, sinks, pieces, scale, window)
    incoming = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    truth = torch.autograd.grad(expected, tensors, incoming)
    for got in (output, in_blocks):
        assert torch.allclose(got, expected, atol=1e-12)
        for part, true in zip(torch.autograd.grad(got, tensors, incoming), truth, strict=True):
            assert torch.allclose(part, true, atol=1e-11)
