"""Stops, hangs and deaths, noticed on every rank within a second of any one of them noticing.

A thread on each rank beats its heart into a small key-value store that rank 0 serves, and reads there whether anybody
has been asked to stop. Signals and the time limit only raise flags; the main thread looks at them at safe points,
where the run can be saved. Rank 0 also sees which rank the others wait for, and ends a run in which nothing moves.
Nothing here touches the device or a collective of the training itself.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import astuple
from datetime import timedelta
from types import FrameType

import torch.distributed as dist

from .heartbeat import Beat, Sight, look, slow, stuck

log = logging.getLogger(__name__)

PERIOD_SECONDS = 0.5
SAME_SIGNAL_SECONDS = 3.0
"""A terminal's Ctrl-C reaches the ranks and their launcher, which passes it on: that is one wish, not two."""
_NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
SLOW_SECONDS = 60.0
"""A rank that the others have waited for as long as this is named in the log; again after twice the time, and so on."""


class Interrupted(Exception):
    """The run was asked to stop; its message says by what. Raised at safe points only."""


class Watch:
    """One rank's eye on the others; `requested` says why to stop, or is None."""

    def __init__(
        self, rank: int, num_ranks: int, store: dist.Store | None, max_seconds: float | None,
        hang_timeout_seconds: float, meetings: Callable[[], int],
    ) -> None:  # fmt: skip
        """Begin to watch; `meetings` says how many collectives this rank has entered."""
        self.rank, self.num_ranks, self.store = rank, num_ranks, store
        self.requested: str | None = None
        self.phase = "start"
        self._hang_timeout_seconds = hang_timeout_seconds
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self._max_seconds = max_seconds
        self._launcher = os.getppid() if "LOCAL_RANK" in os.environ else None
        self._main_thread = threading.main_thread().ident
        self._meetings, self._checks, self._is_patient = meetings, 0, False
        self._sights: dict[int, Sight] = {}
        self._slow_seconds = SLOW_SECONDS
        self._ended = threading.Event()
        self._previous = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        self._first_signal: float | None = None
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise Interrupted on this rank alone, inside a phase that ends in a collective of statuses."""
        self._checks += 1
        if self.requested:
            raise Interrupted(self.requested)

    @contextmanager
    def patience(self) -> Iterator[None]:
        """Inside, the main thread may stand still for long, as in writing a large file; its process may not."""
        self._is_patient = True
        try:
            yield
        finally:
            self._is_patient = False

    def end_all(self, reason: str) -> None:
        """Let the other ranks end now, from their own threads: they may stand in a call that no signal interrupts."""
        self._ended.set()
        self._thread.join()
        if self.store is not None:
            with suppress(RuntimeError, OSError):  # where rank 0 is gone, the others have seen it
                self.store.set("end", reason)
            time.sleep(4 * PERIOD_SECONDS)  # until all have ended: once this rank is gone, their collectives fail too

    def close(self) -> None:
        """Stop watching, and give the signals back."""
        self._ended.set()
        self._thread.join()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first_signal is None:
            self._first_signal = now
            self.requested = f"rank {self.rank} received {signal.Signals(number).name}"
        elif now - self._first_signal > SAME_SIGNAL_SECONDS:
            os._exit(128 + number)  # asked twice: at once, which harms no checkpoint

    def _watch(self) -> None:
        while not self._ended.wait(PERIOD_SECONDS):
            if self._launcher is not None and os.getppid() != self._launcher:
                self._abort("the launcher is gone")
            if self._deadline is not None and time.monotonic() > self._deadline and not self.requested:
                self.requested = f"train.max_time ({self._max_seconds:.0f} s) is reached"
            try:
                self._exchange()
            except (RuntimeError, OSError) as error:
                if not self._ended.is_set():
                    self._abort(f"rank 0 does not answer any more ({str(error).splitlines()[0]}). {self._told(0)}")

    def _exchange(self) -> None:
        """Tell the others of this rank, and learn of them what matters."""
        own = self._beat()
        # everybody looks at rank 0, and rank 0 at everybody: traffic grows with the ranks, not with their square
        beats = {self.rank: own} if self.rank == 0 else {}
        if self.store is not None:
            if self.requested:
                self.store.set("stop", self.requested)
            elif self.store.check(["stop"]):
                self.requested = self.store.get("stop").decode()
            self.store.set(f"beat/{self.rank}", json.dumps(astuple(own)))
            for other in range(1, self.num_ranks) if self.rank == 0 else (0,):
                if self.store.check([f"beat/{other}"]):
                    beats[other] = Beat(*json.loads(self.store.get(f"beat/{other}")))
            if self.store.check(["end"]):
                self._abort(self.store.get("end").decode())
        now = time.monotonic()
        self._sights = {rank: look(self._sights.get(rank), beat, now) for rank, beat in beats.items()}
        self._judge(now)

    def _beat(self) -> Beat:
        stack = stack_of(sys._current_frames().get(self._main_thread or 0))
        meetings, now = self._meetings(), time.monotonic()
        return Beat(now, now if self._is_patient else self._checks + meetings, meetings, self.phase, stack)

    def _judge(self, now: float) -> None:
        """End the run where it hangs, and name the rank that the others wait for."""
        blamed = stuck(self._sights, now, self._hang_timeout_seconds)
        sees_all = len(self._sights) == self.num_ranks  # else somebody may be moving whom it does not see
        if "process" in blamed.values() or (blamed and sees_all):
            advice = "" if "process" in blamed.values() else "If this was work, raise train.hang_timeout_seconds\n"
            self._abort("".join(
                f"rank {rank} has not moved for {self._hang_timeout_seconds:.0f} s. {self._told(rank)}"
                for rank in blamed) + advice)  # fmt: skip
        waited_for = slow(self._sights, now, self._slow_seconds) if sees_all else []
        for rank in waited_for:
            log.warning("rank %d is in the phase %r, and the others have waited for it for %.0f s", rank,
                        self._sights[rank].beat.phase, self._slow_seconds)  # fmt: skip
        if waited_for:
            self._slow_seconds *= 2
        elif not slow(self._sights, now, SLOW_SECONDS):
            self._slow_seconds = SLOW_SECONDS

    def _told(self, other: int) -> str:
        if other not in self._sights:
            return "It never told where it was."
        beat = self._sights[other].beat
        return f"It was last seen in the phase {beat.phase!r}, at:\n{beat.stack}"

    def _abort(self, reason: str) -> None:
        """End this rank now; the launcher then ends the others, whose own watch does so where they hang."""
        log.error("rank %d ends: %s", self.rank, reason)
        logging.shutdown()
        if self.rank == 0 and self.store is not None:
            self.store.set("end", reason)
            time.sleep(2 * PERIOD_SECONDS)
        os._exit(1)


def stack_of(frame: FrameType | None) -> str:
    """The innermost six calls, the last one last.

    Without the lines' text, unlike `traceback`: that would keep every source file it has ever met in memory.
    """
    calls: list[str] = []
    while frame is not None and len(calls) < 6:
        code = frame.f_code
        calls.insert(0, f'  File "{code.co_filename}", line {frame.f_lineno}, in {code.co_name}\n')
        frame = frame.f_back
    return "".join(calls)


def serve_store(rank: int, num_ranks: int, timeout_seconds: float) -> dist.Store | None:
    """The store all ranks share, served by rank 0 on a free port; None for one rank. A collective."""
    if num_ranks == 1:
        return None
    timeout = timedelta(seconds=timeout_seconds)
    served = None
    if rank == 0:
        served = dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=timeout)
    address = [(os.environ.get("MASTER_ADDR") or socket.gethostname(), served.port if served else 0)]
    dist.broadcast_object_list(address, src=0)
    return served or dist.TCPStore(*address[0], is_master=False, timeout=timeout)
