"""How long OpenMP's threads spin while they wait for one another: longer on a quiet machine than beside other work.

A thread that spins answers at once, and one that sleeps after tens of microseconds. But a thread that spins keeps its
core from others, perhaps from the thread that it waits for. libgomp reads its count of turns once, when torch loads it.
But it makes 100 turns at most while "there are more OpenMP threads than available CPUs" (its manual, GOMP_SPINCOUNT).
So a team of threads that sleep makes all others spin less, for as long as it lives.
Imports only the standard library: the count is set before torch is imported.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import time
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)

SPIN_COUNT = "GOMP_SPINCOUNT"
LONG, SHORT = "20000", "1000"
"""Turns: 0.2 and 0.01 ms on an EPYC 9004. libgomp's own 300 thousand make a step 16 times as long beside other work."""
MOST_CORES = 32
"""On more cores than these the count stays short: a sleeping team of that many threads is a lot."""
PERIOD_SECONDS = 0.5
BUSY, FREE = 0.4, 0.25
"""Threads that wait for a core, on average over a period. Two threads on two cores: 0.1 on a quiet machine; beside a
process that keeps a core busy, 0.8 to 0.9 if they spin and 0.55 to 0.8 if they do not."""
FEWEST_FREE_PERIODS, MOST_FREE_PERIODS = 2, 512

sets_count = False
"""Whether this package has set the count, not the user."""


def set_count(environ: MutableMapping[str, str]) -> None:
    """Set how long threads spin, unless the user has."""
    global sets_count
    if SPIN_COUNT not in environ and "OMP_WAIT_POLICY" not in environ:
        sets_count = True
        environ[SPIN_COUNT] = LONG if _can_spin_less() else SHORT


def _can_spin_less() -> bool:
    return waited_seconds() is not None and (os.cpu_count() or 1) <= MOST_CORES


def waited_seconds(tasks: Path = Path("/proc/self/task")) -> float | None:
    """Seconds that this process's living threads have waited for a core; None where the kernel does not count them.

    `schedstat` holds nanoseconds on a core, nanoseconds of waiting, and turns (Linux, "Scheduler Statistics").
    """
    on_core, waited = 0, 0
    with suppress(OSError):
        for task in tasks.iterdir():
            with suppress(OSError):  # it has just ended
                counts = (task / "schedstat").read_text(encoding="ascii").split()
                on_core, waited = on_core + int(counts[0]), waited + int(counts[1])
    return waited / 1e9 if on_core else None


def sleeping_team() -> Callable[[], None]:
    """Begin a team of OpenMP with more threads than there are cores, which sleep; returns what ends it."""
    ended = threading.Event()

    def lead() -> None:
        import torch

        openmp = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))  # with what it was linked to
        nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)  # of a null pointer
        openmp.GOMP_parallel(nothing, None, ctypes.c_uint((os.cpu_count() or 1) + 1), ctypes.c_uint(0))
        ended.wait()

    # libgomp ends a team when the thread that leads it ends
    threading.Thread(target=lead, name="sleeping-team", daemon=True).start()
    return ended.set


class Spinning:
    """Makes threads spin less until the machine was quiet for a second, and whenever it is busy."""

    def __init__(self, begin_team: Callable[[], Callable[[], None]] = sleeping_team) -> None:
        self._begin_team = begin_team
        self._end_team: Callable[[], None] | None = begin_team()
        self._free_periods, self._enough = 0, FEWEST_FREE_PERIODS

    def look(self, waiting: float) -> None:
        """Take note of how many threads waited for a core, on average over a period."""
        if self._end_team is None:
            if waiting > BUSY:
                self._end_team = self._begin_team()
                # a machine that is busy again and again is taken as busy for longer
                self._free_periods, self._enough = 0, min(2 * self._enough, MOST_FREE_PERIODS)
                log.info("CPU: %.1f threads of this process wait for a core; those that wait for one another sleep at "
                         "once", waiting)  # fmt: skip
            return
        self._free_periods = self._free_periods + 1 if waiting < FREE else 0
        if self._free_periods >= self._enough:
            self.end()
            if self._enough > FEWEST_FREE_PERIODS:
                log.info("CPU: the cores are free again; threads that wait for one another spin for a moment")

    def end(self) -> None:
        """Let the sleeping team go."""
        if self._end_team is not None:
            self._end_team()
            self._end_team = None


def watch_spinning(num_threads: int) -> Callable[[], None]:
    """Watch from here on how long this process's `num_threads` threads wait for cores; returns what ends the watch."""
    if not sets_count or num_threads == 1 or not _can_spin_less():
        return lambda: None
    ended, spinning = threading.Event(), Spinning()

    def watch() -> None:
        then, before = time.monotonic(), waited_seconds() or 0.0
        while not ended.wait(PERIOD_SECONDS):
            now, waited = time.monotonic(), waited_seconds() or 0.0
            spinning.look((waited - before) / (now - then))
            then, before = now, waited
        spinning.end()

    threading.Thread(target=watch, name="spinning", daemon=True).start()
    return ended.set
