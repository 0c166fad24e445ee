"""Mirrors of metrics.jsonl: each tracker in a thread of its own, so that none can hold up or end a run.

Any of Accelerate's trackers gets the config and the metrics; TensorBoard, Weights & Biases and trackio also get
histograms and tables. A tracker that raises is left alone from then on, with one line in the log; one that hangs is
left behind.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import json
import logging
import queue
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from ..config.checks import require
from ..text.files import write_file

log = logging.getLogger(__name__)

PROJECT = "grpo_dist"
MOST_WAITING = 10_000
CLOSE_SECONDS = 10.0
WITH_PICTURES = ("wandb", "trackio")
"""Trackers with wandb's interface for histograms and tables."""


@dataclass(frozen=True)
class Table:
    """A small table; cells are texts and numbers."""

    columns: list[str]
    rows: list[list[Any]]

    def markdown(self) -> str:
        """The table as Markdown shows it; no cell can end its row."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    """A text as one line in which nothing is Markdown or HTML."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    marks: dict[str, str | int | None] = {mark: f"&#{ord(mark)};" for mark in r"\`*_{}[]<>()#+!|&~"}
    return "<br>".join(text.translate(str.maketrans(marks)).splitlines())


@dataclass(frozen=True)
class Entry:
    """What one step has for the trackers."""

    step: int
    metrics: dict[str, float]
    histograms: dict[str, np.ndarray] = field(default_factory=dict)
    """The numbers themselves, one a completion."""
    tables: dict[str, Table] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """The run that trackers are told of."""

    directory: Path
    name: str
    config: dict[str, Any]
    """Redacted, by dotted names."""
    first_step: int
    """Steps done before this start of the run; -1 where nothing was written down before."""


def run_name(directory: Path, first_step: int) -> str:
    """Return the output directory's name with a mark that is this run's own, through all its starts."""
    path = directory / "tracker_id"
    if first_step < 0 or not path.exists():
        write_file(path, uuid.uuid4().hex[:8])
    return f"{directory.resolve().name}-{path.read_text()}"


def require_known(kinds: Sequence[str]) -> None:
    """Raise a ValueError that names the nearest tracker there is for one that there is not."""
    for kind in kinds:
        near = [f"; did you mean {match!r}?" for match in difflib.get_close_matches(kind, LOGGER_TYPE_TO_CLASS, n=1)]
        require(kind in LOGGER_TYPE_TO_CLASS, "logging.trackers", kind,
                f"some of {', '.join(LOGGER_TYPE_TO_CLASS)}{''.join(near)}")  # fmt: skip


def open_tracker(kind: str, source: Source) -> GeneralTracker:
    """Start one of Accelerate's trackers and tell it the config; a resumed run goes on where the tracker can."""
    options: dict[str, Any] = {}
    project = PROJECT
    if kind == "tensorboard":  # what it holds of steps that are done again is hidden
        project, options = "tensorboard", {"purge_step": source.first_step + 1}
    elif kind == "wandb":
        options = {"name": source.name, "id": source.name, "resume": "allow", "dir": str(source.directory),
                   "config": source.config, "settings": {"console": "off"}}  # fmt: skip
    elif kind == "trackio":
        options = {"name": source.name, "resume": "allow", "embed": False, "auto_log_cpu": False, "auto_log_gpu": False,
                   "config": source.config}  # fmt: skip
    found = LOGGER_TYPE_TO_CLASS[kind]
    if found.requires_logging_directory:
        options["logging_dir"] = str(source.directory)
    tracker = found(project, **options)
    tracker.start()
    if kind == "tensorboard":
        rows = [[name, json.dumps(value)] for name, value in source.config.items()]
        tracker.writer.add_text("config", Table(["option", "value"], rows).markdown(), source.first_step + 1)
    elif kind not in WITH_PICTURES:
        plain = (bool, int, float, str)
        tracker.store_init_configuration({name: value if isinstance(value, plain) else json.dumps(value)
                                          for name, value in source.config.items()})  # fmt: skip
    return tracker


def hand_over(kind: str, tracker: GeneralTracker, entry: Entry) -> None:
    """Log what one step has, as far as this kind of tracker can hold it."""
    tracker.log(entry.metrics, step=entry.step)
    if kind == "tensorboard":
        for name, values in entry.histograms.items():
            tracker.writer.add_histogram(name, values, entry.step)
        for name, table in entry.tables.items():
            tracker.writer.add_text(name, table.markdown(), entry.step)
    elif kind in WITH_PICTURES and (entry.histograms or entry.tables):
        library = importlib.import_module(kind)
        pictures = {name: library.Histogram(values) for name, values in entry.histograms.items()}
        pictures |= {name: library.Table(columns=table.columns, data=table.rows)
                     for name, table in entry.tables.items()}  # fmt: skip
        tracker.log(pictures, step=entry.step)


class Mirror:
    """One tracker, by Accelerate's name."""

    def __init__(self, kind: str, source: Source) -> None:
        self.kind, self.source = kind, source
        self._waiting: queue.Queue[Entry | None] = queue.Queue(MOST_WAITING)
        self._broken = False
        self._thread = threading.Thread(target=self._work, name=f"tracker-{kind}", daemon=True)
        self._thread.start()

    def log(self, entry: Entry) -> None:
        """Hand over one step's numbers; returns at once."""
        if self._broken:
            return
        try:
            self._waiting.put_nowait(entry)
        except queue.Full:
            self._broken = True
            log.warning("tracker %s has not taken %d entries and gets no more; metrics.jsonl has everything", self.kind,
                        MOST_WAITING)  # fmt: skip

    def close(self) -> None:
        """Wait for what was handed over, for a while."""
        deadline = time.monotonic() + CLOSE_SECONDS
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._waiting.put(None, timeout=CLOSE_SECONDS)
            self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            log.warning("tracker %s did not end within %.0f s and is left behind; metrics.jsonl has everything",
                        self.kind, CLOSE_SECONDS)  # fmt: skip

    def _work(self) -> None:
        try:
            tracker = open_tracker(self.kind, self.source)
            while (entry := self._waiting.get()) is not None:
                hand_over(self.kind, tracker, entry)
            tracker.finish()
        except Exception as error:  # whatever a tracker does, the run goes on
            self._broken = True
            log.warning("tracker %s failed and gets no more (%s: %s); metrics.jsonl has everything", self.kind,
                        type(error).__name__, error)  # fmt: skip
