"""Which engine draws a run's completions: what is right is asked of the loaded model, what is faster is measured."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .batch import Completion
from .config import RolloutConfig
from .model_checks import CANNOT
from .probe import NEW_TOKENS, PROMPT, decoding_error, example_tokens, rounding, tiny_engine
from .rollout import Engine, NativeEngine, PagedEngine, Request, RowEngine, Sampling
from .rollout.cache import DecodeState
from .rollout.compiled import CannotCompile
from .rollout.kernel import KernelStep
from .rollout.llama import LlamaStep
from .rollout.room import ON_CPU, WithinMemory
from .rollout.steps import Step, module_step, prefill

log = logging.getLogger(__name__)

FAR = 500
"""A position at which it shows whether and how positions are encoded."""
TRIAL_GROUPS, TRIAL_GROUP_SIZE, TRIAL_TOKENS = 4, 8, 48
"""What engines are timed on: prompts, completions of each, and tokens of either."""

STEPS: dict[str, Callable[[nn.Module], Step]] = {
    "modules": module_step, "operations": LlamaStep, "compiled": KernelStep,
}  # fmt: skip
"""How a step of decoding may be computed, by the name a checkpoint keeps; from slow to fast."""
TOLD = {"modules": "decoding through the model's own modules", "operations": "decoding in few operations",
        "compiled": "decoding in C++"}  # fmt: skip

Maker = Callable[[list[int], int, int], Engine]
"""Makes an engine from the ids that end a completion, its longest length, and the most tokens in flight."""


class UnfitEngine(ValueError):
    """The engine that was asked for does not draw what it should."""


def make_engine(
    model: nn.Module, obstacle: str | None, end_ids: list[int], rollout: RolloutConfig,
    gather: Callable[[Any], list[Any]], step: str | None = None,
) -> Engine:  # fmt: skip
    """The engine that `rollout.engine` asks for, or the faster one that is right; a line in the log names it.

    `obstacle` says why prompts cannot be shared, None where they can, the same on all ranks; `gather` returns what each
    rank gave it, since all have to come to the same; `step` is how a run to go on with was decoding (see `made_of`).
    Raises UnfitEngine where the paged engine is asked for and is wrong for the model.
    """
    own, told = _own_engine(model, obstacle, gather, step)
    engine, on_gpu = own, model.get_input_embeddings().weight.is_cuda
    if rollout.engine == "paged" or (rollout.engine == "auto" and on_gpu):
        fault, seconds = _on_trial(model, own, timed=rollout.engine == "auto")
        fault = next(filter(None, gather(fault)), None)
        if fault is not None and rollout.engine == "paged":
            raise UnfitEngine(f"rollout.engine: 'paged' given, expected 'auto' or 'native' for this model: {fault}")
        if seconds := gather(seconds)[0]:
            told += f"; on trial: native {seconds[0]:.2f} s, paged {seconds[1]:.2f} s"
        if fault is not None:
            told += f"; paged is out of the question: {fault}"
        elif rollout.engine == "paged" or seconds[1] < seconds[0]:
            engine, told = PagedEngine, f"transformers' continuous batching (paged), in place of the {told}"
    log.info("rollouts: %s", told)
    made = engine(end_ids, rollout.max_completion_length, ON_CPU)
    return made if isinstance(made, RowEngine) else WithinMemory(made, rollout.max_tokens_in_flight)


def made_of(engine: Engine) -> dict[str, str | None]:
    """What a checkpoint keeps of an engine: with another one the rest of a run would round otherwise."""
    engine = engine.engine if isinstance(engine, WithinMemory) else engine
    name = next((name for name, step_of in STEPS.items() if step_of is getattr(engine, "step_of", None)), None)
    return {"engine": "paged" if isinstance(engine, PagedEngine) else "native", "decoding": name}


def _own_engine(
    model: nn.Module, obstacle: str | None, gather: Callable[[Any], list[Any]], step: str | None
) -> tuple[Maker, str]:
    """This project's engine for the model, and what is said about it."""
    if obstacle is not None:
        told = f"one group at a time, and completions are computed one to a row ({obstacle})"
        return lambda ends, most, _: RowEngine(ends, most), told
    most = step if step in list(STEPS) else "compiled"
    found = gather(own_step(model, most))
    name = min((name for name, _ in found), key=list(STEPS).index)
    reason = next((reason for _, reason in found if reason is not None), None)
    if step is not None and name != most:
        log.warning("rollouts: %s, and not %s as before: from here on they round otherwise", TOLD[name], TOLD[most])
    step_of = STEPS[name]
    trial = tiny_engine(captures=model.get_input_embeddings().weight.is_cuda, step_of=step_of)
    captures = trial.captures and decoding_error(model, trial) < rounding(model) and trial.captures
    told = f"native engine, prompts are shared by their groups{', CUDA graphs' * captures}, {TOLD[name]}"
    if reason is not None:
        told += f", which takes up to twice as long as compiled ({reason})"
    copied = 0 if step_of is KernelStep else None  # it attends to a shared prompt and to its own tokens at once
    return lambda *sizes: NativeEngine(*sizes, captures=captures, step_of=step_of, copied_prompt=copied), told


