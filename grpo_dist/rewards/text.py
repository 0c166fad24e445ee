"""The text of a completion, for the built-in rewards."""

from __future__ import annotations


def completion_text(completion: str | list[dict[str, str]]) -> str:
    """Return a completion's text; of a conversation, what the assistant said last."""
    if isinstance(completion, str):
        return completion
    return next((message["content"] for message in reversed(completion) if message["role"] == "assistant"), "")
