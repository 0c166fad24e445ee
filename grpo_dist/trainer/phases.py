"""The phases of a step: shown, watched and timed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..distributed.device import MemoryPeaks
from ..distributed.watch import Watch
from ..monitoring.console import Display


class Phases:
    """Call it with a phase's name for a context that times the phase, tells who watches, and notes its peak memory."""

    def __init__(self, display: Display, watch: Watch, device: torch.device) -> None:
        self._display, self._watch = display, watch
        self._seconds: dict[str, float] = {}
        self._memory = MemoryPeaks(device)
        self.sampled_tokens = 0
        """Tokens that all ranks have sampled in the phase `rollout` since the last call of `metrics`."""

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Inside, the phase `name`; the same name may come several times in a step."""
        self._display.phase(name)
        self._watch.phase = name
        start = time.perf_counter()
        try:
            with self._memory.phase(name), torch.profiler.record_function(name):
                yield
        finally:
            self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        """Add time to a phase, which this process need not have been in."""
        self._seconds[f"time/{name}"] = self._seconds.get(f"time/{name}", 0.0) + seconds

    def metrics(self) -> dict[str, float]:
        """Seconds and memory of each phase and the speed of the rollout, since the last call."""
        metrics = self._seconds | self._memory.metrics()
        if self.sampled_tokens:  # not where the batch came from a checkpoint
            seconds = metrics["time/rollout"] + metrics.get("time/overlapped", 0.0)
            metrics["rollout/tokens_per_second"] = self.sampled_tokens / seconds
        self._seconds, self.sampled_tokens = {}, 0
        return metrics
