"""Does a model compute packs with shared prompts as it computes sequences one by one? Asked of the model itself.

An architecture that ignores the layout (state-space layers, linear attention, attention code of its own), or that does
something to its logits after the head, would train on wrong numbers without a word. A few tiny forward passes settle
it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .attention import block_layout
from .rollout import Engine, NativeEngine, Request, RowEngine, Sampling
from .rollout.cache import DecodeState
from .rollout.llama import LlamaStep
from .rollout.steps import Step, module_step, prefill

log = logging.getLogger(__name__)

PROMPT, COMPLETIONS = 5, (4, 3)
FAR = 500
"""A position at which it shows whether and how positions are encoded."""
NEW_TOKENS = 5
"""Enough for a step of decoding that is captured to be replayed twice."""
_CANNOT = (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError, NotImplementedError)


def _tokens(model: nn.Module, count: int) -> Tensor:
    embeddings = model.get_input_embeddings().weight
    return (torch.arange(count, device=embeddings.device) * 7 + 3) % embeddings.shape[0]


@torch.no_grad()
def _outputs(model: nn.Module, ids: Tensor, completions: tuple[int, ...]) -> Tensor:
    """Log-probabilities (T, V) of a row of one prompt and its completions."""
    positions = torch.cat([torch.arange(PROMPT), *(torch.arange(PROMPT, PROMPT + length) for length in completions)])
    layout = block_layout([(PROMPT, list(completions))]).to(ids.device)
    output = model(input_ids=ids[None], position_ids=positions[None].to(ids.device), use_cache=False, layout=layout)
    return torch.log_softmax(output.logits[0].float(), -1)


def packing_leak(model: nn.Module) -> str | None:
    """Why packs with shared prompts, or rollouts with them, are wrong for this model; None where they are right.

    `model` was loaded with `attention.NAME` and holds its whole weights.
    """
    rounding = _rounding(model)
    first, second = COMPLETIONS
    ids = _tokens(model, PROMPT + first + second)
    changed = ids.clone()
    changed[PROMPT : PROMPT + first] = ids[PROMPT : PROMPT + first].flip(0)
    try:
        packed, disturbed = _outputs(model, ids, COMPLETIONS), _outputs(model, changed, COMPLETIONS)
        alone = _outputs(model, torch.cat([ids[:PROMPT], ids[PROMPT + first :]]), (second,))
    except _CANNOT as error:
        return f"its forward pass cannot take a pack: {type(error).__name__}: {error}"
    own, other = slice(PROMPT, PROMPT + first), slice(PROMPT + first, None)
    effect = float((packed[own] - disturbed[own]).abs().max())
    if effect == 0:
        return "outputs do not depend on the tokens of the pack"
    if float((packed[other] - disturbed[other]).abs().max()) > rounding * effect:
        return "one completion's output depends on another completion of the pack"
    try:
        decoded = _decoding_error(model, _tiny_engine(captures=False))
        worst = max(float((packed[other] - alone[PROMPT:]).abs().max()), decoded)
    except _CANNOT as error:
        return f"it cannot be decoded with shared prompts: {type(error).__name__}: {error}"
    return f"log-probabilities are off by {worst:.2g}" if worst > rounding * max(effect, 1.0) else None


def make_engine(
    model: nn.Module, obstacle: str | None, end_ids: list[int], max_new_tokens: int, max_tokens_in_flight: int
) -> Engine:
    """The fastest engine that is right for a loaded model, and a line in the log that names it.

    `obstacle` says why its prompts cannot be shared; None where they can.
    """
    if obstacle is not None:
        log.info("rollouts: one group at a time, and completions are computed one to a row (%s)", obstacle)
        return RowEngine(end_ids, max_new_tokens)
    step_of = LlamaStep if decodes_as_llama(model) else module_step
    trial = _tiny_engine(captures=model.get_input_embeddings().weight.is_cuda, step_of=step_of)
    captures = trial.captures and _decoding_error(model, trial) < _rounding(model) and trial.captures
    log.info("rollouts: native engine, prompts are shared by their groups%s%s", ", CUDA graphs" if captures else "",
             "" if step_of is LlamaStep else ", decoding through the model's own modules")  # fmt: skip
    return NativeEngine(end_ids, max_new_tokens, max_tokens_in_flight, captures=captures, step_of=step_of)


@torch.inference_mode()
def decodes_as_llama(model: nn.Module) -> bool:
    """Whether a step of decoding in few operations has the logits of the model's own modules, far into a sequence."""
    tokens = _tokens(model, PROMPT)
    layout, _ = prefill(model, [tokens.tolist()])
    logits = []
    for step_of in (module_step, LlamaStep):
        state = DecodeState(tokens.device, 1, shares=True, whole_chunks=False)
        state.admit(layout, [2])
        state.make_room()
        state.begin_step()
        try:
            logits.append(step_of(model)(tokens[:2], torch.tensor([PROMPT, FAR], device=tokens.device), state).float())
        except _CANNOT:
            return False
    theirs, ours = (each - each.mean(-1, keepdim=True) for each in logits)
    rounding = 1e-4 if next(model.parameters()).dtype == torch.float32 else 0.01
    return float((ours - theirs).norm()) <= rounding * float(theirs.norm())


def _tiny_engine(captures: bool, step_of: Callable[[nn.Module], Step] = module_step) -> NativeEngine:
    """An engine for a few tokens, which shares even a tiny prompt; it gives up `captures` where that fails."""
    return NativeEngine([-1], NEW_TOKENS, 1 << 20, step_of=step_of, captures=captures, copied_prompt=0)


def _rounding(model: nn.Module) -> float:
    """What sums in another order differ by, as experts and other shapes bring them; a leak is of the order of 1."""
    return 1e-3 if next(model.parameters()).dtype == torch.float32 else 0.1


def _decoding_error(model: nn.Module, engine: NativeEngine) -> float:
    """Largest difference between the log-probabilities a rollout reports and those of its sequences in a row."""
    prompt = _tokens(model, PROMPT).tolist()
    requests = [Request(0, sample, prompt, key=sample) for sample in range(2)]
    completions = engine.generate(model, requests, Sampling())
    ids = torch.tensor(prompt + [token for c in completions for token in c.ids], device=_tokens(model, 1).device)
    rows = _outputs(model, ids, (NEW_TOKENS, NEW_TOKENS))
    worst = 0.0
    for number, completion in enumerate(completions):
        start = PROMPT + number * NEW_TOKENS
        for place, (token, logprob) in enumerate(zip(completion.ids, completion.logprobs, strict=True)):
            predictor = PROMPT - 1 if place == 0 else start + place - 1
            worst = max(worst, abs(float(rows[predictor, token]) - logprob))
    return worst


@torch.no_grad()
def head_is_plain(model: nn.Module, shared_prompts: bool) -> bool:
    """Whether the model's logits are its last hidden states times its head, with nothing done to them in between.

    Models that scale or soft-cap their logits, or transform hidden states before the head, are not.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return False
    ids = _tokens(model, PROMPT)
    inputs = {"input_ids": ids[None], "use_cache": False}
    if shared_prompts:
        positions = torch.arange(PROMPT, device=ids.device)
        inputs |= {"position_ids": positions[None], "layout": block_layout([(PROMPT, [])]).to(ids.device)}
    logits = model(**inputs).logits[0].float()
    plain = linear(model.base_model(**inputs).last_hidden_state[0], head.weight, head.bias).float()
    rounding = 1e-4 if head.weight.dtype == torch.float32 else 0.02
    return float((logits - plain).abs().max()) <= rounding * float(logits.abs().max())
