"""Files that are complete or as they were before."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def write_file(path: Path, text: str) -> None:
    """Put a text in a file that readers see complete or as it was before, whoever else writes it.

    Raises OSError, as on a full disk, and then leaves nothing behind.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
