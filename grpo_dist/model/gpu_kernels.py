"""Check that the kernels which this project calls on a GPU work on this machine: its own in Triton, torch's for flash.

Triton compiles on the machine. Without a C compiler, the driver's library or a supported GPU, its import works but its
first kernel fails. torch's flash kernels are not public: arguments may change, and some builds and GPUs lack them. Each
is tried once, where its result is known.
"""

from __future__ import annotations

import logging
import math
from functools import cache

import torch
from torch import Tensor

log = logging.getLogger(__name__)

TRIAL_RESULTS = [-1.0, 1.0, 1.0, 0.5, -0.5, 3.0, 1.5, 0.0, *[2.0] * 8,
                 -7.0, 14.0, -7.0, 14.0, 15.0, 3.0, 15.0, 3.0]  # fmt: skip
"""Of two equal logits: log-probability, entropy, log of the sum, all in bits, and slopes. A gate of 40 for 3, as its
share, and the gradients at a gate of 0. The mean of 1 and 3. Heads (1, 2) with cosines 3 and 4, sines 5 and 6."""
TRIAL_ERROR = 1e-5
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


@cache
def triton_obstacle() -> str | None:
    """The reason why Triton's kernels cannot run on the current CUDA device, in one line, or None."""
    try:
        from .gate_kernel import Adapters, gated, gated_backward
        from .head_kernel import score_rows
        from .join_kernel import join
        from .rotation_kernel import rotate

        logits, targets = torch.zeros((1, 2), device="cuda"), torch.zeros(1, dtype=torch.long, device="cuda")
        logprobs, entropies, slopes = score_rows(logits, targets, 1.0, torch.float32)
        assert slopes is not None
        one, other = (torch.full((1, 1, 8), value, dtype=torch.bfloat16, device="cuda") for value in (1.0, 3.0))
        output, sums = join(one, logits[:, :1].clone(), other, logits[:, :1])
        gate = torch.zeros((1, 1), device="cuda")
        adapters = Adapters(torch.ones((1, 2), device="cuda"), gate + 40, gate + 1)
        gates = [gated(gate, gate + 2, adapters)[0] / 40, *(x[0] for x in gated_backward(gate + 1, gate, gate + 3))]
        numbers = [torch.cat([logprobs, entropies, *sums]) * math.log2(math.e), *slopes, *gates, output[0, 0].float()]
        row = torch.tensor([[[1.0, 2.0]]], device="cuda")
        for back in (False, True):
            numbers += [each.flatten() for each in rotate(row, row, row[0] + 2, row[0] + 4, back)]
        results = torch.cat(numbers).tolist()
    # a missing library is an AssertionError, a missing compiler a RuntimeError, and neither is documented
    except Exception as error:
        return f"Triton cannot run here: {_line(error)}"
    if any(abs(result - truth) > TRIAL_ERROR for result, truth in zip(results, TRIAL_RESULTS, strict=True)):
        return f"Triton's kernels compute {results}, and {TRIAL_RESULTS} is right"
    return None


@cache
def flash_obstacle(dtype: torch.dtype, head_size: int, group: int) -> str | None:
    """The reason why the flash kernels cannot compute packs on the current CUDA device, in one line, or None.

    `dtype` and `head_size` are those of the heads, and `group` is the number of query heads for each key head.
    """
    reason = _other_arguments()
    try:
        reason = reason or _wrong_results(dtype, head_size, group)
    except (RuntimeError, TypeError, ValueError) as error:
        reason = f"they cannot run here: {_line(error)}"
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
    from .attention import block_layout
    from .shared_prefix import segments, shared_prefix_attention, window_attention, window_of

    pieces, window = [(5, [3, 4]), (1, [2])], 4
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad = (torch.randn((15, heads, head_size), generator=generator).to(dtype)
                               for heads in (2 * group, 2, 2, 2 * group))  # fmt: skip

    def blocks(query: Tensor, key: Tensor, value: Tensor, size: int | None) -> Tensor:
        query, key, value = (x.float().transpose(0, 1)[None] for x in (query, key, value))
        return block_layout(pieces, window=size).attend(0, query, key, value, None)[0]

    def flash(query: Tensor, key: Tensor, value: Tensor, size: int | None) -> Tensor:
        if size is None:
            return shared_prefix_attention(query, key, value, segments(pieces).to(query.device), None)
        return window_attention(query, key, value, window_of(pieces, size).to(query.device), None)

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


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
