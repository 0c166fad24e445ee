"""How a process that imports torch begins and ends, without work that nobody needs. Commands use it, not functions that
a user's own program calls."""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

from ..text.output import NO_READER, reader_is_gone
from .spinning import allow_long, watch_spinning


def begin() -> None:
    """Begin a program that imports torch at the top of its module; `run_to_the_end` goes on after the imports.

    SIGINT ends the process as SIGTERM does: Python's own handler would print where in an import it is. A training sets
    handlers of its own (distributed/watch.py) once it can save.
    """
    open_streams()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored, as for a script's `&`
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    _prepare_imports()


def open_streams() -> None:
    """Open standard streams that are closed (`>&-`, some services), and let no character end the program.

    The next file that is opened would have the number of one that is closed, and get all that libraries print. Python
    has None for such a stream. A character that the locale's encoding lacks is printed as its escape.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null == descriptor:
                os.set_inheritable(null, True)
            else:
                os.dup2(null, descriptor)
                os.close(null)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, "w" if descriptor else "r", closefd=False))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def run_to_the_end(program: Callable[[], int]) -> NoReturn:
    """Run a program whose imports are done, and end the process with the status that it returns."""
    _keep_imports()
    end(program())


@contextlib.contextmanager
def imports(say: Callable[[str], None] | None = None) -> Iterator[None]:
    """A context for the imports of torch and what needs it, inside a function: an error in options does not wait for
    them. They take seconds: `say` gets a line about them before."""
    if say is not None:
        say("importing torch and transformers")
    _prepare_imports()
    try:
        yield
    finally:
        _keep_imports()


def _prepare_imports() -> None:
    gc.disable()
    allow_long(os.environ)


def _keep_imports() -> None:
    """Collect garbage from now on, but not among the 400,000 objects of imported modules, which stay to the end.

    While they are imported, Python would search them seven times, a tenth of the time of the imports.
    """
    gc.freeze()
    atexit.register(gc.unfreeze)  # where Python itself ends the process, Triton reports what is frozen as leaks
    gc.enable()
    watch_spinning()


def end(status: int) -> NoReturn:
    """End the process as Python does, but without taking all modules apart, which takes torch's 1.5 s."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if stream is not None]
    try:
        for stream in streams:
            stream.flush()
    except OSError:
        if not reader_is_gone():
            sys.exit(status)  # Python says what could not be written
        status = NO_READER
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in streams:
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)
