"""Signals that ask a run to stop, and those that it was started to ignore."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch.distributed as dist

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
