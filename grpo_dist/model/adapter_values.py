"""The values of the adapter that a run goes on from."""

from __future__ import annotations

import hashlib

import torch
from safetensors import SafetensorError
from torch import Tensor

from .adapter import require_shape
from .files import UnfitModel
from .peft import PeftModel, load_peft_weights


@torch.no_grad()
def load_adapter(model: PeftModel, place: str) -> None:
    """Give a new adapter the values of the one at `place`. Raises UnfitModel where they have other names or shapes."""
    values = _values(place)
    own = {name.replace(".default.", "."): p for name, p in model.named_parameters() if ".lora_" in name}
    for given, expected, lacks in ((values, own, "it lacks"), (own, values, "this model has no place for")):
        if missing := sorted(expected.keys() - given.keys()):
            raise UnfitModel(f"lora.init_from: {place!r} does not fit {type(model.get_base_model()).__name__}: {lacks} "
                             f"{len(missing)} weights ({', '.join(missing[:3])} …)")  # fmt: skip
    for name, parameter in own.items():
        require_shape(place, name, values[name].shape, parameter.shape)
        if not values[name].isfinite().all():
            raise UnfitModel(f"lora.init_from: {place!r} has values that are not finite in {name}, expected numbers: "
                             "name a sound adapter")  # fmt: skip
        parameter.copy_(values[name])


def fingerprint(place: str) -> str:
    """A hash of the values of the adapter at `place`. Raises UnfitModel where they cannot be read."""
    values, digest = _values(place), hashlib.sha256()
    for name in sorted(values):
        digest.update(name.encode() + values[name].float().numpy().tobytes())
    return digest.hexdigest()[:16]


def _values(place: str) -> dict[str, Tensor]:
    try:
        values: dict[str, Tensor] = load_peft_weights(place, device="cpu")
    except (OSError, ValueError, SafetensorError) as error:
        raise UnfitModel(f"lora.init_from: the weights of {place!r} cannot be read ({error})") from error
    return values
