"""Checks of options: `require` is the one way to refuse a value."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import date
from typing import Any

_collected: ContextVar[list[str] | None] = ContextVar("collected", default=None)


def require(condition: bool, key: str, given: object, expected: str) -> None:
    """Raise a ValueError that names the option, what was given and what was expected, unless `condition` is true.

    An infinite number is always refused.
    """
    if not condition or given in (math.inf, -math.inf):
        refusal = f"{key}: {given!r} given, expected {expected}"
        if (collected := _collected.get()) is None:
            raise ValueError(refusal)
        collected.append(refusal)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: the nearest of the known ones; empty where none is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def is_date(text: str) -> bool:
    """Whether a text is a date as YYYY-MM-DD."""
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


@contextmanager
def collected_refusals() -> Iterator[list[str]]:
    """Inside, `require` appends its messages to the list that is yielded, and raises nothing."""
    refusals: list[str] = []
    token = _collected.set(refusals)
    try:
        yield refusals
    finally:
        _collected.reset(token)


def with_home(paths: Any) -> Any:
    """A path, or a mapping by paths, with the home directory in place of a `~` at its beginning: YAML has no shell."""
    if isinstance(paths, dict):
        return {os.path.expanduser(path): value for path, value in paths.items()}
    return os.path.expanduser(paths) if isinstance(paths, str) else paths
