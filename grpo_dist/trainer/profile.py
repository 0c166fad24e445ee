"""What a step computes and when, as a file that opens in Perfetto (https://ui.perfetto.dev)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from .parts import Parts

log = logging.getLogger(__name__)


@contextmanager
def profiled(parts: Parts, step: int) -> Iterator[None]:
    """A context for a step; if it is `logging.profile_step`, each rank writes its operations, kernels and phases."""
    if step != parts.config.logging.profile_step:
        yield
        return
    with torch.profiler.profile() as profile:
        yield
    path = profile_path(parts.directory, step, parts.ranks.rank)
    try:
        path.parent.mkdir(exist_ok=True)
        profile.export_chrome_trace(str(path))
    except (OSError, RuntimeError) as error:  # a run does not end for it
        log.warning("logging.profile_step: the profile of step %d was not written: %s", step, error)
    else:
        log.info("profile of step %d: %s opens in https://ui.perfetto.dev", step, path)


def profile_path(directory: Path, step: int, rank: int) -> Path:
    """The file of a rank, in a run's directory."""
    return directory / "profile" / f"step_{step}_rank_{rank}.json.gz"
