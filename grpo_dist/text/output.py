"""What a command prints as its result, and an end in silence where nobody reads that any more (`… | head -1`).

A training is no such command: it goes on without a reader, because its result is in files.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager

NO_READER = 141
"""Exit status of a program whose output nobody reads any more: a shell's for SIGPIPE."""


def reader_is_gone() -> bool:
    """Whether nobody reads what is printed any more, as in `… | head -1`."""
    try:
        output = select.poll()
        output.register(sys.stdout, 0)
        return any(events & (select.POLLERR | select.POLLHUP) for _, events in output.poll(0))
    except (AttributeError, OSError, ValueError):  # Windows; there is no such output, or it is closed
        return False


@contextmanager
def printing_results() -> Iterator[None]:
    """Inside, a program prints its result; where nobody reads that any more, the program ends with NO_READER."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        if not reader_is_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python's end tells of what is not written
        sys.exit(NO_READER)
