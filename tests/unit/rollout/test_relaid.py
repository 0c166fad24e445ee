"""Weights in another order: the same numbers, in memory that nobody else writes to."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from decoded_steps import adapted, decoded, make_model
from torch import Tensor

from grpo_dist.model.compiled.library import CACHE_LINE, OUTPUTS, SPAN
from grpo_dist.rollout.native import relaid
from grpo_dist.rollout.native.kernel import KernelStep
from grpo_dist.rollout.native.relaid import TOGETHER, CompactWeight, CompactWeights, RelaidWeights, can_be_compact

pytestmark = pytest.mark.usefixtures("kernel")


def numbers_of(compact: CompactWeight, outputs: int, in_turn: bool) -> Tensor:
    """The weight in bfloat16, number by number as `Compact` of `compact.h` is described, as int32 of its bits."""
    stored, lines = compact.blocks.view(torch.uint8).tolist(), []
    for start, base, whole in zip(compact.starts.tolist(), compact.bases.tolist(), compact.whole.tolist(), strict=True):
        first, second = [], []
        for is_whole in whole:
            if is_whole:
                numbers = [stored[n] | stored[n + 1] << 8 for n in range(start, start + 4 * SPAN, 2)]
                start += 4 * SPAN
            else:
                rest, codes = stored[start : start + 2 * SPAN], stored[start + 2 * SPAN : start + 3 * SPAN]
                each = [code & 15 for code in codes] + [code >> 4 for code in codes]
                exponents = [code * 128 + base if code else 0 for code in each]
                numbers = [(byte & 128) << 8 | byte & 127 | e for byte, e in zip(rest, exponents, strict=True)]
                start += 3 * SPAN
            first += numbers[::2] if in_turn else numbers[:SPAN]
            second += numbers[1::2] if in_turn else numbers[SPAN:]
        lines += [first, second]
    assert not any(any(line) for line in lines[outputs:]), "what lies beside the last line is not 0"
    return torch.tensor(lines[:outputs], dtype=torch.int32)


def bits_of(weight: Tensor) -> Tensor:
    return weight.bfloat16().view(torch.int16).int() & 0xFFFF


def weight_like_trained(outputs: int, inputs: int) -> Tensor:
    """Numbers of a normal distribution with zeros of both signs among them, in bfloat16."""
    weight = torch.randn(outputs, inputs) * torch.tensor(0.02)
    weight[:, 5::17] = 0.0
    weight[0, 9] = -0.0
    return weight.bfloat16()


@pytest.mark.parametrize("in_turn", [False, True], ids=["pairs", "in-turn"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compact_weights_lose_nothing(dtype: torch.dtype, in_turn: bool) -> None:
    """Of an even and an odd number of lines, of any exponents, and of what is no number."""
    memory = RelaidWeights()
    tiny = torch.finfo(torch.bfloat16).tiny
    for outputs, inputs in ((4, 64), (3, 192), (1, 128)):
        plain = weight_like_trained(outputs, inputs)
        odd = plain.clone()
        odd[0, 1], odd[-1, -1], odd[0, 70 % inputs] = 3e38, torch.inf, torch.nan
        spread = plain * torch.randint(-100, 100, plain.shape).float().exp2().bfloat16()
        small = torch.full_like(plain, tiny / 4)
        small[:, 1::2] = 9 * tiny
        for weight in (plain, odd, spread, small, torch.zeros_like(plain), -torch.ones_like(plain)):
            compact = memory.put_compact(weight.to(dtype), in_turn)
            assert compact is not None
            assert torch.equal(numbers_of(compact, outputs, in_turn), bits_of(weight))
            assert compact.blocks.data_ptr() % CACHE_LINE == 0


def test_almost_all_blocks_of_trained_weights_take_12_bits_a_number() -> None:
    compact = RelaidWeights().put_compact(weight_like_trained(256, 1024), in_turn=False)
    assert compact is not None and float(compact.whole.float().mean()) < 0.03
    assert compact.blocks.nbytes < 1.02 * 256 * 1024 * 1.5


def test_a_block_is_whole_where_an_exponent_has_no_code() -> None:
    """The largest of two lines and 14 below it have one, and so has zero."""
    for power, is_whole in ((-14, 0), (-15, 1)):
        weight = torch.ones(2, 128)
        weight[1, 70] = 2.0**power
        weight[0, 3] = 0.0
        compact = RelaidWeights().put_compact(weight, in_turn=False)
        assert compact is not None and compact.whole.tolist() == [[0, is_whole]]
        assert torch.equal(numbers_of(compact, 2, in_turn=False), bits_of(weight))


def test_only_what_bfloat16_holds_is_compact() -> None:
    memory = RelaidWeights()
    weight = torch.randn(4, 128).bfloat16()
    assert can_be_compact(weight.float()) and memory.put_compact(weight.float(), in_turn=True) is not None
    for other in (weight.half(), weight.double(), weight[:, :72].contiguous(), weight.T):
        assert memory.put_compact(other, in_turn=True) is None
    assert not can_be_compact(weight[:, :72].float().contiguous()) and not can_be_compact(weight)
    for place in (0, -1):
        for lines in (4, 3):
            other = weight[:lines].float()
            other.view(-1)[place] += 1e-5
            assert memory.put_compact(other, in_turn=False) is None and not can_be_compact(other)


def test_compact_weights_lie_behind_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where what was reserved is not enough, and behind one that bfloat16 does not hold."""
    monkeypatch.setattr(relaid, "BLOCK_BYTES", 4096)
    memory = RelaidWeights()
    weights = [weight_like_trained(outputs, 64) for outputs in (16, 6, 8, 300)]
    put = [memory.put_compact(weight, in_turn=False) for weight in weights[:2]]
    assert memory.put_compact(torch.full((8, 64), 0.1), in_turn=False) is None
    put += [memory.put_compact(weight, in_turn=False) for weight in weights[2:]]
    first, second = put[0].blocks, put[1].blocks
    assert second.data_ptr() == first.data_ptr() + first.nbytes
    for weight, compact in zip(weights, put, strict=True):
        assert torch.equal(numbers_of(compact, len(weight), in_turn=False), bits_of(weight))


def test_compact_weights_that_never_change_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the weights that they are of; parts of a weight each by itself, and no more than is allowed."""
    weights = [weight_like_trained(6, 64) for _ in range(4)]
    frozen, trained, third, last = weights
    kept, memory = CompactWeights(lambda weight: weight is not trained), RelaidWeights()

    def of(weight: Tensor) -> CompactWeight:
        compact = kept.of(weight, False, memory)
        assert compact is not None and torch.equal(numbers_of(compact, len(weight), False), bits_of(weight))
        return compact

    first = of(frozen)
    assert of(frozen) is first and of(frozen[:2]) is not first
    trained_before = of(trained)
    trained.neg_()
    assert of(trained) is not trained_before
    uneven = torch.full((2, 64), 0.1)
    assert kept.of(uneven, False, memory) is None and kept.of(uneven, False, memory) is None
    monkeypatch.setattr(relaid, "MOST_SPARE_BYTES", sum(each.nbytes for each in (frozen, frozen[:2], third)))
    assert of(third) is of(third) and of(last) is not of(last) and of(frozen) is first
    held = weakref.ref(frozen)
    weights.clear()
    del frozen
    gc.collect()
    assert held() is not None, "another weight may come to lie where one lay that is kept"


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
