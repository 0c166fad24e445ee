"""What a rank reports of itself, and which rank is the cause where nothing moves. Pure: no store, no clock, no log.

Ranks wait for one another in collectives. Where one rank stands still, all of them soon stand still. Two counters find
the one that the others wait for: `safe_points` grows at every safe point, and `collectives_entered` grows at every
collective. The collectives are the same sequence on all ranks, so the others wait for the rank that has entered the
fewest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Heartbeat:
    """What a rank reports of itself twice a second."""

    clock_seconds: float
    """Clock of the thread that reports. It stands still where the process does."""
    safe_points: float
    """Safe points that the main thread has passed."""
    collectives_entered: int
    """Collectives that the main thread has entered."""
    phase: str
    stack: str
    """Where the main thread is."""

    @property
    def is_in_collective(self) -> bool:
        """Whether the main thread is inside a collective, as far as Python shows."""
        return "torch/distributed/" in self.stack


@dataclass(frozen=True)
class RankStatus:
    """A rank's last heartbeat, and when each part of it last changed, in seconds of the observer's clock."""

    heartbeat: Heartbeat
    clock_changed: float
    moved: float
    """When it last passed a safe point or entered a collective."""
    entered: float
    """When it last entered a collective."""


def observed(before: RankStatus | None, heartbeat: Heartbeat, now: float) -> RankStatus:
    """The status of a rank after one more look at its heartbeat."""
    if before is None:
        return RankStatus(heartbeat, now, now, now)
    last = before.heartbeat
    has_entered = heartbeat.collectives_entered != last.collectives_entered
    has_moved = has_entered or heartbeat.safe_points != last.safe_points
    return RankStatus(
        heartbeat,
        now if heartbeat.clock_seconds != last.clock_seconds else before.clock_changed,
        now if has_moved else before.moved,
        now if has_entered else before.entered,
    )


def unobserved(status: RankStatus, seconds: float) -> RankStatus:
    """The status of a rank after some seconds in which nobody looked, which count as no time."""
    return replace(status, clock_changed=status.clock_changed + seconds, moved=status.moved + seconds,
                   entered=status.entered + seconds)  # fmt: skip


Stalled = dict[int, Literal["process", "main thread"]]


def stalled(statuses: Mapping[int, RankStatus], now: float, timeout_seconds: float) -> Stalled:
    """The ranks that stop the run, and what of each stands still; empty while something moves.

    A process is stalled where its clock stands still for the time-out. Main threads are stalled where no rank has
    moved for so long: as long as one moves, the others may wait for its work.
    """
    silent = [rank for rank, status in statuses.items() if now - status.clock_changed > timeout_seconds]
    if silent:
        return dict.fromkeys(silent, "process")
    if not statuses or any(now - status.moved <= timeout_seconds for status in statuses.values()):
        return {}
    last = behind(statuses)
    outside = [rank for rank in last if not statuses[rank].heartbeat.is_in_collective]
    return dict.fromkeys(outside or last, "main thread")


def behind(statuses: Mapping[int, RankStatus]) -> list[int]:
    """The ranks that have entered the fewest collectives."""
    fewest = min(status.heartbeat.collectives_entered for status in statuses.values())
    return [rank for rank, status in statuses.items() if status.heartbeat.collectives_entered == fewest]


def slow(statuses: Mapping[int, RankStatus], now: float, seconds: float) -> list[int]:
    """The ranks that all others have waited for, for at least `seconds`."""
    last = behind(statuses) if statuses else []
    if len(last) == len(statuses) or now - max(status.entered for status in statuses.values()) < seconds:
        return []
    return last
