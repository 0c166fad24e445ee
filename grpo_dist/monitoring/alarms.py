"""Alarms in plain words where training goes wrong, from the metrics alone.

Pure: a function of the lines of metrics.jsonl, in their order. Each rule reads one number off the recent steps; it
rings when that number has been above its limit for some steps in a row, and again only after it has come down below a
lower one. What to do is said in docs/metrics.md under the alarm's name.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

Metrics = Mapping[str, float | None]
PAGE = "docs/metrics.md"
FIRST_STEPS = 5
RECENT_STEPS = 100
_AVERAGED = 5


@dataclass(frozen=True)
class Alarm:
    """One thing that goes wrong, at the step where that became clear."""

    step: int
    name: str
    metric: str
    """The metric that shows it."""
    value: float
    """What the rule read off the metrics."""
    limit: float
    """What it should not be above."""
    message: str
    """What is wrong, with the metrics' values."""

    @property
    def page(self) -> str:
        """Where it is said what to do."""
        return f"{PAGE}#{self.name}"


def _measured(steps: Iterable[Metrics], name: str) -> list[float]:
    return [value for step in steps if (value := step.get(name)) is not None]


@dataclass(frozen=True)
class History:
    """Steps so far: the first few, and the recent ones up to the present one."""

    first: Sequence[Metrics]
    recent: Sequence[Metrics]

    def now(self, name: str) -> float | None:
        """A metric of the present step; None where it was not measured."""
        return self.recent[-1].get(name)

    def before(self, name: str, most: int) -> list[float]:
        """A metric of up to `most` steps before the present one, as far as it was measured."""
        return _measured(list(self.recent)[:-1][-most:], name)

    def start(self, name: str) -> float | None:
        """The mean of a metric over the first steps; None before they are done, and where it was not measured."""
        values = _measured(self.first, name)
        return fmean(values) if values and len(self.first) == FIRST_STEPS else None


@dataclass(frozen=True)
class Rule:
    """When an alarm rings, and when it may ring again."""

    name: str
    metric: str
    value: Callable[[History], float | None]
    """The number that is compared; None where it cannot be told."""
    limit: float
    clears: float
    """Below this the alarm may ring again."""
    steps: int
    """For how many steps in a row the value has to be above the limit."""
    message: str
    """A format of `value` and of the present metrics, `now[NAME]`."""


def _now(name: str) -> Callable[[History], float | None]:
    return lambda history: history.now(name)


def _whether(name: str, test: Callable[[float], bool]) -> Callable[[History], float | None]:
    """1 where the present value passes the test, else 0."""
    return lambda history: None if (now := history.now(name)) is None else float(test(now))


def _failed_share(history: History) -> float | None:
    """Completions whose rewards failed, as a share; a completion counts once for each reward."""
    tokens, length = history.now("tokens/completion"), history.now("completion/length_mean")
    failed = [value for name, value in history.recent[-1].items() if name.startswith("reward/") and
              name.endswith("/failed") and value is not None]  # fmt: skip
    return sum(failed) * length / tokens if failed and tokens and length else None


def _times_median(name: str) -> Callable[[History], float | None]:
    """The present value over the median of the 20 steps before, once there are 10."""

    def value(history: History) -> float | None:
        now, before = history.now(name), history.before(name, 20)
        return now / median(before) if now is not None and len(before) >= 10 and median(before) > 0 else None

    return value


def _entropy_lost(history: History) -> float | None:
    """By what factor the entropy is below that of the first steps, where groups are alike and nothing was gained.

    A gain is half of the standard deviation that rewards had at the start: who has learned a task is sure of it.
    """
    entropy, reward, spread = (history.start(name) for name in ("entropy", "reward/mean", "reward/std"))
    now, rewards = history.now("entropy"), history.before("reward/mean", _AVERAGED)
    if entropy is None or reward is None or spread is None or now is None or not rewards:
        return None
    gained = fmean(rewards) - reward > spread / 2
    alike = (history.now("reward/groups_zero_std") or 0.0) > 0.5
    return entropy / max(now, 1e-9) if alike and not gained else 0.0


