"""Where a run goes on from, and whether it is still the same run, and the same on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..config.schema import Config
from ..config.values import differences, redacted
from ..data.mixture import identifying, order_of
from ..model.load import base_identity
from ..monitoring.machine import versions
from ..text.templates import today, uses_date
from ..types import Prompt
from . import store as checkpoint
from .guards import data_fingerprint
from .state import NEEDED as STATE_NEEDS

NEEDED = STATE_NEEDS | {"identity": dict, "config": dict, "versions": dict}
"""What a checkpoint's metadata has to hold for a run to go on from it, with its types."""


def resume_path(config: Config) -> Path | None:
    """The checkpoint that train.resume comes to, or None for a fresh start.

    Raises ValueError where there is one and train.resume is `never`, DamagedCheckpoint where the one named is damaged.
    """
    root, resume = Path(config.train.output_dir) / "checkpoints", config.train.resume
    if resume == "auto":
        return checkpoint.newest(root)
    if resume == "never":
        if checkpoint.complete(root):
            raise ValueError(f"train.resume is `never` but {root} holds checkpoints: choose another "
                             "train.output_dir, or remove it")  # fmt: skip
        return None
    checkpoint.verify(Path(resume))
    return Path(resume)


def with_template_date(config: Config, tokenizer: Any, path: Path | None) -> Config:
    """The config with the date that the chat template is given, where it writes one.

    It is the option's, or that of the checkpoint at `path`, or today's: a run keeps the prompts it began with.
    """
    if config.data.template_date is not None or not uses_date(tokenizer):
        return config
    kept = checkpoint.load_meta(path)["config"].get("data", {}).get("template_date") if path else None
    return replace(config, data=replace(config.data, template_date=kept or today()))


def identity(config: Config, model_config: Any, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What a run may not change on its way."""
    return {"base": base_identity(config.model, model_config), "lora": asdict(config)["lora"],
            "critic": config.advantage.baseline == "critic", "num_prompts": len(prompts),
            "data": data_fingerprint(identifying(prompts)), "order": order_of(config.data),
            "seed": config.train.seed, "batch_size": config.train.batch_size}  # fmt: skip


def changes(path: Path, config: Config, now: dict[str, Any]) -> list[str]:
    """What has changed since a checkpoint, a line each; raises ValueError where the run's identity `now` is another."""
    meta = checkpoint.load_meta(path, NEEDED)
    harmful = differences(meta["identity"], now)
    if harmful and not config.train.allow_changes:
        told = "\n  ".join(harmful)
        raise ValueError(f"{path} belongs to another run:\n  {told}\nChoose another train.output_dir, "
                         "or set train.allow_changes")  # fmt: skip
    changed = harmful + differences(meta["config"], redacted(asdict(config)))
    return [f"changed since the checkpoint: {change}" for change in changed] + [
        f"another version than the checkpoint's, equality is not promised: {change}"
        for change in differences(meta["versions"], versions())
    ]


def require_same_start(starts: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError where a rank's options, versions or data are not those of rank 0; `starts` in order of rank."""
    for rank, start in enumerate(starts):
        if other := differences(starts[0], start):
            raise ValueError(f"rank {rank} was started otherwise than rank 0, expected the same config, packages, "
                             f"model and data on all nodes: {'; '.join(other)}")  # fmt: skip
