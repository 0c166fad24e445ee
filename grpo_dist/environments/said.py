"""What tools and environments return, as the texts and messages that the model reads. Pure."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

_ADDRESS = re.compile(r" at 0x[0-9a-f]+>")
"""The end of what Python writes of an object without a text of its own: where it lies in memory."""


def text_of(value: Any) -> str:
    """A text as it is, other values as JSON: sets as sorted lists, dataclasses by their fields, and what has no form in
    JSON by the text that Python has of it, without an address in memory."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> Any:
    """What JSON has for a value that it has no form for; a text where it has nothing better."""
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: getattr(value, each.name) for each in fields(value)}
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=_place)
    if callable(getattr(value, "tolist", None)):
        # numbers and arrays of numpy, and tensors: a model that reads "5" in quotes reads a text
        return value.tolist()
    return without_addresses(str(value))


def _place(member: Any) -> tuple[float, str]:
    """What a set's members are sorted by: numbers by their size, before others by their texts."""
    return (member, "") if isinstance(member, (int, float)) else (math.inf, text_of(member))


def without_addresses(text: str) -> str:
    """A text of Python's without the places of objects in memory, which differ from run to run."""
    return _ADDRESS.sub(">", text)


def observation_of(value: Any) -> str | list[dict[str, str]] | None:
    """What `reset` or `after_turn` returned: a text, the texts of a list of parts, messages, or None; raises TypeError
    for others."""
    if value is None or isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else [value]
    if all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        return "\n".join(part["text"] for part in parts)
    if all(isinstance(part, dict) and all(isinstance(part.get(key), str) for key in ("role", "content"))
           for part in parts):  # fmt: skip
        return [{"role": part["role"], "content": part["content"]} for part in parts]
    raise TypeError(f"{value!r:.80} returned, expected None, a text, or messages with the texts `role` and "
                    "`content`")  # fmt: skip


def shortened(text: str, most: int) -> str:
    """The text, its middle left out where it is longer than `most` characters."""
    if len(text) <= most:
        return text
    note = f"\n[{len(text) - most} characters left out]\n"
    half = most // 2
    return text[:half] + note + text[len(text) - (most - half) :]
