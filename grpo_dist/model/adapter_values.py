"""The values of the adapter that a run goes on from."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from ..algorithm.targets import has_reference
from ..config.schema import Config
from .files import UnfitModel
from .peft import PeftModel, load_peft_weights


def require_own_values(config: Config, shards_weights: bool) -> None:
    """Raise UnfitModel where the reference would need the adapter's first values in sharded weights."""
    shares = config.reference.placement == "shared" and config.reference.model == "adapter" and has_reference(config)
    if shards_weights and shares and config.lora is not None and config.lora.init_from is not None:
        raise UnfitModel("reference.placement: 'shared' given, expected `copy` under ZeRO-3 and FSDP2, where the "
                         "reference is the adapter that the run goes on from, or reference.model: base")  # fmt: skip


@torch.no_grad()
def load_adapter(model: PeftModel, place: str) -> None:
    """Give a new adapter the values of the one at `place`. Raises UnfitModel where they have other names or shapes."""
    try:
        values: dict[str, Tensor] = load_peft_weights(place, device="cpu")
    except (OSError, ValueError) as error:
        raise UnfitModel(f"lora.init_from: the weights of {place!r} cannot be read ({error})") from error
    own = {name.replace(".default.", "."): p for name, p in model.named_parameters() if ".lora_" in name}
    for given, expected, lacks in ((values, own, "it lacks"), (own, values, "this model has no place for")):
        if missing := sorted(expected.keys() - given.keys()):
            raise UnfitModel(f"lora.init_from: {place!r} does not fit {type(model.get_base_model()).__name__}: {lacks} "
                             f"{len(missing)} weights ({', '.join(missing[:3])} …)")  # fmt: skip
    for name, parameter in own.items():
        if values[name].shape != parameter.shape:
            raise UnfitModel(f"lora.init_from: {place!r} has {name} of the shape {list(values[name].shape)}, expected "
                             f"{list(parameter.shape)}: it belongs to another base model")  # fmt: skip
        parameter.copy_(values[name])


def fingerprint(place: str) -> str:
    """A hash of the values of the adapter at `place`."""
    values, digest = load_peft_weights(place, device="cpu"), hashlib.sha256()
    for name in sorted(values):
        digest.update(name.encode() + values[name].float().numpy().tobytes())
    return digest.hexdigest()[:16]
