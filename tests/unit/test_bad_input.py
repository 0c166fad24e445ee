"""What may be wrong with a config, an output directory, a checkpoint or a model is found before any weights are loaded,
and nothing that comes from them is executed."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from runs_on_disk import config_of

from grpo_dist.config.parse import parse_config
from grpo_dist.data.rows import load_rows, open_rows
from grpo_dist.model.toy import toy_path
from grpo_dist.trainer.build import UserError, build

ROOT = Path(__file__).parents[2]


class Payload:
    """Leaves a file behind where somebody unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("place", ["/proc/nowhere/run", "{tmp}/file/run"])
def test_an_output_directory_that_cannot_be(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=re.escape(place.format(tmp=tmp_path).rsplit("/", 1)[0])):
        build(config_of(tmp_path, "--train.output_dir", place.format(tmp=tmp_path)))


@pytest.mark.parametrize("tag", [f"!!python/{kind}:os.system" for kind in ("object/apply", "object/new", "name")])
def test_tags_in_a_config_execute_nothing(tag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"model:\n  name: {tag} ['touch {tmp_path}/executed']\n")
    with pytest.raises(SystemExit) as stop:
        parse_config(["--config", str(path)])
    assert stop.value.code == 2 and str(path) in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()


def test_code_of_a_model_is_not_executed_unasked(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in toy_path().iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    settings = json.loads((model / "config.json").read_text())
    settings |= {"model_type": "unheard-of", "auto_map": {"AutoConfig": "evil.Config"}}
    (model / "config.json").write_text(json.dumps(settings))
    (model / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    with pytest.raises(UserError, match="trust_remote_code"):
        build(config_of(tmp_path, "--model.name", str(model)))
    assert not (tmp_path / "executed").exists()


def test_pickled_weights_of_a_model_execute_nothing(tmp_path: Path) -> None:
    from grpo_dist.model.load import load_causal_lm

    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((toy_path() / name).read_bytes())
    with (model / "pytorch_model.bin").open("wb") as file:
        torch.save({"lm_head.weight": Payload(tmp_path / "executed")}, file)
    config = config_of(tmp_path, "--model.name", str(model)).model
    with pytest.raises((OSError, ValueError, RuntimeError, pickle.UnpicklingError)):
        load_causal_lm(config, torch.float32, None)
    assert not (tmp_path / "executed").exists()


def test_both_readers_see_the_same_lines(tmp_path: Path) -> None:
    """A line of white space that is not JSON's is a row that cannot be read, to both."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes("\n".join(["\ufeff", " \t\r", "\u00a0", "\u2003{}", "{}", "\x0c", ""]).encode())
    rows = load_rows(str(path), "train")
    reader = open_rows(str(path), "train")
    assert [reader[place] for place in range(len(reader))] == rows
    assert [(row.number, bool(row.problem)) for row in rows] == [(3, True), (4, False), (5, False)]
