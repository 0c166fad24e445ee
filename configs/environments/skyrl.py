"""Environments of SkyRL-gym (`pip install skyrl-gym`), which answer the model's turns as a user, without tools.

Rows have SkyRL's columns: `prompt` (messages), `env_class`, and what the environment takes, such as `reward_spec`.
"""

from __future__ import annotations

from typing import Any

import skyrl_gym


class SkyRLGym:
    """The environment that a row's `env_class` names; the episode is worth the sum of its rewards."""

    env: Any = None

    def reset(self, prompt: list[dict[str, str]], env_class: str, **extras: Any) -> list[dict[str, str]] | None:
        """Begin an episode on a row."""
        if self.env is not None:
            self.env.close()
        self.env, self.rewards, self.done = skyrl_gym.make(env_class, extras=extras), [], False
        messages, _ = self.env.init(prompt)
        if messages[: len(prompt)] != prompt:
            raise ValueError(f"{env_class} changes the prompt: write what it makes of it into the data")
        return messages[len(prompt) :] or None

    def after_turn(self, text: str) -> list[dict[str, str]] | None:
        """What the environment answers to a turn."""
        outcome = self.env.step(text)
        self.rewards.append(float(outcome["reward"]))
        self.done = outcome["done"]
        return None if self.done else outcome["observations"]

    def get_reward(self) -> float:
        """What the episode is worth."""
        return sum(self.rewards)
