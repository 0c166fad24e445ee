"""The `format` reward: whether a completion has the required form.

Give one of `pattern` and `tags`. `pattern` is a regular expression that the full completion has to match (`re.DOTALL`,
white space at both ends ignored). `tags` are names of tags that the completion has to contain in this order: each is
opened and closed exactly once, none is inside another, and only white space is before, between and after them. For
example, `tags: [think, answer]` requires `<think>…</think><answer>…</answer>`. With `partial`, the reward is the share
of the 2 n marks that occur exactly once, so that a model that is never fully right still gets a signal.

A regular expression can take very long on some texts. The time limit of scoring ends it: the completion is unscored.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from .placement import runs_in
from .text import TextOrMessages, completion_text


@runs_in("worker", most_items=32)
class FormatReward:
    """Reward completions that match a pattern, or have all tags."""

    def __init__(
        self,
        pattern: str | None = None,
        tags: Sequence[str] | None = None,
        reward: float = 1.0,
        otherwise: float = 0.0,
        partial: bool = False,
    ) -> None:
        """Raises ValueError unless exactly one of `pattern` and `tags` is given, or where it cannot be used."""
        if (pattern is None) == (tags is None):
            raise ValueError(f"pattern {pattern!r} and tags {tags!r} given, expected one of them")
        if partial and tags is None:
            raise ValueError("partial: true needs tags; a pattern matches or does not")
        if tags is not None and (isinstance(tags, str) or not tags or not all(isinstance(tag, str) for tag in tags)):
            raise ValueError(f"tags: {tags!r} given, expected a list of names")
        self.reward, self.otherwise, self.partial = float(reward), float(otherwise), partial
        self.marks = [mark for tag in tags or () for mark in (f"<{tag}>", f"</{tag}>")]
        between = [r".*?" if place % 2 == 0 else r"\s*" for place in range(len(self.marks) - 1)]
        expected = pattern or "".join(
            re.escape(mark) + gap for mark, gap in zip(self.marks, [*between, ""], strict=True)
        )
        try:
            self.pattern = re.compile(expected, re.DOTALL)
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from error

    def __call__(self, completions: Sequence[TextOrMessages]) -> list[float]:
        """Score completions (texts, or conversations whose last message counts)."""
        return [self._score(completion_text(completion).strip()) for completion in completions]

    def _score(self, text: str) -> float:
        once = [text.count(mark) == 1 for mark in self.marks]
        if self.partial:
            share = sum(once) / len(once)
        else:
            share = float(all(once) and self.pattern.fullmatch(text) is not None)
        return self.otherwise + share * (self.reward - self.otherwise)
