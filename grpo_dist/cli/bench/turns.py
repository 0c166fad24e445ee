"""Two trainers that alternate. Each is a process that waits for a request, takes one step and answers with its metrics.
Until the next request it is stopped, because threads that wait for work may take the processor from the other one.

A request has the lengths of the step's completions, or None if they end by themselves, and whether only the rollout is
wanted. The answer is a dict.
This module imports only the standard library, because a worker may run in another environment.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Any

ADDRESS, KEY = "GRPO_DIST_BENCH_ADDRESS", b"grpo_dist"
PATIENCE_SECONDS = 3600.0


def connect() -> Connection:
    """The connection of a worker."""
    return Client(os.environ[ADDRESS], authkey=KEY)


def parity(completion_ids: list[list[int]], **_: object) -> list[float]:
    """A cheap reward that differs within every group: 1 for completions of odd length."""
    return [float(len(ids) % 2) for ids in completion_ids]


def own_peak_gib() -> float:
    """Peak resident memory of this process."""
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def let_go() -> None:
    """Return unused memory of this process's allocator to the GPU, for the other trainer."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextmanager
def signals_unwind() -> Iterator[None]:
    """A context in which a signal that ends this process leaves what is open, so that workers end with it.

    In sessions of their own, they would otherwise go on with their step.
    """

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has two
    before = {number: signal.getsignal(number) for number in (getattr(signal, name) for name in names)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Worker:
    """A trainer that takes steps on request; a context manager."""

    def __init__(self, command: Sequence[str], directory: Path, without: Sequence[str] = ()) -> None:
        """`directory` is for its log; its environment is this one without the variables `without`."""
        self.command, self.directory = list(command), directory
        self.environment = {name: value for name, value in os.environ.items() if name not in without}

    def __enter__(self) -> Worker:
        self.directory.mkdir()
        with ExitStack() as opened:
            listener = opened.enter_context(Listener(str(self.directory / "socket"), authkey=KEY))
            self.log = (self.directory / "log").open("w", encoding="utf-8")
            self.process = subprocess.Popen(
                self.command, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True,
                env={**self.environment, "TOKENIZERS_PARALLELISM": "false", ADDRESS: str(listener.address)},
            )  # fmt: skip
            self.guard = None
            try:
                self.guard = self._guard()
                self._wait(listener._listener._socket)  # type: ignore[attr-defined]
                self.line = listener.accept()
            except BaseException:
                self._end()
                raise
        return self

    def step(self, lengths: list[int] | None, *, is_rollout: bool = False) -> dict[str, Any]:
        """Request one step, or its rollout alone, and return the answer."""
        self._signal("SIGCONT")
        self.line.send({"lengths": lengths, "is_rollout": is_rollout})
        self._wait(self.line)
        try:
            answer = self.line.recv()
            self._signal("SIGSTOP")
            return answer
        except EOFError:  # a worker that dies closes its line before it is gone
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
            raise self._failure() from None

    def _guard(self) -> subprocess.Popen[bytes] | None:
        """A process that ends the worker where this one is killed: what is stopped would never notice."""
        if not hasattr(os, "killpg"):
            return None
        ends = f"import os, sys; sys.stdin.read(); os.killpg({self.process.pid}, {int(signal.SIGKILL)})"
        command = [sys.executable, "-S", "-c", ends]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)

    def _signal(self, name: str) -> None:
        """Send a signal to the worker and what it has started, where there is such a signal."""
        if hasattr(signal, name):
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, getattr(signal, name))

    def _wait(self, thing: Any) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not wait([thing], timeout=0.2):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise self._failure()

    def _failure(self) -> ValueError:
        self.log.flush()
        tail = "\n".join((self.directory / "log").read_text(encoding="utf-8").splitlines()[-15:])
        status = self.process.poll()
        how = "did not answer" if status is None else f"ended with status {status}"
        return ValueError(f"{' '.join(self.command[:3])} … {how}; the end of its log:\n{tail}")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self.process.poll() is None:
            self._signal("SIGCONT")
            try:
                self.line.send(None)
                self.process.wait(30)
            except (OSError, subprocess.TimeoutExpired):
                pass
        self._end()

    def _end(self) -> None:
        if self.guard is not None:
            self.guard.kill()
            self.guard.communicate()
        with suppress(ProcessLookupError):
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, signal.SIGKILL)  # with what it has started
            else:  # Windows
                self.process.kill()
        self.process.wait()
        self.log.close()
