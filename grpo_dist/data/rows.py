"""Read rows from JSONL, JSON, CSV and parquet files, directories, hub data sets and reasoning-gym.

An error of a file or data set is raised here; `prompts.py` handles an error of a row. JSONL has a reader of its own, so
that every row knows its line. JSON and CSV have readers of their own too, so that values are what the file says:
`datasets` reads the text 2024-01-01 of a JSON file as a point in time, and 007 of a CSV file as 7.
"""

from __future__ import annotations

import codecs
import csv
import json
import logging
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..text.files import near_paths
from .reasoning_gym import Generated, is_generated

log = logging.getLogger(__name__)

_LINES = (".jsonl", ".ndjson")
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_OTHER_SEPARATORS = ";\t|,"
_FILES = (*_LINES, ".json", *_SEPARATORS, ".parquet")
_AS_TEXT = {"keep_default_na": False, "na_values": [""]}
"""Options with which the CSV reader of `datasets` keeps NA and null as texts; an empty cell has no value."""
_CALLS = re.compile(r"\s*(Example of usage:\s*`[^`]*`|Please use `[^`]*`[^.]*\.)", re.DOTALL)
_SHOWN_NAMES = 20
_ARRAY_HINT = "; if the file is one array of rows, let its name end in .json"
_MOST_CELL_CHARACTERS = 2**31 - 1
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Row:
    """One row as read."""

    number: int
    """Its line in a JSONL file, or its place in any other data set; both from 1."""
    columns: dict[str, Any]
    """Its values by column; empty where it could not be read."""
    problem: str = ""
    """Why it could not be read."""
    is_text: bool = False
    """Whether its values are texts because the file has only texts, as in CSV."""
    is_filled: bool = False
    """Whether objects in it have all keys of those in their column, None where they lack one, as in parquet."""


def load_rows(path: str, split: str, subset: str | None = None) -> list[Row]:
    """All rows of `open_rows`, read now."""
    return list(open_rows(path, split, subset))


def open_rows(path: str, split: str, subset: str | None = None) -> Sequence[Row]:
    """The rows of a JSONL file, of what `datasets.load_dataset` or `save_to_disk` know, or of `reasoning_gym:…`.

    `split` and `subset` choose from a directory or a hub data set; a single file has neither. Raises FileNotFoundError
    where there is no such file, ValueError where it cannot be read or is empty. JSONL lines that are not JSON objects
    become rows with a `problem`; lines of white space are no rows. The values of a CSV file are texts, None where
    a cell is empty. JSON and CSV files are read at once, and rows of others when they are needed.
    """
    check_file(path)
    rows = _Lines(path) if is_lines(path) else _open_table(path, split, subset)
    if not rows:
        raise ValueError(f"{path} is empty, expected at least one row")
    return rows


