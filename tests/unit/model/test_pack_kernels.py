"""The kernels of packs on a CPU, against the same formulas in torch's operations in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import rms_norm, silu
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb

from grpo_dist.model import attention, fused_modules, pack_kernels
from grpo_dist.model.attention import RowLayout
from grpo_dist.model.block_attention import block_layout
from grpo_dist.model.compiled import library as compiling
from grpo_dist.model.compiled.library import library
from grpo_dist.model.fused_modules import fuse_gates, fuse_norms
from grpo_dist.model.layout import AttentionOptions, Pieces
from grpo_dist.model.pack_kernels import Sequences

pytestmark = pytest.mark.usefixtures("kernel")

LONG = [(70, [1, 90, 0, 40]), (1, [130]), (33, []), (2, [3] * 20)]
"""More tokens than queries of a block, lines of a part and vectors of a line; several runs behind a prompt."""


@pytest.fixture
def calls(noted: Callable[..., list[str]]) -> list[str]:
    """The kernels that were called, in their order."""
    return noted(pack_kernels, "attend", "attend_backward", "normed", "normed_backward", "gated", "gated_backward",
                 "rotate", "score_rows")  # fmt: skip


def heads(tokens: int, *numbers: int, size: int) -> list[Tensor]:
    """Random heads (1, number, tokens, size), which lie in memory token by token."""
    torch.manual_seed(0)
    return [torch.randn(1, tokens, number, size).transpose(1, 2) for number in numbers]


def with_gradients(function: Callable[..., Any], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The result of a function and its gradients by all inputs, in the inputs' precision."""
    given = [x.detach().clone().requires_grad_() for x in inputs]
    result = function(*given)
    return [result.detach(), *torch.autograd.grad(result, given, grad.to(result.dtype))]


def assert_exact(got: list[Tensor], exact: list[Tensor]) -> None:
    """Assert that errors are those of float32, as a share of the largest number or of 1."""
    for number, truth in zip(got, exact, strict=True):
        assert number.shape == truth.shape
        assert float((number - truth).abs().max()) < 3e-6 * max(1.0, float(truth.abs().max()))


def check_attention(pieces: Pieces, num_heads: int, key_heads: int, size: int, window: int | None = None) -> None:
    tokens = sum(prompt + sum(completions) for prompt, completions in pieces)
    *inputs, grad = heads(tokens, num_heads, key_heads, key_heads, num_heads, size=size)
    grad = grad.transpose(1, 2)
    options = AttentionOptions(scale=0.3, window=window)
    got = with_gradients(lambda *x: RowLayout(pieces).attend(0, *x, options), inputs, grad)
    exact = with_gradients(
        lambda *x: block_layout(pieces, window=window).attend(0, *x, options), [x.double() for x in inputs], grad
    )
    assert_exact(got, exact)


@pytest.mark.parametrize(
    ("num_heads", "key_heads", "size"), [(4, 2, 16), (3, 1, 24), (2, 2, 8), (6, 2, 64), (130, 1, 8)]
)
def test_attention(num_heads: int, key_heads: int, size: int, calls: list[str]) -> None:
    for pieces in (LONG, [(5, [2, 4]), (1, [1]), (2, [])]):
        check_attention(pieces, num_heads, key_heads, size)
    assert calls == ["attend", "attend_backward"] * 2


@pytest.mark.parametrize("window", [1, 7, 16, 70, 71, 100, 159, 160])
def test_windows(window: int, calls: list[str]) -> None:
    """Shorter than a prompt, than a block of queries and than a completion, as long, and longer."""
    check_attention(LONG, 4, 2, 16, window)
    assert calls == ["attend", "attend_backward"]