def _reward_lost(history: History) -> float | None:
    """How far the reward, averaged, is below its best, in its standard deviations within a batch."""
    means, spread = _measured(history.recent, "reward/mean"), _measured(history.recent, "reward/std")
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
         "no update was made: no completion had anything to teach, or the learning rate is 0"),
    Rule("kl_runaway", "kl", _now("kl"), 1.0, 0.5, 3,
         "the policy runs away from the reference: KL is {value:.3g} nats a token"),
    Rule("entropy_collapse", "entropy", _entropy_lost, 10.0, 5.0, 5,
         "entropy has collapsed to {now[entropy]:.3g} nats, {value:.0f} times less than at the start, and most groups "
         "have equal rewards"),
    Rule("truncated", "completion/truncated", _now("completion/truncated"), 0.5, 0.3, 3,
         "{value:.0%} of the completions are cut off by rollout.max_completion_length"),
    Rule("empty_completions", "completion/length_mean", _whether("completion/length_mean", lambda tokens: tokens < 1.5),
         0.5, 0.5, 3, "completions are all but empty: {now[completion/length_mean]:.3g} tokens on average"),
    Rule("logprob_gap", "rollout/logprob_gap_max", _now("rollout/logprob_gap_max"), 2.0, 1.0, 3,
         "rollout and trainer disagree about the same token by up to {value:.3g} nats"),
    Rule("rollout_off", "rollout/kl", _now("rollout/kl"), 2e-2, 1e-2, 3,
         "rollouts are not drawn by the policy that is trained: KL is {value:.3g} nats a token between the two"),
    Rule("update_lost", "rollout/update_share",
         _whether("rollout/update_share", lambda share: not 0.99 <= share <= 1.01), 0.5, 0.5, 1,
         "{now[rollout/update_share]:.1%} of what was learned is in the weights that draw rollouts"),
    Rule("rewards_failing", "reward/NAME/failed", _failed_share, 0.01, 0.001, 1,
         "rewards failed for {value:.1%} of the completions, which are unscored"),
    Rule("unscored", "reward/unscored", _now("reward/unscored"), 0.2, 0.1, 3,
         "{value:.0%} of the completions have no reward"),
    Rule("slow_rewards", "time/reward", _waiting_share, 0.5, 0.3, 5,
         "{value:.0%} of the step is spent waiting for rewards"),
    Rule("grad_spike", "grad_norm", _times_median("grad_norm"), 10.0, 3.0, 1,
         "the gradient's norm is {now[grad_norm]:.3g}, {value:.0f} times its recent median"),
    Rule("bad_update", "update/skipped", _now("update/skipped"), 0.5, 0.5, 1,
         "an update was left out: its gradient was not finite"),
    Rule("clipped", "clip/low", lambda history: (history.now("clip/low") or 0) + (history.now("clip/high") or 0),
         0.3, 0.2, 3, "{value:.0%} of the tokens are clipped: the policy moves too far within a batch"),
    Rule("reward_collapse", "reward/mean", _reward_lost, 1.0, 0.5, 3,
         "the reward has collapsed: {now[reward/mean]:.3g} on average, {value:.2g} standard deviations below its best"),
)  # fmt: skip
"""All alarms. Limits are meant to be silent in a run that learns; those on rounding are bfloat16's."""

ROUNDING = {"logprob_gap": {"float32": 0.01, "float16": 0.3}, "rollout_off": {"float32": 1e-4, "float16": 2e-3}}
"""Limits of alarms in other dtypes of the policy."""


def rules_for(kl_estimator: str, dtype: str = "bfloat16") -> tuple[Rule, ...]:
    """All rules that hold where `kl` comes from this estimator (of whole sequences, it has no known scale) and the
    policy computes in this dtype."""
    rules = [rule for rule in RULES if rule.metric != "kl" or kl_estimator != "squared_sequence"]
    limits = {name: by_dtype[dtype] for name, by_dtype in ROUNDING.items() if dtype in by_dtype}
    return tuple(replace(rule, limit=limit, clears=limit / 2) if (limit := limits.get(rule.name)) else rule
                 for rule in rules)  # fmt: skip


class Alarms:
    """Watches the steps of a run go by."""

    def __init__(self, rules: Sequence[Rule] = RULES) -> None:
        self.rules = rules
        self.ringing: set[str] = set()
        """Names of the alarms that have rung and not cleared."""
        self._above = dict.fromkeys((rule.name for rule in self.rules), 0)
        self._first: list[Metrics] = []
        self._recent: deque[Metrics] = deque(maxlen=RECENT_STEPS)

    def step(self, metrics: Metrics) -> list[Alarm]:
        """Take in the metrics of the next step and return the alarms that begin to ring with it."""
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
