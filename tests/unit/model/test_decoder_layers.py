"""Decoder layers as one operation, against their own code in float64, and the layers and calls that keep that code."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import silu
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP

from grpo_dist.config.schema import Config, LoraConfig
from grpo_dist.model import attention, decoder_layers, pack_kernels
from grpo_dist.model.attention import RowLayout
from grpo_dist.model.compiled import library as compiling
from grpo_dist.model.compiled.library import library
from grpo_dist.model.decoder_layers import fuse_decoder_layers
from grpo_dist.model.fused_modules import plain_modules
from grpo_dist.model.layout import Pieces
from grpo_dist.model.lora import fuse_adapters
from grpo_dist.model.pack_kernels import traced_kernels
from grpo_dist.model.peft import lora_layers, without_adapters
from grpo_dist.model.policy import PolicyOptions, recompute_layers

pytestmark = pytest.mark.usefixtures("kernel")

LONG = [(70, [1, 90, 0, 40]), (1, [130]), (33, []), (2, [3] * 20)]
"""More tokens than a block of them, and a block of less than a tile."""
SHORT = [(5, [2, 4]), (1, [1])]
SIZES = {"8": (40, 24, 5, 1), "16": (64, 48, 4, 2), "large": (288, 400, 9, 3)}
"""Hidden and intermediate size, query and key heads: for vectors of 8 and of 16, and of several blocks."""


def settings_of(size: str) -> dict[str, int]:
    """Of a model's config."""
    names = "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"
    return dict(zip(names, SIZES[size], strict=True)) | {"vocab_size": 61, "num_hidden_layers": 1}


def model_of(
    config: type[PreTrainedConfig],
    rank: int = 3,
    targets: str | list[str] = "all-linear",
    size: str = "16",
    **given: Any,
) -> Any:
    """A model whose adapters do something, frozen but for them."""
    torch.manual_seed(0)
    settings = config(**settings_of(size) | given)
    model = AutoModelForCausalLM.from_config(settings, attn_implementation=attention.NAME)
    generator = torch.Generator().manual_seed(0)
    if rank:
        model = get_peft_model(model, PeftLoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
        fuse_adapters(model)
        model = model.get_base_model()
    for name, parameter in model.named_parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
        parameter.requires_grad_("lora_" in name)
    return model


def layer_of(model: Any) -> Any:
    return model.model.layers[0]


def inputs_of(layer: Any, pieces: Pieces) -> tuple[Tensor, dict[str, Any]]:
    """What the layer of a model gets of a row of pieces."""
    tokens = sum(prompt + sum(completions) for prompt, completions in pieces)
    generator = torch.Generator().manual_seed(1)
    size = layer.self_attn.head_dim
    x, cos, sin = (torch.randn((1, tokens, n), generator=generator) for n in (layer.hidden_size, size, size))
    return x, {"position_embeddings": (cos, sin), "layout": RowLayout(pieces)}


def outcome(layer: Any, x: Tensor, named: dict[str, Any], of_input: bool = True) -> dict[str, Tensor]:
    """The output of a layer and all gradients, in the precision of the layer."""
    dtype = layer.mlp.down_proj.weight.dtype
    given = x.to(dtype, copy=True).requires_grad_(of_input)
    rotations = tuple(each.to(dtype) for each in named["position_embeddings"])
    y = layer(given, **named | {"position_embeddings": rotations})
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad} | ({"x": given} if of_input else {})
    grads = torch.autograd.grad(y, list(trained.values()), grad.to(dtype)) if trained else ()
    return {"y": y.detach(), **dict(zip(trained, grads, strict=True))}


@pytest.fixture
def calls(noted: Callable[..., list[str]]) -> list[str]:
    """The kernels that were called, in their order."""
    return noted(decoder_layers, "decoder_layer", "decoder_layer_backward")


