"""rollout.lag 1: a batch is drawn by the policy before the last update, on any ranks, by any engine, resumed or not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import (
    EVALUATED,
    ROOT,
    TINY,
    adapters,
    check_same,
    completions,
    launch,
    metrics,
    train,
    without_its_last_step,
)

LAG = ("--rollout.lag", "1", "--loss.kl_coeff", "0.04", "--train.updates_per_batch", "2")


def texts(directory: Path, step: int) -> list[str]:
    """The completions that were trained on at a step, from 1."""
    return [row["completion"] for row in completions(directory) if row["step"] == step]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(None, 1, tmp_path_factory.mktemp("one") / "run", *LAG, "--train.save_every", "1")


@pytest.mark.parametrize(("strategy", "num_processes"), [("ddp", 2), pytest.param("zero3", 2, marks=pytest.mark.slow)])
def test_ranks_change_nothing(strategy: str, num_processes: int, one_process: Path, tmp_path: Path) -> None:
    other = train(strategy, num_processes, tmp_path / "run", *LAG)
    check_same(one_process, other)


def test_which_policy_draws(tmp_path: Path) -> None:
    """With a lag the first two batches are drawn by the untrained policy. The third is drawn by the policy after the
    first update, as it is without a lag where the second step makes no update."""
    options = ("--rewards", "[{name: 'tests.distributed.comparing:nothing_at_the_second_step'}]",
               "--loss.kl_coeff", "0", "--loss.importance_correction", "none", "--train.num_train_steps", "3",
               "--optim.learning_rate", "1e-2")  # fmt: skip
    behind = train(None, 1, tmp_path / "behind", *options, "--rollout.lag", "1")
    newest = train(None, 1, tmp_path / "newest", *options)
    untrained = train(None, 1, tmp_path / "untrained", *options, "--optim.learning_rate", "1e-12")
    assert texts(behind, 1) == texts(newest, 1) == texts(untrained, 1)
    assert texts(behind, 2) == texts(untrained, 2) != texts(newest, 2)
    assert texts(behind, 3) == texts(newest, 3) != texts(untrained, 3)


def test_the_older_policy_is_corrected_for(one_process: Path) -> None:
    """From the second step on, weights are the ratio of the policy before the update to the one that drew."""
    first, *later = metrics(one_process)[1:]
    assert first["importance/mean"] == pytest.approx(1, abs=1e-5) and first["rollout/logprob_gap_max"] < 1e-4
    assert all(line["rollout/logprob_gap_max"] > 1e-3 for line in later)
    assert all(line["ratio/max"] > 1 and 0.5 < line["importance/mean"] < 2 for line in later)


def test_an_engine_elsewhere_draws_while_updates_go_on(one_process: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = launch("ddp", 2, *TINY, *LAG, "--train.output_dir", str(run), program=["tests/distributed/lagging.py"],
                  environment={"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    check_same(one_process, run)
    lines: list[dict[str, Any]] = metrics(run)[1:]
    assert all("time/overlapped" in line for line in lines[:-1]) and "time/overlapped" not in lines[-1]
    assert not any("time/overlapped" in line for line in metrics(one_process))


@pytest.mark.parametrize("at", [pytest.param("rollout:4", marks=pytest.mark.slow), "update:4"])
def test_stopped_with_a_batch_in_flight(at: str, one_process: Path, tmp_path: Path) -> None:
    """Stopped while the next batch is drawn, and between the two updates of a step."""
    run, words = tmp_path / "run", (*LAG, *EVALUATED)
    stopped = launch(None, 1, *TINY, *words, "--train.output_dir", str(run), program=["tests/fault/faulty.py"],
                     environment={"PYTHONPATH": str(ROOT), "FAULT": f"usr1@{at}"})  # fmt: skip
    assert stopped.returncode == 0 and "stopped" in stopped.stdout, stopped.stderr[-4000:]
    again = train(None, 1, run, *words)
    assert [row["completion"] for row in completions(again)] == [row["completion"] for row in completions(one_process)]
    ours, theirs = adapters(one_process), adapters(again)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("changed", "columns"),
    [
        (("--rollout.lag", "0"), {"reward/math"}),
        (("--rewards", "[{name: math}, {name: repetition}]"), {"reward/math", "reward/repetition"}),
    ],
)
def test_completions_that_do_not_fit_changed_options(
    changed: tuple[str, ...], columns: set[str], one_process: Path, tmp_path: Path
) -> None:
    """What was drawn ahead is drawn again: options that have changed count from the next step on."""
    run = without_its_last_step(one_process, tmp_path / "run")
    again = launch(None, 1, *TINY, *LAG, "--train.output_dir", str(run), *changed)
    assert again.returncode == 0, again.stderr[-4000:]
    assert re.search(rf"step 3 begins anew, .*: they do not fit what has changed \({changed[0][2:]}", again.stderr)
    lines = metrics(run)
    assert lines[3]["rollout/logprob_gap_max"] < 1e-3, "drawn by the policy that is trained"
    assert {name.removesuffix("/mean") for name in lines[3] if re.fullmatch("reward/.*/mean", name)} == columns
