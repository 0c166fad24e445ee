"""Keeps a server as long as the trainer lives: a script that is started with the server's command line.

    python keeper.py NOTE COMMAND...

The trainer has the other end of the standard input. When that is closed, by the trainer or by its death, the server and
its children are killed. NOTE is a file that names the server, so that the next start kills it where this process was
killed too. Standard library and psutil only.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

_LOOK_SECONDS = 0.5
_GRACE_SECONDS = 10.0


def keep(note: Path, command: list[str]) -> int:
    """Run the command until it ends or the standard input is closed; returns its exit status."""
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    note.write_text(
        json.dumps({"pid": server.pid, "created": psutil.Process(server.pid).create_time()}), encoding="utf-8"
    )
    while server.poll() is None:
        readable, _, _ = select.select([sys.stdin], [], [], _LOOK_SECONDS)
        if readable and not os.read(sys.stdin.fileno(), 1):
            end_session(server.pid, _GRACE_SECONDS)
    status = server.wait()
    end_session(server.pid, 0.0)  # children that outlive it
    note.unlink(missing_ok=True)
    return status


def end_session(leader: int, grace_seconds: float) -> None:
    """End the processes that a session's leader has started, first with SIGTERM where they get time for it."""
    with contextlib.suppress(ProcessLookupError):
        if grace_seconds:
            os.killpg(leader, signal.SIGTERM)
            deadline = time.monotonic() + grace_seconds
            while time.monotonic() < deadline and _lives(leader):
                time.sleep(0.1)
        os.killpg(leader, signal.SIGKILL)


def _lives(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


if __name__ == "__main__":
    sys.exit(keep(Path(sys.argv[1]), sys.argv[2:]))
