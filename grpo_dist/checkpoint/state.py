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
    """Steps done, the updates of the current step, and batches that have been drawn."""

    step: int
    """Steps that are done."""
    kl_coeff: float
    """Weight of the KL penalty; it changes from step to step where loss.kl_target is set."""
    sampler: Sampler | Mixture | Curriculum
    """It chooses the next prompts."""
    updates: int = 0
    """Optimizer steps of the current step."""
    metrics: list[dict[str, float]] = field(default_factory=list)
    """Metrics of each of those optimizer steps."""
    batch: Batch | None = None
    """The batch of the current step, once it cannot be drawn again: an optimizer step has used it, or it was drawn
    ahead."""
    ahead: Batch | None = None
    """The batch of the next step, where rollout.lag is 1 and it is drawn."""
    begun_anew: bool = False
    """Whether the current step forgot the batch of which it had made updates."""

    @property
    def is_start(self) -> bool:
        """Whether no optimizer step was taken yet."""
        return self.step == self.updates == 0 and not self.begun_anew

    def after_update(self, batch: Batch, metrics: dict[str, float]) -> None:
        """Record one more optimizer step on the batch."""
        self.updates, self.batch = self.updates + 1, batch
        self.metrics.append(metrics)

    def after_step(self, kl_coeff: float, pass_rates: Sequence[float]) -> None:
        """Record that the current step is done; `pass_rates` (P,) are those of its prompts, for a curriculum."""
        self.sampler.record(pass_rates)
        self.step, self.kl_coeff, self.updates, self.metrics = self.step + 1, kl_coeff, 0, []
        self.batch, self.ahead = self.ahead, None

    def begin_step_anew(self) -> None:
        """Forget the batches: the current step draws its own, and makes all of its updates."""
        self.begun_anew = self.updates > 0
        self.updates, self.metrics, self.batch, self.ahead = 0, [], None, None

    def meta(self) -> dict[str, Any]:
        """The part that is saved as JSON; the step is in the checkpoint's name."""
        return {
            "updates": self.updates, "kl_coeff": self.kl_coeff, "metrics": self.metrics,
            "sampler": self.sampler.state(),
            "logged": _logged(self.batch), "ahead": _logged(self.ahead),
        }  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        """The part that is saved as tensors: those of the batches."""
        return _tensors(self.batch, "batch") | _tensors(self.ahead, "ahead")

    def restore(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], prompts: Sequence[Prompt]) -> None:
        """Restore what `tensors` and `meta` returned; `meta` has the step too, and `prompts` is the data set."""
        self.sampler.restore(meta["sampler"])
        self.step, self.kl_coeff = meta["step"], meta["kl_coeff"]
        self.updates, self.metrics = meta["updates"], meta["metrics"]
        tensors, logged = _of_today(tensors, meta, prompts)
        self.batch = _batch(tensors, "batch", logged)
        self.ahead = _batch(tensors, "ahead", meta.get("ahead", {}))


def _logged(batch: Batch | None) -> dict[str, Any]:
    """The part of a batch that is saved as JSON."""
    if batch is None:
        return {}
    return {name: getattr(batch, name) for name in LOGGED} | {"texts": [prompt.text for prompt in batch.prompts]}


def _tensors(batch: Batch | None, name: str) -> dict[str, Tensor]:
    """The other part. What the old policy computed is in the current step's batch alone."""
    if batch is None:
        return {}
    values = {f"{name}/{each}": getattr(batch, each) for each in TENSORS}
    if batch.old is not None:
        values |= {f"measured/{each}": getattr(batch.old, each) for each in OLD_TENSORS}
    # clones: some are columns of one gathered table, and safetensors refuses shared memory
    saved = {key: value.clone() for key, value in values.items() if value is not None}
    return saved | {f"{name}/{each}": tensor for each, tensor in _prompt_tensors(batch.prompts).items()}


def _prompt_tensors(prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    return {
        "prompts": torch.tensor([prompt.index for prompt in prompts]),
        "prompt_lengths": torch.tensor([len(prompt.ids) for prompt in prompts]),
        "prompt_ids": torch.tensor([token for prompt in prompts for token in prompt.ids]),
    }


def _batch(tensors: Mapping[str, Tensor], name: str, logged: Mapping[str, Any]) -> Batch | None:
    """The saved batch of a name, None where there is none.

    Its prompts have the ids with which completions were drawn; their messages and columns have had their use.
    """
    if f"{name}/prompts" not in tensors:
        return None
    ids = torch.split(tensors[f"{name}/prompt_ids"], tensors[f"{name}/prompt_lengths"].tolist())
    prompts = [Prompt(index, part.tolist(), text) for index, part, text
               in zip(tensors[f"{name}/prompts"].tolist(), ids, logged["texts"], strict=True)]  # fmt: skip
    values: dict[str, Any] = {each: tensors[f"{name}/{each}"] for each in TENSORS if f"{name}/{each}" in tensors}
    old = {each: tensors[f"measured/{each}"] for each in OLD_TENSORS if f"measured/{each}" in tensors}
    return Batch(prompts, **values, **{each: logged[each] for each in LOGGED},
                 old=OldPolicy(**old) if old and name == "batch" else None)  # fmt: skip


def _of_today(
    tensors: Mapping[str, Tensor], meta: Mapping[str, Any], prompts: Sequence[Prompt]
) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
    """The current batch's tensors and JSON of a checkpoint, also of one from before there were the keys of today."""
    logged = meta["logged"]
    if "batch/prompts" not in tensors or "batch/prompt_ids" in tensors:
        return tensors, logged
    by_index = {prompt.index: prompt for prompt in prompts}
    chosen = [by_index[index] for index in tensors["batch/prompts"].tolist()]
    added = {f"batch/{each}": tensor for each, tensor in _prompt_tensors(chosen).items()}
    if "batch/tokens" in tensors:  # all tokens are sampled
        ids, lengths = tensors["batch/tokens"], tensors["batch/lengths"]
        added |= {"batch/ids": ids, "batch/row_lengths": lengths, "batch/sampled": torch.ones_like(ids).bool()}
    scoring = meta.get("facts", {}) | logged["scoring"]
    return {**tensors, **added}, {**logged, "scoring": scoring, "texts": [prompt.text for prompt in chosen]}
