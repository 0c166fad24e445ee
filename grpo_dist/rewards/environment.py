"""The `environment` reward: what the environment's `get_reward` returned after the episode.

It does not apply where `get_reward` returned None. An episode whose environment broke has no reward: it is unscored,
whatever other rewards say, and counts into scoring.error_budget (docs/environments.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def environment(
    completions: Sequence[Any], environment_reward: Sequence[float | None], **columns: Any
) -> list[float | None]:
    """Return what the environment's `get_reward` returned after each episode; None where it does not apply."""
    return list(environment_reward)
