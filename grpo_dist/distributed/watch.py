"""Stops, hangs and deaths: every rank knows of them within a second of the first rank that does.

A thread on each rank writes a heartbeat into a small key-value store that rank 0 serves, and reads there whether a rank
was asked to stop. Signals and the time limit only raise flags. The main thread looks at the flags at safe points, where
the run can be saved. Rank 0 also sees which rank the others wait for, and ends a run in which nothing moves. Nothing
here touches the device or a collective of the training itself.
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

from .heartbeat import Heartbeat, RankStatus, observed, slow, stalled, unobserved

log = logging.getLogger(__name__)

PERIOD_SECONDS = 0.5
SAME_SIGNAL_SECONDS = 3.0
"""A terminal's Ctrl-C reaches the ranks and their launcher, which passes it on: that is one request, not two."""
STOPPED_SECONDS = 10.0
"""A rank that has not looked at the others for as long as this was itself stopped: by Ctrl-Z, or with its container."""
_NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
SLOW_SECONDS = 60.0
"""The log names a rank that the others have waited for as long as this, again after twice the time, and so on."""


class Interrupted(Exception):
    """The run stops, to be continued; the message says by what. Raised at safe points only."""

    def __init__(self, reason: str, *, failed: bool = False) -> None:
        """`failed` where the run was not asked to stop but cannot go on, as without its servers."""
        super().__init__(reason)
        self.failed = failed


