"""Which choices of a router are recorded and replaced, by routers made by hand; test_replay.py has whole rollouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from grpo_dist.model.routing import Routers, has_experts


class Grouped(nn.Module):
    """Chooses 2 of 6 experts by their scores. Its choices of a group and of the best expert are others."""

    def forward(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        group = torch.topk(scores.view(len(scores), 3, 2).sum(-1), 1, dim=-1).indices
        best = torch.topk(scores, 1, dim=-1).indices
        return torch.topk(scores, 2, dim=-1).indices, torch.cat([group, best], 1)


class Mixture(nn.Module):
    """Routers by name; a config as transformers'."""

    def __init__(self, names: list[str], **options: Any) -> None:
        super().__init__()
        self.config = PretrainedConfig(**{"num_experts": 6, "num_experts_per_tok": 2, **options})
        for name in names:
            parent: nn.Module = self
            for part in name.split(".")[:-1]:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(name.rpartition(".")[2], Grouped())


SCORES = torch.tensor([[0.1, 0.5, 0.2, 0.0, 0.9, 0.3], [0.6, 0.5, 0.2, 0.0, 0.1, 0.3]])


def test_a_choice_of_groups_or_of_another_number_is_left_alone() -> None:
    model = Mixture(["gate"])
    routers = Routers(model)
    experts, others = model.gate(SCORES)
    assert experts.tolist() == [[4, 1], [0, 1]] and others.tolist() == [[2, 4], [0, 0]]
    assert routers.recorded().tolist() == [[[4, 1]], [[0, 1]]]
    routers.given = torch.tensor([[[3, 5]], [[2, 4]]], dtype=torch.uint8)
    experts, others = model.gate(SCORES)
    assert experts.tolist() == [[3, 5], [2, 4]] and others.tolist() == [[2, 4], [0, 0]]
    assert routers.recorded().tolist() == [[[4, 1]], [[0, 1]]], "its own choice"


def test_layers_have_the_numbers_of_their_names() -> None:
    assert Routers(Mixture(["layers.1.gate", "layers.12.gate"])).layers == [1, 12]
    assert Routers(Mixture(["gate"])).layers == [0], "one router for all layers"


def test_agreement_is_about_sets_of_experts() -> None:
    model = Mixture(["layers.0.gate", "layers.1.gate"])
    routers = Routers(model)
    routers.chosen = [torch.tensor([[1, 4], [2, 0]]), torch.tensor([[5, 3], [0, 1]])]
    routers.given = torch.tensor([[[4, 1], [3, 5]], [[2, 0], [1, 5]]], dtype=torch.uint8)
    assert routers.agreement(torch.tensor([0, 1])).tolist() == [1.0, 0.5]


def test_a_mixture_has_two_experts_or_more() -> None:
    assert [has_experts(PretrainedConfig(num_experts=number)) for number in (0, 1, 2)] == [False, False, True]
    assert not has_experts(PretrainedConfig())


@pytest.mark.parametrize("lacks", ["a router", "a number"])
def test_what_is_not_known_to_choose_by_topk_is_refused(lacks: str) -> None:
    model = Mixture([], num_experts_per_tok=2) if lacks == "a router" else Mixture(["gate"], num_experts_per_tok=None)
    with pytest.raises(ValueError, match=r"has experts, but no router that chooses by torch\.topk"):
        Routers(model)
