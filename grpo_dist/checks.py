"""The one way in which an option is refused."""

from __future__ import annotations

import math


def require(condition: bool, key: str, given: object, expected: str) -> None:
    """Raise a ValueError that names the option, what was given and what was expected, unless `condition` holds.

    No option has a use for an infinite number.
    """
    if not condition or given in (math.inf, -math.inf):
        raise ValueError(f"{key}: {given!r} given, expected {expected}")
