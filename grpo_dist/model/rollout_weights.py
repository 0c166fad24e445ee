"""The model that draws completions: the policy's own weights in a second tree of modules.

The trained policy itself must draw the rollouts. Adapters merged into 16-bit weights would be another policy, because
most of a small update is less than half a unit of a weight's last digit. The tree therefore has adapters too, and its
tensors are the policy's. It copies weights only in three cases: if all weights train in float32 and compute in 16 bits,
if ZeRO-3 or FSDP2 has sharded them, and if they are quantised. A quantised base is dequantised while the model is open,
if the decoder does not compute with the codes: a step of decoding computes with few tokens, and the model's own modules
would dequantise as many weights for them as for an update.

The tree is in evaluation mode and has no hooks of DDP, ZeRO and FSDP2.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.deepspeed import unsharded_loading
from ..distributed.sharding import gathered, is_sharded
from .expert_adapters import compute_adapters_apart
from .load import plain_name
from .peft import ADAPTER, PeftModel, with_new_adapters
from .policy import Policy
from .products import float32_product
from .quantized import quantized_layers


class RolloutModel:
    """The model that the engine decodes with. `open` it for a rollout and `sync` it after each step."""

    def __init__(
        self, policy: Policy, dtype: torch.dtype, attn_implementation: str | None,
        base: nn.Module | None = None,
    ) -> None:  # fmt: skip
        """`dtype` is that of the policy's computation. If frozen weights are sharded, those of `base` replace them if
        they have that dtype; else each rollout gathers them. A collective if weights are sharded."""
        self.policy, self.dtype = policy, dtype
        with unsharded_loading(), torch.device("meta"):
            tree = policy.causal_lm._from_config(
                policy.causal_lm.config, attn_implementation=attn_implementation, dtype=dtype
            )
            for name, layer in quantized_layers(policy.causal_lm).items():
                tree.set_submodule(plain_name(f"{name}.weight").removesuffix(".weight"), layer.blank())
            if isinstance(policy.model, PeftModel):
                tree = with_new_adapters(tree, replace(policy.model.peft_config[ADAPTER], lora_dropout=0.0))
                compute_adapters_apart(tree)
        self.tree = tree.eval().requires_grad_(False)
        head = self.causal_lm.get_output_embeddings()
        if isinstance(head, nn.Linear):
            _keep_digits(head)
        self._list_places()
        names = [name for name, _ in policy.model.named_parameters(remove_duplicate=False)]
        self._theirs: dict[str, Any] = {name: policy.model.get_submodule(name.rpartition(".")[0]) for name in names}
        for name, buffer in policy.model.named_buffers():
            owner, _, leaf = name.rpartition(".")
            self.tree.get_submodule(owner)._buffers[leaf] = buffer
        of_base = [] if base is None else base.named_parameters(remove_duplicate=False)
        given = {plain_name(name): parameter for name, parameter in of_base}
        self._own: dict[str, Tensor] = {}
        self._frozen: set[int] | None = None  # where weights lie that are not trained, while the model is open
        for name, parameter in self._policy_parameters().items():
            same = given.get(plain_name(name))
            if not parameter.requires_grad and is_sharded(parameter) and same is not None and same.dtype == dtype:
                self._own[name] = same.data
        self._quantized = {f"{name}.weight": layer for name, layer in quantized_layers(policy.model).items()}
        self.sync()

    def _list_places(self) -> None:
        """Note where the parameters of the tree belong."""
        self._empty = dict(self.tree.named_parameters(remove_duplicate=False))
        self._owners = {name: self.tree.get_submodule(name.rpartition(".")[0]) for name in self._empty}

    def dequantize(self) -> None:
        """Dequantise a quantised base whenever the model is opened; to be called while it is not."""
        for name, layer in quantized_layers(self.tree).items():
            self.tree.set_submodule(name, layer.plain())
        self._list_places()

    @property
    def causal_lm(self) -> nn.Module:
        """The transformers model. It has weights only while this object is open."""
        return self.tree.get_base_model() if isinstance(self.tree, PeftModel) else self.tree

    @torch.no_grad()
    def sync(self) -> None:
        """Refill the copied weights from the policy, one at a time. A collective if weights are sharded."""
        if isinstance(self.policy.model, PeftModel):
            return
        theirs = {name: p for name, p in self._policy_parameters().items() if is_sharded(p) or p.dtype != self.dtype}
        copies: dict[Tensor, Tensor] = {}  # tied weights stay tied
        for name, parameter in theirs.items():
            if parameter not in copies:
                with gathered([parameter]):
                    full, own = self.policy.model.get_parameter(name), self._own.get(name)
                    own = torch.empty_like(full, dtype=self.dtype, requires_grad=False) if own is None else own
                    copies[parameter] = own.copy_(full)
            self._own[name] = copies[parameter]

    @contextmanager
    def open(self) -> Iterator[nn.Module]:
        """A context in which the model computes as the policy did at the last `sync`. A collective if weights are
        sharded."""
        needed = _different(p for name, p in self._policy_parameters().items() if name not in self._own)
        with torch.no_grad(), gathered(needed):
            theirs = self._policy_parameters()  # anew: FSDP2 puts others in their places
            for name in self._empty:
                if (value := self._own.get(name)) is None:
                    layer = self._quantized.get(name)
                    value = theirs[name].data if layer is None else layer.weight
                self._put(name, nn.Parameter(value, requires_grad=False))
            self._frozen = None
            try:
                yield self.causal_lm
            finally:
                for name, empty in self._empty.items():
                    self._put(name, empty)

    def is_frozen(self, weight: Tensor) -> bool:
        """Whether a weight of the open model, or a part of one, is the policy's own and is not trained."""
        if self._frozen is None:
            whole = [each for each in self._policy_parameters().values() if not is_sharded(each)]
            frozen, trained = ({each.untyped_storage().data_ptr() for each in whole if each.requires_grad is trains}
                               for trains in (False, True))  # fmt: skip
            self._frozen = frozen - trained
        return weight.untyped_storage().data_ptr() in self._frozen

    def _policy_parameters(self) -> dict[str, nn.Parameter]:
        """The policy's parameters by the names of the tree. Tied weights have two names in both trees."""
        # to look for them in all modules takes as long as a decoding step
        return {name: owner._parameters[name.rpartition(".")[2]] for name, owner in self._theirs.items()}

    def _put(self, name: str, parameter: nn.Parameter) -> None:
        self._owners[name]._parameters[name.rpartition(".")[2]] = parameter


def _keep_digits(head: nn.Linear) -> None:
    """Let the head return float32 on a GPU, as the policy scores tokens: rounded to 16 bits, a logit of 20 is off by up
    to 0.06."""
    plain = head.forward

    def forward(hidden: Tensor) -> Tensor:
        if not hidden.is_cuda or hidden.dtype == torch.float32:
            return plain(hidden)
        logits = float32_product(hidden.flatten(0, -2), head.weight.T)
        return (logits if head.bias is None else logits.add_(head.bias)).unflatten(0, hidden.shape[:-1])

    head.forward = forward  # type: ignore[method-assign, assignment]


def _different(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Each tensor once."""
    return list(dict.fromkeys(tensors))
