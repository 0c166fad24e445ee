"""The inputs and results of scoring, and the sum of several rewards.

Data classes and pure functions; n completions and R rewards throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from .text import TextOrMessages

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    from ..types import Prompt

FailureKind = Literal["raised", "timeout", "bad_value", "died", "environment"]


@dataclass(frozen=True)
class Item:
    """One completion for the rewards."""

    prompt: TextOrMessages
    """The prompt as text, or as the messages of a conversation; a conversation's completion reaches the rewards as one
    assistant message, as in TRL."""
    completion: str
    """The completion as text."""
    completion_ids: list[int]
    """The completion's token ids."""
    columns: dict[str, Any] = field(default_factory=dict)
    """The data row's other columns, `answer` among them where there is one."""
    messages: list[dict[str, Any]] | None = None
    """The conversation after the prompt, where tools answered; rewards get it in place of one assistant message."""


@dataclass(frozen=True)
class Failure:
    """A reward that failed for one completion."""

    item: int
    """Place of the completion among those submitted."""
    reward: str
    """Label of the reward."""
    kind: FailureKind
    """The function raised, exceeded its time, returned something that is not a reward, or ended its process; or the
    completion's environment broke."""
    message: str
    """The cause, in one line."""
    traceback: str = ""
    """The function's traceback, where it raised."""


@dataclass(frozen=True)
class Scores:
    """The rewards of n completions under R reward functions."""

    values: NDArray[np.float64]
    """(n, R); NaN where a reward does not apply to a completion, and where it failed."""
    failed: NDArray[np.bool_]
    """(n, R); True where the reward failed: it distinguishes the two kinds of NaN."""
    failures: list[Failure]
    """One for each True of `failed`, by completion and then by reward."""
    names: list[str]
    """(R); the rewards' labels."""
    seconds: NDArray[np.float64]
    """(R,); time spent in each reward's calls, summed over the workers."""
    repeated_calls: list[int]
    """(R,); calls that failed, and succeeded when they were repeated without the completions that fail alone."""
    per_token: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    """By (completion, reward), where a reward gave one number for each completion token: these numbers, NaN for None.
    Their sum is in `values`."""
    metrics: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Metrics of `log_metric`, by `REWARD/NAME`: the sum over the calls of value times completions, and the number of
    those completions. Their quotient is the mean, however the completions were divided into calls."""
    extras: dict[str, list[Any]] = field(default_factory=dict)
    """Columns of `log_extra`, by `REWARD/COLUMN`: one value for each completion, None where there is none."""


def right_above(weights: Sequence[float]) -> float:
    """Return the reward above which a completion counts as right: half of the positive weights' sum."""
    return sum(weight for weight in weights if weight > 0) / 2


def combine(values: NDArray[np.float64], failed: NDArray[np.bool_], weights: Sequence[float]) -> NDArray[np.float64]:
    """Return the weighted sum of each completion's rewards.

    values, failed (n, R) as in `Scores`; weights (R); result (n,). A reward that does not apply is left out of a sum. A
    completion is NaN, unscored, where one of its rewards failed or none applies: neither a part of a sum nor 0 is its
    reward. A reward with weight 0 is only a metric: its values and failures do not change the sum. Raises ValueError
    where the shapes do not match.
    """
    if values.shape != failed.shape or values.shape[1:] != (len(weights),):
        raise ValueError(
            f"values {values.shape}, failed {failed.shape} and {len(weights)} weights given, expected (n, R), (n, R), R"
        )
    counted = [r for r, weight in enumerate(weights) if weight != 0]
    total = np.zeros(len(values))
    applies = np.zeros(len(values), dtype=bool)
    for r in counted:  # in a fixed order, so that a sum does not depend on the number of completions
        present = ~np.isnan(values[:, r])
        total[present] += weights[r] * values[present, r]
        applies |= present
    total[~applies | failed[:, counted].any(axis=1)] = np.nan
    return total


def to_items(pairs: Sequence[tuple[Prompt, str]], tokenizer: PreTrainedTokenizerBase) -> list[Item]:
    """Return prompts with completions as items for the rewards."""
    encoded = tokenizer([text for _, text in pairs], add_special_tokens=False)["input_ids"]
    return [
        Item(prompt.messages or prompt.text, text, ids, prompt.columns)
        for (prompt, text), ids in zip(pairs, encoded, strict=True)
    ]
