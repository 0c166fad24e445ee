"""A reward that compares the completions of a prompt: whoever hands it half a group changes it."""

from __future__ import annotations

from typing import Any


def shortest(completions: list[str], **_: Any) -> list[float]:
    """1 for the shortest completions of the call."""
    least = min(map(len, completions))
    return [float(len(completion) == least) for completion in completions]
