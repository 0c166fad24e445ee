"""What a reward receives, and may return and log; what anything else counts as."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scoring import items, kinds

from grpo_dist.config.schema import RewardConfig, ScoringConfig
from grpo_dist.rewards.pool.pending import Pending
from grpo_dist.rewards.pool.pool import ScorerPool
from grpo_dist.rewards.registry import TrainerState
from grpo_dist.rewards.scores import Item, combine


@pytest.mark.parametrize(
    ("text", "expected"), [("none", None), ("true", 1.0), ("int", 3.0), ("zero_dim", 2.5), ("float32", 0.5)]
)
def test_values_that_are_rewards(pools: Callable[[str], ScorerPool], text: str, expected: float | None) -> None:
    scores = pools("value").score(items(text))
    assert scores.failures == [] and not scores.failed.any()
    assert math.isnan(scores.values[0, 0]) if expected is None else scores.values[0, 0] == expected


@pytest.mark.parametrize("text", ["nan", "inf", "text", "huge", "large", "complex", "list"])
def test_values_that_are_none(pools: Callable[[str], ScorerPool], text: str) -> None:
    scores = pools("value").score(items("int", text, "none"))
    assert kinds(scores) == [(1, "bad_value")]
    assert scores.failures[0].message.startswith("returned ")
    assert scores.values[0, 0] == 3


def test_one_number_per_token(pools: Callable[[str], ScorerPool]) -> None:
    long = Item(prompt="?", completion="per_token", completion_ids=[1, 2, 3])
    scores = pools("value").score([long, *items("int", "list")])
    assert scores.values[:2, 0].tolist() == [1.5, 3.0]
    assert list(scores.per_token) == [(0, 0)]
    first, second, third = scores.per_token[0, 0]
    assert (first, third) == (0.5, 1.0) and math.isnan(second)
    assert scores.failures[0].message == "returned 2 numbers for 1 tokens, expected one per token"


@pytest.mark.parametrize("text", ["array", "tuple", "generator"])
def test_results_that_are_lists(pools: Callable[[str], ScorerPool], text: str) -> None:
    assert pools("result").score(items(text)).values.tolist() == [[4.0]]


@pytest.mark.parametrize("text", ["scalar", "nothing", "text", "dict", "short", "long", "zero_dim", "two_dims"])
def test_results_that_are_not(pools: Callable[[str], ScorerPool], text: str) -> None:
    scores = pools("result").score(items(text))
    assert kinds(scores) == [(0, "bad_value")]


def test_asynchronous_functions(pools: Callable[[str], ScorerPool]) -> None:
    assert pools("later").score(items("a", "b")).values.tolist() == [[1.0], [1.0]]
    assert pools("coroutine").score(items("a", "b")).values.tolist() == [[1.0], [1.0]]
    assert kinds(pools("forgets_to_await").score(items("a"))) == [(0, "bad_value")]


def test_columns_prompts_and_arguments_arrive_as_in_trl(pools: Callable[[str], ScorerPool]) -> None:
    given = [
        Item("text", "abc", [3], {"answer": "abc", "unwanted": 1}),
        Item([{"role": "user", "content": "text"}], "abcd", [4], {"answer": "abcd", "level": "hard"}),
    ]
    assert pools("seen").score(given).values.tolist() == [[6.0], [8.0]]
    with pytest.raises(
        ValueError, match=r"'user_rewards:seen' needs the argument\(s\) answer.*columns of the data.*mean 'answers'"
    ):
        pools("seen").submit([Item("?", "a", [1], {"answers": 1})])


def test_what_rewards_log_reaches_metrics_and_table(user_directory: Path) -> None:
    with ScorerPool([RewardConfig("user_rewards:logs")], ScoringConfig(num_workers=2)) as pool:
        scores = pool.score(items("a", "bb", "cc", "d", "ee"), TrainerState(global_step=7))
    assert scores.values[:, 0].tolist() == [7.0] * 5 and scores.names == ["logs"]
    total, count = scores.metrics["logs/share_long"]
    assert count == 5 and total == pytest.approx(3), "weighted by completions, whatever the chunks"
    assert scores.extras == {"logs/first": ["a", "b", "c", "half ?", "e"]}


def test_means_of_what_calls_log_do_not_depend_on_their_order() -> None:
    means = set()
    for calls in ([0, 1, 2], [2, 1, 0]):
        pending = Pending(3, [], ["logs"], 1, TrainerState())
        pending.add(dict(enumerate(items("a", "b", "c"))))
        for place in calls:
            metrics = {"share": (place + 1) / 10}
            pending.scored(0, [place], {"values": [1.0], "bad": {}, "metrics": metrics, "extras": {}})
        means.add(pending.result().metrics["logs/share"])
    assert len(means) == 1


def test_logged_values_are_numbers_of_64_bits_or_texts(user_directory: Path) -> None:
    with ScorerPool([RewardConfig("numpy_rewards:logged")], ScoringConfig(num_workers=1)) as pool:
        scores = pool.score(items("none", "true", "int", "zero_dim", "float32", "text", "huge", "complex"))
    expected = [None, True, 3, 2.5, 0.5, "1.0", str(10**400), "1j"]
    assert scores.extras == {"logged/value": expected}
    assert [type(value) for value in scores.extras["logged/value"]] == [type(value) for value in expected]


def test_half_a_character_is_none_in_the_training_process_either(pools: Callable[[str], ScorerPool]) -> None:
    """No file takes one: the run would end after the step."""
    assert pools("logs_at_home").score(items("a")).extras == {"logs_at_home/text": ["half ?"]}


def test_bad_logs_and_single_failures(pools: Callable[[str], ScorerPool]) -> None:
    scores = pools("logs_badly").score(items("a", "b"))
    assert [failure.message for failure in scores.failures] == ["logged 1 values as 'first' for 2 completions"] * 2
    assert scores.extras == {} and scores.repeated_calls == [0]
    scores = pools("takes_a_name").score(items("a"))
    assert scores.failures[0].message.startswith("logged a metric 'mean', which the trainer logs by itself")
    scores = pools("some_fail").score(items("a", "bad", "c"))
    assert kinds(scores) == [(1, "raised")] and scores.failures[0].message == "RuntimeError: no answer"
    assert scores.values[[0, 2], 0].tolist() == [1.0, 1.0]


def test_a_completion_of_a_conversation_is_no_text(pools: Callable[[str], ScorerPool]) -> None:
    (item,) = items("a")
    assert pools("takes_text").score([item]).values.tolist() == [[1.0]]
    (failure,) = pools("takes_text").score([replace(item, prompt=[{"role": "user", "content": "?"}])]).failures
    assert failure.message == (
        "AttributeError: 'list' object has no attribute 'strip'. The prompts are conversations, so each completion is "
        "a list of messages: its text is completion[-1]['content']"
    )


def test_combine_tells_failed_from_does_not_apply() -> None:
    nan = np.nan
    values = np.array([[1.0, 2.0], [nan, 2.0], [1.0, nan], [nan, nan], [nan, 2.0]])
    failed = np.array([[False, False], [False, False], [False, True], [False, False], [True, False]])
    np.testing.assert_array_equal(combine(values, failed, [1.0, 0.5]), [2.0, 1.0, nan, nan, nan])
    np.testing.assert_array_equal(combine(values, failed, [1.0, 0.0]), [1.0, nan, 1.0, nan, nan])
    with pytest.raises(ValueError, match="1 weights given, expected"):
        combine(values, failed, [1.0])
