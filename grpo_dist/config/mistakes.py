"""All mistakes of a command line and its config files at once, in words.

Each option is first parsed alone. Options that fail are reported and left out. The others then make a config.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import yaml
from jsonargparse import ArgumentError, ArgumentParser, get_loader

from .checks import collected_refusals, did_you_mean
from .files import as_yaml, mistakes_of_file
from .names import DRY_RUN, PRESETS, PRINT_CONFIG, advice, group_type, option_types, presets
from .parser import make_parser, to_config
from .schema import Config
from .values import redacted

COMMAND_LINE = "the command line"
_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null",
          Any: "a value"}  # fmt: skip


@dataclass(frozen=True)
class Given:
    """One option that was given."""

    key: str
    """Its dotted name, as given."""
    value: Any
    """YAML from a file, or a word of the command line."""
    source: str
    """The file, or COMMAND_LINE."""

    def __str__(self) -> str:
        value = redacted(self.value, self.key.rpartition(".")[2])
        return f"{self.key}: {value!r} given" + (f" in {self.source}" if self.source != COMMAND_LINE else "")

    @property
    def arguments(self) -> list[str]:
        """The option as words of a command line."""
        if self.source == COMMAND_LINE:
            return [f"--{self.key}={self.value}"]
        nested = self.value
        for name in reversed(self.key.split(".")):
            nested = {name: nested}
        return ["--config", as_yaml(nested)]


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
    parser = make_parser()
    problems: list[str] = []
    usable = [given for given in _all_given(words, problems) if _exists(given, problems)]
    wrong = list(_unparsed(parser, usable))
    problems += [problem for given in wrong for problem in _problems_of(parser, given)]
    usable = [given for given in usable if not any(given is each for each in wrong)]
    config, refusals = _combined(parser, usable)
    if refusals:  # the other checks should not fail because of values that are known to be wrong
        blamed = {refusal: _blamed(refusal, usable) for refusal in refusals}
        refused = [given for several in blamed.values() for given in several]
        usable = [given for given in usable if given not in refused]
        config, left = _combined(parser, usable)
        named = [refusal for refusal in refusals if blamed[refusal] or refusal in left]
        problems += [_with_source(refusal, blamed.get(refusal, []))
                     for refusal in [*named, *(r for r in left if r not in named)]]  # fmt: skip
    return Options(config, {given.key: given for given in usable}, problems)


def mistakes_of_files(words: Sequence[str]) -> list[str]:
    """What to correct in the config files of a command line before anybody takes options from them."""
    return [mistake for key, path in _pairs(words, []) if key == "config" for mistake in mistakes_of_file(path)]


def mistakes_of_values(values: dict[str, Any]) -> list[str]:
    """What to correct in the options of a config that was made in Python, where a value has the wrong type."""
    parser = make_parser()
    with suppress(yaml.YAMLError):  # of a value that no file can hold the parser says more
        wrong = list(_unparsed(parser, list(_leaves(values, "", "Python"))))
        return [problem for given in wrong for problem in _problems_of(parser, given)]
    return []


def with_files_first(words: Sequence[str]) -> list[str]:
    """The words with the files of presets and configs before all options, which override them wherever they stand."""
    rest, left = [], list(words)
    while left:
        word = left.pop(0)
        if word == "--config" and left and not left[0].startswith("--"):
            left.pop(0)
        elif not word.startswith("--config="):
            rest.append(word)
    return [*(word for file in _files(words) for word in ("--config", file)), *rest]


def _files(words: Sequence[str]) -> list[str]:
    """The files of options in their order: presets, then configs."""
    pairs = list(_pairs(words, []))
    return [*(str(PRESETS / f"{name}.yaml") for key, name in pairs if key == "preset" and name in presets()),
            *(path for key, path in pairs if key == "config")]  # fmt: skip


def _all_given(words: Sequence[str], problems: list[str]) -> Iterator[Given]:
    """Yield every option of the command line and its files, in the order in which later ones override earlier ones."""
    pairs = list(_pairs(words, problems))
    problems += [f"--preset: {value!r} given, expected one of {', '.join(presets())}" for key, value in pairs
                 if key == "preset" and value not in presets()]  # fmt: skip
    for path in _files(words):
        yield from _of_file(path, problems)
    yield from (Given(key, value, COMMAND_LINE) for key, value in pairs if key not in ("preset", "config"))


def _pairs(words: Sequence[str], problems: list[str]) -> Iterator[tuple[str, str]]:
    """Yield (key, value) of `--key value` and `--key=value`."""
    rest = [word for word in words if word not in (DRY_RUN, PRINT_CONFIG)]
    while rest:
        word = rest.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            is_file = word.endswith((".yaml", ".yml"))
            problems.append(f"{word!r} given on {COMMAND_LINE}, expected options such as --train.batch_size 32"
                            + (f"; did you mean --config {word}?" if is_file else ""))  # fmt: skip
        elif equals:
            yield key, value
        elif not rest or rest[0].startswith("--"):
            hint = "" if key in option_types() else f"; {hint}" if (hint := advice(key, is_option=True)) else ""
            problems.append(f"--{key}: nothing given, expected a value after it{hint}")
        else:
            yield key, rest.pop(0)


def _of_file(path: str, problems: list[str]) -> Iterator[Given]:
    if mistakes := mistakes_of_file(path):
        problems += mistakes
        return
    try:
        loaded = get_loader("yaml")(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        problems.append(f"--config: {path} cannot be read ({error.strerror}); name an existing YAML file")
        return
    except (yaml.YAMLError, ValueError) as error:
        problems.append(f"--config: {path} is not YAML: {' '.join(str(error).split())}")
        return
    if loaded is None:  # an empty file, or one of comments
        problems.append(f"--config: {path} has no option, expected some such as `train: {{…}}`")
        return
    if not isinstance(loaded, dict):
        problems.append(f"--config: {path} contains {loaded!r:.80}, expected options such as `train: {{…}}`")
        return
    yield from _leaves(loaded, "", path)


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
    hint = advice(given.key, is_option=True) or "--help lists them"
    problems.append(f"{given}, but no such option exists; {hint}")
    return False


def _parses(parser: ArgumentParser, given: Sequence[Given]) -> bool:
    try:
        with collected_refusals():
            parser.parse_args([word for each in given for word in each.arguments])
    except (ArgumentError, ValueError):
        return False
    return True


def _unparsed(parser: ArgumentParser, given: Sequence[Given]) -> Iterator[Given]:
    """Yield those whose values do not have their option's type, by halves: most have, and a parse takes a while."""
    if _parses(parser, given):
        return
    if len(given) == 1:
        yield given[0]
    for half in (given[: len(given) // 2], given[len(given) // 2 :]) if len(given) > 1 else ():
        yield from _unparsed(parser, half)


def _problems_of(parser: ArgumentParser, given: Given) -> list[str]:
    hint = option_types()[given.key.removesuffix("+")]
    problem = f"{given}, expected {_expected(hint)}{_as_list(_value_of(given), hint)}"
    return list(_problems_of_parts(parser, given, hint)) or [problem]


def _value_of(given: Given) -> Any:
    """The value of an option, from YAML on the command line too."""
    if given.source == COMMAND_LINE:
        with suppress(yaml.YAMLError, ValueError):
            return get_loader("yaml")(given.value)
    return given.value


def _as_list(value: Any, hint: Any) -> str:
    """The end of a message about names where a list is expected: the list that they may stand for."""
    if get_origin(hint) is not list:
        return ""
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) for name in names):
        return ""
    if is_dataclass(get_args(hint)[0]):
        names = [f"{{name: {name}}}" for name in names]
    return f"; did you mean [{', '.join(names)}]?" if names != ["none"] else "; did you mean []?"


