"""A check that the written model is the trained one: its files are opened as others will open them."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from ..config.schema import ModelConfig
from ..distributed.deepspeed import unsharded_loading
from ..model.config_files import stored_dtype
from ..model.fixed_row import fixed_logits
from ..model.load import load_causal_lm

log = logging.getLogger(__name__)


def rounding_kl(dtype: torch.dtype) -> float:
    """Bound on the KL of a written model from its policy, nats a token, by rounding to `dtype`.

    It grows with the square of the dtype's precision ε. Measurements: at most 28 ε² in 16 bits with models of 2 to 24
    layers of random weights and the toy ones (1.7e-3 in bfloat16), 230 ε² with a pretrained one of 135 M weights; in
    float32, where the order of sums matters more, at most 8e-12.
    """
    return max(1000 * torch.finfo(dtype).eps ** 2, 1e-9)


def divergence(expected: Tensor, actual: Tensor) -> float:
    """KL(expected ‖ actual) of two next-token distributions, given as logits (T, V): nats a token."""
    ours, theirs = (torch.log_softmax(logits.double(), -1) for logits in (expected, actual))
    return float(kl_div(theirs, ours, log_target=True, reduction="none").sum(-1).mean())


def check_final(directory: Path, expected: Tensor, dtype: torch.dtype, trust_remote_code: bool) -> None:
    """Log the KL of the model in a directory from a run's policy, whose `fixed_logits` in `dtype` are `expected`.

    The line is a warning where that is more than rounding, and where the files cannot be opened.
    """
    here = ModelConfig(name=str(directory), trust_remote_code=trust_remote_code)
    try:
        with unsharded_loading():
            reopened = load_causal_lm(here, stored_dtype(here), None)
    except (OSError, ValueError) as error:
        log.warning("%s cannot be opened by transformers: %s: %s", directory, type(error).__name__, error)
        return
    distance, most = divergence(expected, fixed_logits(reopened)), rounding_kl(dtype)
    level = logging.INFO if distance <= most else logging.WARNING
    log.log(level, "%s: reopened, KL from the policy %.1e nats a token (rounding: %.0e)", directory, distance, most)
