"""The optimizer's state as full tensors by name: the same under one process, DDP, every ZeRO stage and FSDP2.

A checkpoint can therefore be resumed with another number of ranks or another strategy. ZeRO and FSDP2 give each rank a
slice of a parameter; this module knows which slice is where.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from .ranks import Ranks
from .sharding import full_shape

MOMENTS = ("exp_avg", "exp_avg_sq")


NOT_NEEDED = "value_head."
"""The beginning of names of weights that a run without a critic does without."""


def require_same_weights(state: Mapping[str, Tensor], parameters: Collection[str]) -> None:
    """Raise ValueError where the weights of a state are not those of the parameters, by their names."""
    saved = {key.removeprefix("weight/") for key in state if key.startswith("weight/")}
    lost = sorted(name for name in saved.difference(parameters) if not name.startswith(NOT_NEEDED))
    if missing := sorted({*parameters} - saved):
        raise ValueError(f"it lacks {len(missing)} weights that this run trains, such as {missing[0]}")
    if lost:
        raise ValueError(f"it has {len(lost)} trained weights that this run does not train, such as {lost[0]}")


class OptimizerState:
    """Weights and Adam moments as full tensors, whatever the wrapper and however it splits them.

    They do not depend on the number of ranks or the strategy, and can be loaded under any other.
    """

    def __init__(self, ranks: Ranks, optimizer: Any, parameters: dict[str, torch.nn.Parameter]) -> None:
        self.ranks, self.strategy, self.optimizer = ranks, ranks.strategy, optimizer
        self.parameters = parameters
        self.adam = self.strategy.adam(optimizer)

    def _full(self, parameter: Any, key: str | None) -> Tensor:
        shape = full_shape(parameter)
        flat = torch.zeros(shape.numel(), dtype=torch.float32)
        fragment = self.strategy.fragment(self.optimizer, parameter)
        if fragment is not None and (key is None or key in self.adam.state[fragment.flat]):
            tensor = fragment.flat if key is None else self.adam.state[fragment.flat][key]
            flat[fragment.place] = fragment.of(tensor).float().cpu()
        return (self.ranks.reduce(flat, "sum") if self.strategy.sums_fragments else flat).view(shape)

    @torch.no_grad()
    def collect(self) -> dict[str, Tensor]:
        """Full float32 tensors on the CPU: each parameter as `weight/NAME`, its moments as `exp_avg/NAME` and
        `exp_avg_sq/NAME`, and `adam_steps`. Ranks other than the main one return `adam_steps` alone. A collective."""
        steps = [int(state["step"]) for state in self.adam.state.values() if "step" in state]
        state = {"adam_steps": torch.tensor(max(self.ranks.gather_objects(max(steps, default=0))))}
        if not (self.ranks.is_main or self.strategy.sums_fragments):
            return state  # nobody asks for what this rank has
        for name, parameter in self.parameters.items():
            for kind, key in (("weight", None), *((moment, moment) for moment in MOMENTS)):
                tensor = self._full(parameter, key)
                if self.ranks.is_main:  # the others only take part in the sum
                    state[f"{kind}/{name}"] = tensor
        return state

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        """Restore what `collect` returned, the same on every rank. Raises ValueError for tensors of other shapes or
        names."""
        require_same_weights(state, self.parameters)
        for name, parameter in self.parameters.items():
            shape = full_shape(parameter)
            for kind in ("weight", *MOMENTS):
                if state[f"{kind}/{name}"].shape != shape:
                    raise ValueError(f"{kind}/{name} has shape {list(state[f'{kind}/{name}'].shape)}, expected "
                                     f"{list(shape)}")  # fmt: skip
            fragment = self.strategy.fragment(self.optimizer, parameter)
            if fragment is not None:
                flat = fragment.flat
                fragment.of(flat).copy_(state[f"weight/{name}"].view(-1)[fragment.place])
                adam = self.adam.state[flat]
                where = flat.device if self.adam.param_groups[0].get("fused") else "cpu"
                adam.setdefault("step", torch.zeros((), device=where)).fill_(float(state["adam_steps"]))
                for moment in MOMENTS:
                    adam.setdefault(moment, torch.zeros_like(flat, memory_format=torch.preserve_format))
                    fragment.of(adam[moment]).copy_(state[f"{moment}/{name}"].view(-1)[fragment.place])
            self.strategy.after_restore(parameter, state[f"weight/{name}"])


class WholeOptimizerState:
    """Weights and everything that an optimizer keeps of them, where every rank has all of it: for optimizers other than
    AdamW. It does not depend on the number of ranks."""

    def __init__(self, ranks: Ranks, optimizer: Any, parameters: dict[str, torch.nn.Parameter]) -> None:
        self.ranks, self.optimizer, self.parameters = ranks, ranks.strategy.adam(optimizer), parameters

    @torch.no_grad()
    def collect(self) -> dict[str, Tensor]:
        """Tensors on the CPU: each parameter as `weight/NAME`, and what is kept of it as `state/KEY/NAME`. Ranks other
        than the main one return none."""
        if not self.ranks.is_main:
            return {}
        tensors = {f"weight/{name}": parameter.detach().float().cpu() for name, parameter in self.parameters.items()}
        return tensors | {
            f"state/{key}/{name}": torch.as_tensor(value).to("cpu", copy=True)
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state[parameter].items()
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        """Restore what `collect` returned, the same on every rank. Raises ValueError for tensors of other shapes or
        names."""
        require_same_weights(state, self.parameters)
        kept: dict[str, dict[str, Tensor]] = {name: {} for name in self.parameters}
        for key, value in state.items():
            if key.startswith("state/"):
                _, kind, name = key.split("/", 2)
                kept[name][kind] = value
        for name, parameter in self.parameters.items():
            weight = state[f"weight/{name}"]
            if weight.shape != parameter.shape:
                raise ValueError(f"weight/{name} has shape {list(weight.shape)}, expected {list(parameter.shape)}")
            parameter.copy_(weight)
            self.optimizer.state[parameter] = {
                key: self._value(key, value, parameter) for key, value in kept[name].items()
            }

    def _value(self, key: str, value: Tensor, parameter: Tensor) -> Any:
        if key != "step":
            return value.to(parameter.device)
        if not value.is_floating_point():  # a number, to bitsandbytes
            return int(value)
        fused = any(group.get("fused") for group in self.optimizer.param_groups)
        return value.to(parameter.device if fused else "cpu")
