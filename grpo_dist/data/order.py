"""Which prompts a step takes: functions of counters, without the state of a loader. Pure.

`Sampler` goes through one data set, `Mixture` through several in given shares. `Curriculum` leaves prompts out for a
while that were too easy or too hard. Its state is its history, which is the same on every rank and in the checkpoint.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ..algorithm.hashing import hashed

Some = TypeVar("Some", bound="Stateless")

_CYCLE = 1000  # consecutive prompts in which a mixture keeps its shares: the smallest share is one in a thousand


class Stateless:
    """The part that samplers without a history share."""

    seed: int
    num_prompts: int
    batch_size: int

    def epoch(self, step: int) -> float:
        """Return the prompts before a step, in multiples of all prompts: passes through the data."""
        return step * self.batch_size / self.num_prompts

    def epoch_after(self, step: int) -> float:
        """Return the passes through the data once a step has taken its prompts."""
        return self.epoch(step + 1)

    def reseeded(self: Some, seed: int) -> Some:
        """Return a sampler of the same data in the same shares, with the order of another seed."""
        other = copy.copy(self)
        other.seed = seed
        return other

    def record(self, pass_rates: Sequence[float]) -> None:
        """Do nothing: pass rates do not change the order."""

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint: nothing, because the step decides the prompts."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""


class Sampler(Stateless):
    """Which prompts a step takes: a permutation for each epoch, and a counter.

    Batches continue over the end of an epoch, so a batch may have a prompt twice, and always does where it is larger
    than the data set.
    """

    def __init__(self, num_prompts: int, batch_size: int, seed: int) -> None:
        if num_prompts < 1 or batch_size < 1:
            raise ValueError(
                f"{num_prompts} prompts and a batch size of {batch_size} given, expected at least 1 of each"
            )
        self.num_prompts = num_prompts
        self.batch_size = batch_size
        self.seed = seed

    def batch_indices(self, step: int) -> list[int]:
        """Return the places of a step's `batch_size` prompts in the list of prompts: a function of the step alone."""
        indices: list[int] = []
        cursor, end = step * self.batch_size, (step + 1) * self.batch_size
        while cursor < end:
            epoch, place = divmod(cursor, self.num_prompts)
            taken = permutation(self.num_prompts, self.seed, epoch)[place : place + end - cursor]
            indices += taken.tolist()
            cursor += len(taken)
        return indices

    def index(self, cursor: int) -> int:
        """Return the place of the prompt that comes after `cursor` others."""
        epoch, place = divmod(cursor, self.num_prompts)
        return int(permutation(self.num_prompts, self.seed, epoch)[place])


class Mixture(Stateless):
    """Prompts of several data sets in given shares, each in its own permutations.

    Every 1000 consecutive prompts have each data set's share exactly (to the nearest whole number), in an order that
    depends on the seed. Places count in one list of the prompts of all data sets, one data set after another.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], batch_size: int, seed: int) -> None:
        """Raises ValueError for an empty data set, or for a weight too small for a single prompt in 1000."""
        if not sizes or len(sizes) != len(weights) or min(sizes) < 1 or min(weights) <= 0 or batch_size < 1:
            raise ValueError(f"data sets of {sizes} prompts with the weights {weights} given, expected numbers above 0")
        self.batch_size, self.seed = batch_size, seed
        self._sizes, self.num_prompts = list(sizes), sum(sizes)
        self._starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).tolist()
        exact = np.array(weights) / sum(weights) * _CYCLE
        counts = np.floor(exact).astype(int)
        for place in np.argsort(counts - exact, kind="stable")[: _CYCLE - counts.sum()]:
            counts[place] += 1
        if counts.min() < 1:
            raise ValueError(f"the weights {list(weights)} given, expected each to be a thousandth of the sum or more")
        self._counts = counts
        self._sources = np.repeat(np.arange(len(sizes)), counts)

    def batch_indices(self, step: int) -> list[int]:
        """Return the places of a step's `batch_size` prompts in the joined list: a function of the step alone."""
        return [self.index(cursor) for cursor in range(step * self.batch_size, (step + 1) * self.batch_size)]

    def index(self, cursor: int) -> int:
        """Return the place of the prompt that comes after `cursor` others."""
        cycle, position = divmod(cursor, _CYCLE)
        order = self._sources[permutation(_CYCLE, self.seed, -1 - cycle)]  # epochs count from 0 up
        source = int(order[position])
        before = cycle * int(self._counts[source]) + int((order[:position] == source).sum())
        epoch, place = divmod(before, self._sizes[source])
        return self._starts[source] + int(permutation(self._sizes[source], self.seed + source, epoch)[place])


