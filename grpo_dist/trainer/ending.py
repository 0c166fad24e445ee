"""How a run ends: done, stopped to be continued, or failed on all ranks or on this one; and what is said about it."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import torch

from ..checkpoint.state import TrainState
from ..config.names import DRY_RUN
from ..config.parse import let_first_rank_answer, parse_config
from ..config.places import UnwritableOutput
from ..config.schema import Config
from ..distributed.launch import LaunchError, tell_error_of_start
from ..distributed.ranks import PhaseError
from ..distributed.watch import Interrupted
from ..model.files import UnfitModel
from ..monitoring.console import set_up_logging
from ..preflight.look import dry_run
from ..report.page import write_report
from ..text.plain import plain_lines, write_lines
from .build import UserError, build, close
from .gathering import RewardFailure
from .parts import Parts
from .record import summary
from .saving import save_checkpoint

log = logging.getLogger(__name__)

PAGE_SECONDS = 60.0
"""How long the first rank may take to write the page of a run that has failed, and to say why."""


def main(train: Callable[[Parts, TrainState], None], arguments: list[str] | None = None) -> int:
    """The command line around a training; returns the exit status.

    0: done, or stopped by a signal or the time limit with a checkpoint to go on from. 1: failed, after a checkpoint
    where servers that the run needs are gone. 2: a mistake in the config, the data or the model, before anything was
    learned. With --dry_run nothing is trained: see preflight/look.py.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if DRY_RUN in words:
        return dry_run([word for word in words if word != DRY_RUN])
    return run(train, parse_config(words))


def run(train: Callable[[Parts, TrainState], None], config: Config) -> int:
    """Build the parts of a training, train, and return the exit status as `main` does."""
    set_up_logging()
    try:
        parts, state = build(config)
    except (UserError, LaunchError) as error:  # most are raised on all ranks
        tell_error_of_start(error)
        return 2
    status, all_ranks, message, dies = 1, True, "", False
    try:
        status, message = _train_or_stop(train, parts, state)
    except UnfitModel as error:  # raised on all ranks alike
        status, message = 2, f"error: {error}"
    except (PhaseError, RewardFailure, FloatingPointError) as error:  # these are raised on all ranks alike
        message = f"error: {_with_advice(str(error), config)}"
    except BaseException as error:  # the other ranks may be in a collective that this one will never join
        all_ranks, dies = False, parts.ranks.num_ranks > 1
        is_plain = isinstance(error, UnwritableOutput)
        reason = f"rank {parts.ranks.rank} died: {type(error).__name__}: {error}"
        reason = str(error) if is_plain else _with_advice(reason, config)
        if dies or is_plain or isinstance(error, torch.OutOfMemoryError):
            where = "" if is_plain else traceback.format_exc()
            write_lines(f"{where}error: {plain_lines(reason)}", sys.stderr)
        if dies:
            parts.watch.end_all(reason)
        if not is_plain:
            raise
    finally:
        close(parts, all_ranks)
        if dies:  # without the interpreter's own end, which may wait for collectives under way
            logging.shutdown()
            sys.stderr.flush()
            os._exit(status)
        if parts.ranks.is_main and message:
            _report(parts.directory)
            message = summary(parts) if message == "done" else plain_lines(message)  # it may quote what a model wrote
            _say(message, sys.stderr if status else sys.stdout)
    if status:
        let_first_rank_answer("RANK", PAGE_SECONDS)
    return status


def _train_or_stop(train: Callable[[Parts, TrainState], None], parts: Parts, state: TrainState) -> tuple[int, str]:
    """Train, or save where the training is interrupted; returns the exit status and what to say."""
    try:
        train(parts, state)
    except Interrupted as stop:
        save_checkpoint(parts, state)
        reason = f"{'error' if stop.failed else 'stopped'}: {stop}"
        return int(stop.failed), f"{reason}. The same command goes on from step {state.step}"
    return 0, "done"


def _say(message: str, stream: TextIO) -> None:
    try:
        write_lines(message, stream)
    except OSError as error:  # nobody reads it, or its disk is full: the run has ended all the same
        log.warning("this cannot be printed (%s): %s", error.strerror, message)


def _report(directory: Path) -> None:
    try:
        write_report([directory])
    except Exception as error:  # a page about the run that cannot be written must not make the run a failed one
        log.warning("no report was written (%s: %s); once that is mended, `python -m grpo_dist report %s` writes it",
                    type(error).__name__, error, directory)  # fmt: skip


def _with_advice(error: str, config: Config) -> str:
    if torch.OutOfMemoryError.__name__ not in error and "out of memory" not in error:
        return error
    return (
        f"{error}\nOut of memory. Lower train.max_tokens_per_pack (now {config.train.max_tokens_per_pack}) if it was "
        f"in the update, rollout.max_tokens_in_flight (now {config.rollout.max_tokens_in_flight}) if in the rollout; "
        f"or turn on model.gradient_checkpointing (now {config.model.gradient_checkpointing})"
    )
