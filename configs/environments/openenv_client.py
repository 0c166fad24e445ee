"""Environments of OpenEnv (`pip install openenv-core`), which run in servers: a class with a method for each action.

class Echo(OpenEnvClient):
    url = "http://localhost:8000"

    def echo(self, message: str) -> str:
        '''
        Send a message.

        Args:
            message: What to send.
        '''
        return self._step(message=message)
"""

from __future__ import annotations

import json
from typing import Any

from openenv.core import GenericEnvClient


class OpenEnvClient:
    """A session on the server at `url`; the episode is worth the sum of its rewards."""

    url: str
    _client: Any = None

    def reset(self, seed: int) -> str:
        """Begin an episode."""
        if self._client is None:
            self._client = GenericEnvClient(base_url=self.url).sync()
        self.rewards: list[float] = []
        return self._observed(self._client.reset(seed=seed))

    def get_reward(self) -> float:
        """What the episode is worth."""
        return sum(self.rewards)

    def _step(self, **action: Any) -> str:
        return self._observed(self._client.step(action))

    def _observed(self, outcome: Any) -> str:
        self.done = bool(outcome.done)
        if outcome.reward is not None:
            self.rewards.append(float(outcome.reward))
        return json.dumps(outcome.observation, ensure_ascii=False)
