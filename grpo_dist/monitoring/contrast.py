"""The best and the worst completion of a group side by side, as a table for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich import box
from rich.table import Table
from rich.text import Text

from ..text.plain import plain
from ..types import Batch

_PROMPT_CHARACTERS = 300
_TEXT_CHARACTERS = 600


@dataclass(frozen=True)
class Shown:
    """One completion of a contrast."""

    text: str
    reward: float
    advantage: float
    num_tokens: int
    finished: bool


def contrast(batch: Batch, texts: Sequence[str]) -> tuple[str, Shown, Shown] | None:
    """Return a prompt with the best and worst completion of its group, the first of those whose rewards differ most.

    `texts` are the N completions. None where no two completions of a group are scored.
    """
    low = torch.full((len(batch.prompts),), float("inf"), dtype=torch.float64)
    high = -low
    scored = ~batch.reward.isnan()
    low = low.scatter_reduce(0, batch.group[scored], batch.reward[scored], "amin")
    high = high.scatter_reduce(0, batch.group[scored], batch.reward[scored], "amax")
    counts = torch.bincount(batch.group[scored], minlength=len(batch.prompts))
    spread = torch.where(counts > 1, high - low, -1.0)
    chosen = int(spread.argmax())
    if spread[chosen] < 0:
        return None
    members = torch.nonzero(scored & (batch.group == chosen))[:, 0]
    order = batch.reward[members].argsort(stable=True)
    firsts = batch.first_advantages
    worst, best = (
        Shown(texts[n], float(batch.reward[n]), float(firsts[n]), int(batch.lengths[n]), bool(batch.finished[n]))
        for n in (int(members[order[0]]), int(members[order[-1]]))
    )
    return batch.prompts[chosen].text, best, worst


def contrast_table(step: int, prompt: str, best: Shown, worst: Shown) -> Table:
    """Return the table; texts of the model and the data are plain text in it."""
    title = Text(f"step {step}: {plain(prompt, _PROMPT_CHARACTERS)}")
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", expand=True)
    for name, shown in (("best of its group", best), ("worst", worst)):
        cut = "" if shown.finished else ", cut off"
        numbers = f"reward {shown.reward:.3g}, advantage {shown.advantage:+.2f}, {shown.num_tokens} tokens{cut}"
        table.add_column(Text(f"{name}\n{numbers}"), ratio=1, overflow="fold")
    table.add_row(*(Text(plain(shown.text, _TEXT_CHARACTERS)) for shown in (best, worst)))
    return table
