"""Whether the arguments of a call are those that a tool's JSON schema asks for. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_KINDS: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "array": (list,),
    "object": (dict,), "null": (type(None),),
}  # fmt: skip
_SHOWN_CHARACTERS = 60


def misfit(arguments: Mapping[str, Any], parameters: Mapping[str, Any]) -> str | None:
    """Why a call's arguments do not fit, for the model to read; None where they do.

    `parameters` is the part of that name of a schema that `transformers.utils.get_json_schema` makes.
    """
    known = parameters["properties"]
    if unknown := [name for name in arguments if name not in known]:
        return f"there is no argument {unknown[0]!r}; there are {', '.join(known) or 'none'}"
    if missing := [name for name in parameters.get("required", ()) if name not in arguments]:
        return f"the argument {missing[0]!r} is missing"
    return next(filter(None, (_misfit(value, known[name], name) for name, value in arguments.items())), None)


def _misfit(value: Any, schema: Mapping[str, Any], place: str) -> str | None:
    """The same for one value, which the model finds at `place`."""
    if value is None and schema.get("nullable"):
        return None
    if "anyOf" in schema:
        problems = [_misfit(value, each, place) for each in schema["anyOf"]]
        return None if None in problems else f"{place} is {_shown(value)}, which it cannot be"
    kinds = schema.get("type", ())
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is_a(value, kind) for kind in kinds):
        return f"{place} is {_shown(value)}, expected {_article(kinds)}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{place} is {_shown(value)}, expected one of {', '.join(map(_shown, schema['enum']))}"
    return next(filter(None, (_misfit(*each) for each in _within(value, schema, place))), None)


def _within(value: Any, schema: Mapping[str, Any], place: str) -> list[tuple[Any, Mapping[str, Any], str]]:
    """The values in a list or an object, with the schema and the place of each."""
    if isinstance(value, list):
        each, first = schema.get("items", {}), schema.get("prefixItems", ())
        return [(item, first[n] if n < len(first) else each, f"{place}[{n}]") for n, item in enumerate(value)]
    if isinstance(value, dict) and isinstance(each := schema.get("additionalProperties"), dict):
        return [(item, each, f"{place}.{name}") for name, item in value.items()]
    return []


def _is_a(value: Any, kind: str) -> bool:
    """Whether a value is of a kind of JSON; Python counts booleans as integers."""
    return isinstance(value, _KINDS[kind]) and (kind == "boolean" or not isinstance(value, bool))


def _article(kinds: Sequence[str]) -> str:
    return " or ".join(kind if kind == "null" else f"{'an' if kind[0] in 'aio' else 'a'} {kind}" for kind in kinds)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 1]}…"
