"""Statistics of a model's samples: pass@k, maj@k, confidence intervals, paired tests. Pure, on NumPy.

P prompts; a prompt's samples are in the order of their numbers. All random numbers come from a generator with a fixed
seed: the same samples give the same numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 2000
_SIGN_FLIPS = 20000
_SEED = 0


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and its confidence interval."""

    value: float
    low: float
    high: float
    """Ends of the 95 % bootstrap interval over prompts."""


@dataclass(frozen=True)
class Comparison:
    """Two models on the same prompts."""

    difference: Estimate
    """Mean over prompts of second minus first."""
    p_value: float
    """Two-sided, of the sign-flip permutation test of the prompts' differences; 1 where all are 0."""
    num_prompts: int


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Return the unbiased estimate of the chance that one of k samples is right (Chen et al. 2021, eq. 1).

    Raises ValueError unless 1 <= k <= num_samples and 0 <= num_right <= num_samples.
    """
    if not 1 <= k <= num_samples or not 0 <= num_right <= num_samples:
        raise ValueError(f"{num_right} right of {num_samples} samples, k = {k} given, expected 1 <= k <= num_samples")
    wrong = num_samples - num_right
    return 1.0 - float(np.prod(1.0 - k / np.arange(wrong + 1, num_samples + 1))) if k <= wrong else 1.0


def majority_at_k(answers: Sequence[str | None], right: Sequence[bool], k: int) -> float:
    """Return the share of right majorities among the consecutive blocks of k samples; a shorter last block is left out.

    A block's majority is its most frequent answer, and the first of equally frequent ones. A sample without an answer
    (None) has no vote, and a block without votes is wrong. Raises ValueError for less than one block.
    """
    num_blocks = len(answers) // k
    if num_blocks < 1:
        raise ValueError(f"{len(answers)} samples and k = {k} given, expected at least k samples")
    won = 0
    for start in range(0, num_blocks * k, k):
        votes = Counter(answer for answer in answers[start : start + k] if answer is not None)
        if votes:
            # a Counter keeps the order of insertion, so this is the first of equally frequent ones
            winner = votes.most_common(1)[0][0]
            won += right[start + list(answers[start : start + k]).index(winner)]
    return won / num_blocks


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of one value for each prompt, (P,), with its interval; all NaN where there are none."""
    array = np.asarray(values, dtype=float)
    if not len(array):
        return Estimate(np.nan, np.nan, np.nan)
    low, high = np.quantile(_resampled_means(array), [0.025, 0.975])
    return Estimate(float(array.mean()), float(low), float(high))


def compare(first: Sequence[float], second: Sequence[float]) -> Comparison:
    """Compare two models by one value for each prompt, both (P,) in the same order.

    Raises ValueError where there are none, or more of one than of the other.
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(f"{len(first)} and {len(second)} prompts given, expected the same, and at least one")
    differences = np.asarray(second, dtype=float) - np.asarray(first, dtype=float)
    generator = np.random.Generator(np.random.PCG64(_SEED))
    observed = abs(differences.sum())
    as_far = 1  # the observed signs count as one draw
    for _ in range(_SIGN_FLIPS):
        signs = generator.integers(0, 2, len(differences)) * 2 - 1
        as_far += abs((signs * differences).sum()) >= observed - 1e-12
    return Comparison(estimate(differences), as_far / (_SIGN_FLIPS + 1), len(differences))


def _resampled_means(values: NDArray[np.float64]) -> NDArray[np.float64]:
    generator = np.random.Generator(np.random.PCG64(_SEED))
    return np.array([values[generator.integers(0, len(values), len(values))].mean() for _ in range(_RESAMPLES)])
