"""An environment behind a server of OpenEnv (`pip install openenv-core`), at the URL in the variable OPENENV_URL."""

from __future__ import annotations

import json
import os
from typing import Any

from openenv.core import GenericEnvClient


class OpenEnv:
    """The model acts with the fields of an action as JSON; the episode is worth the sum of the rewards."""

    client: Any = None

    async def reset(self, seed: int) -> str:
        """Begin an episode, which gives the prompt or follows the row's."""
        if self.client is None:
            self.client = GenericEnvClient(base_url=os.environ["OPENENV_URL"])
            await self.client.connect()
        self.reward = 0.0
        return self._taken(await self.client.reset(seed=seed % 2**31))

    async def act(self, action: dict) -> str:  # type: ignore[type-arg]
        """
        Act in the environment.

        Args:
            action: The fields of the action.
        """
        return self._taken(await self.client.step(action))

    def get_reward(self) -> float:
        """What the episode is worth."""
        return self.reward

    def _taken(self, result: Any) -> str:
        self.reward += result.reward or 0.0
        self.done = result.done
        return json.dumps(result.observation)
