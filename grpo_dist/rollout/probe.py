"""Does a model compute what a run assumes? Asked of the model itself, in a few tiny forward passes.

An architecture that ignores the layout of packs (state-space layers, linear attention, attention code of its own), that
sees later tokens, that draws random numbers while it is trained, or that does something to its logits after the head,
would train on wrong numbers without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..distributed.sharding import full_shape
from ..model import attention
from ..model.attention import RowLayout
from ..model.checks import CANNOT
from ..model.config_files import soft_cap
from ..model.packing import Pack
from ..model.policy import kept_logits
from ..model.routing import Routers
from . import NativeDecoder, Request, RowDecoder, decode_all

PROMPT, COMPLETIONS = 5, (4, 3)
NARROW = {"sliding_window": 3, "attn_logit_softcapping": 0.05}
"""Positions of a sliding window, and a soft cap of scores, that show in so few tokens of any weights."""
OFF = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.2}
"""Largest norm of an error of log-probabilities as a share of how these differ among tokens, by the dtype of a model's
weights. Rounding makes 0.05 of it in 30 layers in bfloat16, and a window that is one position off 0.7."""
NEW_TOKENS = 5
"""Enough for a step of decoding that is captured to be replayed twice."""


def example_tokens(model: nn.Module, count: int) -> Tensor:
    """Ids (count,) of different tokens, on the model's device."""
    embeddings = model.get_input_embeddings().weight
    return (torch.arange(count, device=embeddings.device) * 7 + 3) % full_shape(embeddings)[0]


@torch.no_grad()
def _outputs(model: nn.Module, ids: Tensor, completions: tuple[int, ...]) -> Tensor:
    """Log-probabilities (T, V) of a row of one prompt and its completions."""
    positions = torch.cat([torch.arange(PROMPT), *(torch.arange(PROMPT, PROMPT + length) for length in completions)])
    layout = RowLayout([(PROMPT, list(completions))]).to(ids.device)
    output = model(input_ids=ids[None], position_ids=positions[None].to(ids.device), use_cache=False, layout=layout)
    return torch.log_softmax(output.logits[0].float(), -1)


@torch.no_grad()
def _outputs_by_own_positions(model: nn.Module, ids: Tensor) -> Tensor:
    """Log-probabilities (T, V) of a sequence whose positions the model counts itself."""
    layout = RowLayout([(len(ids), [])]).to(ids.device)
    return torch.log_softmax(model(input_ids=ids[None], use_cache=False, layout=layout).logits[0].float(), -1)


def packing_leak(model: nn.Module) -> str | None:
    """Why packs with shared prompts, or rollouts with them, are wrong for this model; None where they are right.

    `model` was loaded with `attention.NAME` and has all its weights.
    """
    most = rounding(model)
    first, second = COMPLETIONS
    ids = example_tokens(model, PROMPT + first + second)
    changed = ids.clone()
    changed[PROMPT : PROMPT + first] = ids[PROMPT : PROMPT + first].flip(0)
    try:
        packed, disturbed = _outputs(model, ids, COMPLETIONS), _outputs(model, changed, COMPLETIONS)
        sequence = torch.cat([ids[:PROMPT], ids[PROMPT + first :]])
        alone, plain = _outputs(model, sequence, (second,)), _outputs_by_own_positions(model, sequence)
    except CANNOT as error:
        return f"its forward pass cannot take a pack: {type(error).__name__}: {error}"
    own, other = slice(PROMPT, PROMPT + first), slice(PROMPT + first, None)
    effect = float((packed[own] - disturbed[own]).abs().max())
    if effect == 0:
        return "outputs do not depend on the tokens of the pack"
    if float((packed[other] - disturbed[other]).abs().max()) > most * effect:
        return "one completion's output depends on another completion of the pack"
    dtype = next(model.parameters()).dtype
    if _is_off(plain, alone, dtype):
        return "its own code does not count positions from 0"
    if _is_off(packed[other], alone[PROMPT:], dtype):
        return f"log-probabilities are off by {float((packed[other] - alone[PROMPT:]).abs().max()):.2g}"
    try:
        decoded = decoding_error(model, tiny_decoder())
    except CANNOT as error:
        return f"it cannot be decoded with shared prompts: {type(error).__name__}: {error}"
    return f"log-probabilities are off by {decoded:.2g}" if decoded > most * max(effect, 1.0) else None


def _is_off(some: Tensor, others: Tensor, dtype: torch.dtype) -> bool:
    """Whether log-probabilities (T, V) of a model in `dtype` differ by more than rounding, which in 16 bits and many
    layers changes that of an unlikely token by a nat."""
    spread = others - others.mean(-1, keepdim=True)
    return float((some - others).norm()) > OFF[dtype] * float(spread.norm())