def test_a_token_is_computed_alike_in_any_row(all_threads: None) -> None:
    """To the last bit, whatever else is in the row and however many threads there are; gradients, too."""
    query, key, value, grad = heads(sum(prompt + sum(completions) for prompt, completions in LONG), 4, 2, 2, 4, size=16)

    def computed(pieces: Pieces, tokens: slice, threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        layout = RowLayout(pieces)
        given = [x[:, :, tokens] for x in (query, key, value)]
        return with_gradients(
            lambda *x: layout.attend(0, *x, AttentionOptions()), given, grad[:, :, tokens].transpose(1, 2)
        )

    whole = computed(LONG, slice(None), 1)
    for threads in (2, 3):
        for got, before in zip(computed(LONG, slice(None), threads), whole, strict=True):
            assert torch.equal(got, before)
    start = 0
    for prompt, completions in LONG:
        tokens = slice(start, start := start + prompt + sum(completions))
        output, *grads = computed([(prompt, completions)], tokens, 2)
        assert torch.equal(output, whole[0][:, tokens])
        for got, before in zip(grads, whole[1:], strict=True):
            assert torch.equal(got, before[:, :, tokens])


@pytest.mark.parametrize("pieces", [LONG, [(4, [2])], [(2, [3, 3, 3])], [(1, [1] * 100)], [(9, [0, 0])]])
def test_runs_hold_each_segment_once(pieces: Pieces) -> None:
    found = Sequences.of(pieces)
    segments, runs = found.segments.tolist(), found.runs.tolist()
    assert [n for first, last, _ in runs for n in range(first, last)] == list(range(len(segments)))
    assert [start for start, *_ in segments] == [0, *(end for _, end, *_ in segments[:-1])]
    sums = 0
    for first, last, at in runs:
        prompts = {tuple(segment[2:]) for segment in segments[first:last]}
        ((start, end),) = prompts  # one for all
        assert start == end or at == sums
        sums += end - start
    assert found.sums == sums <= sum(max(prompt, sum(completions)) for prompt, completions in pieces)


@pytest.mark.parametrize("shape", [(1, 3, 24), (2, 40, 512), (1, 1, 8)])
def test_norms(shape: tuple[int, ...], calls: list[str]) -> None:
    torch.manual_seed(0)
    norm = LlamaRMSNorm(shape[-1], eps=1e-3)
    norm.weight = nn.Parameter(torch.randn(shape[-1]), requires_grad=False)
    fuse_norms(nn.ModuleList([norm]))
    x, grad = torch.randn(2, *shape)
    exact = with_gradients(lambda x: rms_norm(x, shape[-1:], norm.weight.double(), 1e-3), [x.double()], grad)
    assert_exact(with_gradients(norm, [x], grad), exact)
    assert calls == ["normed", "normed_backward"]


def test_a_weight_that_is_trained_gets_its_gradient(calls: list[str]) -> None:
    norm = LlamaRMSNorm(16)
    fuse_norms(nn.ModuleList([norm]))
    norm(torch.randn(1, 3, 16)).sum().backward()
    assert norm.weight.grad is not None and not calls


def check_gates(*shape: int) -> None:
    torch.manual_seed(0)
    gate, up, grad = torch.randn(3, *shape) * 3
    got = with_gradients(fused_modules._Gate.apply, [gate, up], grad)
    assert_exact(got, with_gradients(lambda x, y: silu(x) * y, [gate.double(), up.double()], grad))


@pytest.mark.parametrize("shape", [(1, 3, 24), (2, 40, 512), (1, 1, 8)])
def test_gates(shape: tuple[int, ...], calls: list[str]) -> None:
    check_gates(*shape)
    assert calls == ["gated", "gated_backward"]


def test_a_layer_with_a_gate(calls: list[str]) -> None:
    layer = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=24))
    x, grad = torch.randn(2, 1, 5, 32)
    plain = with_gradients(layer, [x], grad)
    fuse_gates(nn.ModuleList([layer]))
    for got, truth in zip(with_gradients(layer, [x], grad), plain, strict=True):
        torch.testing.assert_close(got, truth)
    assert calls == ["gated", "gated_backward"]


@pytest.mark.parametrize(("tokens", "size"), [(3, 24), (200, 64)])
def test_rotations(tokens: int, size: int, calls: list[str]) -> None:
    inputs, grads = heads(tokens, 4, 2, size=size), heads(tokens, 4, 2, size=size)
    cos, sin = torch.randn(2, 1, tokens, size)
    rotated = fused_modules._fused_rotation(apply_rotary_pos_emb)
    for n, grad in enumerate(grads):
        got = with_gradients(lambda q, k, n=n: rotated(q, k, cos, sin)[n] + 0 * (q.sum() + k.sum()), inputs, grad)
        exact = with_gradients(
            lambda q, k, n=n: apply_rotary_pos_emb(q, k, cos.double(), sin.double())[n] + 0 * (q.sum() + k.sum()),
            [x.double() for x in inputs], grad,
        )  # fmt: skip
        assert_exact([got[0], got[1 + n]], [exact[0], exact[1 + n]])
    assert set(calls) == {"rotate"}


def test_what_is_not_a_number_is_seen() -> None:
    """An update whose gradient is no number is skipped: no kernel may make a number of it."""
    query, key, value = heads(6, 4, 2, 2, size=8)
    query[0, 1, 2, 3] = torch.nan
    output = RowLayout([(2, [4])]).attend(0, query, key, value, AttentionOptions())
    assert output.isnan().any(-1).nonzero().tolist() == [[0, 2, 1]]
    row = torch.ones(2, 16)
    row[1, 5] = torch.nan
    normed, _ = pack_kernels.normed(row, torch.ones(16), 1e-6)
    assert normed.isnan().all(-1).tolist() == [False, True] and not normed[0].isnan().any()
    for gate, up in ((row, row[:1].expand(2, 16).contiguous()), (row[:1].expand(2, 16).contiguous(), row)):
        assert torch.equal(pack_kernels.gated(gate, up).isnan(), row.isnan())
        for grad in pack_kernels.gated_backward(row, gate, up):
            assert torch.equal(grad.isnan(), row.isnan())


