"""Small models, a server with vLLM's interface, and trainings that ask it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_pairs import CONFIGS, Pair, make_pair
from fake_vllm import FakeVllm
from served import Training, small_model

from grpo_dist.config.schema import ModelConfig
from grpo_dist.rewards import http


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_FIRST_WAIT_SECONDS", 0.05)


@pytest.fixture
def base(tmp_path: Path) -> ModelConfig:
    return small_model(tmp_path / "base", seed=0)


@pytest.fixture
def start(base: ModelConfig, tmp_path: Path) -> Iterator[Callable[..., Training]]:
    begun: list[Training] = []

    def make(*servers: FakeVllm, **options: Any) -> Training:
        begun.append(Training(base, tmp_path / f"run{len(begun)}", *servers, **options))
        return begun[-1]

    yield make
    for each in begun:
        each.engine.close()


@pytest.fixture
def server(base: ModelConfig) -> Iterator[FakeVllm]:
    with FakeVllm(base.name) as running:
        yield running


@pytest.fixture(scope="module")
def pairs() -> dict[str, Pair]:
    """All models of CONFIGS."""
    return {name: make_pair(config) for name, config in CONFIGS.items()}
