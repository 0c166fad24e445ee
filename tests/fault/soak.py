"""A long quickstart-size training whose memory, files, threads and processes must not grow.

    python tests/fault/soak.py                          # 1,000 steps on two ranks under ZeRO-2
    python tests/fault/soak.py --steps 200 --strategy ddp

Prints, for the ranks and for their reward workers, the mean of each number in each fifth of the run and the slope of a
straight line through it after the first fifth; ends with status 1 where a slope is above its bound.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import psutil

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "distributed"))
from launching import command, metrics  # noqa: E402

BOUNDS = {"memory_mib": 32.0, "files": 1.0, "threads": 1.0, "processes": 0.5}
"""Growth of all processes of one kind together that is let pass, per 1,000 steps."""
PERIOD_SECONDS = 2.0


def kinds(launcher: psutil.Process) -> dict[str, list[psutil.Process]]:
    """The run's processes by what they are."""
    found: dict[str, list[psutil.Process]] = defaultdict(list)
    ranks = [child for child in launcher.children() if "RANK" in child.environ()]
    for rank in ranks:
        found["ranks"].append(rank)
        found["reward workers"] += rank.children(recursive=True)
    return found


def measure(processes: list[psutil.Process]) -> dict[str, float]:
    """What the processes hold, together."""
    return {
        "memory_mib": sum(p.memory_info().rss for p in processes) / 2**20,
        "files": sum(p.num_fds() for p in processes),
        "threads": sum(p.num_threads() for p in processes),
        "processes": len(processes),
    }


def watch(process: subprocess.Popen[bytes], directory: Path) -> dict[str, list[tuple[int, dict[str, float]]]]:
    """Measure until the run ends: by kind, pairs of step and numbers."""
    samples: dict[str, list[tuple[int, dict[str, float]]]] = defaultdict(list)
    launcher = psutil.Process(process.pid)
    while process.poll() is None:
        time.sleep(PERIOD_SECONDS)
        step = len(metrics(directory)) - 1 if (directory / "metrics.jsonl").exists() else 0
        try:
            measured = {kind: measure(processes) for kind, processes in kinds(launcher).items()}
        except psutil.Error:  # a process ended while it was looked at
            continue
        if step > 0:
            for kind, numbers in measured.items():
                samples[kind].append((step, numbers))
    return samples


def judge(samples: dict[str, list[tuple[int, dict[str, float]]]], num_steps: int) -> bool:
    """Print every slope; whether all are within their bounds."""
    flat = True
    print(f"{'':16}{'mean of each fifth':54}{'growth per 1,000 steps':>22}{'bound':>8}")
    for kind, taken in samples.items():
        steps = np.array([step for step, _ in taken if step < num_steps])
        fifths = steps * 5 // num_steps
        for name, bound in BOUNDS.items():
            values = np.array([numbers[name] for step, numbers in taken if step < num_steps])
            slope = float(np.polyfit(steps[fifths > 0], values[fifths > 0], 1)[0]) * 1000
            flat &= slope <= bound
            means = "".join(f"{values[fifths == fifth].mean():8.1f}" for fifth in range(5))
            print(f"{kind:16}{name:12}{means}{slope:24.2f}{bound:8.1f}{'' if slope <= bound else '   GROWS'}")
    return flat


def main() -> int:
    """Train, watch, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--strategy", default="zero2", help="a name from accelerate_configs/")
    parser.add_argument("--num_processes", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "run"
        begun = time.monotonic()
        with (Path(folder) / "log").open("w+b") as log:
            process = subprocess.Popen(
                [*command(options.strategy, options.num_processes), "--config", "configs/quickstart.yaml",
                 "--train.num_train_steps", str(options.steps), "--train.output_dir", str(directory)],
                cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            samples = watch(process, directory)
            if process.returncode:
                log.seek(0)
                sys.stderr.buffer.write(log.read()[-4000:])
                return 1
        print(f"{len(metrics(directory)) - 1} steps in {time.monotonic() - begun:.0f} s, looked at "
              f"{len(samples['ranks'])} times")  # fmt: skip
        return 0 if judge(samples, options.steps) else 1


if __name__ == "__main__":
    sys.exit(main())
