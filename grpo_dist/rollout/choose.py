"""Which decoder draws a run's completions: the fastest that computes what the loaded model computes."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..config.rollout import RolloutConfig
from ..distributed.agreement import Gather, first_fault
from ..model.checks import CANNOT
from ..model.compiled.library import CannotCompile
from ..model.fixed_row import most_positions
from ..model.fused_modules import plain_modules
from ..model.peft import lora_layers, without_adapters
from ..model.quantized import quantized_layers
from ..model.routing import routers_of
from ..model.triton_trial import triton_obstacle
from ..types import Trajectory
from . import LocalEngine, NativeDecoder, PagedDecoder, Request, RowDecoder, decode_all, paged_obstacle
from .local import Weights
from .native.cache import DecodeState, PrefillLayout
from .native.graphs import CannotCapture
from .native.kernel import KernelStep
from .native.llama import LlamaStep
from .native.relaid import CompactWeights
from .native.steps import Step, module_step, prefill
from .probe import NEW_TOKENS, PROMPT, bounds_of, example_tokens, narrow_bounds, rounding
from .room import ON_CPU, BoundedDecoder, WithinMemory

if TYPE_CHECKING:
    from .native.pages import PagePool

log = logging.getLogger(__name__)

FAR = 500
"""A position at which it shows whether and how positions are encoded."""
SAME = 1e-6
"""Most nats between log-probabilities of the same kernels, launched one by one or as a graph."""


def fused_step(model: nn.Module) -> Step:
    """The step in fused kernels over pages. Raises ImportError where there is no Triton."""
    from .native.fused import FusedStep

    return FusedStep(model)


STEPS: dict[str, Callable[[nn.Module], Step]] = {
    "modules": module_step, "operations": LlamaStep, "compiled": KernelStep, "pages": module_step, "fused": fused_step,
}  # fmt: skip
"""How a step of decoding may be computed, by the name a checkpoint keeps; from slow to fast."""
OVER_PAGES = ("pages", "fused")
"""Those of STEPS whose keys and values lie in pages; for a GPU with Triton."""
DESCRIPTIONS = {"modules": "decoding through the model's own modules", "operations": "decoding in few operations",
                "compiled": "decoding in C++", "pages": "decoding through the model's own modules over pages",
                "fused": "decoding in fused kernels over pages"}  # fmt: skip

Maker = Callable[[list[int], int, int], RowDecoder | BoundedDecoder]
"""Makes a decoder from the ids that end a completion, its longest length, and the most tokens in flight."""


class UnfitEngine(ValueError):
    """The engine that was asked for does not draw what it should."""


def make_engine(
    weights: Weights, obstacle: str | None, end_ids: list[int], rollout: RolloutConfig, gather: Gather,
    step: str | None = None, *, compact: bool = False,
) -> LocalEngine:  # fmt: skip
    """The engine that `rollout.engine` asks for, or the faster one that is right; a line in the log names it.

    `obstacle` says why prompts cannot be shared, None where they can, the same on all ranks, which make the same
    choice; `step` is how a run that goes on was decoding; with `compact` few rows read weights as `compact.h` has them.
    Raises UnfitEngine where the paged engine is asked for and is wrong for the model. A collective.
    """
    if rollout.dequantize and not _decodes_codes(weights, obstacle, rollout, gather, step):
        weights.dequantize()
        log.info("rollouts: with a dequantised copy of the base, because decoding does not compute with its codes")
    with weights.open() as model:
        kept = CompactWeights(weights.is_frozen) if compact else None
        make, message, decoding = _own_decoder(model, obstacle, gather, step, rollout.drafts, kept)
        on_gpu, name = model.get_input_embeddings().weight.is_cuda, "native"
        # one group at a time is what continuous batching beats on a GPU; the one that shares prompts is faster than it,
        # and it does not report the experts of a token
        prefers_paged = on_gpu and obstacle is not None and routers_of(model) is None
        if rollout.engine == "paged" or (rollout.engine == "auto" and prefers_paged):
            fault = first_fault(gather, _paged_fault(model, make))
            if fault is not None and rollout.engine == "paged":
                raise UnfitEngine(f"rollout.engine: 'paged' given, expected 'auto' or 'native' for this model: {fault}")
            if fault is not None:
                message += f"; paged is out of the question: {fault}"
            else:
                message = f"transformers' continuous batching (paged), in place of the {message}"
                make, name, decoding = PagedDecoder, "paged", None
    log.info("rollouts: %s", message)
    made = make(end_ids, rollout.max_completion_length, ON_CPU)
    decoder = made if isinstance(made, RowDecoder) else WithinMemory(made, rollout.max_tokens_in_flight)
    return LocalEngine(decoder, weights, {"engine": name, "decoding": decoding}, compact=compact)


def _decodes_codes(
    weights: Weights, obstacle: str | None, rollout: RolloutConfig, gather: Gather, step: str | None
) -> bool:
    """Whether all ranks decode with the codes of a quantised base and without a dense copy: in C++."""
    with weights.open() as model:
        if not quantized_layers(model):
            return True
        on_gpu = model.get_input_embeddings().weight.is_cuda
        if on_gpu or obstacle is not None or rollout.engine == "paged":
            return False
        choices = gather(own_step(model, step if step in list(STEPS) else "compiled"))
    return all(name == "compiled" for name, _ in choices)


def _own_decoder(
    model: nn.Module,
    obstacle: str | None,
    gather: Gather,
    step: str | None,
    drafts: bool,
    compact: CompactWeights | None,
) -> tuple[Maker, str, str | None]:
    """This project's decoder for the model, the message about it, and the name of its step."""
    if obstacle is not None:
        message = f"one group at a time, and completions are computed one to a row ({obstacle})"
        return lambda ends, most, _: RowDecoder(ends, most), message, None
    on_gpu = model.get_input_embeddings().weight.is_cuda
    fastest = "fused" if on_gpu else "compiled"
    most = step if step in list(STEPS) else fastest
    choices = gather(own_step(model, most))
    name = min((name for name, _ in choices), key=list(STEPS).index)
    reason = next((reason for _, reason in choices if reason is not None), None)
    if step is not None and name != most:
        log.warning("rollouts: %s, and not %s as before: from here on they round otherwise", DESCRIPTIONS[name],
                    DESCRIPTIONS[most])  # fmt: skip
    # the kernel attends to a shared prompt and to a row's own tokens at once
    options: dict[str, Any] = {"step_of": STEPS[name], "pages": name in OVER_PAGES,
                               "copied_prompt": 0 if name == "compiled" else None}  # fmt: skip
    captures = _captures(model, gather, options)
    message = f"native engine, prompts are shared by their groups{', CUDA graphs' * captures}, {DESCRIPTIONS[name]}"
    if compact is not None and name == "compiled":
        options["step_of"] = partial(KernelStep, compact=compact)
    options["drafts"] = drafts and name == "compiled"  # others round by the number of tokens in a pass
    if reason is not None:
        message += f", which is slower than {DESCRIPTIONS[fastest]} ({reason})"
    return lambda *sizes: NativeDecoder(*sizes, captures=captures, **options), message, name


