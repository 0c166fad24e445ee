"""Alarms for a training that goes wrong, from the metrics alone.

Pure: a function of the lines of metrics.jsonl, in their order. Each rule computes one number from the recent steps. It
rings when that number has been above its limit for some steps in a row, and again only after the number has been below
a lower limit. alarms.md says what to do, under the alarm's name.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

from ..types import Metrics

FIRST_STEPS = 5
RECENT_STEPS = 100
_AVERAGED = 5


@dataclass(frozen=True)
class Alarm:
    """One problem of a training, at the step that shows it."""

    step: int
    name: str
    metric: str
    """The metric that shows it."""
    value: float
    """The number that the rule computed."""
    limit: float
    """The limit that it is above."""
    message: str
    """The problem, with the values of the metrics."""


def _values(steps: Iterable[Metrics], name: str) -> list[float]:
    return [value for step in steps if (value := step.get(name)) is not None]


@dataclass(frozen=True)
class History:
    """Steps so far: the first few, and the recent ones up to the current one."""

    first: Sequence[Metrics]
    recent: Sequence[Metrics]

    def now(self, name: str) -> float | None:
        """A metric of the current step; None where the step has no value."""
        return self.recent[-1].get(name)

    def before(self, name: str, most: int) -> list[float]:
        """The values of a metric in up to `most` steps before the current one."""
        return _values(list(self.recent)[:-1][-most:], name)

    def start(self, name: str) -> float | None:
        """The mean of a metric over the first steps; None before they are done, and where they have no value."""
        values = _values(self.first, name)
        return fmean(values) if values and len(self.first) == FIRST_STEPS else None


@dataclass(frozen=True)
class Rule:
    """When an alarm rings, and when it may ring again."""

    name: str
    metric: str
    value: Callable[[History], float | None]
    """The number that is compared; None where it is unknown."""
    limit: float
    clears: float
    """Below this the alarm may ring again."""
    steps: int
    """Steps in a row for which the value is above the limit."""
    message: str
    """A format of `value` and of the current metrics, `now[NAME]`."""


def _now(name: str) -> Callable[[History], float | None]:
    return lambda history: history.now(name)


def _whether(name: str, test: Callable[[float], bool]) -> Callable[[History], float | None]:
    """1 where the current value passes the test, else 0."""
    return lambda history: None if (now := history.now(name)) is None else float(test(now))


def _failed_share(history: History) -> float | None:
    """Completions whose rewards failed, as a share of all that were sampled, which resampling makes more than the
    batch's; a completion counts once for each reward."""
    tokens, length = history.now("tokens/completion"), history.now("completion/length_mean")
    failed = [value for name, value in history.recent[-1].items() if name.startswith("reward/") and
              name.endswith("/failed") and value is not None]  # fmt: skip
    if not failed or not tokens or not length:
        return None
    return sum(failed) / (history.now("rollout/completions") or tokens / length)


def _norm_over_median(history: History) -> float | None:
    """The gradient's norm over the median of the 20 steps before that had a signal, once there are 10.

    Where all groups have equal rewards, the gradient is that of the KL penalty alone: next to it any other is large.
    """
    steps = [step for step in list(history.recent)[:-1] if (step.get("reward/groups_zero_std") or 0.0) < 1]
    now, before = history.now("grad_norm"), _values(steps[-20:], "grad_norm")
    return now / median(before) if now is not None and len(before) >= 10 and median(before) > 0 else None


def _entropy_lost(history: History) -> float | None:
    """The factor by which the entropy is below that of the first steps, where most groups have equal rewards and the
    mean reward has not grown; else 0.

    Growth is more than half of the rewards' standard deviation at the start: a policy that has learned a task has a low
    entropy too.
    """
    entropy, reward, spread = (history.start(name) for name in ("entropy", "reward/mean", "reward/std"))
    now, rewards = history.now("entropy"), history.before("reward/mean", _AVERAGED)
    if entropy is None or reward is None or spread is None or now is None or not rewards:
        return None
    has_grown = fmean(rewards) - reward > spread / 2
    groups_equal = (history.now("reward/groups_zero_std") or 0.0) > 0.5
    return entropy / max(now, 1e-9) if groups_equal and not has_grown else 0.0


def _reward_lost(history: History) -> float | None:
    """The distance of the averaged reward below its best, in standard deviations of rewards within a batch."""
    means, spread = _values(history.recent, "reward/mean"), _values(history.recent, "reward/std")
    if len(means) < 2 * _AVERAGED:
        return None
    averaged = [fmean(means[place : place + _AVERAGED]) for place in range(len(means) - _AVERAGED + 1)]
    typical = median(spread)
    return (max(averaged) - averaged[-1]) / typical if typical > 0 else None


def _waiting_share(history: History) -> float | None:
    waited, step = history.now("time/reward"), history.now("time/step")
    return waited / step if waited is not None and step else None


