"""Rewards that read the completion's text: what counts, case by case."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_dist.config.schema import RewardConfig, ScoringConfig
from grpo_dist.rewards.extraction import BoxedReward, Gsm8kReward, after_hashes, clean, last_boxed
from grpo_dist.rewards.format import FormatReward
from grpo_dist.rewards.length import LengthReward, OverlongReward
from grpo_dist.rewards.pool.pool import ScorerPool
from grpo_dist.rewards.registry import BUILT_IN, answer_checks, resolve
from grpo_dist.rewards.repetition import RepetitionReward
from grpo_dist.rewards.scores import Item


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{7}", "7"),
        (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"\fbox{a \{ b}", r"a \{ b"),
        (r"\boxed {3}", "3"),
        (r"\boxed{}", None),
        ("7", None),
    ],
)
def test_last_boxed(text: str, expected: str | None) -> None:
    assert last_boxed(text) == expected


@pytest.mark.parametrize("text", [r"\boxed{" * 10**5, r"\boxed{{}" * 10**5, r"\boxed" + " " * 10**6])
def test_a_megabyte_is_read_in_no_time(text: str) -> None:
    begun = time.perf_counter()
    assert last_boxed(text) is None
    assert time.perf_counter() - begun < 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a #### 7\nmore", "7"), ("#### 1\n#### 2", "2"), ("####", None), ("7", None), ("####\n 7", "7")],
)
def test_after_hashes(text: str, expected: str | None) -> None:
    assert after_hashes(text) == expected


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1,234", "1234"), (" $ 7 $. ", "7"), (r"\dfrac12", r"\frac12"), (r"\left( 1, 2 \right)", "(1,2)"),
        (r"\text{no}", "no"), ("+3", "3"), ("3.00", "3"), (r"10\,000", "10000"), ("\u22127", "-7"),
    ],
)  # fmt: skip
def test_one_answer_has_many_spellings(one: str, other: str) -> None:
    assert clean(one) == clean(other)


def test_other_answers_stay_others() -> None:
    assert len({clean(text) for text in ("1,2", "12", "1/2", "0.5", "-1", "1.05", "(1,234)", "(1234,)")}) == 8


@given(st.lists(st.sampled_from([r"\boxed{", r"\fbox {", "####", "\n", *r"\{}1,. $#"]), max_size=20))
def test_extraction_never_fails(parts: list[str]) -> None:
    """And finds nothing that does not follow its marker."""
    text = "".join(parts)
    for marker, found in (("box", last_boxed(text)), ("####", after_hashes(text))):
        assert found is None or found in text.partition(marker)[2]
        clean(found or "")


def test_answers_and_places() -> None:
    logged: list[tuple[str, float]] = []
    reward = Gsm8kReward(missing_reward=-1)
    completions = ["so #### 1,000", "#### 7", "1000", [{"role": "assistant", "content": "#### 1000"}]]
    assert reward(completions, ["... #### 1000"] * 4, lambda *pair: logged.append(pair)) == [1.0, 0.0, -1.0, 1.0]
    assert logged == [("found", 0.75)]
    assert BoxedReward()([r"\boxed{0.5}", r"\boxed{5.0}", r"\boxed{6}", "6"], [0.5, 5, 5, 6]) == [1.0, 1.0, 0.0, 0.0]
    for name in ("gsm8k", "boxed", "math_verify"):
        (check,) = answer_checks([RewardConfig(name)])
        check("7")
        for answer in ("", None, True, ["7"]):
            with pytest.raises(ValueError, match=r"^the answer (is .*, expected a text or a number|'' is empty)$"):
                check(answer)


@pytest.mark.parametrize(
    ("text", "full", "partial"),
    [
        ("<think>a</think>\n<answer>b</answer> ", 1.0, 1.0),
        ("<think></think><answer></answer>", 1.0, 1.0),
        ("<think>a</think> and <answer>b</answer>", 0.0, 1.0),
        ("x <think>a</think><answer>b</answer>", 0.0, 1.0),
        ("<think>a<answer>b</answer></think>", 0.0, 1.0),
        ("<think>a</think><answer>b", 0.0, 0.75),
        ("<think>a</think><think>a</think><answer>b</answer>", 0.0, 0.5),
        ("", 0.0, 0.0),
    ],
)
def test_tags_are_asked_for_once_and_in_order(text: str, full: float, partial: float) -> None:
    assert FormatReward(tags=["think", "answer"])([text]) == [full]
    assert FormatReward(tags=["think", "answer"], partial=True)([text]) == [partial]


def test_a_pattern_has_to_fit_the_whole_text() -> None:
    reward = FormatReward(r"Answer: \d+", reward=2, otherwise=-1)
    assert reward(["Answer: 7\n", "The Answer: 7", "Answer: x"]) == [2, -1, -1]
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({}, "pattern None and tags None given, expected one of them"),
        ({"pattern": "a", "tags": ["b"]}, r"pattern 'a' and tags \['b'\] given, expected one of them"),
        ({"pattern": "("}, r"pattern '\(' is no regular expression: missing \)"),
        ({"tags": "think"}, "tags: 'think' given, expected a list of names"),
        ({"pattern": "a", "partial": True}, "partial: true needs tags"),
    ]
    for arguments, message in mistakes:
        with pytest.raises(ValueError, match=message):
            FormatReward(**arguments)


def test_lengths_and_repetition() -> None:
    lengths = [[0] * n for n in (0, 8, 10, 14, 30)]
    assert LengthReward(target=10, tolerance=4)(lengths) == [0.0, 0.5, 1.0, 0.0, 0.0]
    assert LengthReward(target=0, tolerance=1)(lengths) == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert OverlongReward(max_length=20, buffer=10)([[0] * n for n in (5, 10, 15, 20, 25)]) == [0, 0, -0.5, -1, -1]
    assert OverlongReward(max_length=4, buffer=1)([[0] * n for n in (3, 4)]) == [0, -1]
    assert OverlongReward(max_length=4, buffer=4)([[0]]) == [-0.25]
    repeat = RepetitionReward(ngram=2)
    assert repeat(["a b c", "a", "A b a B a b"], [[]] * 3) == [0.0, 0.0, pytest.approx(-3 / 5)]
    assert RepetitionReward(1, 2.0, "tokens")([""], [[7, 7, 7, 7]]) == [-1.5]
    assert RepetitionReward()(["a b a b a b", "a b c"], [[]] * 2) == [-0.5, 0.0], "two of four groups of three are new"
    assert RepetitionReward(1, 0)(["a a"], [[]]) == [0.0]
    for target, tolerance in ((1, 0), (-1, 1)):
        with pytest.raises(ValueError, match=f"target {target} and tolerance {tolerance} given, expected at least 0 a"):
            LengthReward(target, tolerance)
    for max_length, buffer in ((5, 6), (5, 0)):
        with pytest.raises(ValueError, match=f"buffer {buffer} and max_length 5 given, expected 0 < buffer <= max_le"):
            OverlongReward(max_length, buffer)
    for ngram, max_penalty in ((0, 1.0), (1, -0.5)):
        with pytest.raises(ValueError, match=f"ngram {ngram} and max_penalty {max_penalty} given, expected at least 1"):
            RepetitionReward(ngram, max_penalty)
    with pytest.raises(ValueError, match="over: 'letters' given, expected words or tokens"):
        RepetitionReward(over="letters")  # type: ignore[arg-type]


def test_every_built_in_reward_says_what_counts() -> None:
    for path in BUILT_IN.values():
        module = __import__(path.partition(":")[0], fromlist=["_"])
        assert len(module.__doc__ or "") > 150, path


def test_math_verify_tells_five_outcomes_apart() -> None:
    pytest.importorskip("math_verify")
    cases = [
        (r"so \boxed{\dfrac{1}{2}}", r"\frac{1}{2}", 1.0, "right"),
        ("it is $0.5$", r"\frac{1}{2}", 1.0, "right"),
        (r"\boxed{7}", "8", 0.0, "wrong"),
        ("no idea", "4", 0.0, "unparsable_answer"),
        ("4", r"\frac{1}{", None, "unparsable_gold"),
        (r"\boxed{9^{9^{9}}}", "3", None, "scorer_failure"),
        (r"\boxed{100000000!}", "3", None, "scorer_failure"),
        ("(" * 3000 + ")" * 3000, "3", 0.0, "unparsable_answer"),
        ("1" * 1_000_000, "3", 0.0, "wrong"),
        ("\x00\x1b[31m\u0664 [/red]", "4", 0.0, "unparsable_answer"),
    ]
    reward = RewardConfig("math_verify", args={"seconds": 3}, timeout_seconds=24)
    with ScorerPool([reward], ScoringConfig(num_workers=1, memory_limit_gib=2)) as pool:
        scores = pool.score([Item("?", text, [], {"answer": gold}) for text, gold, *_ in cases])
    values = [None if failed else value for value, failed in zip(scores.values[:, 0], scores.failed[:, 0], strict=True)]
    messages = {failure.item: failure.message for failure in scores.failures}
    for place, (text, _, expected, outcome) in enumerate(cases):
        if expected is None:
            assert values[place] is None and outcome in messages[place], (text[:40], messages)
        else:
            assert values[place] in (expected, None), (text[:40], values[place])
    assert sum(value is None for value in values) <= 5, "long texts may run out of time, but are never guessed"
    assert scores.metrics["math_verify/right"][0] == 2


def test_a_missing_library_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "math_verify", None)
    with pytest.raises(ValueError, match=r"pip install 'grpo_dist\[math\]'"):
        resolve(RewardConfig("math_verify"))
