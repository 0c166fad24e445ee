"""The text of a completion, for the built-in rewards."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

TextOrMessages = str | list[dict[str, str]]
"""A prompt or a completion, as rewards get it."""
LogMetric = Callable[[str, float], None]
"""Records a number of a call by its name; the run logs the mean."""
CONVERSATION = "environment/conversation"
"""The column of `Batch.extras` with the messages of each episode, as JSON."""


def completion_text(completion: TextOrMessages) -> str:
    """Return a completion's text; of a conversation, what the assistant said last."""
    if isinstance(completion, str):
        return completion
    return next((message["content"] for message in reversed(completion) if message["role"] == "assistant"), "")


def answering_texts(completions: Sequence[str], conversations: Sequence[str] | None) -> list[str]:
    """Return the texts that completions' answers are read from: of episodes, whose `conversations` are messages as
    JSON, what the assistant said last."""
    if conversations is None:
        return list(completions)
    return [completion_text(json.loads(each)) for each in conversations]
