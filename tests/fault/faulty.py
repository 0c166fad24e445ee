"""grpo_dist.train with one fault built in, for the tests of faults: started in the trainer's place.

FAULT=KIND@POINT:N does KIND at the N-th time (from 1) that the run comes to POINT, on rank FAULT_RANK (default: all).
It makes the file FAULT_MARK first, if that is given.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from grpo_dist import train
from grpo_dist.checkpoint import store as checkpoint
from grpo_dist.distributed import watch
from grpo_dist.monitoring import recorder
from grpo_dist.rewards.pool.pool import Pending
from grpo_dist.rollout import NativeDecoder
from grpo_dist.trainer import ending, evaluation, saving
from grpo_dist.trainer.ending import main

KIND, _, WHERE = os.environ["FAULT"].partition("@")
POINT, _, COUNT = WHERE.partition(":")
MINE = os.environ.get("FAULT_RANK", os.environ.get("RANK", "0")) == os.environ.get("RANK", "0")
visits = 0


def happen() -> None:
    """Let the fault happen."""
    if mark := os.environ.get("FAULT_MARK"):
        Path(mark).touch()
    if KIND == "enospc":
        raise OSError(errno.ENOSPC, "No space left on device")
    if KIND == "vanish":
        shutil.rmtree(sys.argv[sys.argv.index("--train.output_dir") + 1])
        return
    if KIND == "oom":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    if KIND == "loop":  # in Python, for ever
        while True:
            pass
    if KIND == "tell":
        for group, (backend, _) in dist.distributed_c10d._world.pg_map.items():
            wait = group._get_backend(torch.device("cpu")).options._timeout
            os.write(1, f"\nprocess group ({backend}) waits {wait}\n".encode())  # at once: other ranks write there, too
        return
    if KIND == "tardy":
        time.sleep(40)
        return
    if KIND == "late":
        time.sleep(3)
        return
    if KIND == "block":  # in C, for ever
        ctypes.CDLL(None).pause()
    os.kill(os.getpid(), getattr(signal, f"SIG{KIND.upper()}"))


def at(point: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with the fault before it at the right call."""

    def faulty(*arguments: Any, **named: Any) -> Any:
        global visits
        if point == POINT and MINE:
            visits += 1
            if visits == int(COUNT):
                happen()
        return function(*arguments, **named)

    return faulty


def poison(function: Callable[..., Any]) -> Callable[..., Any]:
    """The loss, infinite at the right call."""

    def faulty(*arguments: Any, **named: Any) -> Any:
        global visits
        loss = function(*arguments, **named)
        visits += 1
        if KIND == "nan" and MINE and visits == int(COUNT):
            object.__setattr__(loss, "total", loss.total * float("nan"))
        return loss

    return faulty


NativeDecoder.decode = at("rollout", NativeDecoder.decode)  # type: ignore[method-assign]
Pending.result = at("scoring", Pending.result)  # type: ignore[method-assign]
train.update = at("update", train.update)
evaluation._evaluated = at("eval", evaluation._evaluated)
checkpoint.save_file = at("shards", checkpoint.save_file)
checkpoint._checksum = at("manifest", checkpoint._checksum)
checkpoint.sync = at("rename", checkpoint.sync)
Path.rename = at("move", Path.rename)  # type: ignore[method-assign]
checkpoint._prune = at("prune", checkpoint._prune)
recorder.append_json_line = at("metrics", recorder.append_json_line)
saving.save_final = at("export", saving.save_final)
ending.write_lines = at("word", ending.write_lines)
if KIND == "impatient":
    watch.SLOW_SECONDS = 1.0
if KIND == "nan":
    train.policy_loss = poison(train.policy_loss)

if __name__ == "__main__":
    sys.exit(main(train.train))
