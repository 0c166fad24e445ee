"""A reward that compares the completions of a prompt: whoever hands it half a group changes it."""

from __future__ import annotations

from typing import Any


def shortest(completions: list[str], **_: Any) -> list[float]:
    """1 for the shortest completions of the call."""
    least = min(map(len, completions))
    return [float(len(completion) == least) for completion in completions]


def nothing_at_the_second_step(completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
    """The length in characters, and at the second step 0 for all, so that no update is made."""
    return [0.0 if trainer_state.global_step == 1 else float(len(text)) for text in completions]


def different_characters(completions: list[str], **_: Any) -> list[float]:
    """How many characters a text has, each counted once."""
    return [float(len(set(text))) for text in completions]


def share_of_digits(completions: list[str], **_: Any) -> list[float]:
    """How much of a text is digits."""
    return [sum(map(str.isdigit, text)) / len(text) for text in completions]
