"""Rows that reasoning-gym makes: `reasoning_gym:chain_sum?size=1000&max_terms=3` in place of a file.

What follows the question mark are the data set's own options. A row has the columns `prompt`, `answer` (empty where the
data set has no single answer) and `entry`, which the reward `reasoning_gym` receives.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import yaml

from ..config.checks import did_you_mean
from ..rewards.reasoning_gym import check_name, library

PREFIX = "reasoning_gym:"
_SEED = 0


def is_generated(path: str) -> bool:
    """Whether a data set is one of reasoning-gym, and no file."""
    return path.startswith(PREFIX)


class Generated:
    """The columns of each row, made when they are asked for: the same for the same path, on every rank."""

    def __init__(self, path: str) -> None:
        """Raises ValueError where the library is missing, or it has no such data set, option or value."""
        name, _, query = path.removeprefix(PREFIX).partition("?")
        try:
            check_name(name)
            self._entries = library().create_dataset(name, **{"seed": _SEED} | _options(name, query))
        # each data set checks its options by assertions and comparisons
        except Exception as error:
            raise ValueError(f"{path!r}: {error or type(error).__name__}") from error

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, place: int) -> dict[str, Any]:
        """Return a row's columns."""
        entry = self._entries[range(len(self))[place]]
        answer = "" if entry["answer"] is None else entry["answer"]
        return {"prompt": entry["question"], "answer": answer, "entry": entry}


def _options(name: str, query: str) -> dict[str, Any]:
    """The options of a data set after the question mark. Raises ValueError for one that it does not have."""
    known = [field.name for field in fields(library().factory.DATASETS[name][1])]
    options = {}
    for part in filter(None, query.split("&")):
        key, equals, value = part.partition("=")
        if key not in known or not equals:
            raise ValueError(f"{part!r} given, expected option=value with one of {', '.join(known)}"
                             f"{did_you_mean(key, known)}")  # fmt: skip
        options[key] = yaml.safe_load(value)
    return options
