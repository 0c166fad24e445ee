"""The record of a run's final model, RUN/final: which state of the run it is, and that it is complete.

A run that goes on to more steps, or from an earlier checkpoint, leaves the final model of its former end where it is
until it writes its own. So what lies there may be older than the newest checkpoint, or half written.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ..text.files import write_file
from . import store

FILE = "training.json"


@dataclass(frozen=True)
class FinalRecord:
    """What is known of a final model."""

    step: int
    """Steps of its training."""
    newest_checkpoint: str | None
    """What identifies the newest checkpoint at that time; None where there was none."""


def remove_record(directory: Path) -> None:
    """Before the final model is written: what lies there is no model until `write_record`."""
    (directory / FILE).unlink(missing_ok=True)


def write_record(directory: Path, step: int, checkpoints: Path) -> None:
    """After the final model was written: it is complete."""
    write_file(directory / FILE, json.dumps(asdict(FinalRecord(step, store.newest_id(checkpoints)))) + "\n")


def read_record(directory: Path) -> FinalRecord | None:
    """The record of the model in a directory; None where it is incomplete, or of a version that wrote no record."""
    try:
        return FinalRecord(**json.loads((directory / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def is_newest(record: FinalRecord | None, checkpoints: Path) -> bool:
    """Whether no checkpoint was saved since a final model was written."""
    return store.newest_id(checkpoints) in (None, record and record.newest_checkpoint)
