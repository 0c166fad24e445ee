"""Guards of a run: a lock on its directory, and counters of failed saves and bad updates."""

from __future__ import annotations

import logging
import math
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from safetensors.torch import save_file

from ..config.places import writing_to
from ..types import Batch

log = logging.getLogger(__name__)

LAUNCHERS_PATIENCE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""Seconds that torchrun (and therefore `accelerate launch`) waits for the ranks after a signal before it kills them."""


def warn_of_slow_save(seconds: float) -> None:
    """Warn where a save takes so long that a signal to the launcher might not leave enough time for it.

    A stop also waits for a safe point first, hence the half.
    """
    patience = float(os.environ.get(LAUNCHERS_PATIENCE, "30"))
    if seconds > patience / 2:
        log.warning(
            "saving took %.0f s, and the launcher kills ranks %.0f s after a signal: export %s=%.0f before the launch",
            seconds, patience, LAUNCHERS_PATIENCE, 4 * seconds,
        )  # fmt: skip


def lock(directory: Path) -> IO[str]:
    """Lock the output directory for this run; raises ValueError where another run has locked it.

    The kernel releases the lock when the process ends, however it ends: no lock is ever stale.
    """
    import fcntl  # not on Windows, where a run has already ended: scoring workers need POSIX

    file = (directory / ".lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        raise ValueError(f"train.output_dir: {directory} is in use by {file.read().strip() or 'another run'}; "
                         "wait for it to end, or choose another directory") from error  # fmt: skip
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


@dataclass
class FailedSaves:
    """Counts checkpoints that could not be written."""

    in_a_row: int = 0


class BadUpdates:
    """Counts updates whose gradient was not finite, saves their batch, and ends the run after too many in a row."""

    def __init__(self, directory: Path, most_in_a_row: int, is_main: bool) -> None:
        self.directory, self.most_in_a_row, self.is_main = directory / "bad_updates", most_in_a_row, is_main
        self.in_a_row = 0

    def is_skipped(self, step: int, norm: float, batch: Batch) -> bool:
        """Whether the update was skipped. Raises FloatingPointError after too many in a row, on all ranks."""
        if math.isfinite(norm):
            self.in_a_row = 0
            return False
        self.in_a_row += 1
        dump = self.directory / f"step_{step}.safetensors"
        if self.is_main:
            names = ("ids", "row_lengths", "sampled", "group", "reward", "sampled_logprobs", "advantages")
            tensors = {name: getattr(batch, name) for name in names}
            with writing_to(self.directory):
                self.directory.mkdir(exist_ok=True)
                save_file({name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}, dump)
            log.warning("step %d: the gradient's norm is %s; no rank took the step, and its batch is in %s", step, norm,
                        dump)  # fmt: skip
        if self.in_a_row >= self.most_in_a_row:
            raise FloatingPointError(
                f"{self.in_a_row} updates in a row had gradients that are not finite (train.max_bad_updates: "
                f"{self.most_in_a_row}); the last batch is in {dump}. Lower optim.learning_rate, or look at the rewards"
            )
        return True
