"""The device, its clock and its kernels."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def clear() -> None:
    """Give back the memory of what is measured, and begin to count its peak anew."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def milliseconds(function: Callable[[], Any], repeats: int = 5, warm_up: int = 2) -> float:
    """Median time of a call, by device events."""
    for _ in range(warm_up):
        function()
    if DEVICE.type != "cuda":
        return -1.0
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return round(statistics.median(times), 3)


@contextmanager
def profiled(figures: dict[str, Any], name: str) -> Iterator[None]:
    """Count the device's kernels inside, and how long it was busy."""
    if DEVICE.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    begun = time.perf_counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        yield
        torch.cuda.synchronize()
    wall = time.perf_counter() - begun
    events = [e for e in profile.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(e.self_device_time_total for e in events) / 1e6
    top = sorted(events, key=lambda e: -e.self_device_time_total)[:12]
    figures[name] = {
        "kernels": sum(e.count for e in events),
        "busy_ms": round(busy * 1e3, 2),
        "wall_ms": round(wall * 1e3, 2),
        "top": {e.key[:60]: [e.count, round(e.self_device_time_total / 1e3, 2)] for e in top},
    }