def _problems_of_parts(parser: ArgumentParser, given: Given, hint: Any) -> Iterator[str]:
    """What is wrong with the options of groups in a list, where it is one."""
    value, kind = _value_of(given), next(iter(get_args(hint)), None)
    if not isinstance(value, list) or not (isinstance(kind, type) and is_dataclass(kind)):
        return
    types = option_types(kind)
    for name, part in ((name, part) for group in value if isinstance(group, dict) for name, part in group.items()):
        option = replace(given, key=f"{given.key}.{name}", value=part)
        if name not in types:
            yield f"{option}, but no such option exists{did_you_mean(str(name), types)}"
        elif not _parses(parser, [Given(given.key, [{name: part}], source="alone")]):
            yield f"{option}, expected {_expected(types[name])}"


def _expected(hint: Any) -> str:
    """Return a type in words."""
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind is Literal:
        return "one of " * (len(parts) > 1) + ", ".join(map(str, parts))
    if kind is list:
        return f"a list in which each is {_expected(parts[0])}"
    if kind is tuple:
        return f"a list of {len(parts)}, each {_expected(parts[0])}"
    if kind is dict:
        return f"{_expected(parts[1])} for each {'name' if parts[0] is str else 'whole number'}"
    if (group := group_type(hint)) is not None:
        return f"a group of options ({', '.join(option_types(group))})" + " or null" * (NoneType in parts)
    return _NAMES[kind] if kind in _NAMES else " or ".join(map(_expected, parts))


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


def _blamed(refusal: str, given: Sequence[Given]) -> list[Given]:
    """Those that a refusal names: the option, or the options of the group."""
    key = refusal.partition(":")[0]
    return [each for each in given if key in (each.key, each.key.rpartition(".")[0])]


def _with_source(refusal: str, blamed: Sequence[Given]) -> str:
    sources = list(dict.fromkeys(given.source for given in blamed if given.source != COMMAND_LINE))
    return f"{refusal} (in {', '.join(sources)})" if sources else refusal
