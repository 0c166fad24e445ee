"""Modules that a test writes, and that a run imports by their name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def importable(folders: pytest.TempPathFactory, name: str, text: str) -> Iterator[None]:
    """Let `import NAME` find a module of this text inside."""
    folder = folders.mktemp(name)
    (folder / f"{name}.py").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield
