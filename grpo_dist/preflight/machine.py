"""A look at where a run would go: sizes, disk space, the output directory, trackers. No weights are loaded."""

from __future__ import annotations

import difflib
import importlib.util
import os
import shutil
import socket
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from ..config import Config
from ..distributed import resolve_dtype
from ..guards import lock
from ..planning.memory import ModelCounts
from ..resuming import changes, identity, resume_path
from .contents import Contents
from .findings import Findings
from .sizes import gib

_CONNECT_SECONDS = 3.0
_SERVICES = {"wandb": ("WANDB_BASE_URL", "https://api.wandb.ai", "WANDB_API_KEY"),
             "comet_ml": ("COMET_URL_OVERRIDE", "https://www.comet.com", "COMET_API_KEY"),
             "swanlab": ("SWANLAB_API_HOST", "https://api.swanlab.cn", "SWANLAB_API_KEY"),
             "mlflow": ("MLFLOW_TRACKING_URI", "", None)}  # fmt: skip
"""Trackers that talk to a host: the variable that names it, its default, and the variable with the key."""


def look_at_disk(config: Config, counts: ModelCounts | None, findings: Findings) -> None:
    """Note whether output_dir can be written and has room for the checkpoints and the final model."""
    directory = Path(config.train.output_dir)
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing) as probe:
            probe.write(b"x")
    except OSError as error:
        findings.problems.append(f"train.output_dir: {directory} given, but {existing} cannot be written to "
                                 f"({error.strerror}); choose a directory that can")  # fmt: skip
        return
    if (directory / ".lock").exists():
        with findings.attempt():
            lock(directory).close()
    if counts is None:
        return
    trained = counts.adapters or counts.parameters
    checkpoint = 3 * 4 * trained  # a weight and two moments in float32
    num_kept = config.train.keep_checkpoints + 1  # the next is written before the oldest is removed
    dtype = torch.float32 if config.lora is None else resolve_dtype(config.model.dtype)
    needed = num_kept * checkpoint + counts.parameters * dtype.itemsize + 4 * counts.adapters
    free = shutil.disk_usage(existing).free
    told = (f"{gib(needed)} for {num_kept} checkpoints and the final model, {gib(free)} free in {existing}; "
            "completions come on top")  # fmt: skip
    if needed > free:
        findings.problems.append(f"train.output_dir: {directory} needs {told}; free some, choose another disk, or "
                                 f"lower train.keep_checkpoints (now {config.train.keep_checkpoints})")  # fmt: skip
    findings.facts["disk"] = [told]


def look_at_resuming(config: Config, found: Contents, findings: Findings) -> None:
    """Note which checkpoint the run would go on from, and whether it may."""
    with findings.attempt():
        path = resume_path(config)
        told = ["no checkpoint: the run starts from the beginning"]
        if path is not None:
            told = [f"goes on from {path}"]
            if found.model_config is not None and found.prompts:
                told += changes(path, config, identity(config, found.model_config, found.prompts))
        findings.facts["resuming"] = told


def look_at_trackers(names: list[str], findings: Findings) -> None:
    """Note whether each tracker is known, installed, has its credentials and can be reached; a run goes on without."""
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            near = difflib.get_close_matches(name, LOGGER_TYPE_TO_CLASS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            findings.problems.append(f"logging.trackers: {name!r} given, expected some of "
                                     f"{', '.join(LOGGER_TYPE_TO_CLASS)}{hint}")  # fmt: skip
        elif importlib.util.find_spec(name) is None:
            findings.problems.append(f"logging.trackers: {name!r} given, but its package is not installed: "
                                     f"pip install {name}, or leave it out")  # fmt: skip
        elif name in _SERVICES and os.environ.get("WANDB_MODE") not in ("offline", "disabled"):
            problem = _unreachable(name)
            if problem:
                findings.problems.append(f"logging.trackers: {name!r} given, but {problem}")
            else:
                findings.facts.setdefault("trackers", []).append(f"{name}: reached")
        else:
            findings.facts.setdefault("trackers", []).append(f"{name}: installed")


def _unreachable(name: str) -> str | None:
    """Return why a tracker's service could not be used; None where it answers or is a local one."""
    variable, default, key = _SERVICES[name]
    address = urlsplit(os.environ.get(variable) or default)
    if not address.hostname:
        return None
    if key is not None and key not in os.environ and not _logged_in(address.hostname):
        return f"there are no credentials for {address.hostname}: log in, or set {key}"
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname, port), _CONNECT_SECONDS).close()
    except OSError as error:
        return (f"{address.hostname} does not answer within {_CONNECT_SECONDS:g} s ({error}); where there is no "
                "network, use its offline mode or tensorboard")  # fmt: skip
    return None


def _logged_in(host: str) -> bool:
    """Whether a netrc file, where such clients keep a login, knows a host."""
    file = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    return file.is_file() and host in file.read_text(errors="replace").split()
