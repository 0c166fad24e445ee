"""The output of a run: a live view on a terminal, or one plain line for each step in a log.

A log has no completions and no control characters.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Collection, Sequence
from typing import TextIO

import transformers
from rich.console import Console

from ..text.plain import plain_lines
from ..types import Batch, Metrics
from .advice import advice
from .alarms import Alarm
from .contrast import contrast, contrast_table
from .live_view import LiveView, clock, shown_metrics, start_live

log = logging.getLogger(__name__)


class _PlainFormatter(logging.Formatter):
    """Lines without control characters, whatever a message quotes."""

    def format(self, record: logging.LogRecord) -> str:
        return plain_lines(super().format(record))


def set_up_logging() -> None:
    """Log plain lines to standard error; of other libraries only warnings, and no progress bars."""
    handler = logging.StreamHandler()
    handler.setFormatter(_PlainFormatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("grpo_dist").setLevel(logging.INFO)
    # a filter, because its import sets its level
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.WARNING)
    for library in ("huggingface_hub", "datasets"):  # they print their own lines, and each would be there twice
        logging.getLogger(library).propagate = False
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


class Display:
    """The progress of the run, on the main rank only."""

    def __init__(self, num_steps: int, first_step: int, active: bool, show_completions_every: int) -> None:
        self.active = active
        self.show_completions_every = show_completions_every
        self.view = LiveView(num_steps, first_step)
        self._advised: dict[str, int] = {}
        self.console = Console(stderr=True, highlight=False)
        # the stream itself knows: with variables that force colours, rich takes a log for a terminal
        on_terminal = active and sys.stderr.isatty() and not self.console.is_dumb_terminal
        before = sys.stderr
        self.live = start_live(self.view, self.console) if on_terminal else None
        _redirect_logging(before, sys.stderr)  # a live view has replaced the stream by one that prints above it
        if first_step >= num_steps:
            self.say(f"all {num_steps} steps are done already; raise train.num_train_steps to continue")

    def phase(self, name: str) -> None:
        """Show the current phase."""
        self.view.phase = name

    def say(self, text: str) -> None:
        """Log one line."""
        if self.active:
            log.info("%s", text)

    def shows_completions(self, step: int) -> bool:
        """Whether completions of this step are shown."""
        return bool(self.live and self.show_completions_every and step % self.show_completions_every == 0)

    def completions(self, step: int, batch: Batch, texts: Sequence[str]) -> None:
        """Show the best and the worst completion of a group on a terminal, where this step shows completions."""
        chosen = contrast(batch, texts) if self.shows_completions(step) else None
        if chosen is not None:
            self.console.print(contrast_table(step, *chosen))

    def alarms(self, new: Sequence[Alarm], ringing: Collection[str]) -> None:
        """Log new alarms, the first of each kind with what to do about it; `ringing` are all alarms that are on."""
        self.view.ringing = sorted(ringing)
        for alarm in new:
            first = self._advised.setdefault(alarm.name, alarm.step)
            what_to_do = advice(alarm.name) if first == alarm.step else f"see the alarm of step {first}"
            log.warning("ALARM %s. What to do: %s", alarm.message, what_to_do)

    def step(self, metrics: Metrics) -> None:
        """Show that a step is done."""
        self.view.add(metrics)
        if self.active and not self.live:
            reward = metrics.get("reward/mean")
            shown = ["no reward" if reward is None else f"reward {reward:.3f}", *shown_metrics(metrics)]
            left = clock(self.view.seconds_left or 0)
            log.info("step %d/%d  %s  %s left", metrics["step"], self.view.num_steps, "  ".join(shown), left)

    def close(self) -> None:
        """Leave the last view on the terminal, and restore the stream of the log."""
        if self.live:
            self.view.phase, before = "ended", sys.stderr
            self.live.stop()
            _redirect_logging(before, sys.stderr)


def _redirect_logging(before: TextIO, after: TextIO) -> None:
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is before:
            handler.setStream(after)
