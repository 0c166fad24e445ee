"""The first and last value that an option takes, and those next to them that it refuses."""

from __future__ import annotations

import re
from typing import Any

import pytest

from grpo_dist.config.schema import Config, DataConfig, LoggingConfig, OptimConfig, RolloutConfig, TrainConfig

pytestmark = pytest.mark.quick

SHARE = ((0.0, 1.0), (-0.001, 1.001))
BOUNDS: list[tuple[type, str, tuple[tuple[Any, ...], tuple[Any, ...]]]] = [
    # group, option, values that are taken, values that are not
    (OptimConfig, "learning_rate", ((1e-12,), (0.0, -1e-5))),
    (OptimConfig, "weight_decay", ((0.0,), (-1e-9,))),
    (OptimConfig, "betas", (((0.0, 0.999),), ((1.0, 0.9), (0.9, 1.0), (-0.1, 0.9)))),
    (OptimConfig, "warmup_steps", ((0,), (-1,))),
    (OptimConfig, "warmup_ratio", SHARE),
    (OptimConfig, "min_lr_ratio", SHARE),
    (OptimConfig, "decay_ratio", SHARE),
    (OptimConfig, "max_grad_norm", ((1e-9,), (0.0,))),
    (TrainConfig, "seed", ((0, 2**63 - 1), (-1, 2**63))),
    (TrainConfig, "max_time", ((None, "00:00:00", "100:59:59"), ("1:60:00", "1:00:60", "1:00", "1:00:00 "))),
    (TrainConfig, "hang_timeout_seconds", ((5,), (4,))),
    (TrainConfig, "batch_size", ((1,), (0,))),
    (TrainConfig, "num_train_steps", ((1,), (0,))),
    (TrainConfig, "updates_per_batch", ((1,), (0,))),
    (TrainConfig, "num_minibatches", ((1,), (0,))),
    (TrainConfig, "max_tokens_per_pack", ((2,), (1,))),
    (TrainConfig, "sequence_parallel_size", ((1,), (0,))),
    (TrainConfig, "eval_every", ((0,), (-1,))),
    (TrainConfig, "num_eval_prompts", ((1,), (0,))),
    (TrainConfig, "save_every", ((0,), (-1,))),
    (TrainConfig, "keep_checkpoints", ((2,), (1,))),
    (TrainConfig, "max_bad_updates", ((1,), (0,))),
    (TrainConfig, "max_failed_saves", ((0,), (-1,))),
    (LoggingConfig, "profile_step", ((0,), (-1,))),
    (LoggingConfig, "show_completions_every", ((0,), (-1,))),
]
GROUP = {OptimConfig: "optim", TrainConfig: "train", LoggingConfig: "logging"}


@pytest.mark.parametrize(
    ("group", "option", "values"), BOUNDS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_bounds_of_an_option(group: Any, option: str, values: tuple[tuple[Any, ...], tuple[Any, ...]]) -> None:
    taken, refused = values
    assert [getattr(group(**{option: value}), option) for value in taken] == list(taken)
    for value in refused:
        with pytest.raises(ValueError, match=f"^{GROUP[group]}.{option}: {re.escape(repr(value))} given, expected "):
            group(**{option: value})


def test_warm_up_is_given_once() -> None:
    assert OptimConfig(warmup_steps=3, warmup_ratio=0.0).warmup_steps == 3
    with pytest.raises(ValueError, match=r"^optim\.warmup_ratio: 0\.1 given, expected 0 where optim\.warmup_steps is"):
        OptimConfig(warmup_steps=3, warmup_ratio=0.1)


LEAST: dict[str, Any] = {
    "train": {"num_train_steps": 7, "batch_size": 6, "num_minibatches": 6, "max_tokens_per_pack": 50},
    "rollout": {"max_completion_length": 20, "max_tokens_in_flight": 50}, "optim": {"warmup_steps": 7},
}  # fmt: skip


@pytest.mark.parametrize(
    ("group", "option", "refused"),
    [("train", "num_minibatches", 7), ("train", "max_tokens_per_pack", 49), ("rollout", "max_tokens_in_flight", 49),
     ("optim", "warmup_steps", 8)],
)  # fmt: skip
def test_bounds_by_other_options(group: str, option: str, refused: int) -> None:
    """Prompts of 30 tokens and completions of 20."""

    def make(changed: dict[str, Any]) -> Config:
        return Config(data=DataConfig(max_prompt_length=30), train=TrainConfig(**changed["train"]),
                      rollout=RolloutConfig(**changed["rollout"]), optim=OptimConfig(**changed["optim"]))  # fmt: skip

    assert make(LEAST).train.num_minibatches == 6
    with pytest.raises(ValueError, match=rf"^{group}\.{option}: {refused} given, expected "):
        make(LEAST | {group: LEAST[group] | {option: refused}})
