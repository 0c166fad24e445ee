"""From the command line and YAML files to a checked Config, in a moment and without importing anything heavy."""

from __future__ import annotations

import difflib
import itertools
import re
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings

from .config import Config
from .shipped import shipped

PRESETS = shipped("configs") / "algorithms"
SECRET = re.compile(r"token|key|secret|password|credential", re.IGNORECASE)


def known_keys(cls: type = Config, prefix: str = "") -> list[str]:
    """Every option's dotted name."""
    keys: list[str] = []
    hints = get_type_hints(cls)
    for field in fields(cls):
        kind = next((t for t in (hints[field.name], *get_args(hints[field.name])) if is_dataclass(t)), None)
        name = f"{prefix}{field.name}"
        keys.append(name)
        if kind is not None:
            keys += known_keys(kind, f"{name}.")
    return keys


class _Parser(ArgumentParser):
    """Answers a mistake with one message that names the nearest known option."""

    files: tuple[str, ...] = ()
    """The config files of the command line."""

    def error(self, message: str, *_: Any, **__: Any) -> NoReturn:
        known = known_keys()
        leaves = {key.rpartition(".")[2]: key for key in known}
        refused = {word for match in re.findall(r"'([\w.]+)'|--([\w.]+)", message) for word in match if word}
        hints = []
        for word in sorted(refused - set(known)):
            leaf = word.rpartition(".")[2]
            near = [leaves[leaf]] if leaf in leaves else difflib.get_close_matches(word, known, n=1, cutoff=0.8)
            near = near or [leaves[match] for match in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.75)]
            hints += [f"{word!r}: did you mean {match!r}?" for match in near]
        files = [f"(with {path})" for path in self.files]
        print("\n".join([f"error: {message.strip()}", *hints, *files]), file=sys.stderr)
        sys.exit(2)


def parse_config(arguments: list[str] | None = None) -> Config:
    """The config of `--preset NAME`, `--config FILE` and dotted overrides, of which the later have the last word.

    Ends the program with status 2 on a mistake.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(prog="grpo_dist.train", description="Train a causal language model with GRPO.")
    parser.add_argument("--config", action=ActionConfigFile, help="A YAML file of options.")
    parser.add_argument("--preset", choices=presets(), help="A published algorithm's options, before all others.")
    parser.add_class_arguments(Config, nested_key=None)
    words = sys.argv[1:] if arguments is None else arguments
    parser.files = tuple(
        word.removeprefix("--config=") if "=" in word else following
        for word, following in itertools.pairwise([*words, ""]) if word.split("=")[0] == "--config"
    )  # fmt: skip
    given = parser.parse_args(_preset_first(words))
    try:
        values = parser.instantiate(given)
        return Config(**{field.name: values[field.name] for field in fields(Config)})
    except ValueError as error:  # a check of config.py
        parser.error(str(error))


def presets() -> list[str]:
    """Names of the presets there are."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def _preset_first(arguments: list[str]) -> list[str]:
    """The arguments with a preset's file in front, as a config that every later one overrides."""
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--preset" and (equals or place + 1 < len(arguments)):
            path = PRESETS / f"{value if equals else arguments[place + 1]}.yaml"
            return ["--config", str(path), *arguments] if path.is_file() else arguments
    return arguments


def redacted(values: Any, name: str = "") -> Any:
    """A config's values with everything that looks like a secret by its name left out."""
    if isinstance(values, dict):
        return {key: redacted(value, str(key)) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [redacted(value, name) for value in values]
    return "<redacted>" if isinstance(values, str) and SECRET.search(name) else values
