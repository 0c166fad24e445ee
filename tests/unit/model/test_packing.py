"""Packs: the plan, the tensors, and promise 2 (packing changes nothing) on a small random model."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_batches import make_batch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from grpo_dist.algorithm.losses import PackTokens, policy_loss, token_weights
from grpo_dist.config.algorithm import LossConfig
from grpo_dist.model import attention
from grpo_dist.model.block_attention import BLOCK
from grpo_dist.model.critic import ValueHead
from grpo_dist.model.packing import FILLER, PAIRS_PER_TOKEN, Piece, computed_lengths, make_pack, piece_cost, plan
from grpo_dist.model.policy import Policy, PolicyOptions
from grpo_dist.types import Batch

pytestmark = pytest.mark.quick

PIECES = st.lists(
    st.tuples(st.integers(1, 60), st.lists(st.tuples(st.integers(1, 50), st.booleans()), max_size=6)),
    min_size=1,
    max_size=8,
)


def whole_plan(
    batch: Batch, max_tokens: int, num_ranks: int = 1, share_prompts: bool = True
) -> list[list[list[Piece]]]:
    """The plan of a batch of which everything is kept."""
    prompt_lengths, lengths = [len(p.ids) for p in batch.prompts], computed_lengths(batch.row_lengths).tolist()
    return plan(prompt_lengths, batch.group.tolist(), lengths, [True] * len(lengths), max_tokens=max_tokens,
                num_ranks=num_ranks, share_prompts=share_prompts)  # fmt: skip


# --- the plan ----------------------------------------------------------------------------------------------------


@given(PIECES, st.integers(2, 300), st.integers(1, 4), st.booleans())
@settings(max_examples=60)
def test_plan(
    given_pieces: list[tuple[int, list[tuple[int, bool]]]], max_tokens: int, num_ranks: int, share: bool
) -> None:
    prompt_lengths = [prompt for prompt, _ in given_pieces]
    group = [g for g, (_, members) in enumerate(given_pieces) for _ in members]
    lengths = [length for _, members in given_pieces for length, _ in members]
    keep = [kept for _, members in given_pieces for _, kept in members]
    options = {"max_tokens": max_tokens, "num_ranks": num_ranks, "share_prompts": share}
    ranks = plan(prompt_lengths, group, lengths, keep, **options)  # type: ignore[arg-type]
    assert ranks == plan(prompt_lengths, group, lengths, keep, **options)  # type: ignore[arg-type]
    assert len(ranks) == num_ranks and len({len(packs) for packs in ranks}) == 1
    planned = [n for packs in ranks for pack in packs for piece in pack for n in piece.completions]
    assert sorted(planned) == [n for n, kept in enumerate(keep) if kept]
    for packs in ranks:
        for pack in packs:
            for piece in pack:
                assert piece.completions and all(group[n] == piece.prompt for n in piece.completions)
            size = sum(prompt_lengths[p.prompt] + sum(lengths[n] for n in p.completions) for p in pack)
            alone = len(pack) == 1 and len(pack[0].completions) == 1
            assert size <= max_tokens or alone
            assert share or not pack or alone
    longest = max((prompt_lengths[group[n]] + lengths[n] for n in planned), default=0)
    if longest <= max_tokens:  # an empty pack is only there to make the counts equal
        assert all(any(rank[turn] for rank in ranks) for turn in range(len(ranks[0])))


def test_a_completion_above_the_budget_brings_no_empty_packs() -> None:
    (packs,) = plan([4, 3], [0, 1], [97, 2], [True, True], max_tokens=10, num_ranks=1)
    assert sorted(piece.prompt for pack in packs for piece in pack) == [0, 1]
    assert len(packs) == 2


def test_nothing_kept_needs_no_pack() -> None:
    assert plan([3, 4], [0, 0, 1], [5, 6, 7], [False] * 3, max_tokens=100, num_ranks=3) == [[], [], []]
    assert plan([], [], [], [], max_tokens=100, num_ranks=2) == [[], []]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("num_ranks", [2, 5, 8])
def test_ranks_are_balanced(num_ranks: int, share: bool) -> None:
    generator = torch.Generator().manual_seed(num_ranks)
    prompts = torch.randint(20, 400, (64,), generator=generator).tolist()
    lengths = (torch.rand(512, generator=generator) ** 3 * 1000 + 1).long().tolist()
    group = [n // 8 for n in range(512)]
    ranks = plan(prompts, group, lengths, [True] * 512, max_tokens=4096, num_ranks=num_ranks, share_prompts=share)
    costs = [sum(piece_cost(prompts[p.prompt], [lengths[n] for n in p.completions]) for pack in packs for p in pack)
             for packs in ranks]  # fmt: skip
    assert max(costs) <= 1.5 * sum(costs) / num_ranks


def test_packs_are_nearly_full() -> None:
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(20, 400, (300,), generator=generator).tolist()
    lengths = torch.randint(1, 500, (2400,), generator=generator).tolist()
    ranks = plan(prompts, [n // 8 for n in range(2400)], lengths, [True] * 2400, max_tokens=16384, num_ranks=3)
    fewest = (sum(prompts) + sum(lengths)) / 16384
    assert sum(map(len, ranks)) <= 1.15 * fewest


def test_a_pack_may_be_filled_to_the_last_token() -> None:
    for max_tokens, num_packs in ((10, 1), (9, 2)):
        (packs,) = plan([2, 2], [0, 1], [3, 3], [True, True], max_tokens=max_tokens, num_ranks=1)
        assert len(packs) == num_packs


def test_a_piece_may_be_filled_to_the_last_token() -> None:
    for max_tokens, num_pieces in ((8, 1), (7, 2)):
        (packs,) = plan([2], [0, 0], [3, 3], [True, True], max_tokens=max_tokens, num_ranks=1)
        assert sum(map(len, packs)) == num_pieces


def test_sharing_prompts_computes_fewer_tokens() -> None:
    """A group that fits in a budget stands in one piece, its prompt once."""
    batch = make_batch([(100, [10] * 8)] * 4)
    (packs,) = whole_plan(batch, 100000)
    assert len(packs) == 1
    assert sorted(piece.prompt for piece in packs[0]) == [0, 1, 2, 3]
    pack = make_pack(batch, packs[0])
    assert len(pack.ids) == 4 * (100 + 8 * 9) and pack.layout is not None


def test_one_long_group_is_cut_between_ranks() -> None:
    batch = make_batch([(10, [50] * 8)])
    ranks = whole_plan(batch, 10000, num_ranks=4)
    assert all(any(packs) for packs in ranks)


def test_piece_cost_grows_with_everything() -> None:
    assert piece_cost(10, [5, 6]) == 21 + (50 + 5 * 12.5 + 6 * 13) / PAIRS_PER_TOKEN
    assert piece_cost(10, [5, 5]) < piece_cost(11, [5, 5]) < piece_cost(11, [5, 6]) < piece_cost(11, [5, 6, 1])


# --- the tensors -------------------------------------------------------------------------------------------------


SMALL = st.tuples(st.integers(1, 9), st.lists(st.integers(0, 7), min_size=1, max_size=4))


@given(st.lists(SMALL, min_size=1, max_size=5), st.integers(16, 60), st.booleans(), st.sampled_from([1.0, 0.6]))
@settings(max_examples=60)
def test_make_pack_equals_the_loop(
    pieces: list[tuple[int, list[int]]], max_tokens: int, share: bool, share_sampled: float
) -> None:
    """Tokens that were not sampled stand in the row, and nothing is computed of them. The last token of a completion is
    predicted, and predicts nothing."""
    batch = make_batch(pieces, share_sampled=share_sampled)
    for pack_pieces in whole_plan(batch, max_tokens, share_prompts=share)[0]:
        pack = make_pack(batch, pack_pieces, share_prompts=share)
        ids: list[int] = []
        positions: list[int] = []
        owner: list[int] = []
        rows: list[tuple[int, int, int, int]] = []  # predictor, target, place in the batch, number of the completion
        number = 0
        for piece in pack_pieces:
            prompt = batch.prompts[piece.prompt].ids
            ids += prompt
            positions += range(len(prompt))
            owner += [-1 - piece.prompt] * len(prompt)
            prompt_end = len(ids) - 1
            for n in piece.completions:
                place, first = int(batch.starts[n]), int(batch.row_starts[n])
                completion = batch.completion_ids(n)
                for t, token in enumerate(completion):
                    if batch.sampled[first + t]:
                        rows.append((len(ids) - 1 if t else prompt_end, token, place, number))
                        place += 1
                    if t + 1 < len(completion):
                        ids.append(token)
                        positions.append(len(prompt) + t)
                        owner.append(n)
                number += 1
        assert pack.ids.tolist() == ids and pack.positions.tolist() == positions
        assert pack.owner.tolist() == owner
        columns = (pack.predictor, pack.targets, pack.token, pack.sequence)
        assert list(zip(*(column.tolist() for column in columns), strict=True)) == rows
        assert (pack.layout is None) != share
        assert pack.useful == (len(ids) if rows else 0)


@pytest.mark.parametrize("share", [True, False])
def test_a_pack_on_a_device_is_the_same_pack(share: bool) -> None:
    pack = make_pack(make_batch([(3, [2])]), [Piece(0, [0])], share_prompts=share)
    moved = pack.to(torch.device("cpu"))
    assert moved.ids.tolist() == pack.ids.tolist() and moved.owner.tolist() == pack.owner.tolist() == [-1, -1, -1, 0]
    assert (moved.layout is None) == (pack.layout is None) == (not share)


def test_routes_are_those_of_a_pack_s_tokens() -> None:
    batch = make_batch([(3, [2, 4]), (2, [3])])
    of_prompts = torch.tensor([n for prompt in batch.prompts for n in prompt.ids])
    routed = replace(batch, routes=batch.ids[:, None, None].expand(-1, 2, 3),
                     prompt_routes=of_prompts[:, None, None].expand(-1, 2, 3))  # fmt: skip
    pack = make_pack(routed, [Piece(1, [2]), Piece(0, [1])])
    assert pack.routes is not None and torch.equal(pack.routes, pack.ids[:, None, None].expand(-1, 2, 3))
    assert make_pack(batch, [Piece(1, [2])]).routes is None
    empty = make_pack(routed, [])
    assert empty.routes is not None and empty.routes.shape == (1, 2, 3) and empty.owner.tolist() == [FILLER]


def test_packs_are_added_until_every_piece_fits() -> None:
    """No pack has room for two of these pieces: five packs would hold all tokens, but not the pieces, nor do six."""
    (packs,) = whole_plan(make_batch([(3, [4])] * 8), max_tokens=10)
    assert [len(pack) for pack in packs] == [1] * 8


def test_a_pack_in_which_nothing_was_sampled_is_of_no_use() -> None:
    batch = make_batch([(3, [2])])
    answered = replace(batch, sampled=torch.zeros(2, dtype=torch.bool), sampled_logprobs=torch.zeros(0))
    pack = make_pack(answered, [Piece(0, [0])])
    assert len(pack.ids) == 4 and len(pack.targets) == 0 and pack.useful == 0


@pytest.mark.parametrize("share", [True, False])
def test_an_empty_pack(share: bool) -> None:
    pack = make_pack(make_batch([(3, [2])]), [], share_prompts=share)
    assert len(pack.ids) == len(pack.positions) == 1 and pack.useful == 0
    assert all(
        len(t) == 0 and t.dtype == torch.int64 for t in (pack.predictor, pack.targets, pack.token, pack.sequence)
    )


# --- promise 2 ---------------------------------------------------------------------------------------------------

BATCHES = {
    "short": [(5, [3, 9, 1, 7]), (11, [2, 4]), (1, [6, 6, 1]), (30, [8])],
    "long": [(BLOCK + 9, [40, 3]), (6, [5, 150, 130]), (4, [2, 2])],
}


@pytest.fixture(scope="module")
def config() -> Qwen2Config:
    """A small Qwen2 with grouped queries and biases."""
    return Qwen2Config(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                       num_key_value_heads=2, max_position_embeddings=1024)  # fmt: skip


def build(config: Qwen2Config, implementation: str) -> torch.nn.Module:
    """The same random model for every implementation (from_config writes into the config it is given)."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=implementation).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def loss_inputs(batch: Batch) -> dict[str, Tensor]:
    """Old and reference log-probabilities, advantages and weights of all tokens of a batch, (T,)."""
    generator = torch.Generator().manual_seed(3)
    count = len(batch.tokens)
    return {
        "old": -4.5 + torch.randn(count, generator=generator) * 0.2,
        "reference": -4.5 + torch.randn(count, generator=generator),
        "advantages": torch.randn(len(batch.lengths), generator=generator)[batch.sequence],
        "weights": token_weights(
            batch.lengths, "sequence_mean", group=batch.group, included=torch.ones_like(batch.finished), longest=1
        ),
    }


