"""From the command line and YAML files to a checked Config, without heavy imports."""

from __future__ import annotations

import difflib
import functools
import itertools
import os
import re
import sys
import time
from argparse import ArgumentError
from dataclasses import asdict, fields, is_dataclass
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_parsing_settings

from ..text.files import near_paths
from ..text.plain import write_lines
from .files import mistake_of_file
from .schema import Config
from .shipped import shipped

PRESETS = shipped("configs") / "algorithms"
DRY_RUN = "--dry_run"
"""Checks a run in place of the run. It is not an option of a run, and not in a config file."""
LEFT_OUT = {
    "lora.use_dora": "DoRA is not supported, because a step of decoding would normalise all weights again; expected "
    "LoRA, or rsLoRA with lora.use_rslora",
    "lora.modules_to_save": "no layer is trained beside adapters; name linear layers in lora.target_modules (the head "
    "may be one), or train all weights with `lora: null`",
    "lora.bias": "biases stay as they are in the base; `lora: null` trains them with all weights",
    "rollout.logit_bias": "a bias would draw from another policy than the one that is trained; rollout.banned_tokens "
    "names tokens that are never drawn",
}  # fmt: skip
"""Options that people look for, with what to do in their place."""
_FIRST_RANK_SECONDS = 10.0
_ROW = re.compile(r"^\| (`\w+`(?:, `\w+`)*) \| (.*) \|$", re.MULTILINE)
_OF_GROUP = re.compile(r"^ +- ([\w.]+: .* given, expected .*)$", re.MULTILINE)
"""A refusal of a group that may be null, in jsonargparse's message."""


@functools.cache
def option_types(cls: type = Config, prefix: str = "") -> dict[str, Any]:
    """Every option's dotted name, groups included, with its type."""
    types: dict[str, Any] = {}
    for name, hint in get_type_hints(cls).items():
        types[f"{prefix}{name}"] = hint
        if (group := group_type(hint)) is not None:
            types |= option_types(group, f"{prefix}{name}.")
    return types


def group_type(hint: Any) -> type | None:
    """The dataclass of a type that is a group of options, or null; None for other types."""
    kinds = [] if get_origin(hint) is list else [hint, *get_args(hint)]
    return next((kind for kind in kinds if isinstance(kind, type) and is_dataclass(kind)), None)


def command_line_options() -> list[str]:
    """Names of everything that the command line of a run takes, without their dashes."""
    return [*option_types(), "config", "preset", DRY_RUN.removeprefix("--")]


def nearest_option(word: str, is_option: bool = False) -> str | None:
    """The option nearest to an unknown one; None where nothing is near.

    A word that `is_option`, by its dashes or its group, may also be the beginning of an option.
    """
    known = command_line_options()
    leaves = {key.rpartition(".")[2]: key for key in known}
    leaf = word.rpartition(".")[2]
    if leaf in leaves:
        return leaves[leaf]
    begun = [key for key in known if (is_option or "." in word) and key.startswith(word)]
    near = [min(begun, key=len)] if begun else difflib.get_close_matches(word, known, n=1, cutoff=0.8)
    near = near or [leaves[match] for match in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.75)]
    return near[0] if near else None


def advice(word: str, is_option: bool = False) -> str | None:
    """What to do in place of an unknown option; None where nothing is near."""
    answer = next((f"{key} is no option: {reason}" for key, reason in LEFT_OUT.items()
                   if f"{word}.".startswith((f"{key}.", f"{key.rpartition('.')[2]}."))), None)  # fmt: skip
    near, leaf = nearest_option(word, is_option), word.rpartition(".")[2]
    if answer is None and (near or "").rpartition(".")[2] != leaf and (here := other_names().get(leaf)):
        answer = f"a name of another library; here: {here} (docs/from_trl.md)"
    return answer or (f"did you mean {near!r}?" if near else None)


@functools.cache
def other_names() -> dict[str, str]:
    """What stands here for TRL's fields and for other libraries' names, from the tables of docs/from_trl.md."""
    page = shipped("docs") / "from_trl.md"
    rows = _ROW.findall(page.read_text(encoding="utf-8")) if page.is_file() else []
    plain = [(names, re.sub(r"\[(.*?)\]\(.*?\)|`", r"\1", here)) for names, here in rows]
    return {name: here for names, here in plain for name in re.findall(r"\w+", names)}


