"""What a check has to say, gathered until everything has been looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Findings:
    """Problems that would stop a run or make it worthless, and remarks that are worth a look."""

    problems: list[str] = field(default_factory=list)
    """Each names what was given and what was expected, and says what to do."""
    remarks: list[str] = field(default_factory=list)
    facts: dict[str, list[str]] = field(default_factory=dict)
    """What was found, line by line, under the name of what was looked at."""

    @contextmanager
    def attempt(self, prefix: str = "") -> Iterator[None]:
        """Take what the house raises for a user's mistake as a problem, and go on after the block.

        `prefix` is for errors of other libraries, which do not name the option.
        """
        try:
            yield
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            is_named = str(error).startswith(f"{prefix.partition(':')[0]}:")
            problem = str(error) if is_named else f"{prefix}{error}"
            if problem not in self.problems:
                self.problems.append(problem)
