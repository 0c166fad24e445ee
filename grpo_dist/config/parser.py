"""The parser of a run's options, and a checked Config from what it has parsed."""

from __future__ import annotations

import functools
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, get_loader, set_loader, set_parsing_settings

from .names import DRY_RUN, PRINT_CONFIG, group_type, presets
from .schema import Config
from .shipped import shipped

_READ_ONCE = "yaml_read_once"


class _Text(str):
    """A text of a config. jsonargparse reads each plain one as YAML once more where an option may be something else
    than text, and a quoted 007 would become 7, and a quoted # a comment."""

    __slots__ = ()


@functools.cache
def make_parser() -> ArgumentParser:
    """The parser of a training's command line, which raises ArgumentError. Made once a process: it takes longer than
    the parsing."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    set_loader(_READ_ONCE, _read_once, (yaml.YAMLError,))
    parser = ArgumentParser(
        prog="grpo_dist.train", allow_abbrev=False, exit_on_error=False, parser_mode=_READ_ONCE, print_config=None,
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
    parser.add_argument(PRINT_CONFIG, action="store_true", help="Print the config with all defaults, and end.")
    parser.add_class_arguments(Config, nested_key=None)
    return parser


def _read_once(text: str) -> Any:
    """What YAML reads in a file or a word. A word that is only a comment for it is a text."""
    value = get_loader("yaml")(text)
    return with_texts(text if value is None and text.lstrip().startswith(("#", "---")) else value)


def with_texts(value: Any, kind: type[str] = _Text) -> Any:
    """The value, in which texts are of a `kind`: that which the parser leaves as it is, or str."""
    if isinstance(value, str):
        return kind(value)
    if isinstance(value, dict):
        return {with_texts(name, kind): with_texts(part, kind) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(with_texts(part, kind) for part in value)
    if is_dataclass(value):
        for option in fields(value):
            setattr(value, option.name, with_texts(getattr(value, option.name), kind))
    return value


def to_config(parser: ArgumentParser, parsed: Namespace) -> Config:
    """A checked Config from parsed values. Raises ValueError."""
    _refuse_nulls(parsed, Config)
    values = parser.instantiate(parsed)
    config: Config = with_texts(Config(**{field.name: values[field.name] for field in fields(Config)}), str)
    return config


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
