"""data.keep: which rows of a file or data set a run takes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from .rows import Row, list_columns

log = logging.getLogger(__name__)


def rows_to_keep(path: str, rows: Sequence[Row], names: Sequence[str], keep: Mapping[str, Any] | None) -> list[bool]:
    """Return which rows pass data.keep, and log how many each column leaves out; raises ValueError for a wrong one."""
    kept = [True] * len(rows)
    left_out = []
    for column, condition in (keep or {}).items():
        if column not in names:
            raise ValueError(f"data.keep: {path} has no column {column!r}; it has {list_columns(names)}")
        if isinstance(condition, dict) and (not condition or not set(condition) <= {"min", "max"}):
            raise ValueError(f"data.keep.{column}: {condition!r} given, expected a value, a list, or min and max")
        try:
            passes = [not row.columns or _passes(_comparable(row, column, condition), condition) for row in rows]
        except TypeError as error:
            raise ValueError(f"data.keep.{column}: {condition!r} cannot be compared: {error}") from error
        left_out.append(f"{column}: {passes.count(False)}")
        kept = [a and b for a, b in zip(kept, passes, strict=True)]
    if left_out:
        reasons = ", ".join(left_out)
        log.info("%s: data.keep keeps %d of %d rows (left out by %s)", path, sum(kept), len(rows), reasons)
    return kept


def _comparable(row: Row, column: str, condition: Any) -> Any:
    """A row's value, as a number where the file has only texts and the condition has numbers."""
    value = row.columns.get(column)
    examples = (
        condition.values() if isinstance(condition, dict) else condition if isinstance(condition, list) else [condition]
    )
    if row.is_text and value is not None and all(isinstance(each, (int, float)) for each in examples):
        try:
            return float(value)
        except ValueError:
            return None
    return value


def _passes(value: Any, condition: Any) -> bool:
    if isinstance(condition, dict):
        return value is not None and condition.get("min", value) <= value <= condition.get("max", value)
    return value in condition if isinstance(condition, list) else value == condition
