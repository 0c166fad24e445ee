"""Results by kind of prompt."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from grpo_dist.report.categories import NO_VALUE, Category, by_category, categories, in_order


def test_values_of_a_column_are_categories() -> None:
    assert categories([{"kind": "b"}, {"kind": "a"}, {}, {"kind": math.nan}], "kind") == ["b", "a", NO_VALUE, NO_VALUE]
    nested = [{"entry": {"metadata": {"n": n}}, "a.b": -n} for n in (10, 9)]
    assert categories(nested, "entry.metadata.n") == ["10", "9"]
    assert categories(nested, "a.b") == ["-10", "-9"], "a column's own name comes first"
    assert categories([{"ok": True}, {"ok": False}], "ok") == ["True", "False"]
    assert in_order(["10", NO_VALUE, "9", "b", "-3 to 2", "a", "9"]) == ["-3 to 2", "9", "10", "a", "b", NO_VALUE]


@pytest.mark.parametrize("as_text", [False, True])
def test_many_numbers_are_put_in_ranges(as_text: bool) -> None:
    """Of about as many rows each, in which every number is between the ends; as texts too, which a CSV file has."""
    numbers = [random.Random(n).randrange(-50, 50) for n in range(200)]
    names = categories([{"n": str(n) if as_text else n} for n in numbers] + [{"n": None}], "n")
    assert names.pop() == NO_VALUE
    for number, name in zip(numbers, names, strict=True):
        begin, end = map(float, name.split(" to "))
        assert begin <= number <= end
    assert len(set(names)) == 5 and all(30 <= names.count(name) <= 50 for name in names)
    ordered = [tuple(map(float, name.split(" to "))) for name in in_order(names)]
    assert ordered == sorted(ordered) and all(a[1] < b[0] for a, b in itertools.pairwise(ordered))


def test_most_rows_of_one_number_are_one_range() -> None:
    numbers = [0] * 90 + list(range(1, 30))
    names = categories([{"n": n} for n in numbers], "n")
    assert {name for name, n in zip(names, numbers, strict=True) if n == 0} == {names[0]}
    assert set(names) == {"0 to 5", "6 to 29"}


@pytest.mark.parametrize(
    ("rows", "column", "message"),
    [
        ([{"a": 1, "b": 2}], "c", "'c' given, which no row has; expected one of a, b, or a key within one"),
        ([{"a": None}], "a", "'a' given, which no row has"),
        ([{"a": {"x": 1, "y": 2}}], "a", "'a' holds several values, expected one of them: a.x, a.y"),
        ([{"a": f"text {n}"} for n in range(21)], "a", "'a' has 21 different values, such as 'text 0'; expected at "
         "most 20, or numbers"),
        ([{"a": n} for n in range(21)] + [{"a": "nan"}], "a", "'a' has 22 different values"),
    ],
)  # fmt: skip
def test_a_column_that_has_no_categories(rows: list[dict[str, object]], column: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"--category: {message}"):
        categories(rows, column)


def test_results_are_those_of_loops() -> None:
    dice = random.Random(3)
    names = [dice.choice("abc") for _ in range(40)]
    right = [[dice.random() < {"a": 0.0, "b": 0.5, "c": 1.0}[name] for _ in range(3)] for name in names]
    rewards: list[list[float | None]] = [[None if dice.random() < 0.2 else float(ok) + 0.25 for ok in each]
                                         for each in right]  # fmt: skip
    names.append("b")
    right.append([False] * 3)
    rewards.append([None] * 3)
    results = by_category(names, rewards, right)
    assert [name for name, _ in results] == ["a", "b", "c", "all"]
    for name, got in results:
        shares, means = [], []
        for own, oks, values in zip(names, right, rewards, strict=True):
            kept = [n for n in range(3) if values[n] is not None]
            if name in (own, "all") and kept:
                shares.append(sum(oks[n] for n in kept) / len(kept))
                means.append(sum(values[n] or 0.0 for n in kept) / len(kept))
        assert got.num_prompts == sum(name in (own, "all") for own in names)
        assert got.reward == pytest.approx(sum(means) / len(means))
        assert got.right.value == pytest.approx(sum(shares) / len(shares))
        assert got.all_right == shares.count(1.0) and got.none_right == shares.count(0.0)
        assert got.some_right == len(shares) - got.all_right - got.none_right
    (_, nothing), _ = by_category(["a"], [[None]], [[False]])
    assert isinstance(nothing, Category) and nothing.num_prompts == 1
    assert math.isnan(nothing.reward) and math.isnan(nothing.right.value)
    assert (nothing.all_right, nothing.some_right, nothing.none_right) == (0, 0, 0)
