"""The module `random` of a process of environments draws from a stream of the episode.

An environment that draws with `random` then begins the same game for all samples of a prompt, on any rank and after a
restart. Other generators (numpy's, the system's) are left as they are: `reset` can take a `seed` for them.
"""

from __future__ import annotations

import random
from contextvars import ContextVar
from typing import Any

_stream: ContextVar[random.Random | None] = ContextVar("stream", default=None)
_outside = random.Random()
"""Draws where no episode is under way, as at the import of a module."""


def use(stream: random.Random) -> None:
    """Let `random` draw from `stream` in this thread, and in the coroutines that it starts."""
    _stream.set(stream)


def install() -> None:
    """Replace the functions of `random`. Modules of users have to be imported afterwards: they may keep functions."""
    ours, theirs = _ByEpisode(), getattr(random.random, "__self__", None)
    for name in random.__all__:
        if getattr(getattr(random, name), "__self__", None) is theirs:
            setattr(random, name, getattr(ours, name))


class _ByEpisode(random.Random):
    """Draws from the stream of the episode under way; all other methods are made of these."""

    @property
    def _now(self) -> random.Random:
        return _stream.get() or _outside

    @property
    def gauss_next(self) -> float | None:
        """The second of a pair of normal numbers, which `gauss` keeps."""
        return vars(self._now)["gauss_next"]

    @gauss_next.setter
    def gauss_next(self, value: float | None) -> None:
        vars(self._now)["gauss_next"] = value

    def random(self) -> float:
        """A number in [0, 1)."""
        return self._now.random()

    def getrandbits(self, k: int, /) -> int:
        """`k` random bits."""
        return self._now.getrandbits(k)

    def seed(self, *given: Any, **named: Any) -> None:
        """Begin the stream anew."""
        self._now.seed(*given, **named)

    def getstate(self) -> tuple[Any, ...]:
        """The state of the stream."""
        return self._now.getstate()

    def setstate(self, state: tuple[Any, ...]) -> None:
        """Take up a state of the stream."""
        self._now.setstate(state)
