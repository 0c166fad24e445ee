"""The checkpoint that a run resumes from, and whether the run is still the same, and the same on all ranks."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

from ..config.schema import Config, LoraConfig
from ..config.values import differences, redacted
from ..data.mixture import identifying, order_of
from ..model.adapter_values import fingerprint
from ..model.files import model_path
from ..model.load import base_identity
from ..model.stored_weights import weights_fingerprint
from ..monitoring.machine import versions
from ..rewards.registry import file_digests
from ..text.templates import today, uses_date
from ..types import Prompt
from . import store as checkpoint
from .state import NEEDED as STATE_NEEDS

NEEDED = STATE_NEEDS | {"identity": dict, "config": dict, "versions": dict}
"""What the metadata of a checkpoint needs so that a run can resume from it, with its types."""


def resume_path(config: Config) -> Path | None:
    """The checkpoint that train.resume stands for, or None for a fresh start.

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
    """The config with the date for the chat template, where the template writes one.

    The date is the option's, or that of the checkpoint at `path`, or today's: a resumed run keeps its prompts.
    """
    if config.data.template_date is not None or not uses_date(tokenizer):
        return config
    kept = checkpoint.load_meta(path)["config"].get("data", {}).get("template_date") if path else None
    return replace(config, data=replace(config.data, template_date=kept or today()))


MAY_CHANGE = {"columns": "other columns of data.train_file than its prompts, such as answers",
              "evaluation": "the prompts or other columns of data.eval_file"}  # fmt: skip
"""Entries of a run's identity that may change, and what has changed then."""


def identity(
    config: Config, model_config: Any, prompts: Sequence[Prompt], eval_prompts: Sequence[Prompt] = ()
) -> dict[str, Any]:
    """What must stay the same throughout a run, and what a run that goes on has to tell of."""
    return {"base": base_identity(config.model, model_config),
            "base_weights": weights_fingerprint(Path(model_path(config.model))), "lora": _shape_of(config.lora),
            "adapter": _adapter_of(config.lora),
            "critic": config.has_critic, "optimizer": config.optim.optimizer,
            "num_prompts": len(prompts),
            "data": _data_fingerprint(identifying(prompts)), "columns": _columns_fingerprint(identifying(prompts)),
            "evaluation": _data_fingerprint(eval_prompts) + _columns_fingerprint(eval_prompts),
            "order": order_of(config.data),
            "seed": config.train.seed, "batch_size": config.train.batch_size}  # fmt: skip


def _data_fingerprint(prompts: Iterable[Prompt]) -> str:
    """A hash of the prompts as the model sees them, in their order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(array("q", [len(prompt.ids), *prompt.ids]).tobytes())
    return digest.hexdigest()[:16]


def _columns_fingerprint(prompts: Iterable[Prompt]) -> str:
    """A hash of what rewards read beside the prompts."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps(sorted(prompt.columns.items()), default=_as_text).encode())
    return digest.hexdigest()[:16]


def _as_text(value: Any) -> str:
    """A value that JSON does not have, or the name of its type where a text would name an address in memory."""
    return str(value) if isinstance(value, (bytes, date, Decimal)) else type(value).__name__


def _shape_of(lora: LoraConfig | None) -> dict[str, Any] | None:
    return None if lora is None else {key: value for key, value in asdict(lora).items() if key != "init_from"}


def _adapter_of(lora: LoraConfig | None) -> str | None:
    """What identifies the adapter that a run went on from, wherever it lies; None where there is none."""
    return None if lora is None or lora.init_from is None else fingerprint(lora.init_from)


def _by_entry(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity whose base model is not one long text: a line for what differs in it can then be read."""
    return identity | {"base": json.loads(identity["base"])}


def changes(path: Path, config: Config, now: dict[str, Any]) -> list[str]:
    """A line for each change since a checkpoint; raises ValueError where the run's identity `now` is another."""
    meta = checkpoint.load_meta(path, NEEDED)
    # older checkpoints lack what was the only choice, and what nobody asked for
    before = {"optimizer": "adamw"} | {key: now[key] for key in ("base_weights", *MAY_CHANGE)} | meta["identity"]
    if before["lora"] is not None:
        before["lora"] = _shape_of(LoraConfig()) | before["lora"]
    noted = [what for key, what in MAY_CHANGE.items() if before.pop(key) != now[key]]
    same = {key: value for key, value in now.items() if key not in MAY_CHANGE}
    harmful = differences(_by_entry(before), _by_entry(same))
    if harmful and not config.train.allow_changes:
        lines = "\n  ".join(harmful)
        raise ValueError(f"{path} belongs to another run:\n  {lines}\nChoose another train.output_dir, "
                         "or set train.allow_changes")  # fmt: skip
    changed = harmful + differences(meta["config"], redacted(asdict(config))) + noted
    files = file_digests(config.rewards)
    changed += [f"the file of {name}" for name, digest in meta.get("reward_files", {}).items()
                if files.get(name, digest) != digest]  # fmt: skip
    return [f"changed since the checkpoint: {change}" for change in changed] + [
        f"the version differs from the checkpoint's, so results may differ: {change}"
        for change in differences(meta["versions"], versions())
    ]


def require_same_start(starts: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError where a rank's options, versions or data differ from rank 0's; `starts` is in order of rank."""
    named = [start | {"identity": _by_entry(start["identity"])} for start in starts]
    for rank, start in enumerate(named):
        if other := differences(named[0], start):
            raise ValueError(f"rank {rank} was started differently from rank 0, expected the same config, packages, "
                             f"model and data on all nodes: {'; '.join(other)}")  # fmt: skip
