"""The one way in which an option is refused."""

from __future__ import annotations


def require(condition: bool, key: str, given: object, expected: str) -> None:
    """Raise a ValueError that names the option, what was given and what was expected, unless `condition` holds."""
    if not condition:
        raise ValueError(f"{key}: {given!r} given, expected {expected}")
