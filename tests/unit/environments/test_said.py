"""What tools return, as texts that are the same in every process."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from grpo_dist.environments.said import text_of


class Colour(Enum):
    """One of JSON's kinds."""

    RED = "red"


@dataclass
class Point:
    """Has a form in JSON."""

    x: int
    at: set[str]


class Told:
    """Has a text of its own."""

    def __str__(self) -> str:
        return "told"


def test_values_become_json() -> None:
    for value, text in (
        ("as it is", "as it is"), (5, "5"), (None, "null"), ([1, "b"], '[1, "b"]'), (Colour.RED, '"red"'),
        (Point(1, {"b", "a"}), '{"x": 1, "at": ["a", "b"]}'), (np.arange(2), "[0, 1]"), (Told(), '"told"'),
        ({10, 9.5, "x"}, '[9.5, 10, "x"]'), ({frozenset({2, 1}), frozenset()}, "[[1, 2], []]"),
        ({"ä": set()}, '{"ä": []}'),
    ):  # fmt: skip
        assert text_of(value) == text


def test_no_text_has_an_address() -> None:
    assert text_of(object()) == '"<object object>"'
    assert text_of([{"a": {object()}}]) == '[{"a": ["<object object>"]}]'
    assert text_of(n for n in range(3)).startswith('"<generator object ') and " at 0x" not in text_of(print.__call__)
    assert text_of("<object at 0x7f>") == "<object at 0x7f>", "a tool's own text is changed"
