"""From the numbers and answers of a run to what a report draws: each pure function beside a slow twin."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_dist.config.values import flat
from grpo_dist.report.shaping import (
    OTHER,
    UNSCORED,
    agreement,
    answer_map,
    change,
    columns,
    curves,
    is_clear_share,
    number_map,
    round_width,
    run_names,
    spread,
    totals,
    variants,
)

NUMBERS = st.floats(-1e6, 1e6)


def joined(lists: Iterable[list[Any]]) -> list[Any]:
    """One list of all."""
    return list(itertools.chain.from_iterable(lists))


@given(st.lists(NUMBERS, max_size=80))
def test_a_change_is_clear_beyond_twice_its_error(values: list[float]) -> None:
    window = max(3, len(values) // 10)
    result = change(values)
    if len(values) < 2 * window:
        assert result is None
        return
    first, last = np.array(values[:window]), np.array(values[-window:])
    error = np.sqrt(first.var(ddof=1) / window + last.var(ddof=1) / window)
    assert result is not None and result.window == window
    assert np.allclose([result.before, result.after], [first.mean(), last.mean()])
    assert result.is_clear == (abs(last.mean() - first.mean()) > 2 * error) or math.isclose(
        abs(last.mean() - first.mean()), 2 * error, rel_tol=1e-6, abs_tol=1e-6)  # fmt: skip


def test_change_tells_learning_from_noise() -> None:
    noise = np.random.default_rng(0).normal(0.5, 0.1, 100)
    assert not change(noise.tolist()).is_clear
    assert change((noise + np.linspace(0, 0.5, 100)).tolist()).is_clear


def test_only_options_besides_the_seed_make_a_variant() -> None:
    config = {"train": {"seed": 1, "steps": 5}, "rewards": [{"name": "a", "args": {}}], "betas": [0.9, 0.99]}
    options = flat(config, numbered=True)
    assert options == {"train.seed": 1, "train.steps": 5, "rewards.0.name": "a", "rewards.0.args": {},
                       "betas": [0.9, 0.99]}  # fmt: skip
    assert variants([options, options | {"train.seed": 2}, options | {"train.steps": 6}, options]) == [0, 0, 1, 0]


def test_names_tell_runs_apart() -> None:
    assert run_names(["runs/a", "runs/b/"]) == ["a", "b"]
    assert run_names(["x/a", "y/a"]) == ["x/a", "y/a"]
    assert run_names(["x/a", "x/a"]) == ["a", "a"]


@given(st.integers(0, 300), st.integers(2, 50))
def test_the_steps_that_are_read_are_spread_evenly(count: int, most: int) -> None:
    places = spread(count, most)
    assert len(places) == min(count, most) and places == sorted(set(places))
    if count:
        assert places[0] == 0 and places[-1] == count - 1
        gaps = np.diff(places)
        assert not len(gaps) or gaps.max() - gaps.min() <= 1


@given(st.lists(st.integers(0, 10**6), unique=True, max_size=150).map(sorted), st.integers(1, 40))
def test_columns_hold_all_steps_in_nearly_equal_parts(steps: list[int], most: int) -> None:
    result = columns(steps, most)
    members = [[step for step in steps if first <= step <= last] for first, last in result]
    assert joined(members) == steps
    assert len(result) == min(most, len(steps))
    assert not result or max(map(len, members)) - min(map(len, members)) <= 1


@given(st.lists(st.dictionaries(st.sampled_from("abc"), NUMBERS | st.none() | st.just(math.nan))), st.integers(1, 9))
def test_a_point_of_a_curve_is_the_mean_of_its_steps(lines: list[dict[str, float | None]], each: int) -> None:
    lines = [line | {"step": step} for step, line in enumerate(lines)]
    result = curves(lines, each)
    assert result["step"] == [min(start + each, len(lines)) - 1 for start in range(0, len(lines), each)]
    for name in "abc":
        values = [line.get(name) for line in lines]
        values = [math.nan if value is None else value for value in values]
        parts = [[v for v in values[start : start + each] if v == v] for start in range(0, len(values), each)]
        expected = [np.mean(part) if part else None for part in parts]
        if name in result:
            assert [v is None for v in result[name]] == [v is None for v in expected]
            assert np.allclose([v for v in result[name] if v is not None], [v for v in expected if v is not None])
        else:
            assert expected == [None] * len(expected)


def test_what_the_steps_of_a_run_come_to() -> None:
    lines = [
        {"step": 1, "time/step": 2.0, "time/rollout": 1.5, "tokens/completion": 100, "memory/peak_gib": 3.0, "kl": 0.1},
        {"step": 1, "eval/reward": 0.5, "eval/time": 9.0},
        {"step": 2, "time/step": 4.0, "time/update": math.nan, "tokens/completion": 50, "memory/peak_gib": 2.0},
    ]
    assert totals(lines) == {"time/step": 6.0, "time/rollout": 1.5, "tokens/completion": 150, "memory/peak_gib": 3.0,
                             "steps": 2}  # fmt: skip
    assert totals(lines[1:2]) == {"steps": 0}


ANSWERS = st.lists(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=9), min_size=1, max_size=20)


@given(ANSWERS, st.integers(1, 7), st.integers(1, 9))
def test_answer_map(answers: list[list[str]], most_rows: int, most_columns: int) -> None:
    steps = [3 * place + 1 for place in range(len(answers))]
    result = answer_map([Counter(each) for each in answers], steps, most_rows, most_columns)
    assert result.columns == columns(steps, most_columns)
    assert len(set(result.rows) - {OTHER}) == min(most_rows, len(set(joined(answers))))
    for place, (first, last) in enumerate(result.columns):
        given_then = joined(each for step, each in zip(steps, answers, strict=True) if first <= step <= last)
        for row, shares in zip(result.rows, result.shares, strict=True):
            expected = np.mean([a not in result.rows if row == OTHER else a == row for a in given_then])
            assert math.isclose(shares[place], expected, abs_tol=1e-9)


def test_the_work_for_an_answer_map_grows_as_the_answers_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all completions differ, an answer is summed a few times, and not again for each other answer."""
    counts = [Counter(f"{step} {place}" for place in range(50)) for step in range(40)]
    visited, total, add = 0, Counter.total, Counter.__add__

    def counted_total(self: Counter[str]) -> int:
        nonlocal visited
        visited += len(self)
        return total(self)

    def counted_add(self: Counter[str], other: Counter[str]) -> Counter[str]:
        nonlocal visited
        visited += len(self)
        return add(self, other)

    monkeypatch.setattr(Counter, "total", counted_total)
    monkeypatch.setattr(Counter, "__add__", counted_add)
    answer_map(counts, range(40), 12, 20)
    assert visited <= 3 * 50 * 40


