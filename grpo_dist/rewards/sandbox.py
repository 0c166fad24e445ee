"""Run untrusted Python: a new interpreter without files, network, environment or rights, killed with its children.

Where the kernel allows it, each run has its own user, process, mount, network, IPC and host-name namespace. It sees
Python's standard library and the system's libraries read-only, an empty /tmp in memory, no other process and no
network. In any case it has an empty environment, a session and a temporary directory of its own, limits on CPU time,
memory, processes, open files and file sizes, a limit on its output, and an end by SIGKILL. docs/rewards.md says what
this does not cover.
"""

from __future__ import annotations

import contextlib
import logging
import marshal
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

log = logging.getLogger(__name__)

_LAUNCHER = Path(__file__).with_name("sandbox_launcher.py")
_END_SECONDS = 10.0  # until all processes of a killed program have ended
_READ_BYTES = 1 << 16
_PROBE = "print(6 * 7)"

Ending = Literal["exited", "timeout", "output"]


class SandboxError(RuntimeError):
    """The sandbox itself failed, so the result of the program is unknown."""


@dataclass(frozen=True)
class Limits:
    """The limits of one run."""

    seconds: float = 10.0
    """Wall time, and CPU time of each process, rounded up."""
    memory_mib: int = 512
    """Address space of each process."""
    processes: int = 16
    """Processes and threads at once."""
    open_files: int = 64
    """Open files of each process."""
    file_mib: int = 16
    """Size of a file, and with isolation the total size of all files."""
    output_bytes: int = 1 << 20
    """Total output on stdout and stderr; a run that exceeds it is killed."""


@dataclass(frozen=True)
class Outcome:
    """The result of a run."""

    ending: Ending
    """The program ended by itself, or was killed for its time or its output."""
    exit_code: int
    """The exit code of a shell: 128 + n after signal n, and 137 also where this module killed the program."""
    stdout: str
    """Its output up to the limit, with invalid UTF-8 replaced."""
    stderr: str


class Sandbox:
    """A way to run programs. Several threads can use it, and it has no state between runs."""

    def __init__(self, limits: Limits | None = None, allow_unisolated: bool = False) -> None:
        """Check whether the kernel isolates.

        Raises SandboxError where it does not, unless `allow_unisolated` is set, and where a trivial program fails.
        """
        if sys.platform != "linux":
            raise SandboxError("programs are run on Linux only; elsewhere, use a remote sandbox (docs/rewards.md)")
        self.limits = limits or Limits()
        self.isolated = True
        try:
            self._probe()
        except SandboxError as error:
            if not allow_unisolated:
                raise SandboxError(
                    f"programs cannot be isolated here ({error}), and would run with this user's rights, files and "
                    "network. Allow user namespaces (sysctl user.max_user_namespaces, "
                    "kernel.apparmor_restrict_unprivileged_userns=0; in Docker --security-opt seccomp=unconfined), use "
                    "a remote sandbox (docs/rewards.md), or accept it with allow_unisolated: true"
                ) from error
            self.isolated = False
            self._probe()
            log.warning("code runs WITHOUT isolation, with this user's files and network (%s)", error)

    def run(self, source: str, stdin: str = "") -> Outcome:
        """Run a program to its end or to a limit. Raises SandboxError where the sandbox could not be set up."""
        read_status, write_status = os.pipe()
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, read_status)
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="grpo-sandbox-")))
            (directory / "source").write_text(source, encoding="utf-8", errors="surrogatepass")
            (directory / "stdin").write_text(stdin, encoding="utf-8", errors="replace")
            (directory / "root").mkdir()
            with (directory / "stdin").open("rb") as given:
                try:
                    process = self._start(directory, given.fileno(), write_status)
                finally:
                    os.close(write_status)
            with process:
                try:
                    ending, output = self._read(process)
                finally:
                    _kill(process)
            status = os.read(read_status, 4096)
        if status != b"ready" and ending == "exited":
            raise SandboxError(status.decode(errors="replace").removeprefix("error: ") or "the launcher did not start")
        texts = [output[name].decode(errors="replace") for name in ("stdout", "stderr")]
        return Outcome(ending, process.returncode if process.returncode >= 0 else 128 - process.returncode, *texts)

    def _start(self, directory: Path, stdin: int, status: int) -> subprocess.Popen[bytes]:
        limits = self.limits
        python = os.path.realpath(sys.executable)
        # by a process of scoring, and not by programs
        ignored = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE)
        order: dict[str, Any] = {
            "isolated": self.isolated,
            "status": status,
            "parent": os.getpid(),
            "python": python,
            "program": str(directory / "source"),
            "directory": str(directory / "root"),
            "readable": [os.path.realpath(sys.base_prefix)],
            "tmpfs_bytes": limits.file_mib << 20,
            "signals": list(map(int, ignored)),
            "limits": {
                "RLIMIT_CPU": int(limits.seconds) + 1,
                "RLIMIT_AS": limits.memory_mib << 20,
                "RLIMIT_NPROC": limits.processes,
                "RLIMIT_NOFILE": limits.open_files,
                "RLIMIT_FSIZE": limits.file_mib << 20,
                "RLIMIT_CORE": 0,
            },
        }
        if not self.isolated:  # without its own user, the limit would count all processes of this user
            del order["limits"]["RLIMIT_NPROC"]
        return subprocess.Popen(
            [python, "-I", "-S", "-B", str(_LAUNCHER), marshal.dumps(order).hex()],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={},
            pass_fds=[status],
            cwd=directory,
            start_new_session=True,
        )

    def _read(self, process: subprocess.Popen[bytes]) -> tuple[Ending, Mapping[str, bytearray]]:
        """Collect a run's output until it ends, and kill it at a limit."""
        output = {"stdout": bytearray(), "stderr": bytearray()}
        deadline = time.monotonic() + self.limits.seconds
        with selectors.DefaultSelector() as selector:
            for name, stream in (("stdout", process.stdout), ("stderr", process.stderr)):
                assert stream is not None
                selector.register(stream, selectors.EVENT_READ, name)
            while selector.get_map():
                left = deadline - time.monotonic()
                if left <= 0:
                    return "timeout", output
                for key, _ in selector.select(left):
                    content = os.read(key.fd, _READ_BYTES)
                    if not content:
                        selector.unregister(key.fileobj)
                    output[key.data] += content
                if sum(map(len, output.values())) > self.limits.output_bytes:
                    return "output", output
        # A program may close its output and continue.
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return "timeout", output
        return "exited", output

    def _probe(self) -> None:
        outcome = self.run(_PROBE)
        if outcome.stdout != "42\n":
            raise SandboxError(f"a trivial program ended with {outcome}")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the rest of a run, and wait until all of its processes have ended."""
    # The kernel does not reuse the number of a session that still has processes, and this number is new: the signal
    # reaches no other process.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    # A process that still runs has the other end of the pipe open; the kernel may need a moment to end a namespace.
    deadline = time.monotonic() + _END_SECONDS
    os.set_blocking(process.stdout.fileno(), False)
    while time.monotonic() < deadline:
        with contextlib.suppress(BlockingIOError):
            if not os.read(process.stdout.fileno(), _READ_BYTES):
                return
        time.sleep(0.002)
