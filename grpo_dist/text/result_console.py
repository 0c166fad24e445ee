"""The console for a command's results; apart from `output.py` because the import of rich takes a tenth of a second."""

from __future__ import annotations

import errno
import os

from rich.console import Console


class ResultConsole(Console):
    """A console that raises BrokenPipeError where nobody reads it, as `print` does; rich's own exits with status 1."""

    def on_broken_pipe(self) -> None:
        """Called by rich where a write has failed for want of a reader."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
