"""Run pytest in several processes at the same time, which are forks of one that has imported the libraries.

    python tests/side_by_side.py tests/fault -- tests/distributed -- tests/unit tests/fuzz

The output of the last one is shown as it comes, that of the others when all have ended. The exit status is the first
that is not 0. Where there is a GPU, each process imports the libraries itself.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from typing import IO, NoReturn

sys.path[0] = os.path.join(os.path.dirname(__file__), "distributed")
import fork_server  # noqa: E402


def main() -> int:
    """Start the processes, hand an interrupt on to them, and wait."""
    of_imports = import_all()
    groups = [list(group) for is_end, group in itertools.groupby(sys.argv[1:], "--".__eq__) if not is_end]
    outputs = [tempfile.TemporaryFile("w+") for _ in groups[1:]]  # noqa: SIM115 (closed below)
    pids = [start(group, output, of_imports) for group, output in zip(groups, [*outputs, None], strict=True)]
    interrupts: list[int] = []

    def hand_on(number: int, _: object) -> None:
        interrupts.append(number)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.kill(pid, number)

    signal.signal(signal.SIGINT, hand_on)
    signal.signal(signal.SIGTERM, hand_on)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in reversed(pids)]
    for output in outputs:
        with output:
            output.seek(0)
            shutil.copyfileobj(output, sys.stdout)
    gc.unfreeze()  # Triton would report what is frozen as leaks
    return 128 + interrupts[0] if interrupts else next((status for status in statuses if status), 0)


def import_all() -> dict[str, str] | None:
    """Import what the tests and their runs do; returns the variables that this has set, None where forks could not use
    what is imported."""
    before = dict(os.environ)
    os.environ["OMP_NUM_THREADS"] = "1"  # torch would start threads, which forks lack
    import resident

    of_imports = fork_server.import_all() if resident.can_fork() else None
    os.environ.clear()
    os.environ.update(before)
    return of_imports


def start(arguments: Sequence[str], output: IO[str] | None, of_imports: dict[str, str] | None) -> int:
    """Fork a process that becomes pytest, in a group of its own: a terminal's Ctrl-C is handed on to it once."""
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        if output is not None:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        become_pytest(arguments, of_imports)
    return pid


def become_pytest(arguments: Sequence[str], of_imports: dict[str, str] | None) -> NoReturn:
    """Do what `python -m pytest ARGUMENTS` does."""
    if of_imports is None:
        os.execv(sys.executable, [sys.executable, "-m", "pytest", *arguments])
    import resident

    resident.prepare(of_imports)
    import pytest

    sys.path[0] = os.getcwd()
    sys.exit(pytest.main(list(arguments)))


if __name__ == "__main__":
    sys.exit(main())
