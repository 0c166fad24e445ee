"""Read the files of a run, which may be done, interrupted or still running."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ..config.files import written_config
from ..config.places import require_metrics
from ..config.schema import RewardConfig
from ..config.values import flat
from ..monitoring.json_lines import read_history, read_json_lines
from ..monitoring.lot import by_lot
from ..rewards.registry import BUILT_IN, answer_reader
from ..rewards.text import CONVERSATION, answering_texts
from ..text.plain import answer_of, visible
from .embedding import cut, encoded, harmless
from .shaping import agreement, spread

MOST_STEPS_READ = 200
"""Most steps whose completions are read. They are evenly spaced in a longer run."""
MOST_CHARACTERS = 20_000
"""Most characters of one text on the page."""
TRACE_SHARE = 0.25
"""Share of the bytes for completions that traces may take."""
_STEP = re.compile(r"step_(\d+)\.parquet")
FIELDS = ("prompt", "completion", "cut_from", "step", "group", "tokens", "finished", "reward", "advantage", "rewards",
          "place", "trace")  # fmt: skip
"""Fields of a sampled row. `prompt` is a place in the list of prompts, `cut_from` the length of a cut text, or 0,
`place` that in its step's file, and `trace` as in monitoring.traces, with numbers in millionths, or null."""


@dataclass(frozen=True)
class Written:
    """The files of a run, without the contents of its completions."""

    directory: Path
    lines: list[dict[str, Any]]
    """Lines of metrics.jsonl, each step once, in order."""
    config: dict[str, Any]
    """Options by dotted names."""
    starts: list[dict[str, Any]]
    """Lines of environment.jsonl: one for each start of the run."""
    alarms: list[dict[str, Any]]
    files: dict[int, Path]
    """Files of completions by step, without steps that an interrupted run must repeat."""


@dataclass
class Completions:
    """Results of reading completions. Lists have an entry for each step, except `prompts` and `rows`."""

    steps: list[int] = field(default_factory=list)
    answers: list[Counter[str]] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)
    rewards: list[list[float]] = field(default_factory=list)
    lengths: list[list[float]] = field(default_factory=list)
    total: int = 0
    """Number of completions of these steps."""
    prompts: list[str] = field(default_factory=list)
    rows: list[list[Any]] = field(default_factory=list)
    """A sample of completions with their FIELDS."""


def read_run(directory: Path) -> Written:
    """Read the files of a run. Raises ValueError if there is no run, OSError if a file is not readable."""
    require_metrics(directory)
    lines = sorted({line["step"]: line for line in read_history(directory)}.values(), key=lambda line: line["step"])
    options = directory / "config.yaml"
    config = written_config(options) if options.exists() else {}
    done = lines[-1]["step"] if lines else 0
    folder = directory / "completions"
    files = {int(match[1]): file for file in (folder.iterdir() if folder.exists() else ())
             if (match := _STEP.fullmatch(file.name))}  # fmt: skip
    return Written(
        directory, lines, flat(config, numbered=True), read_json_lines(directory / "environment.jsonl"),
        [alarm for alarm in read_json_lines(directory / "alarms.jsonl", "step") if alarm["step"] <= done],
        {step: files[step] for step in sorted(files) if step <= done},
    )  # fmt: skip


def reader_of(config: dict[str, Any]) -> Callable[[str], str | None] | None:
    """Return the function by which the run's reward extracts an answer, if a built-in reward has one."""
    names = [value for key, value in config.items() if key.startswith("rewards.") and key.endswith(".name")]
    return answer_reader([RewardConfig(name) for name in names if name in BUILT_IN])


