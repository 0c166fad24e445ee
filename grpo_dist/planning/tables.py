"""Tables and sizes for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table


def readable(num_bytes: float) -> str:
    """Bytes in GiB, or in MiB below 1 GiB."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def table_of(title: str, columns: Sequence[str]) -> Table:
    """An empty table. All columns but the first contain numbers."""
    table = Table(box=box.SIMPLE, title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table
