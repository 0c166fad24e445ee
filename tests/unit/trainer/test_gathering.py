"""The global batch against a loop over completions, however many ranks have shares of it."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from grpo_dist.rewards.scores import Failure, Scores
from grpo_dist.trainer.gathering import RewardFailure, gather_scores, gather_trajectories
from grpo_dist.types import Batch, Episode, Prompt, Trajectory

pytestmark = pytest.mark.quick

WEIGHTS = [1.0, 0.5]
NAMES = ["right", "steps"]


class Threads:
    """Ranks that are threads of one process: what each hands in is joined in order of rank."""

    def __init__(self, count: int) -> None:
        self.parts: list[Any] = [None] * count
        self.barrier = threading.Barrier(count, timeout=20)
        self.own = threading.local()

    @property
    def is_main(self) -> bool:
        """Whether this thread is rank 0."""
        return self.own.rank == 0

    def gather_objects(self, thing: Any) -> list[Any]:
        """One object from each rank."""
        self.parts[self.own.rank] = thing
        self.barrier.wait()
        parts = list(self.parts)
        self.barrier.wait()
        return parts

    def gather(self, tensor: Tensor) -> Tensor:
        """All ranks' tensors, one after another."""
        return torch.cat(self.gather_objects(tensor))

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """What each rank returns or raises."""
        results: list[Any] = [None] * len(self.parts)

        def one(rank: int) -> None:
            self.own.rank = rank
            try:
                results[rank] = work(rank)
            except RewardFailure as error:
                results[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(self.parts))]
        for each in (*(t.start for t in threads), *(t.join for t in threads)):
            each()
        return results


def make_trajectory(chance: random.Random, group: int, sample: int) -> Trajectory:
    """One to five tokens, of which about one in three, but never all, was not sampled; the last sample has no end."""
    ids = [chance.randrange(50) for _ in range(chance.randint(1, 5))]
    sampled = [chance.random() < 2 / 3 for _ in ids]
    sampled[chance.randrange(len(ids))] = True
    logprobs = [-token / 7 for token, mine in zip(ids, sampled, strict=True) if mine]
    return Trajectory(group, sample, ids, logprobs, sample != 3, sampled)


CHANCE = random.Random(0)
COMPLETIONS = [make_trajectory(CHANCE, group, sample) for group in range(3) for sample in range(4)]
PROMPTS = [Prompt(10 + g, [g], "") for g in range(3)]


def outcome(n: int) -> float:
    """The first reward of completion n; it does not apply to one in five."""
    return math.nan if n % 5 == 4 else float(n % 3 == 0)


def steps(n: int) -> list[float]:
    """The second reward of completion n: a number for each token but every third, and no two are alike."""
    return [math.nan if t % 3 == 2 else n + t / 10 for t in range(len(COMPLETIONS[n].ids))]


def is_by_token(n: int) -> bool:
    """Whether the second reward is given by token; else it is an outcome of 7."""
    return n % 4 != 2


def scores_of(share: range, by_token: bool = True, failing: tuple[int, ...] = ()) -> Scores:
    """What a rank's scorer returns for its share of the completions."""
    per_token = {(i, 1): steps(n) for i, n in enumerate(share) if by_token and is_by_token(n)}
    values = np.array([[outcome(n), np.nansum(steps(n)) if (i, 1) in per_token else 7.0] for i, n in enumerate(share)])
    failed = np.array([[n in failing, False] for n in share])
    return Scores(
        values.reshape(-1, 2), failed.reshape(-1, 2), names=NAMES, seconds=np.array([len(share), 0.5]),
        repeated_calls=[1, 0],
        failures=[Failure(i, "right", "raised", f"no {n}", "Trace") for i, n in enumerate(share) if n in failing],
        per_token=per_token, metrics={"right/size": (float(sum(share)), len(share))} if len(share) else {},
        extras={"steps/note": [n for n in share], "right/text": [f"{n}" for n in share]}
        if 3 in share else {"right/text": list(share)},
    )  # fmt: skip


