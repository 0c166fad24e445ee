"""Where a model lies: a directory here, or a repository of the hub."""

from __future__ import annotations

import difflib
import os
from pathlib import Path


def model_place(name: str, option: str) -> str:
    """Return what `from_pretrained` is given for a name: a directory's absolute path, or a hub id as it is.

    Raises ValueError, which names the `option`, for a path where there is no model.
    """
    path = Path(name).expanduser()
    whole = Path(os.path.abspath(path))
    if path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
            inside = sorted(str(each.parent) for each in path.glob("*/config.json"))
            hint = f"; there is one in {', '.join(inside[:3])}" if inside else ""
            raise ValueError(f"{option}: {name!r} given, but there is no config.json in {whole}: expected a directory "
                             f"that a model was saved to{hint}")  # fmt: skip
        return str(whole)
    if path.is_file():
        raise ValueError(f"{option}: {name!r} given, which is a file ({whole}): expected the directory it lies in")
    if not is_path(name):
        return name
    near = [each.name for each in whole.parent.iterdir() if each.is_dir()] if whole.parent.is_dir() else []
    close = difflib.get_close_matches(whole.name, near, n=1)
    hint = f"; did you mean {str(path.parent / close[0])!r}?" if close else ""
    raise ValueError(f"{option}: {name!r} given, but there is no directory {whole}: expected one that a model was "
                     f"saved to, or a hub id{hint}")  # fmt: skip


def is_path(name: str) -> bool:
    """Whether a name can only be a path: hub ids are one word, or two with a slash between."""
    words = name.split("/")
    return name.startswith((".", "/", "~")) or name.endswith("/") or len(words) > 2 or "\\" in name
