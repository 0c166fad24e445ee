"""The file of figures, and the deadline of a section."""

from __future__ import annotations

import faulthandler
import json
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .device import clear

GRACE = 15
"""Seconds after its deadline in which a section that waits for the device may still end by itself."""


class Overrun(Exception):
    """A section took longer than it may."""


@dataclass
class Report:
    """What was measured so far, in a file that is written after each section."""

    path: Path

    def sections(self) -> dict[str, Any]:
        """What is in the file."""
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def forget(self, names: list[str]) -> None:
        """Leave these sections out."""
        others = {name: figures for name, figures in self.sections().items() if name not in names}
        self.path.write_text(json.dumps(others, indent=1))

    def write(self, name: str, figures: dict[str, Any]) -> None:
        """Write the figures of a section."""
        self.path.write_text(json.dumps(self.sections() | {name: figures}, indent=1))

    def run(self, name: str, seconds: int, section: Callable[[], dict[str, Any]]) -> None:
        """Run a section and write its figures, or why there are none. A process that hangs ends itself."""

        def overrun(*_: object) -> None:
            raise Overrun(f"more than {seconds} s")

        self.write(name, {"failed": "its process ended"})
        begun = time.monotonic()
        signal.signal(signal.SIGALRM, overrun)
        signal.alarm(max(seconds, 1))
        faulthandler.dump_traceback_later(max(seconds, 1) + GRACE, exit=True)
        try:
            if seconds < 1:
                raise Overrun("the sections before it took all of the time")
            figures = section()
        except BaseException as error:  # the next section runs whatever happened to this one
            figures = {"failed": f"{type(error).__name__}: {error}", "where": traceback.format_exc()[-1500:]}
        finally:
            signal.alarm(0)
        figures["seconds"] = round(time.monotonic() - begun, 1)
        self.write(name, figures)
        print(f"== {name}: {json.dumps(figures)}", flush=True)
        clear()
        faulthandler.cancel_dump_traceback_later()
