"""What a run shows while it goes on: a live line on a terminal, one plain line a step in a log.

Nothing that a model wrote is printed here, and a log gets no control characters.
"""

from __future__ import annotations

import logging
import time
import warnings

import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from .alarms import Alarm

log = logging.getLogger(__name__)

SHOWN = {
    "reward/mean": "reward {:.3f}",
    "eval/accuracy": "accuracy {:.3f}",
    "kl": "kl {:.4f}",
    "entropy": "entropy {:.3f}",
    "completion/length_mean": "length {:.1f}",
    "grad_norm": "grad {:.3f}",
    "rollout/tokens_per_second": "{:.0f} tok/s",
    "time/step": "{:.2f} s",
}


def set_up_logging() -> None:
    """Plain lines on standard error; of other libraries only what they warn of, and none of their progress bars."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("grpo_dist").setLevel(logging.INFO)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


class Display:
    """The progress of the run, on the main rank only."""

    def __init__(self, num_steps: int, first_step: int, active: bool) -> None:
        self.num_steps = num_steps
        self.active = active
        console = Console(stderr=True)
        self.live = console.is_terminal and active
        self.progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[facts]}", markup=False), console=console, disable=not self.live,
        )  # fmt: skip
        self.task = self.progress.add_task("starting", total=num_steps, completed=first_step, facts="")
        if first_step >= num_steps:
            self.say(f"all {num_steps} steps are done already; raise train.num_train_steps to go on")
        self.started = time.monotonic()
        if self.live:
            self.progress.start()

    def phase(self, name: str) -> None:
        """Say what is being done now."""
        self.progress.update(self.task, description=name)

    def say(self, text: str) -> None:
        """One line that stays."""
        if not self.active:
            return
        if self.live:
            self.progress.console.print(text, markup=False, highlight=False)
        else:
            log.info("%s", text)

    def alarm(self, alarm: Alarm) -> None:
        """Say what goes wrong, and where it is said what to do."""
        log.warning("ALARM %s. What to do: %s", alarm.message, alarm.page)

    def step(self, metrics: dict[str, float]) -> None:
        """A step is done."""
        facts = "  ".join(form.format(metrics[name]) for name, form in SHOWN.items() if metrics.get(name) is not None)
        self.progress.update(self.task, completed=metrics["step"], facts=facts)
        if self.active and not self.live:
            log.info("step %d/%d  %s", metrics["step"], self.num_steps, facts)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self.progress.stop()
