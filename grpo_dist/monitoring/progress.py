"""How far sampling has come, where no step tells: the lines of an evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable


class Progress:
    """Counts completions of this rank that have ended, and says so from time to time."""

    def __init__(self, name: str, total: int, say: Callable[[str], None], seconds: float = 15.0) -> None:
        """`say` gets a line at most every `seconds`."""
        self._name, self._total, self._say, self._seconds = name, total, say, seconds
        self._ended = 0
        self._said_at = time.monotonic()

    def add(self, number: int) -> None:
        """Count `number` more completions."""
        self._ended += number
        if self._ended < self._total and time.monotonic() >= self._said_at + self._seconds:
            self._say(f"{self._name}: {self._ended} of {self._total} completions")
            self._said_at = time.monotonic()
