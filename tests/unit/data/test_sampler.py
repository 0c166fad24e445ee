"""The order of prompts: the counting sampler beside a slow twin."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_dist.data.order import Sampler, permutation


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


def test_sampler_refuses_nothing_to_sample() -> None:
    with pytest.raises(ValueError, match="0 prompts and a batch size of 4"):
        Sampler(0, 4, 0)
