"""Embed text of any origin in a page. A reader sees all of it, and a browser sees only text."""

from __future__ import annotations

import json
import math
import re
from typing import Any

UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
"""Characters that are invisible, control a terminal, or change the direction of text."""


def visible(text: str) -> str:
    """Return a text with invisible characters replaced by names: `␛` for control characters, `⟨U+202E⟩` for others."""
    return UNSEEN.sub(lambda match: _named(match.group()), text)


def _named(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"


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
