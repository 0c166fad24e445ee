"""Options as values: by their dotted names."""

from __future__ import annotations

from typing import Any


def flat(config: Any, name: str = "") -> dict[str, Any]:
    """Return a nested config by dotted names; lists of mappings get their numbers as names."""
    if isinstance(config, list) and any(isinstance(each, dict) for each in config):
        config = dict(enumerate(config))
    if not isinstance(config, dict) or not config:
        return {name: config}
    return {key: value for part, below in config.items()
            for key, value in flat(below, f"{name}.{part}" if name else str(part)).items()}  # fmt: skip
