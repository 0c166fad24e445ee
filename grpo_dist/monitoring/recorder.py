"""The records of a run: metrics.jsonl, alarms.jsonl, completions/, and the trackers."""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..config.schema import Config
from ..config.values import flat, redacted
from ..distributed.device import dtype_name, resolve_dtype
from ..rewards.registry import answer_reader
from ..rewards.text import CONVERSATION, answering_texts
from ..text.files import sync, write_file
from ..text.plain import answer_of
from ..types import Batch, Metrics
from .advice import advice
from .alarms import Alarm, Alarms, rules_for
from .json_lines import append_json_line, read_history
from .trackers import Entry, Mirror, Source, Table, run_name

log = logging.getLogger(__name__)

TABLE_ROWS = 16
TABLE_CHARACTERS = 2_000
HISTOGRAMS = {"reward": "reward/distribution", "advantage": "advantage/distribution", "tokens": "completion/lengths"}
"""Columns of the completions that trackers get as histograms, with their names there."""


def completions_table(
    step: int, batch: Batch, texts: list[str], traces: list[str], reward_names: list[str]
) -> dict[str, list[Any]]:
    """Return the columns of a step's completions for their file; `texts` are the N completions, `traces` are from
    `trace_lines`."""
    groups = batch.group.tolist()
    return {
        "step": [step] * len(groups),
        "prompt_index": [batch.prompts[g].index for g in groups],
        "group": groups,
        "prompt": [batch.prompts[g].text for g in groups],
        "completion": texts,
        "tokens": batch.lengths.tolist(),
        "finished": batch.finished.tolist(),
        "reward": batch.reward.tolist(),
        "advantage": batch.first_advantages.tolist(),
        **{f"reward/{name}": column.tolist() for name, column in zip(reward_names, batch.rewards.T, strict=True)},
        **{f"reward/{column}": values for column, values in batch.extras.items()},
        "trace": traces,
    }


def _arrow(values: list[Any]) -> pa.Array:
    """`pa.array` of one type without the import of pandas for numbers and texts, which would delay the first step.

    Where kinds of values meet, as in what rewards log, all become texts if one is a text, else floats.
    """
    if len({type(value) for value in values if value is not None}) > 1:
        kind = str if any(isinstance(value, str) for value in values) else float
        values = [None if value is None else kind(value) for value in values]
    kinds = {type(value) for value in values}
    if kinds == {str}:
        parts = [value.encode() for value in values]
        offsets = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(parts))]
        return pa.Array.from_buffers(pa.large_string(), len(values), buffers).cast(pa.string())
    if kinds in ({int}, {float}):
        numbers = np.array(values)
        return pa.Array.from_buffers(pa.from_numpy_dtype(numbers.dtype), len(values), [None, pa.py_buffer(numbers)])
    if kinds == {bool}:
        bits = pa.py_buffer(np.packbits(values, bitorder="little"))
        return pa.Array.from_buffers(pa.bool_(), len(values), [None, bits])
    return pa.array(values)


class Recorder:
    """Writes the records of a run, on the main rank."""

    def __init__(self, config: Config, directory: Path, first_step: int) -> None:
        """Drop an interrupted run's lines of steps after `first_step`, which are done again."""
        self.directory = directory
        self.logging = config.logging
        self.path = path = directory / "metrics.jsonl"
        history = read_history(directory)
        kept = [line for line in history if line["step"] <= first_step]
        if first_step < 0 and (replaced := max((line["step"] for line in history), default=0)):
            log.warning("%s has %d steps of a start that left no checkpoint: the training begins anew, and they are "
                        "replaced", path, replaced)  # fmt: skip
        if lost := sorted({*range(first_step + 1)} - {line["step"] for line in kept}):
            log.warning("%s lacks %d of the steps 0 to %d, which were done before (the first is step %d): so will the "
                        "report", path, len(lost), first_step, lost[0])  # fmt: skip
        write_file(path, "".join(json.dumps(line) + "\n" for line in kept))
        dtype = dtype_name(resolve_dtype(config.model.dtype))
        self.alarms = Alarms(rules_for(config.loss.kl_estimator, dtype, config.rollout.lag))
        self.alarm_path = directory / "alarms.jsonl"
        write_file(self.alarm_path, "")
        for line in kept:
            self._ring(line)
        options = flat(redacted(asdict(config)), numbered=True)
        source = Source(directory, run_name(directory, first_step), options, first_step)
        self.mirrors = [Mirror(kind, source) for kind in config.logging.trackers]
        self.read_answer = answer_reader(config.rewards)
        self.pictures: dict[str, dict[str, Any]] = {}

    def metrics(self, values: Metrics) -> list[Alarm]:
        """Append one step's metrics, which are finite numbers and None; returns the alarms that begin to ring.

        The trackers get them with the histograms and tables of the completions that were recorded before.
        """
        alarms = self._ring(values)  # first: who follows metrics.jsonl finds all that belongs to its last step
        append_json_line(self.path, values)
        known = {k: v for k, v in values.items() if v is not None and k != "step"}
        for mirror in self.mirrors:
            mirror.log(Entry(int(values["step"] or 0), known, **self.pictures))
        self.pictures = {}
        return alarms

    def _ring(self, values: Metrics) -> list[Alarm]:
        """Write a step's alarms to alarms.jsonl: a function of metrics.jsonl, which a resumed run computes again."""
        alarms = self.alarms.step(values)
        for alarm in alarms:
            append_json_line(self.alarm_path, asdict(alarm) | {"advice": advice(alarm.name)})
        return alarms

    def completions(self, step: int, batch: Batch, texts: list[str], traces: list[str], names: list[str]) -> None:
        """Write one step's completions to completions/step_N.parquet; see `completions_table`."""
        table = completions_table(step, batch, texts, traces, names)
        values = {name: np.array(table[column], dtype=np.float32) for column, name in HISTOGRAMS.items()}
        self.pictures["histograms"] = {name: each[np.isfinite(each)] for name, each in values.items()}
        if not self.logging.log_completions:
            return
        every = self.logging.show_completions_every
        if self.mirrors and every and step % every == 0:
            self.pictures["tables"] = self._tables(table)
        folder = self.directory / "completions"
        folder.mkdir(exist_ok=True)
        columns = {name: _arrow(values) for name, values in table.items()}
        pq.write_table(pa.table(columns), folder / f"step_{step:06d}.parquet")

    def _tables(self, completions: dict[str, list[Any]]) -> dict[str, Table]:
        """The first completions, and the most frequent answers among all."""
        columns = ["prompt", "completion", "reward", "advantage", "tokens"]
        rows = zip(*(completions[name][:TABLE_ROWS] for name in columns), strict=True)
        cut = [[cell[:TABLE_CHARACTERS] if isinstance(cell, str) else cell for cell in row] for row in rows]
        texts = answering_texts(completions["completion"], completions.get(f"reward/{CONVERSATION}"))
        answers = Counter(answer_of(text, self.read_answer) for text in texts)
        shares = [[answer, count / answers.total()] for answer, count in answers.most_common(TABLE_ROWS)]
        return {"completions/sample": Table(columns, cut),
                "completions/answers": Table(["answer", "share"], shares)}  # fmt: skip

    def flush(self) -> None:
        """Put the metrics on the disk, so that no checkpoint is of a step that they lack."""
        sync(self.path)

    def close(self) -> None:
        """Close the trackers."""
        for mirror in self.mirrors:
            mirror.close()
