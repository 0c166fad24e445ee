"""The paths that only a GPU takes, on a simulated one: the same numbers as on the CPU, and no wait of the host but
those that are listed here."""

from __future__ import annotations

import json
from collections.abc import Set
from pathlib import Path
from typing import Any

import pytest
from launching import printed

from grpo_dist.config.names import presets

WAITS_OF_A_ROLLOUT = {
    # whenever prompts come in
    ("H2D copy", "rollout/native/cache.py:admit"),
    ("H2D copy", "rollout/native/engine.py:_prefill"),
    ("H2D copy", "rollout/native/steps.py:prefill"),
    ("_local_scalar_dense.default", "rollout/native/engine.py:_reserved"),
    # every few steps
    ("D2H copy", "rollout/native/engine.py:_retire"),
    # whenever sequences have ended
    ("D2H copy", "rollout/native/engine.py:_finish"),
    ("H2D copy", "rollout/native/engine.py:_retire"),
    ("_local_scalar_dense.default", "rollout/native/engine.py:_finish"),
    # whenever rows come in or are dropped
    ("_local_scalar_dense.default", "rollout/native/cache.py:count_all"),
    ("_local_scalar_dense.default", "rollout/native/cache.py:_place_rows"),
    ("_local_scalar_dense.default", "rollout/native/cache.py:keep"),
    ("_unique2.default", "rollout/native/cache.py:keep"),
    ("bincount.default", "rollout/native/cache.py:_place_rows"),
}
"""Waits of the host by kind and function. A step of decoding has none."""

WAITS_OF_AN_UPDATE = {
    # each optimizer step
    ("D2H copy", "distributed/ranks.py:reduce"),
    ("_local_scalar_dense.default", "distributed/strategy.py:step"),
}
"""The same for what the loop calls from the end of a rollout to the end of its update."""

WAITS_OF_SOME_UPDATES = {
    # each batch
    ("H2D copy", "distributed/ranks.py:reduce")
}
"""What options bring with them."""

PHASES = ("pack_minibatches", "with_old_policy", "update", "sync")
COMPARED = {"loss": 1e-6, "grad_norm": 1e-6, "reward/mean": 1e-6, "kl": 1e-6, "entropy": 1e-6}


def waits(seen: dict[str, Any], phases: tuple[str, ...]) -> dict[tuple[str, str], str]:
    """Waits of the project's own lines by kind and function, with the line."""
    return {(kind, place.rpartition(":")[0]): place for phase, kind, place, _ in seen["syncs"]
            if phase in phases and place}  # fmt: skip


def check_waits(
    found: dict[tuple[str, str], str], listed: Set[tuple[str, str]], others: Set[tuple[str, str]] = frozenset()
) -> None:
    """No wait that is neither `listed` nor one of the `others`, and none listed that is no more."""
    new = {key: place for key, place in found.items() if key not in listed | others}
    assert not new, "the host waits for the device where it did not"
    assert not listed - found.keys(), "these lines wait no more: take them out of the list"


def check_rollouts(first: int, count: int) -> None:
    found = printed("simulated_rollouts.py", str(first), str(count))
    assert found["faults"] == {}
    assert found["completions"] > 2 * count and found["seen"]["replays"] > 4 * count
    check_waits(waits(found["seen"], ("",)), WAITS_OF_A_ROLLOUT)


def check_trainings(cases: dict[str, list[str]], tmp_path: Path, others: Set[tuple[str, str]] = frozenset()) -> None:
    found = printed("simulated_training.py", str(tmp_path), json.dumps(cases))
    for name, runs in found.items():
        assert runs["seen"]["replays"] > 0, name
        for cpu, cuda in zip(runs["cpu"], runs["cuda"], strict=True):
            for metric, most in COMPARED.items():
                assert cuda[metric] == pytest.approx(cpu[metric], abs=most, rel=1e-5), (name, metric)
        check_waits(waits(runs["seen"], PHASES), WAITS_OF_AN_UPDATE, others)


def test_rollouts_on_the_device_are_those_of_the_cpu() -> None:
    check_rollouts(0, 3)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(3, 57, 18))
def test_more_rollouts_on_the_device_are_those_of_the_cpu(first: int) -> None:
    check_rollouts(first, 18)


def test_training_on_the_device_is_that_of_the_cpu(tmp_path: Path) -> None:
    check_trainings({"grpo": ["--preset", "grpo", "--loss.kl_coeff", "0.02"]}, tmp_path)


OPTIONS = {
    "full": ["--lora", "null"],
    "checkpointing": ["--model.gradient_checkpointing", "true"],
    "minibatches": ["--train.num_minibatches", "2", "--train.updates_per_batch", "2"],
    "entropy": ["--loss.entropy_coeff", "0.01"],
    "shared": ["--reference.placement", "shared"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*presets(), *OPTIONS])
def test_every_preset_on_the_device_is_that_of_the_cpu(name: str, tmp_path: Path) -> None:
    arguments = [*OPTIONS.get(name, ["--preset", name]), "--loss.kl_coeff", "0.02"]
    check_trainings({name: arguments}, tmp_path, WAITS_OF_SOME_UPDATES)
