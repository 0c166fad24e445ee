"""What a rank prints goes out in one write, so that it stands on lines of its own where many ranks write to one log."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "grpo_dist"
PROGRAMS = ("train", "evaluate")
"""What ranks run."""


def imported(file: Path) -> set[Path]:
    """The package's modules that a module imports, anywhere in it."""
    files: set[Path] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("grpo_dist")):
            folder = file.parents[node.level - 1] if node.level else PACKAGE.parent
            module = folder.joinpath(*(node.module or "").split("."))
            places = [module, *(module / name.name for name in node.names)]
            files |= {path for place in places for path in (place.with_suffix(".py"), place / "__init__.py")}
    return {path for path in files if path.is_file()}


def test_ranks_do_not_call_print() -> None:
    """It writes twice: the text, and the end of its line."""
    seen: set[Path] = set()
    waiting = {PACKAGE / f"{name}.py" for name in PROGRAMS}
    while waiting:
        seen |= waiting
        waiting = {path for file in waiting for path in imported(file)} - seen
    assert PACKAGE / "distributed" / "rendezvous.py" in seen and len(seen) > 50
    calls = [
        f"{file.relative_to(PACKAGE)}:{node.lineno}"
        for file in seen for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]  # fmt: skip
    assert not calls, "use text.plain.write_lines"


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="pipes keep no writes apart here")
def test_a_mistake_is_one_write() -> None:
    words = ["--optim.learning_rte", "1", "--train.sed", "1"]
    code = f"from grpo_dist.config.parse import parse_config; parse_config({words})"
    read, write = os.pipe2(os.O_DIRECT)  # each read gives what was written in one call
    process = subprocess.Popen([sys.executable, "-u", "-c", code], cwd=PACKAGE.parent, stderr=write)
    os.close(write)
    with open(read, "rb", buffering=0) as pipe:
        writes = list(iter(lambda: pipe.read(2**16), b""))
    assert process.wait() == 2
    assert len(writes) == 1 and writes[0].endswith(b"?\n") and writes[0].count(b"\n") == 2