def bounds_of(model: nn.Module) -> list[tuple[Any, str, float]]:
    """The model's sliding windows and soft caps: who has them, their names and values."""
    return [(each, name, value) for each in [*model.modules(), model.config.get_text_config()] for name in NARROW
            if isinstance(value := getattr(each, name, None), int | float)]  # fmt: skip


def has_sinks(model: nn.Module) -> bool:
    """Whether attention of the model has sinks."""
    return any(getattr(each, "sinks", None) is not None for each in model.modules())


@contextmanager
def narrow_bounds(model: nn.Module) -> Iterator[None]:
    """Inside, every sliding window and every soft cap of the model is so narrow that it shows in a few tokens, for the
    model's own attention and for this project's."""
    bounds = bounds_of(model)
    try:
        for owner, name, _ in bounds:
            setattr(owner, name, NARROW[name])
        yield
    finally:
        for owner, name, before in bounds:
            setattr(owner, name, before)


@torch.no_grad()
def bounds_leak(model: nn.Module) -> str | None:
    """`packing_leak` of a model with sinks, or with sliding windows or soft caps that are narrow enough to show in a
    few tokens. With these the model has to compute what its own attention computes."""
    ids = example_tokens(model, PROMPT + max(COMPLETIONS))
    try:
        wide = _outputs_by_own_positions(model, ids)
        with narrow_bounds(model):
            narrow = _outputs_by_own_positions(model, ids)
            leak = packing_leak(model)
            takes_sdpa = soft_cap(model.config) is None and not has_sinks(model)
            model.set_attn_implementation("sdpa" if takes_sdpa else "eager")
            try:
                own = _row(model, ids)
            finally:
                model.set_attn_implementation(attention.NAME)
    except CANNOT as error:
        return f"its sliding windows, soft caps or sinks cannot be tried: {type(error).__name__}: {error}"
    if torch.equal(narrow, wide) and not has_sinks(model):
        return "its layers do not say that they have a sliding window or a soft cap"
    if leak is not None:
        return leak
    off, is_off = float((narrow - own).abs().max()), _is_off(narrow, own, next(model.parameters()).dtype)
    return f"log-probabilities with windows, caps or sinks are off by {off:.2g}" if is_off else None


@torch.no_grad()
def row_fault(model: nn.Module) -> str | None:
    """Why a sequence in a row of its own is computed wrongly by the model's own attention, or None.

    Later tokens must not change what comes before them, and decoding must compute what the row does.
    """
    most, length = rounding(model), PROMPT + NEW_TOKENS
    ids = example_tokens(model, length)
    changed = torch.cat([ids[:PROMPT], ids[PROMPT:].flip(0)])
    try:
        plain, disturbed = (_row(model, each) for each in (ids, changed))
        effect = float((plain[PROMPT:] - disturbed[PROMPT:]).abs().max())
        if float((plain[:PROMPT] - disturbed[:PROMPT]).abs().max()) > most * max(effect, 1.0):
            return "outputs depend on later tokens"
        requests = [Request(0, sample, ids[:PROMPT].tolist(), key=sample) for sample in range(2)]
        worst = 0.0
        for completion in decode_all(RowDecoder([-1], NEW_TOKENS), model, requests):
            sequence = torch.tensor([*ids[:PROMPT].tolist(), *completion.ids], device=ids.device)
            chosen = _row(model, sequence)[PROMPT - 1 : -1].gather(-1, sequence[PROMPT:, None])[:, 0]
            worst = max(worst, float((chosen.cpu() - torch.tensor(completion.logprobs)).abs().max()))
    except CANNOT as error:
        return f"{type(error).__name__}: {error}"
    is_off = worst > most * max(effect, 1.0)
    return f"decoding is off by {worst:.2g} nats from a forward pass over the same tokens" if is_off else None


def _row(model: nn.Module, ids: Tensor) -> Tensor:
    """Log-probabilities (T, V) of a plain row, asked for as an update does."""
    places = torch.arange(len(ids), device=ids.device)
    output = model(input_ids=ids[None], use_cache=False, logits_to_keep=places)
    return torch.log_softmax(kept_logits(output.logits[0], places).float(), -1)


def probe_pack(model: nn.Module, shared_prompts: bool) -> Pack:
    """A pack of one prompt and one completion."""
    ids = example_tokens(model, PROMPT + NEW_TOKENS)
    places = torch.arange(len(ids), device=ids.device)
    layout = RowLayout([(PROMPT, [NEW_TOKENS])]).to(ids.device) if shared_prompts else None
    own = places[:NEW_TOKENS]
    owner = torch.where(places < PROMPT, -1, 0)
    return Pack(
        ids, places, places[PROMPT - 1 : -1], ids[PROMPT:], own, torch.zeros_like(own), owner, layout, useful=len(ids)
    )


def _own_generators() -> AbstractContextManager[None]:
    """Inside, torch's generators may be changed. Those of other ranks' devices, which torch would visit with a warning,
    are not touched."""
    return torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else [])


