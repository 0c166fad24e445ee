"""Weights in another order: the same numbers, in memory that nobody else writes to."""

from __future__ import annotations

import gc
from functools import partial

import pytest
import torch
from decoded_steps import adapted, decoded, make_model
from torch import Tensor

from grpo_dist.model.compiled.library import OUTPUTS
from grpo_dist.model.loaded import fits_bfloat16
from grpo_dist.rollout.native import relaid
from grpo_dist.rollout.native.kernel import KernelStep
from grpo_dist.rollout.native.relaid import TOGETHER, RelaidWeights

pytestmark = pytest.mark.usefixtures("kernel")
FEW = partial(KernelStep, halves=True)


def test_only_float32_is_held_in_bfloat16() -> None:
    memory = RelaidWeights()
    for outputs in (4, 3, 1):
        weight = torch.randn(outputs, 72).bfloat16()
        words = memory.put_halves(weight.float())
        assert words is not None and fits_bfloat16(weight.float())
        lines = words.view(torch.bfloat16).view(-1, 72, 2).mT.reshape(-1, 72)
        assert torch.equal(lines[:outputs], weight) and not lines[outputs:].any()
        assert memory.put_halves(weight) is None and memory.put_halves(weight.half()) is None
        assert not fits_bfloat16(weight)
        for place in (0, -1):
            other = weight.float()
            other.view(-1)[place] += 1e-5
            assert memory.put_halves(other) is None and not fits_bfloat16(other)


def test_weights_in_bfloat16_lie_behind_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where what was reserved is not enough, and behind one that bfloat16 does not hold."""
    monkeypatch.setattr(relaid, "BLOCK_BYTES", 4096)
    memory = RelaidWeights()
    weights = [torch.randn(outputs, 16).bfloat16().float() for outputs in (16, 40, 8, 300)]
    words = [memory.put_halves(weight) for weight in weights[:2]]
    assert memory.put_halves(torch.full((8, 16), 0.1)) is None
    words += [memory.put_halves(weight) for weight in weights[2:]]
    assert words[1].data_ptr() == words[0].data_ptr() + words[0].nbytes
    for weight, put in zip(weights, words, strict=True):
        assert torch.equal(put.view(torch.bfloat16).view(-1, 16, 2).mT.reshape(-1, 16).float(), weight)


def lines_of(groups: Tensor) -> Tensor:
    """The weight that lies in groups, one line behind another."""
    outputs, inputs = groups.shape
    pieces = groups.reshape(outputs // OUTPUTS, inputs // TOGETHER, OUTPUTS, TOGETHER)
    return pieces.transpose(1, 2).reshape(outputs, inputs)


def test_a_group_has_a_cache_line_of_each_of_its_lines_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relaid, "SMALLEST_GROUPED", 1)
    memory = RelaidWeights()
    for shape in ((4, 16), (12, 48), (64, 1040)):
        weight = torch.randn(shape)
        groups = memory.put_groups(weight)
        assert groups is not None and torch.equal(lines_of(groups), weight) and groups.data_ptr() % 64 == 0
    assert memory.put_groups(torch.randn(6, 16)) is None and memory.put_groups(torch.randn(8, 24)) is None
    monkeypatch.setattr(relaid, "SMALLEST_GROUPED", 4 * 64 * 64)
    assert memory.put_groups(torch.randn(64, 48)) is None and memory.put_groups(torch.randn(64, 64)) is not None


@pytest.mark.parametrize(("hidden", "inner"), [(64, 96), (1040, 1200)], ids=["one-part", "parts"])
def test_groups_change_no_bit(hidden: int, inner: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of few rows and of several tiles and blocks of them; inputs of one part and of several."""
    model = adapted(make_model(hidden_size=hidden, intermediate_size=inner), 4, "all-linear", learned=0.05)

    def logits(smallest: int, count: int) -> Tensor:
        monkeypatch.setattr(relaid, "SMALLEST_GROUPED", smallest)
        places = [linear for layer in KernelStep(model).layers for linear in (layer.query, layer.gate, layer.down)]
        assert all(bool(linear.grouped) == (smallest == 1) for linear in places)
        return decoded(KernelStep, model, [3, 2, 31], True, torch.arange(count))

    for count in (1, 4, 6, 7, 30, 36):
        assert torch.equal(logits(1, count), logits(1 << 40, count))


def test_memory_is_kept_for_the_next_rollout_and_never_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relaid, "_spare", [])
    monkeypatch.setattr(relaid, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(relaid, "MOST_SPARE_BYTES", 3 * 4096)
    monkeypatch.setattr(relaid, "SMALLEST_GROUPED", 1)
    weight = torch.randn(16, 64)
    memories = [RelaidWeights() for _ in range(4)]
    places = set()
    for memory in memories:
        groups = memory.put_groups(weight)
        assert groups is not None
        places.add(groups.data_ptr())
    assert len(places) == 4, "weights of two rollouts lie in the same memory"
    del memory, groups
    memories.clear()
    gc.collect()
    assert len(relaid._spare) == 3, "more is kept than is allowed, or less"
    again = RelaidWeights().put_groups(weight)
    assert again is not None and again.data_ptr() in places
    large = RelaidWeights().put_groups(torch.randn(32, 64))
    assert large is not None and large.data_ptr() not in places, "a block is too small for it"
