"""The machine and packages of a run, for its report: a line of environment.jsonl for each start."""

from __future__ import annotations

import functools
import json
import os
import platform
import socket
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

from .. import __version__
from ..distributed.deepspeed import Zero
from ..distributed.device import dtype_name
from ..distributed.ranks import Ranks
from ..distributed.strategy import Strategy
from ..text.files import write_file
from .json_lines import read_json_lines

FILE = "environment.jsonl"


def last_recorded(directory: Path, name: str) -> str | None:
    """The entry of a name that `record_start` wrote at the last start of a run; None where there is none."""
    return next((start[name] for start in reversed(read_json_lines(directory / FILE)) if name in start), None)


def started_in(directory: Path) -> Path | None:
    """The directory in which a run was last started, from which its relative paths start; None where it is unknown."""
    start = last_recorded(directory, "directory")
    return None if start is None else Path(start)


def devices_of(ranks: Ranks) -> list[str]:
    """Host and device of each rank. A collective."""
    on_gpu = ranks.device.type == "cuda"
    device = torch.cuda.get_device_name(ranks.device) if on_gpu else f"{platform.machine()}, {os.cpu_count()} cores"
    return ranks.gather_objects(f"{socket.gethostname()}: {device}")


def record_start(directory: Path, strategy: Strategy, devices: list[str], first_step: int, dtype: torch.dtype) -> None:
    """Record the machine and packages of a start after `first_step` steps. `dtype` is that of the policy's weights."""
    used = {"grpo_dist": __version__, "python": platform.python_version(), **versions()}
    if isinstance(strategy, Zero):
        used["deepspeed"] = metadata.version("deepspeed")
    if torch.version.cuda:
        used["cuda"] = torch.version.cuda
    start = {"started": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC", "directory": os.getcwd(),
             "first_step": first_step, "engine": strategy.name, "ranks": devices, "platform": platform.platform(),
             "dtype": dtype_name(dtype), "versions": used}  # fmt: skip
    # written anew, because a line that the end of a machine has cut would end in the middle of this one
    starts = [*read_json_lines(directory / FILE), start]
    write_file(directory / FILE, "".join(json.dumps(each) + "\n" for each in starts))


@functools.cache
def versions() -> dict[str, str]:
    """Versions of the packages that results depend on."""
    return {name: metadata.version(name) for name in ("torch", "transformers", "peft", "accelerate")}
