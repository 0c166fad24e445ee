"""Pure functions that turn the records of a run into the data of its report."""

from __future__ import annotations

import itertools
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

TIMES = 6
"""Number of parts of a run in which frequent answers are determined."""
OTHER, UNSCORED = "all others", "unscored"
SEEDS_DIFFER_IN = ("train.seed", "train.output_dir")


@dataclass(frozen=True)
class HeatMap:
    """Shares of completions by row and by column. A column is a range of steps."""

    rows: list[str]
    columns: list[tuple[int, int]]
    """First and last step of each column."""
    shares: list[list[float]]
    """By row and column; the sum of a column is 1."""


@dataclass(frozen=True)
class Change:
    """The change of a metric from the first steps of a run to its last."""

    before: float
    """Mean of the first `window` values."""
    after: float
    """Mean of the last `window` values."""
    window: int
    is_clear: bool
    """Whether the difference is more than twice its standard error."""


def change(values: Sequence[float]) -> Change | None:
    """Compare the first tenth of the values (at least three) with the last. None for fewer than six values."""
    window = max(3, len(values) // 10)
    if len(values) < 2 * window:
        return None
    parts = values[:window], values[-window:]
    means = [math.fsum(part) / window for part in parts]
    variances = [math.fsum((value - mean) ** 2 for value in part) / (window - 1)
                 for part, mean in zip(parts, means, strict=True)]  # fmt: skip
    error = math.sqrt(sum(variances) / window)
    return Change(means[0], means[1], window, abs(means[1] - means[0]) > 2 * error)


def is_clear_share(before: float, after: float, num_prompts: float) -> bool:
    """Whether two shares of as many prompts differ by more than twice the standard error that they would have if they
    were of different prompts. Of the same prompts, with the same noise, chance makes less."""
    error = math.sqrt((before * (1 - before) + after * (1 - after)) / num_prompts)
    return abs(after - before) > 2 * error


def variants(configs: Sequence[dict[str, Any]]) -> list[int]:
    """Return a number for each flat config. Configs that differ only in the seed have the same number."""
    seen: list[dict[str, Any]] = []
    numbers = []
    for config in configs:
        same = {key: value for key, value in config.items() if key not in SEEDS_DIFFER_IN}
        if same not in seen:
            seen.append(same)
        numbers.append(seen.index(same))
    return numbers


def run_names(directories: Sequence[str]) -> list[str]:
    """Return the last part of each directory, with as many parents as needed to make the names different."""
    parts = [os.path.abspath(directory).strip(os.sep).split(os.sep) for directory in directories]
    depth = 1
    while len({tuple(part[-depth:]) for part in parts}) < len({tuple(part) for part in parts}):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def spread(count: int, most: int) -> list[int]:
    """Return at most `most` of the places 0 … count − 1, evenly spaced, with both ends."""
    if count <= most:
        return list(range(count))
    return sorted({round(place * (count - 1) / (most - 1)) for place in range(most)})


def curves(lines: Sequence[dict[str, Any]], steps_a_point: int) -> dict[str, list[float | None]]:
    """Return the metrics by name, also `step`, averaged over as many steps: the same ones in every run.

    A value is None where a metric was not measured. The step of an averaged point is its last one.
    """
    parts = [list(part) for _, part in itertools.groupby(lines, lambda line: line["step"] // steps_a_point)]
    names = dict.fromkeys(name for line in lines for name, value in line.items() if is_number(value))
    metrics = {name: [_mean([line[name] for line in part if is_number(line.get(name))]) for part in parts]
             for name in names}  # fmt: skip
    return metrics | {"step": [part[-1]["step"] for part in parts]}


def totals(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return what the steps of a run come to: the sum of each metric of time and of `tokens/completion`, the largest
    `memory/peak_gib`, and the number of training `steps`, each where it was measured."""
    values: dict[str, list[float]] = {}
    for line in lines:
        for name, value in line.items():
            if is_number(value):
                values.setdefault(name, []).append(value)
    summed = {name: math.fsum(each) for name, each in values.items()
              if name.startswith("time/") or name == "tokens/completion"}  # fmt: skip
    largest = {name: max(values[name]) for name in ("memory/peak_gib",) if name in values}
    return summed | largest | {"steps": len(values.get("time/step", []))}


def is_number(value: Any) -> bool:
    """Whether a value read from JSON is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def columns(steps: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Divide steps into at most `most` ranges of nearly equal length."""
    count = min(len(steps), most)
    ends = [len(steps) * place // count for place in range(count + 1)] if count else []
    return [(steps[start], steps[end - 1]) for start, end in itertools.pairwise(ends)]


def answer_map(counts: Sequence[Counter[str]], steps: Sequence[int], most_rows: int, most_columns: int) -> HeatMap:
    """The heat map of the answers that were most frequent at some time, in order of their time, and of all others.

    `counts` has one counter of answers for each step.
    """
    across = columns(steps, most_columns)
    merged = _merge(counts, steps, across)
    peaks: dict[str, float] = {}
    for part in _merge(counts, steps, columns(steps, TIMES)):
        total = part.total()
        for answer, count in part.items():
            peaks[answer] = max(peaks.get(answer, 0.0), count / total)
    frequent = sorted(peaks, key=lambda answer: (-peaks[answer], answer))[:most_rows]
    shares = _shares(merged, frequent)

    def time(row: int) -> float:
        return sum(column * share for column, share in enumerate(shares[row])) / sum(shares[row])

    order = sorted(range(len(frequent)), key=time)
    rows, parts = [frequent[row] for row in order], [shares[row] for row in order]
    rest = [1 - sum(row[column] for row in parts) for column in range(len(across))]
    if any(share > 1e-9 for share in rest):
        rows, parts = [*rows, OTHER], [*parts, [max(share, 0.0) for share in rest]]
    return HeatMap(rows, across, parts)


def number_map(values: Sequence[Sequence[float]], steps: Sequence[int], most_rows: int, most_columns: int) -> HeatMap:
    """The heat map of a number: by value if there are few values, else by ranges between round numbers; the
    only value in a range is named instead.

    `values` has the numbers of each step; NaN is `unscored`. Rows are in descending order. Numbers that are equal but
    for rounding, in the sixth digit, are one value.
    """
    rounded = [[float(f"{value:.6g}") + 0.0 for value in step] for step in values]  # and no -0.0
    present = sorted({value for step in rounded for value in step if not math.isnan(value)}, reverse=True)
    if len(present) <= most_rows:
        names = {value: _text_of(value, 4) for value in present}
        if len({*names.values()}) < len(present):
            names = {value: _text_of(value, 6) for value in present}
        rows = [names[value] for value in present]
    else:
        width = round_width(present[-1], present[0], most_rows)
        numbers = {value: _range_of(value, width) for value in present}
        ranges = {n: f"{_text_of(n * width, 10)} – {_text_of((n + 1) * width, 10)}"
                  for n in range(_range_of(present[0], width), _range_of(present[-1], width) - 1, -1)}  # fmt: skip
        # a greatest reward of 1 is not in "1 – 1.1" to a reader
        alone = Counter(numbers.values())
        ranges |= {n: _text_of(value, 6) for value, n in numbers.items() if alone[n] == 1}
        rows, names = list(ranges.values()), {value: ranges[number] for value, number in numbers.items()}
    counts = [Counter(UNSCORED if math.isnan(value) else names[value] for value in step) for step in rounded]
    if any(UNSCORED in count for count in counts):
        rows.append(UNSCORED)
    across = columns(steps, most_columns)
    return HeatMap(rows, across, _shares(_merge(counts, steps, across), rows))


def round_width(low: float, high: float, most: int) -> float:
    """Return the least of 1, 2, 2.5 and 5 times a power of ten that divides low … high into at most `most` ranges."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    widths = (factor * scale for scale in (power, 10 * power, 100 * power) for factor in (1, 2, 2.5, 5))
    return next(width for width in widths if _range_of(high, width) - _range_of(low, width) < most)


def _range_of(value: float, width: float) -> int:
    """The range of a value. A value that equals the lower end of a range except for rounding is in that range."""
    return math.floor(value / width + 1e-9)


def _text_of(value: float, digits: int) -> str:
    """A number with so many digits, and all those before its point up to a billion."""
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e+" in text and abs(value) < 1e9 else text


def _merge(
    counts: Sequence[Counter[str]], steps: Sequence[int], across: Sequence[tuple[int, int]]
) -> list[Counter[str]]:
    merged = [Counter[str]() for _ in across]
    for (first, last), whole in zip(across, merged, strict=True):
        for count, step in zip(counts, steps, strict=True):
            if first <= step <= last:
                whole.update(count)  # not a sum of counters, which copies what is there already
    return merged


def _shares(counts: Sequence[Counter[str]], rows: Sequence[str]) -> list[list[float]]:
    totals = [max(count.total(), 1) for count in counts]
    return [[count[row] / total for count, total in zip(counts, totals, strict=True)] for row in rows]


def agreement(answers: Sequence[str], groups: Sequence[int]) -> float:
    """Return the share of the most frequent answer of a group, averaged over the groups."""
    by_group: dict[int, Counter[str]] = {}
    for answer, group in zip(answers, groups, strict=True):
        by_group.setdefault(group, Counter())[answer] += 1
    return math.fsum(max(count.values()) / count.total() for count in by_group.values()) / len(by_group)
