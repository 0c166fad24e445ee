"""Killed with SIGKILL anywhere, and started again: bit for bit the run that was never disturbed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launching import ROOT, completions, launch, metrics
from safetensors.torch import load_file

# five steps over ten prompts, seven a step: the later ones lie in later epochs
POINTS = {
    "mid-rollout": "rollout:3",
    "mid-scoring": "scoring:4",
    "before an update": "update:7",
    "between two updates": "update:11",
    "before the tensors": "shards:2",
    "before the manifest": "manifest:4",
    "before the rename": "rename:9",
    "while pruning": "prune:4",
}


def state(directory: Path) -> dict[str, torch.Tensor]:
    """Weights and moments after the last step."""
    return load_file(directory / "checkpoints" / "step_5" / "state.safetensors")


def arguments(directory: Path) -> list[str]:
    """A short run whose batches serve three updates each."""
    return [
        "--config", "configs/quickstart.yaml", "--train.output_dir", str(directory), "--train.num_train_steps", "5",
        "--train.batch_size", "7", "--rollout.group_size", "5", "--train.updates_per_batch", "3",
        "--train.save_every", "1", "--data.train_file", str(directory.parent / "ten.jsonl"), "--data.eval_file", "null",
        "--loss.kl_coeff", "0.02", "--model.dtype", "float32",
    ]  # fmt: skip


def ten_prompts(directory: Path) -> None:
    """A data set of ten rows."""
    rows = [{"prompt": f"What is {a} + 4? Answer with an integer.", "answer": str(a + 4)} for a in range(10)]
    (directory / "ten.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, left alone."""
    directory = tmp_path_factory.mktemp("undisturbed")
    ten_prompts(directory)
    done = launch(None, 1, *arguments(directory / "run"))
    assert done.returncode == 0, done.stderr[-4000:]
    return directory / "run"


QUICK = {"mid-rollout", "between two updates", "before the manifest"}
"""Points that are tried each time."""


@pytest.mark.parametrize(
    "point", [pytest.param(at, id=name, marks=[] if name in QUICK else pytest.mark.slow) for name, at in POINTS.items()]
)
def test_killed_anywhere(point: str, undisturbed: Path, tmp_path: Path) -> None:
    ten_prompts(tmp_path)
    run = tmp_path / "run"
    killed = launch(None, 1, *arguments(run), program=["tests/fault/faulty.py"],
                    environment={"FAULT": f"kill@{point}", "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert killed.returncode == -9, killed.stderr[-3000:]
    again = launch(None, 1, *arguments(run))
    assert again.returncode == 0, again.stderr[-3000:]
    expected, got = state(undisturbed), state(run)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert completions(run) == completions(undisturbed)
    for a, b in zip(metrics(undisturbed), metrics(run), strict=True):
        assert {k: v for k, v in a.items() if "/" not in k} == {k: v for k, v in b.items() if "/" not in k}
    assert not list((run / "checkpoints").glob("tmp_*"))
