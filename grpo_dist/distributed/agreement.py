"""What each rank finds by itself, and all have to treat alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Gather = Callable[[Any], list[Any]]
"""Returns what each rank gave it, in order of rank; a collective."""


def first_fault(gather: Gather, fault: str | None) -> str | None:
    """The fault of the first rank that has one, on all ranks; None where none has. A collective."""
    return next(filter(None, gather(fault)), None)