class Curriculum:
    """Prompts that are neither too easy nor too hard, by the pass rate of their last group.

    The order is that of the sampler inside. A prompt whose last pass rate was outside [low, high] is passed over until
    `rest` further passes through the data have begun. A prompt without a pass rate is taken. If all prompts of a pass
    are passed over, prompts are taken in order. The next batch is a function of the history, which is equal on all
    ranks because the batch is.
    """

    def __init__(self, sampler: Sampler | Mixture, num_prompts: int, low: float, high: float, rest: int) -> None:
        self._sampler, self._num_prompts = sampler, num_prompts
        self._low, self._high, self._rest = low, high, rest
        self._cursor = 0
        self._last_rates: dict[int, tuple[float, int]] = {}
        """Pass rate of each prompt's last group, and the pass through the data in which that was."""

    def batch_indices(self, step: int) -> list[int]:
        """Return the places of the next batch's prompts; the same until `record` is called."""
        return [index for _, index in self._walk()]

    def epoch(self, step: int) -> float:
        """Return the passes through the data before the next batch, which include prompts that were passed over."""
        return self._cursor / self._num_prompts

    def epoch_after(self, step: int) -> float:
        """Return the same after the next batch, which its pass rates do not change."""
        return (list(self._walk())[-1][0] + 1) / self._num_prompts

    def record(self, pass_rates: Sequence[float]) -> None:
        """Record the batch's pass rates, (batch_size,), NaN where a group is unscored, and go on to the next batch."""
        walked = list(self._walk())
        for (cursor, index), rate in zip(walked, pass_rates, strict=True):
            if not math.isnan(rate):
                self._last_rates[index] = (float(rate), cursor // self._num_prompts)
        self._cursor = walked[-1][0] + 1

    def state(self) -> dict[str, Any]:
        """Return the history as JSON."""
        return {"cursor": self._cursor, "measured": [[place, *last] for place, last in self._last_rates.items()]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the history that `state` returned; an empty one is of a run that had no curriculum."""
        if not state:
            return
        self._cursor = int(state["cursor"])
        self._last_rates = {int(place): (float(rate), int(seen)) for place, rate, seen in state["measured"]}

    def _walk(self) -> Iterator[tuple[int, int]]:
        """Yield cursor and place of each prompt of the next batch."""
        cursor, passed_over = self._cursor, 0
        for _ in range(self._sampler.batch_size):
            while passed_over < self._num_prompts and self._rests(self._index(cursor), cursor // self._num_prompts):
                cursor, passed_over = cursor + 1, passed_over + 1
            yield cursor, self._index(cursor)
            cursor += 1

    def _index(self, cursor: int) -> int:
        return self._sampler.index(cursor)

    def _rests(self, index: int, epoch: int) -> bool:
        rate, seen = self._last_rates.get(index, (self._low, epoch))
        return not self._low <= rate <= self._high and epoch - seen <= self._rest


@functools.lru_cache(maxsize=16)
def permutation(num_prompts: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order of an epoch, (num_prompts,), a read-only permutation of range(num_prompts).

    Prompts are sorted by the hash of their place under a key made from seed and epoch. It is a bijection, so there are
    no ties. It uses no library's generator, so the order is the same with any version of any package.
    """
    digest = hashlib.blake2b(f"{seed}:{epoch}".encode(), digest_size=8).digest()
    key = torch.tensor(int.from_bytes(digest, "little", signed=True))
    order = np.argsort(hashed(key, torch.arange(num_prompts)).numpy().view(np.uint64))
    order.flags.writeable = False
    return order
