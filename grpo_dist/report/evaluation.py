"""The tables of an evaluation: pass@k, maj@k, mean reward, with intervals, and a comparison with another one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from ..algorithm.estimates import Comparison, Estimate, compare, estimate, majority_at_k, pass_at_k
from ..config.places import writing_to
from ..text.files import write_file
from ..text.result_console import ResultConsole
from .categories import by_category, category_table, in_order

Rows = list[dict[str, Any]]
"""A row for each prompt, with lists of its samples' texts and scores."""
COLUMNS = {"prompt_index", "prompt", "completions", "tokens", "finished", "right", "rewards", "answers"}
"""What every row has."""
IDENTITY = "evaluation.json"


def samples(directory: Path) -> Rows:
    """The rows of an evaluation's output. Raises ValueError, which names the file, for what is no row."""
    return [row for path in sorted(directory.glob("samples_*.jsonl")) for row in rows_of(path)]


def rows_of(path: Path) -> Rows:
    """The rows of one part of an evaluation's output. Raises ValueError for what is no row."""
    try:
        rows: Rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError:
        rows = []
    if not rows or not all(isinstance(row, dict) and {*row} >= COLUMNS for row in rows):
        raise ValueError(f"{path} is damaged, or not as this version of grpo_dist writes it: remove it, and the "
                         "command that wrote it samples it again")  # fmt: skip
    return rows


def read_identity(directory: Path) -> dict[str, Any] | None:
    """What an evaluation's output is of; None where there is none. Raises ValueError where it is damaged."""
    path = directory / IDENTITY
    try:
        identity = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError:
        identity = ()
    if not isinstance(identity, dict | None):
        raise ValueError(f"{path} is damaged: nothing says any more what {directory} is an evaluation of; remove it")
    return identity


def summarise(rows: Rows, num_samples: int) -> dict[str, Estimate]:
    """Return each measure over a table of rows; a sample that could not be scored counts in none but `unscored`."""
    powers = [2**power for power in range(num_samples.bit_length()) if 2**power <= num_samples]
    scored = [{**row, "kept": [n for n, reward in enumerate(row["rewards"]) if reward is not None]} for row in rows]
    some = [row for row in scored if row["kept"]]
    measures = {"mean reward": estimate([_mean([row["rewards"][n] for n in row["kept"]]) for row in some])}
    measures[f"mean@{num_samples}"] = estimate([_mean([row["right"][n] for n in row["kept"]]) for row in some])
    for k in powers:
        enough = [row for row in scored if len(row["kept"]) >= k]
        measures[f"pass@{k}"] = estimate([pass_at_k(len(row["kept"]), sum(row["right"]), k) for row in enough])
    for k in powers[1:] if rows and rows[0]["answers"] is not None else []:
        enough = [row for row in scored if len(row["kept"]) >= k]
        measures[f"maj@{k}"] = estimate([
            majority_at_k([row["answers"][n] for n in row["kept"]], [row["right"][n] for n in row["kept"]], k)
            for row in enough
        ])  # fmt: skip
    measures["truncated"] = estimate([1 - _mean(row["finished"]) for row in rows])
    measures["unscored"] = estimate([1 - len(row["kept"]) / len(row["rewards"]) for row in scored])
    measures["tokens"] = estimate([_mean(row["tokens"]) for row in rows])
    return measures


def compare_rows(first: Rows, second: Rows) -> Comparison:
    """Compare the mean shares of right samples of the prompts that both have; raises ValueError where that is none."""
    shares = [
        {(row["prompt_index"], row["prompt"]): _mean(row["right"]) for row in rows if None not in row["rewards"]}
        for rows in (first, second)
    ]
    common = [key for key in shares[0] if key in shares[1]]
    return compare([shares[0][key] for key in common], [shares[1][key] for key in common])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _table(title: str, measures: dict[str, Estimate]) -> Table:
    table = Table("measure", title=title)
    table.add_column("all prompts", justify="right")
    for name, each in measures.items():
        table.add_row(name, f"{each.value:.4f}  [{each.low:.4f}, {each.high:.4f}]")
    return table


def report(rows: Rows, num_samples: int, other: Path | None, directory: Path, category: str | None = None) -> None:
    """Print the tables and write them to summary.json. `category` is the column from which rows have their category."""
    names = [row["category"] for row in rows] if category else []
    groups = {"all": rows} | {name: [row for row in rows if row["category"] == name] for name in in_order(names)}
    tables = {name: summarise(part, num_samples) for name, part in groups.items()}
    summary: dict[str, Any] = {name: {key: asdict(each) for key, each in part.items()} for name, part in tables.items()}
    comparison = None if other is None else compare_rows(samples(other), rows)
    if comparison is not None:
        summary["comparison"] = asdict(comparison)
    console = ResultConsole()
    try:  # what was measured is printed where it cannot be written, and written where nobody reads what is printed
        console.print(_table(f"{len(rows)} prompts, {num_samples} samples each", tables["all"]), markup=False)
        if category:
            results = by_category(names, [row["rewards"] for row in rows], [row["right"] for row in rows])
            console.print(category_table(category, results))
        console.print("mean@, pass@ and maj@ count a sample as right if its reward is above half of the sum of "
                      "positive weights", soft_wrap=True)  # fmt: skip
        if comparison is not None:
            at = comparison.difference
            console.print(f"mean@n against {other}: {at.value:+.4f} [{at.low:+.4f}, {at.high:+.4f}] over "
                          f"{comparison.num_prompts} common prompts of which all samples are scored, "
                          f"p = {comparison.p_value:.4g}", markup=False, soft_wrap=True)  # fmt: skip
    finally:
        with writing_to(directory, "--output"):
            write_file(directory / "summary.json", json.dumps(summary, indent=1))
    console.print(f"samples: {directory}/samples_*.jsonl, this table: {directory / 'summary.json'}", markup=False,
                  soft_wrap=True)  # fmt: skip
