"""Each rank has a disk of its own, as nodes may: where one differs, it is named, and no rank waits for it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launching import ROOT, TINY, launch
from safetensors.torch import load_file, save_file

from grpo_dist.model.toy import toy_path

PROGRAM = """import os, sys
os.chdir(os.environ["DISKS"] + os.environ["RANK"])
from grpo_dist.trainer.ending import main
from grpo_dist.train import train
sys.exit(main(train))
"""


def without_data(disk: Path) -> None:
    (disk / "train.jsonl").unlink()


def with_other_options(disk: Path) -> None:
    config = disk / "own.yaml"
    config.write_text(config.read_text().replace("0.001", "0.002"))


def with_other_weights(disk: Path) -> None:
    weights = load_file(disk / "model" / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, disk / "model" / "model.safetensors", {"format": "pt"})


def without_a_weight(disk: Path) -> None:
    for each in (disk.parent / "disk_0", disk):  # ranks compare safetensors files before they load a model
        weights = load_file(each / "model" / "model.safetensors")
        (each / "model" / "model.safetensors").unlink()
        if each == disk:
            weights.pop("model.norm.weight")
        torch.save(weights, each / "model" / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        pytest.param(without_data, "has failed: FileNotFoundError: ", marks=pytest.mark.slow),
        (with_other_options, "rank 1 was started differently from rank 0, "),
        pytest.param(with_other_weights, "and data on all nodes: identity.base_weights: ", marks=pytest.mark.slow),
        (without_a_weight, "has failed: UnfitModel: model.name: './model' lacks 1 weights of "),
    ],
)
def test_one_rank_has_another_disk(spoil: Callable[[Path], None], expected: str, tmp_path: Path) -> None:
    for rank in range(2):
        disk = tmp_path / f"disk_{rank}"
        shutil.copytree(toy_path(), disk / "model")
        shutil.copy(ROOT / "configs/data/math_tasks_train.jsonl", disk / "train.jsonl")
        (disk / "own.yaml").write_text("optim: {learning_rate: 0.001}\n")
    spoil(tmp_path / "disk_1")
    (tmp_path / "start.py").write_text(PROGRAM)
    config = TINY[TINY.index("--config") + 1]
    given = [str(ROOT / config) if each == config else each for each in TINY]
    done = launch("ddp", 2, *given, "--config", "own.yaml", "--model.name", "./model", "--data.train_file",
                  "train.jsonl", "--data.eval_file", "null", "--train.output_dir", str(tmp_path / "run"),
                  program=[str(tmp_path / "start.py")], timeout_seconds=120,
                  environment={"PYTHONPATH": str(ROOT), "DISKS": f"{tmp_path}/disk_"})  # fmt: skip
    assert done.returncode != 0
    assert expected in done.stderr and "rank 1" in done.stderr, done.stderr[-4000:]
    assert "Error: rank 1" not in done.stderr  # no traceback of it
