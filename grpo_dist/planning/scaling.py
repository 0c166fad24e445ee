"""Step time on other numbers of ranks, from the parts of steps that were measured on one. Pure.

A rank generates a contiguous share of the completions, so the rollout lasts as long as its slowest rank: recorded
groups are drawn again and again, dealt out to the ranks, and the slowest is averaged over the draws. Updates are
divided by packing.plan, and what ranks send one another is counted in bytes. Nothing overlaps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..model.packing import piece_cost, plan
from .memory import MOST_GATHERED, ModelCounts

Numbers = NDArray[np.float64]

HOST_PER_TOKEN = 3.5e-7
"""Seconds that every rank spends on each completion token of the whole batch: gathering, advantages, weights, the plan,
the table of completions. Measured by docs/batch_costs.py on one core of a server's CPU."""


@dataclass(frozen=True)
class Group:
    """One recorded group: the length of its prompt, and of its completions, in tokens."""

    prompt: int
    completions: tuple[int, ...]


@dataclass(frozen=True)
class RecordedStep:
    """One step of a run."""

    groups: tuple[Group, ...]
    seconds: dict[str, float]
    """Of `rollout`, `reward`, `reference`, `update`, and of the whole `step`."""


@dataclass(frozen=True)
class Link:
    """What connects two ranks."""

    gbps: float
    """Gigabits a second that each rank sends and receives at once."""
    latency_seconds: float
    """Of one message."""


@dataclass(frozen=True)
class Message:
    """Something all ranks exchange in a step."""

    name: str
    num_bytes: float
    """Of the whole."""
    passes: int
    """How often the whole goes through a ring: 1 to gather or scatter it, 2 to reduce it on all ranks."""
    times: int
    """Collective calls a step that it takes, each of `num_bytes`."""

    def seconds(self, num_ranks: int, link: Link) -> float:
        """Time on a ring of ranks, whose start takes as many messages as a tree is deep."""
        sent = self.passes * self.num_bytes * (num_ranks - 1) / num_ranks
        return self.times * (8 * sent / (link.gbps * 1e9) + self.passes * math.ceil(math.log2(num_ranks))
                             * link.latency_seconds)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What is the same at every number of ranks."""

    counts: ModelCounts
    zero_stage: int
    policy_bytes: int
    trained_bytes: int
    max_tokens_per_pack: int
    optimizer_steps: int
    """Of a step."""
    shares_prompts: bool


@dataclass(frozen=True)
class Costs:
    """What was fitted to the recorded steps."""

    per_token: float
    """Seconds of rollout for each completion token of a rank."""
    per_position: float
    """Seconds of rollout for each token of a rank's longest completion."""
    per_prompt_token: float
    """Seconds of rollout for each prompt token of a rank."""
    update: float
    """Seconds of update for each token's worth of cost (packing.piece_cost) of a rank."""
    reference: float
    reward: float
    """Seconds for each completion of a rank."""
    fixed: float
    """Seconds of the sync and of what is not timed by itself, whatever the batch."""


@dataclass(frozen=True)
class Predicted:
    """One step, in seconds by part."""

    seconds: dict[str, float]
    straggling: float
    """Share of the rollout that a rank of average length spends waiting for the slowest."""

    @property
    def step(self) -> float:
        """Seconds of the whole step."""
        return sum(self.seconds.values())


