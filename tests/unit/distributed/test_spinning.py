"""Threads that wait for one another spin on a quiet machine, and sleep beside other work."""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from grpo_dist.distributed import spinning
from grpo_dist.distributed.spinning import BUSY, FREE, Spinning, seconds_between, waits, watch_spinning

SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "GRPO_DIST_SPINCOUNT")

counts_waiting = pytest.mark.skipif(not waits(), reason="this kernel does not count how long threads wait")


def of_python(program: str, **environ: str) -> list[str]:
    """The words that a program of Python prints."""
    kept = {name: value for name, value in os.environ.items() if name not in SETTINGS}
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


INHERITED = {"GOMP_SPINCOUNT": "20000", "GRPO_DIST_SPINCOUNT": "20000"}
"""From a process of this package."""


@pytest.mark.parametrize("given", [{}, INHERITED, {"GRPO_DIST_SPINCOUNT": "20000"}])
def test_threads_spin_for_a_short_time(given: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spinning, "sets_count", False)
    environ = dict(given)
    spinning.set_count(environ)
    assert environ == {"GOMP_SPINCOUNT": "1000", "GRPO_DIST_SPINCOUNT": "1000"}
    assert spinning.sets_count


@pytest.mark.parametrize(
    ("cores", "counted", "set_here", "torch_is_there", "expected"),
    [
        (2, True, True, False, "20000"),
        (33, True, True, False, "1000"),
        (2, False, True, False, "1000"),
        (2, True, False, False, "1000"),
        (2, True, True, True, "1000"),
    ],
)
def test_for_how_long_programs_let_threads_spin(
    cores: int, counted: bool, set_here: bool, torch_is_there: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spinning, "sets_count", set_here)
    monkeypatch.setattr(spinning, "NUM_CORES", cores)
    monkeypatch.setattr(spinning, "waits", lambda: {"1": 0} if counted else {})
    if not torch_is_there:
        monkeypatch.delitem(sys.modules, "torch")
    environ = {"GOMP_SPINCOUNT": "1000", "GRPO_DIST_SPINCOUNT": "1000"}
    spinning.allow_long(environ)
    assert environ == {"GOMP_SPINCOUNT": expected, "GRPO_DIST_SPINCOUNT": expected}


@pytest.mark.parametrize(
    "given",
    [
        {"GOMP_SPINCOUNT": "20000"},
        {"OMP_WAIT_POLICY": "active"},
        {"GOMP_SPINCOUNT": "7", "GRPO_DIST_SPINCOUNT": "20000"},
    ],
)
def test_what_the_user_has_set_stays(given: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spinning, "sets_count", False)
    environ = dict(given)
    spinning.set_count(environ)
    assert environ == given
    assert not spinning.sets_count


