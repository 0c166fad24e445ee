"""Files of one JSON object on each line, which a run may be writing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of all complete lines; none where there is no file. Raises ValueError, which names the line,
    for one that is no object."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if path.is_file() else []
    return [_object(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{path}, line {number}: {line[:60]!r} given, expected a JSON object as the run wrote it: "
                         "mend or remove the line")  # fmt: skip
    return value
