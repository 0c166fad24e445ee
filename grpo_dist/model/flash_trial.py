"""Whether torch's flash kernels compute the attention of packs on this machine.

They are not public: arguments may change, and some builds and GPUs lack them. They are tried once, against blocks.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

from .block_attention import block_layout
from .layout import AttentionOptions
from .shared_prefix import segments, shared_prefix_attention, window_attention, window_of
from .triton_trial import error_line

log = logging.getLogger(__name__)

LARGEST_HEAD = 256
"""The largest head size of the flash kernels. A size must be a multiple of 8."""
FLASH_ARGUMENTS = {
    "_flash_attention_forward": (
        "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask", 5,
    ),
    "_flash_attention_backward": (
        "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p is_causal rng_state unused",
        3,
    ),
}  # fmt: skip
"""The flash kernels, the arguments that this project gives them by position, and how many results it expects."""
FLASH_OPTIONS = {"scale", "window_size_left", "window_size_right"}
"""Arguments of both by name."""
FLASH_ERROR = 0.03
"""Largest norm of an error as a share of the truth's. 16 bits make 0.005 of it, and a wrong key far more."""


def can_use_flash(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the flash kernels compute these heads (1, H, T, D): half precision on a GPU, equal sizes, multiples of 8
    up to 256, and kernels that passed a trial."""
    size = query.shape[-1]
    fits = (query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and size % 8 == 0
            and size <= LARGEST_HEAD and key.shape[-1] == value.shape[-1] == size)  # fmt: skip
    return fits and flash_obstacle(query.dtype, size, query.shape[1] // key.shape[1]) is None


@cache
def flash_obstacle(dtype: torch.dtype, head_size: int, group: int) -> str | None:
    """The reason why the flash kernels cannot compute packs on the current CUDA device, in one line, or None.

    `dtype` and `head_size` are those of the heads, and `group` is the number of query heads for each key head.
    """
    reason = _other_arguments()
    try:
        reason = reason or _wrong_results(dtype, head_size, group)
    except (RuntimeError, TypeError, ValueError) as error:
        reason = f"they cannot run here: {error_line(error)}"
    if reason is not None:
        say_blocks(reason)
    return reason


@cache
def say_blocks(reason: str) -> None:
    """Log once why packs are computed in blocks."""
    log.warning("attention of packs: masked blocks, slower than torch's flash kernels (%s)", reason)


def _other_arguments() -> str | None:
    """What torch's flash kernels take or return otherwise than expected, or None."""
    for name, (arguments, num_results) in FLASH_ARGUMENTS.items():
        operation = getattr(torch.ops.aten, name, None)
        if operation is None:
            return f"torch {torch.__version__} has no {name}"
        schema = operation.default._schema
        given = [each.name for each in schema.arguments]
        expected = arguments.split()
        if given[: len(expected)] != expected or not set(given) >= FLASH_OPTIONS or len(schema.returns) != num_results:
            return f"{name} of torch {torch.__version__} is {schema}"
    return None


def _wrong_results(dtype: torch.dtype, head_size: int, group: int) -> str | None:
    """How far a small pack is from masked blocks in float32 on the CPU, if that is more than rounding, or None."""
    pieces, window = [(5, [3, 4]), (1, [2])], 4
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad = (torch.randn((15, heads, head_size), generator=generator).to(dtype)
                               for heads in (2 * group, 2, 2, 2 * group))  # fmt: skip

    def blocks(query: Tensor, key: Tensor, value: Tensor, size: int | None) -> Tensor:
        query, key, value = (x.float().transpose(0, 1)[None] for x in (query, key, value))
        return block_layout(pieces, window=size).attend(0, query, key, value, AttentionOptions())[0]

    def flash(query: Tensor, key: Tensor, value: Tensor, size: int | None) -> Tensor:
        if size is None:
            return shared_prefix_attention(query, key, value, segments(pieces).to(query.device), AttentionOptions())
        return window_attention(query, key, value, window_of(pieces, size).to(query.device), AttentionOptions())

    # a trial may come in the middle of a forward pass without gradients
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cuda", enabled=False):
        for name, size in (("", None), (" with a window", window)):
            results = []
            for attend, device in ((flash, "cuda"), (blocks, "cpu")):
                given = [x.clone().to(device).requires_grad_() for x in (query, key, value)]
                output = attend(given[0], given[1], given[2], size)
                grads = torch.autograd.grad(output, given, grad.to(device, output.dtype))
                results.append([x.detach().cpu().float() for x in (output, *grads)])
            worst = max(float((got - truth).norm() / truth.norm()) for got, truth in zip(*results, strict=True))
            if not worst < FLASH_ERROR:
                return f"they are off by {worst:.2g} of a result{name}"
    return None
