"""Quantised bases against dense models of the same values: what they compute, share, export and refuse."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from quantized_models import bnb, dequantised, moved
from small_models import IDS, LORA, logits, make_base, make_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, Phi3Config

from grpo_dist.config.schema import Config, ModelConfig, RolloutConfig
from grpo_dist.model import attention
from grpo_dist.model.compiled.library import library
from grpo_dist.model.config_files import load_model_config
from grpo_dist.model.export import save_final
from grpo_dist.model.files import UnfitModel, require_quantizable, require_unsharded
from grpo_dist.model.fused_modules import plain_modules
from grpo_dist.model.load import load_causal_lm, trainable
from grpo_dist.model.policy import Policy
from grpo_dist.model.quantization import quantize_blank
from grpo_dist.model.quantized import EightBitLinear, dequantize_layers, quantized_layers
from grpo_dist.model.rollout_weights import RolloutModel
from grpo_dist.planning.predict import Predictor
from grpo_dist.rollout import NativeDecoder, Request, decode_all
from grpo_dist.rollout.choose import make_engine, own_step
from grpo_dist.rollout.fidelity import update_share
from grpo_dist.rollout.native.kernel import KernelStep

KINDS = ["nf4", "int8"]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """A small model with tied embeddings."""
    return make_base(tmp_path_factory.mktemp("base"), tied=True)


def quantised(base: ModelConfig, kind: str) -> ModelConfig:
    """The same base, to be quantised when it is loaded."""
    return replace(base, quantization=kind)


def dense(model: nn.Module) -> nn.Module:
    """A copy with plain layers of the dequantised weights."""
    made = copy.deepcopy(model)
    dequantize_layers(made)
    return made


def gradients(policy: Policy) -> dict[str, Tensor]:
    """Of the adapters, for a fixed row."""
    for parameter in trainable(policy).values():
        parameter.grad = None
    with torch.autocast("cpu", torch.bfloat16, enabled=policy.causal_lm.dtype == torch.bfloat16):
        computed = policy.model(input_ids=IDS[None], use_cache=False).logits
    computed.float().square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in trainable(policy).items()}


@pytest.mark.parametrize("shape", [(64, 96), (24, 40), (8, 6)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "double"), [("nf4", True), ("nf4", False), ("fp4", True)])
def test_four_bits_are_dequantised_as_bitsandbytes_does(
    kind: str, double: bool, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    from grpo_dist.model.quantization import _four_bit

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(dtype)
    layer = bnb.nn.Linear4bit(shape[1], shape[0], bias=False, compress_statistics=double, quant_type=kind)
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=double, quant_type=kind).to("cpu")
    expected = dequantised(layer.weight)
    assert torch.equal(_four_bit(layer, dtype).weight, expected)
    assert 0 < float((expected - weight).norm() / weight.norm()) < 0.2


def test_eight_bits_are_dequantised_row_by_row(base: ModelConfig) -> None:
    loaded = load_causal_lm(quantised(base, "int8"), torch.float32, None)
    plain = load_causal_lm(base, torch.float32, None)
    for name, layer in quantized_layers(loaded).items():
        weight = plain.get_submodule(name).weight
        assert isinstance(layer, EightBitLinear)
        assert float((layer.weight - weight).abs().max()) <= 0.6 / 127 * float(weight.abs().max()), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_is_that_of_the_dequantised_base(kind: str, dtype: torch.dtype, base: ModelConfig) -> None:
    loaded = load_causal_lm(quantised(base, kind), dtype, None)
    assert len(quantized_layers(loaded)) == 14, "all but the head"
    on_plain = moved(dense(loaded))
    policy = moved(loaded)
    assert not any(p.is_floating_point() for layer in quantized_layers(policy).values()
                   for name, p in layer.named_parameters() if name != "bias")  # fmt: skip
    for adapters_on in (True, False):
        with torch.no_grad():
            if adapters_on:
                assert torch.equal(logits(policy.model, shared=False), logits(on_plain.model, shared=False))
            else:
                with policy.model.disable_adapter(), on_plain.model.disable_adapter():
                    assert torch.equal(logits(policy.model, shared=False), logits(on_plain.model, shared=False))
    got, expected = gradients(policy), gradients(on_plain)
    assert got.keys() == expected.keys() and any(float(each.norm()) > 0 for each in got.values())
    for name, gradient in expected.items():
        assert torch.equal(got[name], gradient), name


def test_a_gradient_after_an_evaluation_is_that_before(base: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU with AVX512_BF16, bitsandbytes' layers lose it."""
    import bitsandbytes.nn.modules as modules

    for flag in ("has_avx512bf16",):
        if hasattr(modules, flag):
            monkeypatch.setattr(modules, flag, lambda: True)
    policy = moved(load_causal_lm(quantised(base, "nf4"), torch.bfloat16, None))
    before = gradients(policy)
    with torch.no_grad():
        policy.eval().model(input_ids=IDS[None])
    after = gradients(policy)
    assert all(torch.equal(after[name], gradient) for name, gradient in before.items())
    assert not any(type(module).__module__.startswith("bitsandbytes") for module in policy.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_casting_a_model_leaves_the_stored_weights(kind: str, base: ModelConfig) -> None:
    """DeepSpeed casts all that are floating-point numbers."""
    loaded = load_causal_lm(quantised(base, kind), torch.bfloat16, None)
    before = {name: layer.weight for name, layer in quantized_layers(loaded).items()}
    loaded.to(torch.bfloat16)
    assert all(torch.equal(layer.weight, before[name]) for name, layer in quantized_layers(loaded).items())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_rollouts_have_the_values_of_the_quantised_base(kind: str, dtype: torch.dtype, base: ModelConfig) -> None:
    """With the policy's own codes, and with a dense copy, for decoding that does not take codes."""
    policy = moved(load_causal_lm(quantised(base, kind), dtype, attention.NAME))
    rollout, is_float32 = RolloutModel(policy, dtype, attention.NAME), dtype == torch.float32
    policys = {p.data_ptr() for p in policy.model.parameters()}
    share = pytest.approx(1, abs=1e-6 if is_float32 else 2e-2)
    with rollout.open() as model:
        with plain_modules():  # the trainer's kernels round otherwise
            assert torch.equal(logits(model), logits(policy.causal_lm))
        assert {p.data_ptr() for p in rollout.tree.parameters()} == policys
        assert update_share(model, merged=is_float32) == share
    rollout.dequantize()
    with rollout.open() as model:
        with plain_modules():
            assert torch.equal(logits(model), logits(policy.causal_lm))
        assert not quantized_layers(rollout.tree)
        assert update_share(model, merged=is_float32) == share
    assert all(p.is_meta for name, p in rollout.tree.named_parameters() if name.endswith("base_layer.weight"))


@pytest.fixture(scope="module")
def joint(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """A model with joint projections, and lines of 48 weights, which begin within a block of 64."""
    config = Phi3Config(vocab_size=257, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
                        num_attention_heads=3, num_key_value_heads=3, pad_token_id=0)  # fmt: skip
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("joint")
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return ModelConfig(name=str(path))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", ["base", "joint"])
def test_compiled_decoding_computes_with_codes(
    kind: str, dtype: torch.dtype, shape: str, request: pytest.FixtureRequest
) -> None:
    """As with the dense weights to the last bit, whatever else is in flight; with adapters, those stay apart."""
    loaded = load_causal_lm(quantised(request.getfixturevalue(shape), kind), dtype, attention.NAME)
    requests = [Request(group, n, IDS[group:].tolist(), key=10 * group + n) for group in range(3) for n in range(7)]

    def drawn(model: nn.Module, which: slice) -> list[list[float]]:
        decoder = NativeDecoder([-1], 9, 1 << 20, step_of=KernelStep, copied_prompt=0)
        return [each.logprobs for each in decode_all(decoder, model, requests[which])]

    expected = drawn(dense(loaded), slice(None))
    for which in (slice(None), slice(None, None, 7), slice(1, None, 3)):  # always some of each prompt
        assert drawn(loaded, which) == expected[which]
    rollout = RolloutModel(moved(loaded), dtype, attention.NAME)
    with rollout.open() as model:
        assert own_step(model) == ("compiled", None)
        got = drawn(model, slice(None))
    rollout.dequantize()
    with rollout.open() as model:
        expected = drawn(model, slice(None))
    if dtype == torch.bfloat16:  # adapters are apart from dense weights, too
        assert got == expected
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(("dequantize", "compiler"), [(True, "g++"), (True, "false"), (False, "false")])
def test_the_base_is_dequantised_where_decoding_does_not_take_codes(
    dequantize: bool, compiler: str, base: ModelConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    policy = moved(load_causal_lm(quantised(base, "nf4"), torch.float32, attention.NAME))
    rollout = RolloutModel(policy, torch.float32, attention.NAME)
    if compiler == "false":
        monkeypatch.setenv("CXX", compiler)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        library.cache_clear()
    engine = make_engine(rollout, None, [250], RolloutConfig(dequantize=dequantize), lambda mine: [mine])
    library.cache_clear()
    has_compiler = compiler == "g++"
    assert engine.decoding["decoding"] == ("compiled" if has_compiler else "operations")
    assert bool(quantized_layers(rollout.tree)) == (has_compiler or not dequantize)
    assert engine.update_share() == pytest.approx(1, abs=1e-6)


def test_layers_that_store_their_weight_transposed(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=257, n_embd=32, n_layer=1, n_head=2, n_positions=64))
    model.save_pretrained(tmp_path / "base")
    policy = moved(load_causal_lm(ModelConfig(str(tmp_path / "base"), quantization="nf4"), torch.float32, None))
    weights = RolloutModel(policy, torch.float32, None)
    weights.dequantize()
    with weights.open() as rollout:
        torch.testing.assert_close(logits(rollout, shared=False), logits(policy.causal_lm, shared=False))
    save_final(policy, make_tokenizer(), tmp_path / "final", is_main=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    torch.testing.assert_close(logits(merged, False), logits(policy.causal_lm, False), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_is_merged_into_the_dequantised_base(
    kind: str, base: ModelConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy = moved(load_causal_lm(quantised(base, kind), torch.float32, None))
    expected = logits(policy.causal_lm, shared=False)
    with caplog.at_level("INFO", logger="grpo_dist"):
        save_final(policy, make_tokenizer(), tmp_path / "final", is_main=True)
    assert "weights in float32 (the base dequantised), which keep 100.0%" in caplog.text
    assert "quantization_config" not in json.loads((tmp_path / "final/config.json").read_text())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float32)
    torch.testing.assert_close(logits(merged, shared=False), expected, rtol=1e-4, atol=1e-5)
    again = load_causal_lm(quantised(base, kind), torch.float32, None)
    adapted = PeftModel.from_pretrained(again, str(tmp_path / "final/adapter"))
    torch.testing.assert_close(logits(adapted, shared=False), expected, rtol=1e-5, atol=1e-6)
    plain = AutoModelForCausalLM.from_pretrained(base.name, dtype=torch.float32)
    assert not torch.allclose(logits(plain, shared=False), logits(again, shared=False), atol=1e-3)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UnfitModel, match=r"bitsandbytes, which is not installed: pip install 'grpo_dist\[quantized\]'"):
        require_quantizable(Config(model=ModelConfig(quantization="nf4")), None)


def test_options_that_exclude_a_quantised_base() -> None:
    with pytest.raises(UnfitModel, match=r"lora: null given with a base in nf4 \(model\.quantization\), expected adap"):
        require_quantizable(Config(model=ModelConfig(quantization="nf4"), lora=None), None)
    with pytest.raises(UnfitModel, match="given with ZeRO-3 or FSDP2, which would shard it, expected DDP"):
        require_unsharded(True, True)
    require_unsharded(True, False)
    require_unsharded(False, True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_blank_model_has_the_layers_of_the_loaded_one(kind: str, base: ModelConfig) -> None:
    loaded = load_causal_lm(quantised(base, kind), torch.bfloat16, None)
    with torch.device("meta"):
        blank = AutoModelForCausalLM.from_config(load_model_config(base), dtype=torch.bfloat16)
    quantize_blank(blank, kind, load_model_config(base), torch.bfloat16)
    sizes = {name: (p.shape, p.dtype) for name, p in loaded.named_parameters(remove_duplicate=False)}
    assert {name: (p.shape, p.dtype) for name, p in blank.named_parameters(remove_duplicate=False)} == sizes
    assert not hasattr(blank.config, "quantization_config") and not hasattr(loaded.config, "quantization_config")


def test_plan_knows_the_bytes() -> None:
    model = ModelConfig(dtype="bfloat16", quantization="nf4")
    config = Config(model=model, lora=LORA)
    config.data.max_prompt_length, config.rollout.max_completion_length, config.rollout.group_size = 16, 8, 2
    config.train.batch_size, config.train.max_tokens_per_pack = 2, 64
    on_cpu, on_gpu = (
        {part.name: part.num_bytes for part in Predictor(config, load_model_config(model), device).parts(2, "ZeRO-2")}
        for device in ("cpu", "gpu")
    )
    loaded = load_causal_lm(model, torch.bfloat16, None)
    layers = quantized_layers(loaded).values()
    assert on_cpu["frozen weights"] == on_gpu["frozen weights"] == sum(p.nbytes for p in loaded.parameters())
    assert on_gpu["dequantised base"] == sum(layer.weight.nbytes for layer in layers)
    assert "dequantised base" not in on_cpu
    assert on_cpu["weights of the step"] == sum(4 * len(layer.scales.stored) for layer in layers)
    assert "frozen copy" not in on_cpu, "the reference is the base, whatever reference.dtype is"
