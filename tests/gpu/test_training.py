"""The toy model trained end to end on a GPU: graphs in the log, rollouts that are the policy's, and one result however
it is run."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from launching import ROOT, TRAINER, command, launch, metrics

STEPS = [
    "--config", "configs/quickstart.yaml", "--rollout.engine", "native", "--train.batch_size", "6",
    "--rollout.group_size", "4", "--train.num_eval_prompts", "8", "--train.eval_every", "0", "--train.save_every", "0",
]  # fmt: skip
COMPARED = ("loss", "grad_norm", "reward/mean", "kl")


def program(directory: Path, simulated: bool) -> list[str]:
    """What Python runs to train."""
    script = str(ROOT / "tests/unit/simulated_cuda.py")
    return [script, str(directory / "seen.json"), "grpo_dist.train"] if simulated else TRAINER


def train(directory: Path, num_steps: int, simulated: bool, *arguments: str) -> str:
    """A training in one process that must succeed; returns what it printed."""
    done = launch(
        None, 1, *STEPS, "--train.num_train_steps", str(num_steps), "--train.output_dir", str(directory / "run"),
        *arguments, program=program(directory, simulated), timeout_seconds=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def assert_same(got: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """The same metrics of each step, to float32's rounding."""
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        for name in COMPARED:
            assert one.get(name) == pytest.approx(other.get(name), rel=1e-4, abs=1e-5), (name, one["step"])


def test_rollouts_are_the_policys(tmp_path: Path, simulated: bool) -> None:
    """In bfloat16, with a learning rate at which the policy moves; the graphs are kept."""
    num_steps = 2 if simulated else 20
    told = train(tmp_path, num_steps, simulated, "--model.dtype", "bfloat16", "--optim.scheduler", "constant")
    assert "CUDA graphs" in told
    lines = metrics(tmp_path / "run")
    for line in (lines[1], lines[-1]):
        assert line["rollout/kl"] <= 1e-2 and line["loss"] == line["loss"]
    assert lines[-1]["rollout/update_share"] >= 0.99
    if not simulated:
        assert lines[-1]["eval/accuracy"] > lines[0]["eval/accuracy"]


def test_a_stopped_run_goes_on_as_one(tmp_path: Path, simulated: bool) -> None:
    """SIGTERM after the first step, then the same command again: the metrics of a run that nobody stopped."""
    options = ["--model.dtype", "float32", "--reference.dtype", "float32"]
    (tmp_path / "plain").mkdir()
    train(tmp_path / "plain", 3, simulated, *options)
    (tmp_path / "stopped").mkdir()
    run = tmp_path / "stopped" / "run"
    line = [*command(None, 1, program(tmp_path / "stopped", simulated)), *STEPS, *options,
            "--train.num_train_steps", "3", "--train.output_dir", str(run)]  # fmt: skip
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while process.poll() is None and time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and len(metrics(run)) >= 2:
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.05)
    assert process.wait(timeout=300) == 0
    told = train(tmp_path / "stopped", 3, simulated, *options)
    assert "resumed from" in told or len(metrics(run)) == 4, "a quick device may be done before the signal comes"
    assert_same(metrics(run)[1:], metrics(tmp_path / "plain" / "run")[1:])


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_a_strategy_on_one_rank_is_one_process(strategy: str, tmp_path: Path, simulated: bool) -> None:
    """On CPU ranks where the device is simulated: NCCL is not."""
    options = [*STEPS, "--model.dtype", "float32", "--reference.dtype", "float32", "--train.num_train_steps", "2"]
    for name, num_processes in ((None, 1), (strategy, 1)):
        done = launch(
            name, num_processes, *options, "--train.output_dir", str(tmp_path / str(name)), timeout_seconds=600
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert_same(metrics(tmp_path / strategy)[1:], metrics(tmp_path / "None")[1:])
