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
        self.sampled_tokens = 0
        """Tokens that all ranks have sampled in the phase `rollout` since the last call of `metrics`."""

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Inside, the phase `name`; the same name may come several times in a step."""
        self._display.phase(name)
        self._watch.phase = name
        with self._clock.phase(name), self._memory.phase(name):
            yield

    def add(self, name: str, seconds: float) -> None:
        """Add time to a phase that this process was not in."""
        self._clock.add(name, seconds)

    def metrics(self) -> dict[str, float]:
        """Seconds and memory of each phase and the speed of the rollout, since the last call."""
        metrics = self._clock.seconds | self._memory.metrics()
        if self.sampled_tokens:  # not where the batch came from a checkpoint
            seconds = metrics["time/rollout"] + metrics.get("time/overlapped", 0.0)
            metrics["rollout/tokens_per_second"] = self.sampled_tokens / seconds
        self._clock.seconds, self.sampled_tokens = {}, 0
        return metrics
