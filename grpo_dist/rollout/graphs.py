"""A step of decoding as a CUDA graph: what costs a small model its time on a GPU is the launching of its kernels.

The step is captured when its sizes have changed and replayed until they change again. Sizes are coarse on purpose (the
cache grows in chunks and rows are dropped many at a time), so there are few captures a rollout; no size has to be
prepared for that does not come up.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

log = logging.getLogger(__name__)

WARM_UP_STEPS = 1
"""Steps taken eagerly after a change: libraries allocate and choose kernels in their first call."""


class Replayed:
    """A function of no arguments that works in place on the same tensors, as long as their version stays the same."""

    def __init__(self, function: Callable[[], None], version: Callable[[], int]) -> None:
        self.function, self.version = function, version
        self.graph: torch.cuda.CUDAGraph | None = None
        self.captured = -1
        self.eager_steps = 0
        self.can_capture = True

    def __call__(self) -> None:
        """Do the work once."""
        now = self.version()
        if now != self.captured:
            self.graph, self.captured, self.eager_steps = None, now, 0
        if self.graph is not None:
            self.graph.replay()
        elif self.eager_steps < WARM_UP_STEPS or not self.can_capture:
            self.eager_steps += 1
            self.function()
        else:
            self._capture()

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: scoring threads may use the device meanwhile
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.function()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # some models decide on the host what to compute
            self.can_capture = False
            torch.cuda.synchronize()
            log.warning("this model's decoding cannot be captured in a CUDA graph and runs kernel by kernel: %s",
                        str(error).splitlines()[0])  # fmt: skip
            self.function()
            return
        self.graph = graph
        graph.replay()
