"""Routing replay: reference and policy take the experts that a token took in the rollout.

A router chooses the experts with the largest scores. Two scores may be so near that the rounding of a rollout and that
of an update choose differently, and then the token's probability jumps: Rollout Routing Replay, arXiv:2510.11370,
reports runs that collapse by it; GSPO, arXiv:2507.18071, section 5.3, replays routes too. Only the choice is replayed.
The weights of the experts come from the scores of the model at hand, by its own code, so that a router that is trained
has its gradient.

transformers' routers choose by `torch.topk`. While a router computes, that call is noted, or answered as noted before.

Shapes: T tokens of a row, J routers, E experts, K experts of a token, M sampled tokens.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .checks import reads_text
from .files import EXPERTS

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig

EXPERTS_OF_A_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k", "top_k_experts")
"""The names that configs give to the number of experts that a token takes."""
TOPK = (torch.topk, Tensor.topk)


class Routers:
    """The routers of a model, from here on with a record of what they choose, and a choice that they may be given."""

    def __init__(self, model: Any) -> None:
        """Raises ValueError where the model has experts, but no router that is known to choose by `torch.topk`."""
        text = model.config.get_text_config()
        self.num_experts, self.experts_of_a_token = _first(text, EXPERTS), _first(text, EXPERTS_OF_A_TOKEN)
        names = router_names(model)
        if not names or not self.experts_of_a_token:
            raise ValueError(f"{type(model).__name__} has experts, but no router that chooses by torch.topk")
        self.layers = [int(re.findall(r"\d+", name)[0]) if re.search(r"\d", name) else 0 for name in names]
        """The number of each router's layer in the model."""
        self.dtype = torch.uint8 if self.num_experts <= torch.iinfo(torch.uint8).max else torch.int16
        self.given: Tensor | None = None
        """(T, J, K): the experts to take, from the next call of the model on; None lets the routers choose."""
        self.chosen: list[Tensor] = [torch.zeros(0)] * len(names)
        """(T, K) int64 a router: its own choice in the newest call of the model, whatever it was given."""
        self._model, self._plain = model, {name: model.get_submodule(name).forward for name in names}
        for place, (name, plain) in enumerate(self._plain.items()):
            model.get_submodule(name).forward = _routed(plain, self, place)
        model.routers = self

    @property
    def shape(self) -> tuple[int, int]:
        """R and K."""
        return len(self.chosen), self.experts_of_a_token

    @property
    def nothing(self) -> Tensor:
        """(0, J, K): routes of no tokens."""
        return torch.zeros((0, *self.shape), dtype=self.dtype)

    def remove(self) -> None:
        """Leave the model as it was."""
        for name, plain in self._plain.items():
            self._model.get_submodule(name).forward = plain
        del self._model.routers

    def recorded(self) -> Tensor:
        """(T, J, K): what the routers chose in the newest call of the model."""
        return torch.stack(self.chosen, 1).to(self.dtype)

    def agreement(self, places: Tensor) -> Tensor:
        """(M,) float32: the share of routers that would have chosen what they were given, of the tokens at `places`."""
        assert self.given is not None
        own, given = (routes.sort(-1).values for routes in (self.recorded()[places], self.given[places]))
        return (own == given).all(-1).float().mean(-1)

    def choose(self, place: int, scores: Tensor, top: Any) -> Any:
        """What a router's call of `torch.topk` returns, from `scores` and what it would return."""
        if scores.shape[1:] != (self.num_experts,) or top.indices.shape[-1] != self.experts_of_a_token:
            return top  # of groups of experts, or of something else
        self.chosen[place] = top.indices.detach()
        if self.given is None:
            return top
        given = self.given[:, place]
        assert len(given) == len(scores), "the routes of another row"
        indices = torch.where(given == torch.iinfo(given.dtype).max, top.indices, given.long())
        return torch.return_types.topk((scores.gather(-1, indices), indices))


def routers_of(model: nn.Module) -> Routers | None:
    """The routers of a model that has been given to `Routers`; None for another one."""
    return model.__dict__.get("routers")


def has_experts(model_config: PreTrainedConfig) -> bool:
    """Whether a transformers config is of a mixture of experts."""
    return _first(model_config.get_text_config(), EXPERTS) > 1


def router_names(model: nn.Module) -> list[str]:
    """The modules of the language model whose own code calls `topk`, and that have no such module inside."""
    names = [name for name, module in model.named_modules()
             if name and _calls_topk(type(module)) and reads_text(model, name)]  # fmt: skip
    return [name for name in names if not any(other.startswith(f"{name}.") for other in names)]


def _calls_topk(kind: type[nn.Module]) -> bool:
    functions = (inspect.unwrap(each) for owner in kind.__mro__ if not owner.__module__.startswith(("torch.", "peft."))
                 for each in vars(owner).values() if inspect.isfunction(each))  # fmt: skip
    return any("topk" in each.__code__.co_names for each in functions if inspect.isfunction(each))


def _first(text: PreTrainedConfig, names: tuple[str, ...]) -> int:
    return next((value for name in names if isinstance(value := getattr(text, name, None), int)), 0)


def _routed(plain: Callable[..., Any], routers: Routers, place: int) -> Callable[..., Any]:
    def forward(*inputs: Any, **options: Any) -> Any:
        with _Choice(routers, place):
            return plain(*inputs, **options)

    return forward


class _Choice(TorchFunctionMode):
    """Inside, `torch.topk` is the choice of a router."""

    def __init__(self, routers: Routers, place: int) -> None:
        super().__init__()
        self.routers, self.place = routers, place

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in TOPK:
            return result
        scores = args[0] if args else kwargs["input"]
        return self.routers.choose(self.place, scores, result)
