"""Files of one JSON object on each line, which a run may be writing."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of all complete lines; none where there is no file. Raises ValueError, which names the line,
    for one that is no object."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if path.is_file() else []
    return [_object(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def append_json_line(path: Path, value: Mapping[str, Any]) -> None:
    """Add a line to a file that exists; raises OSError.

    Every line opens the file: one that was removed or moved away would take lines without an error, and lose them.
    """
    with open(os.open(path, os.O_WRONLY | os.O_APPEND), "w", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{path}, line {number}: {line[:60]!r} given, expected a JSON object as the run wrote it: "
                         "mend or remove the line")  # fmt: skip
    return value
