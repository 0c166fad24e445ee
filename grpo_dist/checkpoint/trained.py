"""A run's trained model, loaded from the disk without ranks, for `export` and `chat`."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..config.files import written_config
from ..config.places import is_path
from ..config.schema import LoraConfig, ModelConfig
from ..distributed.device import DTYPES, resolve_dtype
from ..model.config_files import load_model_config, load_tokenizer, stored_dtype
from ..model.expert_adapters import compute_adapters_apart
from ..model.files import model_path
from ..model.load import base_identity, load_causal_lm, load_policy, trainable
from ..model.peft import with_saved_adapters
from ..model.policy import Policy, PolicyOptions
from ..model.stored_weights import weights_fingerprint
from ..model.toy import MODELS
from ..monitoring.json_lines import read_history
from ..monitoring.machine import last_recorded, started_in
from . import store as checkpoint
from .final import is_newest, read_record

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

Group = TypeVar("Group", ModelConfig, LoraConfig)


@dataclass(frozen=True)
class Trained:
    """A checkpoint, or the directory `final` of a run that has ended."""

    path: Path
    """The directory of the weights."""
    run: Path
    """The run's directory."""
    step: int
    """Steps of its training."""
    config: dict[str, Any]
    """The run's resolved config."""
    is_checkpoint: bool

    @property
    def model(self) -> ModelConfig:
        """The base model, by an absolute path where the run was given a relative one."""
        model, start = self.given_model, started_in(self.run)
        if start is not None and (is_path(model.name) or (start / model.name).is_dir()) and model.name not in MODELS:
            return replace(model, name=str(start / Path(model.name).expanduser()))
        return model

    @property
    def given_model(self) -> ModelConfig:
        """The base model as the run's config names it."""
        return _options(self, ModelConfig, "model")

    @property
    def lora(self) -> LoraConfig | None:
        """The adapters; None after full fine-tuning."""
        return _options(self, LoraConfig, "lora") if self.config["lora"] else None


def _options(trained: Trained, kind: type[Group], name: str) -> Group:
    """A group of the run's options. Raises ValueError where this version does not know one of them."""
    given: dict[str, Any] = trained.config[name]
    if unknown := sorted({*given} - {field.name for field in fields(kind)}):
        names = ", ".join(f"{name}.{option}" for option in unknown)
        raise ValueError(f"{trained.path}: the run has the options {names}, which this version of grpo_dist does not "
                         "know: use the one that wrote it")  # fmt: skip
    return kind(**given)


def find(path: Path) -> Trained:
    """The final model of a run, or its newest checkpoint where that is newer; `path` may also name either itself.

    Raises ValueError where there is neither, and where the checkpoint is damaged.
    """
    if (path / checkpoint.MANIFEST).is_file():
        try:
            checkpoint.verify(path)
            meta = checkpoint.load_meta(path, {"step": int, "config": dict, "identity": dict})
        except checkpoint.DamagedCheckpoint as error:
            raise ValueError(str(error)) from error
        return Trained(path, path.resolve().parents[1], meta["step"], meta["config"], True)
    run = path.resolve().parent if path.name == "final" else path
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{path}: expected the directory of a run (train.output_dir, with its config.yaml), its "
                         "`final`, or one of its checkpoints/step_N")  # fmt: skip
    config = written_config(run / "config.yaml", "model", "lora")
    final, checkpoints = run / "final", run / "checkpoints"
    record = read_record(final)
    if (final / "config.json").is_file() and (run != path or is_newest(record, checkpoints)):
        step = max((entry["step"] for entry in read_history(run)), default=0) if record is None else record.step
        return Trained(final, run, step, config, False)
    newest = checkpoint.newest(checkpoints)
    if newest is None:
        raise ValueError(f"{run}: there is no complete checkpoint, and no `final` of a run that has ended")
    return find(newest)


def load(trained: Trained) -> tuple[Policy, PreTrainedTokenizerBase]:
    """The trained policy on the CPU, in its dtype of training, and its tokenizer.

    Raises ValueError where the base model is another than the one of training, OSError where it is missing.
    """
    model, lora, tokenizer = trained.model, trained.lora, load_tokenizer(trained.model)
    if trained.is_checkpoint:
        return _from_checkpoint(trained).eval(), tokenizer
    here = at(trained, trained.path)
    if lora is None:
        return Policy(load_causal_lm(here, stored_dtype(here), None)).eval(), tokenizer
    for newest in checkpoint.complete(trained.run / "checkpoints")[:1]:
        _require_base(trained, checkpoint.load_meta(newest, {"identity": dict})["identity"])
    # merged weights may be in a larger dtype than the base that the adapters were trained on
    trained_in = last_recorded(trained.run, "dtype")
    base = load_causal_lm(model, stored_dtype(here) if trained_in is None else DTYPES[trained_in], None)
    adapted = with_saved_adapters(base, str(trained.path / "adapter"))
    compute_adapters_apart(adapted)
    return Policy(adapted).eval(), tokenizer


def at(trained: Trained, path: Path) -> ModelConfig:
    """A directory to load the trained model from, with its base model's `trust_remote_code`."""
    return ModelConfig(name=str(path), trust_remote_code=trained.model.trust_remote_code)


def _require_base(trained: Trained, identity: dict[str, Any], is_same: bool = True) -> None:
    """Raise ValueError where the base model's weights are others than those of a checkpoint's identity, or its config
    is not the same."""
    kept = identity.get("base_weights")  # which older checkpoints lack
    if not is_same or (kept is not None and weights_fingerprint(Path(model_path(trained.model))) != kept):
        raise ValueError(f"{trained.path}: {trained.model.name!r} is not the base model of this training any more")


def _from_checkpoint(trained: Trained) -> Policy:
    tensors, meta = checkpoint.load(trained.path)
    model = trained.model
    same = base_identity(trained.given_model, load_model_config(model)) == meta["identity"]["base"]
    _require_base(trained, meta["identity"], same)
    dtype = DTYPES[meta["dtype"]] if "dtype" in meta else resolve_dtype(model.dtype)
    lora = None if trained.lora is None else replace(trained.lora, init_from=None)  # the checkpoint has the values
    policy = load_policy(model, lora, dtype, None, PolicyOptions(has_critic=meta["identity"]["critic"]))
    with torch.no_grad():
        for name, parameter in trainable(policy).items():
            parameter.copy_(tensors[f"weight/{name}"])
    return policy
