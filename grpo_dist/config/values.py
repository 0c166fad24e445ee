"""Options as values: their dotted names, defaults and descriptions, the differences of two configs, and secrets."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, Field
from typing import Any

from docstring_parser import parse_from_object

SECRET = re.compile(r"token|key|secret|password|passwd|credential", re.IGNORECASE)
"""Names that look like those of secrets: of options, of a reward's arguments, of environment variables."""
_OF_A_MODEL = ("max_tokens_in_flight", "banned_tokens", "tokenizer")
"""Options of a run with such names that are no secrets."""


def flat(values: Mapping[str, Any], *, numbered: bool = False, prefix: str = "") -> dict[str, Any]:
    """Return nested values by their dotted names, each as JSON holds it; an empty group is a value of its own.

    A list is one value. With `numbered`, a list of groups is a group instead, and its numbers are names
    (`rewards.0.name`): trackers and the report show one number or text a name.
    """
    named: dict[str, Any] = {}
    for part, value in values.items():
        if numbered and isinstance(value, list) and any(isinstance(each, dict) for each in value):
            value = dict(enumerate(value))
        if isinstance(value, dict) and value:
            named |= flat(value, numbered=numbered, prefix=f"{prefix}{part}.")
        else:
            named[f"{prefix}{part}"] = json.loads(json.dumps(value, default=str))
    return named


def redacted(values: Any, name: str = "") -> Any:
    """Return a config's values without the texts whose names look like those of secrets."""
    if isinstance(values, dict):
        return {key: redacted(value, str(key)) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [redacted(value, name) for value in values]
    is_secret = isinstance(values, str) and SECRET.search(name) and name not in _OF_A_MODEL
    return "<redacted>" if is_secret else values


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return one line for each option that differs, with both values."""
    a, b = flat(before), flat(now)
    return [f"{key}: {a.get(key)!r} -> {b.get(key)!r}" for key in sorted({*a, *b}) if a.get(key) != b.get(key)]


def descriptions(group: type) -> dict[str, str]:
    """The description of each documented option of a group, by its name, on one line."""
    entries = parse_from_object(group).params
    return {entry.arg_name: " ".join((entry.description or "").split()) for entry in entries}


def default_of(field: Field[Any]) -> Any:
    """The default of an option, or MISSING."""
    return field.default_factory() if field.default_factory is not MISSING else field.default