RULES = (
    Rule("no_signal", "reward/groups_zero_std", _now("reward/groups_zero_std"), 0.95, 0.8, 5,
         "{value:.0%} of the groups have equal rewards (mean {now[reward/mean]:.3g}): nothing can be learned there"),
    Rule("no_update", "learning_rate", _whether("learning_rate", lambda rate: rate == 0), 0.5, 0.5, 3,
         "no update was made: every completion has an advantage of 0, or the learning rate is 0"),
    Rule("kl_runaway", "kl", _now("kl"), 1.0, 0.5, 3,
         "the policy runs away from the reference: KL is {value:.3g} nats a token"),
    Rule("entropy_collapse", "entropy", _entropy_lost, 10.0, 5.0, 5,
         "entropy has collapsed to {now[entropy]:.3g} nats, {value:.0f} times less than at the start, and most groups "
         "have equal rewards"),
    Rule("truncated", "completion/truncated", _now("completion/truncated"), 0.5, 0.3, 3,
         "{value:.0%} of the completions are truncated"),
    Rule("empty_completions", "completion/length_mean", _whether("completion/length_mean", lambda tokens: tokens < 1.5),
         0.5, 0.5, 3, "completions are nearly empty: {now[completion/length_mean]:.3g} tokens on average"),
    Rule("logprob_gap", "rollout/logprob_gap_max", _now("rollout/logprob_gap_max"), 2.0, 1.0, 3,
         "rollout and trainer disagree about the same token by up to {value:.3g} nats"),
    Rule("rollout_off", "rollout/kl", _now("rollout/kl"), 2e-2, 1e-2, 3,
         "rollouts are not drawn by the policy that is trained: KL is {value:.3g} nats a token between the two"),
    Rule("routers_off", "rollout/router_agreement",
         lambda history: None if (now := history.now("rollout/router_agreement")) is None else 1 - now, 0.3, 0.2, 3,
         "{value:.0%} of the routers would choose other experts than the rollout took"),
    Rule("probe_gap", "rollout/probe_gap", _now("rollout/probe_gap"), 0.2, 0.1, 1,
         "the servers score a fixed row differently than the trainer, by up to {value:.3g} nats"),
    Rule("update_lost", "rollout/update_share",
         _whether("rollout/update_share", lambda share: not 0.99 <= share <= 1.01), 0.5, 0.5, 1,
         "{now[rollout/update_share]:.1%} of the updates is in the weights that draw rollouts"),
    Rule("rewards_failing", "reward/NAME/failed", _failed_share, 0.01, 0.001, 1,
         "rewards failed for {value:.1%} of the completions, which are unscored"),
    Rule("unscored", "reward/unscored", _now("reward/unscored"), 0.2, 0.1, 3,
         "{value:.0%} of the completions have no reward"),
    Rule("slow_rewards", "time/reward", _waiting_share, 0.5, 0.3, 5,
         "{value:.0%} of the step is spent waiting for rewards"),
    Rule("grad_spike", "grad_norm", _norm_over_median, 10.0, 3.0, 1,
         "the gradient's norm is {now[grad_norm]:.3g}, {value:.0f} times its recent median"),
    Rule("bad_update", "update/skipped", _now("update/skipped"), 0.5, 0.5, 1,
         "an update was skipped: its gradient was not finite"),
    Rule("clipped", "clip/low", lambda history: (history.now("clip/low") or 0) + (history.now("clip/high") or 0),
         0.3, 0.2, 3, "{value:.0%} of the tokens are clipped: the policy moves too far within a batch"),
    Rule("reward_collapse", "reward/mean", _reward_lost, 1.0, 0.5, 3,
         "the reward has collapsed: {now[reward/mean]:.3g} on average, {value:.2g} standard deviations below its best"),
)  # fmt: skip
"""All alarms. No limit should ring in a run that learns; the limits on rounding are those of bfloat16."""

ROUNDING = {"logprob_gap": {"float32": 0.01, "float16": 0.3}, "rollout_off": {"float32": 1e-4, "float16": 2e-3},
            "probe_gap": {"float32": 5e-4}}  # fmt: skip
"""Limits of alarms in other dtypes of the policy."""


def rules_for(kl_estimator: str, dtype: str = "bfloat16", lag: int = 0) -> tuple[Rule, ...]:
    """All rules for an estimator of `kl`, the policy's compute dtype and rollout.lag.

    `kl` of sequences has no known scale, nor has the distance to the rollout where an older policy drew it.
    """
    without = {"kl"} if kl_estimator == "squared_sequence" else set()
    without |= {"rollout/logprob_gap_max", "rollout/kl", "rollout/router_agreement"} if lag else set()
    limits = {name: by_dtype[dtype] for name, by_dtype in ROUNDING.items() if dtype in by_dtype}
    return tuple(replace(rule, limit=limit, clears=limit / 2) if (limit := limits.get(rule.name)) else rule
                 for rule in RULES if rule.metric not in without)  # fmt: skip


class Alarms:
    """The alarms of a run, from one step to the next."""

    def __init__(self, rules: Sequence[Rule] = RULES) -> None:
        self.rules = rules
        self.ringing: set[str] = set()
        """Names of the alarms that have rung and not cleared."""
        self._above = dict.fromkeys((rule.name for rule in self.rules), 0)
        self._first: list[Metrics] = []
        self._recent: deque[Metrics] = deque(maxlen=RECENT_STEPS)

    def step(self, metrics: Metrics) -> list[Alarm]:
        """Add the metrics of the next step, and return the alarms that begin to ring with it."""
        if "reward/mean" not in metrics:  # the evaluation before the first step
            return []
        self._recent.append(metrics)
        if len(self._first) < FIRST_STEPS:
            self._first.append(metrics)
        history = History(self._first, self._recent)
        return [alarm for rule in self.rules if (alarm := self._apply(rule, history)) is not None]

    def _apply(self, rule: Rule, history: History) -> Alarm | None:
        value = rule.value(history)
        if value is None:
            return None
        self._above[rule.name] = self._above[rule.name] + 1 if value > rule.limit else 0
        if value < rule.clears:
            self.ringing.discard(rule.name)
        if self._above[rule.name] < rule.steps or rule.name in self.ringing:
            return None
        self.ringing.add(rule.name)
        now = {name: math.nan if number is None else number for name, number in history.recent[-1].items()}
        message = rule.message.format(value=value, now=now)
        return Alarm(int(now["step"]), rule.name, rule.metric, value, rule.limit, message)
