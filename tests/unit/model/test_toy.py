"""Where the package keeps the toy models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from grpo_dist.model import toy

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", toy.MODELS)
def test_a_missing_model_names_the_command(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert toy.toy_path(name).is_dir()
    monkeypatch.setattr(toy, "__file__", str(tmp_path / "toy.py"))
    with pytest.raises(FileNotFoundError, match=r"install grpo_dist again, or .*`python tests/toys/\w+\.py ") as error:
        toy.toy_path(name)
    assert (ROOT / str(error.value).split("`python ")[1].split()[0]).is_file()


def test_import_is_light() -> None:
    code = "import sys, grpo_dist.model.toy; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