def share_of_loss(
    logprobs: Tensor, entropies: Tensor, inputs: dict[str, Tensor], token: Tensor, sequence: Tensor, estimator: str,
    level: str,
) -> Tensor:  # fmt: skip
    """The loss of some tokens."""
    mine = {name: tensor[token] for name, tensor in inputs.items()}
    options = LossConfig(ratio_level=level, kl_estimator=estimator, entropy_coeff=0.3,  # type: ignore[arg-type]
                         importance_correction="none")  # fmt: skip
    tokens = PackTokens(sequence, rollout=mine["old"], **mine)
    return policy_loss(options, 0.1, logprobs, entropies, tokens).total


def flat_gradient(model: torch.nn.Module) -> Tensor:
    """All gradients in one vector; they are cleared."""
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return gradient


@pytest.mark.parametrize(
    ("name", "estimator", "level"),
    [("short", "k3", "token"), ("short", "squared_sequence", "sequence"), ("long", "k3", "token")],
)
def test_packing_changes_neither_loss_nor_gradient(name: str, estimator: str, level: str, config: Qwen2Config) -> None:
    batch = make_batch(BATCHES[name])
    inputs, starts = loss_inputs(batch), batch.starts.tolist()
    plain = build(config, "eager")
    expected = 0.0
    for n, length in enumerate(batch.lengths.tolist()):
        prompt = batch.prompts[int(batch.group[n])].ids
        row = torch.tensor([prompt + batch.completion_ids(n)])
        rows = torch.log_softmax(plain(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 : -1], -1)
        logprobs = rows.gather(-1, row[0, len(prompt) :, None])[:, 0]
        token = torch.arange(starts[n], starts[n] + length)
        entropies = -(rows.exp() * rows).sum(-1)
        loss = share_of_loss(logprobs, entropies, inputs, token, torch.zeros_like(token), estimator, level)
        loss.backward()
        expected += float(loss.detach())
    gradient = flat_gradient(plain)

    shared, rows_model = (
        Policy(build(config, name), PolicyOptions(entropy_gradient=True)) for name in (attention.NAME, "sdpa")
    )
    runs = [(shared, budget, ranks, True) for budget, ranks in ((2, 1), (330, 2), (100000, 3))]
    for policy, budget, num_ranks, share in [*runs, (rows_model, 400, 2, False)]:
        total = 0.0
        for packs in whole_plan(batch, budget, num_ranks, share):
            for pieces in packs:
                pack = make_pack(batch, pieces, share_prompts=share)
                loss = share_of_loss(*policy(pack)[:2], inputs, pack.token, pack.sequence, estimator, level)
                loss.backward()
                total += float(loss.detach())
        assert total == pytest.approx(expected, rel=1e-5), (budget, num_ranks, share)
        difference = float((flat_gradient(policy) - gradient).norm() / gradient.norm())
        assert difference <= 1e-5, (budget, num_ranks, share)


def test_an_empty_pack_reaches_every_trained_weight(config: Qwen2Config) -> None:
    """ZeRO and DDP wait for a gradient of each parameter on each rank."""
    for implementation, share in ((attention.NAME, True), ("sdpa", False)):
        policy = Policy(build(config, implementation))
        policy.value_head = ValueHead(config.hidden_size)
        logprobs, entropies, values = policy(make_pack(make_batch([(3, [2])]), [], share_prompts=share))
        assert logprobs.shape == entropies.shape == values.shape == (0,)
        (logprobs.sum() + values.sum()).backward()
        assert all(p.grad is not None and not p.grad.any() for p in policy.parameters())


def test_the_heaviest_pack_goes_to_the_least_loaded_rank() -> None:
    dealt = plan([1] * 4, [0, 1, 2, 3], [10, 9, 5, 1], [True] * 4, max_tokens=99, num_ranks=2, share_prompts=False)
    assert sorted([piece.completions[0] for (piece,) in rank] for rank in dealt) == [[0, 3], [1, 2]]
