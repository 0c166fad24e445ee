"""A run's trained model, loaded from the disk without ranks, for `export` and `chat`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from ..config.places import is_path
from ..config.schema import LoraConfig, ModelConfig
from ..distributed.device import DTYPES, resolve_dtype
from ..model.expert_adapters import compute_adapters_apart
from ..model.files import model_path
from ..model.load import base_identity, load_causal_lm, load_model_config, load_policy, load_tokenizer, trainable
from ..model.peft import with_saved_adapters
from ..model.policy import Policy
from ..model.stored_weights import weights_fingerprint
from ..model.toy import MODELS
from ..monitoring.machine import last_recorded, started_in
from ..monitoring.metrics import read_history
from . import store as checkpoint


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
        return ModelConfig(**self.config["model"])

    @property
    def lora(self) -> LoraConfig | None:
        """The adapters; None after full fine-tuning."""
        return LoraConfig(**self.config["lora"]) if self.config["lora"] else None


def find(path: Path) -> Trained:
    """The final model of a run, or its newest checkpoint where it has not ended; `path` may also name either itself.

    Raises ValueError where there is neither, and where the checkpoint is damaged.
    """
    if (path / checkpoint.MANIFEST).is_file():
        try:
            checkpoint.verify(path)
        except checkpoint.DamagedCheckpoint as error:
            raise ValueError(str(error)) from error
        meta = checkpoint.load_meta(path)
        return Trained(path, path.resolve().parents[1], meta["step"], meta["config"], True)
    run = path.resolve().parent if path.name == "final" else path
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{path}: expected the directory of a run (train.output_dir, with its config.yaml), its "
                         "`final`, or one of its checkpoints/step_N")  # fmt: skip
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    done = max((entry["step"] for entry in read_history(run)), default=0)
    final = run / "final"
    if (final / "config.json").is_file() and (run != path or done >= config["train"]["num_train_steps"]):
        return Trained(final, run, done, config, False)
    newest = checkpoint.newest(run / "checkpoints")
    if newest is None:
        raise ValueError(f"{run}: there is no complete checkpoint, and no `final` of a run that has ended")
    return find(newest)


def load(trained: Trained) -> tuple[Policy, Any]:
    """The trained policy on the CPU, in its dtype of training, and its tokenizer.

    Raises ValueError where the base model is another than the one of training, OSError where it is missing.
    """
    model, lora, tokenizer = trained.model, trained.lora, load_tokenizer(trained.model)
    if trained.is_checkpoint:
        return _from_checkpoint(trained).eval(), tokenizer
    here = at(trained, trained.path)
    stored = load_model_config(here).dtype
    if lora is None:
        return Policy(load_causal_lm(here, stored, None), 1.0).eval(), tokenizer
    for newest in checkpoint.complete(trained.run / "checkpoints")[:1]:
        _require_base(trained, checkpoint.load_meta(newest, {"identity": dict})["identity"])
    # merged weights may be in a larger dtype than the base that the adapters were trained on
    trained_in = last_recorded(trained.run, "dtype")
    base = load_causal_lm(model, stored if trained_in is None else DTYPES[trained_in], None)
    adapted = with_saved_adapters(base, str(trained.path / "adapter"))
    compute_adapters_apart(adapted)
    return Policy(adapted, 1.0).eval(), tokenizer


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
    policy = load_policy(model, lora, dtype, None, 1.0, 0, has_critic=meta["identity"]["critic"])
    with torch.no_grad():
        for name, parameter in trainable(policy).items():
            parameter.copy_(tensors[f"weight/{name}"])
    return policy
