"""The phases of a step: shown, watched and timed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..distributed.device import MemoryPeaks
from ..distributed.watch import Watch
from ..monitoring.console import Display
from ..monitoring.metrics import Clock


class Phases:
    """Call it with a phase's name for a context that times the phase, tells who watches, and notes its peak memory."""

    def __init__(self, display: Display, watch: Watch, device: torch.device) -> None:
        self._display, self._watch = display, watch
        self._clock, self._memory = Clock(), MemoryPeaks(device)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Inside, the phase `name`; the same name may come several times in a step."""
        self._display.phase(name)
        self._watch.phase = name
        with self._clock.phase(name), self._memory.phase(name):
            yield

    def metrics(self) -> dict[str, float]:
        """Seconds and memory of each phase since the last call."""
        metrics = self._clock.seconds | self._memory.metrics()
        self._clock.seconds = {}
        return metrics
