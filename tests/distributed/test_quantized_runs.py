"""A quantised base in real trainings: the same result on any ranks, and after a stop."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import TINY, check_same, launch, metrics, train, without_its_last_step
from safetensors.torch import load_file

pytest.importorskip("bitsandbytes")

NF4 = ("--model.quantization", "nf4", "--train.num_train_steps", "2", "--train.save_every", "1")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that the others are compared with."""
    return train(None, 1, tmp_path_factory.mktemp("one"), *NF4)


def test_the_rollout_is_drawn_by_the_quantised_policy(one_process: Path) -> None:
    steps = metrics(one_process)[1:]
    assert steps[0]["ratio/mean"] == steps[0]["ratio/max"] == 1.0
    assert abs(steps[0]["kl"]) < 1e-9
    assert all(abs(step["rollout/kl"]) <= 1e-4 for step in steps)
    assert steps[-1]["rollout/update_share"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(("strategy", "num_processes"), [pytest.param("ddp", 2, marks=pytest.mark.slow), ("zero2", 2)])
def test_same_tokens_and_weights(strategy: str, num_processes: int, one_process: Path, tmp_path: Path) -> None:
    other = train(strategy, num_processes, tmp_path, *NF4)
    check_same(one_process, other)


def test_a_resumed_run_is_the_same_to_the_last_bit(one_process: Path, tmp_path: Path) -> None:
    resumed = train(None, 1, without_its_last_step(one_process, tmp_path / "run"), *NF4)
    for name in ("final/model.safetensors", "final/adapter/adapter_model.safetensors"):
        ours, theirs = load_file(resumed / name), load_file(one_process / name)
        assert ours.keys() == theirs.keys() and all(ours[key].equal(value) for key, value in theirs.items())


def test_zero_3_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    done = launch("zero3", 1, *TINY, *NF4, "--train.output_dir", str(tmp_path))
    assert done.returncode != 0
    assert "error: model.quantization: a quantised base given with ZeRO-3 or FSDP2, which" in done.stderr
