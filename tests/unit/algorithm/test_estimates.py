"""Estimates against slow, obvious twins, and the summary's treatment of what could not be scored."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_dist.algorithm.estimates import compare, estimate, majority_at_k, pass_at_k
from grpo_dist.report.evaluation import compare_rows, summarise


@given(st.integers(1, 9), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(num_samples: int, data: st.DataObject) -> None:
    num_right = data.draw(st.integers(0, num_samples))
    k = data.draw(st.integers(1, num_samples))
    subsets = list(combinations([n < num_right for n in range(num_samples)], k))
    assert pass_at_k(num_samples, num_right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_refuses_what_cannot_be() -> None:
    for arguments in ((3, 4, 1), (3, 1, 4), (3, 1, 0)):
        with pytest.raises(ValueError, match=r"given, expected 1 <= k <= num_samples"):
            pass_at_k(*arguments)


@pytest.mark.parametrize(
    ("answers", "right", "k", "expected"),
    [
        (["1", "2", "2"], [True, False, False], 3, 0.0),
        (["1", "2", "1"], [True, False, True], 3, 1.0),
        (["2", "1", None, None], [False, True, False, False], 4, 0.0),
        ([None, None], [False, False], 2, 0.0),
        (["1", "1", "2", "3", "9"], [True, True, False, False, True], 2, 0.5),
    ],
)
def test_majorities(answers: list[str | None], right: list[bool], k: int, expected: float) -> None:
    assert majority_at_k(answers, right, k) == expected


def test_intervals_cover_and_repeat() -> None:
    result = estimate([0.0, 1.0] * 200)
    assert result == estimate([0.0, 1.0] * 200) and result.value == 0.5
    assert result.low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.01) and result.high == pytest.approx(0.549, abs=0.01)
    assert math.isnan(estimate([]).value)


def test_a_comparison_tells_better_from_worse() -> None:
    worse, better = [0.0, 0.25, 0.5, 0.5, 0.25, 0.0, 0.25, 0.75], [0.5, 0.75, 1.0, 0.75, 0.75, 0.5, 0.5, 1.0]
    result = compare(worse, better)
    assert result.difference.value == pytest.approx(0.40625) and result.difference.low > 0
    assert result.p_value == pytest.approx(2 / 2**8, abs=0.003), "all eight signs are equal"
    assert compare(worse, worse).p_value == 1 and compare(better, worse).p_value == result.p_value
    for first, second in ([], []), (worse, better[1:]):
        with pytest.raises(ValueError, match=f"{len(first)} and {len(second)} prompts given, expected the same"):
            compare(first, second)


def test_unscored_samples_count_in_nothing_else() -> None:
    row = {
        "prompt_index": 0, "prompt": "?", "category": None, "rewards": [1.0, None, 0.0, 0.0], "tokens": [1, 2, 3, 4],
        "right": [True, False, False, False], "finished": [True, True, True, False], "answers": ["1", "2", "2", "2"],
    }  # fmt: skip
    lost = row | {"prompt_index": 1, "rewards": [None] * 4, "right": [False] * 4}
    result = {name: each.value for name, each in summarise([row, lost], 4).items()}
    assert [result[name] for name in ("mean@4", "mean reward", "pass@1")] == pytest.approx([1 / 3] * 3)
    assert result["unscored"] == 0.625 and result["truncated"] == 0.25 and math.isnan(result["pass@4"])
    assert result["maj@2"] == 1.0
    with pytest.raises(ValueError, match="0 and 0 prompts"):
        compare_rows([row], [row])


def test_a_majority_is_right_as_its_own_block_says() -> None:
    answers = ["a", "b", "b", "b", "c", "c"]
    assert majority_at_k(answers, [False, True, False, False, True, True], 3) == 1.0
    assert majority_at_k(answers, [True, False, True, True, False, False], 3) == 0.0
