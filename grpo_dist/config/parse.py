"""From the command line and YAML files to a checked Config, without heavy imports."""

from __future__ import annotations

import os
import sys
import time
from argparse import ArgumentError
from dataclasses import asdict, fields, is_dataclass
from typing import Any

from ..text.output import printing_results
from ..text.plain import plain_lines, write_lines
from .files import as_yaml
from .mistakes import mistakes_of_files, mistakes_of_values, read_options, with_files_first
from .names import DRY_RUN, PRINT_CONFIG, advice
from .parser import make_parser, to_config, with_texts
from .schema import Config

_FIRST_RANK_SECONDS = 10.0
_without_mistakes: dict[tuple[str, ...], Config] = {}
"""What `refuse_mistaken_options` has read, until the program asks for it: reading takes half a second."""


def parse_config(arguments: list[str] | None = None) -> Config:
    """The config of `--preset NAME`, `--config FILE` and dotted options; dotted options override files, and these the
    preset, wherever they stand, and of a kind the later ones the earlier ones.

    Ends the program with status 2 on mistakes, of which it prints a line each, and with 0 where only the config is to
    be printed.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if (config := _without_mistakes.pop(tuple(words), None)) is not None:
        return config
    if not (problems := mistakes_of_files(words)):
        try:
            parser = make_parser()
            config = to_config(parser, parser.parse_args(with_files_first(words)))
        except (ArgumentError, ValueError) as error:
            problems = [str(error)]
        else:
            if PRINT_CONFIG not in words:
                return config
            with printing_results():
                sys.stdout.write(as_yaml(asdict(config)))
            sys.exit(0)
    problems = read_options(words).problems or problems
    let_first_rank_answer()
    write_lines(plain_lines("\n".join(f"error: {problem}" for problem in problems)), sys.stderr)
    sys.exit(2)


def refuse_mistaken_options(words: list[str]) -> Config | None:
    """End the program with status 2 on a mistake in a run's options, else return the config. A dry run, for which this
    is None, reports all of them by itself."""
    if DRY_RUN in words:
        return None
    config = _without_mistakes[tuple(words)] = parse_config(words)
    return config


def is_first_rank(variable: str = "RANK") -> bool:
    """Whether this process is the first of the run, or of its node (`LOCAL_RANK`), as its launcher says."""
    return os.environ.get(variable, "0") == "0"


def let_first_rank_answer(variable: str = "LOCAL_RANK", seconds: float = _FIRST_RANK_SECONDS) -> None:
    """Wait on every other rank of a node, or of the run (`RANK`): the first one ends with the same message, and the
    launcher then ends the others, as it would end the first one where another ends earlier.

    A rank that is still there after the wait has a mistake of its own, or no launcher that ends it.
    """
    if not is_first_rank(variable):
        time.sleep(seconds)


def checked(config: Config) -> Config:
    """A config that was made or changed in Python, checked as a file is.

    Raises ValueError for an option that does not exist, has the wrong type or is out of range.
    """
    _refuse_unknown(config)
    parser = make_parser()
    try:
        return to_config(parser, parser.parse_object(with_texts(asdict(config))))
    except ArgumentError as error:
        raise ValueError("\n".join(mistakes_of_values(asdict(config))) or str(error)) from error


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
