"""What cannot be packed is named, never silently accepted; and the plain route is right for it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from small_models import batch_of
from tiny_architectures import GPT, LONGEST, MAMBA, UNPACKABLE, alone, make_config, make_model, sharp
from transformers import PretrainedConfig

from grpo_dist.algorithm.hashing import stream_key
from grpo_dist.config.schema import RolloutConfig
from grpo_dist.model import attention
from grpo_dist.model.config_files import short_window
from grpo_dist.model.fixed_row import fixed_logits
from grpo_dist.model.load import packing_obstacle
from grpo_dist.model.packing import make_pack, plan
from grpo_dist.model.policy import Policy, PolicyOptions
from grpo_dist.rollout import LoadedModel, NativeDecoder, Request, RowDecoder, Sampling, decode_all, probe
from grpo_dist.rollout.choose import make_engine
from grpo_dist.rollout.native.llama import LlamaStep
from grpo_dist.rollout.native.steps import module_step
from grpo_dist.rollout.own_attention import settle_attention
from grpo_dist.rollout.probe import bounds_leak, packing_leak
from grpo_dist.types import Prompt

PACKABLE: dict[str, dict[str, Any]] = {
    "Llama": {}, "Qwen2": {}, "Qwen3": {"head_dim": 8}, "Gemma": {"head_dim": 8},
    "Mistral": {"sliding_window": LONGEST},
    "Gemma3Text": {"head_dim": 8, "sliding_window": LONGEST}, "GPT2": GPT,
    "Gemma2": {"head_dim": 8, "sliding_window": LONGEST},
}  # fmt: skip


@pytest.mark.parametrize("name", PACKABLE)
def test_plain_decoders_are_packed(name: str) -> None:
    if name == "GPT2" and Version(transformers.__version__) < Version("5.3"):
        pytest.skip("before transformers 5.3 its model hands no layout on: one completion to a row")
    config = make_config(name, PACKABLE[name])
    assert packing_obstacle(config, LONGEST) is None
    assert packing_leak(make_model(config, attention.NAME)) is None


@pytest.mark.parametrize("name", UNPACKABLE)
def test_what_cannot_be_packed_is_named(name: str) -> None:
    """By its config or, once loaded as a run loads it, by its outputs; loading itself must not fail."""
    config = make_config(name, UNPACKABLE[name])
    obstacle = packing_obstacle(config, LONGEST)
    if obstacle is None:
        model = make_model(config, attention.NAME)
        if name == "GPTJ" and model._supports_attention_backend:
            pytest.skip("in this release its code takes another attention")
        obstacle = packing_leak(model)
    assert obstacle


@pytest.mark.parametrize(("name", "words"), [("Lfm2", "conv")])
def test_the_obstacle_says_what_it_is(name: str, words: str) -> None:
    assert words in str(packing_obstacle(make_config(name, UNPACKABLE[name]), LONGEST))


def test_a_window_that_no_layer_uses_is_none() -> None:
    config = make_config("Qwen2", {"use_sliding_window": False, "sliding_window": 8})
    assert packing_obstacle(config, LONGEST) is None and short_window(config, LONGEST) is None


WINDOWED: dict[str, dict[str, Any]] = {
    "Mistral": {"sliding_window": 6}, "Phi3": {"sliding_window": 6}, "Qwen3": {
        "head_dim": 8, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1,
    },
    "Gemma3Text": {"head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "Gemma2": {"head_dim": 8, "sliding_window": 6, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "GptOss": {"head_dim": 8, "sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2},
    "GraniteSWA": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
}  # fmt: skip
if not hasattr(transformers, "GraniteSWAConfig"):  # an older release
    del WINDOWED["GraniteSWA"]


@pytest.mark.parametrize("name", WINDOWED)
def test_layers_with_a_short_window_are_packed(name: str) -> None:
    config = make_config(name, WINDOWED[name])
    assert packing_obstacle(config, LONGEST) is None and short_window(config, LONGEST) == 6
    assert short_window(config, 6) is None
    model = make_model(config, attention.NAME)
    assert bounds_leak(model) is None
    assert model.config.sliding_window == 6 and model.config._attn_implementation == attention.NAME


@pytest.mark.parametrize("name", WINDOWED)
def test_rollouts_in_short_windows_are_those_of_the_models_own_attention(name: str) -> None:
    config = make_config(name, WINDOWED[name])
    prompts = [[(5 * k + n) % 57 + 3 for k in range(length)] for n, length in enumerate((3, 15))]
    requests = [Request(group, sample, prompts[group], stream_key(0, group, sample))
                for group in range(2) for sample in range(3)]  # fmt: skip
    expected = decode_all(RowDecoder([2, 9], 14), make_model(config, "eager"), requests)
    engine = make_engine(LoadedModel(make_model(config, attention.NAME)), None, [2, 9],
                         RolloutConfig(max_completion_length=14), alone)  # fmt: skip
    assert engine.decoding["decoding"] == ("operations" if name == "GptOss" else "compiled")
    for decoder in (engine.decoder, *(NativeDecoder([2, 9], 14, 1 << 20, step_of=step_of, copied_prompt=0)
                                      for step_of in (LlamaStep, module_step))):  # fmt: skip
        drawn = decode_all(decoder, make_model(config, attention.NAME), requests)
        assert [each.ids for each in drawn] == [each.ids for each in expected]
        assert all(abs(p - q) < 1e-4 for a, b in zip(drawn, expected, strict=True)
                   for p, q in zip(a.logprobs, b.logprobs, strict=True))  # fmt: skip


@pytest.mark.parametrize("name", ["Mistral", "Gemma2"])
def test_a_fixed_row_is_computed_in_windows_and_soft_caps(name: str) -> None:
    config = make_config(name, WINDOWED[name])
    packed, own = (fixed_logits(make_model(config, implementation)) for implementation in (attention.NAME, "eager"))
    assert torch.allclose(packed, own, atol=1e-4)


@contextmanager
def without(option: str) -> Iterator[None]:
    """A layout that leaves out an option of attention."""
    plain = attention.RowLayout.attend
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(attention.RowLayout, "attend", lambda self, *rows_and_options: plain(
            self, *rows_and_options[:-1], replace(rows_and_options[-1], **{option: None})))  # fmt: skip
        yield


def test_soft_caps_that_are_left_out_are_caught() -> None:
    model = make_model(make_config("Gemma2", WINDOWED["Gemma2"]), attention.NAME)
    with without("softcap"):
        assert "are off by" in str(bounds_leak(model))


def test_sinks_that_are_left_out_are_caught() -> None:
    model = make_model(make_config("GptOss", WINDOWED["GptOss"]), attention.NAME)
    with without("sinks"):
        assert "are off by" in str(bounds_leak(model))
        assert "are off by" in str(settle_attention([model], attention.NAME, None, False, alone))


def test_rounding_in_many_layers_is_no_fault_of_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the model's own attention rounds elsewhere, as a GPU's does: in 16 bits unlikely tokens then change by more
    than a nat."""
    monkeypatch.setattr(probe, "soft_cap", lambda _: 1.0)  # its own attention is then the eager one
    model = sharp("Mistral", WINDOWED["Mistral"], 8)
    assert bounds_leak(model) is None
    with without("window"):
        assert bounds_leak(model) is not None


