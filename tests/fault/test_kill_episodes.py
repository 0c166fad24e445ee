"""Killed with SIGKILL while episodes are played, and started again: bit for bit the run that was never disturbed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from launching import ROOT, completions, launch
from safetensors.torch import load_file

MODULE = '''
import os, random, signal, threading, time
from pathlib import Path

LOCK = threading.Lock()
HERE = Path(__file__).parent


def kill():
    os.kill(os.getppid(), signal.SIGKILL)


def visit(point):
    """Kill the trainer at the visit whose number a file has, or a little later; write down how many there were."""
    with LOCK, (HERE / f"visits_{point}").open("a") as file:
        file.write("x")
        place = HERE / f"kill_{point}"
        if place.exists():
            number, later = map(float, place.read_text().split())
            if file.tell() == number:
                place.unlink()
                threading.Timer(later, kill).start()
                time.sleep(0 if later else 60)


class Game:
    def reset(self, seed, **row):
        visit("reset")
        self.secret, self.done = random.randint(1, 7), False
        return f"Guess my number from 1 to 7."

    def guess(self, number: int) -> str:
        """Guess.

        Args:
            number: The guess.
        """
        visit("call")
        self.done = number == self.secret or random.random() < 0.1
        return "right" if self.done else "higher" if number < self.secret else "lower"

    def get_reward(self):
        return float(self.done)
'''
EPISODES = 3 * 4
"""In a step."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("games")
    (path / "dicey.py").write_text(MODULE)
    (path / "rows.jsonl").write_text("\n".join(json.dumps({"number": n}) for n in range(5)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{path}:{ROOT}")
        yield path


def arguments(folder: Path, run: Path) -> list[str]:
    """Two steps of a game that draws its numbers."""
    return [
        "--config", "configs/guess_number.yaml", "--environment.factory", "dicey:Game", "--environment.workers", "1",
        "--data.train_file", str(folder / "rows.jsonl"), "--data.prompt_column", "null", "--data.eval_file", "null",
        "--train.num_train_steps", "2", "--train.batch_size", "3", "--rollout.group_size", "4", "--train.save_every",
        "1", "--model.dtype", "float32", "--train.output_dir", str(run),
    ]  # fmt: skip


def visits(folder: Path, point: str) -> int:
    """How often the game came to a point, since the last look."""
    path = folder / f"visits_{point}"
    count = len(path.read_text())
    path.unlink()
    return count


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    done = launch(None, 1, *arguments(folder, run))
    assert done.returncode == 0, done.stderr[-4000:]
    assert visits(folder, "reset") == 2 * EPISODES and visits(folder, "call") > 2 * EPISODES
    return run


def calls(run: Path, step: int) -> int:
    """Tools' answers in a step's episodes."""
    talks = [row["reward/environment/conversation"] for row in completions(run) if row["step"] == step]
    return sum(message["role"] == "tool" for talk in talks for message in json.loads(talk))


@pytest.mark.parametrize(
    ("point", "later_seconds"),
    [pytest.param("reset", 0.0, id="in reset", marks=pytest.mark.slow),
     pytest.param("call", 0.0, id="in a tool", marks=pytest.mark.slow), pytest.param("call", 0.02, id="in a turn")],
)  # fmt: skip
def test_killed_amid_episodes(
    point: str, later_seconds: float, folder: Path, undisturbed: Path, tmp_path: Path
) -> None:
    before = {"reset": EPISODES, "call": calls(undisturbed, 1)}[point]
    (folder / f"kill_{point}").write_text(f"{before + 5} {later_seconds}")
    run = tmp_path / "run"
    killed = launch(None, 1, *arguments(folder, run))
    assert killed.returncode == -9, killed.stderr[-3000:]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_1"], "it was killed in the second step"
    if point == "call":
        assert visits(folder, "call") > before, "some episodes of the second step have an answer"
    again = launch(None, 1, *arguments(folder, run))
    assert again.returncode == 0, again.stderr[-3000:]
    expected, got = (load_file(each / "checkpoints" / "step_2" / "state.safetensors") for each in (undisturbed, run))
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)
    assert completions(run) == completions(undisturbed)
    for each in folder.glob("visits_*"):
        each.unlink()
