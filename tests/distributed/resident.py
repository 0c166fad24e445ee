"""The tests' end of fork_server.py: one server a session, which conftest.py or the first run starts."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from fork_server import HUB, serve_to_the_end

FREE = {
    "PYTHONPATH", "FAULT", "FAULT_RANK", "FAULT_MARK", "DISKS", "CXX", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "HF_TOKEN",
    "WANDB_API_KEY", "MY_PASSWORD", "JUDGE_KEY", "PYTEST_CURRENT_TEST", "PYTEST_VERSION",
    "TRITON_CACHE_DIR", "PYTORCH_NVML_BASED_CUDA_CHECK", *HUB,
}  # fmt: skip
"""Variables in which a run may differ from the server: no library reads them while it is imported, or forks let it read
them again. Accelerate sets PYTORCH_NVML_BASED_CUDA_CHECK where it looks for a GPU, also in fixtures that several tests
share."""


class ForkServer:
    """A process that has imported the libraries, and what it was given as environment."""

    def __init__(self, environment: Mapping[str, str], of_imports: Mapping[str, str] | None = None) -> None:
        """Start the process; where this one has imported the libraries, which set `of_imports`, as a fork of it."""
        self.fixed = fixed(environment)
        self._run: ForkedRun | None = None
        self._wait: Callable[[], object]
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            if of_imports is None:
                process = subprocess.Popen(
                    [sys.executable, str(Path(__file__).with_name("fork_server.py")), str(theirs.fileno())],
                    env=dict(environment), pass_fds=[theirs.fileno()],
                )  # fmt: skip
                self.pid, self._wait = process.pid, process.wait
            else:
                self.pid = os.fork()
                self._wait = functools.partial(os.waitpid, self.pid, 0)
                if self.pid == 0:
                    self._requests.close()
                    serve_to_the_end(theirs, of_imports)

    def suits(self, environment: Mapping[str, str]) -> bool:
        """Whether the libraries would have been imported alike in this environment."""
        return fixed(environment) == self.fixed

    def start(self, words: Sequence[str], directory: Path, environment: Mapping[str, str]) -> ForkedRun:
        """Start `python WORDS`. The server has one run at a time: one that a failed test has left is killed first."""
        self._end_run()
        self._run = ForkedRun(self._requests, words, directory, environment)
        return self._run

    def close(self) -> None:
        """Let the server end."""
        self._end_run()
        self._requests.close()
        self._wait()

    def _end_run(self) -> None:
        if self._run is not None and self._run.poll() is None:
            self._run.kill()
            self._run.wait()


class ForkedRun:
    """A program in a fork of the server: what the tests use of `subprocess.Popen`, its output in files."""

    def __init__(
        self, requests: socket.socket, words: Sequence[str], directory: Path, environment: Mapping[str, str]
    ) -> None:
        self._requests, self.args = requests, list(words)
        self.returncode: int | None = None
        self._files = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115 (`communicate` closes them)
        job = {"words": self.args, "directory": str(directory), "environment": dict(environment)}
        requests.settimeout(None)
        socket.send_fds(requests, [json.dumps(job).encode()], [file.fileno() for file in self._files])
        self.pid = self._receive()

    def poll(self) -> int | None:
        """The exit status, None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status; raises subprocess.TimeoutExpired after `timeout` seconds."""
        if self.returncode is None:
            self._requests.settimeout(timeout)
            try:
                self.returncode = self._receive()
            except (TimeoutError, BlockingIOError) as error:
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from error
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it has printed, once it has ended, to be asked for once; raises subprocess.TimeoutExpired."""
        self.wait(timeout)
        printed = []
        for file in self._files:
            with file:
                file.seek(0)
                printed.append(file.read())
        return printed[0], printed[1]

    def send_signal(self, number: int) -> None:
        """Send a signal to the process, not to those that it has started."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End the process with SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def _receive(self) -> int:
        message = self._requests.recv(64)
        if not message:
            raise RuntimeError("the fork server has ended")
        return int(message)


def fixed(environment: Mapping[str, str]) -> dict[str, str]:
    """What a run and the server have to have in common."""
    return {name: value for name, value in environment.items() if name not in FREE}


_session: list[ForkServer] = []
"""The session's server, once it is started."""


def can_fork() -> bool:
    """Whether runs are forks here: where a GPU is, they cannot use it once the server has looked for one."""
    return sys.platform == "linux" and not torch.cuda.is_available()


def prepare(of_imports: Mapping[str, str] | None = None) -> None:
    """Start the session's server, if it is to have one, without waiting for it; `of_imports` is that of ForkServer."""
    if not _session and can_fork():
        _session.append(ForkServer({**os.environ, "OMP_NUM_THREADS": "1"}, of_imports))
        atexit.register(_session[0].close)


def prepared_with() -> dict[str, str]:
    """What runs have to have in common with the server."""
    prepare()
    return _session[0].fixed


def server_for(environment: Mapping[str, str]) -> ForkServer | None:
    """The session's server, None where a run in this environment needs a process of its own."""
    prepare()
    return _session[0] if _session and _session[0].suits(environment) else None
