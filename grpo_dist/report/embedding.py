"""Embed text of any origin in a page. A reader sees all of it, and a browser sees only text."""

from __future__ import annotations

import json
import math
from typing import Any

from ..text.plain import visible


def harmless(value: Any, most_characters: int) -> Any:
    """Return JSON-like data with visible texts, cut to a length with a note, and null for infinite values and NaN."""
    if isinstance(value, dict):
        return {harmless(str(key), most_characters): harmless(each, most_characters) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [harmless(each, most_characters) for each in value]
    if isinstance(value, str):
        left = len(value) - most_characters
        return visible(value) if left <= 0 else f"{visible(value[:most_characters])} … ({left:,} more characters)"
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int)) else harmless(str(value), most_characters)


def encoded(value: Any) -> str:
    """Return data as JSON for a `<script>` element, which no text in it can end."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def cut(text: str, most_characters: int, most_bytes: int) -> tuple[str, bool]:
    """Return the beginning of a text, made visible and within both limits, and whether the text is cut.

    The bytes are those of `encoded`.
    """
    shown = visible(text[:most_characters])
    is_cut = len(text) > most_characters
    while shown and (size := len(encoded(shown).encode())) > most_bytes:
        shown, is_cut = shown[: len(shown) * most_bytes // size], True
    return shown, is_cut