class _Lines(Sequence[Row]):
    """Rows of a JSONL file. Memory has only the place of each line, 16 bytes."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._starts, self._lines = array("q", [0]), array("q")
        with self._path.open("rb") as file:
            for number, line in enumerate(file):
                self._starts.append(self._starts[-1] + len(line))
                if not _is_blank(number + 1, line):
                    self._lines.append(number)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, place: Any) -> Any:
        line = self._lines[place]
        with self._path.open("rb") as file:
            file.seek(self._starts[line])
            row = _read_line(line + 1, file.read(self._starts[line + 1] - self._starts[line]))
        assert row is not None, "blank lines are left out above"
        return row

    def __iter__(self) -> Iterator[Row]:
        with self._path.open("rb") as file:
            for number, line in enumerate(file, 1):
                row = _read_line(number, line)
                if row is not None:
                    yield row


def list_columns(names: Sequence[str]) -> str:
    """The names of columns, for a message."""
    return ", ".join(names[:_SHOWN_NAMES]) + (", …" if len(names) > _SHOWN_NAMES else "")


def is_lines(path: str) -> bool:
    """Whether a file is read line by line, so that its rows are numbered by line."""
    return Path(path).suffix.lower() in _LINES


def _read_line(number: int, line: bytes) -> Row | None:
    """Return the row of a line, or None where it is blank."""
    if _is_blank(number, line):
        return None
    try:
        value = _loads(line.decode("utf-8-sig" if number == 1 else "utf-8").strip())
    # ValueError covers broken UTF-8 and JSON, and integers beyond Python's limit on digits.
    except (ValueError, RecursionError) as error:
        hint = _ARRAY_HINT if line.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[") else ""
        return Row(number, {}, f"not JSON: {error}{hint}")
    return _row_of_json(number, value, b"\\u" in line)


def _loads(text: str) -> Any:
    """The value of a JSON text. Raises ValueError, also where an object has a name twice: JSON's parsers keep one of
    the values without a word."""
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the name {name!r} occurs twice in an object")
    return values


def _row_of_json(number: int, value: Any, is_escaped: bool) -> Row:
    """The row of an object; one with half a character, which only an escape can write, has a `problem`."""
    if not isinstance(value, dict):
        hint = _ARRAY_HINT if isinstance(value, list) else ""
        return Row(number, {}, f'a JSON {type(value).__name__}, expected an object such as {{"prompt": …}}{hint}')
    if is_escaped:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start : error.end]
            return Row(number, {}, f"half a character ({half!a}: a lone surrogate), expected text")
    return Row(number, value)


def _is_blank(number: int, line: bytes) -> bool:
    """Whether a line is no row: it has only JSON's white space and, as the first line, a byte order mark."""
    return not (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip()


def check_file(path: str) -> None:
    """Raise FileNotFoundError where a path has the ending of a file and there is no such file."""
    suffix = Path(path).suffix.lower()
    if suffix in _FILES and not Path(path).is_file():
        folder = Path(path).parent
        hint = near_paths(path) if folder.is_dir() else f"; there is no directory {str(folder)!r} either"
        if Path(path).parts[0] == "configs":
            hint += " (`python -m grpo_dist examples` makes the one that ships with grpo_dist)"
        raise FileNotFoundError(f"no file {path!r} in {Path.cwd()}{hint}")


class _Table(Sequence[Row]):
    """Rows of a data set that is mapped into memory, or generated."""

    def __init__(self, table: Any, is_text: bool) -> None:
        self._table, self._is_text = table, is_text

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, place: Any) -> Any:
        with _decoding(place + 1):
            return Row(place + 1, self._table[place], is_text=self._is_text, is_filled=True)

    def tell_classes(self, path: str) -> None:
        """Log which columns have the numbers of classes, as for TRL's rewards, and the names that they stand for."""
        for column, feature in self._table.features.items():
            if names := getattr(feature, "names", None):
                classes = list_columns([f"{number} {name!r}" for number, name in enumerate(names)])
                log.info("%s: column %s has numbers of classes, and rewards get these: %s", path, column, classes)

    def __iter__(self) -> Iterator[Row]:
        with _decoding(None):
            for number, columns in enumerate(self._table, 1):
                yield Row(number, columns, is_text=self._is_text, is_filled=True)


@contextmanager
def _decoding(row: int | None) -> Iterator[None]:
    """Inside, an error of `datasets` about sound or images is the user's: their columns need further packages."""
    try:
        yield
    except (ImportError, OSError, RuntimeError) as error:
        where = "a row" if row is None else f"row {row}"
        raise ValueError(f"{where} of the data cannot be decoded ({type(error).__name__}: {error}): write the data "
                         "without its columns of sound or images, which are not trained on") from error  # fmt: skip


def _open_table(path: str, split: str, subset: str | None) -> Sequence[Row]:
    """Open a file, a directory or a hub data set; parquet and data sets are mapped into memory by `datasets`."""
    if is_generated(path):
        return _Table(Generated(path), is_text=False)
    try:
        rows = _opened(path, split, subset)
    except Exception as error:  # `datasets` raises a dozen kinds; its messages name the splits and subsets
        where = "" if Path(path).exists() else f"; it is no file or directory here{near_paths(path)}"
        raise ValueError(
            f"{path!r} (subset {subset!r}, split {split!r}) cannot be loaded: {_reason(error)}{where}"
        ) from error
    if isinstance(rows, _Table):
        rows.tell_classes(path)
    return rows