def _captures(model: nn.Module, gather: Gather, options: dict[str, Any]) -> bool:
    """Whether steps are captured in CUDA graphs: on a GPU, unless what is replayed is not what was captured."""
    if not model.get_input_embeddings().weight.is_cuda:
        return False
    prompt = example_tokens(model, PROMPT).tolist()
    requests = [Request(0, sample, prompt, key=sample) for sample in range(2)]
    reason = None
    try:
        plain, replayed = (
            decode_all(NativeDecoder([-1], NEW_TOKENS, 1 << 20, captures=captures, **options), model, requests)
            for captures in (False, True)
        )
        gap = max(abs(p - q) for a, b in zip(plain, replayed, strict=True)
                  for p, q in zip(a.logprobs, b.logprobs, strict=True))  # fmt: skip
        if [each.ids for each in plain] != [each.ids for each in replayed] or gap > SAME:
            reason = f"replayed steps are off by {gap:.2g} nats from the same steps not captured"
    except CannotCapture as error:
        reason = f"a step makes the host wait: {error}"
    if reason := first_fault(gather, reason):
        log.warning("rollouts: decoding runs kernel by kernel and not as CUDA graphs, several times slower where few "
                    "sequences are in flight (%s)", reason)  # fmt: skip
    return reason is None


def own_step(model: nn.Module, most: str = "compiled") -> tuple[str, str | None]:
    """The fastest of STEPS, up to `most`, that computes what the model does, and why a faster one could not be made."""
    weight = model.get_input_embeddings().weight
    is_float32, reason = weight.dtype == torch.float32, None
    # rounded where the model's own code rounds, so that what is built otherwise shows; in 16 bits adapters and faster
    # steps are rounded elsewhere
    with plain_modules(), without_adapters(lora_layers(model)):
        as_llama = _decoding_off("operations", model) <= (1e-4 if is_float32 else 0.01)
    if weight.is_cuda:  # fused kernels hold on to dense weights
        names = ["fused"] * (not quantized_layers(model)) + ["pages", "operations"] if as_llama else ["pages"]
    else:
        names = ["compiled", "operations"] if as_llama else []
    for name in names:
        if list(STEPS).index(name) > list(STEPS).index(most):
            continue
        if name in OVER_PAGES and (obstacle := triton_obstacle()):
            reason = obstacle
            continue
        try:
            off = _decoding_off(name, model)
        except CannotCompile as error:
            reason = str(error)
            continue
        if off <= (1e-4 if is_float32 else 0.1):
            return name, reason
        if name in OVER_PAGES:
            reason = f"{DESCRIPTIONS[name]} computes other numbers for this model, or does not work here"
    return "modules", reason if weight.is_cuda else None