class Watch:
    """One rank's watch over the others; `requested` is the reason to stop, or None."""

    def __init__(
        self, rank: int, num_ranks: int, store: dist.Store | None, max_seconds: float | None,
        hang_timeout_seconds: float, collectives_entered: Callable[[], int],
    ) -> None:  # fmt: skip
        """Begin to watch; `collectives_entered` returns how many collectives this rank has entered."""
        self.rank, self.num_ranks, self.store = rank, num_ranks, store
        self.requested: str | None = None
        self.phase = "start"
        self._hang_timeout_seconds = hang_timeout_seconds
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self._max_seconds = max_seconds
        self._launcher = os.getppid() if "LOCAL_RANK" in os.environ else None
        self._main_thread = threading.main_thread().ident
        self._collectives_entered, self._checks, self._is_patient = collectives_entered, 0, False
        self._statuses: dict[int, RankStatus] = {}
        self._slow_seconds = SLOW_SECONDS
        self._looked = time.monotonic()
        self._ended = threading.Event()
        # `nohup` ignores SIGHUP, so that a run survives its terminal; a script's `&` ignores SIGINT, which is heard
        heard = [each for each in SIGNALS if each.name != "SIGHUP" or signal.getsignal(each) is not signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._on_signal) for number in heard}
        self._first_signal: float | None = None
        with suppress(RuntimeError, OSError):  # without rank 0, which the thread finds out too
            self._tell(self._heartbeat())  # now: a rank that stops before its first one would not be missed
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise Interrupted on this rank alone, inside a phase that ends in a collective of statuses."""
        self._checks += 1
        if self.requested:
            raise Interrupted(self.requested)

    @contextmanager
    def patience(self) -> Iterator[None]:
        """Inside, the main thread may stand still for long, as while it writes a large file. Its process may not."""
        self._is_patient = True
        try:
            yield
        finally:
            self._is_patient = False

    def end_all(self, reason: str) -> None:
        """End the other ranks now, from their own threads: they may be in a call that no signal interrupts."""
        self._ended.set()
        self._thread.join()
        if self.store is not None:
            with suppress(RuntimeError, OSError):  # without rank 0, the others have ended
                self.store.set("end", reason)
            time.sleep(4 * PERIOD_SECONDS)  # until all have ended: once this rank is gone, their collectives fail too

    def close(self) -> None:
        """Stop watching, and restore the handlers of signals."""
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
            os._exit(128 + number)  # a second request ends the process at once, which harms no checkpoint

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
                    self._abort(f"rank 0 does not answer any more ({str(error).splitlines()[0]}). {self._last_seen(0)}")

    def _exchange(self) -> None:
        """Write this rank's heartbeat, and read those of the others and whether the run is to stop."""
        own = self._heartbeat()
        # all look at rank 0, and rank 0 looks at all: traffic grows with the number of ranks, not with its square
        heartbeats = {self.rank: own} if self.rank == 0 else {}
        if self.store is not None:
            if self.requested:
                self.store.set("stop", self.requested)
            elif self.store.check(["stop"]):
                self.requested = self.store.get("stop").decode()
            self._tell(own)
            for other in range(1, self.num_ranks) if self.rank == 0 else (0,):
                if self.store.check([f"heartbeat/{other}"]):
                    heartbeats[other] = Heartbeat(*json.loads(self.store.get(f"heartbeat/{other}")))
            if self.store.check(["end"]):
                self._abort(self.store.get("end").decode())
        now = time.monotonic()
        if (missed := now - self._looked) > STOPPED_SECONDS:
            self._statuses = {rank: unobserved(status, missed) for rank, status in self._statuses.items()}
        self._looked = now
        self._statuses = {rank: observed(self._statuses.get(rank), each, now) for rank, each in heartbeats.items()}
        self._end_if_stalled(now)
        self._name_slow_ranks(now)

    def _tell(self, heartbeat: Heartbeat) -> None:
        if self.store is not None:
            self.store.set(f"heartbeat/{self.rank}", json.dumps(astuple(heartbeat)))

    def _heartbeat(self) -> Heartbeat:
        stack = stack_of(sys._current_frames().get(self._main_thread or 0))
        entered, now = self._collectives_entered(), time.monotonic()
        return Heartbeat(now, now if self._is_patient else self._checks + entered, entered, self.phase, stack)

    @property
    def _sees_all(self) -> bool:
        """Whether every rank has a status: a rank without one may be moving."""
        return len(self._statuses) == self.num_ranks

    def _end_if_stalled(self, now: float) -> None:
        """End the run where it hangs."""
        ranks = stalled(self._statuses, now, self._hang_timeout_seconds)
        if "process" in ranks.values() or (ranks and self._sees_all):
            advice = "" if "process" in ranks.values() else "If this was work, raise train.hang_timeout_seconds\n"
            self._abort("".join(
                f"rank {rank} has not moved for {self._hang_timeout_seconds:.0f} s. {self._last_seen(rank)}"
                for rank in ranks) + advice)  # fmt: skip

    def _name_slow_ranks(self, now: float) -> None:
        """Name in the log the rank that the others wait for."""
        waited_for = slow(self._statuses, now, self._slow_seconds) if self._sees_all else []
        for rank in waited_for:
            log.warning("rank %d is in the phase %r, and the others have waited for it for %.0f s", rank,
                        self._statuses[rank].heartbeat.phase, self._slow_seconds)  # fmt: skip
        if waited_for:
            self._slow_seconds *= 2
        elif not slow(self._statuses, now, SLOW_SECONDS):
            self._slow_seconds = SLOW_SECONDS

    def _last_seen(self, other: int) -> str:
        if other not in self._statuses:
            return "It has sent no heartbeat."
        heartbeat = self._statuses[other].heartbeat
        return f"It was last seen in the phase {heartbeat.phase!r}, at:\n{heartbeat.stack}"

    def _abort(self, reason: str) -> None:
        """End this rank now. The launcher then ends the others; their own watch ends those that hang."""
        log.error("rank %d ends: %s", self.rank, reason)
        logging.shutdown()
        if self.rank == 0 and self.store is not None:
            self.store.set("end", reason)
            time.sleep(2 * PERIOD_SECONDS)
        os._exit(1)


def stack_of(frame: FrameType | None) -> str:
    """The innermost six calls, the last one last.

    The lines' text is left out: `traceback` would keep every source file that it reads in memory.
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
