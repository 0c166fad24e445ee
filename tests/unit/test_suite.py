"""The suite itself: no test is left out of what CI runs without a word."""

from __future__ import annotations

import ast
from fnmatch import fnmatch
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
FILES = sorted(path for path in TESTS.rglob("*.py") if "__pycache__" not in path.parts)


def functions(file: Path) -> set[str]:
    """The test functions that a file defines, in classes too."""
    defined = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {
        node.name for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, defined) and node.name.startswith("test_")
    }  # fmt: skip


@pytest.mark.parametrize("file", [file for file in FILES if functions(file)], ids=lambda file: file.name)
def test_every_test_is_collected(file: Path, pytestconfig: pytest.Config) -> None:
    """By `pytest`, and by `pytest tests`, which leaves out folders of certain names: `dist`, `build`, …"""
    folders = file.relative_to(ROOT).parent.parts
    assert fnmatch(file.name, "test_*.py"), "pytest does not look for tests in a file of this name"
    assert any(file.is_relative_to(ROOT / path) for path in pytestconfig.getini("testpaths"))
    skipped = [name for name in folders for pattern in pytestconfig.getini("norecursedirs") if fnmatch(name, pattern)]
    assert not skipped, f"pytest does not descend into folders named {skipped}"
    classes = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)]
    assert all(node.name.startswith("Test") for node in classes if "def test_" in ast.unparse(node))


def test_files_have_names_of_their_own() -> None:
    """`pytest` over several folders refuses two files of one name."""
    names = [file.name for file in FILES if file.name.startswith("test_")]
    assert sorted(names) == sorted(set(names))
