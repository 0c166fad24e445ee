"""The checkpoint that a run resumes from, and whether the run is still the same, and the same on all ranks."""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.algorithm import LossConfig
from ..config.files import written_config
from ..config.schema import Config, LoraConfig
from ..config.values import differences, flat, redacted
from ..data.mixture import identifying, order_of
from ..model.adapter_values import fingerprint
from ..model.files import model_path
from ..model.load import base_identity
from ..model.stored_weights import weights_fingerprint
from ..monitoring.json_lines import read_history
from ..monitoring.machine import versions
from ..rewards.registry import file_digests
from ..text.templates import today, uses_date
from ..types import Prompt
from . import store as checkpoint
from .final import read_record
from .state import NEEDED as STATE_NEEDS

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

NEEDED = STATE_NEEDS | {"identity": dict, "config": dict, "versions": dict}
"""What the metadata of a checkpoint needs so that a run can resume from it, with its types."""


def resume_path(config: Config) -> Path | None:
    """The checkpoint that train.resume stands for, or None for a fresh start.

    A path stands for the newest checkpoint of train.output_dir where the same command has written that: started again,
    it goes on. Raises ValueError where there is one and train.resume is `never`, where it names none, and where a fresh
    start would overwrite a training; DamagedCheckpoint where the one named is damaged.
    """
    root, resume = Path(config.train.output_dir) / "checkpoints", config.train.resume
    if resume == "auto":
        newest = checkpoint.newest(root)
        if newest is None:
            _require_no_training(config)
        return newest
    if resume == "never":
        if checkpoint.complete(root):
            raise ValueError(f"train.resume is `never` but {root} holds checkpoints: choose another "
                             "train.output_dir, or remove it")  # fmt: skip
        _require_no_training(config)
        return None
    path = checkpoint.place_of(Path(resume))
    if not any((path / name).is_file() for name in (checkpoint.MANIFEST, checkpoint.META)):
        near = [each for place in (path, path / "checkpoints", root) for each in checkpoint.complete(place)]
        example = f"such as {near[0]}" if near else "RUN/checkpoints/step_N"
        raise ValueError(f"train.resume: {resume!r} given, expected auto, never, or the directory of a checkpoint, "
                         f"{example}")  # fmt: skip
    checkpoint.verify(path)
    written = checkpoint.newest(root) if checkpoint.complete(root) else None
    if written is None or written.samefile(path) or not _is_same_command(written, config):
        return path
    log.info("train.resume: this command has gone on from %s before, and now does from its newest checkpoint", path)
    return written


def _require_no_training(config: Config) -> None:
    """Raise ValueError where train.output_dir has a training that has saved checkpoints, and none is intact any more.

    One that was killed before its first checkpoint is no such training: the same command makes its steps again.
    """
    directory = Path(config.train.output_dir)
    steps = max((line["step"] for line in read_history(directory)), default=0)
    has_final = read_record(directory / "final") is not None
    damaged = [path.name for path in checkpoint.complete(directory / "checkpoints")]
    if not (damaged or has_final or steps > _first_checkpoint(directory, config)):  # the step after it has been made
        return
    what = f"a training of {steps} steps{' with its final model' if has_final else ''}"
    lack = f"its checkpoints are damaged ({', '.join(damaged)})" if damaged else "no checkpoint to go on from"
    raise ValueError(f"train.output_dir: {directory} has {what}, but {lack}: a new training would overwrite it. Put a "
                     f"checkpoint back into {directory / 'checkpoints'}, choose another train.output_dir, or remove "
                     "this one")  # fmt: skip


def _first_checkpoint(directory: Path, config: Config) -> int:
    """The step after which the last start in a directory was to save first."""
    train: Any = None
    with suppress(OSError, ValueError):
        train = written_config(directory / "config.yaml", "train")["train"]
    given = train if isinstance(train, dict) else {}
    every, last = (
        given[name] if type(given.get(name)) is int else getattr(config.train, name)
        for name in ("save_every", "num_train_steps")
    )
    return min(every or last, last)


def _is_same_command(path: Path, config: Config) -> bool:
    """Whether a run with this config wrote the checkpoint."""
    settled = ("data.template_date", "data.chat_template")  # later than the question
    before, now = (
        {key: value for key, value in flat(each).items() if key not in settled}
        for each in (checkpoint.load_meta(path, {"config": dict})["config"], redacted(asdict(config)))
    )
    return before == now


