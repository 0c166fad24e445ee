"""Files that are complete or as they were before, and the names of files."""

from __future__ import annotations

import contextlib
import difflib
import os
import uuid
from pathlib import Path


def write_file(path: Path, text: str) -> None:
    """Put a text in a file that readers see complete or as it was before, whoever else writes it.

    Raises OSError, as on a full disk, which names the file, and then leaves nothing behind.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:  # that of a write names no file, and others the temporary one
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # a read-only file system refuses this too, and would name this file
            temporary.unlink()


def sync(path: Path) -> None:
    """Flush a file's contents, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def near_paths(path: str) -> str:
    """The end of a message about a path that does not exist: the names nearest to it; empty where none are near."""
    missing = Path(path)
    if not missing.parent.is_dir():
        return ""
    names = sorted(entry.name for entry in missing.parent.iterdir() if not entry.name.startswith("."))
    near = difflib.get_close_matches(missing.name, names, n=3)
    return f"; near it: {', '.join(str(missing.parent / name) for name in near)}" if near else ""
