"""Alarms: each rings where it should, once, again only after recovery, and never in a run that learns."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from grpo_dist.monitoring.advice import advice
from grpo_dist.monitoring.alarms import RULES, Alarms, Rule, rules_for

pytestmark = pytest.mark.quick

HEALTHY = {
    "reward/mean": 0.5, "reward/std": 0.4, "reward/groups_zero_std": 0.3, "reward/unscored": 0.0, "kl": 0.02,
    "reward/math/failed": 0.0, "entropy": 0.6, "clip/low": 0.0, "clip/high": 0.01, "grad_norm": 0.8,
    "learning_rate": 1e-3, "update/skipped": 0.0, "completion/length_mean": 5.0, "completion/truncated": 0.0,
    "tokens/completion": 500.0, "rollout/logprob_gap_max": 0.01,
    "rollout/kl": 1e-3, "rollout/update_share": 1.0, "rollout/probe_gap": 0.02,
    "rollout/router_agreement": 0.95,
    "time/reward": 0.1, "time/step": 2.0,
}  # fmt: skip
WRONG: dict[str, tuple[dict[str, float | None], int]] = {
    # alarm: what is wrong, and the step of it at which the alarm is due
    "no_signal": ({"reward/groups_zero_std": 1.0}, 5),
    "no_update": ({"learning_rate": 0.0}, 3),
    "kl_runaway": ({"kl": 2.0}, 3),
    "entropy_collapse": ({"entropy": 0.01, "reward/groups_zero_std": 0.9}, 5),
    "truncated": ({"completion/truncated": 0.6}, 3),
    "empty_completions": ({"completion/length_mean": 1.0, "tokens/completion": 100.0}, 3),
    "logprob_gap": ({"rollout/logprob_gap_max": 3.0}, 3),
    "rollout_off": ({"rollout/kl": 0.05}, 3),
    "probe_gap": ({"rollout/probe_gap": 0.3}, 1),
    "routers_off": ({"rollout/router_agreement": 0.6}, 3),
    "update_lost": ({"rollout/update_share": 0.04}, 1),
    "rewards_failing": ({"reward/math/failed": 2.0}, 1),
    "unscored": ({"reward/unscored": 0.3}, 3),
    "slow_rewards": ({"time/reward": 1.5}, 5),
    "grad_spike": ({"grad_norm": 9.0}, 1),
    "bad_update": ({"update/skipped": 1.0}, 1),
    "clipped": ({"clip/low": 0.2, "clip/high": 0.2}, 3),
    "reward_collapse": ({"reward/mean": 0.0}, 7),  # 5 steps until the average is below, and 2 more
}  # fmt: skip


def rung(alarms: Alarms, first: int, steps: list[dict[str, float | None]]) -> list[tuple[int, str]]:
    """(step, name) of all alarms over some steps."""
    return [(alarm.step, alarm.name) for number, step in enumerate(steps, first)
            for alarm in alarms.step({"step": number} | step)]  # fmt: skip


def test_every_rule_is_tried() -> None:
    assert {rule.name for rule in RULES} == set(WRONG)


@pytest.mark.parametrize("name", WRONG)
def test_rings_once_and_again_after_recovery(name: str) -> None:
    wrong, due = WRONG[name]
    alarms = Alarms()
    assert rung(alarms, 1, [HEALTHY] * 30) == []
    assert rung(alarms, 31, [HEALTHY | wrong] * (due + 20)) == [(30 + due, name)]
    left = set() if name == "grad_spike" else {name}  # a spike that lasts becomes the median
    assert alarms.ringing == left
    assert rung(alarms, 100, [HEALTHY] * 120) == []
    assert alarms.ringing == set()
    assert rung(alarms, 300, [HEALTHY | wrong] * due) == [(299 + due, name)]


def test_between_the_two_limits_nothing_changes() -> None:
    alarms = Alarms()
    rung(alarms, 1, [HEALTHY | {"completion/truncated": 0.6}] * 3)
    assert rung(alarms, 4, [HEALTHY | {"completion/truncated": share} for share in (0.4, 0.6, 0.6, 0.6, 0.6)]) == []
    assert alarms.ringing == {"truncated"}


def test_one_bad_step_is_none_for_an_alarm_of_several() -> None:
    assert rung(Alarms(), 1, [HEALTHY | {"kl": 5.0}, HEALTHY] * 10) == []


def test_a_message_names_the_values() -> None:
    alarms = Alarms()
    (alarm,) = [each for number in range(5) for each in alarms.step(
        HEALTHY | {"step": number, "reward/groups_zero_std": 1.0, "reward/mean": 0.125})]  # fmt: skip
    assert alarm.message == "100% of the groups have equal rewards (mean 0.125): nothing can be learned there"
    assert (alarm.step, alarm.metric, alarm.value, alarm.limit) == (4, "reward/groups_zero_std", 1.0, 0.95)


def test_metrics_that_are_missing_or_null_say_nothing() -> None:
    nothing = dict.fromkeys(HEALTHY)
    assert rung(Alarms(), 0, [{"eval/accuracy": 0.5}] + [nothing] * 200) == []
    assert rung(Alarms(), 0, [{"reward/mean": None}] * 200) == []


def test_no_metric_of_a_step_is_changed_or_kept_for_ever() -> None:
    alarms = Alarms()
    rung(alarms, 1, [HEALTHY] * 1000)
    assert len(alarms._recent) == 100 and len(alarms._first) == 5


def test_the_kl_of_whole_sequences_has_no_limit() -> None:
    wrong = [HEALTHY | {"kl": 50.0}] * 10
    assert rung(Alarms(rules_for("squared_sequence")), 1, wrong) == []
    assert rung(Alarms(rules_for("k3")), 1, wrong) == [(3, "kl_runaway")]


def test_steps_without_a_signal_make_no_spike_of_the_others() -> None:
    """Small batches have many: the gradient of the KL penalty alone is a hundredth of that of rewards."""
    equal = HEALTHY | {"reward/groups_zero_std": 1.0, "grad_norm": 0.004}
    steps = [equal, equal, HEALTHY, equal] * 50
    assert [name for _, name in rung(Alarms(), 1, steps) if name == "grad_spike"] == []
    assert rung(Alarms(), 1, [*steps, HEALTHY | {"grad_norm": 9.0}]) == [(201, "grad_spike")]


@pytest.mark.parametrize("before", [9, 10])
def test_a_spike_is_one_beside_ten_steps(before: int) -> None:
    steps = [HEALTHY] * before + [HEALTHY | {"grad_norm": 9.0}]
    assert rung(Alarms(), 1, steps) == ([(11, "grad_spike")] if before == 10 else [])


def test_failures_are_a_share_of_what_was_sampled() -> None:
    """With resampling of groups: here 3 of 400 completions, of which 100 are in the batch."""
    step = HEALTHY | {"reward/math/failed": 3.0, "rollout/completions": 400.0}
    assert rung(Alarms(), 1, [step]) == []
    (alarm,) = Alarms().step({"step": 1} | step | {"reward/math/failed": 8.0})
    assert alarm.value == 8 / 400 and alarm.message.startswith("rewards failed for 2.0% of the completions")
    assert rung(Alarms(), 1, [step | {"rollout/completions": None}]) == [(1, "rewards_failing")]


def test_a_solved_task_has_little_entropy_and_no_alarm() -> None:
    solved = HEALTHY | {"entropy": 0.01, "reward/groups_zero_std": 0.9, "reward/mean": 0.99}
    assert rung(Alarms(), 1, [HEALTHY] * 30 + [solved] * 50) == []
    exploring = HEALTHY | {"entropy": 0.01, "reward/groups_zero_std": 0.4}
    assert rung(Alarms(), 1, [HEALTHY] * 30 + [exploring] * 50) == []


@pytest.mark.parametrize(
    ("dtype", "gap", "kl"), [("float32", 0.02, 2e-4), ("float16", 0.4, 3e-3), ("bfloat16", 3.0, 0.05)]
)
def test_bounds_on_rounding_are_the_dtypes(dtype: str, gap: float, kl: float) -> None:
    far = HEALTHY | {"rollout/logprob_gap_max": gap, "rollout/kl": kl, "rollout/probe_gap": 0.0}
    assert rung(Alarms(rules_for("k3", dtype)), 1, [far] * 3) == [(3, "logprob_gap"), (3, "rollout_off")]
    near = far | {"rollout/logprob_gap_max": gap / 3, "rollout/kl": kl / 3}
    assert rung(Alarms(rules_for("k3", dtype)), 1, [near] * 10) == []
    assert rung(Alarms(rules_for("k3", dtype, lag=1)), 1, [far] * 3) == [], "an older policy drew"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_the_page_says_what_to_do(rule: Rule) -> None:
    assert len(advice(rule.name)) > 100 and not re.search(r"[\n`]|\]\(", advice(rule.name))
    assert f"`{rule.metric}`" in (Path(__file__).parents[3] / "docs" / "metrics.md").read_text()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_clears_below_its_limit(rule: Rule) -> None:
    assert rule.clears <= rule.limit and rule.steps >= 1 and not math.isnan(rule.limit)
