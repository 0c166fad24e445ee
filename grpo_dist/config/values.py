"""Options as values: by their dotted names, with their defaults and what is said of them."""

from __future__ import annotations

from dataclasses import MISSING, Field
from typing import Any

from docstring_parser import parse_from_object


def flat(config: Any, name: str = "") -> dict[str, Any]:
    """Return a nested config by dotted names; lists of mappings get their numbers as names."""
    if isinstance(config, list) and any(isinstance(each, dict) for each in config):
        config = dict(enumerate(config))
    if not isinstance(config, dict) or not config:
        return {name: config}
    return {key: value for part, below in config.items()
            for key, value in flat(below, f"{name}.{part}" if name else str(part)).items()}  # fmt: skip


def descriptions(group: type) -> dict[str, str]:
    """What is said of each documented option of a group, by its name, on one line."""
    entries = parse_from_object(group).params
    return {entry.arg_name: " ".join((entry.description or "").split()) for entry in entries}


def default_of(field: Field[Any]) -> Any:
    """The default of an option, or MISSING."""
    return field.default_factory() if field.default_factory is not MISSING else field.default