def test_what_does_not_fit(calls: list[str]) -> None:
    """Other numbers than float32, sizes that are no multiples of 8, and tensors without memory."""
    assert pack_kernels.fits(torch.zeros(3, 8), nn.Parameter(torch.zeros(8)))
    for x in (
        torch.zeros(3, 8).bfloat16(),
        torch.zeros(3, 8).double(),
        torch.zeros(3, 12),
        torch.zeros(3, 8, device="meta"),
    ):
        assert not pack_kernels.fits(x)
    with FakeTensorMode():
        assert not pack_kernels.fits(torch.zeros(3, 8))
    query, key, value = heads(6, 4, 2, 2, size=8)
    sinks = torch.zeros(4)
    for options in (AttentionOptions(softcap=3.0), AttentionOptions(sinks=sinks)):
        RowLayout([(2, [4])]).attend(0, query, key, value, options)
    assert not attention._fits_kernels(query, key, value[..., :0], AttentionOptions())
    assert not calls


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("CXX", "/no/compiler")
    library.cache_clear()
    pack_kernels._code.cache_clear()
    try:
        with caplog.at_level("INFO"):
            for _ in range(2):
                check_attention([(3, [2])], 4, 2, 8)
        (said,) = caplog.messages
        assert "/no/compiler" in said
    finally:
        library.cache_clear()
        pack_kernels._code.cache_clear()


@pytest.mark.parametrize("flag", ["-DWIDE=", pytest.param("-march=x86-64", marks=pytest.mark.slow)])
def test_other_processors(flag: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, calls: list[str]) -> None:
    monkeypatch.setattr(compiling, "FLAGS", [*compiling.FLAGS, flag, "-O0"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.cache_clear()
    pack_kernels._code.cache_clear()
    try:
        for size in (8, 16):
            check_attention([(3, [2, 40]), (18, [1])], 4, 2, size)
        check_gates(1, 3, 24)
        assert set(calls) == {"attend", "attend_backward", "gated", "gated_backward"}
    finally:
        library.cache_clear()
        pack_kernels._code.cache_clear()


@pytest.mark.parametrize("size", [1, 7, 16, 61, 324, 9001])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_log_probabilities_and_their_slopes(size: int, temperature: float) -> None:
    """Of vocabularies of any size, which may fill several sums; of flat rows and of certain ones."""
    generator = torch.Generator().manual_seed(size)
    spread = torch.tensor([0.0, 1.0, 30.0, 300.0, 1e4])[:, None]
    logits = torch.randn(5, size, generator=generator) * spread
    targets = torch.randint(size, (5,), generator=generator)
    exact = (logits.double() / temperature).requires_grad_()
    rows = exact.log_softmax(-1)
    truth = rows.gather(1, targets[:, None])[:, 0]
    (slopes,) = torch.autograd.grad(truth.sum() / temperature, exact)
    entropies = -(rows.exp() * rows).nan_to_num().sum(-1)
    for wanted in (False, True):
        place = logits.clone()
        logprobs, got = pack_kernels.score_rows(place, targets, temperature, wanted)
        torch.testing.assert_close(logprobs.double(), truth, atol=1e-5, rtol=1e-6)
        torch.testing.assert_close(got.double(), entropies, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(place.double(), slopes if wanted else logits.double(), atol=1e-6, rtol=1e-5)


def test_no_log_probability_depends_on_other_rows_or_threads() -> None:
    logits, targets = torch.randn(50, 5003), torch.arange(50)

    def scored(rows: slice) -> list[Tensor]:
        place = logits[rows].clone()
        return [*pack_kernels.score_rows(place, targets[rows], 0.9, slopes=True), place]

    whole, threads = scored(slice(None)), torch.get_num_threads()
    for rows in (slice(0, 1), slice(7, 29)):
        assert all(torch.equal(part, all_of[rows]) for part, all_of in zip(scored(rows), whole, strict=True))
    try:
        torch.set_num_threads(threads + 2)
        assert all(map(torch.equal, scored(slice(None)), whole))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("place", [0, 20, 60])
def test_a_logit_that_is_not_a_number_is_seen(place: int) -> None:
    logits = torch.zeros(2, 61)
    logits[1, place] = torch.nan
    logprobs, entropies = pack_kernels.score_rows(logits, torch.tensor([3, 3]), 1.0, slopes=False)
    assert logprobs.isnan().tolist() == [False, True] == entropies.isnan().tolist()
