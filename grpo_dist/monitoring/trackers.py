"""Trackers that mirror metrics.jsonl, each in a thread of its own, so that none can delay or end a run.

Any of Accelerate's trackers gets the config and the metrics; TensorBoard, Weights & Biases and trackio also get
histograms and tables. A tracker that raises gets nothing more, and the log says so. The run does not wait for a tracker
that hangs.
"""

from __future__ import annotations

import contextlib
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

from ..config.checks import did_you_mean, require
from ..text.files import write_file

log = logging.getLogger(__name__)

PROJECT = "grpo_dist"
MOST_QUEUED = 10_000
CLOSE_SECONDS = 10.0
WITH_PICTURES = ("wandb", "trackio")
"""Trackers with wandb's interface for histograms and tables."""


@dataclass(frozen=True)
class Table:
    """A small table; cells are texts and numbers."""

    columns: list[str]
    rows: list[list[Any]]

    def markdown(self) -> str:
        """The table in Markdown; no cell can end its row."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    """A text on one line without Markdown or HTML."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    marks: dict[str, str | int | None] = {mark: f"&#{ord(mark)};" for mark in r"\`*_{}[]<>()#+!|&~"}
    return "<br>".join(text.translate(str.maketrans(marks)).splitlines())


@dataclass(frozen=True)
class Entry:
    """One step's data for the trackers."""

    step: int
    metrics: dict[str, float]
    histograms: dict[str, np.ndarray] = field(default_factory=dict)
    """The numbers, one for each completion."""
    tables: dict[str, Table] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """The run that trackers show."""

    directory: Path
    name: str
    config: dict[str, Any]
    """Redacted, by dotted names."""
    first_step: int
    """Steps done before this start of the run; -1 where there are no records of it yet."""


def run_name(directory: Path, first_step: int) -> str:
    """Return the output directory's name with an id of this run, which all its starts share."""
    path = directory / "tracker_id"
    if first_step < 0 or not path.exists():
        write_file(path, uuid.uuid4().hex[:8])
    return f"{directory.resolve().name}-{path.read_text(encoding='utf-8')}"


def require_known(kinds: Sequence[str]) -> None:
    """Raise a ValueError for an unknown tracker; it names the nearest known one."""
    for kind in kinds:
        require(kind in LOGGER_TYPE_TO_CLASS, "logging.trackers", kind,
                f"some of {', '.join(LOGGER_TYPE_TO_CLASS)}{did_you_mean(kind, LOGGER_TYPE_TO_CLASS)}")  # fmt: skip


def open_tracker(kind: str, source: Source) -> GeneralTracker:
    """Start one of Accelerate's trackers with the config; a resumed run continues where the tracker can."""
    options: dict[str, Any] = {}
    project = PROJECT
    if kind == "tensorboard":  # this hides its entries of steps that are done again
        project, options = "tensorboard", {"purge_step": source.first_step + 1}
    elif kind == "wandb":
        options = {"name": source.name, "id": source.name, "resume": "allow", "dir": str(source.directory),
                   "config": source.config, "settings": {"console": "off"}}  # fmt: skip
    elif kind == "trackio":
        options = {"name": source.name, "resume": "allow", "embed": False, "auto_log_cpu": False, "auto_log_gpu": False,
                   "config": source.config}  # fmt: skip
    tracker_class = LOGGER_TYPE_TO_CLASS[kind]
    if tracker_class.requires_logging_directory:
        options["logging_dir"] = str(source.directory)
    tracker = tracker_class(project, **options)
    tracker.start()
    if kind == "tensorboard":
        rows = [[name, json.dumps(value)] for name, value in source.config.items()]
        tracker.writer.add_text("config", Table(["option", "value"], rows).markdown(), source.first_step + 1)
    elif kind not in WITH_PICTURES:
        plain = (bool, int, float, str)
        tracker.store_init_configuration({name: value if isinstance(value, plain) else json.dumps(value)
                                          for name, value in source.config.items()})  # fmt: skip
    return tracker


def log_entry(kind: str, tracker: GeneralTracker, entry: Entry) -> None:
    """Log one step's data, as far as this kind of tracker can show it."""
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
        self._queue: queue.Queue[Entry | None] = queue.Queue(MOST_QUEUED)
        self._broken = False
        self._thread = threading.Thread(target=self._work, name=f"tracker-{kind}", daemon=True)
        self._thread.start()

    def log(self, entry: Entry) -> None:
        """Queue one step's data; returns at once."""
        if self._broken:
            return
        try:
            self._queue.put_nowait(entry)
        except queue.Full:
            self._broken = True
            log.warning("tracker %s has not taken %d entries and gets no more; metrics.jsonl has everything", self.kind,
                        MOST_QUEUED)  # fmt: skip

    def close(self) -> None:
        """Wait until the queue is empty, for a limited time."""
        deadline = time.monotonic() + CLOSE_SECONDS
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._queue.put(None, timeout=CLOSE_SECONDS)
            self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            log.warning("tracker %s did not end within %.0f s, and the run does not wait; metrics.jsonl has everything",
                        self.kind, CLOSE_SECONDS)  # fmt: skip

    def _work(self) -> None:
        try:
            tracker = open_tracker(self.kind, self.source)
            while (entry := self._queue.get()) is not None:
                log_entry(self.kind, tracker, entry)
            tracker.finish()
        except Exception as error:  # whatever a tracker does, the run goes on
            self._broken = True
            log.warning("tracker %s failed and gets no more (%s: %s); metrics.jsonl has everything", self.kind,
                        type(error).__name__, error)  # fmt: skip
