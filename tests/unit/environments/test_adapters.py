"""The shipped adapter with the package that it adapts, where this is installed."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_dist.config.environment import EnvironmentConfig
from grpo_dist.environments.host import EnvironmentHost


def ask(host: EnvironmentHost) -> dict[str, Any]:
    """The next answer, of an environment that is not broken."""
    (event,) = host.poll(60.0)
    assert "failure" not in event.answer, event.answer
    return event.answer


def test_skyrl_gym() -> None:
    pytest.importorskip("skyrl_gym")
    prompt = [{"role": "user", "content": "What is 2 + 2?"}]
    row = {"prompt": prompt, "env_class": "gsm8k_multi_turn", "reward_spec": {"ground_truth": "4"}, "max_turns": 3}
    config = EnvironmentConfig(factory="configs.environments.skyrl:SkyRLGym", workers=1)
    with EnvironmentHost(config) as host:
        assert host.schemas == {"": []} and host.with_users == [""] and host.has_reward
        for answers, asked, reward in (
            (["Hm.", "#### 4"], [True, False], 1.0),
            (["a", "b", "c"], [True, True, False], 0),
        ):
            host.reset(0, row)
            assert ask(host) == {"observation": None}
            for text, goes_on in zip(answers, asked, strict=True):
                host.after_turn(0, text)
                answer = ask(host)
                assert answer["done"] == (not goes_on)
                assert not goes_on or (
                    answer["messages"][0]["role"] == "user" and "####" in answer["messages"][0]["content"]
                )
            host.reward(0)
            assert ask(host)["reward"] == reward
            host.end(0)
