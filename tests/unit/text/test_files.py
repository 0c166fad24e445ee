"""A file is complete or as it was before."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from grpo_dist.text.files import write_file

pytestmark = pytest.mark.quick


def test_a_file_is_replaced_by_a_complete_one(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    write_file(path, "first: é\n")
    with path.open(encoding="utf-8") as reader:
        write_file(path, "second")
        assert reader.read() == "first: é\n", "who reads the file goes on reading the one before"
    assert path.read_text() == "second" and os.listdir(tmp_path) == ["config.yaml"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def test_a_failure_leaves_the_file_before_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    write_file(path, "first")
    with pytest.raises(UnicodeEncodeError):
        write_file(path, "half of it, and then \ud800")
    assert path.read_text() == "first" and os.listdir(tmp_path) == ["config.yaml"]


def test_a_failure_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the temporary one, which a file system that is read-only refuses to remove as well."""

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(OSError, match=r"Read-only file system: '.*/report\.html'"):
        write_file(tmp_path / "report.html", "text")


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
