"""What ranks tell of themselves, and who of them is to blame where nothing goes on. Pure: no store, no clock, no log.

Ranks wait for one another in collectives, so where one stands still all of them soon do. Two counters tell that one
from the others: `moves` grows at every safe point, and `meetings` at every collective a rank enters, which is the same
sequence on all ranks. Who has entered the fewest is whom the others wait for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Beat:
    """What a rank tells of itself twice a second."""

    tick: float
    """Clock of the thread that tells: it stands still where the whole process does."""
    moves: float
    """Safe points its main thread has passed."""
    meetings: int
    """Collectives its main thread has entered."""
    phase: str
    stack: str
    """Where its main thread is."""

    @property
    def is_waiting(self) -> bool:
        """Whether the main thread is inside a collective, as far as Python shows."""
        return "torch/distributed/" in self.stack


@dataclass(frozen=True)
class Sight:
    """A rank's last beat and when, by the observer's clock in seconds, each part of it was seen to change."""

    beat: Beat
    ticked: float
    moved: float
    met: float


def look(before: Sight | None, beat: Beat, now: float) -> Sight:
    """The sight of a rank after one more look at its beat."""
    if before is None:
        return Sight(beat, now, now, now)
    return Sight(
        beat,
        before.ticked if beat.tick == before.beat.tick else now,
        before.moved if (beat.moves, beat.meetings) == (before.beat.moves, before.beat.meetings) else now,
        before.met if beat.meetings == before.beat.meetings else now,
    )


Blame = dict[int, Literal["process", "main thread"]]


def stuck(sights: Mapping[int, Sight], now: float, timeout_seconds: float) -> Blame:
    """The ranks to blame, and what of each stands still; empty while something moves.

    A process is silent where its own beat stands still for the time-out. Main threads are stuck where none of the ranks
    seen has passed a safe point for so long; as long as one does, the others may be waiting for its work.
    """
    silent = [rank for rank, sight in sights.items() if now - sight.ticked > timeout_seconds]
    if silent:
        return dict.fromkeys(silent, "process")
    if not sights or any(now - sight.moved <= timeout_seconds for sight in sights.values()):
        return {}
    last = behind(sights)
    return dict.fromkeys([rank for rank in last if not sights[rank].beat.is_waiting] or last, "main thread")


def behind(sights: Mapping[int, Sight]) -> list[int]:
    """The ranks that have entered the fewest collectives."""
    fewest = min(sight.beat.meetings for sight in sights.values())
    return [rank for rank, sight in sights.items() if sight.beat.meetings == fewest]


def slow(sights: Mapping[int, Sight], now: float, seconds: float) -> list[int]:
    """The ranks that all others have been waiting for, for at least `seconds`."""
    last = behind(sights) if sights else []
    if len(last) == len(sights) or now - max(sight.met for sight in sights.values()) < seconds:
        return []
    return last
