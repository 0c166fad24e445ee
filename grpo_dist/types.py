"""The data that flows through one step: prompts, trajectories and the global batch.

Pure data: no model, no device handling, no I/O. Shapes use P prompts, N completions, R rewards, L completion tokens in
all and T of them that the policy sampled; the prompts have Lp tokens in all, and a mixture of experts J routers that
choose K experts for a token. Completion n belongs to prompt `group[n]`; its sampled tokens are the slice
`starts[n] : starts[n] + lengths[n]` of every flat (T,) tensor. Tokens that were not sampled are context: others attend
to them, and they have no entry in (T,) tensors, of which losses, advantages, KL terms and their denominators are made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

Metrics = Mapping[str, float | None]
"""Numbers of a step by name; None where the step has no such number."""


@dataclass(frozen=True)
class Prompt:
    """One row of the data set, ready for the model."""

    index: int
    """Place of its row in the data set."""
    ids: list[int]
    """Token ids of the rendered prompt."""
    text: str
    """The rendered prompt, chat template included."""
    messages: list[dict[str, str]] | None = None
    """The conversation the prompt was rendered from; None for plain text."""
    columns: dict[str, Any] = field(default_factory=dict)
    """The row's other columns, as the rewards receive them."""


@dataclass(frozen=True)
class Episode:
    """What a trajectory with tools or an environment was, besides its tokens."""

    messages: list[dict[str, Any]]
    """The conversation after the prompt: the assistant's turns and the tools' answers."""
    turns: int
    """Turns of the policy."""
    reward: float | None
    """What the environment says the episode is worth; None where it says nothing."""
    failure: str | None
    """Why the environment broke, so that nobody can score the episode; None where it did not."""
    outcomes: dict[str, int]
    """Calls by what came of them: `answered`, `error` (the tool raised), `malformed` (the model's call was none)."""
    prompt: Prompt
    """The prompt, with what the environment said at its reset."""
    rewards: dict[str, float | None] = field(default_factory=dict)
    """What rewards that take the environment itself gave, by their names in the config."""
    tool_seconds: float = 0.0
    """Time that it waited for the answers of its calls."""


@dataclass(frozen=True)
class Trajectory:
    """What follows a prompt for one (prompt, sample) of a step.

    The policy sampled some of its tokens; somebody else put the others there. An answer in one turn is the case in
    which all are sampled.
    """

    group: int
    """The prompt's place in the step's batch, as in `Batch.group`."""
    sample: int
    """The trajectory's place in its group."""
    ids: list[int]
    """Token ids after the prompt. The end-of-sequence token is one of them, if it was sampled."""
    logprobs: list[float]
    """The engine's log-probability of each sampled token (nats)."""
    finished: bool
    """Whether it ended by itself; False where a limit cut it."""
    sampled: list[bool]
    """Whether the policy sampled each of `ids`."""
    episode: Episode | None = None
    """None where there are no tools and no environment."""
    routes: Tensor | None = None
    """(tokens of the prompt and of `ids`, J, K) integers on the CPU: the experts that each token took, see
    `model.routing`. None where nobody replays them."""


