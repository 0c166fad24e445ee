"""The scoring pool: reward functions in worker processes, with a hard time limit and no default rewards.

Rewards run where they declare to run (`placement`); one that gets secrets runs in its own workers. A call has all
completions of a prompt, so that a reward can compare them, unless it declares otherwise. The pool does not know of
ranks and does not stop the run: it reports failures, and the loop decides on all ranks.

    with ScorerPool(config.rewards, config.scoring) as pool:     # raises errors in the config of a reward
        pending = pool.submit(items)                             # returns at once
        scores = pending.result()
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from ...config.schema import RewardConfig, ScoringConfig
from ..placement import Placement
from ..registry import TrainerState, labels
from ..scores import Item, Scores
from .lane import Lane
from .pending import Pending

_LEAST_LOST_CALLS = 8


class ScorerPool:
    """Workers that score completions; close it, or use it as a context manager."""

    def __init__(self, rewards: Sequence[RewardConfig], scoring: ScoringConfig) -> None:
        """Start the workers and wait until they have resolved the rewards.

        Raises ValueError where a reward cannot be resolved, an environment variable it needs is not set, or a worker
        ends while it imports them.
        """
        self.names = labels(rewards)
        """A short, unique label for each reward."""
        self._rewards = list(rewards)
        self._scoring = scoring
        self._closed = False
        self._lanes: list[Lane] = []
        try:
            self._start_lanes()
        except BaseException:
            self.close()
            raise
        parameters = {number: taken for lane in self._lanes for number, taken in lane.parameters.items()}
        self.parameters = [parameters[number] for number in range(len(rewards))]
        """The keywords that each reward takes."""

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raise ValueError where a reward requires a column that the data lacks."""
        columns = list(columns)
        for reward, parameters in zip(self._rewards, self.parameters, strict=True):
            parameters.check_columns(reward.name, columns)

    def open(self, num_items: int, columns: Sequence[str], state: TrainerState | None = None) -> Pending:
        """Announce a number of completions, which `add` then passes on in parts.

        `columns` are the data's; `state` is for rewards that take `trainer_state`. Raises ValueError where a reward
        requires a column that is not among them, RuntimeError where the pool is closed.
        """
        if self._closed:
            raise RuntimeError("the scoring pool is closed")
        if num_items:
            self.check_columns(columns)
        most_lost_calls = max(_LEAST_LOST_CALLS, math.ceil(self._scoring.error_budget * num_items))
        return Pending(num_items, columns, self.names, most_lost_calls, state or TrainerState())

    def add(self, pending: Pending, items: Mapping[int, Item]) -> None:
        """Pass on a group, items by their places, and return at once; calls start when they have enough items.

        A reward may compare the items of a group, so one call has all of them.
        """
        if not items:
            return
        begun = len(pending.arrived)
        pending.add(items)
        for lane in self._lanes:
            lane.submit(pending, begun)

    def submit(
        self, items: Sequence[Item], state: TrainerState | None = None, groups: Sequence[int] | None = None
    ) -> Pending:
        """Start to score completions and return at once; columns that only some items have are None for the others.

        `groups` has a number for each item, the same for those of a group; without it all items are one group.
        """
        columns = list(dict.fromkeys(name for item in items for name in item.columns))
        pending = self.open(len(items), columns, state)
        by_group: dict[int, dict[int, Item]] = {}
        for place, (item, group) in enumerate(zip(items, groups or [0] * len(items), strict=True)):
            by_group.setdefault(group, {})[place] = item
        for members in by_group.values():
            self.add(pending, members)
        return pending

    def score(
        self, items: Sequence[Item], state: TrainerState | None = None, groups: Sequence[int] | None = None
    ) -> Scores:
        """Score completions and wait for the scores; see `submit`."""
        return self.submit(items, state, groups).result()

    def close(self) -> None:
        """Kill the workers. A caller that waits for scores gets a RuntimeError. A second call does nothing."""
        self._closed = True
        for lane in self._lanes:
            lane.close()

    def __enter__(self) -> ScorerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_lanes(self) -> None:
        """Start the shared workers, one set for each set of allowed secrets, then the workers of the other placements.

        Only a worker may import a user's module and read where its functions declare to run.
        """
        shared: dict[frozenset[str], dict[int, RewardConfig]] = {}
        for number, reward in enumerate(self._rewards):
            shared.setdefault(frozenset(reward.environment), {})[number] = reward
        others: list[tuple[int, Placement]] = []
        for group in shared.values():
            lane = self._add(group, "worker")
            others += [(number, where) for number, where in lane.placements.items() if where != "worker"]
            if not lane.parameters:
                lane.close()
                self._lanes.remove(lane)
        for number, where in others:
            self._add({number: self._rewards[number]}, where)

    def _add(self, rewards: dict[int, RewardConfig], placement: Placement) -> Lane:
        lane = Lane(rewards, self.names, placement, self._scoring)
        self._lanes.append(lane)
        return lane
