"""Completions and their scores at once: a group is handed to the scorer when its last completion has ended, while the
engine goes on with the others.

A group is scored by one rank, all of it at once, so that a reward which compares the completions of a prompt gives the
same on any number of ranks. It is the rank that draws the group's first completion; what other ranks draw of the group
reaches it with the global batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ..algorithm.hashing import stream_key
from ..rewards.pool.pool import ScorerPool
from ..rewards.registry import EPISODE_COLUMNS, TrainerState
from ..rewards.scores import Failure, Item, Scores
from ..rollout import Request
from ..text.tokens import CompletionTexts
from ..types import Batch, Episode, Prompt, Trajectory


def requests_of(prompts: list[Prompt], group_size: int, drawn: slice, *stream: int | str,
                first: int = 0) -> list[Request]:  # fmt: skip
    """One rank's requests: those in `drawn` of all, in the order of (prompt, sample), `group_size` for each prompt.

    `stream` names the noise, in which prompts are counted from `first`.
    """
    tasks = [(group, sample) for group in range(len(prompts)) for sample in range(group_size)]
    return [Request(group, sample, prompts[group].ids, stream_key(*stream, first + group, sample),
                    stream_key(*stream, first + group, "prompt")) for group, sample in tasks[drawn]]  # fmt: skip


class Scoring:
    """The scores of one rank's groups, on their way."""

    def __init__(
        self, scorer: ScorerPool, prompts: list[Prompt], group_size: int, drawn: slice, texts_of: CompletionTexts,
        state: TrainerState | None = None, *, has_episodes: bool = False,
    ) -> None:  # fmt: skip
        """Announce the groups whose first completion is in `drawn`. Raises ValueError and RuntimeError as the pool."""
        self._scorer, self._prompts, self._size, self._texts_of = scorer, prompts, group_size, texts_of
        first, last = -(-drawn.start // group_size), -(-drawn.stop // group_size)
        self.rows = slice(first * group_size, last * group_size)
        """The completions that are scored here, by their places in the global batch."""
        self._missing = dict.fromkeys(range(first, last), group_size)
        self._ended: dict[int, list[Trajectory]] = {group: [] for group in self._missing}
        self._broken: dict[int, str] = {}  # places in `rows` whose environment broke, with the reason
        columns = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
        columns |= dict.fromkeys(EPISODE_COLUMNS if has_episodes else ())
        self._pending = scorer.open(self.rows.stop - self.rows.start, list(columns), state)

    def on_finish(self, trajectories: list[Trajectory]) -> None:
        """Take in what this rank has sampled; a group that is complete is handed to the scorer."""
        for trajectory in trajectories:
            if trajectory.group in self._missing:
                ended = self._ended[trajectory.group]
                ended.append(trajectory)
                if len(ended) == self._size:
                    ended.sort(key=lambda each: each.sample)
                    self._hand_over(trajectory.group, [(each.ids, each.episode) for each in ended])

    def complete(self, batch: Batch) -> None:
        """Hand over the groups that other ranks have drawn parts of; `batch` is the global one."""
        for group in list(self._missing):
            rows = range(group * self._size, (group + 1) * self._size)
            self._hand_over(
                group, [(batch.completion_ids(n), batch.episodes[n] if batch.episodes else None) for n in rows]
            )

    def result(self, check: Callable[[], None] | None = None) -> Scores:
        """Wait for the scores of `rows`, in their order; `check` is called meanwhile and may raise to give up."""
        scores = self._pending.result(check)
        for place, message in self._broken.items():
            scores.values[place], scores.failed[place] = math.nan, True
            scores.failures.append(Failure(place, "environment", "environment", message))
        return scores

    def _hand_over(self, group: int, completions: list[tuple[list[int], Episode | None]]) -> None:
        del self._missing[group]
        first = group * self._size - self.rows.start
        items = {}
        texts = self._texts_of([ids for ids, _ in completions], goes_on=self._prompts[group].messages is None)
        for n, ((ids, episode), text) in enumerate(zip(completions, texts, strict=True)):
            prompt, columns, messages = self._prompts[group], {}, None
            if episode is not None:
                prompt, messages = episode.prompt, episode.messages
                columns = {"environment_reward": episode.reward, "environments": episode.rewards}
                if episode.failure is not None:
                    self._broken[first + n] = episode.failure
            items[first + n] = Item(prompt.messages or prompt.text, text, ids, prompt.columns | columns, messages)
        self._scorer.add(self._pending, items)
