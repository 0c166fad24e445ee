"""The model that draws completions: the policy's own weights in a second tree of modules.

A rollout is to be drawn by the very policy that is trained. Adapters merged into 16-bit weights are another one: most
of a small update is less than half of a weight's last digit. So the tree has adapters as the policy has them, and its
tensors are the policy's. Weights are held a second time only where those cannot be used as they are: where all weights
are trained in float32 and computed with in 16 bits, and where ZeRO-3 has partitioned them.

The tree is in evaluation mode, free of the hooks with which DDP and ZeRO follow the policy's modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from ..distributed.deepspeed import gathered, is_sharded, unsharded_loading
from .load import plain_name
from .lora import fuse_adapters
from .policy import Policy


class RolloutModel:
    """What the engine decodes with; `open` it for a rollout, `sync` it after each step."""

    def __init__(
        self, policy: Policy, dtype: torch.dtype, attn_implementation: str | None,
        base: nn.Module | None = None,
    ) -> None:  # fmt: skip
        """`dtype` is what the policy computes in. Where ZeRO-3 has partitioned frozen weights, those of `base` take
        their place if they have that dtype; else they are gathered for each rollout. A collective under ZeRO-3."""
        self.policy, self.dtype = policy, dtype
        with unsharded_loading(), torch.device("meta"):
            tree = policy.causal_lm._from_config(
                policy.causal_lm.config, attn_implementation=attn_implementation, dtype=dtype
            )
            if isinstance(policy.model, PeftModel):
                tree = get_peft_model(tree, replace(policy.model.peft_config["default"], lora_dropout=0.0))
                fuse_adapters(tree, is_sharded)
        self.tree = tree.eval().requires_grad_(False)
        for name, buffer in policy.model.named_buffers():
            owner, _, leaf = name.rpartition(".")
            self.tree.get_submodule(owner)._buffers[leaf] = buffer
        given = {} if base is None else dict(base.named_parameters(remove_duplicate=False))
        self._own: dict[str, Tensor] = {}
        for name, parameter in self._policy_parameters().items():
            same = given.get(plain_name(name))
            if not parameter.requires_grad and is_sharded(parameter) and same is not None and same.dtype == dtype:
                self._own[name] = same.data
        self.sync()

    @property
    def causal_lm(self) -> nn.Module:
        """The transformers model; it has weights only while this is open."""
        return self.tree.get_base_model() if isinstance(self.tree, PeftModel) else self.tree

    @torch.no_grad()
    def sync(self) -> None:
        """Refill what is held a second time from the policy; a collective under ZeRO-3."""
        if isinstance(self.policy.model, PeftModel):
            return
        theirs = {name: p for name, p in self._policy_parameters().items() if is_sharded(p) or p.dtype != self.dtype}
        with gathered(_different(theirs.values())):
            held: dict[Tensor, Tensor] = {}  # tied weights stay tied
            for name, parameter in theirs.items():
                if parameter not in held:
                    own = self._own.get(name)
                    own = torch.empty_like(parameter, dtype=self.dtype, requires_grad=False) if own is None else own
                    held[parameter] = own.copy_(parameter)
                self._own[name] = held[parameter]

    @contextmanager
    def open(self) -> Iterator[nn.Module]:
        """Inside, the model computes as the policy did at the last `sync`; a collective under ZeRO-3."""
        theirs = self._policy_parameters()
        with torch.no_grad(), gathered(_different(p for name, p in theirs.items() if name not in self._own)):
            mine = dict(self.tree.named_parameters(remove_duplicate=False))
            for name in mine:
                self._put(name, nn.Parameter(self._own.get(name, theirs[name].data), requires_grad=False))
            try:
                yield self.causal_lm
            finally:
                for name, empty in mine.items():
                    self._put(name, empty)

    def _policy_parameters(self) -> dict[str, nn.Parameter]:
        """The policy's parameters by the tree's names; tied weights have two, in both trees."""
        return dict(self.policy.model.named_parameters(remove_duplicate=False))

    def _put(self, name: str, parameter: nn.Parameter) -> None:
        owner, _, leaf = name.rpartition(".")
        self.tree.get_submodule(owner)._parameters[leaf] = parameter


def _different(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Each tensor once."""
    return list(dict.fromkeys(tensors))