def shares(groups: Sequence[Group], num_ranks: int) -> tuple[Numbers, Numbers, Numbers]:
    """Completion tokens, longest completion and prompt tokens of each rank's contiguous share: three (R,)."""
    lengths = np.array([length for group in groups for length in group.completions], dtype=np.float64)
    owner = np.array([g for g, group in enumerate(groups) for _ in group.completions])
    prompts = np.array([group.prompt for group in groups], dtype=np.float64)
    bounds = [len(lengths) * rank // num_ranks for rank in range(num_ranks + 1)]
    spans = [slice(low, high) for low, high in itertools.pairwise(bounds)]
    return (np.array([lengths[span].sum() for span in spans]),
            np.array([lengths[span].max(initial=0) for span in spans]),
            np.array([prompts[np.unique(owner[span])].sum() for span in spans]))  # fmt: skip


def rollout_seconds(costs: Costs, groups: Sequence[Group], num_ranks: int) -> Numbers:
    """Seconds that each rank generates: (R,)."""
    tokens, longest, prompts = shares(groups, num_ranks)
    return costs.per_token * tokens + costs.per_position * longest + costs.per_prompt_token * prompts


def heaviest(groups: Sequence[Group], num_ranks: int, setting: Setting) -> tuple[float, int]:
    """Cost of the update on its heaviest rank, in tokens, and the packs on each rank.

    Under ZeRO-2 and 3 ranks meet at every pack, so that the heaviest pack of each turn counts.
    """
    prompts = [group.prompt for group in groups]
    lengths = [length for group in groups for length in group.completions]
    owner = [g for g, group in enumerate(groups) for _ in group.completions]
    ranks = plan(prompts, owner, lengths, [True] * len(lengths), max_tokens=setting.max_tokens_per_pack,
                 num_ranks=num_ranks, share_prompts=setting.shares_prompts)  # fmt: skip
    costs = np.array([[sum(piece_cost(prompts[p.prompt], [lengths[n] for n in p.completions]) for p in pack)
                       for pack in packs] for packs in ranks])  # fmt: skip
    meets = costs.max(0).sum() if setting.zero_stage >= 2 else costs.sum(1).max()
    return float(meets), len(ranks[0])


def not_negative_fit(columns: Numbers, values: Numbers) -> Numbers:
    """Coefficients ≥ 0 of the `columns` (S, C) that come closest to `values` (S,), by trying every subset."""
    best, chosen = math.inf, np.zeros(columns.shape[1])
    for size in range(1, columns.shape[1] + 1):
        for subset in itertools.combinations(range(columns.shape[1]), size):
            found, *_ = np.linalg.lstsq(columns[:, subset], values, rcond=None)
            error = float(np.square(columns[:, subset] @ found - values).sum())
            if (found >= 0).all() and error < best * (1 - 1e-9):
                best, chosen = error, np.zeros(columns.shape[1])
                chosen[list(subset)] = found
    return chosen


def fit(steps: Sequence[RecordedStep], num_ranks: int, setting: Setting) -> Costs:
    """What a rank's work costs, from steps recorded on `num_ranks`.

    Raises ValueError where there are fewer than 3 steps, which could not tell the rollout's parts apart.
    """
    if len(steps) < 3:
        raise ValueError(f"--from: {len(steps)} whole step(s) recorded, expected at least 3 to fit the rollout to")
    rows = np.array([[part.max() for part in shares(step.groups, num_ranks)] for step in steps])
    seconds = np.array([step.seconds["rollout"] for step in steps])
    per_token, per_position, per_prompt_token = not_negative_fit(rows, seconds)
    cost = sum(heaviest(step.groups, num_ranks, setting)[0] for step in steps)
    completions = sum(len(group.completions) for step in steps for group in step.groups)
    total = {name: sum(step.seconds.get(name, 0.0) for step in steps)
             for name in ("rollout", "reward", "reference", "update", "step")}  # fmt: skip
    timed = sum(total[name] for name in ("rollout", "reward", "reference", "update"))
    on_host = HOST_PER_TOKEN * sum(sum(group.completions) for step in steps for group in step.groups)
    return Costs(per_token, per_position, per_prompt_token, update=total["update"] / cost,
                 reference=total["reference"] / cost, reward=total["reward"] * num_ranks / completions,
                 fixed=max(total["step"] - timed - on_host, 0.0) / len(steps))  # fmt: skip


def messages(groups: Sequence[Group], num_packs: int, setting: Setting) -> list[Message]:
    """What is sent in one step with `num_packs` on each rank."""
    counts, stage = setting.counts, setting.zero_stage
    lengths = [length for group in groups for length in group.completions]
    of_batch = sum(lengths) * (4 + 4) + len(lengths) * 5 * 8  # token ids and log-probs; what a completion has one of
    trained = (counts.adapters or counts.parameters) * setting.trained_bytes
    frozen = (counts.parameters - counts.kept_whole) * setting.policy_bytes if counts.adapters else 0
    sent = [Message("batch", of_batch, 1, 1)]
    if stage < 2:
        sent.append(Message("gradients", trained, 2, setting.optimizer_steps))
    else:  # reduced to their owners after every pack
        sent.append(Message("gradients", trained, 1, num_packs * setting.optimizer_steps))
    if stage in (1, 2):
        sent.append(Message("stepped weights", trained, 1, setting.optimizer_steps))
    if stage == 3:
        of_a_pack = 2 if counts.parameters > MOST_GATHERED else 1  # forward, and again backward
        layers = counts.num_layers * of_a_pack * num_packs * setting.optimizer_steps
        sent.append(Message("gathered weights", (frozen + trained) / counts.num_layers, 1, layers))
        sent.append(Message("adapters for the copy", trained, 1, 1))
    return sent


def predict(
    costs: Costs, steps: Sequence[RecordedStep], batch_size: int, num_ranks: int, setting: Setting, link: Link,
) -> Predicted:  # fmt: skip
    """The mean step of `batch_size` groups drawn from the recorded ones, on `num_ranks`."""
    generator = np.random.default_rng(0)
    recorded = [group for step in steps for group in step.groups]
    num_draws = min(50, math.ceil(20_000 / batch_size))  # large batches differ little from one another
    total: dict[str, float] = dict.fromkeys(
        ("rollout", "reward", "reference", "update", "host", "fixed", "sent"), 0.0)  # fmt: skip
    waiting = 0.0
    for _ in range(num_draws):
        groups = [recorded[place] for place in generator.integers(len(recorded), size=batch_size)]
        completions = sum(len(group.completions) for group in groups)
        rollout = rollout_seconds(costs, groups, num_ranks)
        cost, num_packs = heaviest(groups, num_ranks, setting)
        total["rollout"] += rollout.max()
        waiting += 1 - rollout.mean() / max(rollout.max(), 1e-12)
        total["update"] += costs.update * cost
        total["reference"] += costs.reference * cost
        total["reward"] += costs.reward * math.ceil(completions / num_ranks)
        total["host"] += HOST_PER_TOKEN * sum(sum(group.completions) for group in groups)
        total["fixed"] += costs.fixed
        total["sent"] += sum(m.seconds(num_ranks, link) for m in messages(groups, num_packs, setting))
    return Predicted({name: seconds / num_draws for name, seconds in total.items()}, waiting / num_draws)
