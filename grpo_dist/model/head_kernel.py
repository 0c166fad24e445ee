"""The elementwise part of the log-probability head on a GPU, in one kernel. It is imported only where Triton works.

torch's operations need nine passes over the logits of a chunk. This kernel reads a row twice and writes its slope once.

Shapes: M tokens, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _score(logits, targets, slopes, logprobs, entropies, size, inverse_temperature, SLOPE: tl.constexpr,
           BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    peak, total, weighted = -float("inf"), 0.0, 0.0
    for start in range(0, size, BLOCK):
        inside = start + k < size
        x = tl.load(logits + row * size + start + k, mask=inside, other=-float("inf")) * inverse_temperature
        now = tl.maximum(peak, tl.max(x, 0))
        old, weights = tl.exp(peak - now), tl.exp(x - now)
        total = total * old + tl.sum(weights, 0)
        weighted = weighted * old + tl.sum(tl.where(inside, weights * x, 0.0), 0)
        peak = now
    log_sum = peak + tl.log(total)
    target = tl.load(targets + row)
    tl.store(logprobs + row, tl.load(logits + row * size + target) * inverse_temperature - log_sum)
    tl.store(entropies + row, log_sum - weighted / total)
    if SLOPE:
        for start in range(0, size, BLOCK):
            inside = start + k < size
            x = tl.load(logits + row * size + start + k, mask=inside, other=-float("inf")) * inverse_temperature
            slope = (tl.where(start + k == target, 1.0, 0.0) - tl.exp(x - log_sum)) * inverse_temperature
            tl.store(slopes + row * size + start + k, slope.to(slopes.dtype.element_ty), mask=inside)


def score_rows(
    logits: Tensor, targets: Tensor, temperature: float, slope_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probability of each target (M,), entropy of each row (M,), and the derivative (M, V) of the log-probability
    by the logits in `slope_dtype`, or None if that is None. `logits` (M, V) float32, contiguous."""
    rows, size = logits.shape
    logprobs, entropies = torch.empty((2, rows), dtype=torch.float32, device=logits.device)
    slopes = None if slope_dtype is None else torch.empty((rows, size), dtype=slope_dtype, device=logits.device)
    _score[(rows,)](logits, targets, logits if slopes is None else slopes, logprobs, entropies, size, 1 / temperature,
                    SLOPE=slopes is not None, BLOCK=BLOCK, num_warps=8)  # fmt: skip
    return logprobs, entropies, slopes
