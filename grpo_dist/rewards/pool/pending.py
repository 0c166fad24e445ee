"""Scores that the pool's threads fill in, and that its caller waits for."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..registry import TrainerState
from ..scores import Failure, FailureKind, Item, Scores

_CHECK_SECONDS = 0.2


class Pending:
    """Scores that threads of the pool fill in."""

    def __init__(
        self, num_items: int, columns: Sequence[str], names: Sequence[str], most_lost_calls: int, state: TrainerState
    ) -> None:
        self.items: list[Item | None] = [None] * num_items
        """The items to score; None for those that are not there yet."""
        self.arrived: list[int] = []
        """Places of the items that are there, in the order of their arrival."""
        self.state = state
        self.columns = list(columns)
        """The names of all items' columns."""
        self._names = list(names)
        self._most_lost_calls = most_lost_calls
        shape = (num_items, len(names))
        self._values = np.full(shape, np.nan)
        self._failures: dict[tuple[int, int], Failure] = {}
        self._seconds = np.zeros(len(names))
        self._lost_calls = [0] * len(names)
        self._repeated_calls = [0] * len(names)
        self._warned_of: set[int] = set()
        self._waiting: dict[int, list[int]] = {}
        self._per_token: dict[tuple[int, int], list[float]] = {}
        self._metrics: dict[str, list[tuple[float, int]]] = {}
        self._extras: dict[str, list[Any]] = {}
        self._open_cells = shape[0] * shape[1]
        self._error: Exception | None = None
        self._lock = threading.Lock()
        self._done = threading.Event()
        if not self._open_cells:
            self._done.set()

    def result(self, check: Callable[[], None] | None = None) -> Scores:
        """Wait for all scores; raises an error of the pool itself, for example that it is closed.

        `check` is called several times a second meanwhile, and may raise to end the wait.
        """
        while not self._done.wait(_CHECK_SECONDS):
            if check:
                check()
        if self._error is not None:
            raise self._error
        failed = np.zeros(self._values.shape, dtype=bool)
        for cell in self._failures:
            failed[cell] = True
        failures = [self._failures[cell] for cell in sorted(self._failures)]
        # fsum: calls end in any order, and a run that is started again writes the same metrics
        metrics = {name: (math.fsum(mean * count for mean, count in calls), sum(count for _, count in calls))
                   for name, calls in sorted(self._metrics.items())}  # fmt: skip
        return Scores(
            self._values, failed, failures, self._names, self._seconds, list(self._repeated_calls), self._per_token,
            metrics, dict(sorted(self._extras.items())),
        )  # fmt: skip

    def item(self, place: int) -> Item:
        """An item that has arrived."""
        item = self.items[place]
        assert item is not None
        return item

    def add(self, items: Mapping[int, Item]) -> None:
        """Add items by their places."""
        for place, item in items.items():
            self.items[place] = item
        self.arrived += items

    def fill(self, reward: int, group: Sequence[int], most: int) -> list[list[int]]:
        """Add a group for a reward whose calls have at most `most` items, and return the calls that are full.

        A group is divided where it alone has more. After the last item, all calls are returned.
        """
        calls, waiting = [], self._waiting.pop(reward, [])
        if waiting and len(waiting) + len(group) > most:
            calls, waiting = [waiting], []
        waiting = [*waiting, *group]
        while len(waiting) >= most or (waiting and len(self.arrived) == len(self.items)):
            calls.append(waiting[:most])
            waiting = waiting[most:]
        self._waiting[reward] = waiting
        return calls

    def scored(self, reward: int, places: Sequence[int], answer: dict[str, Any]) -> None:
        """Add the values of one call."""
        num_tokens = [len(self.item(place).completion_ids) for place in places]
        bad = {int(place): problem for place, problem in answer["bad"].items()}
        with self._lock:
            for number, (place, value) in enumerate(zip(places, answer["values"], strict=True)):
                if isinstance(value, list) and len(value) != num_tokens[number]:
                    message = f"returned {len(value)} numbers for {num_tokens[number]} tokens, expected one per token"
                    bad[number] = ("bad_value", message)
                else:
                    self._set_value(place, reward, value)
            for place, (kind, message) in bad.items():
                self._failures[places[place], reward] = self._failure(places[place], reward, kind, message)
            for name, mean in answer["metrics"].items():
                self._metrics.setdefault(f"{self._names[reward]}/{name}", []).append((mean, len(places)))
            for column, values in answer["extras"].items():
                cells = self._extras.setdefault(f"{self._names[reward]}/{column}", [None] * len(self.items))
                for place, value in zip(places, values, strict=True):
                    cells[place] = value
            self._close(len(places))

    def _set_value(self, place: int, reward: int, value: float | list[float | None] | None) -> None:
        if isinstance(value, list):
            numbers = np.array(value, dtype=float)  # None becomes NaN
            self._per_token[place, reward] = numbers.tolist()
            value = None if np.isnan(numbers).all() else float(np.nansum(numbers))
        self._values[place, reward] = np.nan if value is None else value

    def failed(self, reward: int, place: int, kind: FailureKind, message: str, traceback: str = "") -> None:
        """Record that one completion cannot be scored."""
        with self._lock:
            self._failures[place, reward] = self._failure(place, reward, kind, message, traceback)
            self._close(1)

    def spent(self, reward: int, seconds: float) -> None:
        """Add the seconds of a call."""
        with self._lock:
            self._seconds[reward] += seconds

    def lost_call(self, reward: int) -> None:
        """Count a call that ended its worker."""
        with self._lock:
            self._lost_calls[reward] += 1

    def repeated(self, reward: int) -> None:
        """Count a failed call that succeeded when it was repeated without the completions that fail alone."""
        with self._lock:
            self._repeated_calls[reward] += 1

    def first_repeat(self, reward: int) -> bool:
        """Whether no call of a reward was repeated before; true once."""
        with self._lock:
            is_first = reward not in self._warned_of
            self._warned_of.add(reward)
        return is_first

    def is_given_up(self, reward: int) -> bool:
        """Whether so many calls of a reward have ended their worker that further ones would only waste time."""
        return self._lost_calls[reward] >= self._most_lost_calls

    def abort(self, error: Exception) -> None:
        """Have `result` raise `error`."""
        self._error = error
        self._done.set()

    def _failure(self, place: int, reward: int, kind: FailureKind, message: str, traceback: str = "") -> Failure:
        return Failure(place, self._names[reward], kind, message, traceback)

    def _close(self, cells: int) -> None:
        self._open_cells -= cells
        if not self._open_cells:
            self._done.set()