def read_completions(run: Written, most_bytes: int) -> Completions:
    """Read the completions of some steps, and keep a sample of rows with at most `most_bytes` of JSON.

    Raises ValueError, which names the file, for one that is damaged or of another version.
    """
    completions, read = Completions(), reader_of(run.config)
    steps = list(run.files)
    chosen = [steps[place] for place in spread(len(steps), MOST_STEPS_READ)]
    places: dict[str, int] = {}
    for step in chosen:
        try:
            with run.files[step].open("rb") as file:  # pyarrow cannot open paths that are no UTF-8
                table = pq.ParquetFile(file).read().to_pydict()  # pq.read_table would import pandas
            _add(completions, step, table, read, places, most_bytes // len(chosen))
        except PermissionError:
            raise
        except (ValueError, OSError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{run.files[step]} is damaged, or not as this version of grpo_dist writes it "
                             f"({type(error).__name__}: {error}): remove it, and the page is of the other steps"
                             ) from error  # fmt: skip
    completions.prompts = list(places)
    return completions


def _add(completions: Completions, step: int, table: dict[str, list[Any]], read: Callable[[str], str | None] | None,
         places: dict[str, int], most_bytes: int) -> None:  # fmt: skip
    """Add the completions of a step."""
    texts = answering_texts(table["completion"], table.get(f"reward/{CONVERSATION}"))
    answers = [answer_of(text, read) for text in texts]
    completions.steps.append(step)
    completions.total += len(answers)
    completions.answers.append(Counter(answers))
    completions.agreement.append(agreement(answers, table["group"]))
    completions.rewards.append([math.nan if reward is None else reward for reward in table["reward"]])
    completions.lengths.append([int(count) for count in table["tokens"]])  # of another's file, it may be no number
    _sample(table, completions, places, most_bytes)


def _sample(table: dict[str, list[Any]], completions: Completions, places: dict[str, int], most_bytes: int) -> None:
    """Keep complete groups in random order until the bytes are used. Of the first group, keep what fits."""
    left, each = most_bytes, most_bytes // 3
    traces = int(TRACE_SHARE * most_bytes)
    by_prompt: dict[int, list[int]] = {}
    for place, index in enumerate(table["prompt_index"]):
        by_prompt.setdefault(index, []).append(place)
    for number, index in enumerate(by_lot(by_prompt)):
        prompt, is_cut = cut(table["prompt"][by_prompt[index][0]], MOST_CHARACTERS, each)
        prompt += f" … (cut: it has {len(table['prompt'][by_prompt[index][0]]):,} characters)" * is_cut
        left -= len(encoded(prompt).encode()) * (prompt not in places)
        rows = [_row(table, place, each) for place in by_prompt[index]]
        for row in rows:
            row.append(_trace(table, row[-1], traces))
            traces -= len(encoded(row[-1]).encode()) * (row[-1] is not None)
        sizes = [len(encoded(row).encode()) for row in rows]
        if number and left < sum(sizes):
            return
        for row, size in zip(rows, sizes, strict=True):
            if left >= size:
                completions.rows.append([places.setdefault(prompt, len(places)), *row])
                left -= size


def _row(table: dict[str, list[Any]], place: int, most_bytes: int) -> list[Any]:
    """FIELDS without the first and the last."""
    completion = table["completion"][place]
    text, is_cut = cut(completion, MOST_CHARACTERS, most_bytes)
    values = [table[name][place] for name in ("step", "group", "tokens", "finished", "reward", "advantage")]
    parts = {name.removeprefix("reward/"): table[name][place] for name in table
             if name.startswith("reward/") and name != f"reward/{CONVERSATION}"}  # fmt: skip
    return [text, len(completion) if is_cut else 0, *harmless([*values, parts if len(parts) > 1 else {}], 200), place]


def _trace(table: dict[str, list[Any]], place: int, most_bytes: int) -> dict[str, Any] | None:
    """A completion's trace, if it has one that fits; older runs have none."""
    line = table.get("trace", [""] * (place + 1))[place]
    if not line:
        return None
    trace = json.loads(line)
    small = {name: [None if value is None else round(1e6 * float(f"{value:.2g}")) for value in trace[name]]
             for name in ("logprob", "gap", "entropy", "advantage") if name in trace}  # fmt: skip
    shown = {"text": [visible(text) for text in trace["text"]], "by": trace["by"]} | small
    return shown if len(encoded(shown).encode()) <= most_bytes else None