def test_a_model_that_does_not_say_where_its_windows_are_is_caught() -> None:
    model = make_model(make_config("Mistral", {"sliding_window": 6}), attention.NAME)
    with without("window"):
        assert "do not say" in str(bounds_leak(model))


@pytest.mark.parametrize("name", ["Mamba", "Lfm2", "FalconH1", "Bamba"])
def test_recurrent_layers_are_seen_in_the_outputs_alone(name: str) -> None:
    """The config may not tell: an unknown architecture must be caught by what it computes."""
    assert packing_leak(make_model(make_config(name, UNPACKABLE[name]), attention.NAME)) is not None


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_model_that_ignores_the_layout_is_caught(implementation: str) -> None:
    assert packing_leak(make_model(make_config("Llama", {}), implementation))


def test_a_model_that_ignores_its_positions_is_caught() -> None:
    model = make_model(make_config("Llama", {}), attention.NAME)
    plain = model.forward

    def forward(position_ids: torch.Tensor | None = None, **inputs: Any) -> Any:
        return plain(position_ids=torch.arange(inputs["input_ids"].shape[1])[None], **inputs)

    model.forward = forward
    assert "off by" in str(packing_leak(model))


def test_experts_are_no_leak() -> None:
    """Experts gather tokens of the whole row: the last bits may differ, and that is rounding, not a leak."""
    experts = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    experts |= {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    for name in ("Mixtral", "Qwen2Moe", "Qwen3Moe"):
        assert packing_leak(make_model(make_config(name, experts), attention.NAME)) is None, name


def test_the_attention_without_a_layout_is_an_error() -> None:
    model = make_model(make_config("Llama", {}), attention.NAME)
    with pytest.raises(ValueError, match="layout"):
        model(input_ids=torch.arange(5)[None])


ROW_ROUTE: dict[str, PretrainedConfig] = {
    "sliding mistral": make_config("Mistral", {"sliding_window": 6}),
    "gemma2": make_config("Gemma2", {"head_dim": 8, "sliding_window": 6, "attn_logit_softcapping": 2.0,
                                     "final_logit_softcapping": 3.0}),
    "granite": make_config("Granite", {"logits_scaling": 4.0}),
    "cohere": make_config("Cohere", {"logit_scale": 0.25}),
    "mamba": make_config("Mamba", {"state_size": 4}),
    "bamba": make_config("Bamba", {"attn_layer_indices": [1], **MAMBA}),
}  # fmt: skip
if hasattr(transformers, "DoryConfig"):  # since 5.24; its layers run several times, and it ignores `past_key_values`
    dory = {"num_hidden_layers": 4, "n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1}
    ROW_ROUTE["dory"] = make_config("Dory", dory)


@pytest.mark.parametrize("name", ROW_ROUTE)
def test_the_row_route_is_right(name: str) -> None:
    """Rollout, then scoring in packs of one completion, against one plain forward of each sequence."""
    model = make_model(ROW_ROUTE[name], None)
    if name == "bamba" and model(torch.arange(3)[None], use_cache=True).get("past_key_values") is None:
        pytest.skip("this release of transformers hands the state of Bamba to nobody")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(3)
    lengths, temperature = [3, 15], 0.8
    prompts = [Prompt(n, [(5 * k + n) % 57 + 3 for k in range(length)], "") for n, length in enumerate(lengths)]
    requests = [Request(group, sample, prompts[group].ids, stream_key(0, group, sample))
                for group in range(2) for sample in range(3)]  # fmt: skip
    completions = decode_all(RowDecoder([2, 9], 14), model, requests, Sampling(temperature))
    assert any(len(c.ids) > 8 for c in completions)
    batch = batch_of(prompts, completions)
    policy = Policy(copy.deepcopy(model), PolicyOptions(temperature))
    planned = plan(lengths, batch.group.tolist(), batch.lengths.tolist(), [True] * 6, max_tokens=100, num_ranks=1,
                   share_prompts=False)  # fmt: skip
    scored = torch.full((len(batch.tokens),), torch.nan)
    with torch.no_grad():
        for pieces in planned[0]:
            pack = make_pack(batch, pieces, share_prompts=False)
            scored[pack.token] = policy(pack)[0]
        expected = []
        for request, completion in zip(requests, completions, strict=True):
            row = torch.tensor([request.prompt + completion.ids])
            logits = model(input_ids=row, use_cache=False).logits[0, len(request.prompt) - 1 : -1]
            rows = torch.log_softmax(logits / temperature, -1)
            expected.append(rows.gather(-1, torch.tensor(completion.ids)[:, None])[:, 0])
    assert torch.allclose(batch.sampled_logprobs, torch.cat(expected), atol=1e-4), "the engine's"
    assert torch.allclose(scored, torch.cat(expected), atol=1e-4), "the trainer's"
