"""The trained module: a causal language model, optionally with a critic, that takes packs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ..config.checks import require
from ..config.schema import Config
from .critic import ValueHead
from .decoder_layers import fuse_decoder_layers
from .dropout import TokenKeys
from .fused_modules import fuse_gates, fuse_linears, fuse_norms, fuse_rotations
from .logprobs import head_logprobs, logits_logprobs
from .packing import Pack
from .peft import LoraLayer, PeftModel
from .routing import routers_of


@dataclass(frozen=True)
class PolicyOptions:
    """What a policy computes with its model, and for what."""

    temperature: float = 1.0
    """Of the distribution that the log-probabilities and entropies are of."""
    has_critic: bool = False
    entropy_gradient: bool = False
    """Whether the loss has a gradient through the entropies."""
    fuses_layers: bool = False
    """Whether decoder layers are computed as one operation where they can be (`decoder_layers.py`), which rounds
    differently: policy and reference do the same, as the KL term is 0 before anything is learned."""

    @classmethod
    def of(cls, config: Config) -> PolicyOptions:
        """Those of the policy that a run trains."""
        fuses_layers = config.lora is not None and config.lora.dropout == 0  # what the operation knows
        return cls(config.rollout.temperature, config.has_critic, config.loss.entropy_coeff > 0, fuses_layers)


PLAIN = PolicyOptions()
"""Of a policy that is not trained."""


class Policy(nn.Module):
    """A causal language model that returns the log-probabilities of packs."""

    def __init__(self, model: nn.Module, options: PolicyOptions = PLAIN, token_keys: TokenKeys | None = None) -> None:
        super().__init__()
        self.model = model
        self.options = options
        self.token_keys = token_keys  # for adapters with dropout
        self.value_head = ValueHead(self.causal_lm.config.get_text_config().hidden_size) if options.has_critic else None
        fuse_norms(self.causal_lm)
        fuse_gates(self.causal_lm)
        fuse_rotations(self.causal_lm)
        fuse_linears(self.causal_lm)
        if options.fuses_layers:
            fuse_decoder_layers(self.causal_lm)
        head = self.causal_lm.get_output_embeddings()
        self.fused_head = False  # until probe.head_is_plain shows that the model changes no logits after the head
        if isinstance(head, nn.Linear):
            _teach_head(head)

    @property
    def causal_lm(self) -> nn.Module:
        """The transformers model; with LoRA, the one with the adapters inside."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def train(self, mode: bool = True) -> Policy:
        """Put the adapters and the critic into training mode. The base always computes as in a rollout.

        Dropout, layer drop, router noise and batch statistics have many names in models, but all depend on the mode of
        their module.
        """
        super().train(mode)
        for name, module in self.causal_lm.named_modules():
            if not (isinstance(module, LoraLayer) or ".lora_" in name):
                module.training = False
        return self

    def forward(self, pack: Pack, dropout_key: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probability of each completion token, entropy of its distribution (nats), and the critic's value of the
        text before it (None without a critic); all (M,) float32. `dropout_key` makes the dropout of updates differ."""
        if self.token_keys is not None:
            self.token_keys.draw(dropout_key, pack.owner, pack.positions)
        if (routers := routers_of(self.causal_lm)) is not None:
            routers.given = pack.routes  # also for layers that are recomputed in the backward pass
        inputs: dict[str, Any] = {"input_ids": pack.ids[None], "use_cache": False}
        if pack.layout is not None:
            inputs |= {"position_ids": pack.positions[None], "layout": pack.layout}
        numbers: dict[str, Any] = {"targets": pack.targets, "temperature": self.options.temperature,
                                   "entropy_gradient": self.options.entropy_gradient}  # fmt: skip
        hidden: Tensor | None
        if self.fused_head:
            hidden = rows_at(self.causal_lm.base_model(**inputs).last_hidden_state[0], pack.predictor)
            logprobs, entropies = self.causal_lm.get_output_embeddings()(hidden, **numbers)
        else:
            needs_hidden = self.value_head is not None
            kept, place = distinct(pack.predictor)
            output = self.causal_lm(**inputs, logits_to_keep=kept, output_hidden_states=needs_hidden)
            logits = rows_at(kept_logits(output.logits[0], kept), place)
            logprobs, entropies = logits_logprobs(logits, **numbers)
            hidden = rows_at(output.hidden_states[-1][0], pack.predictor) if needs_hidden else None
        return logprobs, entropies, None if self.value_head is None else self.value_head(hidden)

    def router_agreement(self, pack: Pack) -> dict[str, Tensor]:
        """The metric of routers after the forward pass of `pack`, (M,); nothing where no routes are replayed."""
        routers = routers_of(self.causal_lm)
        if routers is None or pack.routes is None:
            return {}
        return {"rollout/router_agreement": routers.agreement(pack.predictor)}


def kept_logits(logits: Tensor, places: Tensor) -> Tensor:
    """The logits (M, V) at `places` (M,). A model returns only these, or those of all T tokens."""
    return logits if len(logits) == len(places) else logits[places]


def rows_at(x: Tensor, places: Tensor) -> Tensor:
    """The rows (M, …) of `x` (T, …) at `places` (M,). Several may be the same: the last token of a prompt predicts the
    first one of each of its completions. The gradient of such a row is summed in one order, whatever the threads do."""
    # an index sums in any order on a CPU, `index_select` on a GPU
    return x[places] if x.is_cuda else x.index_select(0, places)


def distinct(places: Tensor) -> tuple[Tensor, Tensor]:
    """Places (U,) of which none is twice, and where each of `places` (M,) is among them. On a GPU, where an index may
    have the same place twice and this would wait for the device, they are `places` and their numbers."""
    if places.is_cuda:
        return places, torch.arange(len(places), device=places.device)
    return torch.unique(places, return_inverse=True)


def recompute_layers(model: nn.Module) -> None:
    """Recompute each layer's activations in the backward pass.

    transformers would do that only in training mode, in which a layer may drop activations, and its releases differ
    in what they do without gradients. Raises ValueError if the model has no layers that transformers can recompute.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    require(bool(layers), "model.gradient_checkpointing", True, f"false, as {type(model).__name__} has no layers that "
            "transformers can recompute")  # fmt: skip
    for layer in layers:
        layer.forward = partial(_recomputed, layer.forward)


def _recomputed(forward: Any, *inputs: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    return checkpoint(forward, *inputs, use_reentrant=False, **options)


def _teach_head(head: nn.Linear) -> None:
    """Let the head return log-probabilities and entropies if it gets targets.

    This must happen inside the call of the head, because ZeRO-3 and FSDP2 gather its weight there.
    """
    plain = head.forward

    def forward(hidden: Tensor, targets: Tensor | None = None, **options: Any) -> Any:
        return plain(hidden) if targets is None else head_logprobs(hidden, head.weight, head.bias, targets, **options)

    head.forward = forward  # type: ignore[method-assign, assignment]
