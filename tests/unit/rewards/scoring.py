"""Completions to score, and why some are not."""

from __future__ import annotations

import numpy as np

from grpo_dist.rewards.scores import Item, Scores

TIMEOUT_SECONDS = 0.5
"""Of the pool of the reward `act`, which may hang."""


def items(*texts: str) -> list[Item]:
    """Completions of these texts."""
    return [Item(prompt="?", completion=text, completion_ids=[len(text)]) for text in texts]


def kinds(scores: Scores) -> list[tuple[int, str]]:
    """Which completions are unscored, and the kind of each one's failure."""
    assert scores.failed.sum() == len(scores.failures)
    assert np.isnan(scores.values[scores.failed]).all()
    return [(failure.item, failure.kind) for failure in scores.failures]
