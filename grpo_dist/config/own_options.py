"""The parser of a command's own options. It leaves a run's options to `parse_config`, and takes no abbreviations."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn

from .names import command_line_options
from .parse import let_first_rank_answer


class OwnOptions(argparse.ArgumentParser):
    """Refuses a word that is nearer to one of its own options than to a run's; the caller gets the other words.

    An abbreviation would hide a run's option (`--lora` would be `--lora_r` where a command has it), or a misspelling.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **{**settings, "allow_abbrev": False})

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse does. Ends the program with status 2 where a word is nearly one of the parser's options."""
        options, rest = super().parse_known_args(args, namespace)
        own = [option for option in self._option_string_actions if option.startswith("--")]
        unknown = [word.partition("=")[0] for word in rest if word.startswith("--")]
        for word in unknown:
            near = nearest(word, own, [f"--{name}" for name in command_line_options()])
            if near in own:
                self.error(f"unrecognized arguments: {word}; did you mean {near}?")
        return options, rest

    def error(self, message: str) -> NoReturn:
        """Print the message once on a node, and end the program with status 2."""
        let_first_rank_answer()
        super().error(message)


def nearest(word: str, own: Sequence[str], others: Sequence[str]) -> str | None:
    """The option that a word stands for: itself, an own one that begins so, or the nearest; None where none is near."""
    begun = [option for option in own if option.startswith(word)]
    if word in others or not begun:
        return word if word in others else next(iter(difflib.get_close_matches(word, [*own, *others], 1, 0.75)), None)
    return min(begun, key=len)
