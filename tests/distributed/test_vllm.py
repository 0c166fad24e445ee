"""Trainings whose rollouts are drawn by servers with vLLM's interface, on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_vllm import FakeVllm
from launching import metrics, train

from grpo_dist.model.toy import toy_path

SMALL = ("--train.num_train_steps", "2", "--train.batch_size", "4", "--rollout.group_size", "4",
         "--optim.learning_rate", "1e-2", "--data.eval_file", "null", "--rollout.engine", "vllm",
         "--rollout.vllm.retries", "2")  # fmt: skip


@pytest.fixture
def server() -> Iterator[FakeVllm]:
    with FakeVllm(str(toy_path()), max_rank=32) as running:
        yield running


def urls(*servers: FakeVllm) -> tuple[str, str]:
    return "--rollout.vllm.urls", f"[{', '.join(server.url for server in servers)}]"


def test_adapters_are_served_and_proved(server: FakeVllm, tmp_path: Path) -> None:
    run = train("zero2", 2, tmp_path / "run", *SMALL, *urls(server))
    _, *steps = metrics(run)
    assert [line["step"] for line in steps] == [1, 2]
    assert all(line["rollout/probe_gap"] <= 1e-4 for line in steps)
    assert all(line["rollout/logprob_gap_max"] <= 1e-4 for line in steps), "the trainer scores what the server drew"
    assert all(line["importance/mean"] == pytest.approx(1, abs=1e-4) for line in steps), "`truncate` is the default"
    assert server.calls.count("/v1/load_lora_adapter") == 3, "one a step, and one before the first"
    names = {given["model"] for given in server.requests if given and "prompt" in given}
    assert len(names) == 3, "each step asks for its own policy by name"
    assert not server.adapters and not list((run / "rollout").iterdir()), "nothing stays on servers and disk"
