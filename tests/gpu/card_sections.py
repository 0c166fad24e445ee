"""The sections of `one_card.py`, which starts this in a process of its own."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from card.kernels import decode_attention, head, machine, pack_attention
from card.report import Report
from card.rollout import decode, engines, fused_step, old_decode
from card.runs import end_to_end, tests
from card.update import memory, update

from grpo_dist.distributed.device import set_up_cuda

Sections = dict[str, tuple[int, Callable[[], dict[str, Any]]]]


def sections_of(tiny: bool) -> Sections:
    """Each section's deadline in seconds, and what it does; what matters most is first."""
    small, large = ("tiny", "tiny") if tiny else ("1.5b", "7b")
    packs = ["16k: 4 x (256 + 16 x 240)", "16k: 1 x (256 + 16 x 1000)", "4k: 1 x (256 + 16 x 240)"]
    packs = ["tiny"] if tiny else packs
    pack = packs[0] if tiny else "8k: 2 x (256 + 16 x 240)"
    rows, prompt, new = ([2], 5, 6) if tiny else ([512, 64, 8], 256, 256)
    return {
        "machine": (30, machine),
        "fused step": (60, lambda: fused_step(tiny)),
        "rollout 1.5b of 1024": (75, lambda: decode(small, rows[:1], prompt, new if tiny else 1024, tiny)),
        "update 1.5b": (60, lambda: update(small, packs, False)),
        "update 7b": (60, lambda: update(large, [pack], False)),
        "memory 1.5b": (45, lambda: memory(small, packs[0], False)),
        "engines": (75, lambda: engines(small, 2 if tiny else 128, prompt, new if tiny else 128)),
        "memory 7b": (45, lambda: memory(large, pack, True)),
        "update 7b recomputed": (45, lambda: update(large, [pack], True)),
        "decode 7b": (60, lambda: decode(large, rows[:1] + rows[2:], prompt, new // 2, tiny)),
        "decode 1.5b": (60, lambda: decode(small, rows, prompt, new, tiny)),
        "pack attention": (45, lambda: pack_attention(tiny)),
        "decode attention": (45, lambda: decode_attention(tiny)),
        "end to end": (110, lambda: end_to_end(tiny)),
        "tests": (120, lambda: tests(tiny)),
        "head": (25, lambda: head(tiny)),
        "decode without pages": (40, lambda: old_decode(small, rows[:1] + rows[2:], prompt, new // 2)),
    }


def main(out: str, seconds: str, turn: str, *names: str) -> None:
    """Run all sections of these names, or those that have not begun."""
    end, tiny = time.monotonic() + float(seconds), "--tiny" in names
    set_up_cuda()
    if tiny:  # a program takes the interpreter 10 to 40 ms
        from grpo_dist.rollout.native import tables

        tables.LADDER[:] = [2, 4, 8]
    sections, report, patience = sections_of(tiny), Report(Path(out)), 10 if tiny else 1
    chosen = [name for name in names if name != "--tiny"] or list(sections)
    if unknown := set(chosen) - set(sections):
        sys.exit(f"--sections: {sorted(unknown)} given, expected some of {list(sections)}")
    if turn == "first":
        report.forget(chosen)
    for name in chosen:
        if name not in report.sections():
            limit, section = sections[name]
            report.run(name, min(limit * patience, int(end - time.monotonic())), section)


if __name__ == "__main__":
    main(*sys.argv[1:])
