"""The order of prompts: the counting sampler, the mixture and the curriculum, each beside a slow twin."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_dist.data.order import Curriculum, Mixture, Sampler, permutation


def slow_order(num_prompts: int, seed: int, epoch: int) -> list[int]:
    """The twin of `permutation`: SplitMix64 with Python's integers, one number at a time."""
    import hashlib

    state = int.from_bytes(hashlib.blake2b(f"{seed}:{epoch}".encode(), digest_size=8).digest(), "little")
    keys = []
    for _ in range(num_prompts):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        key = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        key = (key ^ (key >> 27)) * 0x94D049BB133111EB % 2**64
        keys.append(key ^ (key >> 31))
    return sorted(range(num_prompts), key=keys.__getitem__)


@given(st.integers(1, 40), st.integers(1, 100), st.integers(0, 2**70), st.integers(0, 10**6))
def test_sampler_equals_its_twin(num_prompts: int, batch_size: int, seed: int, step: int) -> None:
    sampler = Sampler(num_prompts, batch_size, seed)
    cursors = range(step * batch_size, (step + 1) * batch_size)
    epochs = {epoch: slow_order(num_prompts, seed, epoch) for epoch in {c // num_prompts for c in cursors}}
    assert sampler.batch_indices(step) == [epochs[c // num_prompts][c % num_prompts] for c in cursors]
    assert sampler.epoch(step) == cursors.start / num_prompts


@given(st.integers(1, 30), st.integers(1, 50), st.integers(0, 5))
def test_every_epoch_holds_every_prompt_once(num_prompts: int, batch_size: int, seed: int) -> None:
    sampler = Sampler(num_prompts, batch_size, seed)
    drawn = [index for step in range(num_prompts) for index in sampler.batch_indices(step)]
    assert len(drawn) == batch_size * num_prompts
    for start in range(0, len(drawn), num_prompts):
        assert sorted(drawn[start : start + num_prompts]) == list(range(num_prompts))


def test_orders_are_fixed_and_differ() -> None:
    assert permutation(10, 0, 0).tolist() == [2, 5, 4, 0, 9, 1, 8, 7, 6, 3]
    assert permutation(1000, 0, 0).tolist() != permutation(1000, 0, 1).tolist() != permutation(1000, 1, 0).tolist()
    assert len(Sampler(10**6, 32, 0).batch_indices(10**6)) == 32  # without going through the epochs before


PARTS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 60)), min_size=1, max_size=6)


@settings(max_examples=6)  # of two thousand prompts each
@given(PARTS, st.integers(1, 500), st.integers(0, 99))
def test_each_thousand_of_a_mixture_has_its_shares(parts: list[tuple[int, int]], batch_size: int, seed: int) -> None:
    """Each part comes in the order that a sampler of its own would have; the parts, in one order for each thousand."""
    sizes, weights = [size for size, _ in parts], [weight for _, weight in parts]
    mixture = Mixture(sizes, weights, batch_size, seed)
    taken = [index for step in range(-(-2000 // batch_size)) for index in mixture.batch_indices(step)][:2000]
    exact = [1000 * weight / sum(weights) for weight in weights]
    bounds = [sum(sizes[:part]) for part in range(len(sizes) + 1)]
    sources = [max(part for part, start in enumerate(bounds[:-1]) if index >= start) for index in taken]
    counts = [sources[:1000].count(part) for part in range(len(sizes))]
    assert [sources[1000:].count(part) for part in range(len(sizes))] == counts
    assert all(abs(count - share) < 1 for count, share in zip(counts, exact, strict=True))
    up = [share % 1 for count, share in zip(counts, exact, strict=True) if count > share]
    down = [share % 1 for count, share in zip(counts, exact, strict=True) if count <= share]
    assert min(up, default=1) >= max(down, default=0) - 1e-9, "the largest fractions are rounded up"
    blocks = [part for part, count in enumerate(counts) for _ in range(count)]
    assert sources == [blocks[place] for epoch in (-1, -2) for place in slow_order(1000, seed, epoch)]
    for part, size in enumerate(sizes):
        own = [index - bounds[part] for index, source in zip(taken, sources, strict=True) if source == part]
        assert own == Sampler(size, len(own), seed + part).batch_indices(0)
    assert mixture.epoch(3) == 3 * batch_size / sum(sizes)


def test_a_mixture_of_nothing_is_refused() -> None:
    assert Mixture([1, 1], [1, 999], 1, 0).batch_indices(0) in ([0], [1])
    for sizes, weights, batch_size in (([], [], 1), ([1], [1, 1], 1), ([0, 1], [1, 1], 1), ([1, 1], [0, 1], 1),
                                       ([1, 1], [1, 1], 0)):  # fmt: skip
        with pytest.raises(ValueError, match="expected numbers above 0"):
            Mixture(sizes, weights, batch_size, 0)


@given(st.integers(1, 7), st.integers(1, 9), st.integers(0, 2), st.randoms(use_true_random=False))
def test_the_curriculum_equals_its_twin(num_prompts: int, batch_size: int, rest: int, random: Any) -> None:
    """The twin goes through the epochs one prompt at a time, and takes the next that does not rest, or the one it has
    come to where it has passed over as many for this batch as there are."""
    curriculum = Curriculum(Sampler(num_prompts, batch_size, 5), num_prompts, 0.25, 0.75, rest)
    cursor, rested = 0, dict[int, int]()  # of a prompt: the last epoch in which it is passed over
    for step in range(6):
        assert curriculum.epoch(step) == cursor / num_prompts
        passed_over, taken = 0, []
        while len(taken) < batch_size:
            epoch = cursor // num_prompts
            index = slow_order(num_prompts, 5, epoch)[cursor % num_prompts]
            if passed_over < num_prompts and rested.get(index, -1) >= epoch:
                passed_over += 1
            else:
                taken.append((index, epoch))
            cursor += 1
        assert curriculum.batch_indices(step) == [index for index, _ in taken]
        rates = [random.choice([0.0, 0.2, 0.25, 0.5, 0.75, 0.8, 1.0, math.nan]) for _ in taken]
        for (index, epoch), rate in zip(taken, rates, strict=True):
            if rate == rate:
                rested[index] = -1 if 0.25 <= rate <= 0.75 else epoch + rest
        assert curriculum.epoch_after(step) == cursor / num_prompts
        curriculum.record(rates)
        again = Curriculum(Sampler(num_prompts, batch_size, 5), num_prompts, 0.25, 0.75, rest)
        again.restore(curriculum.state())
        curriculum = again


def test_sampler_refuses_nothing_to_sample() -> None:
    assert Sampler(1, 1, 0).batch_indices(3) == [0]
    for num_prompts, batch_size in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match=f"{num_prompts} prompts and a batch size of {batch_size} given"):
            Sampler(num_prompts, batch_size, 0)
