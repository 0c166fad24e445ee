"""What a run says while it goes on: a live view on a terminal, one plain line a step in a log.

A log holds nothing that a model wrote and no control characters.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import TextIO

import transformers
from rich.console import Console
from torch import Tensor

from ..text.plain import plain_lines
from ..types import Batch
from .alarms import Alarm
from .contrast import contrast, contrast_table
from .live_view import LiveView, clock, facts, start_live

log = logging.getLogger(__name__)


class _PlainFormatter(logging.Formatter):
    """Lines without control characters, whatever a message quotes."""

    def format(self, record: logging.LogRecord) -> str:
        return plain_lines(super().format(record))


def set_up_logging() -> None:
    """Plain lines on standard error; of other libraries only what they warn of, and none of their progress bars."""
    handler = logging.StreamHandler()
    handler.setFormatter(_PlainFormatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("grpo_dist").setLevel(logging.INFO)
    # a filter, as its import sets its level
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


class Display:
    """The progress of the run, on the main rank only."""

    def __init__(self, num_steps: int, first_step: int, active: bool, show_completions_every: int) -> None:
        self.active = active
        self.show_completions_every = show_completions_every
        self.view = LiveView(num_steps, first_step)
        self.console = Console(stderr=True, highlight=False)
        # asked of the stream itself: variables that force colours make rich take a log for a terminal
        on_terminal = active and sys.stderr.isatty() and not self.console.is_dumb_terminal
        before = sys.stderr
        self.live = start_live(self.view, self.console) if on_terminal else None
        _redirect_logging(before, sys.stderr)  # which a live view has replaced by one that prints above it
        if first_step >= num_steps:
            self.say(f"all {num_steps} steps are done already; raise train.num_train_steps to go on")

    def phase(self, name: str) -> None:
        """Say what is being done now."""
        self.view.phase = name

    def say(self, text: str) -> None:
        """One line that stays."""
        if self.active:
            log.info("%s", text)

    def shows_completions(self, step: int) -> bool:
        """Whether the completions of this step are to be shown."""
        return bool(self.live and self.show_completions_every and step % self.show_completions_every == 0)

    def completions(self, step: int, batch: Batch, texts: Sequence[str], advantages: Tensor) -> None:
        """Show the best and the worst of a group, on a terminal, where it is due."""
        found = contrast(batch, texts, advantages) if self.shows_completions(step) else None
        if found is not None:
            self.console.print(contrast_table(step, *found))

    def alarms(self, new: Sequence[Alarm], ringing: Collection[str]) -> None:
        """Say what goes wrong, and where it is said what to do; `ringing` are all alarms that are on."""
        self.view.ringing = sorted(ringing)
        for alarm in new:
            log.warning("ALARM %s. What to do: %s", alarm.message, alarm.page)

    def step(self, metrics: Mapping[str, float | None]) -> None:
        """A step is done."""
        self.view.add(metrics)
        if self.active and not self.live:
            reward = metrics.get("reward/mean")
            told = ["no reward" if reward is None else f"reward {reward:.3f}", *facts(metrics)]
            left = clock(self.view.seconds_left or 0)
            log.info("step %d/%d  %s  %s left", metrics["step"], self.view.num_steps, "  ".join(told), left)

    def close(self) -> None:
        """Leave the last view on the terminal, and the terminal as it was."""
        if self.live:
            self.view.phase, before = "ended", sys.stderr
            self.live.stop()
            _redirect_logging(before, sys.stderr)


def _redirect_logging(before: TextIO, after: TextIO) -> None:
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is before:
            handler.setStream(after)