def gathered(shares: list[range], error_budget: float = 0.0, **options: Any) -> list[Any]:
    """The batch of each rank."""
    ranks = Threads(len(shares))

    def work(rank: int) -> Batch:
        mine = [COMPLETIONS[n] for n in shares[rank]]
        batch = gather_trajectories(ranks, PROMPTS, mine)  # type: ignore[arg-type]
        assert batch.rewards.isnan().all() and batch.reward.isnan().all() and len(batch.reward) == len(COMPLETIONS)
        assert batch.reward.dtype == batch.rewards.dtype == torch.float64
        scores = scores_of(shares[rank], **options)
        rows = slice(shares[rank].start, shares[rank].stop)
        return gather_scores(ranks, batch, rows, scores, WEIGHTS, error_budget)  # type: ignore[arg-type]

    return ranks.run(work)


def equal(tensor: Tensor, expected: list[Any]) -> None:
    """The same numbers, NaN where NaN is expected."""
    torch.testing.assert_close(tensor, torch.tensor(expected, dtype=tensor.dtype), rtol=0, atol=1e-6, equal_nan=True)


SHARES = [[range(12)], [range(5), range(5, 12)], [range(5), range(5, 5), range(5, 9), range(9, 12)]]


@pytest.mark.parametrize("shares", SHARES, ids=len)
def test_the_batch_equals_the_loop(shares: list[range]) -> None:
    everyone = [n for n in range(12)]
    for batch in gathered(shares):
        assert batch.prompts == PROMPTS
        equal(batch.group, [c.group for c in COMPLETIONS])
        equal(batch.row_lengths, [len(c.ids) for c in COMPLETIONS])
        equal(batch.lengths, [sum(c.sampled) for c in COMPLETIONS])
        equal(batch.finished, [c.finished for c in COMPLETIONS])
        equal(batch.ids, [i for c in COMPLETIONS for i in c.ids])
        equal(batch.sampled, [mine for c in COMPLETIONS for mine in c.sampled])
        equal(batch.tokens, [i for c in COMPLETIONS for i, mine in zip(c.ids, c.sampled, strict=True) if mine])
        equal(batch.sampled_logprobs, [value for c in COMPLETIONS for value in c.logprobs])
        second = [np.nansum(steps(n)) if is_by_token(n) else 7.0 for n in everyone]
        equal(batch.rewards, [[outcome(n), second[n]] for n in everyone])
        equal(batch.reward, [np.nansum([outcome(n), 0.5 * second[n]]) for n in everyone])
        table = []
        for n, completion in enumerate(COMPLETIONS):
            places = [t for t, mine in enumerate(completion.sampled) if mine]
            last = places[-1]
            for t in places:
                by_outcome = 7.0 if t == last else math.nan
                table.append([outcome(n) if t == last else math.nan, steps(n)[t] if is_by_token(n) else by_outcome])
        assert batch.token_rewards.dtype == torch.float64
        equal(batch.token_rewards, table)
        assert batch.scoring == {
            "reward/right/seconds": 12.0, "reward/steps/seconds": 0.5 * len(shares),
            "reward/right/repeated_calls": len(shares), "reward/steps/repeated_calls": 0, "reward/right/size": 66 / 12,
            "reward/right/failed": 0.0, "reward/steps/failed": 0.0,
        }  # fmt: skip
        with_note = next(share for share in shares if 3 in share)
        assert batch.extras == {"right/text": [f"{n}" if n in with_note else n for n in everyone],
                                "steps/note": [n if n in with_note else None for n in everyone]}  # fmt: skip


