"""Time the page of a large run: how long it takes to make, to load in Chromium, and to find a text in.

    python tests/unit/report/page_costs.py [--steps 1000] [--prompts 64] [--group_size 16]

The run is written by hand, with completions of 60 random words. Prints a line for each part.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from browser import Page, find_chromium
from runs_on_disk import write_run

from grpo_dist.report.page import write_report

WORDS = [f"{first}{second}{third}" for first in "bdfklmnprst" for second in "aeiou" for third in ("n", "rt", "st", "m")]


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name, default in (("steps", 1000), ("prompts", 64), ("group_size", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    draw = random.Random(0)

    def text(step: int, group: int, sample: int) -> str:
        return " ".join(draw.choices(WORDS, k=60))

    with tempfile.TemporaryDirectory() as directory:
        run = write_run(Path(directory) / "run", options.steps, text, options.prompts, options.group_size)
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        cpu = time.process_time()
        path = write_report([run])
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
        print(f"make: {time.perf_counter() - start:.1f} s ({time.process_time() - cpu:.1f} s of the processor), "
              f"{path.stat().st_size / 1e6:.1f} MB, {grown:.2f} GiB more memory")  # fmt: skip
        chromium = find_chromium()
        if chromium is None:
            print("load: no Chromium here")
            return
        page = Page(chromium)
        start = time.perf_counter()
        page.open(path, 1440)
        print(f"load: {time.perf_counter() - start:.1f} s")
        start = time.perf_counter()
        page.js("""(() => { const field = document.getElementById("text"); field.value = "kast";
            field.dispatchEvent(new Event("input", { bubbles: true })); })()""")
        print(f"find: {time.perf_counter() - start:.1f} s: {page.texts('#count')[0]}")
        page.close()


if __name__ == "__main__":
    main()
