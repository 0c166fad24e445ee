"""Train a toy model with several presets and draw held-out accuracy over the steps.

    python docs/learning_curves.py arithmetic                               # all presets, three seeds
    python docs/learning_curves.py carry                                    # written-out addition
    python docs/learning_curves.py carry --presets grpo dapo --seeds 0      # chosen presets and seeds

Writes learning_curves_TASK.json and .svg into its folder and prints the table of docs/algorithms.md. A run that exists
in --runs is not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
COLUMNS, WIDTH, HEIGHT = 4, 200, 130
EVERY = 5
PRESETS = sorted(path.stem for path in (ROOT / "configs" / "algorithms").glob("*.yaml"))

Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class Task:
    """A config, the steps of the table (the last one ends it), the presets worth a curve, and options for all."""

    config: str
    shown: tuple[int, ...]
    presets: list[str]
    options: list[str]


TASKS = {
    "arithmetic": Task("configs/quickstart.yaml", (0, 5, 10, 20, 40), PRESETS, ["--lora.alpha", "64"]),
    "carry": Task("configs/carry.yaml", (0, 5, 10, 15), ["reinforce", "rloo", "grpo", "dr_grpo", "dapo", "gspo"],
                  ["--optim.scheduler", "constant"]),
}  # fmt: skip


def train(task: Task, preset: str, seed: int, runs: Path, options: list[str]) -> Curve:
    """Held-out accuracy, sampled at temperature 1, by step."""
    directory = runs / f"{preset}-{seed}"
    written = directory / "metrics.jsonl"
    if not (directory / "final").exists():
        subprocess.run([
            sys.executable, "-m", "grpo_dist.train", "--preset", preset, "--config", task.config,
            "--train.seed", str(seed), "--train.num_train_steps", str(task.shown[-1]),
            "--train.eval_every", str(EVERY), "--train.save_every", "0", "--logging.trackers", "[]",
            "--logging.log_completions", "false", "--train.output_dir", str(directory), *task.options, *options,
        ], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    lines = [json.loads(line) for line in written.read_text().splitlines()]
    return [(line["step"], line["eval/accuracy"]) for line in lines if "eval/accuracy" in line]


def drawing(curves: dict[str, list[Curve]], num_steps: int) -> str:
    """One small plot a preset: each seed thin, the median thick."""
    rows = -(-len(curves) // COLUMNS)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{COLUMNS * WIDTH}" height="{rows * HEIGHT}" '
             'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>']  # fmt: skip
    for place, (preset, seeds) in enumerate(curves.items()):
        left, top = place % COLUMNS * WIDTH + 30, place // COLUMNS * HEIGHT + 22
        wide, high = WIDTH - 45, HEIGHT - 42
        parts.append(f'<text x="{left}" y="{top - 6}" font-weight="bold">{preset}</text>')
        for level in (0.0, 0.5, 1.0):
            y = top + high * (1 - level)
            parts.append(f'<path d="M{left} {y:.1f}h{wide}" stroke="#ddd"/><text x="{left - 24}" y="{y + 4:.1f}" '
                         f'fill="#666">{level:.1f}</text>')  # fmt: skip
        for step in (0, num_steps // 2, num_steps):
            parts.append(f'<text x="{left + wide * step / num_steps:.1f}" y="{top + high + 13}" fill="#666" '
                         f'text-anchor="middle">{step}</text>')  # fmt: skip
        median = [(points[0][0], statistics.median(a for _, a in points)) for points in zip(*seeds, strict=True)]
        for curve, style in [*((seed, 'stroke="#9bc"') for seed in seeds), (median, 'stroke="#135" stroke-width="2"')]:
            points = " ".join(f"{left + wide * step / num_steps:.1f},{top + high * (1 - a):.1f}" for step, a in curve)
            parts.append(f'<polyline points="{points}" fill="none" {style}/>')
    return "\n".join([*parts, "</svg>\n"])


def table(curves: dict[str, list[Curve]], shown: tuple[int, ...]) -> str:
    """Median accuracy over the seeds at some steps, and the least at the end."""
    lines = ["| preset | " + " | ".join(f"step {step}" for step in shown) + " | worst seed at the end |",
             "|---" * (len(shown) + 2) + "|"]  # fmt: skip
    for preset, seeds in curves.items():
        medians = [statistics.median(dict(curve)[step] for curve in seeds) for step in shown]
        cells = [f"{value:.2f}" for value in [*medians, min(curve[-1][1] for curve in seeds)]]
        lines.append(f"| `{preset}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """The command line; options it does not know go to every training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--presets", nargs="+", choices=PRESETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "curves")
    parser.add_argument("--out", type=Path, default=HERE)
    given, options = parser.parse_known_args()
    task, runs = TASKS[given.task], given.runs.resolve() / given.task
    curves: dict[str, list[Curve]] = {}
    for preset in given.presets or task.presets:
        curves[preset] = [train(task, preset, seed, runs, options) for seed in given.seeds]
        print(f"{preset}: " + ", ".join(f"{curve[-1][1]:.3f}" for curve in curves[preset]), file=sys.stderr, flush=True)
    (given.out / f"learning_curves_{given.task}.json").write_text(json.dumps(curves) + "\n")
    (given.out / f"learning_curves_{given.task}.svg").write_text(drawing(curves, task.shown[-1]))
    print(table(curves, task.shown))


if __name__ == "__main__":
    main()
