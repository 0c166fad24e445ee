"""Lower bounds of the time of what the simulated device runs, from bytes and operations of real sizes.

A model is tiny, and each of its sizes occurs once, so that every tensor's real size follows. A kernel takes the larger
of its bytes by the card's speed of copying and its operations by the speed of a large product, and the time of a start.
What kernels lose beyond that is not known here: this is no measurement.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import simulated_device
from cuda_formulas import MORE_KERNELS
from simulated_device import NO_KERNEL, aten
from torch import Tensor

PRODUCTS = {aten.mm.default, aten.mm.dtype, aten.addmm.default, aten.addmm_.default, aten.mm.out}
Totals = dict[str, list[float]]
"""Kernels, bytes, FLOPs and seconds of each group."""


@dataclass(frozen=True)
class Card:
    """What a card does in a second, as measured, and the seconds of a small kernel."""

    bytes_per_s: float
    flops_per_s: float
    start_s: float


H100 = Card(2.97e12, 700e12, 2e-6)
"""Speed of copying and of large products, as measured, and a small kernel of a graph."""


@dataclass
class Bound:
    """The sum so far."""

    card: Card
    real: dict[int, int]
    """The real size of a dimension, for each tiny one; others are as they are."""
    group_of: Callable[[Any, list[Tensor]], tuple[str, float]]
    """What an operation does, and its FLOPs, where it is no product of matrices."""
    ranks: set[int]
    """Sizes of adapters."""
    vocabulary: int
    spent: Totals = field(default_factory=lambda: defaultdict(lambda: [0, 0, 0, 0]))

    def size_of(self, tensor: Tensor) -> int:
        """Real bytes, those of a broadcast dimension once."""
        dims = zip(tensor.shape, tensor.stride(), strict=True)
        return tensor.itemsize * prod(1 if stride == 0 else self.real.get(size, size) for size, stride in dims)

    def add(self, group: str, moved: float, flops: float = 0.0, count: int = 1) -> None:
        """One operation of `count` kernels."""
        card = self.card
        seconds = max(moved / card.bytes_per_s, flops / card.flops_per_s) + count * card.start_s
        self.spent[group] = [a + b for a, b in zip(self.spent[group], (count, moved, flops, seconds), strict=True)]

    def install(self) -> None:
        """Count what every operation moves and computes from here on."""
        plain = simulated_device._run

        def run(func: Any, args: Any, kwargs: Any, bare_args: Any, bare_kwargs: Any) -> Any:
            result = plain(func, args, kwargs, bare_args, bare_kwargs)
            is_view = func is aten._unsafe_view.default or any(
                each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns
            )
            if not is_view and func not in NO_KERNEL:
                given = [*simulated_device._tensors(bare_args), *simulated_device._tensors(bare_kwargs.values())]
                made = [getattr(each, "elem", each) for each in simulated_device._tensors([result])]
                group, flops = self._product(func, given) or self.group_of(func, given)
                if func in (aten.index_select.default, aten.embedding.default):
                    given = given[1:] + made
                moved = sum(map(self.size_of, given)) + sum(map(self.size_of, made))
                self.add(group, moved, flops, 1 + MORE_KERNELS.get(func, 0))
            return result

        simulated_device._run = run

    def _product(self, func: Any, tensors: list[Tensor]) -> tuple[str, float] | None:
        if func not in PRODUCTS:
            return None
        x, y = tensors[-2:] if "out" not in str(func) else tensors[:2]
        sizes = [self.real.get(size, size) for size in (x.shape[0], x.shape[1], y.shape[1])]
        kind = "head's products" if self.vocabulary in sizes else "products"
        return "adapters' products" if self.ranks & {*sizes} else kind, 2.0 * prod(sizes)


def name_of(func: Any) -> str:
    """An operation's name."""
    return str(func).removeprefix("aten.").removeprefix("simulated.")


def of_all_layers(some: Totals, more: Totals, num_layers: int) -> dict[str, dict[str, float]]:
    """The groups of a model of `num_layers`, from those of one layer and of two; the longest first."""
    groups = {}
    for name, two in more.items():
        one = some.get(name, [0.0] * 4)
        kernels, moved, flops, seconds = (a + (num_layers - 1) * (b - a) for a, b in zip(one, two, strict=True))
        groups[name] = {"kernels": round(kernels), "gb": round(moved / 1e9, 2), "tflop": round(flops / 1e12, 2),
                        "ms": round(seconds * 1e3, 3)}  # fmt: skip
    return dict(sorted(groups.items(), key=lambda each: -each[1]["ms"]))


def sum_of(groups: Iterable[dict[str, float]], name: str) -> float:
    """One number of all groups."""
    return sum(each[name] for each in groups)
