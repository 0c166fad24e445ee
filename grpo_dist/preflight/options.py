"""All mistakes of a command line and its config files at once. `parse_config` stops at the first one.

Each option is first parsed alone. Options that fail are reported and left out. The others then make a config.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import yaml
from jsonargparse import ArgumentError, ArgumentParser, get_loader

from ..config.checks import collected_refusals
from ..config.parse import PRESETS, advice, group_type, make_parser, option_types, presets, to_config
from ..config.schema import Config
from ..config.values import redacted

COMMAND_LINE = "the command line"
_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null",
          list: "a list", dict: "names with values", tuple: "a list"}  # fmt: skip


@dataclass(frozen=True)
class Given:
    """One option that was given."""

    key: str
    """Its dotted name, as given."""
    value: Any
    """YAML from a file, or a word of the command line."""
    source: str
    """The file, or COMMAND_LINE."""

    @property
    def arguments(self) -> list[str]:
        """The option as words of a command line."""
        if self.source == COMMAND_LINE:
            return [f"--{self.key}={self.value}"]
        nested = self.value
        for name in reversed(self.key.split(".")):
            nested = {name: nested}
        return ["--config", yaml.safe_dump(nested)]


@dataclass
class Options:
    """The config of a command line, and its problems."""

    config: Config
    """The config, with the default of each option that is not usable."""
    given: dict[str, Given] = field(default_factory=dict)
    """The given options that are used, by name. The last one given counts."""
    problems: list[str] = field(default_factory=list)


def read_options(words: Sequence[str]) -> Options:
    """Return the config of a training's command line, the given options, and all problems."""
    parser = make_parser(ArgumentParser, exit_on_error=False)
    problems: list[str] = []
    usable = [given for given in _all_given(words, problems) if _exists(given, problems)]
    if not _parses(parser, usable):
        usable = [given for given in usable if _parses_alone(parser, given, problems)]
    config, refusals = _combined(parser, usable)
    if refusals:  # the other checks should not fail because of values that are known to be wrong
        keys = {refusal.partition(":")[0] for refusal in refusals}
        refused = {given.key: given for given in usable if keys & {given.key, given.key.rpartition(".")[0]}}
        usable = [given for given in usable if given.key not in refused]
        config, left = _combined(parser, usable)
        named = [refusal for refusal in refusals if refusal.partition(":")[0] in refused or refusal in left]
        problems += [_with_source(refusal, refused) for refusal in [*named, *(r for r in left if r not in named)]]
    return Options(config, {given.key: given for given in usable}, problems)


def _all_given(words: Sequence[str], problems: list[str]) -> Iterator[Given]:
    """Yield every option of the command line and its files; options of a preset come first."""
    pairs = list(_pairs(words, problems))
    for key, value in pairs:
        if key == "preset":
            if value in presets():
                yield from _of_file(PRESETS / f"{value}.yaml", problems)
            else:
                problems.append(f"--preset: {value!r} given, expected one of {', '.join(presets())}")
    for key, value in pairs:
        if key == "config":
            yield from _of_file(Path(value), problems)
        elif key != "preset":
            yield Given(key, value, COMMAND_LINE)


def _pairs(words: Sequence[str], problems: list[str]) -> Iterator[tuple[str, str]]:
    """Yield (key, value) of `--key value` and `--key=value`."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            problems.append(f"{word!r} given on {COMMAND_LINE}, expected options such as --train.batch_size 32")
        elif equals:
            yield key, value
        elif not rest or rest[0].startswith("--"):
            problems.append(f"--{key}: nothing given, expected a value after it")
        else:
            yield key, rest.pop(0)


def _of_file(path: Path, problems: list[str]) -> Iterator[Given]:
    try:
        loaded = get_loader("yaml")(path.read_text(encoding="utf-8"))
    except OSError as error:
        problems.append(f"--config: {path} cannot be read ({error.strerror}); name an existing YAML file")
        return
    except (yaml.YAMLError, ValueError) as error:
        problems.append(f"--config: {path} is not YAML: {' '.join(str(error).split())}")
        return
    if not isinstance(loaded, dict):
        problems.append(f"--config: {path} contains {type(loaded).__name__}, expected options such as `train: {{…}}`")
        return
    yield from _leaves(loaded, "", str(path))


def _leaves(values: dict[str, Any], prefix: str, source: str) -> Iterator[Given]:
    types = option_types()
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key in types and group_type(types[key]) is not None:
            yield from _leaves(value, f"{key}.", source)
        else:
            yield Given(key, value, source)


def _exists(given: Given, problems: list[str]) -> bool:
    if given.key.removesuffix("+") in option_types():
        return True
    problems.append(f"{_told(given)}, but no such option exists; {advice(given.key) or '--help lists them'}")
    return False


def _parses(parser: ArgumentParser, given: Sequence[Given]) -> bool:
    """Whether each value has its option's type: one parse where all have, which is most of the time."""
    try:
        with collected_refusals():
            parser.parse_args([word for each in given for word in each.arguments])
    except (ArgumentError, ValueError):
        return False
    return True


def _parses_alone(parser: ArgumentParser, given: Given, problems: list[str]) -> bool:
    try:
        with collected_refusals():
            parser.parse_args(given.arguments)
    except (ArgumentError, ValueError) as error:
        hint = option_types()[given.key.removesuffix("+")]
        detail = str(error).strip().splitlines()[-1].strip()
        problems.append(
            f"{_told(given)}, expected {_expected(hint)}" + (f" ({detail})" if get_origin(hint) is list else "")
        )
        return False
    return True


def _told(given: Given) -> str:
    (value,) = redacted({given.key: given.value}).values()
    return f"{given.key}: {value!r} given" + (f" in {given.source}" if given.source != COMMAND_LINE else "")


def _expected(hint: Any) -> str:
    """Return a type in words."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if (group := group_type(hint)) is not None:
        return f"a group of options ({', '.join(option_types(group))})"
    kind = get_origin(hint) or hint
    if kind in _NAMES:
        return _NAMES[kind]
    return " or ".join(map(_expected, get_args(hint)))


def _combined(parser: ArgumentParser, usable: Sequence[Given]) -> tuple[Config, list[str]]:
    """Return the config of options that are usable alone, and the problems of their combination."""
    with collected_refusals() as refusals:
        try:
            parsed = parser.parse_args([word for given in usable for word in given.arguments])
            config = to_config(parser, parsed)
        except (ArgumentError, ValueError, TypeError) as error:
            refusals.append(str(error))
            config = Config()
    return config, list(dict.fromkeys(refusals))


def _with_source(refusal: str, given: dict[str, Given]) -> str:
    source = given.get(refusal.partition(":")[0])
    return f"{refusal} (in {source.source})" if source and source.source != COMMAND_LINE else refusal
