"""From each rank's completions and scores to the one global batch that all ranks hold."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..distributed.ranks import Ranks
from ..rewards.scores import Failure, Scores, combine
from ..rewards.text import CONVERSATION
from ..rollout.episodes import require_same
from ..types import Batch, Episode, Prompt, Trajectory, at_last_tokens, integers, no_routes

log = logging.getLogger(__name__)


class RewardFailure(RuntimeError):
    """More completions could not be scored than scoring.error_budget allows; raised on all ranks alike."""


def gather_trajectories(
    ranks: Ranks, prompts: list[Prompt], trajectories: list[Trajectory], *, has_episodes: bool = False,
    nothing_routed: Tensor | None = None,
) -> Batch:  # fmt: skip
    """The global batch in the order of (prompt, sample), from every rank's contiguous share of it; a collective.

    `nothing_routed` (0, J, K) is given where the trajectories have routes that are to be kept. Rewards are yet to come:
    see `gather_scores`. Raises RewardFailure where episodes of one prompt began differently.
    """
    numbers = integers([(each.group, len(each.ids), each.finished) for each in trajectories])
    numbers = ranks.gather(numbers.view(-1, 3))
    ids = ranks.gather(_flat((each.ids for each in trajectories), np.int32)).long()  # half of what int64 would send
    sampled = ranks.gather(_flat((each.sampled for each in trajectories), np.uint8)).bool()
    logprobs = ranks.gather(_flat((each.logprobs for each in trajectories), np.float32))
    episodes = None
    if has_episodes:
        own = [each.episode for each in trajectories if each.episode is not None]
        assert len(own) == len(trajectories), "every trajectory of a run with an environment is an episode"
        episodes = [each for part in ranks.gather_objects(own) for each in part]
        prompts = _played_prompts(prompts, numbers[:, 0].tolist(), episodes)
    prompt_routes = routes = None
    if nothing_routed is not None:
        prompt_routes = _gather_prompt_routes(ranks, prompts, trajectories, nothing_routed)
        routes = ranks.gather(torch.cat([nothing_routed, *(_routes(each)[-len(each.ids) :] for each in trajectories)]))
    nothing = torch.full((len(numbers),), torch.nan, dtype=torch.float64)
    return Batch(prompts, numbers[:, 0], numbers[:, 1], numbers[:, 2].bool(), ids, sampled, logprobs,
                 rewards=nothing[:, None], reward=nothing, episodes=episodes, prompt_routes=prompt_routes,
                 routes=routes)  # fmt: skip


def gather_scores(
    ranks: Ranks, batch: Batch, rows: slice, scores: Scores, weights: list[float], error_budget: float
) -> Batch:
    """The global batch with its rewards, from every rank's scores of its `rows` of the batch; a collective.

    Raises RewardFailure on every rank, with the first failure of each rank, where the share of completions that
    failed to be scored is above `error_budget`.
    """
    reward = combine(scores.values, scores.failed, weights)
    columns = np.concatenate([scores.values, scores.failed.astype(float), reward[:, None]], axis=1)
    gathered = ranks.gather(torch.from_numpy(columns))
    num_rewards = len(weights)
    failures = gathered[:, num_rewards : 2 * num_rewards].bool()
    failed = failures.any(1)
    if bool(failed.any()):
        _report_failures(ranks, batch, rows, scores.failures, failed.double().mean().item(), error_budget)
    metrics, extras = _gather_logged(ranks, scores)
    counts = failures.sum(0).tolist()
    metrics |= {f"reward/{name}/failed": float(count) for name, count in zip(scores.names, counts, strict=True)}
    if batch.episodes is not None:
        metrics |= episode_metrics(batch, batch.episodes)
        extras[CONVERSATION] = [json.dumps(each.messages, ensure_ascii=False) for each in batch.episodes]
    return replace(batch, rewards=gathered[:, :num_rewards], reward=gathered[:, -1], extras=extras, scoring=metrics,
                   token_rewards=_token_rewards(ranks, batch, rows, scores), episodes=None)  # fmt: skip


def episode_metrics(batch: Batch, episodes: Sequence[Episode]) -> dict[str, float]:
    """Metrics of the episodes of a batch: means over the episodes, and the number of broken environments."""
    outcomes = {"answered": "calls_answered", "error": "calls_failed", "malformed": "calls_malformed"}
    count = len(episodes)
    metrics = {"environment/turns": sum(each.turns for each in episodes) / count}
    for outcome, name in outcomes.items():
        metrics[f"environment/{name}"] = sum(each.outcomes[outcome] for each in episodes) / count
    metrics["environment/context_tokens"] = float((batch.row_lengths - batch.lengths).sum()) / count
    metrics["environment/tool_seconds"] = sum(each.tool_seconds for each in episodes) / count
    return metrics | {"environment/failed": float(sum(each.failure is not None for each in episodes))}


def _played_prompts(prompts: list[Prompt], groups: list[int], episodes: list[Episode]) -> list[Prompt]:
    """The prompts with what environments said at their reset, which is the same for the episodes of a prompt."""
    played: dict[int, Prompt] = {}
    for group, episode in zip(groups, episodes, strict=True):
        if episode.failure is None:
            try:
                require_same(played.setdefault(group, episode.prompt), episode.prompt)
            except ValueError as error:
                raise RewardFailure(str(error)) from error
    return [played.get(group, prompt) for group, prompt in enumerate(prompts)]


def _routes(trajectory: Trajectory) -> Tensor:
    assert trajectory.routes is not None, "asked only where the engine reports them"
    return trajectory.routes


def _gather_prompt_routes(
    ranks: Ranks, prompts: list[Prompt], trajectories: list[Trajectory], nothing: Tensor
) -> Tensor:
    """The routes of each prompt's tokens, (Lp, J, K), as the first trajectory of its group has them.

    The group's other ranks have computed the prompt too. A group without a trajectory of this prompt has none.
    """
    first: dict[int, Tensor] = {}
    for each in trajectories:
        if each.episode is None or each.episode.failure is None:
            first.setdefault(each.group, _routes(each)[: -len(each.ids)])
    numbers = ranks.gather(torch.tensor([[group, len(part)] for group, part in first.items()], dtype=torch.int64)
                           .view(-1, 2))  # fmt: skip
    gathered = ranks.gather(torch.cat([nothing, *first.values()]))
    parts: dict[int, Tensor] = {}
    for group, part in zip(numbers[:, 0].tolist(), gathered.split(numbers[:, 1].tolist()), strict=True):
        parts.setdefault(group, part)
    return torch.cat([parts.get(group, no_routes(len(prompt.ids), nothing)) for group, prompt in enumerate(prompts)])


def _flat(rows: Iterable[list[Any]], dtype: type[np.generic]) -> Tensor:
    """All numbers of the rows in one tensor."""
    return torch.from_numpy(np.fromiter(chain.from_iterable(rows), dtype))


def _gather_logged(ranks: Ranks, scores: Scores) -> tuple[dict[str, float], dict[str, list[Any]]]:
    """Seconds spent in each reward, calls made again and what the rewards logged, over all ranks."""
    spent = np.array([scores.seconds, scores.repeated_calls])
    logged = ranks.gather_objects((spent, scores.metrics, scores.extras, len(scores.values)))
    seconds, repeated = np.sum([spent for spent, *_ in logged], axis=0).tolist()
    totals = {f"reward/{name}/seconds": total for name, total in zip(scores.names, seconds, strict=True)}
    totals |= {f"reward/{name}/repeated_calls": count for name, count in zip(scores.names, repeated, strict=True)}
    for name in sorted({name for _, metrics, *_ in logged for name in metrics}):
        parts = [metrics[name] for _, metrics, *_ in logged if name in metrics]
        totals[f"reward/{name}"] = sum(total for total, _ in parts) / sum(count for _, count in parts)
    columns = sorted({column for *_, extras, _ in logged for column in extras})
    extras = {column: [value for *_, part, count in logged for value in part.get(column, [None] * count)]
              for column in columns}  # fmt: skip
    return totals, extras


def _token_rewards(ranks: Ranks, batch: Batch, rows: slice, scores: Scores) -> Tensor | None:
    """The global batch's rewards by sampled token, None where no rank has per-token rewards; a collective.

    `rows` are the completions that were scored here.
    """
    if not any(ranks.gather_objects(bool(scores.per_token))):
        return None
    lengths = batch.lengths[rows]
    table = at_last_tokens(torch.from_numpy(scores.values), lengths)
    starts = (torch.cumsum(lengths, 0) - lengths).tolist()
    sampled = torch.split(batch.sampled, batch.row_lengths.tolist())[rows]
    for (n, reward), values in scores.per_token.items():
        place = slice(starts[n], starts[n] + int(lengths[n]))
        table[place, reward] = torch.tensor(values, dtype=torch.float64)[sampled[n]]
    return ranks.gather(table)


def _report_failures(
    ranks: Ranks, batch: Batch, rows: slice, failures: list[Failure], share: float, budget: float
) -> None:
    """Log what failed, or stop all ranks where it was too much."""
    first = None
    if failures:
        failure = failures[0]
        prompt = batch.prompts[int(batch.group[rows][failure.item])].index
        first = (f"reward {failure.reward!r} ({failure.kind}) on a completion of prompt {prompt}: {failure.message}\n"
                 f"{failure.traceback}").rstrip()  # fmt: skip
    messages = [text for text in ranks.gather_objects(first) if text]
    message = f"{share:.1%} of the completions could not be scored. " + "\n".join(messages)
    if share > budget:
        raise RewardFailure(f"{message}\nscoring.error_budget allows {budget:.1%}: mend the reward or raise the budget")
    if ranks.is_main:
        log.warning("%s", message)
