"""Output directories as runs leave them, written by hand: any content, without a training."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from grpo_dist.config.parse import parse_config
from grpo_dist.config.schema import Config

ROOT = Path(__file__).parents[2]


def config_of(tmp_path: Path, *arguments: str) -> Config:
    """The quickstart's config with an output directory of its own."""
    return parse_config(["--config", str(ROOT / "configs/quickstart.yaml"), "--data.train_file",
                         str(ROOT / "configs/data/math_tasks_eval.jsonl"), "--data.eval_file", "null",
                         "--train.output_dir", str(tmp_path / "run"), *arguments])  # fmt: skip


def write_run(
    directory: Path, num_steps: int = 12, text: Callable[[int, int, int], str] = lambda step, group, sample: str(group),
    num_groups: int = 2, group_size: int = 4, trace: dict[str, Any] | None = None, **train: Any,
) -> Path:  # fmt: skip
    """A run whose reward rises with its steps; `text` gives a completion by step, group and sample, and `trace` is that
    of each: they are then episodes, of which the model wrote the first line."""
    (directory / "completions").mkdir(parents=True)
    config = asdict(Config())
    config["train"] |= {"num_train_steps": num_steps, "output_dir": str(directory), **train}
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    lines: list[dict[str, Any]] = [{"step": 0, "eval/accuracy": 0.25, "eval/prompts": 50}]
    for step in range(1, num_steps + 1):
        lines.append({"step": step, "reward/mean": step / num_steps, "kl": step * 1e-3, "grad_norm": None, "loss": 0.0,
                      "time/step": 1.0, "time/rollout": 0.5, "time/update": 0.25})  # fmt: skip
        rows = [(group, sample) for group in range(num_groups) for sample in range(group_size)]
        table = {
            "step": [step] * len(rows), "prompt_index": [group + step % 2 for group, _ in rows],
            "group": [group for group, _ in rows], "prompt": [f"prompt {group + step % 2}" for group, _ in rows],
            "completion": [text(step, *row) for row in rows], "tokens": [3 + sample for _, sample in rows],
            "finished": [sample > 0 for _, sample in rows],
            "reward": [float("nan") if sample == 1 else float(sample < 4 * step / num_steps) for _, sample in rows],
            "advantage": [0.5 - sample % 2 for _, sample in rows],
        }  # fmt: skip
        table["reward/math"] = table["reward"]
        if trace:
            said = [each.partition("\n")[0] for each in table["completion"]]
            table["reward/environment/conversation"] = [
                json.dumps([{"role": "assistant", "content": each}, {"role": "tool", "content": "9"}]) for each in said
            ]
        table["trace"] = [json.dumps(trace) if trace else "" for _ in rows]
        pq.write_table(pa.table(table), directory / "completions" / f"step_{step:06d}.parquet")
    lines[-1] |= {"eval/accuracy": 0.75, "eval/prompts": 50}
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    alarm = {"step": 2, "name": "entropy", "message": "entropy fell", "advice": "Lower the rate."}
    (directory / "alarms.jsonl").write_text(json.dumps(alarm) + "\n")
    (directory / "environment.jsonl").write_text(json.dumps({
        "started": "2026-01-01 00:00 UTC", "first_step": 0, "engine": "DDP", "ranks": ["a: cpu", "b: cpu"],
        "platform": "here", "versions": {"torch": "2"}}) + "\n")  # fmt: skip
    return directory