def with_template_date(config: Config, tokenizer: PreTrainedTokenizerBase, path: Path | None) -> Config:
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
    config: Config, model_config: PreTrainedConfig, prompts: Sequence[Prompt], eval_prompts: Sequence[Prompt] = ()
) -> dict[str, Any]:
    """What must stay the same throughout a run, and what a run that goes on has to tell of."""
    return {"base": base_identity(config.model, model_config),
            "base_weights": weights_fingerprint(Path(model_path(config.model))), "lora": _shape_of(config.lora),
            "adapter": _adapter_of(config.lora),
            "critic": config.has_critic, "optimizer": config.optim.optimizer,
            "num_prompts": len(prompts),
            "data": _data_fingerprint(identifying(prompts)), "columns": columns_fingerprint(identifying(prompts)),
            "evaluation": _data_fingerprint(eval_prompts) + columns_fingerprint(eval_prompts),
            "order": order_of(config.data),
            "seed": config.train.seed, "batch_size": config.train.batch_size}  # fmt: skip


def _data_fingerprint(prompts: Iterable[Prompt]) -> str:
    """A hash of the prompts as the model sees them, in their order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(array("q", [len(prompt.ids), *prompt.ids]).tobytes())
    return digest.hexdigest()[:16]


def columns_fingerprint(prompts: Iterable[Prompt]) -> str:
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


GROUP_OF = {"base": "model", "order": "data"}
"""Entries of an identity that have options of a group."""


def _identity_before(meta: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The identity in a checkpoint's metadata, with what older checkpoints lack: the only choice of then, and what
    nobody asked for."""
    before = {"optimizer": "adamw"} | {key: now[key] for key in ("base_weights", *MAY_CHANGE)} | meta["identity"]
    if before["lora"] is not None:
        before["lora"] = _shape_of(LoraConfig()) | before["lora"]
    return before


