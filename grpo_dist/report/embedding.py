"""Text of any origin, put into a page such that a reader sees what is there and a browser sees nothing but text."""

from __future__ import annotations

import json
import math
import re
from typing import Any

UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
"""Characters that show nothing, steer a terminal, or turn the direction of the text around them."""


def visible(text: str) -> str:
    """Return a text with what cannot be seen named: `␛` for control characters, `⟨U+202E⟩` for the others."""
    return UNSEEN.sub(lambda found: _named(found.group()), text)


def _named(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"


def harmless(value: Any, most_characters: int) -> Any:
    """Return JSON-like data with visible texts, each cut to a length and saying so, and null for infinite and NaN."""
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
    """Return data as JSON for the inside of a `<script>` element, which nothing in it can end."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def cut(text: str, most_characters: int, most_bytes: int) -> tuple[str, bool]:
    """Return as much of a text's beginning, made visible, as keeps to both limits, and whether anything is missing.

    The bytes are those of `encoded`.
    """
    shown = visible(text[:most_characters])
    is_cut = len(text) > most_characters
    while shown and (size := len(encoded(shown).encode())) > most_bytes:
        shown, is_cut = shown[: len(shown) * most_bytes // size], True
    return shown, is_cut
