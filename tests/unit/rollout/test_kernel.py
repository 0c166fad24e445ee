"""The compiled step of decoding: what it computes is what the model computes, for whoever else is in flight."""

from __future__ import annotations

import copy
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from decoded_steps import GEMMA2, GRANITE, PROMPTS, STEPS, adapted, decoded, make_model, tokens_of
from torch import Tensor, nn

from grpo_dist.algorithm.hashing import uniforms
from grpo_dist.model.compiled import library as compiling
from grpo_dist.model.compiled.library import library
from grpo_dist.rollout.native import kernel
from grpo_dist.rollout.native.cache import DecodeState
from grpo_dist.rollout.native.kernel import KernelStep
from grpo_dist.rollout.native.llama import linear_of
from grpo_dist.rollout.native.relaid import CompactWeights
from grpo_dist.rollout.native.steps import module_step, prefill
from grpo_dist.rollout.sampling import Rules, Sampling, draw

pytestmark = pytest.mark.usefixtures("kernel")


@pytest.mark.parametrize("shares", [True, False], ids=["shared", "copied"])
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("qwen2", {}), ("llama", {"attention_bias": True, "mlp_bias": True}), ("llama", {"num_key_value_heads": 4}),
     ("qwen3", {"head_dim": 24}), ("qwen3", {"head_dim": 128}),
     ("llama", {"hidden_size": 40, "intermediate_size": 56, "head_dim": 8}), ("qwen2", {"head_dim": 80}),
     ("qwen2", {"hidden_size": 1040, "intermediate_size": 1200}), ("phi3", {}), ("mistral", {"sliding_window": 4}),
     ("gemma2", GEMMA2), ("gemma3", {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}),
     ("granite", GRANITE)],
    ids=["qwen2", "biases", "heads-of-their-own", "head-24", "head-128", "multiples-of-8", "head-80", "large",
         "joint", "window", "gemma2", "gemma3", "granite"],
)  # fmt: skip
def test_it_computes_what_the_model_does(kind: str, sizes: dict[str, Any], shares: bool) -> None:
    """Against the model's own modules in twice the precision."""
    model = make_model(kind, **sizes)
    exact = decoded(module_step, copy.deepcopy(model).double(), [7, 1, 33], shares)
    got = decoded(KernelStep, model, [7, 1, 33], shares)
    assert float((got - exact).abs().max()) < 1e-4 * float(exact.abs().max())


@pytest.mark.parametrize("shares", [True, False], ids=["shared", "copied"])
def test_weights_in_bfloat16_are_summed_in_float32(shares: bool) -> None:
    model = make_model().bfloat16()
    exact = decoded(module_step, copy.deepcopy(model).double(), [3, 2, 3], shares)
    off = {step_of: float((decoded(step_of, model, [3, 2, 3], shares) - exact).norm() / exact.norm())
           for step_of in (KernelStep, module_step)}  # fmt: skip
    # a third, or half where the processor multiplies bfloat16, for which inputs are rounded
    assert off[KernelStep] < 0.7 * off[module_step] < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_tokens_enter_as_by_single_steps(dtype: torch.dtype) -> None:
    """To the last bit, for rows of different prompts and lengths, and where a part of the rows is computed."""
    model, rows = make_model("qwen3").to(dtype), torch.tensor([5, 0, 1])
    expected = decoded(KernelStep, model, [3, 2, 3], shares=True)
    layout, _ = prefill(model, PROMPTS)
    state = DecodeState(torch.device("cpu"), STEPS, shares=True, whole_chunks=False)
    state.admit(layout, [3, 2, 3])
    lengths, tokens, step = torch.tensor([9, 20, 1]), tokens_of(torch.arange(8)), KernelStep(model)
    state.make_room(20)
    entered = [(int(tokens[slot, row]), row, slot) for row, length in zip(rows.tolist(), lengths.tolist(), strict=True)
               for slot in range(length)]  # fmt: skip
    step.enter(*torch.tensor(entered).T.contiguous(), state)
    state.set_lengths(rows, lengths)
    state.make_room()
    state.begin_step(rows)
    positions = state.prompt_lengths[state.prompt[rows]] + lengths
    logits = step(tokens[lengths, rows], positions, state)
    assert torch.equal(logits.double(), expected[lengths, rows])
    state.end_step()
    assert torch.equal(state.lengths[rows], lengths + 1) and int(state.lengths.sum()) == int(lengths.sum()) + 3


