"""Checks of disk space, the output directory and the checkpoint to resume from. They load no weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from ..checkpoint.guards import lock
from ..checkpoint.resume import changes, identity, resume_path, with_template_date
from ..config.places import existing_part, require_writable
from ..config.schema import Config
from ..distributed.device import resolve_dtype
from ..planning.memory import ModelCounts
from ..rollout.vllm.base import is_dequantized
from .contents import Contents
from .findings import Findings
from .sizes import gib


def check_disk(config: Config, contents: Contents, counts: ModelCounts | None, findings: Findings) -> None:
    """Note whether output_dir is writable and has space for the checkpoints, the final model, and the dequantised base
    where servers need one."""
    directory = Path(config.train.output_dir)
    before = len(findings.problems)
    with findings.attempt():
        require_writable(directory)
    if len(findings.problems) > before:
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
    what = f"{num_kept} checkpoints and the final model"
    model_config = contents.model_config if config.rollout.engine == "vllm" else None
    if model_config is not None and is_dequantized(config, model_config):
        needed += counts.parameters * resolve_dtype(config.model.dtype).itemsize
        what = f"{num_kept} checkpoints, the final model and the servers' base"
    existing = existing_part(directory)
    free = shutil.disk_usage(existing).free
    space = (f"{gib(needed)} for {what}, {gib(free)} free in {existing}; "
             "completions need more")  # fmt: skip
    if needed > free:
        findings.problems.append(f"train.output_dir: {directory} needs {space}; free some, choose another disk, or "
                                 f"lower train.keep_checkpoints (now {config.train.keep_checkpoints})")  # fmt: skip
    findings.results["disk"] = [space]


def check_resuming(config: Config, contents: Contents, findings: Findings) -> None:
    """Note the checkpoint that the run would resume from, and whether it may."""
    with findings.attempt():
        path = resume_path(config)
        lines = ["no checkpoint: the run starts from the beginning"]
        if path is not None:
            lines = [f"resumes from {path}"]
            if contents.tokenizer is not None and contents.model_config is not None and contents.prompts:
                dated = with_template_date(config, contents.tokenizer, path)
                now = identity(dated, contents.model_config, contents.prompts, contents.eval_prompts)
                lines += changes(path, dated, now)
        findings.results["resuming"] = lines