def own_step(model: nn.Module, most: str = "compiled") -> tuple[str, str | None]:
    """The fastest of STEPS, up to `most`, that computes what the model does, and why it could not be compiled."""
    is_float32 = next(model.parameters()).dtype == torch.float32
    if most == "modules" or _decoding_off(LlamaStep, model) > (1e-4 if is_float32 else 0.01):
        return "modules", None
    if most == "compiled" and model.get_input_embeddings().weight.device.type == "cpu":
        try:
            # what the kernel computes is checked where it is made; in bfloat16 it rounds less than the model
            if _decoding_off(KernelStep, model) <= (1e-4 if is_float32 else 0.1):
                return "compiled", None
        except CannotCompile as error:
            return "operations", str(error)
    return "operations", None


@torch.inference_mode()
def _decoding_off(step_of: Callable[[nn.Module], Step], model: nn.Module) -> float:
    """How far a step of decoding is from the logits of the model's own modules, near and far into a sequence: the norm
    of the difference as a share of theirs, infinite where it does not work for the model.

    Raises CannotCompile where it takes a compiler and there is none.
    """
    try:
        steps = module_step(model), step_of(model)
        far = min(FAR, _most_positions(model) - 1)
        tokens = example_tokens(model, PROMPT)
        layout, _ = prefill(model, [tokens.tolist()])
        logits = []
        for step in steps:
            state = DecodeState(tokens.device, 1, shares=True, whole_chunks=False)
            state.admit(layout, [2])
            state.make_room()
            state.begin_step()
            logits.append(step(tokens[:2], torch.tensor([PROMPT, far], device=tokens.device), state).float())
    except CannotCompile:
        raise
    except CANNOT:
        return math.inf
    theirs, ours = (each - each.mean(-1, keepdim=True) for each in logits)
    return float((ours - theirs).norm()) / float(theirs.norm())


def _most_positions(model: nn.Module) -> int:
    """Tokens of the longest sequence the model can take, as far as its config tells."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def _on_trial(model: nn.Module, own: Maker, timed: bool) -> tuple[str | None, list[float]]:
    """Why the paged engine is wrong for the model (None: it draws what this project's does), and the seconds that each
    of the two, this project's first, takes for the same work; none where they are not `timed` or it is wrong."""
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        return "its attention scores are soft-capped, which transformers' paged attention leaves out", []
    requests = [Request(0, sample, example_tokens(model, PROMPT).tolist(), key=sample) for sample in range(4)]
    try:
        paged, expected = (make([-1], NEW_TOKENS, 1 << 20).generate(model, requests, Sampling())
                           for make in (PagedEngine, own))  # fmt: skip
        if not _agree(paged, expected, rounding(model)):
            return "it draws other completions", []
        return None, [_seconds(model, make) for make in (own, PagedEngine)] if timed else []
    except (*CANNOT, FloatingPointError) as error:
        return f"it cannot decode it ({type(error).__name__}: {error})", []


def _agree(some: list[Completion], others: list[Completion], tolerance: float) -> bool:
    """Whether most tokens are the same, with near log-probabilities; rounding may tip a draw, and then what follows."""
    same = 0
    for one, other in zip(some, others, strict=True):
        for a, b, p, q in zip(one.ids, other.ids, one.logprobs, other.logprobs, strict=True):
            if a != b:
                break
            if abs(p - q) > tolerance:
                return False
            same += 1
    return 2 * same >= sum(len(one.ids) for one in some)


def _seconds(model: nn.Module, make: Maker) -> float:
    """How long an engine takes for TRIAL_GROUPS prompts and their completions, the second time."""
    length = min(TRIAL_TOKENS, _most_positions(model) // 2)
    ids = example_tokens(model, TRIAL_GROUPS * length).view(TRIAL_GROUPS, length).tolist()
    requests = [Request(slot, sample, ids[slot], key=slot * TRIAL_GROUP_SIZE + sample)
                for slot in range(TRIAL_GROUPS) for sample in range(TRIAL_GROUP_SIZE)]  # fmt: skip
    engine, took = make([-1], length, 1 << 20), 0.0
    for _ in range(2):
        begun = time.monotonic()
        engine.generate(model, requests, Sampling())  # comes back with lists, so nothing is still under way
        took = time.monotonic() - begun
    return took
