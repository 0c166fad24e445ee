"""TrainState: the progress of a run, which a checkpoint contains beside weights and optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from ..data.order import Curriculum, Mixture, Sampler
from ..types import Batch, OldPolicy, Prompt

NEEDED = {"step": int, "updates": int, "kl_coeff": (int, float), "metrics": list, "logged": dict, "sampler": dict}
"""What `TrainState.restore` reads of a checkpoint's metadata, with its types."""

LOGGED = ("scoring", "extras")
"""Fields of a batch that are saved as JSON."""
NOT_SAVED = ("prompts", "episodes", "old", "advantages", "returns")
"""Fields that are saved in another form, are computed again, or have no use after the scoring."""
TENSORS = [each.name for each in fields(Batch) if each.name not in (*NOT_SAVED, *LOGGED)]
OLD_TENSORS = [each.name for each in fields(OldPolicy)]


@dataclass
class TrainState:
    """Steps done, and the updates of the current step."""

    step: int
    """Steps that are done."""
    kl_coeff: float
    """Weight of the KL penalty; it changes from step to step where loss.kl_target is set."""
    sampler: Sampler | Mixture | Curriculum
    """It chooses the next prompts."""
    updates: int = 0
    """Optimizer steps of the current step."""
    batch: Batch | None = None
    """The batch of the current step, once an optimizer step has used it."""
    metrics: list[dict[str, float]] = field(default_factory=list)
    """Metrics of each of those optimizer steps."""

    @property
    def is_start(self) -> bool:
        """Whether no optimizer step was taken yet."""
        return self.step == self.updates == 0

    def after_update(self, batch: Batch, metrics: dict[str, float]) -> None:
        """Record one more optimizer step on the batch."""
        self.updates, self.batch = self.updates + 1, batch
        self.metrics.append(metrics)

    def after_step(self, kl_coeff: float, pass_rates: Sequence[float]) -> None:
        """Record that the current step is done; `pass_rates` (P,) are those of its prompts, for a curriculum."""
        self.sampler.record(pass_rates)
        self.step, self.kl_coeff, self.updates, self.batch, self.metrics = self.step + 1, kl_coeff, 0, None, []

    def meta(self) -> dict[str, Any]:
        """The part that is saved as JSON; the step is in the checkpoint's name."""
        return {
            "updates": self.updates, "kl_coeff": self.kl_coeff, "metrics": self.metrics,
            "sampler": self.sampler.state(),
            "logged": {name: getattr(self.batch, name) for name in LOGGED} if self.batch else {},
        }  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        """The part that is saved as tensors: those of the current batch, if there is one."""
        if self.batch is None:
            return {}
        values = {f"batch/{name}": getattr(self.batch, name) for name in TENSORS}
        if self.batch.old is not None:
            values |= {f"measured/{name}": getattr(self.batch.old, name) for name in OLD_TENSORS}
        # clones: some are columns of one gathered table, and safetensors refuses shared memory
        saved = {name: value.clone() for name, value in values.items() if value is not None}
        return saved | {"batch/prompts": torch.tensor([prompt.index for prompt in self.batch.prompts])}

    def restore(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], prompts: Sequence[Prompt]) -> None:
        """Restore what `tensors` and `meta` returned; `meta` has the step too, and `prompts` is the data set."""
        self.sampler.restore(meta["sampler"])
        self.step, self.kl_coeff = meta["step"], meta["kl_coeff"]
        self.updates, self.metrics, self.batch = meta["updates"], meta["metrics"], None
        if self.updates:
            by_index = {prompt.index: prompt for prompt in prompts}
            chosen = [by_index[index] for index in tensors["batch/prompts"].tolist()]
            old = {name: tensors[f"measured/{name}"] for name in OLD_TENSORS if f"measured/{name}" in tensors}
            values: dict[str, Any] = {name: tensors[f"batch/{name}"] for name in TENSORS if f"batch/{name}" in tensors}
            if "batch/tokens" in tensors:  # older checkpoints: all tokens are sampled
                ids, lengths = tensors["batch/tokens"], tensors["batch/lengths"]
                values |= {"ids": ids, "row_lengths": lengths, "sampled": torch.ones_like(ids, dtype=torch.bool)}
            logged = dict(meta["logged"])
            # older checkpoints have a part of it under the name `facts`
            logged["scoring"] = meta.get("facts", {}) | logged["scoring"]
            self.batch = Batch(chosen, **values, **logged, old=OldPolicy(**old) if old else None)
