"""Dropout of adapters: the hash against plain integers, and one gradient however a batch is packed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from grpo_dist.algorithm.hashing import stream_key
from grpo_dist.config.schema import LoraConfig, ModelConfig
from grpo_dist.model import attention
from grpo_dist.model.dropout import TokenDropout, TokenKeys
from grpo_dist.model.load import make_policy
from grpo_dist.model.packing import Piece, make_pack
from grpo_dist.model.policy import Policy
from grpo_dist.types import Batch, Prompt

MASK = (1 << 64) - 1
KEY = stream_key(7, "dropout", 3, 0)


def splitmix64(key: int, counter: int) -> int:
    """Output `counter` of the splitmix64 generator with state `key`."""
    x = (key + (counter + 1) * 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def slow_kept(share: float, layer: str, owner: int, position: int, number: int) -> bool:
    """Whether one input of one token is kept, by integers alone."""
    token = splitmix64(splitmix64(KEY & MASK, owner), position)
    word = splitmix64(splitmix64(token, stream_key("layer", layer)), number // 4)
    short = word >> 16 * (number % 4) & 0xFFFF
    signed = short - (1 << 16) if short >= 1 << 15 else short
    return signed + (1 << 15) >= round(share * (1 << 16))


def dropping(share: float, layer: str, owner: list[int], positions: list[int]) -> TokenDropout:
    """The dropout of a layer with the keys of a row."""
    tokens = TokenKeys()
    tokens.draw(KEY, torch.tensor(owner), torch.tensor(positions))
    return TokenDropout(share, layer, tokens)


def test_kept_inputs_equal_the_loop() -> None:
    owner, positions, inputs = [-1, -1, 0, 5, 5], [0, 1, 2, 2, 3], 11
    layer = dropping(0.3, "layers.0.q", owner, positions)
    expected = [[slow_kept(0.3, "layers.0.q", *token, n) for n in range(inputs)]
                for token in zip(owner, positions, strict=True)]  # fmt: skip
    assert layer.kept(torch.zeros(1, 5, inputs)).tolist() == [expected]
    assert layer.kept(torch.zeros(5, inputs)).tolist() == expected
    x = torch.randn(5, inputs)
    assert torch.allclose(layer(x), torch.where(torch.tensor(expected), x / 0.7, 0.0), rtol=1e-4)
    assert layer.eval()(x) is x


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_the_share_is_dropped_and_tokens_layers_and_inputs_are_apart(share: float) -> None:
    owner, positions = [n // 50 - 10 for n in range(1000)], [n % 50 for n in range(1000)]
    one, other = (dropping(share, layer, owner, positions).kept(torch.zeros(1000, 400)).double() for layer in "ab")
    assert abs(1 - share - float(one.mean())) < 0.005
    centred = one - one.mean()
    for neighbour in (other - other.mean(), centred.roll(1, 0), centred.roll(50, 0), centred.roll(1, 1)):
        assert abs(float((centred * neighbour).mean() / centred.square().mean())) < 0.01


def test_a_share_near_0_or_1_is_neither() -> None:
    levels = [TokenDropout(share, "", TokenKeys()).levels for share in (0.0, 1e-9, 0.5, 1 - 1e-9, 1.0)]
    assert levels == [1, 1, 1 << 15, (1 << 16) - 1, (1 << 16) - 1]


def test_of_all_levels_as_many_are_dropped_as_the_share_says(monkeypatch: pytest.MonkeyPatch) -> None:
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)[None]
    monkeypatch.setattr("grpo_dist.model.dropout.short_numbers", lambda keys, count: every)
    kept = dropping(0.3, "", [0], [0]).kept(torch.zeros(1, 1 << 16))
    assert int((~kept).sum()) == round(0.3 * (1 << 16))


def make_batch(shapes: list[tuple[int, list[int]]]) -> Batch:
    """A batch of prompts of given lengths with completions of given lengths."""
    generator = torch.Generator().manual_seed(0)
    prompts = [Prompt(g, torch.randint(61, (length,), generator=generator).tolist(), "")
               for g, (length, _) in enumerate(shapes)]  # fmt: skip
    lengths = torch.tensor([length for _, lengths in shapes for length in lengths])
    group = torch.tensor([g for g, (_, lengths) in enumerate(shapes) for _ in lengths])
    tokens, zeros = torch.randint(61, (int(lengths.sum()),), generator=generator), torch.zeros(len(lengths))
    return Batch(prompts, group, lengths, zeros > 0, tokens, tokens >= 0, tokens.float(), zeros[:, None], zeros)


def tiny_policy(dropout: float, checkpointing: bool = False) -> Policy:
    """A tiny policy whose adapters do something."""
    torch.manual_seed(0)
    base = Qwen2ForCausalLM(Qwen2Config(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                        num_attention_heads=4, num_key_value_heads=2))  # fmt: skip
    base.set_attn_implementation(attention.NAME)
    model, lora = ModelConfig(gradient_checkpointing=checkpointing), LoraConfig(r=4, dropout=dropout)
    policy = make_policy(base, model, lora)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return policy.train()


def gradient(policy: Policy, packs: list[list[Piece]], batch: Batch, key: int = KEY) -> dict[str, Tensor]:
    """Gradient of a weighted sum of all completion tokens' log-probabilities."""
    weights = torch.linspace(-1, 2, len(batch.tokens))
    policy.zero_grad()
    for pieces in packs:
        pack = make_pack(batch, pieces)
        (policy(pack, key)[0] * weights[pack.token]).sum().backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm of the first."""
    assert a.keys() == b.keys() and a
    return float(sum((a[n] - b[n]).square().sum() for n in a) ** 0.5 / sum(t.square().sum() for t in a.values()) ** 0.5)


SHAPES = [(4, [3, 5, 2]), (6, [4, 1])]
ONE = [[Piece(0, [0, 1, 2]), Piece(1, [3, 4])]]
CUT = [[Piece(1, [4]), Piece(0, [2])], [Piece(0, [1])], [Piece(0, [0]), Piece(1, [3])], []]


@pytest.mark.parametrize("way", ["fused", "peft", "checkpointing"])
def test_one_gradient_however_a_batch_is_packed(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(SHAPES)
    reference = gradient(tiny_policy(0.3), ONE, batch)
    if way == "peft":  # what ZeRO-3 runs
        monkeypatch.setattr("grpo_dist.model.lora.is_sharded", lambda _: True)
    policy = tiny_policy(0.3, way == "checkpointing")
    for packs in (ONE, CUT):
        assert difference(reference, gradient(policy, packs, batch)) < 1e-5
    assert difference(reference, gradient(policy, ONE, batch, KEY + 1)) > 0.1, "another update drops others"
    assert difference(reference, gradient(tiny_policy(0.0), ONE, batch)) > 0.1
    assert difference(reference, gradient(tiny_policy(0.0), CUT, batch)) > 0.1


def test_no_dropout_but_in_training() -> None:
    batch = make_batch(SHAPES)
    packs = [make_pack(batch, ONE[0])]
    policy, plain = tiny_policy(0.3), tiny_policy(0.0)
    with torch.no_grad():
        assert torch.equal(policy.eval()(packs[0])[0], plain(packs[0])[0])
        assert not torch.equal(policy.train()(packs[0])[0], plain(packs[0])[0])


def test_a_layer_that_reorders_tokens_is_refused() -> None:
    """An expert computes some of the row's tokens: which of its inputs belongs to which token is not known."""
    layer = dropping(0.1, "experts.3.up", [0, 0, 0], [0, 1, 2])
    for shape in ((2, 8), (1, 2, 8), (3, 1, 8)):
        with pytest.raises(ValueError, match=r"lora\.dropout: 0\.1 given.*experts\.3\.up"):
            layer(torch.zeros(shape))


def test_copies_draw_from_keys_of_their_own() -> None:
    policy = tiny_policy(0.3)
    other = copy.deepcopy(policy)
    layers = [module for module in other.modules() if isinstance(module, TokenDropout)]
    assert len(layers) == 14 and all(layer.tokens is other.token_keys for layer in layers)
    assert other.token_keys is not policy.token_keys
