"""Which prompts a step takes: counters, and nothing that a loader would have to keep. Pure.

`Sampler` goes through one data set, `Mixture` through several in given shares. `Curriculum` leaves out for a while what
was measured to be too easy or too hard: its state is its history, which every rank has and a checkpoint keeps.
"""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Some = TypeVar("Some", bound="Stateless")

_GOLDEN = 0x9E3779B97F4A7C15
_CYCLE = 1000  # slots in which a mixture keeps to its shares: the finest share it can keep is one in a thousand


class Stateless:
    """What samplers without a history share."""

    seed: int

    def reseeded(self: Some, seed: int) -> Some:
        """Return a sampler of the same data in the same shares whose orders come from another seed."""
        other = copy.copy(self)
        other.seed = seed
        return other

    def record(self, pass_rates: Sequence[float]) -> None:
        """Take in what a batch was measured to be: nothing, the order is fixed."""

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint has to keep: nothing, the step says it all."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up a state that `state` returned."""


class Sampler(Stateless):
    """Which prompts a step takes: a permutation per epoch and a counter, nothing else.

    Batches run on over the end of an epoch, so a batch may hold a prompt twice, and always does where it is larger than
    the data set.
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

    def epoch(self, step: int) -> float:
        """Return how many times the data has been gone through before a step."""
        return step * self.batch_size / self.num_prompts


class Mixture(Stateless):
    """Prompts of several data sets in given shares, each gone through in its own permutations.

    Every 1000 consecutive prompts hold each data set's share exactly (to the nearest whole number), in an order that
    depends on the seed. The prompts of all data sets are taken to stand in one list, one data set after another.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], batch_size: int, seed: int) -> None:
        """Raises ValueError for an empty data set, or for a weight too small for a single prompt in 1000."""
        if not sizes or len(sizes) != len(weights) or min(sizes) < 1 or min(weights) <= 0 or batch_size < 1:
            raise ValueError(f"data sets of {sizes} prompts with the weights {weights} given, expected numbers above 0")
        self.batch_size, self.seed = batch_size, seed
        self._sizes = list(sizes)
        self._starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).tolist()
        exact = np.array(weights) / sum(weights) * _CYCLE
        counts = np.floor(exact).astype(int)
        for place in np.argsort(counts - exact, kind="stable")[: _CYCLE - counts.sum()]:
            counts[place] += 1
        if counts.min() < 1:
            raise ValueError(f"the weights {list(weights)} given, expected each to be a thousandth of the sum or more")
        self._counts = counts
        self._slots = np.repeat(np.arange(len(sizes)), counts)

    def batch_indices(self, step: int) -> list[int]:
        """Return the places of a step's `batch_size` prompts in the joined list: a function of the step alone."""
        return [self.index(cursor) for cursor in range(step * self.batch_size, (step + 1) * self.batch_size)]

    def index(self, cursor: int) -> int:
        """Return the place of the prompt that comes after `cursor` others."""
        cycle, slot = divmod(cursor, _CYCLE)
        order = self._slots[permutation(_CYCLE, self.seed, -1 - cycle)]  # epochs count from 0 up
        source = int(order[slot])
        before = cycle * int(self._counts[source]) + int((order[:slot] == source).sum())
        epoch, place = divmod(before, self._sizes[source])
        return self._starts[source] + int(permutation(self._sizes[source], self.seed + source, epoch)[place])

    def epoch(self, step: int) -> float:
        """Return how many prompts come before a step, in multiples of all there are."""
        return step * self.batch_size / sum(self._sizes)


class Curriculum:
    """Prompts that are neither solved nor hopeless, by the pass rate of their last group.

    The order is that of the sampler underneath. A prompt whose last pass rate was outside [low, high] is passed over
    until `rest` further passes through the data have begun; one that was never measured is taken. Where a whole pass
    holds nothing to take, prompts are taken as they come. The next batch is a function of the history, which is equal
    on all ranks because the batch is.
    """

    def __init__(self, sampler: Sampler | Mixture, num_prompts: int, low: float, high: float, rest: int) -> None:
        self._sampler, self._num_prompts = sampler, num_prompts
        self._low, self._high, self._rest = low, high, rest
        self._cursor = 0
        self._measured: dict[int, tuple[float, int]] = {}

    def batch_indices(self, step: int) -> list[int]:
        """Return the places of the next batch's prompts; the same until `record` is called."""
        return [index for _, index in self._walk()]

    def epoch(self, step: int) -> float:
        """Return how many times the data has been gone through, prompts that were passed over counted."""
        return self._cursor / self._num_prompts

    def record(self, pass_rates: Sequence[float]) -> None:
        """Take in the batch's pass rates, (batch_size,), NaN where a group is unscored, and go on to the next batch."""
        walked = list(self._walk())
        for (cursor, index), rate in zip(walked, pass_rates, strict=True):
            if rate == rate:
                self._measured[index] = (float(rate), cursor // self._num_prompts)
        self._cursor = walked[-1][0] + 1

    def state(self) -> dict[str, Any]:
        """Return the history as JSON."""
        return {"cursor": self._cursor, "measured": [[place, *told] for place, told in self._measured.items()]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up a history that `state` returned; an empty one, of a run that had no curriculum, is a beginning."""
        if not state:
            return
        self._cursor = int(state["cursor"])
        self._measured = {int(place): (float(rate), int(seen)) for place, rate, seen in state["measured"]}

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
        rate, seen = self._measured.get(index, (self._low, epoch))
        return not self._low <= rate <= self._high and epoch - seen <= self._rest


@functools.lru_cache(maxsize=16)
def permutation(num_prompts: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order of an epoch, (num_prompts,), a read-only permutation of range(num_prompts).

    Prompts are sorted by the SplitMix64 (Steele et al. 2014) of their place under a key made from seed and epoch. The
    mixing is a bijection, so there are no ties, and no library's generator is used: the order is the same in any
    version of anything.
    """
    digest = hashlib.blake2b(f"{seed}:{epoch}".encode(), digest_size=8).digest()
    places = np.arange(1, num_prompts + 1, dtype=np.uint64)
    keys = np.uint64(int.from_bytes(digest, "little")) + places * np.uint64(_GOLDEN)  # wraps at 2^64, as it should
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    order = np.argsort(keys ^ (keys >> np.uint64(31)))
    order.flags.writeable = False
    return order
