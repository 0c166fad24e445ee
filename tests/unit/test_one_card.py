"""The measurements of one card go on behind a section that ends its process."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from launching import ROOT

SECTIONS = """
import json, os, sys
from pathlib import Path
out, _, turn, *names = sys.argv[1:]
seen = json.loads(Path(out).read_text()) if turn == "next" else {}
for name in names:
    if name in seen:
        continue
    seen[name] = {"failed": "its process ended"}
    Path(out).write_text(json.dumps(seen))
    if name == "dies":
        os._exit(3)
    seen[name] = {"turn": turn}
    Path(out).write_text(json.dumps(seen))
"""


@pytest.fixture
def one_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, with sections that measure nothing."""
    spec = importlib.util.spec_from_file_location("one_card", ROOT / "tests/gpu/one_card.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "sections.py").write_text(SECTIONS)
    monkeypatch.setattr(module, "SECTIONS", tmp_path / "sections.py")
    return module


def test_sections_behind_one_that_dies_are_run_in_a_new_process(one_card: Any, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    options = argparse.Namespace(out=out, seconds=60, tiny=False, sections=["one", "dies", "two"])
    assert one_card.run_sections(options) == 0
    figures = json.loads(out.read_text())
    assert figures == {"one": {"turn": "first"}, "dies": {"failed": "its process ended"}, "two": {"turn": "next"}}
    assert one_card.table(figures).endswith("dies: its process ended")


def test_a_process_that_begins_nothing_is_not_started_again(one_card: Any, tmp_path: Path) -> None:
    one_card.SECTIONS.write_text("raise SystemExit(5)")
    options = argparse.Namespace(out=tmp_path / "out.json", seconds=60, tiny=False, sections=[])
    assert one_card.run_sections(options) == 5