def _opened(path: str, split: str, subset: str | None) -> Sequence[Row]:
    import datasets
    from pyarrow import parquet

    place, suffix = Path(path), Path(path).suffix.lower()
    if place.is_file():
        if suffix == ".json":
            return _read_json(place)
        if suffix in _SEPARATORS:
            return _read_cells(place, _SEPARATORS[suffix])
        if suffix == ".parquet":
            if not parquet.read_metadata(path).num_rows:  # `datasets` asks for batches of no rows
                return []
            return _Table(datasets.load_dataset("parquet", data_files=path, split="train"), is_text=False)
        raise ValueError(f"expected a file that ends in one of {', '.join(_FILES)}")
    if (place / "dataset_dict.json").is_file() or (place / "state.json").is_file():
        return _Table(_saved(place, split, subset), is_text=False)
    if not (place.is_dir() or _HUB_ID.fullmatch(path)):
        raise ValueError("neither a file or directory nor a data set's hub id")
    table = datasets.load_dataset(path, subset, split=split)
    is_text = table.info.builder_name == "csv"
    if is_text:
        table = datasets.load_dataset(path, subset, split=split, features=_texts(table.column_names), **_AS_TEXT)
    times = [name for name, feature in table.features.items() if str(getattr(feature, "dtype", "")).startswith("time")]
    if times and table.info.builder_name == "json":
        log.warning(
            "%s: `datasets` reads the column(s) %s as points in time, not as the text in the files; name the JSON file "
            "itself to get the text", path, ", ".join(times),
        )  # fmt: skip
    return _Table(table, is_text)


def _texts(columns: Sequence[str]) -> Any:
    """Features of a data set whose columns are all texts."""
    import datasets

    return datasets.Features({name: datasets.Value("string") for name in columns})


def _read_cells(path: Path, separator: str) -> list[Row]:
    """Rows of a CSV file, with texts as values; raises ValueError where a column occurs twice.

    A row with more cells than columns has a `problem`: a cell with a comma lacks its quotes.
    """
    csv.field_size_limit(_MOST_CELL_CHARACTERS)
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = [cells for cells in csv.reader(file, delimiter=separator) if cells]
    names, rows = (lines[0], lines[1:]) if lines else ([], [])
    others = [each for each in _OTHER_SEPARATORS if each != separator and len(names) == 1 and each in names[0]]
    if others:
        raise ValueError(f"cells separated by {others[0]!r}, expected {separator!r}: save it so, or as JSONL")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"the column(s) {', '.join(map(repr, twice))} occur more than once")
    read = []
    for number, cells in enumerate(rows, 1):
        if any(cells[len(names) :]):
            problem = f"{len(cells)} cells, expected {len(names)}: put cells that contain a separator in quotes"
            read.append(Row(number, {}, problem))
        else:
            values = [cell or None for cell in cells] + [None] * (len(names) - len(cells))
            read.append(Row(number, dict(zip(names, values, strict=False)), is_text=True))
    return read


def _read_json(path: Path) -> list[Row]:
    """Rows of a file with a list of objects, or with one object on each line; raises ValueError where it is no JSON."""
    text = path.read_text(encoding="utf-8-sig")
    try:
        value = _loads(text)
    except json.JSONDecodeError as error:
        if not text.lstrip().startswith("{") or "\n" not in text.strip():
            raise ValueError(f"not JSON: {error}") from error
        return list(_Lines(str(path)))
    values = value if isinstance(value, list) else [value]
    return [_row_of_json(number, value, "\\u" in text) for number, value in enumerate(values, 1)]


def _saved(path: Path, split: str, subset: str | None) -> Any:
    """A data set that `datasets` saved to disk, or one of its splits; raises ValueError for a split that it lacks."""
    import datasets

    if subset is not None:
        raise ValueError("a data set saved to disk has no subsets: set data.subset to null")
    saved = datasets.load_from_disk(str(path))
    if not isinstance(saved, datasets.DatasetDict):
        return saved
    if split not in saved:
        raise ValueError(f"there is no split {split!r}, expected one of {', '.join(map(repr, saved))}: set "
                         "data.train_split or data.eval_split")  # fmt: skip
    return saved[split]


def _reason(error: BaseException) -> str:
    """Return an error's message with that of its cause, where `datasets` says what is wrong with a file.

    Advice to call a Python function becomes advice to set the option that does the same.
    """
    message = _CALLS.sub("", str(error)).strip()
    if "Config name is missing" in message or "BuilderConfig" in message:
        message += "; set data.subset to one of them"
    elif "Unknown split" in message:
        message += " Set data.train_split or data.eval_split to one of them"
    elif "scripts are no longer supported" in message:
        message += "; save the data set as parquet or JSONL, and name that"
    elif isinstance(error, UnicodeDecodeError):
        message += "; save the file as UTF-8"
    reason = message if type(error) is ValueError else f"{type(error).__name__}: {message}"
    return f"{reason} ({error.__cause__})" if error.__cause__ is not None else reason
