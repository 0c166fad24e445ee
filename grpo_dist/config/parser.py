"""The parser of a run's options, and a checked Config from what it has parsed."""

from __future__ import annotations

import functools
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_parsing_settings

from .names import DRY_RUN, group_type, presets
from .schema import Config
from .shipped import shipped


@functools.cache
def make_parser() -> ArgumentParser:
    """The parser of a training's command line, which raises ArgumentError. Made once a process: it takes longer than
    the parsing."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="grpo_dist.train", allow_abbrev=False, exit_on_error=False,
        usage="grpo_dist.train [--config FILE] [--preset NAME] [--GROUP.OPTION VALUE …]",
        description=f"Train a causal language model with GRPO. Pages named docs/… are in {shipped('docs')}.",
    )  # fmt: skip
    parser.add_argument("--config", action=ActionConfigFile, help="A YAML file of options.")
    parser.add_argument(
        "--preset", choices=presets(), help="Options of a published algorithm; all others override them."
    )
    parser.add_argument(
        DRY_RUN, action="store_true", help="Check everything that can be checked before a run, and end."
    )
    parser.add_class_arguments(Config, nested_key=None)
    return parser


def to_config(parser: ArgumentParser, parsed: Namespace) -> Config:
    """A checked Config from parsed values. Raises ValueError."""
    _refuse_nulls(parsed, Config)
    values = parser.instantiate(parsed)
    return Config(**{field.name: values[field.name] for field in fields(Config)})


def _refuse_nulls(values: Namespace, kind: type, prefix: str = "") -> None:
    """Raise ValueError where an option cannot be null and is, or a group is no group: jsonargparse accepts both."""
    for name, hint in get_type_hints(kind).items():
        if name not in values:  # the group was null, then one of its options was given: the others have their defaults
            continue
        value, may_be_null = values[name], type(None) in get_args(hint)
        group: Any = group_type(hint) or next(filter(is_dataclass, get_args(hint)), None)
        if (value is None and not may_be_null) or (is_dataclass(hint) and not isinstance(value, Namespace)):
            raise ValueError(f"{prefix}{name}: {value!r} given, expected a value; leave it out for the default")
        for part in value if isinstance(value, list) else [value]:
            if group is not None and isinstance(part, Namespace):
                _refuse_nulls(part, group, f"{prefix}{name}.")