@torch.no_grad()
def draws(compute: Callable[[], object]) -> bool:
    """Whether `compute` takes random numbers from torch's generators, which are left as they were."""
    states = [torch.get_rng_state, *([torch.cuda.get_rng_state] if torch.cuda.is_available() else [])]
    with _own_generators():
        before = [state() for state in states]
        compute()
        return not all(torch.equal(then, state()) for then, state in zip(before, states, strict=True))


@torch.no_grad()
def is_noisy(compute: Callable[[], Tensor]) -> bool:
    """Whether what `compute` returns depends on the state of the random number generators, beyond what the same state
    makes of it twice."""
    with _own_generators():
        outputs = []
        for seed in (0, 0, 0, 1, 2, 3):
            torch.manual_seed(seed)
            outputs.append(compute())
    same, others = (max(float((output - outputs[0]).abs().max()) for output in part)
                    for part in (outputs[1:3], outputs[3:]))  # fmt: skip
    return others > 4 * same + 1e-5


def tiny_decoder() -> NativeDecoder:
    """A decoder for a few tokens, which shares even a tiny prompt."""
    return NativeDecoder([-1], NEW_TOKENS, 1 << 20, captures=False, copied_prompt=0)


def rounding(model: nn.Module) -> float:
    """What sums in another order differ by, as experts and other shapes bring them; a leak is of the order of 1."""
    return 1e-3 if next(model.parameters()).dtype == torch.float32 else 0.1


def decoding_error(model: nn.Module, decoder: NativeDecoder) -> float:
    """Largest difference between the log-probabilities a rollout reports and those of its sequences in a row."""
    prompt = example_tokens(model, PROMPT).tolist()
    requests = [Request(0, sample, prompt, key=sample) for sample in range(2)]
    completions = decode_all(decoder, model, requests)
    ids = torch.tensor(prompt + [token for c in completions for token in c.ids], device=example_tokens(model, 1).device)
    rows = _outputs(model, ids, (NEW_TOKENS, NEW_TOKENS))
    worst = 0.0
    for number, completion in enumerate(completions):
        start = PROMPT + number * NEW_TOKENS
        for place, (token, logprob) in enumerate(zip(completion.ids, completion.logprobs, strict=True)):
            predictor = PROMPT - 1 if place == 0 else start + place - 1
            worst = max(worst, abs(float(rows[predictor, token]) - logprob))
    return worst


def routing_fault(model: nn.Module, shared_prompts: bool) -> str | None:
    """Why the experts that a rollout takes cannot be taken again in this model; None where they can."""
    try:
        routers = Routers(model)
    except ValueError as error:
        return str(error)
    try:
        return _replay_fault(model, routers, shared_prompts)
    except CANNOT as error:
        return f"its routers cannot be given experts: {type(error).__name__}: {error}"
    finally:
        routers.remove()


@torch.no_grad()
def _replay_fault(model: nn.Module, routers: Routers, shared_prompts: bool) -> str | None:
    pack = probe_pack(model, shared_prompts)
    count = len(pack.ids)
    layout = {} if pack.layout is None else {"position_ids": pack.positions[None], "layout": pack.layout}

    def logits(given: Tensor | None) -> Tensor:
        routers.given = given
        return model(input_ids=pack.ids[None], use_cache=False, **layout).logits[0].float()

    own = logits(None)
    if any(chosen.shape != (count, routers.experts_of_a_token) for chosen in routers.chosen):
        return "not every router chooses experts for every token by torch.topk"
    taken = routers.recorded()
    same, others = logits(taken), logits(((taken.long() + 1) % routers.num_experts).to(taken.dtype))
    if float((same - own).abs().max()) > rounding(model):
        return "it computes something else with the experts that it chose itself"
    if routers.experts_of_a_token < routers.num_experts and torch.equal(own, others):
        return "its experts do not depend on the choice"
    return None


@torch.no_grad()
def head_is_plain(model: nn.Module, shared_prompts: bool) -> bool:
    """Whether the model's logits are its last hidden states times its head, with nothing done to them in between.

    Models that scale or soft-cap their logits, or transform hidden states before the head, are not.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return False
    ids = example_tokens(model, PROMPT)
    inputs = {"input_ids": ids[None], "use_cache": False}
    if shared_prompts:
        positions = torch.arange(PROMPT, device=ids.device)
        inputs |= {"position_ids": positions[None], "layout": RowLayout([(PROMPT, [])]).to(ids.device)}
    try:
        logits = model(**inputs).logits[0].float()
        plain = linear(model.base_model(**inputs).last_hidden_state[0], head.weight, head.bias).float()
    except CANNOT:
        return False
    most = 1e-4 if head.weight.dtype == torch.float32 else 0.02
    return float((logits - plain).abs().max()) <= most * float(logits.abs().max())