def check(config: type[PreTrainedConfig], pieces: Pieces, of_input: bool = True, **given: Any) -> None:
    """A fused layer computes, to float32's precision, what the layer's own code does in float64."""
    model, exact = model_of(config, **given), layer_of(model_of(config, **given)).double()
    fuse_decoder_layers(model)
    x, named = inputs_of(exact, pieces)
    got, truth = outcome(layer_of(model), x, named, of_input), outcome(exact, x, named, of_input)
    assert got.keys() == truth.keys()
    for name, number in got.items():
        error = float((number - truth[name]).abs().max())
        assert error < 1e-5 * max(1.0, float(truth[name].abs().max())), name


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config])
def test_a_layer(config: type[PreTrainedConfig], size: str, calls: list[str]) -> None:
    check(config, LONG, size=size)
    check(config, [(1, [1])], size=size)
    assert calls == ["decoder_layer", "decoder_layer_backward"] * 2


@pytest.mark.parametrize("rank", [0, 1, 8, 17])
def test_ranks(rank: int, calls: list[str]) -> None:
    check(LlamaConfig, SHORT, rank=rank)
    assert len(calls) == 2


def test_adapters_of_some_layers(calls: list[str]) -> None:
    check(Qwen2Config, SHORT, targets=["v_proj", "down_proj"])
    assert len(calls) == 2


def test_an_input_without_a_gradient(calls: list[str]) -> None:
    """That of the first layer, behind embeddings that are not trained."""
    check(Qwen2Config, SHORT, of_input=False)
    assert len(calls) == 2


def test_a_scale_of_its_own(calls: list[str]) -> None:
    """Granite's layers without what makes them others."""
    check(GraniteConfig, LONG, residual_multiplier=1.0, attention_multiplier=0.3)
    assert len(calls) == 2


def test_layers_with_and_without_a_window() -> None:
    """Each keeps its own."""
    given = {"num_hidden_layers": 2, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
    model, exact = model_of(Qwen2Config, **given), model_of(Qwen2Config, **given).double()
    assert [layer.self_attn.sliding_window for layer in model.model.layers] == [None, 3]
    fuse_decoder_layers(model)
    for layer, truth in zip(model.model.layers, exact.model.layers, strict=True):
        x, named = inputs_of(layer, LONG)
        rotations = tuple(each.double() for each in named["position_embeddings"])
        expected = truth(x.double(), **named | {"position_embeddings": rotations})
        torch.testing.assert_close(layer(x, **named).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [3, 70, 500])
def test_windows(window: int, calls: list[str]) -> None:
    check(MistralConfig, LONG, sliding_window=window, head_dim=16)
    assert len(calls) == 2


def test_adapters_that_are_off(calls: list[str]) -> None:
    """The layer then is that of the base, to the last bit."""
    model, base = model_of(LlamaConfig), model_of(LlamaConfig, rank=0)
    fuse_decoder_layers(model)
    fuse_decoder_layers(base)
    layer, plain = layer_of(model), layer_of(base)
    for name, parameter in plain.named_parameters():
        parameter.data = layer.get_parameter(name.replace("_proj.", "_proj.base_layer.")).data
    x, named = inputs_of(plain, LONG)
    with without_adapters(lora_layers(model)):
        assert torch.equal(layer(x, **named), plain(x, **named))
    assert not torch.allclose(layer(x, **named), plain(x, **named), atol=0.1)
    assert calls == ["decoder_layer"] * 4


def test_a_token_is_computed_alike_in_any_row(all_threads: None) -> None:
    """To the last bit, whatever else is in the row and however many threads there are. The adapters' gradients, which
    are sums over all tokens, do not depend on the threads either."""
    model = model_of(Qwen2Config, size="large")
    layer = layer_of(model)
    fuse_decoder_layers(model)
    x, named = inputs_of(layer, LONG)
    whole = outcome(layer, x, named)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert all(torch.equal(got, whole[name]) for name, got in outcome(layer, x, named).items())
    start = 0
    for prompt, completions in LONG:
        tokens = slice(start, start := start + prompt + sum(completions))
        rotations = tuple(each[:, tokens] for each in named["position_embeddings"])
        alone = layer(x[:, tokens], position_embeddings=rotations, layout=RowLayout([(prompt, completions)]))
        assert torch.equal(alone, whole["y"][:, tokens])


def test_gradients_of_layers_that_are_recomputed(calls: list[str]) -> None:
    model = model_of(LlamaConfig)
    layer = layer_of(model)
    fuse_decoder_layers(model)
    x, named = inputs_of(layer, LONG)
    before = outcome(layer, x, named)
    recompute_layers(model)
    after = outcome(layer, x, named)
    assert all(torch.equal(after[name], number) for name, number in before.items())
    assert calls == [*["decoder_layer", "decoder_layer_backward"], *["decoder_layer"] * 2, "decoder_layer_backward"]


def is_fused(layer: nn.Module) -> bool:
    return "forward" in vars(layer)


@pytest.mark.parametrize(
    ("config", "given", "expected"),
    [
        (LlamaConfig, {}, True),
        (Qwen2Config, {}, True),
        (MistralConfig, {"head_dim": 24}, True),
        (LlamaConfig, {"attention_bias": True, "mlp_bias": True}, True),
        (LlamaConfig, {"hidden_act": "gelu"}, False),
        (LlamaConfig, {"intermediate_size": 20}, False),
        (LlamaConfig, {"intermediate_size": 1 << 15}, False),
        (GraniteConfig, {"residual_multiplier": 0.5}, False),  # with the same parts as Llama
        (Qwen3Config, {}, False),
        (Gemma2Config, {}, False),
    ],
)
def test_which_layers_are_recognised(config: type[PreTrainedConfig], given: dict[str, Any], expected: bool) -> None:
    model = model_of(config, **given)
    fuse_decoder_layers(model)
    assert is_fused(layer_of(model)) == expected


def test_a_layer_of_another_attention_is_not() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**settings_of("16")), attn_implementation="eager")
    fuse_decoder_layers(model)
    assert not is_fused(layer_of(model))


