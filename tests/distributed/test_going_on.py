"""A run that goes on from another one's adapter: on any number of ranks, with the KL from where it began."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import adapters, check_same, metrics, relative_difference, train

KL = ("--loss.kl_coeff", "0.04", "--train.num_train_steps", "2")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run whose adapter the others go on from."""
    return train(None, 1, tmp_path_factory.mktemp("first") / "run", "--train.num_train_steps", "3")


@pytest.fixture(scope="module")
def one(first: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process that goes on."""
    return train(None, 1, tmp_path_factory.mktemp("one") / "run", *from_adapter(first), *KL)


def from_adapter(run: Path) -> tuple[str, str]:
    """Options by which a run goes on from another one's adapter."""
    return "--model.name", str(run / "final" / "adapter")


def test_the_kl_is_from_where_a_run_began(first: Path, one: Path, tmp_path: Path) -> None:
    from_base = train(None, 1, tmp_path / "base", *from_adapter(first), *KL, "--reference.model", "base")
    before, after = metrics(one)[1:]
    assert before["ratio/mean"] == 1.0 and abs(before["kl"]) < 1e-9 < after["kl"]
    assert metrics(from_base)[1]["kl"] > 1e-5
    assert 0 < relative_difference(adapters(one), adapters(first)) < 0.5


@pytest.mark.parametrize(
    ("strategy", "names"),
    [
        ("zero2", "model.name"),
        pytest.param("zero3", "model.name", marks=pytest.mark.slow),
        pytest.param("zero3", "lora.init_from", marks=pytest.mark.slow),
        pytest.param("fsdp2_cpu", "model.name", marks=pytest.mark.slow),
    ],
)
def test_ranks_change_nothing(strategy: str, names: str, first: Path, one: Path, tmp_path: Path) -> None:
    """Also where the weights are sharded, and where the adapter is named beside its base."""
    adapter = from_adapter(first)[1]
    given = ("--model.name", "toy", "--lora.init_from", adapter) if names == "lora.init_from" else from_adapter(first)
    two = train(strategy, 2, tmp_path / "two", *given, *KL)
    check_same(one, two)
