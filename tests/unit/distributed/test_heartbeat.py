"""The rank that stops a run: not one that waits, and not one that is only slow."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable

import pytest

from grpo_dist.distributed.heartbeat import Heartbeat, RankStatus, observed, slow, stalled
from grpo_dist.distributed.watch import stack_of

pytestmark = pytest.mark.quick

COLLECTIVE = '  File "site-packages/torch/distributed/distributed_c10d.py", line 1, in all_reduce\n'


def observe(ranks: dict[int, Callable[[int], Heartbeat]], seconds: int) -> dict[int, RankStatus]:
    """The statuses on rank 0 after a look at the others each second."""
    statuses: dict[int, RankStatus] = {}
    for now in range(seconds + 1):
        statuses = {rank: observed(statuses.get(rank), heartbeat(now), now) for rank, heartbeat in ranks.items()}
    return statuses


def rank(
    *, ticks_until: int = 99, moves_until: int = 99, entered: Callable[[int], int] = lambda _: 7, stack: str = ""
) -> Callable[[int], Heartbeat]:
    """A rank whose process and whose main thread move up to a second each."""
    return lambda now: Heartbeat(min(now, ticks_until), min(now, moves_until), entered(now), "update", stack)


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ({0: rank(), 1: rank()}, {}),
        ({0: rank(moves_until=2), 1: rank()}, {}),  # waits for a rank that works
        ({0: rank(moves_until=2), 1: rank(ticks_until=3, moves_until=3)}, {1: "process"}),
        ({0: rank(moves_until=2, entered=lambda _: 8), 1: rank(moves_until=3)}, {1: "main thread"}),
        ({0: rank(moves_until=2), 1: rank(moves_until=3, entered=lambda _: 8)}, {0: "main thread"}),
        ({0: rank(moves_until=2), 1: rank(moves_until=3)}, {0: "main thread", 1: "main thread"}),
        ({0: rank(moves_until=2, stack=COLLECTIVE), 1: rank(moves_until=3)}, {1: "main thread"}),
        ({0: rank(moves_until=2)}, {0: "main thread"}),
        ({}, {}),
    ],
)  # fmt: skip
def test_stalled(ranks: dict[int, Callable[[int], Heartbeat]], expected: dict[int, str]) -> None:
    statuses = observe(ranks, 20)
    assert stalled(statuses, 20, 10) == expected
    assert stalled(statuses, 20, 30) == {}  # not yet


def test_slow_is_who_has_not_come_to_the_collective_the_others_are_in() -> None:
    late = {0: rank(entered=lambda now: 8 if now >= 5 else 7), 1: rank(), 2: rank(entered=lambda now: 8)}
    statuses = observe(late, 20)
    assert slow(statuses, 20, 15) == [1]
    assert slow(statuses, 20, 16) == []  # the last of the others came at 5
    assert slow(observe({0: rank(), 1: rank()}, 20), 20, 5) == []  # all in the same place
    assert slow({}, 20, 5) == []


def test_a_stack_names_the_innermost_calls_and_reads_no_source() -> None:
    def inner() -> str:
        return stack_of(sys._getframe())

    linecache.clearcache()
    calls = inner().splitlines()
    assert not linecache.cache
    assert len(calls) == 6 and calls[-1].endswith("in inner") and calls[-2].endswith("and_reads_no_source")
