"""The options of a curriculum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .checks import require

if TYPE_CHECKING:
    from .schema import Config


@dataclass
class CurriculumConfig:
    """Which prompts get a group of completions, by the share of right completions in their last group."""

    low: float = 0.05
    """Prompts with a smaller share of right completions are passed over."""
    high: float = 0.95
    """Prompts with a greater share are passed over."""
    rest_epochs: int = 2
    """Passes through the data for which such prompts are passed over."""

    def __post_init__(self) -> None:
        require(0 <= self.low <= self.high <= 1, "data.curriculum", (self.low, self.high), "0 <= low <= high <= 1")
        require(self.rest_epochs >= 1, "data.curriculum.rest_epochs", self.rest_epochs, "1 or more")


def check_curriculum(config: Config) -> None:
    """Raise ValueError for options that choose the prompts too, or choose them too early."""
    curriculum = config.data.curriculum
    require(curriculum is None or not config.rollout.max_resamples, "data.curriculum", curriculum,
            "null where rollout.max_resamples replaces prompts")  # fmt: skip
    require(curriculum is None or not config.rollout.lag, "data.curriculum", curriculum, "null where rollout.lag is 1: "
            "the next prompts are chosen before this step's pass rates are known")  # fmt: skip
