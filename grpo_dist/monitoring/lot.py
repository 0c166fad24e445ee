"""Which prompts come first where not all are shown. It does not import torch: the report needs nothing else of it."""

from __future__ import annotations

import zlib
from collections.abc import Iterable


def by_lot(prompt_indices: Iterable[int]) -> list[int]:
    """Return the different prompts in a random order that is the same at every step, so that samples repeat prompts."""
    return sorted(set(prompt_indices), key=lambda index: (zlib.crc32(str(index).encode()), index))
