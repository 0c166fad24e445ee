"""Packs on a GPU: attention and the head against float64 on the CPU, and a model's pack against its sequences alone."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from simulated_rollouts import VOCABULARY, make_model
from torch import Tensor

from grpo_dist.model import attention
from grpo_dist.model.attention import RowLayout
from grpo_dist.model.block_attention import block_layout
from grpo_dist.model.layout import AttentionOptions
from grpo_dist.model.logprobs import head_logprobs

CUDA = torch.device("cuda")
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Largest norm of an error as a share of the truth's."""
PIECES = {
    "one": [(7, [5])],
    "short": [(3, [1, 9, 2]), (17, [4, 4]), (1, [1])],
    "no completion": [(1, []), (9, [3])],
    "odd": [(131, [77, 301, 5]), (257, [259])],
    "long": [(301, [513, 1, 700]), (64, [65] * 9)],
}  # fmt: skip


def error(got: Tensor, truth: Tensor) -> float:
    """Norm of the difference as a share of the truth's."""
    return float((got.cpu().double() - truth.cpu().double()).norm() / truth.cpu().double().norm())


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", PIECES)
def test_attention_and_its_gradients(name: str, dtype: torch.dtype, heads: tuple[int, int], simulated: bool) -> None:
    if simulated and name == "long":
        pytest.skip("slow on the simulated device")
    pieces = PIECES[name]
    tokens = sum(prompt + sum(completions) for prompt, completions in pieces)
    torch.manual_seed(tokens)
    given = [torch.randn(1, count, tokens, 64).to(dtype) for count in (heads[0], heads[1], heads[1])]
    incoming = torch.randn(1, tokens, heads[0], 64).to(dtype)

    def computed(layout: Any, device: torch.device, kind: torch.dtype) -> list[Tensor]:
        rows = [x.to(device, kind).requires_grad_() for x in given]
        output = layout.attend(0, *rows, AttentionOptions())
        return [output.detach(), *torch.autograd.grad(output, rows, incoming.to(device, kind))]

    truth = computed(block_layout(pieces), torch.device("cpu"), torch.float64)
    got = computed(RowLayout(pieces).to(CUDA), CUDA, dtype)
    for part, expected in zip(got, truth, strict=True):
        assert error(part, expected) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3"])
@torch.no_grad()
def test_a_pack_is_its_sequences_in_one_padded_pass(kind: str, dtype: torch.dtype) -> None:
    rng = random.Random(kind)
    pieces = [(7, [5, 11]), (301 if dtype == torch.float32 else 33, [13])]
    prompts = [[rng.randrange(4, VOCABULARY) for _ in range(prompt)] for prompt, _ in pieces]
    answers = [[[rng.randrange(4, VOCABULARY) for _ in range(n)] for n in completions] for _, completions in pieces]
    model = make_model(kind, 0, attention.NAME)
    plain = make_model(kind, 0, "sdpa").to(CUDA, dtype)
    plain.load_state_dict(model.state_dict())
    model = copy.deepcopy(model).to(CUDA, dtype)
    ids = [token for prompt, each in zip(prompts, answers, strict=True) for part in (prompt, *each) for token in part]
    positions = [place for prompt, completions in pieces
                 for places in (range(prompt), *(range(prompt, prompt + n) for n in completions))
                 for place in places]  # fmt: skip
    packed = model(
        input_ids=torch.tensor([ids], device=CUDA), position_ids=torch.tensor([positions], device=CUDA),
        use_cache=False, layout=RowLayout(pieces).to(CUDA),
    ).logits[0].float().cpu()  # fmt: skip
    rows = [prompt + answer for prompt, each in zip(prompts, answers, strict=True) for answer in each]
    longest = max(map(len, rows))
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=CUDA)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=CUDA)
    alone = plain(input_ids=padded, attention_mask=mask, use_cache=False).logits.float().cpu()
    start, number = 0, 0
    for prompt, completions in pieces:
        start += prompt
        for length in completions:
            assert (
                error(packed[start : start + length], alone[number, prompt : prompt + length]) < 3 * TOLERANCES[dtype]
            )
            start, number = start + length, number + 1


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_the_head_of_a_large_vocabulary(trained: bool, dtype: torch.dtype, simulated: bool) -> None:
    vocabulary, num_tokens, size = (1_519, 40, 64) if simulated else (151_936, 333, 896)
    torch.manual_seed(0)
    hidden, weight = torch.randn(num_tokens, size).to(dtype), (torch.randn(vocabulary, size) * 0.1).to(dtype)
    targets, incoming = torch.randint(vocabulary, (num_tokens,)), torch.randn(num_tokens)

    def computed(device: torch.device, kind: torch.dtype) -> list[Tensor]:
        rows = hidden.to(device, kind).requires_grad_()
        head = weight.to(device, kind).requires_grad_(trained)
        logprobs, entropies = head_logprobs(rows, head, None, targets.to(device), 0.9)
        wanted = [rows, head] if trained else [rows]
        grads = torch.autograd.grad(logprobs, wanted, incoming.to(device, logprobs.dtype))
        return [logprobs.detach(), entropies.detach(), *grads]

    def written_out() -> list[Tensor]:
        rows, head = hidden.double().requires_grad_(), weight.double().requires_grad_(trained)
        table = torch.log_softmax(rows @ head.T / 0.9, -1)
        logprobs = table.gather(-1, targets[:, None])[:, 0]
        grads = torch.autograd.grad(logprobs, [rows, head] if trained else [rows], incoming.double())
        return [logprobs.detach(), -(table.exp() * table).sum(-1).detach(), *grads]

    for part, expected in zip(computed(CUDA, dtype), written_out(), strict=True):
        assert error(part, expected) < TOLERANCES[dtype]
