"""How completions are divided into calls of a reward, and which calls are made again."""

from __future__ import annotations

from pathlib import Path

import pytest
from scoring import TIMEOUT_SECONDS, items, kinds

from grpo_dist.config.schema import RewardConfig, ScoringConfig
from grpo_dist.rewards.pool.pool import ScorerPool


@pytest.mark.parametrize("faulty", ["raise", "hang"])
def test_a_call_made_again_still_compares(user_directory: Path, faulty: str, caplog: pytest.LogCaptureFixture) -> None:
    quick = ScoringConfig(num_workers=2, timeout_seconds=TIMEOUT_SECONDS)
    with ScorerPool([RewardConfig("user_rewards:compares")], quick) as pool:
        scores = pool.score(items("aaa", faulty, "a", "aa"), groups=[0] * 4)
    assert [failure.item for failure in scores.failures] == [1]
    assert scores.values[[0, 2, 3], 0].tolist() == [0.0, 1.0, 0.0], "among those that can be scored, not each alone"
    assert scores.repeated_calls == [1] and scores.metrics["compares/calls"][1] == 3
    assert "compares failed when it was called with 4 completions" in caplog.text
    assert "1 of which it cannot score alone" in caplog.text


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("one_value", "bad_value", "returned 1 values for 4 completions: [1.0] (list)"),
        ("scalar_for_several", "bad_value", "returned 1.0 (float), expected a list of 4 floats or Nones"),
        ("dict_for_several", "bad_value", "(dict), expected a list of 4 floats or Nones"),
        ("without_duplicates", "bad_value", "returned 3 values for 4 completions: [1.0, 1.0, 1.0] (list)"),
        ("for_one_alone", "raised", "ValueError: too many values to unpack"),
    ],
)
def test_what_is_right_for_one_completion_alone_is_no_success(
    user_directory: Path, name: str, kind: str, message: str
) -> None:
    with ScorerPool([RewardConfig(f"user_rewards:{name}")], ScoringConfig(num_workers=2)) as pool:
        scores = pool.score(items("aaa", "a", "a", "bbbb"))
    assert kinds(scores) == [(place, kind) for place in range(4)]
    assert all(message in failure.message for failure in scores.failures), scores.failures[0].message
    assert scores.repeated_calls == [0]


def test_a_passing_failure_is_counted(user_directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    with ScorerPool([RewardConfig("user_rewards:flaky")], ScoringConfig(num_workers=1)) as pool:
        scores = pool.score(items("aaa", "a", "aa"))
    assert scores.values[:, 0].tolist() == [0.0, 1.0, 0.0] and scores.repeated_calls == [1]
    assert "ConnectionError: busy), 0 of which it cannot score alone" in caplog.text


@pytest.mark.parametrize("num_workers", [1, 3])
def test_how_completions_are_divided_into_calls(user_directory: Path, num_workers: int) -> None:
    names = ("alone", "in_threes", "compares")
    rewards = [RewardConfig(f"user_rewards:{name}") for name in names]
    texts = ["aa", "a", "b", "cc", "ccc", "dddd", "ddd", "dd", "d"]
    with ScorerPool(rewards, ScoringConfig(num_workers=num_workers)) as pool:
        scores = pool.score(items(*texts), groups=[0, 0, 1, 2, 2, 3, 3, 3, 3])
    assert scores.failures == []
    assert scores.metrics["alone/count"] == (81.0, 9), "one call with every group of the rank"
    assert scores.values[:, 2].tolist() == [0, 1, 1, 1, 0, 0, 0, 0, 1], "one group a call, whatever the workers"
    if num_workers == 1:
        sizes = scores.values[:, 1].tolist()
        assert sizes == [3, 3, 3, 2, 2, 3, 3, 3, 1], "groups are kept where they fit and divided where they do not"
