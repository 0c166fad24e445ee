"""The steps of a run as it wrote them down: seconds from metrics.jsonl, lengths from completions/."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from ..config.schema import ModelConfig
from ..model.load import load_tokenizer
from .scaling import Group, RecordedStep

PARTS = ("rollout", "reward", "reference", "update", "step")
WARM_UP = 1
"""Steps left out: the first compiles, allocates and fills caches."""


def read_run(directory: Path) -> tuple[list[RecordedStep], int]:
    """All steps of the run in `directory` after the first, and the number of its ranks.

    Raises ValueError where it lacks its metrics or its completions (logging.log_completions), or changed its ranks.
    """
    metrics, config, environment = (directory / name for name in ("metrics.jsonl", "config.yaml", "environment.jsonl"))
    for path in (metrics, config, environment):
        if not path.is_file():
            raise ValueError(f"--from: {path} does not exist; expected the train.output_dir of a run")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    ranks = {len(json.loads(line)["ranks"]) for line in environment.read_text().splitlines()}
    if len(ranks) != 1:
        raise ValueError(f"--from: {directory} ran on {' and '.join(map(str, sorted(ranks)))} ranks by turns, expected "
                         "a run on one number of ranks")  # fmt: skip
    model = yaml.safe_load(config.read_text())["model"]
    tokenizer = load_tokenizer(ModelConfig(**model))
    steps = []
    for line in [line for line in lines if line["step"] > WARM_UP and "time/rollout" in line]:
        path = directory / "completions" / f"step_{line['step']:06d}.parquet"
        if not path.is_file():
            raise ValueError(f"--from: {path} does not exist; the lengths of completions are read from it, which "
                             "logging.log_completions writes")  # fmt: skip
        seconds = {name: line.get(f"time/{name}", 0.0) for name in PARTS}
        steps.append(RecordedStep(_groups(path, tokenizer), seconds))
    return steps, ranks.pop()


def _groups(path: Path, tokenizer: Any) -> tuple[Group, ...]:
    rows = pq.read_table(path, columns=["group", "prompt", "tokens"]).to_pylist()
    groups = []
    for _, members in groupby(rows, key=lambda row: row["group"]):
        group = list(members)
        prompt = tokenizer(group[0]["prompt"], add_special_tokens=False)["input_ids"]
        groups.append(Group(len(prompt), tuple(row["tokens"] for row in group)))
    return tuple(groups)
