"""Attention of a row in blocks, against a loop over its tokens, and how a row is divided."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flash_formulas import forward
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from grpo_dist.model import attention, shared_prefix
from grpo_dist.model.attention import NAME, RowLayout
from grpo_dist.model.block_attention import block_layout, explicit_attention
from grpo_dist.model.layout import AttentionOptions

PIECES = [(3, [2, 4]), (1, [6]), (2, []), (9, [1, 12, 3, 3]), (11, [10, 2])]
HEADS, KEY_HEADS, SIZE = 4, 2, 8


def visible(pieces: list[tuple[int, list[int]]], window: int | None) -> list[list[int]]:
    """The keys of each query: those of its prompt and its own completion that are not later and in its window."""
    seen: list[list[int]] = []
    for prompt, completions in pieces:
        start, end = len(seen), len(seen) + prompt
        own = list(range(start, end))
        seen += [own[: n + 1] for n in range(prompt)]
        for length in completions:
            sequence = [*own, *range(len(seen), len(seen) + length)]
            seen += [sequence[: prompt + n + 1] for n in range(length)]
    return [keys if window is None else keys[-window:] for keys in seen]


def one_by_one(
    query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float | None, softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """The outputs (1, T, H, D)."""
    output = torch.zeros(1, query.shape[2], HEADS, SIZE)
    for token, keys in enumerate(visible(PIECES, window)):
        for head in range(HEADS):
            of = head // (HEADS // KEY_HEADS)
            scores = key[0, of, keys] @ query[0, head, token] * (SIZE**-0.5 if scale is None else scale)
            scores = scores if softcap is None else softcap * (scores / softcap).tanh()
            weights = scores.exp() / (scores.exp().sum() + (0 if sinks is None else sinks[head].exp()))
            output[0, token, head] = weights @ value[0, of, keys]
    return output


@pytest.fixture
def row() -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (1, H, T, D)."""
    torch.manual_seed(0)
    tokens = len(visible(PIECES, None))
    return tuple(torch.randn(1, heads, tokens, SIZE) for heads in (HEADS, KEY_HEADS, KEY_HEADS))  # type: ignore[return-value]


@pytest.mark.parametrize("window", [None, 4, 9, 12, 15, 20])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 2.0, 0.0])], ids=["plain", "sinks"])
def test_every_token_sees_its_own_sequence(
    window: int | None, softcap: float | None, sinks: Tensor | None, row: tuple[Tensor, Tensor, Tensor]
) -> None:
    for scale in (None, 0.3):
        expected = one_by_one(*row, window, scale, softcap, sinks)
        given, options = (0, *row), AttentionOptions(scale, window, softcap, sinks)
        for block in (4, 8, 16, 128):
            got = block_layout(PIECES, block, window).attend(*given, options)
            torch.testing.assert_close(got, expected)
        layout = RowLayout(PIECES)
        for _ in range(2):  # what is made at the first use is used again
            torch.testing.assert_close(layout.attend(*given, options), expected)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_explicit_attention_is_torchs(is_causal: bool, scale: float | None) -> None:
    query, key, value = torch.randn(3, 1, 2, 5, SIZE)
    mask = None if is_causal else torch.rand(5, 5) > 0.4
    mask = mask if mask is None else mask | torch.eye(5, dtype=torch.bool)
    expected = scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal, scale=scale)
    torch.testing.assert_close(
        explicit_attention(query, key, value, mask, is_causal, AttentionOptions(scale)), expected
    )


@pytest.mark.parametrize(
    ("pieces", "window", "expected"),
    [
        ([(4, [4])], None, [(8, True)]),
        ([(4, [5])], None, [(4, False), (5, True)]),
        ([(2, [2]), (2, [2])], None, [(8, True)]),
        ([(9, [1]), (2, [2]), (2, [2])], None, [(9, False), (1, True), (8, True)]),
        ([(9, [])], None, [(9, False)]),
        ([(2, [2]), (2, [3])], None, [(4, True), (5, True)]),
        ([(1, []), (9, [4, 4, 1])], None, [(1, True), (9, False), (8, True), (1, True)]),
        ([(4, [4]), (9, [9, 10])], None, [(8, True), (9, False), (9, True), (10, False)]),
        ([(4, [1]), (9, [1])], 10, [(5, True), (9, False), (1, True)]),
        ([(9, [12])], 21, [(9, False), (12, False)]),
        ([(9, [12])], 20, [(9, False), (12, True)]),
        ([(9, [12])], 9, [(9, False), (12, True)]),
        ([(9, [12])], 8, [(9, True), (12, True)]),
    ],
)
def test_few_blocks_have_a_mask(
    pieces: list[tuple[int, list[int]]], window: int | None, expected: list[tuple[int, bool]]
) -> None:
    """Short pieces share a block of at most 8 tokens, and what is longer than that and its prompt is causal."""
    blocks = block_layout(pieces, 8, window).blocks
    assert [(each.queries.stop - each.queries.start, each.mask is not None) for each in blocks] == expected


@pytest.mark.parametrize("window", [None, 9, 21, 22])
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 2.0, 0.0])], ids=["plain", "sinks"])
def test_a_gpu_divides_rows_otherwise(
    window: int | None, sinks: Tensor | None, row: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the flash kernels' formulas in their place; with a soft cap it computes blocks, too."""
    monkeypatch.setattr(attention, "can_use_flash", lambda *_: True)
    monkeypatch.setattr(shared_prefix, "_flash", forward)
    layout = RowLayout(PIECES).to(torch.device("cpu"))
    expected = one_by_one(*row, window, 0.3, None, sinks)
    for _ in range(2):  # what is made at the first use is used again
        torch.testing.assert_close(layout.attend(0, *row, AttentionOptions(0.3, window, None, sinks)), expected)
    capped = one_by_one(*row, window, 0.3, 0.7, sinks)
    torch.testing.assert_close(layout.attend(0, *row, AttentionOptions(0.3, window, 0.7, sinks)), capped)


def test_transformers_calls_it_with_a_layout(row: tuple[Tensor, Tensor, Tensor]) -> None:
    function, layout = AttentionInterface()[NAME], RowLayout(PIECES)
    given: dict[str, Any] = {"scaling": 0.3, "sliding_window": 9, "softcap": 0.7, "s_aux": torch.ones(HEADS)}
    output, weights = function(SimpleNamespace(layer_idx=0), *row, None, layout=layout, dropout=0.5, **given)
    torch.testing.assert_close(output, one_by_one(*row, 9, 0.3, 0.7, given["s_aux"]))
    assert weights is None
    with pytest.raises(ValueError, match="without the keyword argument `layout`"):
        function(SimpleNamespace(layer_idx=0), *row, None)