class Capped(LlamaAttention):
    """Cuts scores off."""

    def forward(self, *given: Any, **named: Any) -> Any:
        return super().forward(*given, softcap=10.0, **named)


class Clamped(LlamaMLP):
    """Cuts gates off where they are large."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x).clamp(max=7)) * self.up_proj(x))


class Doubled(nn.Linear):
    """A product that is not torch's."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Scaled(LlamaDecoderLayer):
    """Multiplies its output by a number of its own."""

    factor = 1.0

    def forward(self, *given: Any, **named: Any) -> Any:
        return super().forward(*given, **named) * self.factor


class Old(LlamaDecoderLayer):
    """Returns what layers did in older releases."""

    def forward(self, *given: Any, **named: Any) -> Any:
        return (super().forward(*given, **named),)


class Asking(LlamaDecoderLayer):
    """Asks for what a trial does not know."""

    def forward(self, *given: Any, **named: Any) -> Any:
        assert named.pop("extra")
        return super().forward(*given, **named)


def test_layers_that_compute_something_else_are_not() -> None:
    """Among others that are: each layer is tried."""
    model = model_of(LlamaConfig, rank=0, num_hidden_layers=9)
    layers = model.model.layers
    layers[1].post_attention_layernorm.variance_epsilon = 1e-5
    layers[2].self_attn.__class__ = Capped
    layers[3].mlp.up_proj = Doubled(64, 48, bias=False)
    layers[4].mlp.__class__ = Clamped
    for place, kind in {5: Scaled, 6: Scaled, 7: Old, 8: Asking}.items():
        layers[place].__class__ = kind
    layers[6].factor = 0.5
    fuse_decoder_layers(model)
    assert [place for place, layer in enumerate(layers) if is_fused(layer)] == [0, 5]


