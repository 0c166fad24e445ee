"""The live view of a run on a terminal of any width, redrawn in place.

It neither hides the cursor nor leaves the terminal's normal screen: after a run that is killed, nothing needs a repair.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from ..types import Metrics

BLOCKS = "▁▂▃▄▅▆▇█"
SHADES = "█▓▒░▚·"
COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "dim")
PHASES = ("rollout", "reward", "reference", "update", "sync")
"""Phases of a step in their order; the rest of a step is `other`."""
SHOWN = {
    "eval/accuracy": "accuracy {:.3f}",
    "kl": "kl {:.4f}",
    "entropy": "entropy {:.3f}",
    "completion/length_mean": "length {:.1f}",
    "completion/truncated": "truncated {:.0%}",
    "grad_norm": "grad {:.3f}",
    "rollout/tokens_per_second": "{:,.0f} tok/s",
    "memory/peak_gib": "{:.1f} GiB",
    "time/step": "{:.2f} s/step",
}
"""Metrics that are shown, with their formats."""
_TIMED_STEPS = 20


def sparkline(values: Sequence[float], width: int) -> str:
    """Return numbers as at most `width` blocks between the lowest and the highest; more numbers are averaged."""
    if not values or width < 1:
        return ""
    count = min(width, len(values))
    edges = [place * len(values) // count for place in range(count + 1)]
    shown = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(shown), max(shown)
    if high == low:
        return BLOCKS[len(BLOCKS) // 2] * count
    return "".join(BLOCKS[round((value - low) / (high - low) * (len(BLOCKS) - 1))] for value in shown)


def shares_of_time(metrics: Metrics) -> dict[str, float]:
    """Return each phase's share of a step's seconds, with `other`; empty without the metric `time/step`."""
    total = metrics.get("time/step") or 0.0
    if total <= 0:
        return {}
    shares = {phase: (metrics.get(f"time/{phase}") or 0.0) / total for phase in PHASES}
    return shares | {"other": max(0.0, 1 - sum(shares.values()))}


def split_bar(shares: Sequence[float], width: int) -> list[int]:
    """Return the cells of each share, which add up to `width`, by largest remainders."""
    exact = [share / (sum(shares) or 1.0) * width for share in shares]
    cells = [int(cell) for cell in exact]
    missing = width - sum(cells) if any(shares) else 0
    for place in sorted(range(len(exact)), key=lambda n: cells[n] - exact[n])[:missing]:
        cells[place] += 1
    return cells


def shown_metrics(metrics: Metrics) -> list[str]:
    """Return the metrics that are shown, as far as they have a value."""
    return [form.format(value) for name, form in SHOWN.items() if (value := metrics.get(name)) is not None]


def clock(seconds: float) -> str:
    """Return seconds as H:MM:SS."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


class LiveView:
    """The lines at the bottom of the terminal."""

    def __init__(self, num_steps: int, first_step: int) -> None:
        self.num_steps, self.step = num_steps, first_step
        self.phase = "starting"
        self.ringing: Sequence[str] = ()
        """Names of the alarms that are on."""
        self._metrics: dict[str, float | None] = {}
        self._rewards: list[float] = []
        self._ends = deque([time.monotonic()], maxlen=_TIMED_STEPS + 1)

    def add(self, metrics: Metrics) -> None:
        """Add a step's metrics; a metric without a value keeps its last one."""
        self.step = int(metrics["step"] or 0)
        self._metrics |= {name: value for name, value in metrics.items() if value is not None}
        if (reward := metrics.get("reward/mean")) is not None:
            self._rewards.append(reward)
        self._ends.append(time.monotonic())

    @property
    def seconds_left(self) -> float | None:
        """Seconds to the end at the pace of the last steps; None before the first."""
        if len(self._ends) < 2:
            return None
        return (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1) * (self.num_steps - self.step)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width - 1  # a full line would wrap on some terminals
        for line in self._lines(width):
            line.truncate(width, overflow="ellipsis")
            line.no_wrap = True
            yield line

    def _lines(self, width: int) -> Iterator[Text]:
        yield self._progress(width)
        if self._rewards:
            line = Text(f"reward {self._rewards[-1]:.3f} ", style="bold")
            yield line.append(sparkline(self._rewards, max(8, min(60, width - len(line)))), style="not bold green")
        yield from _flow([Text(shown) for shown in shown_metrics(self._metrics)], width)
        shares = shares_of_time(self._metrics)
        if shares:
            marks = list(zip(shares, SHADES, COLOURS, strict=True))
            cells = split_bar(list(shares.values()), min(60, width))
            yield Text.assemble(*((mark * count, tint) for (_, mark, tint), count in zip(marks, cells, strict=True)))
            legend = [Text.assemble((mark, tint), f" {name} {shares[name]:.0%}") for name, mark, tint in marks]
            yield from _flow(legend, width)
        if self.ringing:
            yield Text(f"alarms on: {', '.join(self.ringing)}", style="bold red")

    def _progress(self, width: int) -> Text:
        left = self.seconds_left
        words = f"step {self.step}/{self.num_steps}  {clock(left) + ' left' if left is not None else ''}  {self.phase}"
        done, room = self.step / max(1, self.num_steps), min(40, width - len(words) - 2)
        if room < 6:
            return Text(words, style="bold")
        full = round(done * room)
        return Text.assemble(("━" * full, "green"), ("━" * (room - full), "dim"), ("  " + words, "bold"))


def _flow(cells: Sequence[Text], width: int) -> Iterator[Text]:
    """Yield cells side by side, in as many lines as needed."""
    line = Text()
    for cell in cells:
        if line and len(line) + 2 + len(cell) > width:
            yield line
            line = Text()
        line = Text.assemble(line, "  ", cell) if line else cell
    if line:
        yield line


def start_live(view: LiveView, console: Console) -> Live:
    """Start to draw the view twice a second; printed and logged lines go above it."""
    live = Live(view, console=console, refresh_per_second=2)
    live.start()
    console.show_cursor(True)
    return live
