"""How long to fuzz, and what came of it.

    FUZZ_EXAMPLES=100000 python -m pytest tests/fuzz -k math
"""  # fmt: skip

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "fuzz", max_examples=int(os.environ.get("FUZZ_EXAMPLES", "200")), deadline=None, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
settings.load_profile("fuzz")
TOLD: list[str] = []


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """A warning an input would be kept by pytest until the end."""
    log = logging.getLogger("grpo_dist")
    level = log.level
    log.setLevel(logging.ERROR)
    yield
    log.setLevel(level)


@pytest.fixture
def outcomes(request: pytest.FixtureRequest) -> Iterator[Counter[str]]:
    """Counts what became of each input; the totals stand at the end of pytest's output."""
    counts: Counter[str] = Counter()
    begun = time.monotonic()
    yield counts
    parts = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(counts.items()))
    TOLD.append(f"{request.node.name}: {counts.total():,} inputs in {time.monotonic() - begun:.0f} s: {parts}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the totals."""
    for line in TOLD:
        terminalreporter.write_line(line)
