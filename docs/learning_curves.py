"""Train small models several times each, and draw held-out accuracy over the steps.

    python docs/learning_curves.py arithmetic                               # all presets, three seeds
    python docs/learning_curves.py carry                                    # written-out addition
    python docs/learning_curves.py environments                             # a tool, the same without it, a game
    python docs/learning_curves.py reasoning --model.name runs/smollm2      # a pretrained model, in float32
    python docs/learning_curves.py carry --only grpo dapo --seeds 0         # chosen curves and seeds

Writes learning_curves_TASK.json and .svg into its folder and prints the table of its page: docs/algorithms.md, or
docs/environments.md. A run that exists in --runs is not repeated.
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
PRESETS = sorted(path.stem for path in (ROOT / "configs" / "algorithms").glob("*.yaml"))

Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class Task:
    """Trainings to compare."""

    curves: dict[str, list[str]]
    """Options of each training, by name."""
    shown: tuple[int, ...]
    """Steps of the table."""
    every: int = 5
    """Steps between two evaluations."""
    heading: str = "preset"
    """Of the table's first column."""
    greedy: bool = False
    """Whether greedy answers are drawn beside sampled ones."""


def with_presets(presets: list[str], config: str, last_step: int, *options: str) -> dict[str, list[str]]:
    """A training for each preset."""
    given = ["--config", config, "--train.num_train_steps", str(last_step), *options]
    return {preset: ["--preset", preset, *given] for preset in presets}


PRETRAINED = ["--config", "configs/reasoning.yaml", "--model.dtype", "float32"]
CALCULATOR = ["--config", "configs/calculator.yaml"]
TASKS = {
    "arithmetic": Task(with_presets(PRESETS, "configs/quickstart.yaml", 40, "--lora.alpha", "64"), (0, 5, 10, 20, 40)),
    "carry": Task(with_presets(["reinforce", "rloo", "grpo", "dr_grpo", "dapo", "gspo"], "configs/carry.yaml", 15,
                               "--optim.scheduler", "constant"), (0, 5, 10, 15)),
    "environments": Task({"calculator": CALCULATOR, "no calculator": [*CALCULATOR, "--environment", "null"],
                          "guess_number": ["--config", "configs/guess_number.yaml"]},
                         (0, 10, 20, 40, 50), every=10, heading="config", greedy=True),
    "reasoning": Task({"SmolLM2-135M": PRETRAINED}, (0, 10, 20, 30, 40), every=10, heading="model", greedy=True),
}  # fmt: skip


def train(task: Task, name: str, seed: int, runs: Path, options: list[str]) -> Path:
    """The directory of a finished training."""
    directory = runs / f"{name.replace(' ', '_')}-{seed}"
    if not (directory / "final").exists():
        subprocess.run([
            sys.executable, "-m", "grpo_dist.train", *task.curves[name], "--train.seed", str(seed),
            "--train.eval_every", str(task.every), "--train.save_every", "0", "--logging.trackers", "[]",
            "--logging.log_completions", "false", "--train.output_dir", str(directory), *options,
        ], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    return directory


def curve(run: Path, metric: str) -> Curve:
    """A metric of the evaluations by step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line[metric]) for line in lines if metric in line]


def drawing(curves: dict[str, list[Curve]]) -> str:
    """One small plot a name: each seed thin, the median thick."""
    rows = -(-len(curves) // COLUMNS)
    columns = min(COLUMNS, len(curves))
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{columns * WIDTH}" height="{rows * HEIGHT}" '
             'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>']  # fmt: skip
    for place, (name, seeds) in enumerate(curves.items()):
        num_steps = seeds[0][-1][0]
        left, top = place % COLUMNS * WIDTH + 30, place // COLUMNS * HEIGHT + 22
        wide, high = WIDTH - 45, HEIGHT - 42
        parts.append(f'<text x="{left}" y="{top - 6}" font-weight="bold">{name}</text>')
        for level in (0.0, 0.5, 1.0):
            y = top + high * (1 - level)
            parts.append(f'<path d="M{left} {y:.1f}h{wide}" stroke="#ddd"/><text x="{left - 24}" y="{y + 4:.1f}" '
                         f'fill="#666">{level:.1f}</text>')  # fmt: skip
        for step in (0, num_steps // 2, num_steps):
            parts.append(f'<text x="{left + wide * step / num_steps:.1f}" y="{top + high + 13}" fill="#666" '
                         f'text-anchor="middle">{step}</text>')  # fmt: skip
        median = [(points[0][0], statistics.median(a for _, a in points)) for points in zip(*seeds, strict=True)]
        for line, style in [*((seed, 'stroke="#9bc"') for seed in seeds), (median, 'stroke="#135" stroke-width="2"')]:
            points = " ".join(f"{left + wide * step / num_steps:.1f},{top + high * (1 - a):.1f}" for step, a in line)
            parts.append(f'<polyline points="{points}" fill="none" {style}/>')
    return "\n".join([*parts, "</svg>\n"])


def table(curves: dict[str, list[Curve]], task: Task) -> str:
    """Median accuracy over the seeds at some steps, and the least at the end."""
    lines = [f"| {task.heading} | " + " | ".join(f"step {step}" for step in task.shown) + " | worst seed at the end |",
             "|---" * (len(task.shown) + 2) + "|"]  # fmt: skip
    for name, seeds in curves.items():
        by_step = [dict(seed) for seed in seeds]
        cells = [f"{statistics.median(seed[step] for seed in by_step):.2f}" if step in by_step[0] else ""
                 for step in task.shown]  # fmt: skip
        lines.append(f"| `{name}` | " + " | ".join([*cells, f"{min(seed[-1][1] for seed in seeds):.2f}"]) + " |")
    return "\n".join(lines)


def main() -> None:
    """The command line; options it does not know go to every training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--only", nargs="+", metavar="CURVE", help="names of curves; all of the task")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "curves")
    parser.add_argument("--out", type=Path, default=HERE)
    given, options = parser.parse_known_args()
    task, runs = TASKS[given.task], given.runs.resolve() / given.task
    if unknown := set(given.only or ()) - set(task.curves):
        parser.error(f"--only: {', '.join(sorted(unknown))} given, expected some of {', '.join(task.curves)}")
    curves: dict[str, list[Curve]] = {}
    for name in given.only or task.curves:
        done = [train(task, name, seed, runs, options) for seed in given.seeds]
        # drawn as the rollouts are
        curves[name] = [curve(run, "eval/accuracy") for run in done]
        if task.greedy:
            curves[f"{name}, greedy"] = [curve(run, "eval/greedy_accuracy") for run in done]
        print(f"{name}: " + ", ".join(f"{seed[-1][1]:.3f}" for seed in curves[name]), file=sys.stderr, flush=True)
    (given.out / f"learning_curves_{given.task}.json").write_text(json.dumps(curves) + "\n")
    (given.out / f"learning_curves_{given.task}.svg").write_text(drawing(curves))
    print(table(curves, task))


if __name__ == "__main__":
    main()
