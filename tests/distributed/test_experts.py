"""A mixture of experts: routes travel with the rows, so that ranks, strategies and interruptions change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launching import ROOT, TINY, adapters, completions, launch, metrics, relative_difference, train
from small_experts import make_experts

REWARDS = "[{name: 'tests.distributed.comparing:different_characters'}]"
OPTIONS = ("--data.max_prompt_length", "64", "--loss.kl_coeff", "0.04", "--train.updates_per_batch", "2",
           "--train.num_train_steps", "3", "--rewards", REWARDS, "--train.max_tokens_per_pack", "300",
           "--rollout.max_completion_length", "8", "--optim.learning_rate", "1e-3")  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Qwen3-MoE."""
    return make_experts(tmp_path_factory.mktemp("model"), "qwen3_moe")


@pytest.fixture(scope="module")
def one_process(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run all others are compared with."""
    return train(None, 1, tmp_path_factory.mktemp("one") / "run", "--model.name", model, *OPTIONS)


def test_the_first_update_has_a_ratio_of_1(one_process: Path) -> None:
    first, *later = metrics(one_process)[1:]
    assert first["rollout/router_agreement"] == 1 and abs(first["rollout/kl"]) < 1e-9
    assert all(line["rollout/router_agreement"] > 0.99 for line in later)


def test_the_old_policy_takes_the_same_experts(model: str, tmp_path: Path) -> None:
    """Where a pass of its own computes the old policy, the first update's ratio is 1, without rounding."""
    reward = ("--loss.kl_in", "reward", "--train.updates_per_batch", "1", "--train.num_train_steps", "1")
    _, first = metrics(train(None, 1, tmp_path / "run", "--model.name", model, *OPTIONS, *reward))
    assert first["ratio/mean"] == first["ratio/max"] == 1 and first["rollout/router_agreement"] == 1


@pytest.mark.parametrize(
    ("strategy", "num_processes", "arguments"),
    [
        ("zero2", 2, ()),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in [
                ("ddp", 2, ()),
                ("zero3", 2, ("--reference.placement", "shared")),
                ("fsdp2", 2, ("--model.gradient_checkpointing", "true")),
                ("ddp", 2, ("--train.sequence_parallel_size", "2")),
            ]
        ),
    ],
)
def test_ranks_change_nothing(
    strategy: str, num_processes: int, arguments: tuple[str, ...], model: str, one_process: Path, tmp_path: Path
) -> None:
    other = train(strategy, num_processes, tmp_path / "run", "--model.name", model, *OPTIONS, *arguments)
    assert [row["completion"] for row in completions(other)] == [row["completion"] for row in completions(one_process)]
    assert relative_difference(adapters(one_process), adapters(other)) <= 1e-4
    assert [line["rollout/router_agreement"] for line in metrics(other)[1:]] == pytest.approx(
        [line["rollout/router_agreement"] for line in metrics(one_process)[1:]], abs=1e-3)  # fmt: skip


@pytest.mark.slow
def test_stopped_with_routes_in_flight(model: str, tmp_path: Path) -> None:
    """Between the two updates of a step, when a batch is kept, and the next one is drawn already."""
    options = ("--model.name", model, *OPTIONS, "--rollout.lag", "1")
    one, run = train(None, 1, tmp_path / "one", *options), tmp_path / "run"
    stopped = launch(None, 1, *TINY, *options, "--train.output_dir", str(run), program=["tests/fault/faulty.py"],
                     environment={"PYTHONPATH": str(ROOT), "FAULT": "usr1@update:4"})  # fmt: skip
    assert stopped.returncode == 0 and "stopped" in stopped.stdout, stopped.stderr[-4000:]
    again = train(None, 1, run, *options)
    assert [row["completion"] for row in completions(again)] == [row["completion"] for row in completions(one)]
    assert all(torch.equal(adapters(one)[name], tensor) for name, tensor in adapters(again).items())
