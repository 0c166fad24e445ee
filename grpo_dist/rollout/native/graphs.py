"""A step of decoding as a CUDA graph: what costs a small model its time on a GPU is the launching of its kernels.

A step that makes the host wait cannot be captured, and a capture that fails leaves torch's allocator believing that it
goes on. So the question is asked of a step that runs as it is, before any is captured.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

WARM_UP_STEPS = 1
"""Steps taken eagerly after a change: libraries allocate and choose kernels in their first call."""


class CannotCapture(RuntimeError):
    """A step waits for the device, so that no graph can hold it."""


def run_without_waiting(function: Callable[[], None]) -> None:
    """Call a function that must not make the host wait for the device. Raises CannotCapture where it does."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        function()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        raise CannotCapture(str(error).splitlines()[0]) from error
    finally:
        torch.cuda.set_sync_debug_mode(before)


@cache
def _stream() -> torch.cuda.Stream:
    """The one for captures. cuBLAS keeps 32 MiB of the GPU for every stream that it was ever called on."""
    return torch.cuda.Stream()


class Graphs:
    """Captured calls, which share one pool of memory: it lives as long as one of them, and is gone with the last."""

    def __init__(self) -> None:
        self.pool, self.stream = torch.cuda.graph_pool_handle(), _stream()

    def captured(self, function: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """The kernels of a call, none of which runs now; `function` has run before, and works in place."""
        graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            # thread_local: scoring threads may use the device meanwhile
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                function()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self.stream)
        return graph


class Replayed:
    """A function of no arguments that works in place on the same tensors, as long as their version stays the same."""

    def __init__(self, function: Callable[[], None], version: Callable[[], int]) -> None:
        self.function, self.version = function, version
        self.graph: torch.cuda.CUDAGraph | None = None
        self.captured = -1
        self.eager_steps = 0
        self.is_checked = False

    def __call__(self) -> None:
        """Do the work once. Raises CannotCapture."""
        now = self.version()
        if now != self.captured:
            self.graph, self.captured, self.eager_steps = None, now, 0
        if self.graph is not None:
            self.graph.replay()
        elif self.eager_steps < WARM_UP_STEPS:
            self.eager_steps += 1
            self.function()
        elif not self.is_checked:
            run_without_waiting(self.function)
            self.is_checked = True
        else:
            self.graph = Graphs().captured(self.function)  # the pool of the one before went with it
            self.graph.replay()


class Sizes:
    """A function of sizes that works in place on the same tensors: one graph for each size that comes up."""

    def __init__(self, function: Callable[[int, int], None]) -> None:
        self.function, self.graphs = function, Graphs()
        self.known: dict[tuple[int, ...], torch.cuda.CUDAGraph | None] = {}
        self.is_checked = False

    def __call__(self, *size: int) -> None:
        """Do the work once. Raises CannotCapture."""
        if size not in self.known:
            self.known[size] = None
            self.function(*size)
        elif not self.is_checked:
            run_without_waiting(lambda: self.function(*size))
            self.is_checked = True
        else:
            graph = self.known[size]
            if graph is None:
                graph = self.known[size] = self.graphs.captured(lambda: self.function(*size))
            graph.replay()
