"""Killed with SIGKILL anywhere, and started again: bit for bit the run that was never disturbed."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launching import ROOT, completions, launch, metrics
from safetensors.torch import load_file

# four steps over ten prompts, seven a step: the first lies in the first epoch, the third in the second and third
FIRST, LATER = 1, 3
SYNCS, CHECKSUMS = 5, 2
"""Calls of `sync` and `_checksum` in one save."""


def point(name: str, step: int, updates: int) -> str:
    """Where the fault is to happen, as faulty.py wants it: at which call of what."""
    return {
        "mid-rollout": f"rollout:{step}",
        "mid-scoring": f"scoring:{step}",
        "before an update": f"update:{(step - 1) * updates + 1}",
        "between two updates": f"update:{(step - 1) * updates + 2}",
        "before the tensors": f"shards:{step}",
        "before the manifest": f"manifest:{(step - 1) * CHECKSUMS + 2}",
        "before the rename": f"rename:{(step - 1) * SYNCS + 4}",
        "while pruning": f"prune:{step}",
    }[name]


NAMES = ("mid-rollout", "mid-scoring", "before an update", "between two updates", "before the tensors",
         "before the manifest", "before the rename", "while pruning")  # fmt: skip
MATRIX = [(name, step, updates) for name in NAMES for step in (FIRST, LATER) for updates in (1, 3)
          if not (name == "between two updates" and updates == 1)]  # fmt: skip
LAGGING = [("before an update", 2, 1), ("between two updates", LATER, 3), ("mid-rollout", 3, 1)]
"""Cases that are tried with rollout.lag 1 too, where a batch is under way that no update has used."""
QUICK = [("between two updates", LATER, 3), ("before the manifest", LATER, 3)]
"""Cases that are tried each time."""


def state(directory: Path) -> dict[str, torch.Tensor]:
    """Weights and moments after the last step."""
    return load_file(directory / "checkpoints" / "step_4" / "state.safetensors")


def arguments(directory: Path, updates: int, lag: int = 0) -> list[str]:
    """A short run whose batches serve some updates each."""
    return [
        "--config", "configs/quickstart.yaml", "--train.output_dir", str(directory), "--train.num_train_steps", "4",
        "--train.batch_size", "7", "--rollout.group_size", "5", "--train.updates_per_batch", str(updates),
        "--train.save_every", "1", "--data.train_file", str(directory.parent / "ten.jsonl"), "--data.eval_file", "null",
        "--loss.kl_coeff", "0.02", "--model.dtype", "float32",
        "--rollout.lag", str(lag), "--scoring.num_workers", "1",
    ]  # fmt: skip


def ten_prompts(directory: Path) -> None:
    """A data set of ten rows."""
    rows = [{"prompt": f"What is {a} + 4? Answer with an integer.", "answer": str(a + 4)} for a in range(10)]
    (directory / "ten.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The same run with so many updates a batch, left alone."""

    @functools.cache
    def run(updates: int, lag: int = 0) -> Path:
        directory = tmp_path_factory.mktemp("undisturbed")
        ten_prompts(directory)
        done = launch(None, 1, *arguments(directory / "run", updates, lag))
        assert done.returncode == 0, done.stderr[-4000:]
        return directory / "run"

    return run


def kill_at(where: str, run: Path, updates: int, lag: int = 0) -> None:
    """Start the run, or go on with it, and have it killed."""
    killed = launch(None, 1, *arguments(run, updates, lag), program=["tests/fault/faulty.py"],
                    environment={"FAULT": f"kill@{where}", "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert killed.returncode == -9, killed.stderr[-3000:]


def require_the_same_end(run: Path, updates: int, expected: Path, lag: int = 0) -> None:
    """Go on to the end, which has to be that of the undisturbed run, bit for bit."""
    again = launch(None, 1, *arguments(run, updates, lag))
    assert again.returncode == 0, again.stderr[-3000:]
    wanted, got = state(expected), state(run)
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    assert completions(run) == completions(expected)
    for a, b in zip(metrics(expected), metrics(run), strict=True):
        assert {k: v for k, v in a.items() if "/" not in k} == {k: v for k, v in b.items() if "/" not in k}
    assert not list((run / "checkpoints").glob("tmp_*"))


@pytest.mark.parametrize(
    ("name", "step", "updates"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in MATRIX],
)
def test_killed_anywhere(name: str, step: int, updates: int, undisturbed: Callable[..., Path], tmp_path: Path) -> None:
    ten_prompts(tmp_path)
    kill_at(point(name, step, updates), tmp_path / "run", updates)
    require_the_same_end(tmp_path / "run", updates, undisturbed(updates))


@pytest.mark.parametrize(
    ("name", "step", "updates"),
    [pytest.param(*case, marks=[] if case == LAGGING[-1] else pytest.mark.slow) for case in LAGGING],
)
def test_killed_with_a_batch_in_flight(
    name: str, step: int, updates: int, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    ten_prompts(tmp_path)
    kill_at(point(name, step, updates), tmp_path / "run", updates, lag=1)
    require_the_same_end(tmp_path / "run", updates, undisturbed(updates, lag=1), lag=1)


@pytest.mark.parametrize(
    ("where", "name"),
    [pytest.param("move:1", "step_3", id="before the first rename", marks=pytest.mark.slow),
     pytest.param("move:2", "tmp_4", id="between the renames"),
     pytest.param("rename:5", "step_4", id="after the second rename", marks=pytest.mark.slow)],
)  # fmt: skip
@pytest.mark.parametrize(("strategy", "ranks"), [(None, 1), ("zero2", 2)], ids=["one rank", "two ranks"])
def test_killed_while_a_step_is_saved_again(
    strategy: str | None, ranks: int, where: str, name: str, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    """It was made again from an earlier checkpoint, and is not made a third time once that is saved."""
    ten_prompts(tmp_path)
    run = shutil.copytree(undisturbed(1), tmp_path / "run")
    command = (*arguments(run, 1), "--train.resume", str(run / "checkpoints" / "step_3"))
    killed = launch(strategy, ranks, *command, program=["tests/fault/faulty.py"],
                    environment={"FAULT": f"kill@{where}", "FAULT_RANK": "0", "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert killed.returncode == (1 if strategy else -9), killed.stderr[-3000:]
    again = launch(strategy, ranks, *command)
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"resumed from {run / 'checkpoints' / name}\n" in again.stdout + again.stderr
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_3", "step_4"]
    expected, got = state(undisturbed(1)), state(run)
    assert all(torch.allclose(expected[each], got[each], atol=1e-5) for each in expected)


@pytest.mark.slow
def test_killed_twice_in_one_epoch(undisturbed: Callable[..., Path], tmp_path: Path) -> None:
    """The second start counts its calls from where the first was killed."""
    ten_prompts(tmp_path)
    kill_at(point("mid-scoring", 3, 3), tmp_path / "run", 3)
    kill_at(point("between two updates", 2, 3), tmp_path / "run", 3)
    require_the_same_end(tmp_path / "run", 3, undisturbed(3))
