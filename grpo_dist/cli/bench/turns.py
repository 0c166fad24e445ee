"""How two trainers take turns: each is a process that waits for an order, takes one step and says what it was.

An order is the lengths the step's completions shall have (None: they end by themselves); the answer is a dict of
numbers. Nothing but the standard library is imported with this, because a worker may live in an environment of its own.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Any

ADDRESS, KEY = "GRPO_DIST_BENCH_ADDRESS", b"grpo_dist"
PATIENCE_SECONDS = 3600.0


def connect() -> Connection:
    """A worker's end of the line."""
    return Client(os.environ[ADDRESS], authkey=KEY)


def parity(completion_ids: list[list[int]], **_: object) -> list[float]:
    """Whether a completion's length is odd: a reward that costs nothing and divides every group."""
    return [float(len(ids) % 2) for ids in completion_ids]


def own_peak_gib() -> float:
    """Peak resident memory of this process."""
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def let_go() -> None:
    """Give what this process's allocator holds idle back to the GPU: the other trainer's turn comes."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


class Worker:
    """A trainer that takes steps when it is told to; a context manager."""

    def __init__(self, command: Sequence[str], directory: Path) -> None:
        """`directory` is for what it prints."""
        self.command, self.directory = list(command), directory

    def __enter__(self) -> Worker:
        self.directory.mkdir()
        with ExitStack() as opened:
            listener = opened.enter_context(Listener(str(self.directory / "socket"), authkey=KEY))
            self.log = (self.directory / "log").open("w")
            self.process = subprocess.Popen(
                self.command, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false", ADDRESS: str(listener.address)},
            )  # fmt: skip
            try:
                self._wait(listener._listener._socket)  # type: ignore[attr-defined]
                self.line = listener.accept()
            except BaseException:
                self._end()
                raise
        return self

    def step(self, lengths: list[int] | None) -> dict[str, Any]:
        """Let it take one step; returns what it says of it."""
        self.line.send({"lengths": lengths})
        self._wait(self.line)
        return self.line.recv()

    def _wait(self, thing: Any) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not wait([thing], timeout=0.2):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise self._failure()

    def _failure(self) -> ValueError:
        self.log.flush()
        told = "\n".join((self.directory / "log").read_text().splitlines()[-15:])
        status = self.process.poll()
        how = "did not answer" if status is None else f"ended with status {status}"
        return ValueError(f"{' '.join(self.command[:3])} … {how}; the end of what it printed:\n{told}")

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            try:
                self.line.send(None)
                self.process.wait(30)
            except (OSError, subprocess.TimeoutExpired):
                pass
        self._end()

    def _end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()
