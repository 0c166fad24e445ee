"""Mirrors of metrics.jsonl: each tracker in a thread of its own, so that none can hold up or end a run.

A tracker that raises is left alone from then on, with one line in the log; one that hangs is left behind.
"""

from __future__ import annotations

import logging
import queue
import threading
from pathlib import Path

from accelerate.tracking import LOGGER_TYPE_TO_CLASS

log = logging.getLogger(__name__)

MOST_WAITING = 10_000
CLOSE_SECONDS = 10.0


class Mirror:
    """One tracker, by Accelerate's name."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name, self.directory = name, directory
        self._waiting: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(MOST_WAITING)
        self._broken = False
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Hand over one step's metrics; returns at once."""
        self._put((step, values))

    def close(self) -> None:
        """Wait for what was handed over, for a while."""
        self._put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            log.warning("tracker %s did not end within %.0f s and is left behind; metrics.jsonl has everything",
                        self.name, CLOSE_SECONDS)  # fmt: skip

    def _put(self, entry: tuple[int, dict[str, float]] | None) -> None:
        if self._broken:
            return
        try:
            self._waiting.put_nowait(entry)
        except queue.Full:
            self._broken = True
            log.warning("tracker %s has not taken %d entries and gets no more; metrics.jsonl has everything", self.name,
                        MOST_WAITING)  # fmt: skip

    def _work(self) -> None:
        try:
            kind = LOGGER_TYPE_TO_CLASS[self.name]
            tracker = kind(self.name, **({"logging_dir": self.directory} if kind.requires_logging_directory else {}))
            tracker.start()
            while (entry := self._waiting.get()) is not None:
                tracker.log(entry[1], step=entry[0])
            tracker.finish()
        except Exception as error:  # whatever a tracker does, the run goes on
            self._broken = True
            log.warning("tracker %s failed and gets no more (%s: %s); metrics.jsonl has everything", self.name,
                        type(error).__name__, error)  # fmt: skip
