"""Read rows from JSONL, JSON, CSV and parquet files, directories and hub data sets.

What is wrong with the place they come from is an error here; what is wrong with a row is left for `data.py` to judge.
JSONL has a reader of its own, so that every row knows its line.
"""

from __future__ import annotations

import codecs
import difflib
import json
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LINES = (".jsonl", ".ndjson")
_BUILDERS = {".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Row:
    """One row as it was read."""

    number: int
    """Its line in a JSONL file, its place in any other data set; both from 1."""
    columns: dict[str, Any]
    """Its values by column; empty where it could not be read."""
    problem: str = ""
    """Why it could not be read."""


def load_rows(path: str, split: str, subset: str | None = None) -> list[Row]:
    """Read all rows of a JSONL file, or of anything `datasets.load_dataset` takes.

    `split` and `subset` choose from a directory or a hub data set; a single file has neither. Raises FileNotFoundError
    where there is no such file, ValueError where it cannot be read or is empty. JSONL lines that are not JSON objects
    come back as rows with a `problem`; lines of white space are no rows.
    """
    _check_file(path)
    if is_lines(path):
        rows = list(_read_lines(path))
    else:
        rows = [Row(number, columns) for number, columns in enumerate(_open_dataset(path, split, subset), 1)]
    if not rows:
        raise ValueError(f"{path} is empty, expected at least one row")
    return rows


class RowReader:
    """Rows of a data set by their place, read when they are asked for.

    Of a JSONL file only where its lines begin is held, 16 bytes each; any other data set is mapped into memory.
    """

    def __init__(self, path: str, split: str, subset: str | None = None) -> None:
        """Find the rows; raises as `load_rows` does."""
        self._path = path
        self._table: Any = None
        if is_lines(path):
            _check_file(path)
            ends, lines = array("q", [0]), array("q")
            with Path(path).open("rb") as file:
                for number, line in enumerate(file):
                    ends.append(ends[-1] + len(line))
                    if not _is_blank(number + 1, line):
                        lines.append(number)
            self._starts, self._lines = ends, lines
            self._count = len(lines)
        else:
            self._table = _open_dataset(path, split, subset)
            self._count = len(self._table)
        if not self._count:
            raise ValueError(f"{path} is empty, expected at least one row")

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: int) -> Row:
        """Return a row; one that cannot be read has a `problem`."""
        if self._table is not None:
            return Row(place + 1, self._table[place])
        line = self._lines[place]
        with Path(self._path).open("rb") as file:
            file.seek(self._starts[line])
            row = _read_line(line + 1, file.read(self._starts[line + 1] - self._starts[line]))
        assert row is not None, "blank lines are left out above"
        return row


def is_lines(path: str) -> bool:
    """Whether a file is read line by line, so that its rows are numbered by line."""
    return Path(path).suffix.lower() in _LINES


def _read_lines(path: str) -> Iterator[Row]:
    """Read a JSONL file; what is wrong with a line is left for the caller to judge."""
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            row = _read_line(number, line)
            if row is not None:
                yield row


def _read_line(number: int, line: bytes) -> Row | None:
    """Return the row of a line, or None where it is blank."""
    if _is_blank(number, line):
        return None
    try:
        value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8").strip())
    # ValueError covers broken UTF-8 and JSON, and integers beyond Python's limit on digits.
    except (ValueError, RecursionError) as error:
        return Row(number, {}, f"not JSON: {error}")
    if isinstance(value, dict):
        return Row(number, value)
    return Row(number, {}, f'a JSON {type(value).__name__}, expected an object such as {{"prompt": …}}')


def _is_blank(number: int, line: bytes) -> bool:
    """Whether a line holds nothing but JSON's white space (and, as the first, a byte order mark): it is no row."""
    return not (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip()


def _check_file(path: str) -> None:
    """Raise FileNotFoundError where a path is a file's by its ending and there is no such file."""
    suffix = Path(path).suffix.lower()
    if (suffix in _LINES or suffix in _BUILDERS) and not Path(path).is_file():
        folder = Path(path).parent
        hint = _neighbours(path) if folder.is_dir() else f"; there is no directory {str(folder)!r} either"
        if Path(path).parts[0] == "configs":
            hint += " (`python -m grpo_dist examples` makes the one that ships with grpo_dist)"
        raise FileNotFoundError(f"no file {path!r} in {Path.cwd()}{hint}")


def _open_dataset(path: str, split: str, subset: str | None) -> Any:
    """Open a file, a directory or a hub data set through `datasets`, which maps it into memory."""
    import datasets

    suffix = Path(path).suffix.lower()
    try:
        if Path(path).is_file():
            if suffix not in _BUILDERS:
                raise ValueError(f"expected a file that ends in one of {', '.join([*_LINES, *_BUILDERS])}")
            options = {"sep": "\t"} if suffix == ".tsv" else {}
            table = datasets.load_dataset(_BUILDERS[suffix], data_files=path, split="train", **options)
        elif Path(path).is_dir() or _HUB_ID.fullmatch(path):
            table = datasets.load_dataset(path, subset, split=split)
        else:
            raise ValueError("neither a file or directory nor a data set's hub id")
        return table
    except Exception as error:  # `datasets` raises some dozen kinds; splits and subsets there are stand in the message
        where = "" if Path(path).exists() else f"; it is no file or directory here{_neighbours(path)}"
        raise ValueError(
            f"{path!r} (subset {subset!r}, split {split!r}) cannot be loaded: {_reason(error)}{where}"
        ) from error


def _reason(error: BaseException) -> str:
    """Return an error's message with that of its cause, which is where `datasets` keeps what was wrong with a file."""
    reason = f"{type(error).__name__}: {error}"
    return f"{reason} ({error.__cause__})" if error.__cause__ is not None else reason


def _neighbours(path: str) -> str:
    """Return a hint with the names nearest to that of a path which leads nowhere, where there are such."""
    wanted = Path(path)
    if not wanted.parent.is_dir():
        return ""
    names = sorted(entry.name for entry in wanted.parent.iterdir() if not entry.name.startswith("."))
    near = difflib.get_close_matches(wanted.name, names, n=3)
    return f"; near it: {', '.join(str(wanted.parent / name) for name in near)}" if near else ""
