"""Presets, and options of an algorithm that mean nothing together."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from option_groups import make_config

from grpo_dist.algorithm.targets import needs_old_policy
from grpo_dist.config.names import PRESETS, presets
from grpo_dist.config.parse import parse_config


@pytest.mark.parametrize("name", presets())
def test_a_preset_is_a_config_that_means_something(name: str) -> None:
    config = parse_config([f"--preset={name}", "--config", "configs/quickstart.yaml", "--loss.clip_high", "0.5"])
    written = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())
    for group, options in written.items():
        for option, value in options.items():
            if option != "clip_high":
                assert getattr(getattr(config, group), option) == value, option
    assert config.loss.clip_high == 0.5 and config.optim.learning_rate == 1e-3
    assert needs_old_policy(config) == (name in ("rloo", "ppo", "reinforce_pp"))


def test_an_unknown_preset_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(["--preset", "grop"])
    output = capsys.readouterr().err
    assert "'grop' given" in output and " grpo," in output


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"loss__kl_estimator": "k1", "loss__kl_coeff": 0.1}, ["loss.kl_estimator", "k1"]),
        ({"loss__kl_unbiased": True, "loss__kl_estimator": "k2", "loss__kl_coeff": 0.1}, ["loss.kl_unbiased"]),
        ({"loss__kl_target": 0.1}, ["loss.kl_coeff", "kl_target"]),
        ({"advantage__baseline": "none", "advantage__scale": "group"}, ["advantage.scale", "`none`"]),
        ({"advantage__baseline": "critic", "rollout__max_resamples": 2}, ["rollout.max_resamples", "critic"]),
        ({"rollout__group_size": 1}, ["rollout.group_size", "at least 2"]),
        ({"loss__dual_clip": 1.1}, ["loss.dual_clip", "1.2"]),
        ({"loss__objective": "reinforce", "train__updates_per_batch": 2}, ["loss.objective", "ratio"]),
        ({"loss__objective": "reinforce", "loss__ratio_level": "sequence"}, ["loss.ratio_level"]),
        ({"train__num_minibatches": 33}, ["train.num_minibatches", "32"]),
        ({"advantage__overlong_buffer": 256}, ["advantage.overlong_buffer"]),
        ({"loss__importance_low": 3.0}, ["loss.importance_low"]),
        ({"advantage__several_rewards": "normalise_then_sum", "loss__kl_in": "reward", "loss__kl_coeff": 0.1},
         ["loss.kl_in"]),
    ],
)  # fmt: skip
def test_what_means_nothing_is_refused(options: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(ValueError) as refused:
        make_config(**options)
    assert all(word in str(refused.value) for word in named)


def test_a_critic_needs_no_group() -> None:
    assert make_config(advantage__baseline="critic", rollout__group_size=1).rollout.group_size == 1
