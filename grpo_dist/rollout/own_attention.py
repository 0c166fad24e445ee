"""Which attention computes a loaded model: this project's where prompts can be shared, else the model's own.

What the config says is only where the search begins; each choice is asked of the model before it is used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from torch import nn

from ..distributed.agreement import Gather, first_fault
from ..model import attention
from ..model.checks import CANNOT
from ..model.config_files import soft_cap
from ..model.files import UnfitModel
from ..model.policy import Policy
from .probe import bounds_leak, draws, has_sinks, is_noisy, packing_leak, probe_pack, row_fault

log = logging.getLogger(__name__)

OWN = ("sdpa", "eager")
"""What transformers' models may have of their own, from fast to slow."""


def settle_attention(
    models: Sequence[nn.Module], given: str | None, obstacle: str | None, named: bool, gather: Gather,
    window: int | None = None,
) -> str | None:  # fmt: skip
    """Set the attention of all `models`, which share an architecture, to the first that is right for the last of them,
    and return why prompts cannot be shared, None where they can.

    They were loaded with the attention `given` (None: transformers' choice); `obstacle` is what the config alone says
    against sharing; `window` is a sliding window that is shorter than the longest sequence. Only `given` is tried where
    it was `named` by the user. What one rank finds holds for all. Raises UnfitModel. A collective.
    """
    model = models[-1]

    def fault_of(probe: Callable[[nn.Module], str | None]) -> str | None:
        return first_fault(gather, probe(model))

    if obstacle is None:
        is_plain = window is None and soft_cap(model.config) is None and not has_sinks(model)
        obstacle = fault_of(packing_leak if is_plain else bounds_leak)
        if obstacle is None:
            return None
    first = None if given == attention.NAME else given
    tried = {}
    for name in [first] if named else [*([] if given == attention.NAME else [first]), *OWN]:
        fault = _set(models, name) or fault_of(row_fault)
        if fault is None:
            if name == "eager" and not named:
                log.info("attention: eager, as the model's code has no other that is right for it")
            return obstacle
        tried[name or given or "as it loads"] = fault
    reasons = "; ".join(f"{name}: {fault}" for name, fault in tried.items())
    raise UnfitModel(
        f"{'model.attn_implementation' if named else 'model.name'}: {type(model).__name__} does not compute each token "
        f"from those before it alone, or does not decode what it computes ({reasons})"
    )


def require_no_noise(wrapped: nn.Module, policy: Policy, shares_prompts: bool, gather: Gather) -> None:
    """Compute a few tokens as an update does. Raises UnfitModel where that depends on more than weights and tokens.

    A collective; `wrapped` is the policy in training mode, as it is prepared for the ranks.
    """
    pack, name = probe_pack(policy.causal_lm, shares_prompts), type(policy.causal_lm).__name__
    try:
        # most models draw nothing, which one pass shows; the ranks take part in all passes or in none
        noisy = any(gather(draws(lambda: wrapped(pack)))) and is_noisy(lambda: wrapped(pack)[0])
    except ValueError as error:  # a layer in which adapters' dropout cannot tell the tokens apart
        raise UnfitModel(str(error)) from error
    if any(gather(noisy)):
        raise UnfitModel(
            f"model.name: {name} draws random numbers while it is trained (dropout, noise in a router), in a place "
            "that does not ask its training mode: set it to 0 in the model's config.json"
        )


def _set(models: Sequence[nn.Module], name: str | None) -> str | None:
    """Have the models use an attention, or keep it (None); returns why they cannot."""
    if (name or models[-1].config._attn_implementation) == "sdpa" and soft_cap(models[-1].config) is not None:
        return "it has no soft cap, which the model's config asks for"
    if name is None:
        return None
    try:
        for model in models:
            if model._can_set_attn_implementation():
                model.set_attn_implementation(name)
            else:  # attention code of its own; how its mask is made depends on the name all the same
                model.config._attn_implementation = name
    except CANNOT as error:
        return f"{type(error).__name__}: {error}"
    return None
