"""Results by kind of prompt: one mean hides that a model never gets a kind of prompts right. Pure.

A kind is the value of a column, or a range of its numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from ..algorithm.estimates import Estimate, estimate
from ..text.plain import plain

MOST_CATEGORIES = 20
RANGES = 5
"""Into how many parts of about as many prompts each more numbers than that are put."""
NO_VALUE = "no value"
_SHOWN_CHARACTERS = 40


@dataclass(frozen=True)
class Category:
    """What a category's prompts got; a sample that could not be scored counts nowhere."""

    num_prompts: int
    reward: float
    """Mean over prompts of the mean reward; NaN where nothing was scored."""
    right: Estimate
    """Mean over prompts of the share of right samples."""
    all_right: int
    """Prompts of which every sample is right: they teach nothing any more."""
    some_right: int
    none_right: int
    """Prompts of which no sample is right."""


def categories(columns: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """The category of each row: its value in a column, which `entry.metadata.n` may also name within one.

    More than 20 different numbers are put in ranges. Raises ValueError for a column that no row has or that holds
    several values, and for more different values that are no numbers.
    """
    values = [_value(row, name) for row in columns]
    if all(value is None for value in values):
        names = ", ".join(columns[0]) if columns else "none"
        raise ValueError(f"--category: {name!r} given, which no row has; expected one of {names}, or a key within one, "
                         "as COLUMN.KEY")  # fmt: skip
    if holder := next((value for value in values if isinstance(value, Mapping)), None):
        raise ValueError(f"--category: {name!r} holds several values, expected one of them: "
                         f"{', '.join(f'{name}.{key}' for key in holder)}")  # fmt: skip
    different = {str(value): value for value in values if value is not None}
    if len(different) <= MOST_CATEGORIES:
        return [NO_VALUE if value is None else str(value) for value in values]
    numbers = [_number(value) for value in values]
    if any(number is None and value is not None for number, value in zip(numbers, values, strict=True)):
        shown = plain(next(iter(different)), _SHOWN_CHARACTERS)
        raise ValueError(f"--category: {name!r} has {len(different)} different values, such as {shown!r}; expected at "
                         f"most {MOST_CATEGORIES}, or numbers")  # fmt: skip
    return _in_ranges(numbers)


def in_order(names: Sequence[str]) -> list[str]:
    """Categories, each once: numbers and ranges by their size, then others by name."""

    def key(name: str) -> tuple[bool, float, bool, str]:
        number = _number(name.split(" to ")[0])
        return number is None, 0.0 if number is None else number, name == NO_VALUE, name

    return sorted(set(names), key=key)


def by_category(
    names: Sequence[str], rewards: Sequence[Sequence[float | None]], right: Sequence[Sequence[bool]]
) -> list[tuple[str, Category]]:
    """Each category's result, and behind them that of all prompts.

    For each of P prompts its category, and of its samples the rewards, None where unscored, and which are right.
    """
    prompts = list(zip(names, rewards, right, strict=True))
    parts = {name: [prompt for prompt in prompts if prompt[0] == name] for name in in_order(names)}
    return [(name, _result([prompt[1:] for prompt in part])) for name, part in [*parts.items(), ("all", prompts)]]


def category_table(title: str, results: Sequence[tuple[str, Category]]) -> Table:
    """The table of `by_category`."""
    table = Table(box=box.SIMPLE)
    table.add_column(Text(title), overflow="fold")
    for name in ("prompts", "reward", "right, 95 %", "all right", "some", "none"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, each in results:
        counts = (each.all_right, each.some_right, each.none_right)
        right = f"{_shown(each.right.value)} [{each.right.low:.2f}, {each.right.high:.2f}]"
        cells = [str(each.num_prompts), _shown(each.reward), right, *map(str, counts)]
        table.add_row(Text(plain(name, _SHOWN_CHARACTERS)), *cells)
    return table


def _result(prompts: Sequence[tuple[Sequence[float | None], Sequence[bool]]]) -> Category:
    means, shares = [], []
    for rewards, right in prompts:
        scored = [(reward, ok) for reward, ok in zip(rewards, right, strict=True) if reward is not None]
        if scored:
            means.append(sum(reward for reward, _ in scored) / len(scored))
            shares.append(sum(ok for _, ok in scored) / len(scored))
    count = [sum(share == 1 for share in shares), sum(0 < share < 1 for share in shares), shares.count(0)]
    return Category(len(prompts), sum(means) / len(means) if means else math.nan, estimate(shares), *count)


def _value(columns: Mapping[str, Any], name: str) -> Any:
    """A row's value in a column, or at a path of keys in it; None where it has none."""
    value: Any = columns
    for key in [name] if name in columns else name.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return None if isinstance(value, float) and math.isnan(value) else value  # tables write a missing number so


def _in_ranges(numbers: Sequence[float | None]) -> list[str]:
    """The range of each number; equal numbers are in the same one."""
    ordered = sorted(number for number in numbers if number is not None)
    begins = sorted({ordered[len(ordered) * part // RANGES] for part in range(RANGES)})
    of: dict[float, str] = {}
    for begin, end in zip(begins, [*begins[1:], math.inf], strict=True):
        inside = [number for number in ordered if begin <= number < end]
        of |= dict.fromkeys(inside, f"{inside[0]:g} to {inside[-1]:g}")
    return [NO_VALUE if number is None else of[number] for number in numbers]


def _number(value: Any) -> float | None:
    """A finite number, also one that a CSV file has as text."""
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _shown(number: float) -> str:
    return "–" if math.isnan(number) else f"{number:.3f}"
