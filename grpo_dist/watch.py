"""Stops, hangs and deaths, noticed on every rank within a second of any one of them noticing.

A thread on each rank beats its heart into a small key-value store that rank 0 serves, and reads there whether anybody
has been asked to stop. Signals and the time limit only raise flags; the main thread looks at them at safe points,
where the run can be saved. Nothing here touches the device or a collective of the training itself.
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
import traceback
from datetime import timedelta
from types import FrameType

import torch.distributed as dist

log = logging.getLogger(__name__)

PERIOD_SECONDS = 0.5
SAME_SIGNAL_SECONDS = 3.0
"""A terminal's Ctrl-C reaches the ranks and their launcher, which passes it on: that is one wish, not two."""
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))


class Interrupted(Exception):
    """The run was asked to stop; its message says by what. Raised at safe points only."""


class Watch:
    """One rank's eye on the others; `requested` says why to stop, or is None."""

    def __init__(self, rank: int, num_ranks: int, store: dist.Store | None, max_seconds: float | None,
                 hang_timeout_seconds: float) -> None:  # fmt: skip
        self.rank, self.num_ranks, self.store = rank, num_ranks, store
        self.requested: str | None = None
        self.phase = "start"
        self._hang_timeout_seconds = hang_timeout_seconds
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self._max_seconds = max_seconds
        self._launcher = os.getppid() if "LOCAL_RANK" in os.environ else None
        self._main_thread = threading.main_thread().ident
        self._beats: dict[int, tuple[str, float]] = {}
        self._ended = threading.Event()
        self._previous = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        self._first_signal: float | None = None
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise Interrupted on this rank alone, inside a phase that ends in a collective of statuses."""
        if self.requested:
            raise Interrupted(self.requested)

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
            if self.store is not None:
                try:
                    self._exchange(self.store)
                except (RuntimeError, OSError) as error:
                    if not self._ended.is_set():
                        self._abort(f"rank 0 does not answer any more ({str(error).splitlines()[0]}). "
                                    f"{self._told(0)}")  # fmt: skip

    def _exchange(self, store: dist.Store) -> None:
        """Tell the others of this rank, and learn of them what matters."""
        if self.requested:
            store.set("stop", self.requested)
        elif store.check(["stop"]):
            self.requested = store.get("stop").decode()
        frame = sys._current_frames().get(self._main_thread or 0)
        stack = "".join(traceback.format_stack(frame)[-6:]) if frame else ""
        store.set(f"beat/{self.rank}", json.dumps([time.monotonic(), self.phase, stack]))
        # everybody looks at rank 0, and rank 0 at everybody: traffic grows with the ranks, not with their square
        for other in range(self.num_ranks) if self.rank == 0 else (0,):
            if other == self.rank or not store.check([f"beat/{other}"]):
                continue
            beat = store.get(f"beat/{other}").decode()
            if beat != self._beats.get(other, ("",))[0]:
                self._beats[other] = (beat, time.monotonic())
            elif time.monotonic() - self._beats[other][1] > self._hang_timeout_seconds:
                self._abort(f"rank {other} has not moved for {self._hang_timeout_seconds:.0f} s. {self._told(other)}")

    def _told(self, other: int) -> str:
        if other not in self._beats:
            return "It never told where it was."
        _, phase, stack = json.loads(self._beats[other][0])
        return f"It was last seen in the phase {phase!r}, at:\n{stack}"

    def _abort(self, reason: str) -> None:
        """End this rank now; the launcher then ends the others."""
        log.error("rank %d ends: %s", self.rank, reason)
        logging.shutdown()
        os._exit(1)


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
