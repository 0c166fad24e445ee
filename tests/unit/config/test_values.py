"""Options as values: the names that files and messages show, differences, and secrets."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import date
from typing import Any

import pytest

from grpo_dist.config.schema import Config, ModelConfig, RewardConfig, RolloutConfig
from grpo_dist.config.values import SECRET, default_of, differences, flat, redacted

pytestmark = pytest.mark.quick

VALUES: dict[str, Any] = {
    "train": {"seed": 1}, "optim": {"betas": (0.9, 0.99)}, "lora": None, "empty": {}, "day": date(2026, 1, 2),
    "rewards": [{"name": "a", "args": {}, "schedule": {0: 1.0}}, {"name": "b"}],
}  # fmt: skip
BARE = {"train.seed": 1, "optim.betas": [0.9, 0.99], "lora": None, "empty": {}, "day": "2026-01-02"}


def test_a_list_is_one_option() -> None:
    """The model card's options are those of a config file, where `rewards` is a list."""
    assert flat(VALUES) == {**BARE, "rewards": [{"name": "a", "args": {}, "schedule": {"0": 1.0}}, {"name": "b"}]}


def test_numbered_lists_are_groups() -> None:
    """Trackers and the report show `rewards.0.name`."""
    assert flat(VALUES, numbered=True) == {
        **BARE, "rewards.0.name": "a", "rewards.0.args": {}, "rewards.0.schedule.0": 1.0, "rewards.1.name": "b",
    }  # fmt: skip
    assert flat({}, numbered=True) == {}


def test_a_config_does_not_differ_from_its_json() -> None:
    """A checkpoint holds JSON: no tuples, and texts as the keys of a schedule."""
    config = asdict(Config(rewards=[RewardConfig(schedule={0: 1.0, 9: 0.5}, args={"a": (1, 2)})]))
    stored = json.loads(json.dumps(config))
    assert differences(stored, config) == []
    stored["train"]["seed"] = 5
    assert differences(stored, config) == ["train.seed: 5 -> 0"]
    assert differences({"a": {}}, {}) == ["a: {} -> None"]


def test_secrets_are_redacted() -> None:
    values = {"rewards": [{"name": "mine:f", "args": {"api_key": "s3cret", "url": "http://x", "passwd": ("s3cret",)}}],
              "hub_token": "s3cret", "max_tokens_per_pack": 4096, "max_tokens_in_flight": "auto"}  # fmt: skip
    assert redacted(values) == {
        "rewards": [{"name": "mine:f", "args": {"api_key": "<redacted>", "url": "http://x", "passwd": ["<redacted>"]}}],
        "hub_token": "<redacted>", "max_tokens_per_pack": 4096, "max_tokens_in_flight": "auto",
    }  # fmt: skip
    config = asdict(Config(model=ModelConfig(tokenizer="mine"), rollout=RolloutConfig(banned_tokens=["a"])))
    assert json.dumps(redacted(config)) == json.dumps(config)
    assert all(map(SECRET.search, ("HF_TOKEN", "WANDB_API_KEY", "DB_PASSWD", "my_password", "CREDENTIALS", "Secret")))


@dataclass
class Options:
    required: int
    plain: int = 3
    made: list[int] = field(default_factory=lambda: [4])


def test_defaults_of_options() -> None:
    assert [default_of(each) for each in fields(Options)] == [MISSING, 3, [4]]