def _decoding_off(name: str, model: nn.Module) -> float:
    """How far a step of decoding is from the logits of the model's own modules, as it is and with sliding windows and
    soft caps so narrow that they show. Raises CannotCompile where it takes a compiler and there is none.
    """
    off = _step_off(name, model)
    if bounds_of(model):
        with narrow_bounds(model):
            off = max(off, _step_off(name, model))
    return off


@torch.inference_mode()
def _step_off(name: str, model: nn.Module) -> float:
    """Near and far into a sequence: the norm of the difference of logits as a share of theirs, infinite where the step
    does not work for the model."""
    try:
        far = min(FAR, most_positions(model.config) - 1)
        tokens = example_tokens(model, PROMPT)
        positions = torch.tensor([PROMPT, far], device=tokens.device)
        logits = []
        layout, _ = prefill(model, [tokens.tolist()])
        for step_of, state_of in ((module_step, _rows), (STEPS[name], _pages if name in OVER_PAGES else _rows)):
            logits.append(step_of(model)(tokens[:2], positions, state_of(layout)).float())
    except CannotCompile:
        raise
    except CANNOT:
        return math.inf
    theirs, ours = (each - each.mean(-1, keepdim=True) for each in logits)
    return float((ours - theirs).norm()) / float(theirs.norm())


def _rows(layout: PrefillLayout) -> DecodeState:
    """Two sequences of the prompt in `layout`, about to take a step."""
    state = DecodeState(layout.rows.device, 1, shares=True, whole_chunks=False)
    state.admit(layout, [2])
    state.make_room()
    state.begin_step()
    return state


def _pages(layout: PrefillLayout) -> PagePool:
    """The same, in pages."""
    from .native.pages import two_rows

    return two_rows(layout)


def _paged_fault(model: nn.Module, own: Maker) -> str | None:
    """Why transformers' engine is wrong for the model; None where it draws what this project's does."""
    if obstacle := paged_obstacle():
        return obstacle
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        return "its attention scores are soft-capped, which transformers' paged attention leaves out"
    requests = [Request(0, sample, example_tokens(model, PROMPT).tolist(), key=sample) for sample in range(4)]
    try:
        paged, expected = (decode_all(make([-1], NEW_TOKENS, 1 << 20), model, requests) for make in (PagedDecoder, own))
        return None if _agree(paged, expected, rounding(model)) else "it draws other completions"
    except (*CANNOT, FloatingPointError) as error:
        return f"it cannot decode it ({type(error).__name__}: {error})"


def _agree(some: list[Trajectory], others: list[Trajectory], tolerance: float) -> bool:
    """Whether most tokens are the same, with near probabilities; rounding may tip a draw, and then what follows.

    A difference of log-probabilities counts by the token's probability: that of an unlikely token says little, and in
    16 bits it can be large.
    """
    same = 0
    for one, other in zip(some, others, strict=True):
        for a, b, p, q in zip(one.ids, other.ids, one.logprobs, other.logprobs, strict=True):
            if a != b:
                break
            if abs(p - q) * math.exp(max(p, q)) > tolerance:
                return False
            same += 1
    return 2 * same >= sum(len(one.ids) for one in some)
