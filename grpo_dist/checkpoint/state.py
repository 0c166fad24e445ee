"""Where in a run the weights stand, and what of the step under way a checkpoint has to hold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from ..types import Batch, Measured, Prompt

LOGGED = ("scoring", "extras")
"""Fields of a batch that are saved as JSON."""
NOT_TENSORS = ("prompts", *LOGGED)


@dataclass
class Position:
    """Whole steps, and updates within the step under way."""

    step: int
    """Whole steps done."""
    kl_coeff: float
    """Weight of the KL penalty; changes from step to step where loss.kl_target is set."""
    updates: int = 0
    """Optimizer steps taken within the step under way."""
    batch: Batch | None = None
    """That step's batch, once it has been used."""
    measured: Measured | None = None
    """What its updates are measured against, where it had to be computed."""
    facts: dict[str, float] = field(default_factory=dict)
    """Metrics of how the batch was sampled."""
    metrics: list[dict[str, float]] = field(default_factory=list)
    """What its updates measured."""

    @property
    def is_start(self) -> bool:
        """Whether nothing has been learned yet."""
        return self.step == self.updates == 0

    def add(self, batch: Batch, measured: Measured | None, facts: dict[str, float], metrics: dict[str, float]) -> None:
        """One more optimizer step was taken on the batch."""
        self.updates, self.batch, self.measured, self.facts = self.updates + 1, batch, measured, facts
        self.metrics.append(metrics)

    def meta(self) -> dict[str, Any]:
        """What of the position has to be saved as JSON."""
        return {"updates": self.updates, "kl_coeff": self.kl_coeff, "facts": self.facts, "metrics": self.metrics,
                "logged": {name: getattr(self.batch, name) for name in LOGGED} if self.batch else {}}  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        """What of the position has to be saved as tensors."""
        if self.batch is None:
            return {}
        held = {"batch/prompts": torch.tensor([prompt.index for prompt in self.batch.prompts])}
        for prefix, thing in (("batch", self.batch), ("measured", self.measured)):
            if thing is not None:
                names = [each.name for each in fields(thing) if each.name not in NOT_TENSORS]
                values = {f"{prefix}/{name}": getattr(thing, name) for name in names}
                # cloned: some are columns of one gathered table, and safetensors refuses memory that is shared
                held |= {name: value.clone() for name, value in values.items() if value is not None}
        return held

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], meta: dict[str, Any], prompts: Iterable[Prompt]) -> Position:
        """The position that `tensors` and `meta`, which also holds `step`, were taken of; `prompts` is the data set."""
        position = cls(meta["step"], meta["kl_coeff"], meta["updates"], facts=meta["facts"], metrics=meta["metrics"])
        if position.updates:
            held = {name: value for name, value in tensors.items() if name.startswith(("batch/", "measured/"))}
            by_index = {prompt.index: prompt for prompt in prompts}
            chosen = [by_index[index] for index in held.pop("batch/prompts").tolist()]
            parts: dict[str, dict[str, Any]] = {"batch": {}, "measured": {}}
            for name, value in held.items():
                prefix, _, leaf = name.partition("/")
                parts[prefix][leaf] = value
            position.batch = Batch(chosen, **parts["batch"], **meta["logged"])
            position.measured = Measured(**parts["measured"]) if parts["measured"] else None
        return position
