"""The scoring pool: reward functions in worker processes, with a hard time limit and nothing defaulted.

Rewards run where they declare to run (`placement`); one that is given secrets runs apart from the others. A call has
all completions of a prompt, so that a reward can compare them, unless it declares otherwise. The pool knows nothing of
ranks and stops nothing: it says what failed, and the loop decides together with the other ranks.

    with ScorerPool(config.rewards, config.scoring) as pool:     # a mistake in a reward is raised here
        pending = pool.submit(items)                             # returns at once
        scores = pending.result()
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from grpo_dist.config.schema import RewardConfig, ScoringConfig
from grpo_dist.rewards.placement import Placement
from grpo_dist.rewards.pool.lane import Lane
from grpo_dist.rewards.pool.pending import Pending
from grpo_dist.rewards.registry import TrainerState, labels
from grpo_dist.rewards.scores import Item, Scores

_LEAST_LOST_CALLS = 8


class ScorerPool:
    """Workers that score completions; close it, or use it as a context manager."""

    def __init__(self, rewards: Sequence[RewardConfig], scoring: ScoringConfig) -> None:
        """Start the workers and wait until they have resolved the rewards.

        Raises ValueError where a reward cannot be resolved or an environment variable it needs is not set, RuntimeError
        where a worker cannot be started.
        """
        self.names = labels(rewards)
        """A short, unique label per reward."""
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
        """The keywords each reward takes."""

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raise ValueError where a reward requires a column that the data lacks."""
        columns = list(columns)
        for reward, parameters in zip(self._rewards, self.parameters, strict=True):
            parameters.check_columns(reward.name, columns)

    def open(self, num_items: int, columns: Sequence[str], state: TrainerState | None = None) -> Pending:
        """Announce completions that are yet to come; `add` hands them over, in parts.

        `columns` are the data's; `state` is for rewards that ask for `trainer_state`. Raises ValueError where a reward
        requires a column that is not among them, RuntimeError where the pool is closed.
        """
        if self._closed:
            raise RuntimeError("the scoring pool is closed")
        if num_items:
            self.check_columns(columns)
        most_lost_calls = max(_LEAST_LOST_CALLS, math.ceil(self._scoring.error_budget * num_items))
        return Pending(num_items, columns, self.names, most_lost_calls, state or TrainerState())

    def add(self, pending: Pending, items: Mapping[int, Item]) -> None:
        """Hand over a group, items by their places, and return at once; a call is made where there are enough for it.

        A group is what a reward may compare: it is called with all of it at once, whatever else there is to score.
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
        """Begin to score completions and return at once; columns that only some items have are None for the others.

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
        """Score completions and wait for it; see `submit`."""
        return self.submit(items, state, groups).result()

    def close(self) -> None:
        """Kill the workers; whoever waits for scores gets a RuntimeError. Closing twice is harmless."""
        self._closed = True
        for lane in self._lanes:
            lane.close()

    def __enter__(self) -> ScorerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_lanes(self) -> None:
        """Start the shared workers, one set for each set of allowed secrets, and then what they say runs elsewhere.

        Only a worker may import a user's module and look where its functions declare to run.
        """
        shared: dict[frozenset[str], dict[int, RewardConfig]] = {}
        for number, reward in enumerate(self._rewards):
            shared.setdefault(frozenset(reward.environment), {})[number] = reward
        elsewhere: list[tuple[int, Placement]] = []
        for group in shared.values():
            lane = self._add(group, "worker")
            elsewhere += [(number, where) for number, where in lane.placements.items() if where != "worker"]
            if not lane.parameters:
                lane.close()
                self._lanes.remove(lane)
        for number, where in elsewhere:
            self._add({number: self._rewards[number]}, where)

    def _add(self, rewards: dict[int, RewardConfig], placement: Placement) -> Lane:
        lane = Lane(rewards, self.names, placement, self._scoring)
        self._lanes.append(lane)
        return lane
