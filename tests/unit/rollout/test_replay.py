"""The experts that tokens took in a rollout are those that reference and update compute with, by every decoder."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_experts import build as build_experts
from small_models import batch_of
from torch import Tensor, nn

from grpo_dist.config.rollout import RolloutConfig
from grpo_dist.model import attention
from grpo_dist.model.attention import RowLayout
from grpo_dist.model.files import UnfitModel
from grpo_dist.model.packing import Pack, computed_lengths, make_pack, plan
from grpo_dist.model.policy import Policy, recompute_layers
from grpo_dist.model.routing import Routers, has_experts, routers_of
from grpo_dist.rollout import NativeDecoder, Request, RowDecoder, decode_all, replay
from grpo_dist.rollout.episodes import routes_after
from grpo_dist.rollout.native.routes import RouteTable
from grpo_dist.rollout.probe import routing_fault
from grpo_dist.rollout.replay import engine_obstacle, needs_routes, require_experts, settle_replay
from grpo_dist.types import Batch, Prompt, Trajectory, join

DENSE = {"num_experts": None, "num_local_experts": None}
KINDS = ["qwen3_moe", "mixtral", "gpt_oss"]
PROMPTS = [[5, 9, 33, 60, 7], [12, 80, 41]]
REQUESTS = [Request(group, sample, prompt, key=7 * group + sample) for group, prompt in enumerate(PROMPTS)
            for sample in range(3)]  # fmt: skip
LONGEST = 6


def build(kind: str, seed: int = 0, implementation: str = attention.NAME, **options: Any) -> Any:
    """A random model."""
    return build_experts(kind, implementation, seed, **options)


def row(model: Any, ids: list[int], **options: Any) -> Any:
    """A plain forward pass over one sequence."""
    layout = {}
    if model.config._attn_implementation == attention.NAME:
        layout = {"layout": RowLayout([(len(ids), [])]), "position_ids": torch.arange(len(ids))[None]}
    return model(input_ids=torch.tensor([ids]), use_cache=False, **layout, **options)


def plain_routes(kind: str, ids: list[int], seed: int = 0) -> Tensor:
    """(T, J, K), sorted: the experts with the largest logits, which a model without any hooks reports."""
    with torch.no_grad():
        logits = row(build(kind, seed), ids, output_router_logits=True).router_logits
    return torch.stack([layer.view(len(ids), -1).topk(2, -1).indices for layer in logits], 1).sort(-1).values


def decoders() -> list[Any]:
    """All that decode such a model on a CPU: prompts shared, copied to each row, and one group at a time."""
    sharing = [NativeDecoder([256], LONGEST, 40, copied_prompt=copied) for copied in (0, 64)]
    return [*sharing, RowDecoder([256], LONGEST)]


def drawn(model: Any, decoder: Any) -> list[Trajectory]:
    """Trajectories with the routes of every token but the last."""
    if isinstance(decoder, RowDecoder) and model.config._attn_implementation == attention.NAME:
        model.set_attn_implementation("eager")
    return decode_all(decoder, model, REQUESTS)


def routed_batch(trajectories: list[Trajectory], routers: Routers) -> Batch:
    """The batch as one rank gathers it, with routes."""
    return batch_of([Prompt(n, ids, "") for n, ids in enumerate(PROMPTS)], trajectories, routers.nothing)


def packs_of(batch: Batch, share_prompts: bool, max_tokens: int = 24) -> list[Pack]:
    """Packs of all its completions."""
    prompts, lengths = [len(p.ids) for p in batch.prompts], computed_lengths(batch.row_lengths).tolist()
    (plans,) = plan(prompts, batch.group.tolist(), lengths, [True] * len(lengths), max_tokens=max_tokens, num_ranks=1,
                    share_prompts=share_prompts)  # fmt: skip
    return [make_pack(batch, pieces, share_prompts=share_prompts) for pieces in plans]


def experts_taken(policy: Policy) -> list[Tensor]:
    """What the experts' modules are called with from here on, (T, K) each."""
    taken: list[Tensor] = []

    def note(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        taken.append(next(x for x in [*inputs, *options.values()] if x.dtype == torch.int64))

    for name, module in policy.causal_lm.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(note, with_kwargs=True)
    return taken


@pytest.mark.parametrize("kind", KINDS)
def test_a_rollout_records_what_a_plain_forward_pass_takes(kind: str) -> None:
    for decoder in decoders():
        model = build(kind)
        routers = Routers(model)
        for request, answer in zip(REQUESTS, drawn(model, decoder), strict=True):
            assert answer.routes is not None and answer.routes.dtype == torch.uint8
            ids = request.prompt + answer.ids
            assert answer.routes.shape == (len(ids), 2, 2)
            expected = plain_routes(kind, ids)[:-1].to(torch.uint8)
            assert torch.equal(answer.routes[:-1].sort(-1).values, expected)
            assert (answer.routes[-1] == 255).all(), "the last token came into no pass"
        assert routers.given is None


@pytest.mark.parametrize("kind", KINDS)
def test_update_and_reference_take_the_experts_of_the_rollout(kind: str) -> None:
    """The policy has another router than the rollout, so that it would choose otherwise."""
    model, policy = build(kind), Policy(build(kind))
    trajectories = drawn(model, decoders()[0]) if Routers(model) else []
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if name.endswith(("gate.weight", "router.weight")):
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    routers = Routers(policy.causal_lm)
    batch, taken = routed_batch(trajectories, routers), experts_taken(policy)
    seen = 0
    for pack in packs_of(batch, True):
        assert pack.routes is not None
        taken.clear()
        policy(pack)
        assert len(taken) == 2
        known = pack.routes[:, 0, 0] != 255
        for layer, experts in enumerate(taken):
            assert torch.equal(experts[known], pack.routes[known, layer].long()), "of 100 % of the tokens"
        (share,) = policy.router_agreement(pack).values()
        assert share.shape == pack.predictor.shape and 0 < float(share.mean()) < 1, "it would choose otherwise"
        seen += int(known.sum())
        taken.clear()
        policy(replace(pack, routes=None))
        assert not all(torch.equal(e[known], pack.routes[known, n].long()) for n, e in enumerate(taken))
        assert policy.router_agreement(replace(pack, routes=None)) == {}
    assert seen >= sum(len(prompt) for prompt in PROMPTS) + len(batch.ids) - len(REQUESTS)


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_same_weights_replay_changes_nothing(kind: str) -> None:
    """To the last bit, and the gradient of the routers too."""
    model, policy = build(kind), Policy(build(kind))
    Routers(model)
    routers = Routers(policy.causal_lm)
    (pack, *_) = packs_of(routed_batch(drawn(model, decoders()[0]), routers), True)
    outcomes = []
    for routes in (pack.routes, None):
        policy.zero_grad()
        logprobs = policy(replace(pack, routes=routes))[0]
        logprobs.sum().backward()
        of_routers = (p.grad for n, p in policy.named_parameters() if n.endswith(("gate.weight", "router.weight")))
        outcomes.append([logprobs, *of_routers])
        if routes is not None:
            assert (routers.agreement(pack.predictor) == 1).all()
    assert len(outcomes[0]) > 2 and all(float(each.abs().sum()) > 0 for each in outcomes[0])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_weights_are_those_of_the_own_router() -> None:
    """Against a router that is written out: the softmax over the logits of the given experts."""
    model = build("mixtral")
    routers, block = Routers(model), model.model.layers[0].mlp
    x = torch.randn(5, 32)
    given = torch.tensor([[3, 1], [0, 5], [2, 4], [5, 0], [1, 2]])
    routers.given = given.to(torch.uint8)[:, None].repeat(1, 2, 1)
    _, weights, indices = block.gate(x)
    expected = (x @ block.gate.weight.T).gather(1, given).softmax(-1)
    assert torch.equal(indices, given)
    torch.testing.assert_close(weights, expected)


def test_layers_that_are_recomputed_take_the_same_experts() -> None:
    model = build("qwen3_moe")
    Routers(model)
    trajectories = drawn(model, decoders()[0])
    gradients = []
    for recomputes in (False, True):
        policy = Policy(build("qwen3_moe", seed=1))
        if recomputes:
            recompute_layers(policy.causal_lm)
        (pack, *_) = packs_of(routed_batch(trajectories, Routers(policy.causal_lm)), True)
        policy(pack)[0].sum().backward()
        gradients.append([p.grad for p in policy.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_groups_that_are_chosen_keep_their_routes() -> None:
    model = build("qwen3_moe")
    routers = Routers(model)
    batch = routed_batch(drawn(model, decoders()[0]), routers)
    joined = join([batch, batch], [[1], [0]])
    assert joined.prompt_routes is not None and batch.prompt_routes is not None
    assert joined.routes is not None and batch.routes is not None
    first = len(PROMPTS[0])
    assert torch.equal(joined.prompt_routes, torch.cat([batch.prompt_routes[first:], batch.prompt_routes[:first]]))
    cut = int(batch.row_lengths[:3].sum())
    assert torch.equal(joined.routes, torch.cat([batch.routes[cut:], batch.routes[:cut]]))


def test_a_further_turn_keeps_the_experts_that_drew_the_turns_before() -> None:
    before, turn = torch.zeros(4, 1, 2), torch.ones(7, 1, 2)
    assert routes_after(None, turn) is turn and routes_after(before, None) is None
    assert routes_after(before, turn)[:, 0, 0].tolist() == [0, 0, 0, 1, 1, 1, 1], "the last one had no route yet"


def test_the_load_balance_loss_is_in_no_loss() -> None:
    """Whatever the model's config asks for."""
    gradients = []
    for options in ({}, {"output_router_logits": True, "router_aux_loss_coef": 100.0}):
        model, policy = build("mixtral"), Policy(build("mixtral", **options))
        Routers(model)
        (pack, *_) = packs_of(routed_batch(drawn(model, decoders()[0]), Routers(policy.causal_lm)), True)
        for fused in (False, True):
            policy.fused_head = fused
            policy.zero_grad()
            policy(pack)[0].sum().backward()
            gradients.append([p.grad.clone() for p in policy.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(gradients[0], gradients[2], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(gradients[1], gradients[3], strict=True))


def settle(model: Any, **options: Any) -> Routers | None:
    """Settle a single model of a single rank."""
    return settle_replay([model], RolloutConfig(**options), True, lambda thing: [thing])


def test_replay_is_on_where_there_are_experts(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = build("qwen3_moe")
    routers = settle(model)
    assert routers is routers_of(model) is not None
    assert "take those of the rollout, 2 of 6 in 2 layers; no load-balance loss" in caplog.text
    assert settle(build("qwen3_moe"), routing_replay=False) is None
    assert settle(build("qwen2", **DENSE)) is None


def test_what_cannot_be_replayed_is_said_by_name(caplog: pytest.LogCaptureFixture) -> None:
    phimoe = build("phimoe", implementation="sdpa")  # its router chooses by maxima, one expert after another
    assert settle(build("qwen3_moe"), engine="paged") is None and "engine paged does not report" in caplog.text
    assert settle(phimoe) is None and "no router that chooses by torch.topk" in caplog.text
    assert routers_of(phimoe) is None
    refused = "rollout.routing_replay: True given, expected auto or false"
    with pytest.raises(UnfitModel, match=refused):
        settle(phimoe, routing_replay=True)
    with pytest.raises(ValueError, match=refused):
        RolloutConfig(engine="paged", routing_replay=True)
    with pytest.raises(ValueError, match=refused):
        require_experts(RolloutConfig(routing_replay=True), build("qwen2", **DENSE).config)
    require_experts(RolloutConfig(routing_replay=True), build("qwen3_moe").config)


def test_servers_report_routes_where_they_are_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's engine for CPUs reports none."""
    experts, dense = build("qwen3_moe").config, build("qwen2", **DENSE).config
    for on_gpu, choice, expected in (
        (True, "auto", True), (False, "auto", False), (False, True, True), (True, False, False)
    ):  # fmt: skip
        monkeypatch.setattr(replay, "computes_on_gpu", lambda on_gpu=on_gpu: on_gpu)
        rollout = RolloutConfig(engine="vllm", routing_replay=choice)
        assert needs_routes(rollout, experts) is expected
        assert not needs_routes(rollout, dense)
        assert (engine_obstacle(rollout) is None) is (on_gpu or choice != "auto")


def test_requests_of_a_model_without_routers_have_no_routes() -> None:
    assert RouteTable(build("qwen2", **DENSE), 4, torch.device("cpu")).of([3, 4], [1, 2], []) == [None, None]


def test_all_models_replay_what_every_rank_can(caplog: pytest.LogCaptureFixture) -> None:
    """The first model's routers are returned, and one rank's obstacle is that of all."""
    models = [build("qwen3_moe", seed) for seed in range(3)]
    routers = settle_replay(models, RolloutConfig(), True, lambda thing: [thing])
    assert routers is routers_of(models[0]) and len({id(routers_of(each)) for each in models} - {id(None)}) == 3
    alone = build("qwen3_moe")
    assert settle_replay([alone], RolloutConfig(), True, lambda thing: [thing, "another kernel there"]) is None
    assert "another kernel there" in caplog.text and routers_of(alone) is None


def test_routes_fit_their_type() -> None:
    """The largest number of a type says that a token has no route: it may be no expert's."""
    for number, dtype in ((255, torch.uint8), (256, torch.int16)):
        with torch.device("meta"):
            routers = Routers(build("qwen3_moe", num_local_experts=number, num_experts=number, num_hidden_layers=1))
        assert routers.dtype == dtype and routers.nothing.dtype == dtype and routers.shape == (1, 2)
    one = {"num_experts": 1, "num_local_experts": 1, "num_experts_per_tok": 1}
    assert not has_experts(build("qwen3_moe", **one).config)


class Stubborn(nn.Module):
    """A router that takes its own choice, whatever `torch.topk` returns."""

    def __init__(self, router: Any) -> None:
        super().__init__()
        self.weight = router.weight

    def forward(self, hidden: Tensor) -> Any:
        logits = hidden.reshape(-1, hidden.shape[-1]) @ self.weight.T
        torch.topk(logits, 2)
        indices = logits.argsort(-1, descending=True)[:, :2]
        return logits, logits.gather(1, indices).softmax(-1), indices


def test_a_router_that_does_not_follow_is_noticed() -> None:
    model = build("mixtral")
    plain = row(model, PROMPTS[0]).logits
    assert routing_fault(model, True) is None
    assert torch.equal(row(model, PROMPTS[0]).logits, plain) and routers_of(model) is None, "left as it was"
    for layer in model.model.layers:
        layer.mlp.gate = Stubborn(layer.mlp.gate)
    assert routing_fault(model, True) == "its experts do not depend on the choice"
