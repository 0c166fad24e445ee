"""Files of one JSON object on each line, which a run may be writing."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_json_lines(path: Path, key: str | None = None) -> list[dict[str, Any]]:
    """Return the objects of all complete lines; none where there is no file. Raises ValueError, which names the line,
    for one that is no object, or has no whole number under a `key`."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if path.is_file() else []
    return [_object(path, number, line, key) for number, line in enumerate(lines, 1) if line.strip()]


def read_history(directory: Path) -> list[dict[str, Any]]:
    """The complete lines of a run's metrics.jsonl. Raises ValueError, which names a line that is none."""
    return read_json_lines(directory / "metrics.jsonl", "step")


def append_json_line(path: Path, value: Mapping[str, Any]) -> None:
    """Add a line to a file that exists; raises OSError.

    Every line opens the file: one that was removed or moved away would take lines without an error, and lose them.
    """
    with open(os.open(path, os.O_WRONLY | os.O_APPEND), "w", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")


def _object(path: Path, number: int, line: str, key: str | None) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict) or (key is not None and type(value.get(key)) is not int):
        having = f" with a whole number as {key!r}" if key else ""
        raise ValueError(f"{path}, line {number}: {line[:60]!r} given, expected a JSON object{having} as the run wrote "
                         "it: mend or remove the line")  # fmt: skip
    return value
