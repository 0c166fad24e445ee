"""Attention of packs on a GPU, with the kernels' formulas in place of the kernels: equal to the blocks of a CPU."""

from __future__ import annotations

import pytest
import torch
from flash_formulas import backward, forward
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_dist.model import shared_prefix
from grpo_dist.model.attention import block_layout
from grpo_dist.model.shared_prefix import segments, shared_prefix_attention

PIECES = st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(1, 9), max_size=4)), min_size=1, max_size=4)


@pytest.fixture(autouse=True)
def _formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prefix, "_flash", forward)
    monkeypatch.setattr(shared_prefix, "_flash_backward", backward)


def test_formulas_are_softmax_attention() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(5, 1, 4, dtype=torch.float64) for _ in range(3))
    bounds = torch.tensor([0, 2, 5], dtype=torch.int32)
    output, sums, _ = forward(query, key, value, bounds, bounds, 3, 3, True, 0.5)
    mask = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).bool().tril()
    scores = ((query[:, 0] @ key[:, 0].T) * 0.5).masked_fill(~mask, -torch.inf)
    assert torch.allclose(output[:, 0], scores.softmax(-1) @ value[:, 0])
    assert torch.allclose(sums[0], scores.logsumexp(-1))


@given(PIECES, st.sampled_from([(2, 2), (4, 2), (3, 1)]), st.sampled_from([None, 0.3]))
@settings(max_examples=60, deadline=None)
def test_equals_the_blocks_outputs_and_gradients(
    pieces: list[tuple[int, list[int]]], heads: tuple[int, int], scale: float | None
) -> None:
    tokens = sum(prompt + sum(completions) for prompt, completions in pieces)
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, count, 4) for count in (heads[0], heads[1], heads[1])]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    output = shared_prefix_attention(*tensors, segments(pieces), scale)
    rows = [x.transpose(0, 1)[None] for x in tensors]
    expected = block_layout(pieces).attend(0, *rows, scale)[0]
    assert torch.allclose(output, expected, atol=1e-12)
    incoming = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    for got, truth in zip(torch.autograd.grad(output, tensors, incoming),
                          torch.autograd.grad(expected, tensors, incoming), strict=True):  # fmt: skip
        assert torch.allclose(got, truth, atol=1e-11)
