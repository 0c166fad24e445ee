"""Messages in the one form for which chat templates are written, whatever form the data has them in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    **dict.fromkeys(("human", "question"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "ai", "model", "answer"), "assistant"),
}
"""Roles by the names that data sets give to them, in small letters."""


def meant_role(role: str, template: str) -> str | None:
    """The role that a name such as `human` or `User` stands for, which a chat template does not know; None for others.

    Many templates write any name, as if the model had been trained with it.
    """
    meant = _ROLES.get(role.strip().lower())
    return None if meant in (None, role) or f"'{role}'" in template or f'"{role}"' in template else meant


def as_templates_expect(message: Mapping[str, Any], is_filled: bool = False) -> dict[str, Any]:
    """A message without keys that are None, with an empty text beside calls that have none, and with the arguments of
    calls as objects.

    Tables and OpenAI's API write None for what a message does not have, and the API writes arguments as JSON. Templates
    would write `None`, and JSON in quotes. `is_filled` says that None fills up the objects of a table, where they lack
    a key that others have: it is then no argument either.
    """
    plain = {key: value for key, value in message.items() if value is not None}
    if calls := plain.get("tool_calls"):
        plain.setdefault("content", "")
        plain["tool_calls"] = [_call(_without_none(call) if is_filled else call) for call in calls]
    return plain


def _call(call: Any) -> Any:
    """A call whose arguments are an object where they were JSON of one."""
    if not isinstance(call, Mapping):
        return call
    if isinstance(function := call.get("function"), Mapping):
        return {**call, "function": _call(function)}
    try:
        arguments = json.loads(call["arguments"])
    except (KeyError, TypeError, ValueError):  # none, or none in JSON: the template writes what there is
        return call
    return {**call, "arguments": arguments} if isinstance(arguments, dict) else call


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(each) for key, each in value.items() if each is not None}
    return [_without_none(each) for each in value] if isinstance(value, list) else value
