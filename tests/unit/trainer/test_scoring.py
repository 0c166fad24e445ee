"""Scoring while others are generated: which calls are made when, and that every score lands in its place."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from torch import Tensor

from grpo_dist.config.schema import RewardConfig, ScoringConfig
from grpo_dist.rewards.pool.pool import ScorerPool
from grpo_dist.rollout import Request, Sampling, sample
from grpo_dist.trainer.gathering import gather_trajectories
from grpo_dist.trainer.scoring import Scoring, requests_of
from grpo_dist.types import Prompt, Trajectory

REWARD = '''
from pathlib import Path

def note(completion_ids, group, path, **_):
    """The completion's only token; each call is written down as the groups it was made with."""
    with open(path[0], "a") as file:
        file.write(" ".join(map(str, group)) + "\\n")
    return [float(ids[0]) for ids in completion_ids]
'''
GROUPS, SIZE = 6, 4


def letters(rows: Sequence[Sequence[int]], *, goes_on: bool) -> list[str]:
    """Texts of one letter a token."""
    return ["".join(map(chr, row)) for row in rows]


class OneRank:
    """What `gather_trajectories` asks of ranks, where all completions are here."""

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor


def answer(request: Request) -> Trajectory:
    """One token, which names the request."""
    return Trajectory(request.group, request.sample, [65 + 10 * request.group + request.sample], [-1.0], True, [True])


class Engine:
    """Ends completions one by one, the last of each group last, and waits for the first call to have been made."""

    def __init__(self, called: Callable[[], bool]) -> None:
        self.called = called
        self.was_called_early = False

    def submit(self, requests: list[Request], sampling: Sampling) -> None:
        self.left = sorted(map(answer, requests), key=lambda a: (-(a.group // 2), a.sample, a.group))

    def poll(self) -> list[Trajectory]:
        self.was_called_early = self.was_called_early or self.called()
        threading.Event().wait(0.05)
        return [self.left.pop(0)]


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScorerPool]:
    (tmp_path / "noting.py").write_text(REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    with ScorerPool([RewardConfig("noting:note")], ScoringConfig(num_workers=1)) as opened:
        yield opened


def test_groups_are_scored_while_others_are_generated(pool: ScorerPool, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    prompts = [Prompt(n, [1], "?", columns={"group": n, "path": str(calls)}) for n in range(GROUPS)]
    everything = slice(0, GROUPS * SIZE)
    requests = requests_of(prompts, SIZE, everything, 0, "test")
    engine = Engine(calls.exists)
    scoring = Scoring(pool, prompts, SIZE, everything, letters)
    completions = sample(engine, requests, Sampling(), scoring.on_finish)  # type: ignore[arg-type]
    scores = scoring.result()
    assert [(c.group, c.sample) for c in completions] == [(r.group, r.sample) for r in requests]
    assert scores.values[:, 0].tolist() == [float(c.ids[0]) for c in completions]
    assert engine.was_called_early, "the first groups' scores are asked for before the last have ended"
    groups = [list(map(int, line.split())) for line in calls.read_text().splitlines()]
    assert groups == [[g] * SIZE for g in (4, 5, 2, 3, 0, 1)], "a call has one group, as they end"


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 7, 30])
def test_a_group_is_scored_at_once_whatever_the_ranks(pool: ScorerPool, tmp_path: Path, num_ranks: int) -> None:
    calls = tmp_path / "calls"
    prompts = [Prompt(n, [1], "?", columns={"group": n, "path": str(calls)}) for n in range(GROUPS)]
    count = GROUPS * SIZE
    shares = [slice(count * rank // num_ranks, count * (rank + 1) // num_ranks) for rank in range(num_ranks)]
    all_requests = requests_of(prompts, SIZE, slice(0, count), 0, "test")
    drawn, scorings = [], []
    for share in shares:
        requests = requests_of(prompts, SIZE, share, 0, "test")
        assert requests == all_requests[share], "a request's noise does not depend on the share it is in"
        scorings.append(Scoring(pool, prompts, SIZE, share, letters))
        drawn += map(answer, requests)
        scorings[-1].on_finish(drawn[share])
    batch = gather_trajectories(OneRank(), prompts, drawn)  # type: ignore[arg-type]
    for scoring in scorings:
        scoring.complete(batch)
    values = [value for scoring in scorings for value in scoring.result().values[:, 0].tolist()]
    assert values == [float(completion.ids[0]) for completion in drawn], "in the order of the global batch"
    assert [n for scoring in scorings for n in range(count)[scoring.rows]] == list(range(count))
    groups = [list(map(int, line.split())) for line in calls.read_text().splitlines()]
    assert sorted(groups) == [[g] * SIZE for g in range(GROUPS)]
