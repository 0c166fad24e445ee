"""Checks of options: `require` is the one way to refuse a value."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from datetime import date
from typing import Any

_collected: ContextVar[list[str] | None] = ContextVar("collected", default=None)


def require(condition: bool, key: str, given: object, expected: str) -> None:
    """Raise a ValueError that names the option, what was given and what was expected, unless `condition` is true."""
    if not condition:
        refusal = f"{key}: {given!r} given, expected {expected}"
        if (collected := _collected.get()) is None:
            raise ValueError(refusal)
        if not any(before.startswith(f"{key}:") for before in collected):
            collected.append(refusal)


def require_finite(group: Any, prefix: str = "") -> None:
    """Raise a ValueError for a number that is none, or is infinite, in a group of options; a reward's own arguments may
    be what they like."""
    for option in fields(group):
        key, value = f"{prefix}{option.name}", getattr(group, option.name)
        parts = (
            list(value.values()) if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
        )
        for part in parts:
            if is_dataclass(part):
                require_finite(part, f"{key}.")
            elif isinstance(part, float) and "Any" not in str(option.type):
                require(math.isfinite(part), key, value, "a finite number")


def require_seed(key: str, seed: int) -> None:
    """Raise a ValueError for a seed that torch does not take."""
    require(0 <= seed < 2**63, key, seed, "a whole number from 0 to 2**63 - 1")


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
    """Inside, `require` appends its messages to the list that is yielded, one for each option, and raises nothing."""
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