@dataclass(frozen=True)
class OldPolicy:
    """What the policy computes for a batch before its first update.

    Tensors (T,) on the CPU; 0 for completions that have no gradient, and so are in no pack.
    """

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
    """(N,) int64: the prompt of each completion."""
    row_lengths: Tensor
    """(N,) int64: tokens of each completion, sampled or not."""
    finished: Tensor
    """(N,) bool: ended by itself."""
    ids: Tensor
    """(L,) int64: all completions' token ids, one after another."""
    sampled: Tensor
    """(L,) bool: which of them the policy sampled."""
    sampled_logprobs: Tensor
    """(T,) float32: the engine's log-probability of each sampled token (nats)."""
    rewards: Tensor
    """(N, R) float64: one column per reward function; NaN where it does not apply or failed."""
    reward: Tensor
    """(N,) float64: their weighted sum; NaN where a reward that counts failed, or none applies."""
    reference_logprobs: Tensor | None = None
    """(T,) float32: log-probability of each token under the reference (nats), from `with_reference`; None without a KL
    term."""
    prompt_routes: Tensor | None = None
    """(Lp, J, K): the experts that the tokens of each prompt took, one prompt after another; None where nobody replays
    them."""
    routes: Tensor | None = None
    """(L, J, K): those of the completions' tokens."""
    token_rewards: Tensor | None = None
    """(T, R) float64: rewards at the tokens they were given for, NaN elsewhere; a reward for the outcome is at the last
    token. None if all rewards are for the outcome."""
    scoring: dict[str, float] = field(default_factory=dict)
    """Metrics of sampling and scoring over all ranks: rounds, failures, seconds, and what rewards logged."""
    extras: dict[str, list[Any]] = field(default_factory=dict)
    """Columns that rewards logged for the completions' table, N values each, by `REWARD/COLUMN`."""
    episodes: list[Episode] | None = None
    """(N) as long as the completions are scored; None without tools and environment."""
    trace: Tensor | None = None
    """(W, 2) float64: the trainer's log-probability less the rollout's, and its entropy (nats), of the tokens that the
    report shows one by one; NaN until an update has computed them. See `monitoring.traces`."""
    old: OldPolicy | None = None
    """From `with_old_policy`; None where neither the loss nor the advantages depend on it."""
    advantages: Tensor | None = None
    """(T,) float64: advantage of each token, from `with_advantages`."""
    returns: Tensor | None = None
    """(T,) float64: targets of the critic, from `with_advantages`; None without a critic."""

    @cached_property
    def lengths(self) -> Tensor:
        """(N,) int64: sampled tokens of each completion."""
        counts = torch.zeros(len(self.row_lengths), dtype=torch.int64)
        rows = repeated(torch.arange(len(counts)), self.row_lengths)
        return counts.index_add_(0, rows, self.sampled.long())

    @cached_property
    def tokens(self) -> Tensor:
        """(T,) int64: ids of the sampled tokens."""
        return self.ids[self.sampled]

    @cached_property
    def starts(self) -> Tensor:
        """(N,) int64: where each completion's sampled tokens begin in the (T,) tensors."""
        return torch.cumsum(self.lengths, 0) - self.lengths

    @cached_property
    def first_advantages(self) -> Tensor:
        """(N,) float64: the first advantage of each completion's tokens that is not 0, which is the completion's for
        outcome rewards, also where only some tokens are trained; 0 for a completion that teaches nothing."""
        assert self.advantages is not None
        end = len(self.advantages)
        places = torch.where(self.advantages != 0, torch.arange(end), end)
        first = torch.full_like(self.lengths, end).scatter_reduce(0, self.sequence, places, "amin")
        return torch.cat([self.advantages, self.advantages.new_zeros(1)])[first]

    @cached_property
    def row_starts(self) -> Tensor:
        """(N,) int64: where each completion begins in the (L,) tensors."""
        return torch.cumsum(self.row_lengths, 0) - self.row_lengths

    @cached_property
    def prompt_lengths(self) -> Tensor:
        """(P,) int64: tokens of each prompt."""
        return torch.tensor([len(prompt.ids) for prompt in self.prompts], dtype=torch.int64)

    @cached_property
    def prompt_starts(self) -> Tensor:
        """(P,) int64: where each prompt begins in the (Lp,) tensors."""
        return torch.cumsum(self.prompt_lengths, 0) - self.prompt_lengths

    @property
    def sequence(self) -> Tensor:
        """(T,) int64: the completion each sampled token belongs to."""
        return repeated(torch.arange(len(self.lengths)), self.lengths)

    def completion_ids(self, n: int) -> list[int]:
        """Token ids of completion `n`, sampled or not."""
        start = int(self.row_starts[n])
        return self.ids[start : start + int(self.row_lengths[n])].tolist()


JOINED = {
    "completion": ("row_lengths", "finished", "rewards", "reward"),
    "token": ("sampled_logprobs", "reference_logprobs", "token_rewards"),
    "row token": ("ids", "sampled", "routes"),
    "prompt token": ("prompt_routes",),
}
"""The tensors that a batch may have before `with_advantages`, by what their first axis counts: N, T, L or Lp."""


