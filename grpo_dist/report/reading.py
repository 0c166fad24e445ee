"""Reads what a run left behind, whether it is done, was interrupted or is still going on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from ..config.schema import RewardConfig
from ..config.values import flat
from ..monitoring.json_lines import read_json_lines
from ..rewards.registry import BUILT_IN, answer_reader
from ..text.plain import answer_of
from .embedding import cut, encoded, harmless
from .shaping import agreement, by_lot, spread

MOST_STEPS_READ = 200
"""Steps whose completions are looked at; a longer run's are taken evenly spaced."""
MOST_CHARACTERS = 20_000
"""Characters of one text that the page holds."""
FIELDS = ("prompt", "completion", "cut_from", "step", "group", "tokens", "finished", "reward", "advantage", "rewards")
"""Of a sampled row; `prompt` is a place in the list of prompts, `cut_from` the length of a text that is cut, or 0."""


@dataclass(frozen=True)
class Written:
    """A run's files but for its completions."""

    directory: Path
    lines: list[dict[str, Any]]
    """Of metrics.jsonl, each step once, in order."""
    config: dict[str, Any]
    """By dotted names."""
    starts: list[dict[str, Any]]
    """Of environment.jsonl: one entry each time the run was started."""
    alarms: list[dict[str, Any]]
    files: dict[int, Path]
    """Completions by step; none of steps that an interrupted run has to do again."""


@dataclass
class Completions:
    """What was read of the completions; the lists that are not of rows have an entry for each step read."""

    steps: list[int] = field(default_factory=list)
    answers: list[Counter[str]] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)
    rewards: list[list[float]] = field(default_factory=list)
    lengths: list[list[float]] = field(default_factory=list)
    total: int = 0
    """Completions of the steps read."""
    prompts: list[str] = field(default_factory=list)
    rows: list[list[Any]] = field(default_factory=list)
    """A sample for reading: FIELDS of each."""


def read_run(directory: Path) -> Written:
    """Read a run's files. Raises ValueError where there is no run, OSError where it cannot be read."""
    path = directory / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{directory} holds no run: expected metrics.jsonl in it, as `train.output_dir` has it")
    lines = sorted({line["step"]: line for line in read_json_lines(path)}.values(), key=lambda line: line["step"])
    options = directory / "config.yaml"
    config = yaml.safe_load(options.read_text()) if options.exists() else {}
    done = lines[-1]["step"] if lines else 0
    files = {int(file.stem.removeprefix("step_")): file for file in (directory / "completions").glob("step_*.parquet")}
    return Written(
        directory, lines, flat(config), read_json_lines(directory / "environment.jsonl"),
        [alarm for alarm in read_json_lines(directory / "alarms.jsonl") if alarm.get("step", 0) <= done],
        {step: files[step] for step in sorted(files) if step <= done},
    )  # fmt: skip


def reader_of(config: dict[str, Any]) -> Callable[[str], str | None] | None:
    """Return how the run's own reward reads an answer, where it is a built-in that can."""
    names = [value for key, value in config.items() if key.startswith("rewards.") and key.endswith(".name")]
    return answer_reader([RewardConfig(name) for name in names if name in BUILT_IN])


def read_completions(run: Written, most_bytes: int) -> Completions:
    """Read the completions of some steps, and keep a sample of rows whose JSON takes at most `most_bytes`."""
    found, read = Completions(), reader_of(run.config)
    steps = list(run.files)
    chosen = [steps[place] for place in spread(len(steps), MOST_STEPS_READ)]
    places: dict[str, int] = {}
    for step in chosen:
        table = pq.read_table(run.files[step]).to_pydict()
        answers = [answer_of(text, read) for text in table["completion"]]
        found.steps.append(step)
        found.total += len(answers)
        found.answers.append(Counter(answers))
        found.agreement.append(agreement(answers, table["group"]))
        found.rewards.append([math.nan if reward is None else reward for reward in table["reward"]])
        found.lengths.append(table["tokens"])
        _sample(table, found, places, most_bytes // len(chosen))
    found.prompts = list(places)
    return found


def _sample(table: dict[str, list[Any]], found: Completions, places: dict[str, int], most_bytes: int) -> None:
    """Keep whole groups, drawn by lot, until the bytes are used up; of the first as many completions as fit."""
    left, each = most_bytes, most_bytes // 3
    by_prompt: dict[int, list[int]] = {}
    for place, index in enumerate(table["prompt_index"]):
        by_prompt.setdefault(index, []).append(place)
    for number, index in enumerate(by_lot(by_prompt)):
        prompt, is_cut = cut(table["prompt"][by_prompt[index][0]], MOST_CHARACTERS, each)
        prompt += f" … (cut: it has {len(table['prompt'][by_prompt[index][0]]):,} characters)" * is_cut
        left -= len(encoded(prompt).encode()) * (prompt not in places)
        rows = [_row(table, place, each) for place in by_prompt[index]]
        sizes = [len(encoded(row).encode()) for row in rows]
        if number and left < sum(sizes):
            return
        for row, size in zip(rows, sizes, strict=True):
            if left >= size:
                found.rows.append([places.setdefault(prompt, len(places)), *row])
                left -= size


def _row(table: dict[str, list[Any]], place: int, most_bytes: int) -> list[Any]:
    """The fields after the first."""
    completion = table["completion"][place]
    text, is_cut = cut(completion, MOST_CHARACTERS, most_bytes)
    values = [table[name][place] for name in ("step", "group", "tokens", "finished", "reward", "advantage")]
    parts = {name.removeprefix("reward/"): table[name][place] for name in table if name.startswith("reward/")}
    return [text, len(completion) if is_cut else 0, *harmless([*values, parts if len(parts) > 1 else {}], 200)]