def test_a_process_started_by_this_one_chooses_for_itself() -> None:
    program = """
        import subprocess, sys
        import grpo_dist
        child = "import grpo_dist; print(grpo_dist.distributed.spinning.sets_count)"
        subprocess.run([sys.executable, "-c", child], check=True)
    """
    assert of_python(program) == ["True"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to cores")
def test_the_cores_are_those_that_this_process_may_use() -> None:
    program = """
        import os
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
        from grpo_dist.distributed.spinning import NUM_CORES
        print(NUM_CORES)
    """
    assert of_python(program) == ["1"]


def test_the_count_is_set_before_torch_is_imported() -> None:
    words = of_python("import grpo_dist, os, sys; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)")
    assert words == ["1000", "False"]


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
    assert (teams.begun, teams.ended) == (2, 1)


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
    assert waits(tmp_path) == {"1": 2_000_000_000, "2": 500_000_000}
    assert seconds_between({"1": 1_900_000_000}, waits(tmp_path)) == 0.6


def test_a_thread_that_has_ended_takes_no_waiting_with_it() -> None:
    before = {"1": 0, "2": 90_000_000_000, "3": 5_000_000_000}
    now = {"1": 400_000_000, "3": 7_000_000}  # the third is a new thread of the same number
    assert seconds_between(before, now) == 0.4


@pytest.mark.parametrize("counts", [None, "0 0 0", "", "nothing"])
def test_a_kernel_that_does_not_count(counts: str | None, tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    if counts is not None:
        (tmp_path / "1" / "schedstat").write_text(counts, encoding="ascii")
    assert waits(tmp_path) == {}
    assert waits(tmp_path / "gone") == {}


@counts_waiting
def test_threads_that_share_a_core_wait_for_it() -> None:
    program = """
        import os, threading, time, zlib
        from grpo_dist.distributed.spinning import seconds_between, waits
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
        before, over = waits(), time.monotonic() + 1
        data = bytes(10_000_000)
        def compress():
            while time.monotonic() < over:
                zlib.compress(data)  # without the interpreter's lock
        threads = [threading.Thread(target=compress) for _ in range(3)]
        [thread.start() for thread in threads]
        time.sleep(0.8)
        print(seconds_between(before, waits()))
    """
    assert float(of_python(program)[0]) > 0.4


@counts_waiting
@pytest.mark.skipif(sys.platform != "linux", reason="torch waits by libgomp under Linux alone")
def test_a_sleeping_team_makes_the_threads_of_torch_spin_less() -> None:
    program = """
        import os, time
        from pathlib import Path
        import torch
        from grpo_dist.distributed.spinning import NUM_CORES, sleeping_team
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
        while len(threads()) < count + NUM_CORES + 1 and time.monotonic() < over:
            time.sleep(0.01)
        more = len(threads()) - count
        asleep = turns()
        end()
        over = time.monotonic() + 20
        while len(threads()) > count and time.monotonic() < over:
            time.sleep(0.01)
        print(alone, asleep, turns(), more == NUM_CORES + 1, len(threads()) == count)
    """
    alone, asleep, after, begun, ended = of_python(program, GOMP_SPINCOUNT="100000000000", OMP_NUM_THREADS="2")
    assert (begun, ended) == ("True", "True")
    assert float(asleep) < 0.1 * min(float(alone), float(after))


GOMP, LLVM = SimpleNamespace(GOMP_parallel=1), SimpleNamespace(GOMP_parallel=2, kmp_set_blocktime=3)
NEITHER = SimpleNamespace()


@pytest.mark.parametrize(
    ("all_see", "linked", "expected"),
    [
        (GOMP, GOMP, GOMP),
        (NEITHER, GOMP, GOMP),
        (LLVM, GOMP, None),  # LD_PRELOAD=libiomp5.so
        (NEITHER, LLVM, None),
        (NEITHER, NEITHER, None),
    ],
)
def test_which_openmp_torch_waits_by(
    all_see: SimpleNamespace, linked: SimpleNamespace, expected: SimpleNamespace | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda path: all_see if path is None else linked)
    assert spinning.libgomp() is expected


@pytest.mark.skipif(sys.platform != "linux", reason="torch waits by libgomp under Linux alone")
def test_a_process_that_may_start_no_more_threads_goes_on_without_the_team() -> None:
    program = """
        import logging, resource, sys, time
        import torch
        from grpo_dist.distributed.spinning import sleeping_team
        logging.basicConfig(stream=sys.stdout, format="%(message)s")
        pages = int(open("/proc/self/statm").read().split()[0])
        size = pages * resource.getpagesize() + (12 << 20)  # a stack of 8 MiB more, the one of the thread that leads
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        end = sleeping_team()
        time.sleep(0.2)
        end()
        print("goes on")
    """
    words = " ".join(of_python(program))
    assert words.startswith("CPU: this process may not start ")
    assert words.endswith("GOMP_SPINCOUNT=1000 lets them spin less goes on")


@counts_waiting
@pytest.mark.skipif(sys.platform != "linux", reason="torch waits by libgomp under Linux alone")
@pytest.mark.skipif(spinning.NUM_CORES > spinning.MOST_CORES, reason="a sleeping team of so many threads is a lot")
def test_a_command_watches_its_threads() -> None:
    """`imports` sets the longer count, and then looks how long threads wait."""
    program = """
        import os, threading, time
        from grpo_dist.distributed import process, spinning
        spinning.PERIOD_SECONDS, begun, ended = 0.01, [], threading.Event()
        spinning.seconds_between = lambda before, now: 0.0
        class Spinning(spinning.Spinning):
            def __init__(self):
                super().__init__(lambda: begun.append(1) or ended.set)
        spinning.Spinning = Spinning
        with process.imports():
            import torch
        ended.wait(20)
        print(os.environ["GOMP_SPINCOUNT"], len(begun), ended.is_set())
    """
    assert of_python(program, OMP_NUM_THREADS="2") == ["20000", "1", "True"]


@pytest.mark.parametrize(
    ("num_threads", "sets_count", "count", "has"),
    [(1, True, "20000", True), (2, False, "20000", True), (2, True, "1000", True), (2, True, "20000", False)],
)
def test_nothing_is_watched_where_nothing_can_be_chosen(
    num_threads: int, sets_count: bool, count: str, has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spinning, "sets_count", sets_count)
    monkeypatch.setenv("GOMP_SPINCOUNT", count)
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    monkeypatch.setattr(spinning, "libgomp", lambda: ctypes.CDLL(None) if has else None)
    monkeypatch.setattr(spinning, "Spinning", lambda: pytest.fail("a team was begun"))
    watch_spinning()
