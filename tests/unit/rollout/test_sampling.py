"""Sampling: noise from counters alone, and draws against slow twins on Python numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from grpo_dist.algorithm.hashing import stream_key, uniforms
from grpo_dist.config.schema import RolloutConfig
from grpo_dist.rollout.sampling import Sampling, _first_above, allowed, draw, sampling_of

pytestmark = pytest.mark.quick

MASK = (1 << 64) - 1
INT64 = st.integers(-(1 << 63), (1 << 63) - 1)


def splitmix64(key: int, position: int) -> float:
    """Output `position` of the splitmix64 generator with state `key`, as a number in [0, 1)."""
    x = (key + (position + 1) * 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    x ^= x >> 31
    return (x >> 11) / (1 << 53)


def naive_allowed(probs: list[float], sampling: Sampling) -> set[int]:
    """The tokens left in, by sorting: top-k, top-p of their mass, and min-p; probabilities must differ from each
    other."""
    order = sorted(range(len(probs)), key=lambda token: -probs[token])
    likeliest = order[: sampling.top_k or len(order)]
    kept = set(likeliest)
    if sampling.top_p < 1:
        kept, mass = set(), 0.0
        for token in likeliest:
            kept.add(token)
            mass += probs[token]
            if mass >= sampling.top_p * sum(probs[each] for each in likeliest):
                break
    return {token for token in kept if probs[token] >= sampling.min_p * probs[order[0]]}


def many_draws(logits: Tensor, sampling: Sampling, count: int, key: int = 7) -> tuple[Tensor, Tensor]:
    """`count` draws from one distribution, at the positions 0, 1, … of one key."""
    return draw(logits.expand(count, -1), torch.full((count,), key), torch.arange(count), sampling)


@given(st.lists(st.tuples(INT64, st.integers(0, 1 << 20)), min_size=1, max_size=20))
@settings(max_examples=30)
def test_uniforms_are_splitmix64(counters: list[tuple[int, int]]) -> None:
    keys, positions = (torch.tensor(column) for column in zip(*counters, strict=True))
    numbers = uniforms(keys, positions)
    assert numbers.dtype == torch.float64
    assert numbers.tolist() == [splitmix64(*counter) for counter in counters]
    assert bool(((numbers >= 0) & (numbers < 1)).all())


def test_uniforms_of_the_published_generator() -> None:
    # the first outputs of splitmix64 seeded with 1234567, as printed in its reference implementation's test vectors
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    numbers = uniforms(torch.full((5,), 1234567), torch.arange(5))
    assert numbers.tolist() == [(x >> 11) / (1 << 53) for x in published]


def test_uniforms_are_uniform_over_positions_and_keys() -> None:
    along = uniforms(torch.full((20000,), stream_key(0, "train/0", 0, 0)), torch.arange(20000))
    across = uniforms(torch.tensor([stream_key(0, 1, n, 0) for n in range(5000)]), torch.zeros(5000, dtype=torch.int64))
    for numbers in (along, across):
        counts = torch.histc(numbers.float(), 20, 0, 1)
        expected = len(numbers) / 20
        assert float(((counts - expected) ** 2 / expected).sum()) < 45  # chi-square, 19 degrees: p = 0.001 at 43.8
    pairs = torch.stack([along[:-1], along[1:]])
    assert abs(float(torch.corrcoef(pairs)[0, 1])) < 0.03


def test_stream_key_tells_counters_apart() -> None:
    keys = {stream_key(seed, step, group, sample) for seed in range(3) for step in range(5)
            for group in range(12) for sample in range(12)}  # fmt: skip
    assert len(keys) == 3 * 5 * 12 * 12
    assert stream_key(1, 23) != stream_key(12, 3)
    assert stream_key(1, "train/2") == -8731672290342013788, "a resumed run, another process, draws the same"
    assert all(-(1 << 63) <= key < 1 << 63 for key in keys)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, 0.9, 20, 0.01)])
def test_draws_do_not_depend_on_the_batch(sampling: Sampling) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(33, 50, generator=generator) * 3
    keys, positions = torch.arange(33) * 7919, torch.arange(33) % 5
    tokens, logprobs = draw(logits, keys, positions, sampling)
    order = torch.randperm(33, generator=generator)
    shuffled, shuffled_logprobs = draw(logits[order], keys[order], positions[order], sampling)
    assert torch.equal(tokens[order], shuffled) and torch.equal(logprobs[order], shuffled_logprobs)
    for n in range(33):
        alone, _ = draw(logits[n : n + 1], keys[n : n + 1], positions[n : n + 1], sampling)
        assert int(alone) == int(tokens[n])


@pytest.mark.parametrize("size", [11, 300])
def test_draw_inverts_the_cumulative_distribution(size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(200, size, generator=generator)
    keys, positions = torch.arange(200) - 100, torch.arange(200) * 3
    tokens, _ = draw(logits, keys, positions, Sampling(temperature=0.8))
    probs = torch.softmax(logits.double() / 0.8, -1)
    for n in range(200):
        target, mass = splitmix64(int(keys[n]), int(positions[n])), 0.0
        for token in range(size):
            mass += float(probs[n, token])
            if mass > target:
                break
        assert int(tokens[n]) == token or abs(mass - target) < 1e-6


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_follow_the_distribution(temperature: float) -> None:
    logits = torch.tensor([0.0, 1.5, -1.0, 0.3, 2.0, -30.0])
    count = 20000
    tokens, _ = many_draws(logits, Sampling(temperature=temperature), count)
    expected = torch.softmax(logits.double() / temperature, 0) * count
    counts = torch.bincount(tokens, minlength=6).double()
    likely = expected > 5
    assert float(((counts - expected) ** 2 / expected)[likely].sum()) < 25  # 5 degrees: p = 0.0001
    assert int(counts[~likely].sum()) <= 10


@given(
    st.integers(0, 1 << 30), st.integers(0, 14), st.floats(0.05, 1.0), st.floats(0.0, 0.99), st.floats(0.3, 2.0)
)  # fmt: skip
@settings(max_examples=50)
def test_allowed_equals_sorting(seed: int, top_k: int, top_p: float, min_p: float, temperature: float) -> None:
    sampling = Sampling(temperature, top_p, top_k, min_p)
    logits = torch.randn(3, 12, generator=torch.Generator().manual_seed(seed)) * 2
    logprobs = torch.log_softmax(logits / temperature, -1)
    keep = allowed(logprobs, sampling)
    for row in range(3):
        probs = [math.exp(value) for value in logprobs[row].tolist()]
        ordered = sorted(probs, reverse=True)
        of_top_k = sum(ordered[: top_k or 12])
        masses = [sum(ordered[: n + 1]) for n in range(12)]
        if any(abs(mass - top_p * of_top_k) < 1e-5 for mass in masses) or any(
            abs(p - min_p * ordered[0]) < 1e-6 for p in probs
        ):
            continue  # rounding may decide
        kept = set(range(12)) if keep is None else set(keep[row].nonzero()[:, 0].tolist())
        assert kept == naive_allowed(probs, sampling)
        assert kept, "something must be left to draw"


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(5, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.1), (0, 0.8, 0.1), (5, 1.0, 0.1), (5, 0.8, 0.0), (9, 0.8, 0.1)],
)
def test_allowed_is_what_transformers_keeps(top_k: int, top_p: float, min_p: float) -> None:
    logits = 2 * torch.randn(32, 300, generator=torch.Generator().manual_seed(0))
    theirs = TopKLogitsWarper(top_k)(None, logits) if top_k else logits
    theirs = TopPLogitsWarper(top_p)(None, theirs) if top_p < 1 else theirs
    theirs = MinPLogitsWarper(min_p)(None, theirs) if min_p else theirs
    ours = allowed(logits, Sampling(1.0, top_p, top_k, min_p))
    assert ours is not None and bool((ours == theirs.isfinite()).all())


def test_allowed_is_none_where_nothing_is_cut() -> None:
    logprobs = torch.log_softmax(torch.randn(2, 5), -1)
    assert allowed(logprobs, Sampling()) is None
    assert allowed(logprobs, Sampling(top_k=5)) is None


def test_thresholds_that_are_met_exactly() -> None:
    """Of min-p the threshold is inside; of top-p the token at which the mass is reached is the last."""
    logprobs = torch.tensor([[0.25, 0.5, 0.125, 0.125]]).log()
    assert logprobs.exp().tolist() == [[0.25, 0.5, 0.125, 0.125]], "no rounding decides"
    for sampling, kept in (
        (Sampling(min_p=1.0), [1]), (Sampling(min_p=0.5), [0, 1]), (Sampling(top_p=0.5), [1]),
        (Sampling(top_p=0.75), [0, 1]), (Sampling(top_p=0.7501), [0, 1, 2, 3]),
    ):  # fmt: skip
        keep = allowed(logprobs, sampling)
        assert keep is not None and keep[0].nonzero()[:, 0].tolist() == kept, sampling


@pytest.mark.parametrize("sampling", [Sampling(top_p=0.75), Sampling(min_p=0.5), Sampling(top_k=2)])
def test_a_constant_may_be_added_to_the_logits(sampling: Sampling) -> None:
    logits = torch.tensor([[0.25, 0.5, 0.125, 0.125]]).log()
    for constant in (-100.0, 100.0):
        keep = allowed(logits + constant, sampling)
        assert keep is not None and keep.tolist() == [[True, True, False, False]]


def test_sampling_is_what_the_config_says() -> None:
    assert Sampling() == Sampling(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, greedy=False)
    assert sampling_of(RolloutConfig(temperature=0.7, top_p=0.9, top_k=5, min_p=0.1)) == Sampling(0.7, 0.9, 5, 0.1)


def test_ties_at_the_threshold_are_kept() -> None:
    logprobs = torch.log_softmax(torch.tensor([[1.0, 2.0, 1.0, 0.0]]), -1)
    assert allowed(logprobs, Sampling(top_k=2)).tolist() == [[True, True, True, False]]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "sampling", [Sampling(top_k=3), Sampling(top_p=0.6), Sampling(min_p=0.4), Sampling(0.9, 0.8, 4, 0.05)]
)
def test_truncated_draws_follow_the_renormalised_distribution(sampling: Sampling) -> None:
    logits = torch.tensor([0.2, 1.5, -1.0, 0.9, 2.0, -0.3, 1.1])
    probs = torch.softmax(logits.double() / sampling.temperature, 0)
    kept = sorted(naive_allowed(probs.tolist(), sampling))
    tokens, logprobs = many_draws(logits, sampling, 10000)
    assert set(tokens.tolist()) == set(kept)
    shares = torch.bincount(tokens, minlength=7).double()[kept] / 10000
    assert torch.allclose(shares, probs[kept] / probs[kept].sum(), atol=0.02)
    # the log-probability is that of the whole distribution, whatever was cut off
    assert torch.allclose(logprobs.double(), probs.log()[tokens], atol=1e-6)


def test_the_reported_logprob_is_at_the_temperature() -> None:
    logits = torch.randn(64, 40, generator=torch.Generator().manual_seed(2)) * 4
    for sampling in (Sampling(0.3), Sampling(2.0, top_k=2), Sampling(0.7, greedy=True)):
        tokens, logprobs = draw(logits, torch.arange(64), torch.zeros(64, dtype=torch.int64), sampling)
        expected = torch.log_softmax(logits.double() / sampling.temperature, -1).gather(1, tokens[:, None])[:, 0]
        assert logprobs.dtype == torch.float32
        assert torch.allclose(logprobs.double(), expected, atol=1e-5)


def test_greedy_takes_the_likeliest_token_whatever_the_noise() -> None:
    logits = torch.randn(64, 40, generator=torch.Generator().manual_seed(3))
    tokens, _ = draw(logits, torch.arange(64), torch.arange(64), Sampling(greedy=True, top_k=1))
    assert torch.equal(tokens, logits.argmax(-1))


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2.0**-53])
def test_a_token_of_probability_zero_is_never_drawn(uniform: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo_dist.rollout.sampling.uniforms",
                        lambda keys, positions: torch.full(keys.shape, uniform, dtype=torch.float64))  # fmt: skip
    impossible = -torch.inf
    logits = torch.tensor([
        [impossible, 1.0, impossible, 0.5, impossible], [impossible, impossible, 3.0, impossible, impossible],
        [2.0, impossible, impossible, impossible, -200.0], [0.1, 0.2, 0.3, 0.4, -1000.0],
    ])  # fmt: skip
    zeros = torch.zeros(4, dtype=torch.int64)
    for sampling in (Sampling(), Sampling(top_p=0.9), Sampling(top_k=4), Sampling(min_p=0.01)):
        tokens, logprobs = draw(logits, zeros, zeros, sampling)
        assert bool(logprobs.isfinite().all())
        assert bool((torch.softmax(logits.double(), -1).gather(1, tokens[:, None]) > 0).all())
    tokens, _ = draw(logits, zeros, zeros, Sampling(top_k=1))
    assert tokens.tolist() == [1, 2, 0, 3]


def test_a_target_that_rounding_puts_at_the_total_meets_the_last_part_above_zero() -> None:
    parts = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    for target in (1.0, 1.5):
        assert _first_above(parts.cumsum(-1), parts, torch.full((3, 1), target).double()).tolist() == [[1], [0], [2]]


def test_low_precision_logits_are_taken_as_float32() -> None:
    logits = torch.randn(16, 30).bfloat16()
    counters = torch.arange(16)
    tokens, logprobs = draw(logits, counters, counters, Sampling())
    same, same_logprobs = draw(logits.float(), counters, counters, Sampling())
    assert torch.equal(tokens, same) and torch.equal(logprobs, same_logprobs)
