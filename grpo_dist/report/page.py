"""Make the report: template, style, scripts and the data of the runs in one file."""

from __future__ import annotations

import base64
import hashlib
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..config.schema import Config
from ..config.values import flat
from ..text.files import write_file
from .embedding import encoded, harmless
from .reading import FIELDS, Completions, Written, read_completions, read_run
from .shaping import (
    OTHER,
    HeatMap,
    answer_map,
    change,
    curves,
    is_clear_share,
    is_number,
    number_map,
    run_names,
    totals,
    variants,
)

MOST_COMPLETION_BYTES = 12_000_000
MOST_CURVE_NUMBERS = 300_000
LEAST_POINTS = 100
"""Limits over all runs, which keep the page under 20 MB."""
MOST_COLUMNS, MOST_ROWS = 60, 12
"""Limits of a heat map."""
SCRIPTS = ("dom.js", "charts.js", "panels.js", "trace.js", "completions.js", "page.js")
REWARD, ACCURACY = "reward/mean", "eval/accuracy"
"""Metrics that show whether a run has learned."""


def write_report(directories: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of one or several runs and return its path, by default report.html of the first run.

    Raises ValueError if there is no run, OSError if a file cannot be read or written.
    """
    runs = [read_run(directory) for directory in directories]
    target = out or runs[0].directory / "report.html"
    write_file(target, render(runs))
    return target


def render(runs: Sequence[Written], live: str | None = None) -> str:
    """Return the page; `live` is the version of one that is served (see live.py) and follows its runs."""
    names = run_names([str(run.directory) for run in runs])
    numbers = variants([run.config for run in runs])
    most_points = max(LEAST_POINTS, MOST_CURVE_NUMBERS // sum(len(_measured(run)) + 1 for run in runs))
    last = max((line["step"] for run in runs for line in run.lines[-1:]), default=0)
    steps_a_point = math.ceil((last + 1) / most_points)  # one for all runs, so that curves have the same steps
    data = {
        "live": live, "made": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC", "fields": FIELDS, "other": OTHER,
        "defaults": harmless(flat(asdict(Config()), numbered=True), 2_000), "steps_a_point": steps_a_point,
        "runs": [_run_data(run, name, number, steps_a_point, MOST_COMPLETION_BYTES // len(runs))
                 for run, name, number in zip(runs, names, numbers, strict=True)],
    }  # fmt: skip
    scripts = (*SCRIPTS, "live.js") if live else SCRIPTS
    style, script = _asset("style.css"), "\n".join(_asset(name) for name in scripts)
    policy = "; ".join(["default-src 'none'", "base-uri 'none'", "form-action 'none'",
                        *(["connect-src 'self'"] if live else []),
                        f"script-src {_hash(script)}", f"style-src {_hash(style)}"])  # fmt: skip
    page = _asset("template.html")
    for mark, text in {
        "policy": policy, "title": html.escape(", ".join(harmless(names, 200))), "style": style, "script": script,
        "data": encoded(data),  # last, so that marks in texts of a model are not replaced
    }.items():  # fmt: skip
        page = page.replace(f"%%{mark}%%", text)
    return page


def _asset(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """A source of a content security policy that allows exactly this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _measured(run: Written) -> set[str]:
    return {name for line in run.lines for name, value in line.items() if is_number(value)}


def _kinds(alarms: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The first alarm of each name, with the number of alarms of this name and the step of the last: some ring hundreds
    of times in a long run."""
    of_kind: dict[str, list[Mapping[str, Any]]] = {}
    for alarm in alarms:
        of_kind.setdefault(str(alarm.get("name")), []).append(alarm)
    return [dict(each[0]) | {"times": len(each), "last_step": each[-1]["step"]} for each in of_kind.values()]


def _run_data(run: Written, name: str, variant: int, steps_a_point: int, most_bytes: int) -> dict[str, Any]:
    completions = read_completions(run, most_bytes)
    drawn = curves(run.lines, steps_a_point)
    data = {
        "name": name, "directory": str(run.directory.absolute()), "variant": variant, "config": run.config,
        "starts": run.starts, "alarms": _kinds(run.alarms), "num_alarms": len(run.alarms),
        "curves": drawn, "totals": totals(run.lines), "changes": _changes(run),
        "completions": {"total": completions.total, "num_steps": len(run.files), "steps_read": len(completions.steps)},
        "maps": {key: asdict(each) for key, each in _maps(completions).items()},
        "agreement": {"step": completions.steps, "share": completions.agreement},
    }  # fmt: skip
    data = harmless(data, 2_000)
    data["completions"] |= {"prompts": completions.prompts, "rows": completions.rows}  # already harmless, and longer
    return data


def _changes(run: Written) -> dict[str, dict[str, Any]]:
    """The first and last value of each headline metric, and whether they clearly differ, None where that is unknown."""
    changes: dict[str, dict[str, Any]] = {}
    values = [line[REWARD] for line in run.lines if is_number(line.get(REWARD))]
    if (moved := change(values)) is not None:
        changes[REWARD] = asdict(moved)
    measured = [line for line in run.lines if is_number(line.get(ACCURACY))]
    if len(measured) > 1:  # each value is a mean over many prompts already
        before, after, prompts = measured[0][ACCURACY], measured[-1][ACCURACY], measured[-1].get("eval/prompts")
        is_clear = None if prompts is None else is_clear_share(before, after, prompts)
        changes[ACCURACY] = {"before": before, "after": after, "prompts": prompts, "is_clear": is_clear}
    return changes


def _maps(completions: Completions) -> dict[str, HeatMap]:
    if not completions.steps:
        return {}
    return {
        "answers": answer_map(completions.answers, completions.steps, MOST_ROWS, MOST_COLUMNS),
        "rewards": number_map(completions.rewards, completions.steps, MOST_ROWS, MOST_COLUMNS),
        "lengths": number_map(completions.lengths, completions.steps, MOST_ROWS, MOST_COLUMNS),
    }  # fmt: skip
