"""The learning rate, step by step."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest

from grpo_dist.algorithm.schedule import learning_rate
from grpo_dist.config.schema import OptimConfig

pytestmark = pytest.mark.quick

Scheduler = Literal["cosine", "linear", "constant"]


def rates(scheduler: Scheduler, warmup: int, num_steps: int) -> list[float]:
    """The rates of a run whose peak is 1."""
    optim = OptimConfig(learning_rate=1.0, scheduler=scheduler, warmup_steps=warmup)
    return [learning_rate(step, num_steps, optim) for step in range(num_steps)]


def test_known_values() -> None:
    assert rates("linear", 0, 4) == pytest.approx([1, 0.75, 0.5, 0.25])
    assert rates("linear", 2, 6) == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25])
    assert rates("cosine", 0, 4) == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])
    assert rates("constant", 3, 5) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1])


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("warmup", "num_steps"), [(0, 1), (1, 1), (3, 3), (0, 50), (10, 50), (49, 50)])
def test_every_step_learns_and_none_above_the_peak(scheduler: Scheduler, warmup: int, num_steps: int) -> None:
    values = rates(scheduler, warmup, num_steps)
    assert all(0 < value <= 1 for value in values)
    rising, falling = values[:warmup], values[warmup:]
    assert rising == sorted(rising) and falling == sorted(falling, reverse=True)
    if falling:
        assert falling[0] == 1
    if rising:
        assert rising[-1] == 1
    if scheduler != "constant" and len(falling) > 30:
        assert falling[-1] < 0.05


def test_shares_of_the_steps_and_of_the_peak() -> None:
    def course(**options: Any) -> list[float]:
        optim = OptimConfig(learning_rate=1.0, **options)
        return [learning_rate(step, 10, optim) for step in range(10)]

    assert course(warmup_ratio=0.15, scheduler="constant") == pytest.approx([0.5, *[1] * 9])
    assert course(warmup_ratio=0.2) == course(warmup_steps=2)
    assert course(scheduler="linear", min_lr_ratio=0.5)[5] == pytest.approx(0.75)
    stable = course(scheduler="warmup_stable_decay", warmup_steps=2, decay_ratio=0.4, min_lr_ratio=0.2)
    falls = [0.2 + 0.8 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert stable == pytest.approx([0.5, *[1] * 5, *falls])
    assert course(scheduler="warmup_stable_decay", decay_ratio=0) == [1] * 10
    assert course(scheduler="warmup_stable_decay", warmup_steps=8, decay_ratio=1)[8] == 1


@pytest.mark.parametrize(
    "options", [{"warmup_ratio": 1.5}, {"min_lr_ratio": -1}, {"warmup_ratio": 0.1, "warmup_steps": 3}]
)
def test_shares_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="optim"):
        OptimConfig(**options)


def test_the_peak_only_scales() -> None:
    optim = OptimConfig(learning_rate=3e-5, warmup_steps=2)
    assert [learning_rate(step, 9, optim) for step in range(9)] == pytest.approx(
        [3e-5 * value for value in rates("cosine", 2, 9)]
    )
