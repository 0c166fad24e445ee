"""From prompts to the scored global batch of a step, the same on every rank: rollout, rewards, gathering."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from ..algorithm.advantages import has_spread
from ..algorithm.hashing import stream_key
from ..checkpoint.state import TrainState
from ..config.algorithm import has_reference
from ..data.order import Curriculum, Mixture, Sampler
from ..rewards.registry import TrainerState
from ..rollout import Sampling, awake
from ..rollout.playing import sample_or_play
from ..types import Batch, Prompt, Trajectory, join
from .gathering import gather_scores, gather_trajectories
from .packs import reference_logprobs
from .parts import Parts
from .scoring import Scoring, requests_of

Draw = Callable[[Callable[[], None]], list[Trajectory]]
"""Draws this rank's share of a round's trajectories; it is called with a check that may raise to give up."""
Drawn = tuple[list[Trajectory], Scoring]
"""This rank's share of a round's trajectories, and their scores on their way."""


@dataclass(frozen=True)
class Round:
    """Completions that are drawn at once, over all ranks."""

    prompts: list[Prompt]
    group_size: int
    """Completions of each prompt."""
    sampling: Sampling
    stream: str
    """The name of the noise, such as `train/12`."""
    step: int
    """The step for which they are drawn, as rewards get it."""


def collect(parts: Parts, state: TrainState, step: int, first: Callable[[], Drawn] | None = None) -> Batch:
    """A new batch for a step, which is the one under way or the next; a collective.

    `first` returns what the first round has drawn already.

    With dynamic sampling (DAPO, arXiv:2503.14476, section 3.2), groups whose rewards are all equal are replaced by
    groups of further prompts. Prompts and noise of a round are functions of seed, step and round, so nothing has to be
    saved for a resume; what a round replaces follows from the global batch, so ranks need not talk about it.
    """
    config = parts.config
    batches = [_scored(parts, state, first_round(parts, state, step), first)]
    if not config.rollout.max_resamples:
        return batches[0]
    with_signal, without = _groups_by_signal(batches[0])
    chosen, missing = [with_signal], len(without)
    while missing and len(batches) <= config.rollout.max_resamples:
        assert not isinstance(state.sampler, Curriculum), "refused with rollout.max_resamples"
        places = further_places(state.sampler, step, len(batches))[:missing]
        batches.append(_scored(parts, state, _round(parts, places, f"train/{step}/{len(batches)}", step)))
        chosen.append(_groups_by_signal(batches[-1])[0])
        missing -= len(chosen[-1])
    chosen[0] = sorted(with_signal + without[:missing])
    rewards = torch.cat([batch.reward for batch in batches])
    counts = {
        "rollout/rounds": len(batches), "rollout/groups": sum(len(batch.prompts) for batch in batches),
        "rollout/completions": len(rewards), "rollout/groups_replaced": len(without) - missing,
        "rollout/groups_without_signal": missing, "reward/sampled_mean": float(rewards.nanmean()),
    }  # fmt: skip
    batch = join(batches, chosen)
    return replace(batch, scoring=batch.scoring | counts)


def first_round(parts: Parts, state: TrainState, step: int) -> Round:
    """The first round of a step."""
    return _round(parts, state.sampler.batch_indices(step), f"train/{step}", step)


def _round(parts: Parts, places: Iterable[int], stream: str, step: int) -> Round:
    """A round of the training prompts at these places."""
    prompts = [parts.prompts[place] for place in places]
    return Round(prompts, parts.config.rollout.group_size, parts.sampling, stream, step)


def with_reference(parts: Parts, batch: Batch) -> Batch:
    """The batch with the reference's log-probabilities, where they are needed and not there yet; a collective."""
    if not has_reference(parts.config) or batch.reference_logprobs is not None:
        return batch
    with parts.phase("reference"):
        return replace(batch, reference_logprobs=reference_logprobs(parts, batch))


def generate(parts: Parts, state: TrainState, round: Round) -> Drawn:
    """This rank's share of a round's trajectories, and their scores, which are computed while others are sampled."""
    with awake(parts.engine), parts.ranks.shared_errors("rollout"):
        draw, scoring = prepare_round(parts, state, round)
        return draw(parts.watch.check), scoring


def prepare_round(parts: Parts, state: TrainState, round: Round) -> tuple[Draw, Scoring]:
    """What draws this rank's share of the trajectories, and the scores to which it hands them as they end."""
    prompts, train = round.prompts, parts.config.train
    drawn = parts.ranks.share(len(prompts) * round.group_size)
    requests = requests_of(prompts, round.group_size, drawn, train.seed, round.stream)
    progress = TrainerState(round.step, train.num_train_steps, state.sampler.epoch(round.step))
    scoring = Scoring(parts.scorer, prompts, round.group_size, drawn, parts.texts_of, progress,
                      has_episodes=parts.episodes is not None)  # fmt: skip

    def draw(check: Callable[[], None]) -> list[Trajectory]:
        return sample_or_play(parts.engine, parts.episodes, requests, prompts, round.sampling, scoring.on_finish, check)

    return draw, scoring


def further_places(sampler: Sampler | Mixture, step: int, round: int) -> list[int]:
    """Places of prompts that a round of dynamic sampling may take, in the order in which it takes them.

    A mixture's shares hold for them too: they are drawn from each data set in proportion, whatever was to be replaced.
    """
    return sampler.reseeded(stream_key(sampler.seed, "resample", round) & (2**63 - 1)).batch_indices(step)


def _scored(parts: Parts, state: TrainState, round: Round, drawn: Callable[[], Drawn] | None = None) -> Batch:
    """A round's completions, scored and gathered; the reference is asked while rewards are still on their way.

    `drawn` returns the completions where they were drawn before.
    """
    config = parts.config
    with parts.phase("rollout"):
        trajectories, scoring = drawn() if drawn else generate(parts, state, round)
        nothing = None if parts.routers is None else parts.routers.nothing
        batch = gather_trajectories(parts.ranks, round.prompts, trajectories, has_episodes=parts.episodes is not None,
                                    nothing_routed=nothing)  # fmt: skip
        scoring.complete(batch)
    parts.phase.sampled_tokens += len(batch.tokens)
    # with resampling only of the groups that stay, and a step ahead while a server draws the next batch
    if not config.rollout.max_resamples and not (config.rollout.lag and parts.engine.is_elsewhere):
        batch = with_reference(parts, batch)
    with parts.phase("reward"):
        with parts.ranks.shared_errors("scoring"):
            scores = scoring.result(parts.watch.check)
        return gather_scores(parts.ranks, batch, scoring.rows, scores, config.weights_at(round.step),
                             config.scoring.error_budget)  # fmt: skip


def _groups_by_signal(batch: Batch) -> tuple[list[int], list[int]]:
    """The groups whose rewards differ, and the others, both in their order."""
    spread = has_spread(batch.reward, batch.group).tolist()
    return [g for g, one in enumerate(spread) if one], [g for g, one in enumerate(spread) if not one]
