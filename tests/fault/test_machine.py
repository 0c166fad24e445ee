"""Numbers and machines that fail: every rank does the same, and no checkpoint is harmed."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest
from launching import ROOT, TINY, adapters, launch, metrics, train

from grpo_dist import checkpoint


def faulty(
    strategy: str | None, num_processes: int, run: Path, fault: str, *arguments: str, rank: str = "0"
) -> tuple[int, str]:
    """Run with a fault; exit status and everything printed."""
    done = launch(strategy, num_processes, *TINY, "--train.output_dir", str(run), *arguments,
                  program=["tests/fault/faulty.py"],
                  environment={"FAULT": fault, "FAULT_RANK": rank, "PYTHONPATH": str(ROOT)})  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("strategy", "num_processes"), [("ddp", 2), pytest.param("zero2", 2, marks=pytest.mark.slow), ("zero3", 2)]
)
def test_a_nan_on_one_rank(strategy: str, num_processes: int, tmp_path: Path) -> None:
    status, told = faulty(strategy, num_processes, tmp_path / "run", "nan@loss:2", rank="1")
    assert status == 0, told[-4000:]
    lines = metrics(tmp_path / "run")
    assert [line["update/skipped"] for line in lines[1:]] == [0, 1, 0, 0, 0]
    assert "no rank took the step" in told
    assert (tmp_path / "run" / "bad_updates" / "step_2.safetensors").is_file()
    assert all(bool(tensor.isfinite().all()) for tensor in adapters(tmp_path / "run").values())


def test_too_many_in_a_row(tmp_path: Path) -> None:
    status, told = faulty(None, 1, tmp_path / "run", "nan@loss:2", "--train.max_bad_updates", "1")
    assert status == 1
    assert "1 updates in a row had gradients that are not finite" in told and "Traceback" not in told


def test_a_full_disk(tmp_path: Path) -> None:
    status, told = faulty("ddp", 2, tmp_path / "run", "enospc@shards:2", "--train.save_every", "2")
    assert status == 1
    assert "No space left on device" in told
    assert checkpoint.newest(tmp_path / "run" / "checkpoints") == tmp_path / "run" / "checkpoints" / "step_2"
    train("ddp", 2, tmp_path / "run", "--train.save_every", "2")


def test_out_of_memory_says_what_to_change(tmp_path: Path) -> None:
    status, told = faulty("ddp", 2, tmp_path / "run", "oom@rollout:3", rank="1")
    assert status == 1
    for option in ("train.max_tokens_per_pack (now 2048)", "rollout.max_tokens_in_flight", "gradient_checkpointing"):
        assert option in told


def test_two_runs_in_one_directory(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = launch(None, 1, *TINY, "--train.output_dir", str(tmp_path / "run"))
    assert done.returncode == 2
    assert "is in use by" in done.stderr


def test_what_may_change_on_resume(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(None, 1, run, "--train.num_train_steps", "1", "--data.eval_file", "null")
    refused = launch(None, 1, *TINY, "--train.output_dir", str(run), "--train.seed", "3", "--lora.r", "8")
    assert refused.returncode == 2
    assert "seed: 0 -> 3" in refused.stderr and "lora.r: 32 -> 8" in refused.stderr
    applied = launch(None, 1, *TINY, "--train.output_dir", str(run), "--train.num_train_steps", "2",
                     "--optim.learning_rate", "2e-4", "--data.eval_file", "null")  # fmt: skip
    assert applied.returncode == 0, applied.stderr[-3000:]
    assert "optim.learning_rate: 0.001 -> 0.0002" in applied.stderr


def test_a_tracker_that_fails(tmp_path: Path) -> None:
    (tmp_path / "run" ).mkdir()
    (tmp_path / "run" / "tensorboard").write_text("in the way")
    done = launch(None, 1, *TINY, "--train.output_dir", str(tmp_path / "run"), "--data.eval_file", "null",
                  "--train.num_train_steps", "2")  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "tracker tensorboard failed" in done.stderr
    assert len(metrics(tmp_path / "run")) == 3
