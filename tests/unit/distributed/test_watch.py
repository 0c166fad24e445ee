"""Signals that ask a run to stop, and those that it was started to ignore."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from grpo_dist.distributed import watch as module
from grpo_dist.distributed.watch import SIGNALS, Interrupted, Watch

pytestmark = pytest.mark.quick


@contextmanager
def watching() -> Iterator[Watch]:
    watch = Watch(0, 1, None, None, 60.0, lambda: 0)
    try:
        yield watch
    finally:
        watch.close()


@contextmanager
def ignoring(number: signal.Signals) -> Iterator[None]:
    """As the process that started this one may."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_it_to_stop(number: signal.Signals) -> None:
    with watching() as watch:
        watch.check()
        os.kill(os.getpid(), number)
        with pytest.raises(Interrupted, match=f"rank 0 received {number.name}"):
            watch.check()


def test_a_run_that_a_script_started_in_the_background_is_interrupted() -> None:
    with ignoring(signal.SIGINT), watching() as watch:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted, match="rank 0 received SIGINT"):
            watch.check()


def test_a_run_under_nohup_survives_its_terminal() -> None:
    with ignoring(signal.SIGHUP), watching() as watch:
        os.kill(os.getpid(), signal.SIGHUP)
        watch.check()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN, "what it starts survives the terminal too"


def test_a_rank_that_stops_at_once_is_missed() -> None:
    """It has told of itself before its main thread goes on, whatever becomes of the thread that watches."""
    store = dist.HashStore()
    watch = Watch(1, 2, store, None, 60.0, lambda: 0)
    try:
        assert store.check(["heartbeat/1"])
    finally:
        watch.close()


def test_time_in_which_the_run_was_stopped_is_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-Z and fg, or a container that pauses: nothing moved, and nobody looked."""
    clock, ends = [0.0], []
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=time.sleep))
    monkeypatch.setattr(module, "PERIOD_SECONDS", 1e6)
    monkeypatch.setattr(Watch, "_abort", lambda self, reason: ends.append(reason))
    with watching() as watch:
        for seconds in [1.0, 1000.0] + [1.0] * 50:
            clock[0] += seconds
            watch._exchange()
        assert ends == []
        for _ in range(20):
            clock[0] += 1.0
            watch._exchange()
        assert "rank 0 has not moved for 60 s" in ends[0]