class _Parser(ArgumentParser):
    """Reports a mistake in one message that names the nearest known option."""

    files: tuple[str, ...] = ()
    """The config files of the command line."""

    def error(self, message: str, *_: Any, **__: Any) -> NoReturn:
        refused = {quoted or dashed: bool(dashed) for quoted, dashed in re.findall(r"'([\w.]+)'|--([\w.]+)", message)}
        hints = [f"{word!r}: {hint}" for word, is_option in sorted(refused.items())
                 if word not in command_line_options() and (hint := advice(word, is_option))]  # fmt: skip
        if of_group := _OF_GROUP.findall(message):  # among all that an option's type could have been
            message = "; ".join(of_group)
        if message.startswith("unrecognized"):
            configs = [word for word in message.split() if word.endswith((".yaml", ".yml")) and os.path.isfile(word)]
            hints += [f"{word!r}: did you mean --config {word}?" for word in configs]
        files = [f"(with {path})" for path in self.files]
        let_first_rank_answer()
        write_lines("\n".join([f"error: {message.strip()}", *hints, *files]), sys.stderr)
        sys.exit(2)


def let_first_rank_answer(variable: str = "LOCAL_RANK", seconds: float = _FIRST_RANK_SECONDS) -> None:
    """Wait on every other rank of a node, or of the run (`RANK`): the first one ends with the same message, and the
    launcher then ends the others, as it would end the first one where another ends earlier.

    A rank that is still there after the wait has a mistake of its own, or no launcher that ends it.
    """
    if os.environ.get(variable, "0") != "0":
        time.sleep(seconds)


@functools.cache
def make_parser(kind: type[ArgumentParser] = _Parser, **settings: Any) -> ArgumentParser:
    """The parser of a training's command line; `settings` are jsonargparse's. Made once a process: it takes longer than
    the parsing."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = kind(prog="grpo_dist.train", allow_abbrev=False,
                  usage="grpo_dist.train [--config FILE] [--preset NAME] [--GROUP.OPTION VALUE …]",
                  description=f"Train a causal language model with GRPO. Pages named docs/… are in {shipped('docs')}.",
                  **settings)  # fmt: skip
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


def parse_config(arguments: list[str] | None = None) -> Config:
    """The config of `--preset NAME`, `--config FILE` and dotted options; later ones override earlier ones.

    Ends the program with status 2 on a mistake.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if (config := _without_mistakes.pop(tuple(words), None)) is not None:
        return config
    parser = make_parser()
    assert isinstance(parser, _Parser)
    parser.files = tuple(
        word.removeprefix("--config=") if "=" in word else following
        for word, following in itertools.pairwise([*words, ""]) if word.split("=")[0] == "--config"
    )  # fmt: skip
    if (missing := next((file for file in parser.files if not os.path.exists(file)), None)) is not None:
        parser.files = ()
        parser.error(f"--config: no file {missing!r} in {os.getcwd()}{near_paths(missing)}")
    if mistakes := [mistake for file in parser.files if (mistake := mistake_of_file(file))]:
        parser.files = ()
        parser.error("; ".join(mistakes))
    given = parser.parse_args(_preset_first(words))
    try:
        return to_config(parser, given)
    except ValueError as error:  # a check of schema.py
        parser.error(str(error))


def checked(config: Config) -> Config:
    """A config that was made or changed in Python, checked as a file is.

    Raises ValueError for an option that does not exist, has the wrong type or is out of range.
    """
    _refuse_unknown(config)
    parser = make_parser(ArgumentParser, exit_on_error=False)
    try:
        return to_config(parser, parser.parse_object(asdict(config)))
    except ArgumentError as error:
        raise ValueError(str(error)) from error


def _refuse_unknown(group: Any, prefix: str = "") -> None:
    """Raise ValueError for an attribute that is no option: a dataclass accepts any."""
    options = {field.name for field in fields(group)}
    for name, value in vars(group).items():
        if name not in options:
            hint = advice(f"{prefix}{name}")
            raise ValueError(f"{prefix}{name}: {value!r} given, but no such option exists{f'; {hint}' if hint else ''}")
        for part in value if isinstance(value, list) else [value]:
            if is_dataclass(part):
                _refuse_unknown(part, f"{prefix}{name}.")


_without_mistakes: dict[tuple[str, ...], Config] = {}
"""What `refuse_mistakes` has read, until the program asks for it: reading takes half a second."""


def refuse_mistakes(arguments: list[str] | None = None) -> Config | None:
    """End the program with status 2 on a mistake in a run's options, else return the config. A dry run, for which this
    is None, reports all of them by itself."""
    words = sys.argv[1:] if arguments is None else arguments
    if DRY_RUN in words:
        return None
    config = _without_mistakes[tuple(words)] = parse_config(words)
    return config


def presets() -> list[str]:
    """Names of the presets."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def _preset_first(arguments: list[str]) -> list[str]:
    """The arguments with the preset's file as the first config, which every later one overrides."""
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--preset" and (equals or place + 1 < len(arguments)):
            path = PRESETS / f"{value if equals else arguments[place + 1]}.yaml"
            return ["--config", str(path), *arguments] if path.is_file() else arguments
    return arguments
