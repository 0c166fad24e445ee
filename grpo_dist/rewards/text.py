"""The text of a completion, for the built-in rewards."""

from __future__ import annotations


def completion_text(completion: str | list[dict[str, str]]) -> str:
    """Return a completion's text; of a conversation, the content of its last message."""
    return completion if isinstance(completion, str) else completion[-1]["content"]
