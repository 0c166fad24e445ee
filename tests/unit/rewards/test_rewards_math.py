"""The `math` reward: what counts as the last integer, and which gold answers are refused."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_dist.config.schema import RewardConfig
from grpo_dist.rewards.math import MathRewardModel, last_integer, read_answer
from grpo_dist.rewards.registry import answer_checks


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5", "5"),
        ("The answer is 5.", "5"),
        ("2 + 3 = 5", "5"),
        ("not 4 but 5!", "5"),
        ("", None),
        ("I am not sure.", None),
        ("-7", "-7"),
        ("=-7", "-7"),
        ("$-7$", "-7"),
        ("\u22127", "-7"),
        ("3 - 5 = -2", "-2"),
        ("3 - 5", "5"),
        ("12-7", "7"),
        ("(1+2)-7", "7"),
        ("x-7", "7"),
        ("- 7", "7"),
        ("+7", "7"),
        ("007", "7"),
        ("-0", "0"),
        ("000", "0"),
        ("1,234", "1234"),
        ("-1,234,567", "-1234567"),
        ("1,2,3", "3"),
        ("-1,2", "2"),
        ("-1,", "-1"),
        ("1234,567", "567"),
        ("3.14", None),
        ("5.0", None),
        ("it is 4, or 2.5", "4"),
        ("1,234.5", None),
        ("1.2.3", None),
        ("so...5", "5"),
        ("4...5", "5"),
        ("4.,5.", "5"),
        ("\\boxed{-12}", "-12"),
        ("**42**", "42"),
        ("5\x00", "5"),
        ("[/red]5\x1b[0m is 6", "6"),
        ("\u0665", None),  # ARABIC-INDIC DIGIT FIVE
        ("\u00b2", None),  # SUPERSCRIPT TWO
        ("9^{9^{9}}", "9"),
        ("100000000!", "100000000"),
    ],
)
def test_last_integer(text: str, expected: str | None) -> None:
    assert last_integer(text) == expected


@given(st.text(alphabet="0123456789,.- x)=\u2212\u0665"))
def test_last_integer_is_always_an_integer_of_the_text(text: str) -> None:
    integer = last_integer(text)
    if integer is not None:
        assert re.fullmatch(r"0|-?[1-9][0-9]*", integer)
        assert integer.lstrip("-") in text.replace(",", "")


@given(st.integers(), st.text(alphabet=st.characters(categories=("L", "Z"))))
def test_an_integer_that_ends_the_text_is_found_however_it_is_written(number: int, before: str) -> None:
    assert last_integer(f"{before} {number}") == str(number)
    assert last_integer(f"{before} {number:,}.") == str(number)


@pytest.mark.parametrize("text", ["1" * 10**6, "111," * 250_000, "1.." * 300_000, "1" + "." * 10**6, "-" * 10**6 + "1"])
def test_a_megabyte_is_read_in_no_time(text: str) -> None:
    begun = time.perf_counter()
    assert last_integer(text) is not None
    assert time.perf_counter() - begun < 3


def test_compute_reward_is_the_recipe() -> None:
    reward = MathRewardModel()
    sample = {"prompt": "What is 2 + 3? Answer with an integer.", "answer": "5"}
    assert reward.compute_reward(sample, "2 + 3 is 5.") == 1.0
    assert reward.compute_reward(sample, "2 + 3 is 6.") == 0.0
    assert reward.compute_reward(sample, "") == 0.0
    assert MathRewardModel(correct_reward=2, wrong_reward=-1).compute_reward(sample, "no") == -1.0
    huge = "9" * 10_000
    assert reward.compute_reward({"answer": "0" + huge}, huge) == 1.0


def test_it_takes_texts_and_conversations() -> None:
    completions = ["4", [{"role": "assistant", "content": "it is 5"}]]
    assert MathRewardModel()(completions=completions, answer=["5", 5]) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("5", "5"), (5, "5"), (5.0, "5"), (-3, "-3"), ("$1,200", "1200"), ("x = -2", "-2"), ("48/2=24\n#### 72", "72")],
)
def test_read_answer(answer: object, expected: str) -> None:
    assert read_answer(answer) == expected


@pytest.mark.parametrize(
    "answer", [None, True, "", "five", "2.5", 2.5, "1/2", "3 or 4", [5], float("nan"), "#### none"]
)
def test_an_unreadable_answer_is_refused(answer: object) -> None:
    (check,) = answer_checks([RewardConfig("math"), RewardConfig("not_imported:reward")])
    with pytest.raises(ValueError, match="the answer"):
        check(answer)
    with pytest.raises(ValueError, match="the answer"):
        MathRewardModel().compute_reward({"answer": answer}, "5")


def test_a_sample_without_answer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no `answer`; it has \['prompt'\]"):
        MathRewardModel().compute_reward({"prompt": "?"}, "5")
