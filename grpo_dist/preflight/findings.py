"""The result of a check, collected until all parts are checked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Findings:
    """Problems, which would stop a run or make it worthless, and remarks, which the user should read."""

    problems: list[str] = field(default_factory=list)
    """Each names what was given and what was expected, and says what to do."""
    remarks: list[str] = field(default_factory=list)
    results: dict[str, list[str]] = field(default_factory=dict)
    """Lines to print, by topic."""

    @contextmanager
    def attempt(self, prefix: str = "") -> Iterator[None]:
        """Record an error as a problem and continue after the block.

        `prefix` names the option for errors of other libraries, which name none of its group.
        """
        try:
            yield
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            is_named = re.match(rf"{prefix.partition('.')[0]}\.\w+: ", str(error))
            problem = str(error) if is_named else f"{prefix}{error}"
            if problem not in self.problems:
                self.problems.append(problem)
