"""The first update of a run is checked: what it computes of the sampled tokens has to be what drew them.

Before anything is learned, trainer and rollout are one model, and so are policy and reference. A model or a launch that
computes something else in the update (later tokens seen, dropout, another dtype) shows here, whatever its cause.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..config.schema import Config
from ..distributed.device import resolve_dtype
from ..model.files import UnfitModel

MOST_GAP = 1e-3
"""Nats that float32 may change a token's log-probability by; small models are at 1e-6, in attention or recurrent."""
MOST_KL = {torch.float32: 1e-6, torch.float16: 0.02, torch.bfloat16: 0.1}
"""Nats a token that rounding may make of the distance between equal policies: several times what tests saw."""


@dataclass
class FirstUpdate:
    """Which of a run's first numbers are known beforehand; checks them once."""

    dtype: torch.dtype
    """What the policy computes in, and so do rollouts."""
    reference_dtype: torch.dtype
    has_known_gap: bool
    """False where the policy has moved since the rollout, or drops some of the adapters' inputs."""
    has_known_kl: bool
    """False where adapters or weights have been trained, or nothing is compared with a reference."""

    def check(self, metrics: Mapping[str, float]) -> None:
        """Raise UnfitModel where the first update's metrics are not those of one and the same model."""
        rounded = self.dtype if self.reference_dtype == torch.float32 else self.reference_dtype
        limits = [
            ("rollout/logprob_gap_max", self.has_known_gap and self.dtype == torch.float32, MOST_GAP),
            ("rollout/kl", self.has_known_gap, MOST_KL[self.dtype]),
            ("kl", self.has_known_kl, MOST_KL[rounded]),
        ]
        self.has_known_gap = self.has_known_kl = False
        for name, is_known, most in limits:
            value = metrics.get(name, 0.0)
            if is_known and math.isfinite(value) and value > most:
                other = "the reference" if name == "kl" else "the rollout"
                raise UnfitModel(
                    f"the update does not compute what {other} computes: {name} is {value:.2g} nats before anything "
                    f"was learned, and {most:.0e} would be rounding. Suspects: the model's attention (try "
                    "--model.attn_implementation eager), dropout or noise in its code, a launch config that changes "
                    "dtypes. Nothing was saved"
                )


def first_update(
    config: Config, reference_dtype: torch.dtype | None, is_resumed: bool, updates_done: int
) -> FirstUpdate:
    """What is known of a process's first update, before which `updates_done` were made of the batch.

    `reference_dtype` is what the reference computes in, None where there is none.
    """
    dtype = resolve_dtype(config.model.dtype)
    drops = config.lora is not None and config.lora.dropout > 0
    goes_on = config.lora is not None and config.lora.init_from is not None
    is_new = not is_resumed and not (drops and goes_on)  # dropout changes nothing while adapters are untrained
    is_reference = not (goes_on and config.reference.model == "base")
    return FirstUpdate(
        dtype, reference_dtype or dtype,
        has_known_gap=is_new or not (drops or updates_done or config.rollout.lag),
        has_known_kl=is_new and is_reference and reference_dtype is not None
        and config.loss.kl_estimator != "squared_sequence",
    )  # fmt: skip
