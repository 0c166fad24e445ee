"""Completions and their scores at once: a group is handed to the scorer when its last completion has ended, while the
engine goes on with the others.

A group is scored by one rank, all of it at once, so that a reward which compares the completions of a prompt gives the
same on any number of ranks. It is the rank that draws the group's first completion; what other ranks draw of the group
reaches it with the global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..algorithm.hashing import stream_key
from ..rewards.pool.pool import ScorerPool
from ..rewards.registry import TrainerState
from ..rewards.scores import Item, Scores
from ..rollout import Request
from ..types import Batch, Prompt, Trajectory

TextsOf = Callable[[Sequence[Sequence[int]]], list[str]]
"""Completions' token ids as the texts that rewards get."""


def requests_of(prompts: list[Prompt], group_size: int, drawn: slice, *stream: int | str,
                first: int = 0) -> list[Request]:  # fmt: skip
    """One rank's requests: those in `drawn` of all, in the order of (prompt, sample), `group_size` for each prompt.

    `stream` names the noise, in which prompts are counted from `first`.
    """
    tasks = [(slot, sample) for slot in range(len(prompts)) for sample in range(group_size)]
    return [Request(slot, sample, prompts[slot].ids, stream_key(*stream, first + slot, sample))
            for slot, sample in tasks[drawn]]  # fmt: skip


class Scoring:
    """The scores of one rank's groups, on their way."""

    def __init__(
        self, scorer: ScorerPool, prompts: list[Prompt], group_size: int, drawn: slice, texts_of: TextsOf,
        state: TrainerState | None = None,
    ) -> None:  # fmt: skip
        """Announce the groups whose first completion is in `drawn`. Raises ValueError and RuntimeError as the pool."""
        self._scorer, self._prompts, self._size, self._texts_of = scorer, prompts, group_size, texts_of
        first, last = -(-drawn.start // group_size), -(-drawn.stop // group_size)
        self.rows = slice(first * group_size, last * group_size)
        """The completions that are scored here, by their places in the global batch."""
        self._missing = dict.fromkeys(range(first, last), group_size)
        self._ended: dict[int, list[Trajectory]] = {slot: [] for slot in self._missing}
        columns = list(dict.fromkeys(name for prompt in prompts for name in prompt.columns))
        self._pending = scorer.open(self.rows.stop - self.rows.start, columns, state)

    def on_finish(self, trajectories: list[Trajectory]) -> None:
        """Take in what this rank has sampled; a group that is complete is handed to the scorer."""
        for trajectory in trajectories:
            if trajectory.slot in self._missing:
                group = self._ended[trajectory.slot]
                group.append(trajectory)
                if len(group) == self._size:
                    self._hand_over(trajectory.slot, [each.ids for each in sorted(group, key=lambda each: each.sample)])

    def complete(self, batch: Batch) -> None:
        """Hand over the groups that other ranks have drawn parts of; `batch` is the global one."""
        for slot in list(self._missing):
            self._hand_over(slot, [batch.completion_ids(slot * self._size + n) for n in range(self._size)])

    def result(self, check: Callable[[], None] | None = None) -> Scores:
        """Wait for the scores of `rows`, in their order; `check` is called meanwhile and may raise to give up."""
        return self._pending.result(check)

    def _hand_over(self, slot: int, ids: list[list[int]]) -> None:
        del self._missing[slot]
        prompt, place = self._prompts[slot], slot * self._size - self.rows.start
        self._scorer.add(self._pending, {
            place + n: Item(prompt.messages or prompt.text, text, ids[n], prompt.columns)
            for n, text in enumerate(self._texts_of(ids))
        })  # fmt: skip
