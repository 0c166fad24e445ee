"""The tests' end of fork_server.py: one server a session, which conftest.py or the first run starts."""

from __future__ import annotations

import atexit
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

FREE = {"PYTHONPATH", "FAULT", "FAULT_RANK", "PYTEST_CURRENT_TEST"}
"""Variables in which a run may differ from the server: no library reads them while it is imported."""


class ForkServer:
    """A process that has imported the libraries, and what it was given as environment."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._fixed = fixed(environment)
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("fork_server.py")), str(theirs.fileno())],
                env=dict(environment), pass_fds=[theirs.fileno()],
            )  # fmt: skip

    def suits(self, environment: Mapping[str, str]) -> bool:
        """Whether the libraries would have been imported alike in this environment."""
        return fixed(environment) == self._fixed

    def run(
        self, words: Sequence[str], directory: Path, environment: Mapping[str, str], timeout_seconds: float
    ) -> subprocess.CompletedProcess[str]:
        """What `python WORDS` printed and ended with; raises subprocess.TimeoutExpired after killing it."""
        job = {"words": list(words), "directory": str(directory), "environment": dict(environment)}
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            socket.send_fds(self._requests, [json.dumps(job).encode()], [out.fileno(), err.fileno()])
            pid = int(self._receive())
            self._requests.settimeout(timeout_seconds)
            try:
                status = int(self._receive())
            except BaseException as error:
                self._requests.settimeout(None)
                os.kill(pid, signal.SIGKILL)
                self._receive()
                if isinstance(error, TimeoutError):
                    raise subprocess.TimeoutExpired(job["words"], timeout_seconds) from error
                raise
            self._requests.settimeout(None)
            for file in (out, err):
                file.seek(0)
            return subprocess.CompletedProcess(job["words"], status, out.read(), err.read())

    def close(self) -> None:
        """Let the server end."""
        self._requests.close()
        self._process.wait()

    def _receive(self) -> bytes:
        message = self._requests.recv(64)
        if not message:
            raise RuntimeError(f"the fork server ended with status {self._process.wait()}")
        return message


def fixed(environment: Mapping[str, str]) -> dict[str, str]:
    """What a run and the server have to have in common."""
    return {name: value for name, value in environment.items() if name not in FREE}


@functools.cache
def _server() -> ForkServer:
    server = ForkServer({**os.environ, "OMP_NUM_THREADS": "1"})
    atexit.register(server.close)
    return server


def prepare() -> None:
    """Start the session's server, if it is to have one, without waiting for it."""
    server_for({**os.environ, "OMP_NUM_THREADS": "1"})


def server_for(environment: Mapping[str, str]) -> ForkServer | None:
    """The session's server, None where a run in this environment needs a process of its own.

    So it does where a GPU is: a fork cannot use CUDA once the server has looked for one.
    """
    if sys.platform != "linux" or torch.cuda.is_available():
        return None
    server = _server()
    return server if server.suits(environment) else None