def join(batches: list[Batch], groups: list[list[int]]) -> Batch:
    """One batch of the chosen `groups` of each of several batches, in that order, before `with_advantages`; groups are
    numbered anew."""
    if any(batch.token_rewards is not None for batch in batches):
        batches = [replace(batch, token_rewards=all_token_rewards(batch)) for batch in batches]
    parts: dict[str, list[Tensor]] = {}
    kept, count = [], 0
    for batch, members in zip(batches, groups, strict=True):
        number = torch.full((len(batch.prompts),), -1)
        number[members] = torch.arange(count, count + len(members))
        count += len(members)
        numbers, order = number[batch.group].sort(stable=True)
        rows = order[numbers >= 0]
        kept.append(rows)
        parts.setdefault("group", []).append(numbers[numbers >= 0])
        places = {
            "completion": rows, "token": token_places(batch.starts[rows], batch.lengths[rows]),
            "row token": token_places(batch.row_starts[rows], batch.row_lengths[rows]),
            "prompt token": token_places(batch.prompt_starts[members], batch.prompt_lengths[members]),
        }  # fmt: skip
        for axis, names in JOINED.items():
            for name in names:
                if (values := getattr(batch, name)) is not None:
                    parts.setdefault(name, []).append(values[places[axis]])
    tensors: dict[str, Any] = {name: torch.cat(each) for name, each in parts.items()}
    return Batch(
        prompts=[batch.prompts[g] for batch, members in zip(batches, groups, strict=True) for g in members], **tensors,
        scoring=_joined_scoring(batches),
        extras={column: [value for batch, mine in zip(batches, kept, strict=True)
                         for value in _column(batch, column, mine)]
                for column in dict.fromkeys(name for batch in batches for name in batch.extras)},
    )  # fmt: skip


def _column(batch: Batch, column: str, rows: Tensor) -> list[Any]:
    values = batch.extras.get(column, [None] * len(batch.lengths))
    return [values[n] for n in rows.tolist()]


def _joined_scoring(batches: list[Batch]) -> dict[str, float]:
    """Counts and seconds of all batches added up, and of what rewards logged and episodes were the mean over all of the
    batches' completions."""
    joined = {}
    for name in dict.fromkeys(name for batch in batches for name in batch.scoring):
        some = [(batch.scoring[name], len(batch.lengths)) for batch in batches if name in batch.scoring]
        is_sum = name.endswith(("/failed", "/seconds", "/repeated_calls"))
        joined[name] = sum(value * (1 if is_sum else count) for value, count in some)
        joined[name] /= 1 if is_sum else sum(count for _, count in some)
    return joined


def token_places(starts: Tensor, lengths: Tensor) -> Tensor:
    """The numbers `starts[n]` to `starts[n] + lengths[n] - 1` of each n, one after another; all int64."""
    before = torch.cumsum(lengths, 0) - lengths
    return repeated(starts - before, lengths) + torch.arange(int(lengths.sum()))


def integers(values: Sequence[Any]) -> Tensor:
    """Whole numbers, or rows of equally many, as int64 on the CPU. torch's own function takes four times as long."""
    return torch.from_numpy(np.array(values, dtype=np.int64))


def repeated(values: Tensor, counts: Tensor) -> Tensor:
    """Each of the `values` (N) `counts[n]` times, both on the CPU. torch's own function wakes all threads, which takes
    longer than the work."""
    return torch.from_numpy(np.repeat(values.numpy(), counts.numpy()))


def no_routes(tokens: int, like: Tensor) -> Tensor:
    """(tokens, J, K) as `like` (…, J, K): in place of experts, the number that says that none were recorded."""
    return like.new_full((tokens, *like.shape[-2:]), torch.iinfo(like.dtype).max)


def all_token_rewards(batch: Batch) -> Tensor:
    """A batch's rewards at the tokens they were given for: (T, R) float64, NaN elsewhere."""
    if batch.token_rewards is not None:
        return batch.token_rewards
    return at_last_tokens(batch.rewards, batch.lengths)


def at_last_tokens(values: Tensor, lengths: Tensor) -> Tensor:
    """Each completion's `values` (N, R) at its last token: (T, R), NaN elsewhere; each has one token or more."""
    table = torch.full((int(lengths.sum()), values.shape[1]), torch.nan, dtype=values.dtype)
    table[torch.cumsum(lengths, 0) - 1] = values
    return table
