"""Promise 3: what was killed and started again ends where it would have ended, and another shape can take over."""

from __future__ import annotations

import contextlib
import functools
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from launching import TINY, begin, check_same, completions, metrics, train
from safetensors.torch import load_file

EACH = ("--train.save_every", "1")
Shape = tuple[str | None, int]


def state(directory: Path) -> dict[str, torch.Tensor]:
    """Weights and moments after the last step."""
    return load_file(directory / "checkpoints" / "step_3" / "state.safetensors")


def kill_after(steps: int, strategy: str | None, num_processes: int, directory: Path) -> None:
    """Start a training and kill -9 all of it once `steps` steps are written down."""
    process = begin(strategy, num_processes, *TINY, *EACH, "--train.output_dir", str(directory))
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        written = directory / "metrics.jsonl"
        if written.exists() and len(written.read_text().splitlines()) > steps:
            break
        time.sleep(0.05)
    assert process.poll() is None, "the run ended before it could be killed"
    all_of_it = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for each in all_of_it:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()
    _, alive = psutil.wait_procs(all_of_it, timeout=60)
    assert not alive


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Shape], Path]:
    """Runs that were killed after one step. Each is started once, and handed out as a copy."""

    @functools.cache
    def run(strategy: str | None, num_processes: int) -> Path:
        directory = tmp_path_factory.mktemp("killed") / "run"
        kill_after(1, strategy, num_processes, directory)
        return directory

    def copy(shape: Shape) -> Path:
        return shutil.copytree(run(*shape), tmp_path_factory.mktemp("copy") / "run")

    return copy


@pytest.mark.parametrize(
    ("strategy", "num_processes"),
    [("zero3", 2), *(pytest.param(strategy, 2, marks=pytest.mark.slow) for strategy in ("zero2", "fsdp2"))],
)
def test_killed_and_started_again(
    strategy: str, num_processes: int, killed: Callable[[Shape], Path], tmp_path: Path
) -> None:
    undisturbed = train(strategy, num_processes, tmp_path / "undisturbed", *EACH)
    again = train(strategy, num_processes, killed((strategy, num_processes)), *EACH)
    expected, got = state(undisturbed), state(again)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert [row["completion"] for row in completions(again)] == [row["completion"] for row in completions(undisturbed)]
    assert [line["step"] for line in metrics(again)] == list(range(4))
    assert [line["loss"] for line in metrics(again)[1:]] == [line["loss"] for line in metrics(undisturbed)[1:]]


SHAPES: list[tuple[Shape, Shape]] = [
    (("zero3", 2), ("fsdp2", 2)),
    (("fsdp2", 2), ("zero3", 3)),
    (("zero2", 2), ("fsdp2", 3)),
    (("zero2", 2), ("zero3", 3)),
    (("fsdp2", 3), (None, 1)),
    (("ddp", 2), ("fsdp2", 2)),
    ((None, 1), ("ddp", 2)),
    (("ddp", 2), (None, 1)),
    (("ddp", 2), ("zero2", 2)),
    (("zero2", 2), ("zero3", 2)),
    (("zero3", 2), ("ddp", 2)),
    (("zero2", 4), ("zero3", 3)),
]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on one rank, left alone."""
    return train(None, 1, tmp_path_factory.mktemp("one") / "run", *EACH)


@pytest.mark.parametrize(
    ("before", "after"), [pytest.param(*pair, marks=[] if pair is SHAPES[0] else pytest.mark.slow) for pair in SHAPES]
)
def test_another_shape_takes_over(before: Shape, after: Shape, one_rank: Path, killed: Callable[[Shape], Path]) -> None:
    moved = train(*after, killed(before), *EACH)
    check_same(one_rank, moved, 1e-5)