def _harmful(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each difference of two identities that makes another run of it."""
    return differences(*({key: value for key, value in _by_entry(each).items() if key not in MAY_CHANGE}
                         for each in (before, now)))  # fmt: skip


def _without_place(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Why the tensors of a checkpoint have no place in this run, whatever is allowed to change."""
    lora_before, lora = before["lora"], now["lora"]
    return [reason for reason, holds in {
        "it has adapters, and lora is null": lora is None and lora_before is not None,
        "it has all weights, and lora is not null": lora is not None and lora_before is None,
        "its adapters have another lora.r": lora and lora_before and lora["r"] != lora_before["r"],
        "it has no value head for advantage.baseline critic": now["critic"] and not before.get("critic"),
        "it has the state of another optim.optimizer": now["optimizer"] != before["optimizer"],
    }.items() if holds]  # fmt: skip


def _require_same_run(
    path: Path, config: Config, before: dict[str, Any], now: dict[str, Any], options: list[str]
) -> None:
    """Raise ValueError where identities differ and may not; `options` has a line for each option that differs."""
    harmful, without_place = _harmful(before, now), _without_place(before, now)
    if not harmful or (config.train.allow_changes and not without_place):
        return
    shown = list(dict.fromkeys(_by_option(line, options) for line in harmful))
    others = [line for line in options if line not in shown and not line.startswith("train.allow_changes:")]
    if not {*shown} <= {*options}:  # not an option's own line: what has changed it is one of the others, or a file
        shown.append(f"options that differ: {'; '.join(others)}" if others else "no option differs: a file has changed")
    advice = "or set train.allow_changes"
    if without_place:
        advice = (f"as this checkpoint cannot be continued so ({'; '.join(without_place)}). `python -m grpo_dist "
                  "export` writes its model, from which a new run can begin")  # fmt: skip
    lines = "\n  ".join(shown)
    raise ValueError(f"{path} belongs to another run:\n  {lines}\nChoose another train.output_dir, {advice}")


def _by_option(line: str, options: list[str]) -> str:
    """The line of the option with these values that a line about the identity is of; else that line."""
    first, _, rest = line.partition(".")
    name = f"{GROUP_OF[first]}.{rest}" if first in GROUP_OF else line
    return next((each for each in options if each == name or each.endswith(f".{name}")), line)


def _require_steps_to_come(path: Path, config: Config, meta: dict[str, Any]) -> None:
    """Raise ValueError where a checkpoint has more steps than the run is to have."""
    begun, num_steps = meta["step"] + (meta["updates"] > 0), config.train.num_train_steps
    if begun > num_steps:
        raise ValueError(f"train.num_train_steps: {num_steps} given, but the run has come to step {begun} in {path}: "
                         f"expected {begun} or more, or a train.resume that names an earlier checkpoint")  # fmt: skip


def changes(path: Path, config: Config, now: dict[str, Any]) -> list[str]:
    """A line for each change since a checkpoint; raises ValueError where the run's identity `now` is another, or where
    it has fewer steps."""
    meta = checkpoint.load_meta(path, NEEDED)
    before, options = _identity_before(meta, now), differences(meta["config"], redacted(asdict(config)))
    _require_same_run(path, config, before, now, options)
    _require_steps_to_come(path, config, meta)
    harmful = [line for line in _harmful(before, now) if _by_option(line, options) == line]
    noted = [what for key, what in MAY_CHANGE.items() if before[key] != now[key]]
    changed = list(dict.fromkeys(harmful + options + noted)) + _changed_files(meta, config)
    profiled = config.logging.profile_step
    if 0 < profiled <= meta["step"] and any(line.startswith("logging.profile_step:") for line in options):
        changed.append(f"logging.profile_step, to no effect: step {profiled} is done already")
    return [f"changed since the checkpoint: {change}" for change in changed] + [
        f"the version differs from the checkpoint's, so results may differ: {change}"
        for change in differences(meta["versions"], versions())
    ]


DRAWN_BY = {
    "rollout": ("group_size", "max_completion_length", "temperature", "top_p", "top_k", "min_p", "stop",
                "min_new_tokens", "banned_tokens", "max_resamples", "lag"),
    "environment": ("tools", "factory", "max_turns", "max_tool_characters", "stop_tools", "call_format"),
    "rewards": ("name", "weight", "schedule", "args"),
}  # fmt: skip
"""Options on which completions and their rewards depend. Others change the speed, or rounding."""
DIVIDED_BY = ("updates_per_batch", "num_minibatches")
"""Options of `train` on which the updates of a step depend."""


def changes_of_batches(meta: dict[str, Any], config: Config, now: dict[str, Any]) -> list[str]:
    """A line for each change since a checkpoint because of which batches that it holds do not fit the run any more.

    A batch has its rewards: those of an edited function, or of corrected answers, are others.
    """
    groups = {**DRAWN_BY, **({"train": DIVIDED_BY} if meta["updates"] else {})}
    before, after = ({group: _chosen(values.get(group), names) for group, names in groups.items()}
                     for values in (meta["config"], redacted(asdict(config))))  # fmt: skip
    identity_before = _identity_before(meta, now)
    columns = [MAY_CHANGE["columns"]] if identity_before["columns"] != now["columns"] else []
    return _harmful(identity_before, now) + differences(before, after) + columns + _changed_files(meta, config)


def _changed_files(meta: dict[str, Any], config: Config) -> list[str]:
    """A line for each reward, tool and environment of the user whose file is not that of a checkpoint any more."""
    files = file_digests(config.own_code)
    before = meta.get("files", meta.get("reward_files", {}))  # older checkpoints have those of rewards alone
    return [f"the file of {name}" for name, digest in before.items() if files.get(name, digest) != digest]


def _chosen(group: Any, names: Sequence[str]) -> Any:
    """The options of these names, of a group or of each in a list of groups."""
    if isinstance(group, list):
        return [_chosen(each, names) for each in group]
    return {name: (group or {}).get(name) for name in names}


def resumed_kl_coeff(meta: dict[str, Any], loss: LossConfig) -> float:
    """The KL coefficient of a resumed run: the config's, unless the run has adapted this one to loss.kl_target."""
    before = meta["config"].get("loss", {})
    is_adapted = None not in (loss.kl_target, before.get("kl_target")) and before["kl_coeff"] == loss.kl_coeff
    return meta["kl_coeff"] if is_adapted else loss.kl_coeff


def require_same_start(starts: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError where a rank's options, versions or data differ from rank 0's; `starts` is in order of rank."""
    named = [start | {"identity": _by_entry(start["identity"])} for start in starts]
    for rank, start in enumerate(named):
        if other := differences(named[0], start):
            raise ValueError(f"rank {rank} was started differently from rank 0, expected the same config, packages, "
                             f"model and data on all nodes: {'; '.join(other)}")  # fmt: skip