@pytest.mark.parametrize("shares", SHARES)
def test_episodes_of_a_batch(shares: list[range]) -> None:
    """A broken environment has no say in its prompt; the conversation is kept as it is."""
    broken, ranks = {1, 4, 5, 6, 7}, Threads(len(shares))

    def episode(n: int) -> Episode:
        group = COMPLETIONS[n].group
        said = Prompt(10 + group, [group, 99 if n in broken else 7], "said")
        outcomes = {"answered": n, "error": 1, "malformed": 2}
        return Episode([{"content": f"ä{n}"}], n + 1, None, "broke" if n in broken else None, outcomes, said,
                       tool_seconds=0.5)  # fmt: skip

    def work(rank: int) -> Batch:
        mine = [replace(COMPLETIONS[n], episode=episode(n)) for n in shares[rank]]
        batch = gather_trajectories(ranks, PROMPTS, mine, has_episodes=True)  # type: ignore[arg-type]
        rows = slice(shares[rank].start, shares[rank].stop)
        return gather_scores(ranks, batch, rows, scores_of(shares[rank]), WEIGHTS, 0.0)  # type: ignore[arg-type]

    for batch in ranks.run(work):
        assert [prompt.ids for prompt in batch.prompts] == [[0, 7], [1], [2, 7]]
        assert batch.extras["environment/conversation"] == [f'[{{"content": "ä{n}"}}]' for n in range(12)]
        assert {name: value for name, value in batch.scoring.items() if name.startswith("environment/")} == {
            "environment/turns": 6.5, "environment/calls_answered": 5.5, "environment/calls_failed": 1.0,
            "environment/calls_malformed": 2.0, "environment/failed": 5.0, "environment/tool_seconds": 0.5,
            "environment/context_tokens": sum(len(each.ids) - sum(each.sampled) for each in COMPLETIONS) / 12,
        }  # fmt: skip


@pytest.mark.parametrize("shares", SHARES[:2], ids=len)
def test_episodes_of_a_prompt_begin_with_one_text(shares: list[range]) -> None:
    """Whichever ranks play them."""
    ranks, none = Threads(len(shares)), dict.fromkeys(("answered", "error", "malformed"), 0)

    def work(rank: int) -> Batch:
        mine = [replace(COMPLETIONS[n], episode=Episode([], 1, None, None, none, Prompt(10, [0, int(n == 3)], "said")))
                for n in shares[rank]]  # fmt: skip
        return gather_trajectories(ranks, PROMPTS, mine, has_episodes=True)  # type: ignore[arg-type]

    for failure in ranks.run(work):
        assert isinstance(failure, RewardFailure) and "row 10 with different texts" in str(failure)


def test_no_table_without_rewards_by_token() -> None:
    assert all(batch.token_rewards is None for batch in gathered(SHARES[1], by_token=False))


@pytest.mark.parametrize("shares", SHARES[1:], ids=len)
def test_failures_stop_all_ranks_or_none(shares: list[range], caplog: pytest.LogCaptureFixture) -> None:
    failing = (6, 7, 11)
    for error in gathered(shares, 0.2, failing=failing):
        assert isinstance(error, RewardFailure)
        text = str(error)
        assert text.startswith("25.0% of the completions could not be scored.") and "allows 20.0%" in text
        assert "reward 'right' (raised) on a completion of prompt 11: no 6\nTrace" in text and "no 7" not in text
    assert not caplog.records
    for batch in gathered(shares, 0.25, failing=failing):
        assert [n for n in range(12) if batch.reward[n].isnan()] == list(failing)
        assert batch.scoring["reward/right/failed"] == 3.0
    (warning,) = caplog.records
    assert "25.0%" in warning.getMessage() and "no 6" in warning.getMessage()


@pytest.mark.parametrize("shares", SHARES, ids=len)
def test_routes_travel_with_the_rows(shares: list[range]) -> None:
    """Those of a prompt are its first trajectory's, whichever rank has it, but not one whose environment broke."""
    generator = torch.Generator().manual_seed(0)
    drawn = [replace(each, routes=torch.randint(0, 9, (1 + len(each.ids), 2, 3), generator=generator).byte())
             for each in COMPLETIONS]  # fmt: skip
    broken = Episode([], 1, None, "the environment broke", {}, PROMPTS[0])
    drawn[0] = replace(drawn[0], episode=broken)
    nothing, ranks = torch.zeros((0, 2, 3), dtype=torch.uint8), Threads(len(shares))
    batches = ranks.run(lambda rank: gather_trajectories(
        ranks, PROMPTS, [drawn[n] for n in shares[rank]], nothing_routed=nothing))  # type: ignore[arg-type]  # fmt: skip
    routes = [each.routes for each in drawn if each.routes is not None]
    for batch in batches:
        assert torch.equal(batch.prompt_routes, torch.cat([routes[n][:1] for n in (1, 4, 8)]))
        assert torch.equal(batch.routes, torch.cat([each[1:] for each in routes]))
