"""Asked to stop: one signalled rank is enough, in any phase, and nothing is lost."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from launching import (
    EVALUATED,
    ROOT,
    TINY,
    TRAINER,
    adapters,
    begin,
    completions,
    launch,
    metrics,
    reported_steps,
    train,
)
from safetensors.torch import load_file

from grpo_dist.checkpoint import store as checkpoint
from grpo_dist.distributed.watch import SAME_SIGNAL_SECONDS

ARGUMENTS = (*EVALUATED, "--train.updates_per_batch", "2", "--train.eval_every", "2", "--train.save_every", "2")
POINTS = {"rollout": "rollout:4", "scoring": "scoring:5", "update": "update:4", "eval": "eval:3", "save": "shards:1"}


def state(directory: Path) -> dict[str, torch.Tensor]:
    """Weights and moments after the last step."""
    return load_file(directory / "checkpoints" / "step_3" / "state.safetensors")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, left alone."""
    return train("zero2", 2, tmp_path_factory.mktemp("undisturbed") / "run", *ARGUMENTS)


QUICK = {"rollout"}
"""Phases that are tried each time."""


@pytest.mark.parametrize(
    "point", [pytest.param(at, id=name, marks=[] if name in QUICK else pytest.mark.slow) for name, at in POINTS.items()]
)
def test_one_rank_signalled(point: str, undisturbed: Path, tmp_path: Path) -> None:
    run, rank = str(tmp_path / "run"), "0" if point == POINTS["save"] else "1"  # the first rank writes files
    stopped = launch("zero2", 2, *TINY, *ARGUMENTS, "--train.output_dir", run, program=["tests/fault/faulty.py"],
                     environment={"FAULT": f"usr1@{point}", "FAULT_RANK": rank, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert stopped.returncode == 0, stopped.stderr[-4000:]
    assert f"stopped: rank {rank} received SIGUSR1" in stopped.stdout
    assert len(metrics(tmp_path / "run")) < 4
    assert reported_steps(tmp_path / "run") == [line["step"] for line in metrics(tmp_path / "run")]
    again = train("zero2", 2, tmp_path / "run", *ARGUMENTS)
    expected, got = state(undisturbed), state(again)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert [line["step"] for line in metrics(again)] == reported_steps(again) == list(range(4))
    assert [line.get("loss") for line in metrics(again)] == [line.get("loss") for line in metrics(undisturbed)]


@pytest.mark.slow
def test_a_signal_in_the_export_changes_nothing(undisturbed: Path, tmp_path: Path) -> None:
    done = launch("zero2", 2, *TINY, *ARGUMENTS, "--train.output_dir", str(tmp_path / "run"),
                  program=["tests/fault/faulty.py"],
                  environment={"FAULT": "term@export:1", "FAULT_RANK": "0", "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0 and "trained model:" in done.stdout, done.stderr[-4000:]
    expected, got = adapters(undisturbed), adapters(tmp_path / "run")
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_penalty_switched_on_in_the_middle_of_a_batch(tmp_path: Path) -> None:
    """The batch that the checkpoint holds has no reference: it is asked when the run goes on."""
    run, often = tmp_path / "run", ("--train.updates_per_batch", "3", "--train.num_train_steps", "2")
    stopped = launch(None, 1, *TINY, *often, "--loss.kl_coeff", "0", "--train.output_dir", str(run),
                     program=["tests/fault/faulty.py"],
                     environment={"FAULT": "usr1@update:5", "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert stopped.returncode == 0 and "stopped:" in stopped.stdout, stopped.stderr[-4000:]
    tensors, meta = checkpoint.load(run / "checkpoints" / "step_1")
    assert meta["updates"] == 1 and "batch/reference_logprobs" not in tensors
    again = launch(None, 1, *TINY, *often, "--loss.kl_coeff", "0.05", "--train.output_dir", str(run))
    assert again.returncode == 0, again.stderr[-4000:]
    assert "loss.kl_coeff: 0.0 -> 0.05" in again.stderr + again.stdout
    assert metrics(run)[2]["kl"] > 0 and "time/reference" in metrics(run)[2]


@pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["forks", "fresh"])
def test_one_rank_killed(fresh: bool, undisturbed: Path, tmp_path: Path) -> None:
    """The launcher ends the other one at once, and the same command goes on."""
    run = str(tmp_path / "run")
    began = time.monotonic()
    killed = launch("zero2", 2, *TINY, *ARGUMENTS, "--train.output_dir", run, program=["tests/fault/faulty.py"],
                    fresh=fresh,
                    environment={"FAULT": "kill@update:4", "FAULT_RANK": "1", "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert killed.returncode == 1 and time.monotonic() - began < 240  # far less than any time-out of collectives
    again = train("zero2", 2, tmp_path / "run", *ARGUMENTS)
    expected, got = state(undisturbed), state(again)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert [line.get("loss") for line in metrics(again)] == [line.get("loss") for line in metrics(undisturbed)]


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    """In a loop that never comes to a safe point; what is saved is whole."""
    run, mark = tmp_path / "run", tmp_path / "in_the_loop"
    process = begin(None, 1, *TINY, "--train.output_dir", str(run), "--train.save_every", "1",
                    program=["tests/fault/faulty.py"], environment={
                        "FAULT": "loop@update:3", "FAULT_MARK": str(mark), "PYTHONPATH": str(ROOT)
                    })  # fmt: skip
    deadline = time.monotonic() + 240
    while not mark.exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR2)
    time.sleep(SAME_SIGNAL_SECONDS + 1)
    assert process.poll() is None
    process.send_signal(signal.SIGUSR2)
    assert process.wait(timeout=60) == 128 + signal.SIGUSR2
    assert checkpoint.newest(run / "checkpoints") == run / "checkpoints" / "step_2"


def start(
    strategy: str, directory: Path, *arguments: str, program: list[str] = TRAINER,
    environment: dict[str, str] | None = None, fresh: bool = False,
) -> Any:  # fmt: skip
    """A long training on two ranks, once its first step is written down."""
    process = begin(strategy, 2, *TINY, "--train.num_train_steps", "5000", "--train.output_dir", str(directory),
                    *arguments, program=program, fresh=fresh,
                    environment={"PYTHONPATH": str(ROOT), **(environment or {})})  # fmt: skip
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if (directory / "metrics.jsonl").exists() and len(metrics(directory)) > 1:
            return process
        time.sleep(0.1)
    raise AssertionError(f"no step was done:\n{process.communicate()[1][-4000:]}")


def started_by(process: Any) -> list[psutil.Process]:
    """All processes of the run but the launcher, scoring workers included."""
    started = psutil.Process(process.pid).children(recursive=True)
    assert len(started) >= 4, "two ranks, and a scoring worker of each"
    return started


@pytest.mark.parametrize(
    ("number", "fresh"),
    [(signal.SIGTERM, False), *(pytest.param(number, True, marks=pytest.mark.slow)
                                for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))],
)  # fmt: skip
def test_the_launcher_signalled(number: signal.Signals, fresh: bool, tmp_path: Path) -> None:
    process = start("ddp", tmp_path / "run", fresh=fresh)
    processes = started_by(process)
    process.send_signal(number)
    # ranks that the launcher had to kill would not have said so
    assert "The same command goes on from step" in "".join(process.communicate(timeout=60))
    assert list((tmp_path / "run" / "checkpoints").glob("step_*/manifest.json"))
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive
    done = str(checkpoint.newest(tmp_path / "run" / "checkpoints")).rpartition("_")[2]
    # forks all hash strings alike, and the processes that a user starts do not: nothing that is resumed depends on that
    again = train("ddp", 2, tmp_path / "run", "--train.num_train_steps", str(int(done) + 1), "--train.allow_changes",
                  "true")  # fmt: skip
    assert [line["step"] for line in metrics(again)] == list(range(int(done) + 2))
    one = train(None, 1, tmp_path / "one", "--train.num_train_steps", "1")
    assert completions(one) == [row for row in completions(again) if row["step"] == 1]


def test_ranks_whose_launcher_is_killed_end(tmp_path: Path) -> None:
    process = start("ddp", tmp_path / "run")
    processes = started_by(process)
    process.kill()
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive


def test_a_run_saves_and_ends_at_its_time_limit(tmp_path: Path) -> None:
    done = launch("ddp", 2, *TINY, "--train.num_train_steps", "5000", "--train.max_time", "0:00:03",
                  "--train.output_dir", str(tmp_path / "run"))  # fmt: skip
    assert done.returncode == 0
    assert "train.max_time (3 s) is reached" in done.stdout
    assert list((tmp_path / "run" / "checkpoints").glob("step_*/manifest.json"))


def test_a_hung_rank_is_named(tmp_path: Path) -> None:
    """Its process is suspended."""
    done = launch("ddp", 2, *TINY, "--train.output_dir", str(tmp_path / "run"), "--train.hang_timeout_seconds", "5",
                  program=["tests/fault/faulty.py"],
                  environment={"FAULT": "stop@update:3", "FAULT_RANK": "1", "PYTHONPATH": str(ROOT),
                               "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "2"})  # fmt: skip
    assert done.returncode != 0
    assert "rank 1 has not moved for 5 s. It was last seen in the phase" in done.stderr and 'File "' in done.stderr


@pytest.mark.parametrize(
    ("fault", "strategy"),
    [
        ("loop@update:3", "ddp"),
        pytest.param("block@rollout:3", "zero3", marks=pytest.mark.slow),
        pytest.param("block@update:3", None, marks=pytest.mark.slow),
    ],
)
def test_a_hung_main_thread_is_named(fault: str, strategy: str | None, tmp_path: Path) -> None:
    """Its process lives, and so does the thread that tells of it."""
    rank = "1" if strategy else "0"
    done = launch(strategy, 2, *TINY, "--train.output_dir", str(tmp_path / "run"), "--train.hang_timeout_seconds", "5",
                  program=["tests/fault/faulty.py"],
                  environment={"FAULT": fault, "FAULT_RANK": rank, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 1
    phase = fault.partition("@")[2].partition(":")[0]
    assert f"rank {rank} has not moved for 5 s. It was last seen in the phase '{phase}', at:" in done.stderr
    assert "in happen" in done.stderr and "raise train.hang_timeout_seconds" in done.stderr
    assert "rank 0 has not moved" not in done.stderr.replace(f"rank {rank} has not", "")


SLOW_ONCE = '''
import pathlib, time
def slow_once(completions, marker, **_):
    """Slow in the first call of all ranks' workers alone."""
    try:
        pathlib.Path(marker).touch(exist_ok=False)
        time.sleep(9)
    except FileExistsError:
        pass
    return [float(len(text)) for text in completions]
'''


def test_a_slow_reward_is_named_and_waited_for(tmp_path: Path) -> None:
    """It takes longer than the time-out of hangs, but the rank that waits for it does not stand still."""
    (tmp_path / "slowness.py").write_text(SLOW_ONCE)
    rewards = json.dumps([{"name": "slowness:slow_once", "args": {"marker": str(tmp_path / "marker")}}])
    done = launch("ddp", 2, *TINY, "--train.output_dir", str(tmp_path / "run"), "--train.hang_timeout_seconds", "5",
                  "--rewards", rewards, program=["tests/fault/faulty.py"],
                  environment={"FAULT": "impatient@", "PYTHONPATH": f"{ROOT}:{tmp_path}"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert re.search(r"rank [01] is in the phase 'reward', and the others have waited for it for [124] s", done.stderr)
    assert len(metrics(tmp_path / "run")) == 4


@pytest.mark.slow
@pytest.mark.parametrize("patience", ["30", "100"])
def test_saving_longer_than_the_launcher_waits(patience: str, tmp_path: Path) -> None:
    """TORCH_ELASTIC_SHUTDOWN_TIMEOUT decides whether a save of 40 s is finished; what was saved before stays whole."""
    run, environment = tmp_path / "run", {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": patience, "FAULT": "tardy@shards:2"}
    process = start("ddp", run, "--train.save_every", "1", program=["tests/fault/faulty.py"], environment=environment)
    while not (run / "checkpoints" / "tmp_2").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output = "".join(process.communicate(timeout=120))
    newest = checkpoint.newest(run / "checkpoints")
    assert newest is not None and newest.name == ("step_1" if patience == "30" else "step_2")
    if patience == "100":
        assert "saving took" not in output  # less than half of what the launcher grants
