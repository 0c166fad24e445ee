"""`python -m grpo_dist schema`: print the options of a run as a JSON schema, which editors use to check configs.

    python -m grpo_dist schema > config.schema.json

The first line of a config then names the schema:

    # yaml-language-server: $schema=config.schema.json

The shipped configs have such a line. Their schema is configs/schema.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from docstring_parser import parse_from_object

from ..config.checks import require
from ..config.schema import Config
from ..config.values import default_of, descriptions

TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", NoneType: "null"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add nothing: there is one schema."""


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Print the schema. Raises ValueError."""
    require(not rest, "arguments", list(rest), "none")
    print(render(), end="")
    return 0


def render() -> str:
    """The schema as text. It depends on the options alone."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A config of grpo_dist"}
    return json.dumps(schema | schema_of(Config), indent=1, ensure_ascii=False) + "\n"


def schema_of(hint: Any) -> dict[str, Any]:
    """The JSON schema of the type of an option. Raises TypeError for a type that no option has."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return {}
    if hint in TYPES:
        return {"type": TYPES[hint]}
    if is_dataclass(hint):
        return _group(hint)
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, UnionType):
        return {"anyOf": [schema_of(each) for each in arguments]}
    if origin is list:
        return {"type": "array", "items": schema_of(arguments[0])}
    if origin is tuple:
        return {"type": "array", "prefixItems": [schema_of(each) for each in arguments], "items": False}
    if origin is dict:
        return {"type": "object", "additionalProperties": schema_of(arguments[1])}
    raise TypeError(f"{hint} has no JSON schema here")


def _group(kind: Any) -> dict[str, Any]:
    described, hints = descriptions(kind), get_type_hints(kind)
    properties = {}
    for field in fields(kind):
        properties[field.name] = schema_of(hints[field.name])
        if described.get(field.name):
            properties[field.name]["description"] = described[field.name]
        if (default := default_of(field)) is not MISSING:
            properties[field.name]["default"] = _as_json(default)
    required = [name for name, each in properties.items() if "default" not in each]
    about = parse_from_object(kind).short_description or ""
    schema = {"type": "object", "description": about, "additionalProperties": False, "properties": properties}
    return schema | ({"required": required} if required else {})


def _as_json(value: Any) -> Any:
    """A default as JSON. Groups of options and rewards are dataclasses."""
    return json.loads(json.dumps(value, default=asdict))
