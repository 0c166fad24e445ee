"""From a step's number to its global batch: rollout, scoring, gathering, and rounds of these for dynamic sampling."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..algorithm.advantages import has_spread
from ..algorithm.hashing import stream_key
from ..algorithm.targets import has_reference
from ..data.order import Curriculum, Mixture, Sampler
from ..types import Batch, Prompt, join
from .build import Run
from .gathering import gather_completions, gather_scores
from .work import reference_logprobs


def batch_of(run: Run, step: int) -> tuple[Batch, dict[str, float]]:
    """The batch of a step and what dynamic sampling did for it; a collective.

    It is sampled, but where the run was stopped between two of its updates: then the position holds it.
    """
    batch, facts = run.position.batch, run.position.facts
    if batch is None:
        batch, facts = _sample(run, step)
    return _with_reference(run, batch), facts


def _with_reference(run: Run, batch: Batch) -> Batch:
    """The batch with the reference's log-probabilities, where they are needed and not there yet; a collective."""
    if not has_reference(run.config) or batch.reference_logprobs is not None:
        return batch
    with run.phase("reference"):
        return replace(batch, reference_logprobs=reference_logprobs(run, batch))


def _sample(run: Run, step: int) -> tuple[Batch, dict[str, float]]:
    """A new batch, and what dynamic sampling did for it.

    Groups whose rewards are all equal are replaced by groups of further prompts (DAPO, arXiv:2503.14476, section 3.2).
    The prompts and the noise of a round are functions of seed, step and round, so nothing has to be saved for a resume;
    what a round has to replace follows from the global batch, so ranks need not talk about it.
    """
    config = run.config
    batches = [_round(run, run.prompts_of(step), f"train/{step}", step)]
    if not config.rollout.max_resamples:
        return batches[0], {}
    kept, spare = _sorted_groups(batches[0])
    chosen, rounds, all_rewards = [kept], 0, [batches[0].reward]
    while sum(map(len, chosen)) < config.train.batch_size and rounds < config.rollout.max_resamples:
        rounds += 1
        missing = config.train.batch_size - sum(map(len, chosen))
        assert not isinstance(run.sampler, Curriculum), "refused with rollout.max_resamples"
        places = further_places(run.sampler, step, rounds)[:missing]
        batches.append(_round(run, [run.prompts[i] for i in places], f"train/{step}/{rounds}", step))
        chosen.append(_sorted_groups(batches[-1])[0])
        all_rewards.append(batches[-1].reward)
    replaced = sum(map(len, chosen)) - len(kept)
    filled = spare[: config.train.batch_size - len(kept) - replaced]
    chosen[0] = sorted(kept + filled)
    counts = {
        "rollout/rounds": 1 + rounds, "rollout/groups": sum(len(batch.prompts) for batch in batches),
        "rollout/groups_replaced": replaced, "rollout/groups_without_signal": len(filled),
        "reward/sampled_mean": float(torch.cat(all_rewards).nanmean()),
    }  # fmt: skip
    return join(batches, chosen), counts


def further_places(sampler: Sampler | Mixture, step: int, round: int) -> list[int]:
    """Places of prompts that a round of dynamic sampling may take, in the order in which it takes them.

    A mixture's shares hold for them too: they are drawn from each data set in proportion, whatever was to be replaced.
    """
    return sampler.reseeded(stream_key(sampler.seed, "resample", round) & (2**63 - 1)).batch_indices(step)


def _round(run: Run, prompts: list[Prompt], stream: str, step: int) -> Batch:
    """Completions of `prompts`, scored and gathered; the reference is asked while rewards are still on their way."""
    config = run.config
    with run.phase("rollout"):
        completions, scoring = run.generate(prompts, config.rollout.group_size, run.sampling, stream, step)
        batch = gather_completions(run.ranks, prompts, completions)
        scoring.complete(batch)
    if not config.rollout.max_resamples:  # else only of the groups that are kept
        batch = _with_reference(run, batch)
    with run.phase("reward"):
        with run.ranks.together("scoring"):
            scores = scoring.result(run.watch.check)
        return gather_scores(run.ranks, batch, scoring.rows, scores, config.weights_at(step),
                             config.scoring.error_budget)  # fmt: skip


def _sorted_groups(batch: Batch) -> tuple[list[int], list[int]]:
    """The groups whose rewards differ, and the others."""
    spread = has_spread(batch.reward, batch.group).tolist()
    return [g for g, one in enumerate(spread) if one], [g for g, one in enumerate(spread) if not one]
