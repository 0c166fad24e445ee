"""Scoring while others are generated: which calls are made when, and that every score lands in its place."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from grpo_dist.batch import Completion, Prompt
from grpo_dist.config import RewardConfig, ScoringConfig
from grpo_dist.generation import generate_and_score, requests_of
from grpo_dist.rewards.pool import ScorerPool
from grpo_dist.rollout import Request, Sampling

REWARD = '''
from pathlib import Path

def note(completion_ids, group, path, **_):
    """The completion's only token; each call is written down as the groups it was made with."""
    with open(path[0], "a") as file:
        file.write(" ".join(map(str, group)) + "\\n")
    return [float(ids[0]) for ids in completion_ids]
'''
GROUPS, SIZE = 6, 4


class Letters:
    """A tokenizer of one letter a token."""

    def batch_decode(self, rows: list[list[int]], **_: Any) -> list[str]:
        return ["".join(map(chr, row)) for row in rows]


class Engine:
    """Ends completions one by one, the last of each group last, and waits for the first call to have been made."""

    def __init__(self, called: Callable[[], bool]) -> None:
        self.called = called
        self.was_called_early = False

    def generate(
        self, model: nn.Module, requests: list[Request], sampling: Sampling,
        on_finish: Callable[[list[Completion]], None] | None = None, check: Callable[[], None] | None = None,
    ) -> list[Completion]:  # fmt: skip
        answers = [Completion(r.slot, r.sample, [65 + 10 * r.slot + r.sample], [-1.0], True) for r in requests]
        assert on_finish
        for answer in sorted(answers, key=lambda a: (-(a.slot // 2), a.sample, a.slot)):
            self.was_called_early = self.was_called_early or self.called()
            on_finish([answer])
            threading.Event().wait(0.05)
        return answers


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScorerPool]:
    (tmp_path / "noting.py").write_text(REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    with ScorerPool([RewardConfig("noting:note")], ScoringConfig(num_workers=1)) as opened:
        yield opened


def test_groups_are_scored_while_others_are_generated(pool: ScorerPool, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    prompts = [Prompt(n, [1], "?", columns={"group": n, "path": str(calls)}) for n in range(GROUPS)]
    requests = requests_of(prompts, SIZE, lambda n: slice(0, n), 0, "test")
    engine = Engine(calls.exists)
    completions, pending = generate_and_score(engine, nn.Identity(), requests, prompts, Sampling(), pool, Letters())
    scores = pending.result()
    assert [(c.slot, c.sample) for c in completions] == [(r.slot, r.sample) for r in requests]
    assert scores.values[:, 0].tolist() == [float(c.ids[0]) for c in completions]
    assert engine.was_called_early, "the first groups' scores are asked for before the last have ended"
    groups = [list(map(int, line.split())) for line in calls.read_text().splitlines()]
    assert sorted(g for call in groups for g in call) == sorted(list(range(GROUPS)) * SIZE)
    # a worker is handed half of all items at a time, in whole groups as they end: 4 and 5, 2 and 3, 0 and 1
    assert groups == [[4] * 4 + [5] * 4 + [2] * 4, [3] * 4 + [0] * 4 + [1] * 4]


def test_a_share_that_cuts_groups(pool: ScorerPool, tmp_path: Path) -> None:
    prompts = [Prompt(n, [1], "?", columns={"group": n, "path": str(tmp_path / "calls")}) for n in range(GROUPS)]
    requests = requests_of(prompts, SIZE, lambda n: slice(2, n - 3), 0, "test")
    assert len(requests) == GROUPS * SIZE - 5
    whole = requests_of(prompts, SIZE, lambda n: slice(0, n), 0, "test")
    assert requests == whole[2:-3], "a request's noise does not depend on the share it is in"
    engine = Engine(lambda: False)
    completions, pending = generate_and_score(engine, nn.Identity(), requests, prompts, Sampling(), pool, Letters())
    assert pending.result().values[:, 0].tolist() == [float(c.ids[0]) for c in completions]


def test_no_requests(pool: ScorerPool) -> None:
    completions, pending = generate_and_score(Engine(lambda: False), nn.Identity(), [], [], Sampling(), pool, Letters())
    assert completions == [] and pending.result().values.shape == (0, 1)
