"""The `repetition` reward: a punishment for repeated words.

The punishment is `max_penalty` times the share of a completion's n-grams of words that occurred before in it (white
space separates words, case is ignored). It is 0 where every n-gram is new, and nearly `-max_penalty` where one is
repeated without end. A completion with fewer words than `ngram` is not punished. With `over: tokens`, the words are
token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from .placement import runs_in
from .text import TextOrMessages, completion_text


@runs_in("worker", most_items=32)
class RepetitionReward:
    """Punish repeated n-grams."""

    def __init__(self, ngram: int = 3, max_penalty: float = 1.0, over: Literal["words", "tokens"] = "words") -> None:
        """Raises ValueError for an n-gram of no words, a negative penalty, or an unknown `over`."""
        if ngram < 1 or max_penalty < 0:
            raise ValueError(f"ngram {ngram} and max_penalty {max_penalty} given, expected at least 1 and 0")
        if over not in ("words", "tokens"):
            raise ValueError(f"over: {over!r} given, expected words or tokens")
        self.ngram, self.max_penalty, self.over = ngram, float(max_penalty), over

    def __call__(self, completions: Sequence[TextOrMessages], completion_ids: Sequence[Sequence[int]]) -> list[float]:
        """Score completions; never above 0."""
        if self.over == "tokens":
            return [self._penalty(ids) for ids in completion_ids]
        return [self._penalty(completion_text(completion).lower().split()) for completion in completions]

    def _penalty(self, words: Sequence[object]) -> float:
        num_ngrams = len(words) - self.ngram + 1
        if num_ngrams < 1:
            return 0.0
        distinct = {tuple(words[place : place + self.ngram]) for place in range(num_ngrams)}
        return -self.max_penalty * (1 - len(distinct) / num_ngrams)
