"""The data that flows through one step: prompts, completions and the global batch.

Pure data: no model, no device handling, no I/O. Shapes use P prompts, N completions, R rewards and T completion tokens
in all; completion n belongs to prompt `group[n]`, and its tokens are the slice `starts[n] : starts[n] + lengths[n]` of
every flat (T,) tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """One row of the data set, ready for the model."""

    index: int
    """Row in the data set."""
    ids: list[int]
    """Token ids of the rendered prompt."""
    text: str
    """The rendered prompt, chat template included."""
    messages: list[dict[str, str]] | None = None
    """The conversation the prompt was rendered from; None for plain text."""
    columns: dict[str, Any] = field(default_factory=dict)
    """The row's other columns, as the rewards receive them."""


@dataclass(frozen=True)
class Completion:
    """What the engine sampled for one (prompt, sample) of a step."""

    slot: int
    """The prompt's place in the step's batch."""
    sample: int
    """The completion's place in its group."""
    ids: list[int]
    """Sampled token ids, the end-of-sequence token included where it was reached."""
    logprobs: list[float]
    """The engine's log-probability of each sampled token (nats)."""
    finished: bool
    """Whether the completion ended by itself; False where the length limit cut it."""


@dataclass(frozen=True)
class OldPolicy:
    """What the policy that opened the batch computes for it: (T,) on the CPU, 0 for tokens that are left out."""

    logprobs: Tensor
    """Log-probability of each token (nats)."""
    entropies: Tensor
    """Entropy of the distribution before each token (nats)."""
    values: Tensor | None = None
    """The critic's value of the text before each token."""


@dataclass(frozen=True)
class Batch:
    """The global batch of one step, the same on every rank."""

    prompts: list[Prompt]
    """The step's P prompts."""
    group: Tensor
    """(N,) int64: the prompt each completion answers."""
    lengths: Tensor
    """(N,) int64: tokens of each completion."""
    finished: Tensor
    """(N,) bool: ended by itself."""
    tokens: Tensor
    """(T,) int64: all completions' token ids, one after another."""
    sampled_logprobs: Tensor
    """(T,) float32: the engine's log-probability of each token (nats)."""
    rewards: Tensor
    """(N, R) float64: one column per reward function; NaN where it does not apply or failed."""
    reward: Tensor
    """(N,) float64: their weighted sum; NaN for a completion that could not be scored."""
    reference_logprobs: Tensor | None = None
    """(T,) float32: log-probability of each token under the reference (nats); None where there is no KL term."""
    token_rewards: Tensor | None = None
    """(T, R) float64: rewards where they were given, NaN elsewhere; an outcome reward is its last token's. None where
    all rewards are outcome rewards."""
    scoring: dict[str, float] = field(default_factory=dict)
    """Metrics of sampling and scoring over all ranks: rounds, failures, seconds, and what rewards logged."""
    extras: dict[str, list[Any]] = field(default_factory=dict)
    """Columns that rewards logged for the completions' table, N values each, by `REWARD/COLUMN`."""
    old: OldPolicy | None = None
    """The policy that opened the batch; None where the loss and the advantages do not depend on it."""
    advantages: Tensor | None = None
    """(T,) float64: what each token is pushed by; None until `with_advantages`."""
    returns: Tensor | None = None
    """(T,) float64: what the critic is to predict; None without a critic."""

    @cached_property
    def starts(self) -> Tensor:
        """(N,) int64: where each completion begins in the flat tensors."""
        return torch.cumsum(self.lengths, 0) - self.lengths

    @property
    def sequence(self) -> Tensor:
        """(T,) int64: the completion each token belongs to."""
        return torch.repeat_interleave(torch.arange(len(self.lengths)), self.lengths)

    def completion_ids(self, n: int) -> list[int]:
        """Token ids of completion `n`."""
        start = int(self.starts[n])
        return self.tokens[start : start + int(self.lengths[n])].tolist()


def join(batches: list[Batch], groups: list[list[int]]) -> Batch:
    """One batch of the chosen `groups` of each of several batches, in that order; groups are numbered anew."""
    kept, renumbered, count = [], [], 0
    for batch, chosen in zip(batches, groups, strict=True):
        number = torch.full((len(batch.prompts),), -1)
        number[chosen] = torch.arange(count, count + len(chosen))
        numbers, order = number[batch.group].sort(stable=True)
        kept.append(order[numbers >= 0])
        renumbered.append(numbers[numbers >= 0])
        count += len(chosen)
    places = [token_places(batch.starts[rows], batch.lengths[rows]) for batch, rows in zip(batches, kept, strict=True)]

    def rows(name: str) -> Tensor:
        return torch.cat([getattr(batch, name)[mine] for batch, mine in zip(batches, kept, strict=True)])

    def flat(name: str) -> Tensor:
        return torch.cat([getattr(batch, name)[mine] for batch, mine in zip(batches, places, strict=True)])

    reference = None if batches[0].reference_logprobs is None else flat("reference_logprobs")
    token_rewards = None
    if any(batch.token_rewards is not None for batch in batches):
        token_rewards = torch.cat([all_token_rewards(batch)[mine] for batch, mine in zip(batches, places, strict=True)])
    return Batch(
        prompts=[batch.prompts[g] for batch, chosen in zip(batches, groups, strict=True) for g in chosen],
        group=torch.cat(renumbered), lengths=rows("lengths"), finished=rows("finished"), tokens=flat("tokens"),
        sampled_logprobs=flat("sampled_logprobs"), rewards=rows("rewards"), reward=rows("reward"),
        reference_logprobs=reference, token_rewards=token_rewards,
        scoring=_joined_scoring([batch.scoring for batch in batches]),
        extras={column: [value for batch, mine in zip(batches, kept, strict=True)
                         for value in _column(batch, column, mine)]
                for column in dict.fromkeys(name for batch in batches for name in batch.extras)},
    )  # fmt: skip


def _column(batch: Batch, column: str, rows: Tensor) -> list[Any]:
    values = batch.extras.get(column, [None] * len(batch.lengths))
    return [values[n] for n in rows.tolist()]


def _joined_scoring(scoring: list[dict[str, float]]) -> dict[str, float]:
    """Counts and seconds of all batches added up, and the mean of what rewards logged."""
    joined = {}
    for name in dict.fromkeys(name for each in scoring for name in each):
        values = [each[name] for each in scoring if name in each]
        joined[name] = sum(values) / (1 if name.endswith(("/failed", "/seconds", "/repeated_calls")) else len(values))
    return joined


def token_places(starts: Tensor, lengths: Tensor) -> Tensor:
    """The numbers `starts[n]` to `starts[n] + lengths[n] - 1` of each n, one after another; all int64."""
    before = torch.cumsum(lengths, 0) - lengths
    return torch.repeat_interleave(starts - before, lengths) + torch.arange(int(lengths.sum()))


def all_token_rewards(batch: Batch) -> Tensor:
    """A batch's rewards at the tokens they were given for: (T, R) float64, NaN elsewhere."""
    if batch.token_rewards is not None:
        return batch.token_rewards
    return at_last_tokens(batch.rewards, batch.lengths)


def at_last_tokens(values: Tensor, lengths: Tensor) -> Tensor:
    """Each completion's `values` (N, R) at its last token: (T, R), NaN elsewhere."""
    table = torch.full((int(lengths.sum()), values.shape[1]), torch.nan, dtype=values.dtype)
    table[torch.cumsum(lengths, 0) - 1] = values
    return table
