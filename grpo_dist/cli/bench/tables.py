"""The tables of a benchmark, in Markdown. Pure."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

PHASES = ("rollout", "reward", "reference", "update", "sync")


@dataclass(frozen=True)
class Pair:
    """One step of ours, and the peer's step with the same work."""

    ours: dict[str, Any]
    theirs: dict[str, Any] | None = None

    @property
    def tokens(self) -> float:
        """Completion tokens of our step."""
        return self.ours["metrics"]["tokens/completion"]

    @property
    def their_tokens(self) -> int:
        """Completion tokens of the peer's step."""
        return sum(self.theirs["lengths"]) if self.theirs else 0

    @property
    def ratio(self) -> float:
        """The peer's seconds per completion token divided by ours."""
        return self._ratio(self.ours["seconds"], self.theirs["seconds"]) if self.theirs else 0

    @property
    def rollout_ratio(self) -> float | None:
        """The same of the rollout alone; None where the peer does not say how long its rollout took."""
        if self.theirs is None or "rollout_seconds" not in self.theirs:
            return None
        return self._ratio(self.ours["metrics"]["time/rollout"], self.theirs["rollout_seconds"])

    def _ratio(self, seconds: float, their_seconds: float) -> float:
        return (their_seconds / self.their_tokens) / (seconds / self.tokens)


def table(rows: list[list[str]]) -> str:
    """Rows of cells as Markdown. The first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in padded]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def pairs_table(name: str, pairs: list[Pair], peer: str) -> str:
    """Every pair of steps."""
    rows = [["workload", "pair", "seconds", f"{peer} seconds", "tokens", f"{peer} tokens", "ratio per token"]]
    for number, pair in enumerate(pairs, 1):
        assert pair.theirs is not None, "a table of pairs needs a peer"
        rows.append([name, str(number), f"{pair.ours['seconds']:.2f}", f"{pair.theirs['seconds']:.2f}",
                     f"{pair.tokens:.0f}", str(pair.their_tokens), f"{pair.ratio:.1f}"])  # fmt: skip
    return table(rows)


def summary_row(name: str, pairs: list[Pair], peer: str | None) -> dict[str, str]:
    """The medians of one workload over its steps."""

    def median(get: Any) -> float:
        return statistics.median(get(pair) for pair in pairs)

    def phase(name: str) -> float:
        return median(lambda pair: pair.ours["metrics"].get(f"time/{name}", 0.0))

    row = {"workload": name}
    if peer:
        row[f"{peer} ÷ ours, per token"] = _spread([pair.ratio for pair in pairs])
        if of_rollouts := [pair.rollout_ratio for pair in pairs if pair.rollout_ratio is not None]:
            row["of the rollout alone"] = _spread(of_rollouts)
        row[f"{peer}: s a step"] = f"{median(lambda pair: pair.theirs['seconds']):.2f}"
    row |= {"s a step": f"{median(lambda pair: pair.ours['seconds']):.2f}",
            "tokens a step": f"{median(lambda pair: pair.tokens):.0f}",
            "tokens/s": f"{median(lambda pair: pair.tokens / pair.ours['seconds']):.0f}"}  # fmt: skip
    if "time/update" in pairs[0].ours["metrics"]:  # else rollouts alone were timed
        row |= {name: f"{phase(name):.2f}" for name in PHASES}
        row["useful share"] = f"{median(lambda pair: pair.ours['metrics']['tokens/useful_share']):.3f}"
    row["peak GiB"] = f"{max(pair.ours['peak_gib'] for pair in pairs):.2f}"
    if peer:
        row[f"{peer}: peak GiB"] = f"{max(pair.theirs['peak_gib'] for pair in pairs if pair.theirs):.2f}"
    return row


def _spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
