"""The line of an evaluation in the log."""

from __future__ import annotations

from grpo_dist.trainer.evaluation import shown


def test_the_mean_reward_is_said_where_it_is_another_number() -> None:
    assert shown(0.5, 0.5) == shown(0.5, 0.50004) == "0.500"
    assert shown(0.25, 0.6) == "0.250 (mean reward 0.600)"
