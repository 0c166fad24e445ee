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
import sys
import threading
import time
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from pathlib import Path

from .cores import allowed_cores

log = logging.getLogger(__name__)

SPIN_COUNT = "GOMP_SPINCOUNT"
CHOSEN = "GRPO_DIST_SPINCOUNT"
"""The count that this package has set: a process that inherits it knows that no user did."""
LONG, SHORT = "20000", "1000"
"""Turns: 0.2 and 0.01 ms on an EPYC 9004. libgomp's own 300 thousand make a step 16 times as long beside other work."""
NUM_CORES = allowed_cores()
"""As libgomp counts its "available CPUs" when torch loads it; threads that torch binds may use fewer afterwards."""
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
    """Let threads spin for a short time, unless the user has said for how long."""
    global sets_count
    if environ.get(SPIN_COUNT) in (None, environ.get(CHOSEN)) and "OMP_WAIT_POLICY" not in environ:
        sets_count = True
        environ[SPIN_COUNT] = environ[CHOSEN] = SHORT


def allow_long(environ: MutableMapping[str, str]) -> None:
    """Let threads spin for longer in a program that has yet to import torch, and will then call `watch_spinning`."""
    if sets_count and "torch" not in sys.modules and _can_spin_less():
        environ[SPIN_COUNT] = environ[CHOSEN] = LONG


def _can_spin_less() -> bool:
    return bool(waits()) and NUM_CORES <= MOST_CORES


def waits(tasks: Path = Path("/proc/self/task")) -> dict[str, int]:
    """Nanoseconds that each thread of this process has waited for a core; empty where the kernel does not count them.

    `schedstat` holds nanoseconds on a core, nanoseconds of waiting, and turns (Linux, "Scheduler Statistics").
    """
    waited, on_core = {}, 0
    with suppress(OSError):
        for task in os.listdir(tasks):
            with suppress(OSError, ValueError):  # it has just ended
                with open(f"{tasks}/{task}/schedstat", "rb") as counts:
                    own, waited[task], *_ = map(int, counts.read().split())
                on_core += own
    return waited if on_core else {}


def seconds_between(before: dict[str, int], now: dict[str, int]) -> float:
    """How long the threads that live now have waited since; those that have ended take nothing with them."""
    return sum(max(0, waited - before.get(task, 0)) for task, waited in now.items()) / 1e9


def libgomp() -> ctypes.CDLL | None:
    """What torch's threads are started by; None where that is the OpenMP of LLVM or Intel (conda, LD_PRELOAD).

    There GOMP_SPINCOUNT means nothing, and threads of a team that has ended stay.
    """
    import torch

    for library in ctypes.CDLL(None), ctypes.CDLL(torch._C.__file__):  # where the linker looks, in its order
        if hasattr(library, "GOMP_parallel"):
            return None if hasattr(library, "kmp_set_blocktime") else library
    return None


def sleeping_team() -> Callable[[], None]:
    """Begin a team of OpenMP with more threads than there are cores, which sleep; returns what ends it."""
    ended, num_threads, library = threading.Event(), NUM_CORES + 1, libgomp()
    if library is None or not _can_start(2 * num_threads):  # others need some too
        return ended.set
    begin = library.GOMP_parallel

    def lead() -> None:
        nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)  # of a null pointer
        begin(nothing, None, ctypes.c_uint(num_threads), ctypes.c_uint(0))
        ended.wait()

    # libgomp ends a team when the thread that leads it ends
    threading.Thread(target=lead, name="sleeping-team", daemon=True).start()
    return ended.set


def _can_start(num_threads: int) -> bool:
    """Whether this process may have so many more threads: where it may not, libgomp ends it, and Python only raises."""
    ended, started = threading.Event(), []
    try:
        for _ in range(num_threads):
            thread = threading.Thread(target=ended.wait, daemon=True)
            thread.start()
            started.append(thread)
    except RuntimeError:
        log.warning("CPU: this process may not start %d more threads (ulimit -u, ulimit -v, pids.max): those that wait "
                    "for one another spin beside other work too. %s=%s lets them spin less", num_threads, SPIN_COUNT,
                    SHORT)  # fmt: skip
        return False
    finally:
        ended.set()
        for thread in started:
            thread.join()
    return True


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
            self._end_team()
            self._end_team = None
            if self._enough > FEWEST_FREE_PERIODS:
                log.info("CPU: the cores are free again; threads that wait for one another spin for a moment")


def watch_spinning() -> None:
    """From here on, to the end of the process, choose how long its threads spin; asked where `allow_long` was."""
    import torch

    if os.environ.get(SPIN_COUNT) != LONG or not sets_count or torch.get_num_threads() == 1 or libgomp() is None:
        return
    spinning = Spinning()

    def watch() -> None:
        then, before = time.monotonic(), waits()
        while True:
            time.sleep(PERIOD_SECONDS)
            now, waited = time.monotonic(), waits()
            spinning.look(seconds_between(before, waited) / (now - then))
            then, before = now, waited

    threading.Thread(target=watch, name="spinning", daemon=True).start()