def test_calls_with_more_than_the_operation_knows(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """They go to the layer's own code, which computes the same."""
    model = model_of(Qwen2Config)
    layer = layer_of(model)
    fuse_decoder_layers(model)
    x, named = inputs_of(layer, SHORT)
    expected = layer(x, **named)
    assert calls.pop() == "decoder_layer"
    torch.testing.assert_close(layer(x, None, **named), expected)
    torch.testing.assert_close(layer(hidden_states=x, **named), expected)
    torch.testing.assert_close(layer(x, use_cache=True, **named), expected)
    torch.testing.assert_close(layer(x, other_argument=1, **named), expected)
    with plain_modules():
        torch.testing.assert_close(layer(x, **named), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x, **named).isfinite().all()
    cos, sin = named["position_embeddings"]
    with pytest.raises(RuntimeError, match="size"):  # of a part of each head, which the layer's own code does not know
        layer(x, **named | {"position_embeddings": (cos[..., :8], sin[..., :8])})
    layer.mlp.down_proj.merge()
    torch.testing.assert_close(layer(x, **named), expected, atol=1e-4, rtol=1e-4)
    layer.mlp.down_proj.unmerge()
    with monkeypatch.context() as context:
        context.setattr(decoder_layers, "drops", lambda layer: layer is layer_of(model).mlp.down_proj)
        torch.testing.assert_close(layer(x, **named), expected, atol=1e-4, rtol=1e-4)
    base = layer.mlp.up_proj.base_layer
    base.weight.data = base.weight.data.T.contiguous().T
    torch.testing.assert_close(layer(x, **named), expected)
    base.weight.data = base.weight.data.contiguous()
    layer.mlp.up_proj.base_layer.weight.requires_grad_()
    torch.testing.assert_close(layer(x, **named), expected)
    layer.bfloat16()(
        x.bfloat16(), **named | {"position_embeddings": [each.bfloat16() for each in named["position_embeddings"]]}
    )
    assert not calls
    with torch.no_grad():
        layer.float()(
            x, attention_mask=None, position_ids=torch.arange(13), use_cache=False, past_key_values=None, **named
        )
    assert not calls, "a weight is trained"
    layer.mlp.up_proj.base_layer.weight.requires_grad_(False)
    layer(x, attention_mask=None, position_ids=torch.arange(13), use_cache=False, past_key_values=None, **named)
    assert calls == ["decoder_layer"]


def test_parameters_that_are_replaced_are_let_go() -> None:
    """FSDP2 puts a part of each in its place: the whole ones would stay in memory."""
    model = model_of(LlamaConfig)
    fuse_decoder_layers(model)
    layer = layer_of(model)
    before = [weakref.ref(parameter) for parameter in layer.parameters()]
    for module in layer.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().clone())
    del parameter
    gc.collect()
    assert before and all(each() is None for each in before)


def test_which_policies_use_it() -> None:
    """Not those with dropout, nor those that train all weights: the operation knows neither."""
    assert PolicyOptions.of(Config(lora=LoraConfig())).fuses_layers
    assert not PolicyOptions.of(Config(lora=LoraConfig(dropout=0.1))).fuses_layers
    assert not PolicyOptions.of(Config(lora=None)).fuses_layers


def test_what_is_not_a_number_is_seen() -> None:
    """An update whose gradient is no number is skipped: the operation may make no number of it."""
    model = model_of(LlamaConfig)
    layer = layer_of(model)
    fuse_decoder_layers(model)
    x, named = inputs_of(layer, [(2, [3]), (1, [1])])
    x[0, 4, 0] = torch.nan  # the last token of the first sequence
    got = outcome(layer, x, named)
    assert got["y"].isnan().any(-1)[0, 4] and not got["y"][:, 5:].isnan().any()
    assert all(got[name].isnan().any() for name in got if "lora_" in name)


def test_tensors_without_memory(calls: list[str]) -> None:
    """The memory of a pass is predicted from tensors alone."""
    model = model_of(LlamaConfig)
    layer = layer_of(model)
    fuse_decoder_layers(model)
    x, named = inputs_of(layer, LONG)
    expected = {name: number.shape for name, number in outcome(layer, x, named).items()}
    mode = FakeTensorMode()
    for module in layer.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(mode.from_tensor(p.detach()), p.requires_grad)
    x, *rotations = map(mode.from_tensor, (x, *named["position_embeddings"]))
    with mode, traced_kernels():
        got = outcome(layer, x, named | {"position_embeddings": rotations})
    assert {name: number.shape for name, number in got.items()} == expected
    assert calls == ["decoder_layer", "decoder_layer_backward"] * 2


@pytest.mark.parametrize("flag", ["-DWIDE=", pytest.param("-march=x86-64", marks=pytest.mark.slow)])
def test_other_processors(flag: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, calls: list[str]) -> None:
    monkeypatch.setattr(compiling, "FLAGS", [*compiling.FLAGS, flag, "-O0"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.cache_clear()
    pack_kernels._code.cache_clear()
    try:
        for size in ("8", "16"):
            check(Qwen2Config, [(3, [2, 40]), (18, [1])], size=size)
        assert len(calls) == 4
    finally:
        library.cache_clear()
        pack_kernels._code.cache_clear()
