"""Threads that wait for one another spin on a quiet machine, and sleep beside other work."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from grpo_dist.distributed import spinning
from grpo_dist.distributed.spinning import BUSY, FREE, Spinning, waited_seconds, watch_spinning

SET_BY_USERS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")

counts_waiting = pytest.mark.skipif(waited_seconds() is None, reason="this kernel does not count how long threads wait")


def of_python(program: str, **environ: str) -> list[str]:
    """The words that a program of Python prints."""
    kept = {name: value for name, value in os.environ.items() if name not in SET_BY_USERS}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, env=kept | environ, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.split()


class Teams:
    """Counts teams that were begun and ended."""

    def __init__(self) -> None:
        self.begun = self.ended = 0

    def begin(self) -> Callable[[], None]:
        self.begun += 1
        return self._end

    def _end(self) -> None:
        self.ended += 1

    @property
    def sleeps(self) -> bool:
        assert self.begun - self.ended in (0, 1)
        return self.begun > self.ended


@pytest.mark.parametrize(
    ("given", "cores", "counted", "expected"),
    [
        ({}, 2, True, {"GOMP_SPINCOUNT": "20000"}),
        ({}, 33, True, {"GOMP_SPINCOUNT": "1000"}),
        ({}, 2, False, {"GOMP_SPINCOUNT": "1000"}),
        ({"GOMP_SPINCOUNT": "7"}, 2, True, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, 2, True, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_how_long_threads_spin(
    given: dict[str, str], cores: int, counted: bool, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spinning, "sets_count", False)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(spinning, "waited_seconds", lambda: 0.0 if counted else None)
    environ = dict(given)
    spinning.set_count(environ)
    assert environ == expected
    assert spinning.sets_count == (not given)


def test_the_count_is_set_before_torch_is_imported() -> None:
    words = of_python("import grpo_dist, os, sys; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)")
    assert words[0] in (spinning.LONG, spinning.SHORT)
    assert words[1] == "False"


def test_threads_spin_after_a_quiet_second_and_sleep_beside_other_work() -> None:
    teams = Teams()
    spinning = Spinning(teams.begin)
    assert teams.sleeps  # until the machine is known to be quiet
    spinning.look(0.1)
    spinning.look(FREE)
    spinning.look(0.1)
    assert teams.sleeps  # no two quiet looks in a row
    spinning.look(0.1)
    assert not teams.sleeps
    spinning.look(BUSY)
    assert not teams.sleeps
    spinning.look(BUSY + 0.01)
    assert teams.sleeps
    spinning.end()
    spinning.end()
    assert (teams.begun, teams.ended) == (2, 2)


def test_a_machine_that_is_busy_again_and_again_is_taken_as_busy_for_longer(caplog: pytest.LogCaptureFixture) -> None:
    teams = Teams()
    spinning = Spinning(teams.begin)
    needed = []
    with caplog.at_level(logging.INFO):
        for _ in range(11):
            looks = 0
            while teams.sleeps:
                spinning.look(0.0)
                looks += 1
            needed.append(looks)
            spinning.look(0.8)
    assert needed == [2, 4, 8, 16, 32, 64, 128, 256, 512, 512, 512]
    said = [record.getMessage() for record in caplog.records]
    assert said[:2] == [
        "CPU: 0.8 threads of this process wait for a core; those that wait for one another sleep at once",
        "CPU: the cores are free again; threads that wait for one another spin for a moment",
    ]


def test_waiting_is_summed_over_living_threads(tmp_path: Path) -> None:
    for task, counts in {"1": "5000 2000000000 3", "2": "7 500000000 1", "3": None}.items():
        (tmp_path / task).mkdir()
        if counts is not None:  # the third has just ended
            (tmp_path / task / "schedstat").write_text(counts + "\n", encoding="ascii")
    assert waited_seconds(tmp_path) == 2.5


@pytest.mark.parametrize("counts", [None, "0 0 0"])
def test_a_kernel_that_does_not_count(counts: str | None, tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    if counts is not None:
        (tmp_path / "1" / "schedstat").write_text(counts, encoding="ascii")
    assert waited_seconds(tmp_path) is None
    assert waited_seconds(tmp_path / "gone") is None


@counts_waiting
def test_threads_that_share_a_core_wait_for_it() -> None:
    program = """
        import os, threading, time, zlib
        from grpo_dist.distributed.spinning import waited_seconds
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
        before, over = waited_seconds(), time.monotonic() + 1
        data = bytes(10_000_000)
        def compress():
            while time.monotonic() < over:
                zlib.compress(data)  # without the interpreter's lock
        threads = [threading.Thread(target=compress) for _ in range(3)]
        [thread.start() for thread in threads]
        time.sleep(0.8)
        print(waited_seconds() - before)
    """
    assert float(of_python(program)[0]) > 0.4


@counts_waiting
@pytest.mark.skipif(sys.platform != "linux", reason="torch waits by libgomp under Linux alone")
def test_a_sleeping_team_makes_the_threads_of_torch_spin_less() -> None:
    program = """
        import os, time
        from pathlib import Path
        import torch
        from grpo_dist.distributed.spinning import sleeping_team
        torch.set_num_threads(2)
        main = str(os.getpid())
        def threads():
            return set(os.listdir("/proc/self/task"))
        def turns():
            torch.ones(1 << 20).add_(1)  # the threads of torch wait from here on
            before, then = used(), time.monotonic()
            time.sleep(0.3)
            return (used() - before) / 1e9 / (time.monotonic() - then)
        def used():  # by all threads but this one
            return sum(
                int(Path("/proc/self/task", task, "schedstat").read_text().split()[0]) for task in threads() - {main}
            )
        alone, count = turns(), len(threads())
        end = sleeping_team()
        over = time.monotonic() + 20
        while len(threads()) < count + os.cpu_count() + 1 and time.monotonic() < over:
            time.sleep(0.01)
        more = len(threads()) - count
        asleep = turns()
        end()
        over = time.monotonic() + 20
        while len(threads()) > count and time.monotonic() < over:
            time.sleep(0.01)
        print(alone, asleep, turns(), more == os.cpu_count() + 1, len(threads()) == count)
    """
    alone, asleep, after, begun, ended = of_python(program, GOMP_SPINCOUNT="100000000000", OMP_NUM_THREADS="2")
    assert (begun, ended) == ("True", "True")
    assert float(asleep) < 0.1 * min(float(alone), float(after))


@counts_waiting
def test_a_watch_lets_threads_spin_and_ends_with_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    teams = Teams()
    monkeypatch.setattr(spinning, "sets_count", True)
    monkeypatch.setattr(spinning, "PERIOD_SECONDS", 0.01)
    monkeypatch.setattr(spinning, "_can_spin_less", lambda: True)
    monkeypatch.setattr(spinning, "waited_seconds", lambda: 1.0)  # it does not grow
    monkeypatch.setattr(spinning, "Spinning", lambda: Spinning(teams.begin))
    end = watch_spinning(2)
    assert _within_seconds(lambda: not teams.sleeps)
    end()
    assert _within_seconds(lambda: all(thread.name != "spinning" for thread in threading.enumerate()))


@pytest.mark.parametrize(("num_threads", "sets_count", "can"), [(1, True, True), (2, False, True), (2, True, False)])
def test_nothing_is_watched_where_nothing_can_be_chosen(
    num_threads: int, sets_count: bool, can: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spinning, "sets_count", sets_count)
    monkeypatch.setattr(spinning, "_can_spin_less", lambda: can)
    monkeypatch.setattr(spinning, "Spinning", lambda: pytest.fail("a team was begun"))
    watch_spinning(num_threads)()


def _within_seconds(is_so: Callable[[], bool], limit: float = 20.0) -> bool:
    over = time.monotonic() + limit
    while not is_so() and time.monotonic() < over:
        time.sleep(0.01)
    return is_so()
