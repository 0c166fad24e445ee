"""Write one page about one or several runs: RUN/report.html, or --out FILE.

The page is one file without links to others, so that it opens from a disk or an attachment without a network. Runs
whose configs differ only in the seed are one curve with a range.

    python -m grpo_dist report runs/quickstart
    python -m grpo_dist report runs/grpo runs/dapo --out comparison.html
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's train.output_dir")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page to write (RUN/report.html of the first run)")


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Write the page and print its path."""
    from .page import write_report

    if rest:
        raise ValueError(f"report: {' '.join(rest)!r} given, expected runs and --out FILE")
    path = write_report(options.runs, options.out)
    print(f"report: {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0
