"""How a config names rewards: built-in ones, functions and classes of a user, and mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo_dist.config.schema import RewardConfig, ScoringConfig
from grpo_dist.rewards.pool.pool import ScorerPool
from grpo_dist.rewards.registry import labels, resolve
from grpo_dist.rewards.scores import Item


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RewardConfig("mth"), "'mth' is not a built-in reward; did you mean 'math'"),
        (RewardConfig("math", args={"corect_reward": 1}), "unexpected keyword argument 'corect_reward'"),
        (RewardConfig("math", args={"correct_reward": "much"}), "could not convert string to float"),
        (RewardConfig("no_such_module:f"), "'no_such_module' failed with ModuleNotFoundError"),
        (RewardConfig("user_rewards.py:act"), "write user_rewards:act"),
        (RewardConfig("trl.rewards.own"), "module:function, such as trl.rewards:own"),
        (RewardConfig("some/reward-model"), "{name: reward_model, args: {model: some/reward-model}}"),
        (RewardConfig("user_rewards:"), "expected module:function"),
        (RewardConfig("user_rewards:lenght"), "did you mean 'length'"),
        (RewardConfig("user_rewards:not_callable"), "of type int, which cannot be called"),
        (RewardConfig("user_rewards:no_completions"), r"the signature \(prompts\); expected one"),
        (RewardConfig("user_rewards:positional"), r"the signature \(completions, /\); expected one"),
        (RewardConfig("user_rewards:seen", args={"factr": 2}), "did you mean 'factor'"),
        (RewardConfig("user_rewards:seen", args={"completions": 2}), "which every call fills in"),
        (RewardConfig("user_rewards:Counter"), "missing 1 required positional argument: 'start'"),
        (RewardConfig("broken_rewards:f"), r"No module named 'no_such_package' \(.*broken_rewards.py, line 2\)"),
        (RewardConfig("exiting_rewards:f"), "SystemExit: usage"),
    ],
)
def test_a_mistake_in_a_reward_is_said_at_once(user_directory: Path, config: RewardConfig, message: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(user_directory))
        with pytest.raises(ValueError, match=message):
            resolve(config)


def test_a_file_with_nearly_the_name_of_a_module_is_named(
    user_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(user_directory)
    with pytest.raises(ValueError, match=r"and from the Python path; near it: user_rewards\.py"):
        resolve(RewardConfig("user_reward:seen"))


def test_the_pool_says_so_too(user_directory: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'length'"):
        ScorerPool([RewardConfig("user_rewards:lenght")], ScoringConfig())
    with pytest.raises(ValueError, match=r"exited with code 5 while it imported the rewards \['dying_rewards:f'\]"):
        ScorerPool([RewardConfig("dying_rewards:f")], ScoringConfig(num_workers=1))


def test_classes_and_arguments(user_directory: Path) -> None:
    rewards = [
        RewardConfig("user_rewards:Counter", args={"start": 10}),
        RewardConfig("math", args={"correct_reward": 5, "wrong_reward": -1}),
    ]
    with ScorerPool(rewards, ScoringConfig(num_workers=1)) as pool:
        given = [Item("?", "it is 7", [1, 2], {"answer": "7"}), Item("?", "8", [1], {"answer": 7})]
        assert pool.score(given).values.tolist() == [[12.0, 5.0], [11.0, -1.0]]
        pool.check_columns(["answer"])
        with pytest.raises(ValueError, match="'math' needs the argument"):
            pool.check_columns([])


def test_labels_are_short_and_unique() -> None:
    names = ["math", "a.b:f", "c:f", "c:Class.method", "math"]
    assert labels([RewardConfig(name) for name in names]) == ["math", "f", "f_2", "method", "math_2"]
