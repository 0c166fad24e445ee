"""Trainings of the toy model on the CPU, then the same on the simulated device, and what became of both as JSON.

    python tests/unit/simulated_training.py FOLDER CASES > RESULTS.json

CASES is {name: [arguments]}, RESULTS {name: {"cpu": [metrics of each step], "cuda": […], "seen": the device's counts}}.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from simulated_cuda import install
from simulated_device import SEEN

STEPS = [
    "--config", "configs/quickstart.yaml", "--model.dtype", "float32", "--reference.dtype", "float32",
    "--rollout.engine", "native", "--train.num_train_steps", "2", "--train.batch_size", "5",
    "--rollout.group_size", "4", "--train.eval_every", "0", "--train.save_every", "0", "--train.num_eval_prompts", "2",
]  # fmt: skip


def trained(directory: Path, arguments: list[str]) -> list[dict[str, Any]]:
    """The metrics of each step of a training in this process."""
    from accelerate.state import AcceleratorState

    from grpo_dist.train import train
    from grpo_dist.trainer.ending import main

    AcceleratorState._reset_state(reset_partial_state=True)
    with contextlib.redirect_stdout(sys.stderr):
        status = main(train, [*STEPS, "--train.output_dir", str(directory), *arguments])
    if status:
        sys.exit(status)
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()][1:]


def run(folder: Path, cases: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    """All cases on the CPU, then all on the device."""
    results: dict[str, dict[str, Any]] = {}
    for name, arguments in cases.items():
        results[name] = {"cpu": trained(folder / f"{name}-cpu", arguments)}
    install()
    for name, arguments in cases.items():
        SEEN.__init__()
        results[name] |= {"cuda": trained(folder / f"{name}-cuda", arguments), "seen": SEEN.report()}
    return results


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), json.loads(sys.argv[2]))))
