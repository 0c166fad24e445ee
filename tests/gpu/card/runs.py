"""Whole programs in processes of their own: trainings end to end, and the tests of a GPU."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def end_to_end(tiny: bool) -> dict[str, Any]:
    """The quickstart's task in bfloat16: one process, then DDP and ZeRO-2 of one rank through the launcher."""
    figures: dict[str, Any] = {}
    steps = "1" if tiny else "12"
    launches = {"one process": [sys.executable, "-m", "grpo_dist.train"]}
    for name in ("ddp", "zero2"):
        launches[name] = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            f"accelerate_configs/{name}.yaml",
            "--num_processes",
            "1",
            "-m",
            "grpo_dist.train",
        ]
    for name, launch in launches.items():
        out = Path(f"/tmp/one_card/{name.replace(' ', '_')}")
        shutil.rmtree(out, ignore_errors=True)  # of a run before
        begun = time.perf_counter()
        done = subprocess.run(
            [
                *launch,
                "--config",
                "configs/quickstart.yaml",
                "--train.output_dir",
                str(out),
                "--train.num_train_steps",
                steps,
                "--train.resume",
                "never",
                "--logging.trackers",
                "[]",
            ],
            capture_output=True,
            text=True,
            timeout=600 if tiny else 100,
            check=False,
        )
        lines = (
            [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            if (out / "metrics.jsonl").exists()
            else []
        )
        log = done.stdout + done.stderr
        figures[name] = {
            "rc": done.returncode,
            "wall_s": round(time.perf_counter() - begun, 1),
            "rollouts": next((line[-300:] for line in log.splitlines() if "rollouts:" in line), ""),
            "rewards": [round(line["reward/mean"], 3) for line in lines if "reward/mean" in line],
            "gap": max((line.get("rollout/logprob_gap_max") or 0 for line in lines), default=None),
            "kl": max((line.get("rollout/kl") or 0 for line in lines), default=None),
            "update_share": next(
                (line["rollout/update_share"] for line in reversed(lines) if "rollout/update_share" in line), None
            ),
            "log": "" if done.returncode == 0 else log[-1500:],
        }
    return figures


def tests(tiny: bool) -> dict[str, Any]:
    """The tests of what a GPU alone runs."""
    names = ["test_packs.py"] if tiny else ["test_packs.py", "test_engine.py"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rfE",
        "--tb=line",
        "-p",
        "no:cacheprovider",
        "-o",
        "minversion=8",
    ]
    try:
        done = subprocess.run([*command, *(str(Path(__file__).parents[1] / name) for name in names)],
                              capture_output=True, text=True, timeout=600 if tiny else 110, check=False)  # fmt: skip
        return {"rc": done.returncode, "end": done.stdout[-3000:]}
    except subprocess.TimeoutExpired as error:
        return {"failed": "overrun", "end": (error.stdout or b"")[-3000:].decode(errors="replace")}
