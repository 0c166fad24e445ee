"""The blocks of a pack, and attention in them against a full masked softmax."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpo_dist.model.block_attention import BLOCK, block_layout
from grpo_dist.model.layout import AttentionOptions

pytestmark = pytest.mark.quick


LAYOUTS = {
    "many short": [(5, [3, 1, 8])] * 40,
    "long prompt": [(BLOCK + 20, [5, 70, 130, 100])],
    "long completion": [(30, [BLOCK + 10, 4, BLOCK + 40])],
    "mixed": [(4, [6, 2]), (BLOCK + 3, [9, 2]), (7, [1]), (2, [3] * 5), (BLOCK - 50, [100, 100]), (1, [1]), (6, [2])],
    "prompts alone": [(3, []), (BLOCK + 5, []), (4, [])],
    "exactly a block": [(BLOCK - 10, [4, 6]), (BLOCK, []), (1, [BLOCK - 1]), (2, [3])],
}


def full_mask(pieces: list[tuple[int, list[int]]]) -> Tensor:
    """Who sees whom, (T, T) bool: one sequence after another."""
    size = sum(prompt + sum(lengths) for prompt, lengths in pieces)
    mask = torch.zeros(size, size, dtype=torch.bool)
    start = 0
    for prompt, lengths in pieces:
        end = start + prompt
        mask[start:end, start:end] = torch.ones(prompt, prompt, dtype=torch.bool).tril()
        for length in lengths:
            mask[end : end + length, start : start + prompt] = True
            mask[end : end + length, end : end + length] = torch.ones(length, length, dtype=torch.bool).tril()
            end += length
        start = end
    return mask


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("heads", "key_heads", "scale"), [(2, 2, None), (4, 2, 0.3)])
def test_block_attention_equals_a_full_masked_softmax(
    name: str, heads: int, key_heads: int, scale: float | None
) -> None:
    pieces = LAYOUTS[name]
    mask = full_mask(pieces)
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, count, len(mask), 4) for count in (heads, key_heads, key_heads)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    query, key, value = tensors
    layout = block_layout(pieces)
    output = layout.attend(0, query, key, value, AttentionOptions(scale))
    repeat = heads // key_heads
    scores = query @ key.repeat_interleave(repeat, 1).transpose(2, 3) * (0.5 if scale is None else scale)
    weights = torch.softmax(scores.masked_fill(~mask, -torch.inf), -1)
    expected = (weights @ value.repeat_interleave(repeat, 1)).transpose(1, 2)
    assert output.shape == (1, len(mask), heads, 4)
    assert torch.allclose(output, expected, atol=1e-12)
    incoming = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    for got, truth in zip(torch.autograd.grad(output, tensors, incoming),
                          torch.autograd.grad(expected, tensors, incoming), strict=True):  # fmt: skip
        assert torch.allclose(got, truth, atol=1e-11)


@given(st.lists(st.tuples(st.integers(1, 12), st.lists(st.integers(1, 12), max_size=4)), min_size=1, max_size=6),
       st.integers(1, 16))  # fmt: skip
@settings(max_examples=40)
def test_blocks_hold_every_query_once_and_every_pair(pieces: list[tuple[int, list[int]]], block: int) -> None:
    mask = full_mask(pieces)
    built = torch.zeros_like(mask)
    layout = block_layout(pieces, block)
    for one in layout.blocks:
        keys = torch.cat([torch.arange(part.start, part.stop) for part in one.keys])
        queries = torch.arange(one.queries.start, one.queries.stop)
        causal = torch.ones(len(queries), len(keys), dtype=torch.bool).tril(len(keys) - len(queries))
        seen = causal if one.mask is None else one.mask
        built[queries[:, None], keys[None]] = seen
    assert torch.equal(built, mask)
    ends = [0, *(one.queries.stop for one in layout.blocks)]
    assert [one.queries.start for one in layout.blocks] == ends[:-1] and ends[-1] == len(mask)
    assert all(a < b for a, b in pairwise(ends))


def test_a_long_completion_has_no_mask() -> None:
    """Of 32,768 tokens it would have a gigabyte."""
    blocks = block_layout([(64, [2000, 30, 40, 1000]), (3000, [2000])]).blocks
    masked = [one.queries.stop - one.queries.start for one in blocks if one.mask is not None]
    assert masked == [70, 2000], "short completions, and one that is shorter than its prompt"
    windowed = block_layout([(64, [2000])], window=1000).blocks
    assert [one.mask is None for one in windowed] == [True, False]