@pytest.mark.parametrize(("kind", "options"), [("qwen3", {}), ("gemma2", GEMMA2), ("mistral", {"sliding_window": 4})])
@torch.inference_mode()
def test_prompts_are_computed_as_by_the_model(
    kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And to the last bit each as by itself, in however many passes."""
    model = make_model(kind, **options)
    (exact, exact_logits), (got, logits) = (
        prefill(copy.deepcopy(model).double(), PROMPTS),
        KernelStep(model).prefill(PROMPTS),
    )
    stores = list(zip(got.by_prompt(), exact.by_prompt(), strict=True))
    for ours, theirs in [(logits, exact_logits), *((store[n], other[n]) for n in (0, 1) for store, other in stores)]:
        assert float((ours - theirs).abs().max()) < 1e-4 * float(theirs.abs().max())
    monkeypatch.setattr(kernel, "ENTERED_AT_ONCE", 7)
    for n, prompt in enumerate(PROMPTS):
        alone, own_logits = KernelStep(model).prefill([prompt])
        assert torch.equal(own_logits[0], logits[n])
        assert torch.equal(alone.keys[1][0], got.keys[1][n, :, : len(prompt)])


def few(model: nn.Module) -> KernelStep:
    return KernelStep(model, compact=CompactWeights(lambda _: False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes", [{"intermediate_size": 128}, {"hidden_size": 192, "intermediate_size": 2112, "head_dim": 32}]
)
def test_compact_weights_change_no_bit(sizes: dict[str, int], dtype: torch.dtype) -> None:
    """Of 1 to 16 rows, in one tile and in two; more are computed from the weights. The large ones are of several parts,
    and not all of their blocks take 12 bits a number."""
    model = make_model(**sizes).bfloat16().to(dtype)
    model.model.layers[1].mlp.down_proj.weight.data[:, ::37] *= 2**-20
    step = few(model)
    assert all(linear.compact.blocks for layer in step.layers for linear in (layer.query, layer.up, layer.down))
    assert step.step.head.compact.blocks and step.step.vocabulary == 61
    for count in (1, 2, 3, 4, 5, 6, 7, 12, 13, 16, 17):
        rows = torch.arange(count)
        assert torch.equal(
            decoded(few, model, [3, 2, 12], True, rows), decoded(KernelStep, model, [3, 2, 12], True, rows)
        )


def test_weights_that_bfloat16_does_not_hold_are_not_compact() -> None:
    model = make_model(intermediate_size=128).bfloat16().float()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[7, -1] += 1e-6
    first, second = few(model).layers
    assert first.down.compact.blocks and not second.down.compact.blocks and second.up.compact.blocks
    assert not any(layer.up.compact.blocks for layer in KernelStep(model).layers)


def test_in_bfloat16_only_weights_whose_memory_is_kept_are_compact(monkeypatch: pytest.MonkeyPatch) -> None:
    half = make_model(intermediate_size=128).bfloat16()
    size = 2 * sum(module.weight.numel() for module in half.modules() if isinstance(module, nn.Linear))
    for most, is_compact in ((size, True), (size - 1, False)):
        monkeypatch.setattr(kernel, "MOST_SPARE_BYTES", most)
        assert all(bool(layer.up.compact.blocks) == is_compact for layer in few(half).layers)
    assert all(layer.up.compact.blocks for layer in few(copy.deepcopy(half).float()).layers)


@pytest.mark.parametrize("targets", ["all-linear", ["lm_head", "q_proj"]])
def test_adapters_stay_apart_from_weights_that_bfloat16_holds(targets: list[str] | str) -> None:
    model = make_model(vocab_size=72, intermediate_size=128).bfloat16().float()
    model = adapted(model, 5, targets, learned=0.05)
    exact = copy.deepcopy(model).double()
    for module in exact.modules():  # PEFT's own way, and not the fused one of the layer it was copied from
        module.__dict__.pop("forward", None)
    step = few(model)
    assert step.layers[0].query.rank == 5 and KernelStep(model).layers[0].query.rank == 0
    for rows in (torch.arange(3), None):
        expected = decoded(module_step, exact, [3, 2, 3], True, rows)
        assert float((decoded(few, model, [3, 2, 3], True, rows) - expected).abs().max()) < 1e-4 * float(
            expected.abs().max()
        )


def in_double(model: nn.Module) -> nn.Module:
    """A model of the same numbers, its adapters those that a layer in bfloat16 computes with."""
    twin = copy.deepcopy(model)
    for module in twin.modules():  # PEFT's own way, and not the fused one of the layer it was copied from
        module.__dict__.pop("forward", None)
    for name, parameter in twin.named_parameters():
        parameter.data = (parameter.bfloat16() if ".lora_" in name else parameter.data).double()
    return twin


@pytest.mark.parametrize(
    ("kind", "rank", "targets", "sizes"),
    [("qwen2", 5, "all-linear", {}), ("gemma2", 4, "all-linear", GEMMA2), ("phi3", 3, "all-linear", {}),
     ("granite", 3, "all-linear", GRANITE),
     ("qwen3", 16, ["q_proj", "v_proj", "up_proj"], {"head_dim": 24}),
     ("llama", 1, ["o_proj", "down_proj"], {"hidden_size": 40, "intermediate_size": 56, "head_dim": 8}),
     ("llama", 33, ["k_proj", "gate_proj", "lm_head"], {"vocab_size": 72, "hidden_size": 1040})],
    ids=["all", "gemma2", "joint", "granite", "three", "two", "head"],
)  # fmt: skip
def test_adapters_stay_apart_in_bfloat16(kind: str, rank: int, targets: list[str] | str, sizes: dict[str, Any]) -> None:
    model = adapted(make_model(kind, **sizes).bfloat16(), rank, targets, learned=0.05)
    exact = decoded(module_step, in_double(model), [3, 2, 3], True)
    off, rounded = (decoded(step_of, model, [3, 2, 3], True) - exact for step_of in (KernelStep, module_step))
    assert float(off.norm()) < 0.7 * float(rounded.norm()) < 0.05 * float(exact.norm())
    for name, module in model.named_modules():  # without them it is another model
        if name.endswith("lora_B.default"):
            module.weight.data.zero_()
    assert float((decoded(KernelStep, model, [3, 2, 3], True) - exact).norm()) > 2 * float(rounded.norm())


def merged_in_bfloat16(model: nn.Module) -> nn.Module:
    """A model whose adapters are added to its weights, which loses most of what they add."""
    twin = copy.deepcopy(model)
    for name, module in [each for each in twin.named_modules() if hasattr(each[1], "lora_A")]:
        plain = module.base_layer
        plain.weight.data = linear_of(module).merged()
        twin.set_submodule(name, plain)
    return twin


def test_an_update_too_small_for_bfloat16_changes_the_logits() -> None:
    """In the last layer, behind everything that is rounded for the cache. What is rounded behind it has no bias."""
    targets, sizes = r".*layers\.1\.(self_attn\.o_proj|mlp\.(gate|up|down)_proj)", [24, 16, 24]
    drawn: list[list[Tensor]] = []
    for learned in (0.0, 1e-4):
        model = adapted(make_model().bfloat16(), 4, targets, learned)
        ways = (module_step, in_double(model)), (KernelStep, model), (KernelStep, merged_in_bfloat16(model))
        drawn.append([decoded(step_of, each, sizes, True) for step_of, each in ways])
    exact, apart, merged = (now - before for before, now in zip(*drawn, strict=True))
    share = [float((change * exact).sum() / exact.square().sum()) for change in (apart, merged)]
    assert share[0] == pytest.approx(1, abs=0.1) and share[1] < 0.3, share


@pytest.mark.parametrize("vocabulary", [61, 64, 67])
def test_adapters_on_a_head_of_any_size(vocabulary: int) -> None:
    model = adapted(make_model(vocab_size=vocabulary).bfloat16(), 2, ["lm_head"], learned=0.5)
    plain = make_model(vocab_size=vocabulary).bfloat16()
    exact = decoded(module_step, in_double(model), [3, 2, 1], True)
    got, without = decoded(KernelStep, model, [3, 2, 1], True), decoded(KernelStep, plain, [3, 2, 1], True)
    assert float((got - exact).abs().max()) < 0.02 * float(exact.abs().max()) < float((without - exact).abs().max())


@pytest.mark.parametrize("shares", [True, False], ids=["shared", "copied"])
@pytest.mark.parametrize(
    ("dtype", "step_of", "kind", "options"),
    [(torch.float32, KernelStep, "qwen2", {}), (torch.bfloat16, KernelStep, "qwen2", {}),
     (torch.float32, few, "qwen2", {}), (torch.bfloat16, few, "qwen2", {}),
     (torch.float32, KernelStep, "gemma2", GEMMA2)],
    ids=["float32", "bfloat16", "few", "few-bfloat16", "gemma2"],
)  # fmt: skip
def test_no_bit_depends_on_the_others_in_flight_or_on_threads(
    shares: bool, dtype: torch.dtype, step_of: Any, kind: str, options: dict[str, Any]
) -> None:
    """With windows that leave the prompts of some rows sooner than those of others, too."""
    hidden = 528 if dtype == torch.float32 else 544  # of which pairs of numbers fill whole vectors, too
    shape = {"hidden_size": hidden, **options} if step_of is KernelStep else {"hidden_size": 576,
             "intermediate_size": 128}  # fmt: skip
    model = adapted(make_model(kind, **shape).bfloat16().to(dtype), 6, "all-linear", learned=0.05)
    sizes = [9, 8, 26]
    together = decoded(step_of, model, sizes, shares)
    for rows in ([0], [42], [3, 4, 9, 10], [1, 2, 3, 4, 5], list(range(5, 43))):
        assert torch.equal(decoded(step_of, model, sizes, shares, torch.tensor(rows)), together[:, rows])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 2)
        assert torch.equal(decoded(step_of, model, sizes, shares), together)
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode()
def test_it_follows_the_cache() -> None:
    """One step for caches with and without shared prompts in turn."""
    model = make_model()
    step, sizes = KernelStep(model), [2, 1, 2]
    for shares in (True, False, True):
        assert torch.equal(decoded(lambda _: step, model, sizes, shares), decoded(KernelStep, model, sizes, shares))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names a processor of another kind")
@pytest.mark.parametrize("flag", [
    "-march=x86-64", pytest.param("-march=x86-64-v3", marks=pytest.mark.slow),
    "-DWIDE=",  # the tiles of AVX-512, in the instructions that there are
    "-DPAIRS=",  # products of bfloat16, too
])  # fmt: skip
def test_other_processors(flag: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compiling, "FLAGS", [*compiling.FLAGS, flag, "-O0"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.cache_clear()
    try:
        for head_dim in (16, 24):
            model = make_model("qwen3", head_dim=head_dim, intermediate_size=128).bfloat16().float()
            exact = decoded(module_step, copy.deepcopy(model).double(), [3, 1, 5], True)
            got = decoded(KernelStep, model, [3, 1, 5], True)
            assert float((got - exact).abs().max()) < 1e-4 * float(exact.abs().max())
            assert torch.equal(decoded(few, model, [3, 1, 5], True), got)
            half = model.bfloat16()
            if flag == "-DPAIRS=" and head_dim == 16:
                assert KernelStep(half).longest_entered == kernel.LONGEST_ENTERED, "else no pair was multiplied"
            assert torch.equal(decoded(few, half, [3, 1, 5], True), decoded(KernelStep, half, [3, 1, 5], True))
            off, rounded = (decoded(step_of, half, [3, 1, 5], True) - exact for step_of in (KernelStep, module_step))
            assert float(off.norm()) < 0.7 * float(rounded.norm()) < 0.05 * float(exact.norm())
    finally:
        library.cache_clear()


@pytest.mark.parametrize("size", [7, 130, 1000, 50_000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_token_is_drawn_where_the_running_sum_passes_the_noise(size: int, temperature: float) -> None:
    """Against running sums in float64: where they pass, but for rounding, and never a token that cannot be."""
    g = torch.Generator().manual_seed(size)
    rows = 200
    logits = 3 * torch.randn(rows, size, generator=g)
    logits[:, ::3] = -torch.inf
    logits[0], logits[0, size - 1] = -torch.inf, 0.5
    logits[1, 1] = 300
    keys = torch.randint(-(2**62), 2**62, (rows,), generator=g)
    places = torch.arange(rows) % 9
    tokens, logprobs = KernelStep(make_model()).draw(logits, keys, places, Sampling(temperature))
    exact = (logits.double() / temperature).log_softmax(-1)
    running, at = exact.exp().cumsum(-1), tokens[:, None]
    u = uniforms(keys, places)[:, None]
    assert bool((running.gather(-1, at) > u - 1e-6).all())
    assert bool(((running - exact.exp()).gather(-1, at) <= u + 1e-6).all())
    assert not bool(exact.gather(-1, at).isinf().any())
    torch.testing.assert_close(logprobs.double(), exact.gather(-1, at)[:, 0], rtol=0, atol=3e-6)
    assert tokens[:2].tolist() == [size - 1, 1]


def test_what_is_drawn_of_a_row_depends_on_it_alone() -> None:
    g = torch.Generator().manual_seed(0)
    logits, keys = 3 * torch.randn(64, 1000, generator=g), torch.arange(64)
    step = KernelStep(make_model())
    tokens, logprobs = step.draw(logits, keys, keys, Sampling())
    for n in range(64):
        each = slice(n, n + 1)
        token, logprob = step.draw(logits[each], keys[each], keys[each], Sampling())
        assert (token, logprob) == (tokens[n], logprobs[n])


@pytest.mark.parametrize("sampling", [
    Sampling(top_p=0.5), Sampling(top_k=3), Sampling(min_p=0.1), Sampling(greedy=True), Sampling(banned=(4,)),
    Sampling(min_new_tokens=5),
])  # fmt: skip
def test_tokens_that_may_not_be_drawn_are_not(sampling: Sampling) -> None:
    g = torch.Generator().manual_seed(0)
    logits, keys = torch.randn(500, 20, generator=g), torch.arange(500)
    rules = Rules(sampling, [2], torch.device("cpu"))
    got, expected = (drawn(logits, keys, keys % 9, sampling, rules) for drawn in (KernelStep(make_model()).draw, draw))
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
