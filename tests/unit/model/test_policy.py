"""What a policy computes does not depend on the threads of the process."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from random_batches import make_batch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_dist.model import attention
from grpo_dist.model.lora import fuse_adapters
from grpo_dist.model.packing import Pack, Piece, make_pack
from grpo_dist.model.policy import Policy, PolicyOptions, distinct, rows_at

pytestmark = pytest.mark.usefixtures("kernel")


def pack_of_groups() -> Pack:
    """Prompts whose last tokens predict the first tokens of many completions."""
    pieces = [(20, [3] * 60), (5, [9] * 40), (1, [1, 30])]
    counted = iter(range(102))
    return make_pack(make_batch(pieces), [Piece(n, [next(counted) for _ in c]) for n, (_, c) in enumerate(pieces)])


def make_policy() -> Policy:
    """A policy of random weights, with adapters that do something."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=90, hidden_size=288, intermediate_size=320, num_hidden_layers=2,
                         num_attention_heads=9, num_key_value_heads=3)  # fmt: skip
    model = get_peft_model(LlamaForCausalLM._from_config(config, attn_implementation=attention.NAME),
                           LoraConfig(r=8, target_modules="all-linear"))  # fmt: skip
    fuse_adapters(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return Policy(model, PolicyOptions(fuses_layers=True))


def test_rows_whose_places_are_the_same(all_threads: None) -> None:
    places = pack_of_groups().predictor
    assert len(places.unique()) < len(places)
    x, grad = torch.randn(places.max() + 3, 288), torch.randn(len(places), 288)
    exact = torch.zeros(x.shape, dtype=torch.float64).index_add_(0, places, grad.double())
    kept, place = distinct(places)
    assert torch.equal(kept[place], places) and len(kept) == len(places.unique())
    got: list[Tensor] = []
    for threads in (1, 2, 3, 5) * 3:
        torch.set_num_threads(threads)
        given = x.clone().requires_grad_()
        rows = rows_at(given, places)
        assert torch.equal(rows, x[places])
        got += torch.autograd.grad(rows, given, grad)
    torch.testing.assert_close(got[0].double(), exact, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(each, got[0]) for each in got)


@pytest.mark.parametrize("fused_head", [True, False])
def test_gradients_do_not_depend_on_threads(fused_head: bool, all_threads: None) -> None:
    """To the last bit."""
    policy, pack = make_policy(), pack_of_groups()
    policy.fused_head = fused_head
    trained = [p for p in policy.parameters() if p.requires_grad]
    outcomes: list[list[Tensor]] = []
    for threads in (1, 2, 3) * 3:
        torch.set_num_threads(threads)
        logprobs, entropies, _ = policy(pack)
        outcomes.append([logprobs, entropies, *torch.autograd.grad(logprobs.square().sum(), trained)])
    for outcome in outcomes:
        assert all(torch.equal(a, b) for a, b in zip(outcome, outcomes[0], strict=True))
