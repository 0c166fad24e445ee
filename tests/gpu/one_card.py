"""What one GPU does with this trainer: sections with deadlines of their own, one JSON file, one table.

    PYTHONPATH=. python tests/gpu/one_card.py --out one_card.json    # all sections, what matters most first
    PYTHONPATH=. python tests/gpu/one_card.py --sections machine "update 7b" --seconds 120
    PYTHONPATH=. python tests/gpu/one_card.py --tiny                  # every line once, on small shapes

Without a GPU Triton's interpreter runs the kernels. Its products of bfloat16 are wrong (those of float16 are right), so
errors of attention over pages in bfloat16 mean nothing there.

The file is written after each section, and keeps what it has of others. A section that fails or overruns says so in its
place. If it hangs, kills its process or leaves the device unusable, the next one starts in a new process. After 8
minutes (`--seconds`) the rest is left out. Models have random weights and are made on the device, so nothing is
downloaded. Times are medians of device events unless a name says `wall`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WHOLE = 480
"""Seconds of all sections together, unless `--seconds` says otherwise."""
SECTIONS = Path(__file__).with_name("card_sections.py")


def run_sections(options: argparse.Namespace) -> int:
    """Run the sections in a process of their own; where it dies, those after that one in a new one."""
    end = time.monotonic() + (options.seconds or WHOLE * (10 if options.tiny else 1))
    before, turn = None, "first"
    while True:
        left = end - time.monotonic()
        command = [sys.executable, str(SECTIONS), str(options.out), str(left), turn, *["--tiny"] * options.tiny]
        status = subprocess.run([*command, *options.sections], check=False).returncode
        now = options.out.read_text() if options.out.exists() else None
        if not status or now == before:
            return status
        before, turn = now, "next"


GOALS: dict[str, tuple[Callable[[Any], float], str]] = {
    "rollout 1.5B, 512 x 1,024: tokens/s": (
        lambda s: s["rollout 1.5b of 1024"]["512 rows"]["second: tokens_per_s wall"], "45000"),
    "a step of it, halfway: share of the speed of copying": (
        lambda s: _rate(s["rollout 1.5b of 1024"]["512 rows"]) / s["machine"]["copy_tb_per_s"], "0.6"),
    "update 1.5B, 16 k: share of 989 TFLOP/s": (
        lambda s: s["update 1.5b"]["16k: 4 x (256 + 16 x 240)"]["mfu_of_989"], "0.4"),
    "update 7B, 8 k: share of 989 TFLOP/s": (
        lambda s: s["update 7b"]["8k: 2 x (256 + 16 x 240)"]["mfu_of_989"], "0.4"),
    "rollout beside generate: times as fast": (lambda s: _beside(s, "generate: tokens_per_s wall"), "10"),
    "rollout beside continuous batching: times as fast": (
        lambda s: _beside(s, "paged, second: tokens_per_s wall"), "2"),
    "predicted memory of an update, 1.5B: of the peak": (
        lambda s: s["memory 1.5b"]["predicted_of_peak"], "0.9 to 1.1"),
    "predicted memory of an update, 7B: of the peak": (
        lambda s: s["memory 7b"]["predicted_of_peak"], "0.9 to 1.1"),
}  # fmt: skip
"""What was asked of a card: the figure, and its goal."""


def _rate(step: dict[str, Any]) -> float:
    return step["needed_gb"] / step["step_ms"]


def _beside(sections: dict[str, Any], other: str) -> float:
    return sections["engines"]["native, second: tokens_per_s wall"] / sections["engines"][other]


def table(sections: dict[str, Any]) -> str:
    """The figures beside their goals, and what there is none of."""
    lines = []
    for name, (figure, goal) in GOALS.items():
        try:
            value = f"{figure(sections):.3g}"
        except (KeyError, ZeroDivisionError):
            value = "-"
        lines.append(f"{name:<56} {value:>9}   goal {goal}")
    failed = [f"{name}: {figures['failed']}" for name, figures in sections.items() if "failed" in figures]
    return "\n".join([*lines, *failed])


def main() -> int:
    """Run the sections asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("one_card.json"))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--sections", nargs="*", default=[], help="names of sections; all by default")
    parser.add_argument("--seconds", type=float, help=f"time for all sections together ({WHOLE})")
    options = parser.parse_args()
    status = run_sections(options)
    if options.out.exists():
        print(table(json.loads(options.out.read_text())))
    return status


if __name__ == "__main__":
    sys.exit(main())