def test_answers_come_in_the_order_of_their_time() -> None:
    result = answer_map([Counter(["new"] * step + ["old"] * (9 - step)) for step in range(10)], list(range(10)), 5, 10)
    assert result.rows == ["old", "new"]


@given(st.lists(st.lists(st.sampled_from([0.0, 0.25, 1.0, 7.5, math.nan]), min_size=1), min_size=1, max_size=12),
       st.integers(2, 6))  # fmt: skip
def test_number_map(values: list[list[float]], most_rows: int) -> None:
    result = number_map(values, list(range(len(values))), most_rows, 5)
    numbers = sorted({v for step in values for v in step if v == v})
    for place, (first, last) in enumerate(result.columns):
        then = joined(values[first : last + 1])
        assert math.isclose(sum(row[place] for row in result.shares), 1)
        for row, shares in zip(result.rows, result.shares, strict=True):
            if row == UNSCORED:
                expected = [v != v for v in then]
            elif len(numbers) <= most_rows or " – " not in row:
                expected = [v == float(row) for v in then]
            else:  # a range has its lower end
                low, high = map(float, row.split(" – "))
                expected = [low <= v < high for v in then]
                assert len({v for v in numbers if low <= v < high}) != 1
            assert math.isclose(shares[place], np.mean(expected), abs_tol=1e-9)


def test_numbers_that_are_near_have_rows_of_their_own() -> None:
    near = number_map([[12340.0 + n for n in range(40)], [12345.0] * 40], [1, 2], 5, 5)
    assert near.rows == ["12370 – 12380", "12360 – 12370", "12350 – 12360", "12340 – 12350"]
    assert near.shares == [[0.25, 0], [0.25, 0], [0.25, 0], [0.25, 1]]
    few = number_map([[100.001, 100.002, 12345.0, 12346.0, -0.0, 0.1 + 0.2, 0.3]], [1], 9, 5)
    assert few.rows == ["12346", "12345", "100.002", "100.001", "0.3", "0"]
    assert math.isclose(sum(row[0] for row in few.shares), 1)
    assert number_map([[1 + n * 1e-12 for n in range(30)]], [1], 5, 5).rows == ["1"]


def test_a_share_that_moved_is_told_from_noise() -> None:
    rng = np.random.default_rng(0)
    clear = [is_clear_share(*(rng.random((2, 100)) < 0.4).mean(1), 100) for _ in range(400)]
    assert np.mean(clear) < 0.08, "two samples of one share"
    assert is_clear_share(0.4, 0.6, 49) and not is_clear_share(0.4, 0.6, 47), "0.2² is 4 (0.24 + 0.24) / 48"


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 20))
def test_round_width(low: float, span: float, most: int) -> None:
    width, high = round_width(low, low + span, most), low + span
    digits = f"{width:.2e}".split("e")[0].rstrip("0").rstrip(".")
    assert digits in ("1", "2", "2.5", "5")
    assert math.floor(high / width + 1e-9) - math.floor(low / width + 1e-9) < most
    assert span / width > most / 25  # not many times wider than need be: at worst 1 + 1 ranges instead of `most`


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3)), min_size=1))
def test_agreement_is_the_share_of_the_most_frequent_answer(pairs: list[tuple[str, int]]) -> None:
    groups = [[a for a, g in pairs if g == group] for group in {g for _, g in pairs}]
    expected = np.mean([max(group.count(a) for a in group) / len(group) for group in groups])
    assert math.isclose(agreement(*zip(*pairs, strict=True)), expected)
