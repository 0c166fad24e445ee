"""`python -m grpo_dist score`: score completions with the configured rewards, before a training.

    python -m grpo_dist score --config configs/quickstart.yaml -n 20
    python -m grpo_dist score --config configs/quickstart.yaml --completions FILE

Completions come from a file with a column `completion`. If its rows are not in the order of the data, it also needs a
column `prompt_index`. Without a file, the gold answers are scored, which should get a high reward. No model is loaded.
`--category COLUMN` adds a table by the column's values: mean reward, prompts of which all, some or no completions are
right.

Options that are not listed here are those of a training config.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from ..config.parse import parse_config
from ..config.schema import Config
from ..data.rows import load_rows
from ..distributed.process import imports
from ..report.categories import by_category, categories, category_table
from ..rewards.pool.pool import ScorerPool
from ..rewards.scores import Item, Scores, combine, right_above, to_items
from ..text.plain import plain, plain_lines
from ..text.result_console import ResultConsole

if TYPE_CHECKING:
    from ..types import Prompt

_SHOWN_CHARACTERS = 60
_SHOWN_FAILURES = 5


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb. The parser of a run reads the others, such as `--config`."""
    parser.add_argument("--completions", metavar="FILE", help="JSONL, CSV or parquet with a column `completion`")
    parser.add_argument("--category", metavar="COLUMN", help="results for each value of a column, or COLUMN.KEY")
    parser.add_argument("-n", type=int, default=20, metavar="N", help="most completions to score (20)")


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Score and print. Returns 1 if more completions fail than scoring.error_budget. Raises ValueError, OSError."""
    config = parse_config(list(rest))
    if options.n < 1:
        raise ValueError(f"-n: {options.n} given, expected at least 1")
    if options.completions is None and config.data.answer_column is None:
        raise ValueError("data.answer_column is null: there are no gold answers to score; give --completions FILE, or "
                         "see what the model answers: python -m grpo_dist evaluate")  # fmt: skip
    items, prompts = read_items(config, options.completions, options.n)
    names = categories([item.columns for item in items], options.category) if options.category else []
    with ScorerPool(config.rewards, config.scoring) as pool:
        scores = pool.score(items, groups=prompts if options.completions else [0] * len(items))
    print_scores(config, items, scores)
    if options.category:
        print_categories(config, options.category, names, prompts, scores)
    return int(scores.failed.any(1).mean() > config.scoring.error_budget)


def read_items(config: Config, path: str | None, most: int) -> tuple[list[Item], list[int]]:
    """Return up to `most` completions of a file with the columns of the data, or the gold answers without a file; and
    the index of each one's prompt.

    Raises ValueError if the file has no `completion`, or names a prompt that the data does not have.
    """
    with imports():
        from ..data.mixture import load_training
        from ..model.adapter import with_adapter
        from ..model.config_files import load_tokenizer
        from ..rollout.playing import prompt_reader

    config = with_adapter(config)
    tokenizer = load_tokenizer(config.model)
    prompts, _ = load_training(prompt_reader(config, tokenizer, None), config.train)
    if path is None:
        first = [prompts[place] for place in range(min(most, len(prompts)))]
        pairs = [(prompt, str(prompt.columns["answer"])) for prompt in first]
    else:
        pairs = _read_pairs(path, prompts, most)
    return to_items(pairs, tokenizer), [prompt.index for prompt, _ in pairs]


def _read_pairs(path: str, prompts: Sequence[Prompt], most: int) -> list[tuple[Prompt, str]]:
    by_index = {prompt.index: prompt for prompt in prompts}
    pairs = []
    for place, row in enumerate(load_rows(path, "train")[:most]):
        text, index = row.columns.get("completion"), row.columns.get("prompt_index", place)
        if not isinstance(text, str):
            raise ValueError(f"{path}, row {row.number}: {row.problem or 'no text in the column `completion`'}")
        if row.is_text and isinstance(index, str) and index.isdecimal():
            index = int(index)
        if not isinstance(index, int | float) or index not in by_index:
            raise ValueError(f"{path}, row {row.number}: the data has no usable row with prompt_index {index!r}")
        pairs.append((by_index[int(index)], text))
    return pairs


def print_scores(config: Config, items: Sequence[Item], scores: Scores) -> None:
    """Print a table of completions, the failures, and the seconds of each reward."""
    weights = config.weights_at(0)
    totals = combine(scores.values, scores.failed, weights)
    table = Table(box=box.SIMPLE)
    for name in ("prompt", "completion"):
        table.add_column(name, overflow="fold")
    for name, weight in zip(scores.names, weights, strict=True):
        table.add_column(f"{name}\n× {weight:g}", justify="right")
    table.add_column("reward", justify="right")
    for item, values, failed, total in zip(items, scores.values, scores.failed, totals, strict=True):
        cells = ["failed" if bad else _number(value, "–") for value, bad in zip(values, failed, strict=True)]
        prompt = item.prompt if isinstance(item.prompt, str) else item.prompt[-1]["content"]
        texts = (plain(text, _SHOWN_CHARACTERS) for text in (prompt, item.completion))
        table.add_row(*map(Text, (*texts, *cells, _number(total, "unscored"))))
    console = ResultConsole()
    console.print(table)
    lines = [f"{name}: {seconds:.2f} s" for name, seconds in zip(scores.names, scores.seconds, strict=True)]
    lines += [f"{name}: {total / count:.4g}" for name, (total, count) in scores.metrics.items()]
    lines += [
        f"completion {failure.item}: {failure.reward} failed ({failure.kind}): {plain(failure.message, 300)}"
        for failure in scores.failures[:_SHOWN_FAILURES]
    ]
    if len(scores.failures) > _SHOWN_FAILURES:
        lines.append(f"and {len(scores.failures) - _SHOWN_FAILURES} more failures")
    if raised := next((failure.traceback for failure in scores.failures if failure.traceback), ""):
        lines += ["", plain_lines(raised.rstrip())]
    console.print(Text("\n".join(lines)), soft_wrap=True)


def print_categories(config: Config, column: str, names: Sequence[str], prompts: Sequence[int], scores: Scores) -> None:
    """Print the table by category, for each completion given its category and its prompt."""
    weights = config.weights_at(0)
    totals, least = combine(scores.values, scores.failed, weights).tolist(), right_above(weights)
    of_prompt: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts):
        of_prompt.setdefault(prompt, []).append(place)
    places = list(of_prompt.values())
    rewards = [[None if math.isnan(totals[n]) else totals[n] for n in each] for each in places]
    right = [[totals[n] > least for n in each] for each in places]
    ResultConsole().print(category_table(column, by_category([names[each[0]] for each in places], rewards, right)))


def _number(value: float, absent: str) -> str:
    return absent if math.isnan(value) else f"{value:.4g}"
