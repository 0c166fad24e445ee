"""Check that Triton works on this machine.

Triton compiles on the machine. Without a C compiler, the driver's library or a supported GPU, its import works but its
first kernel fails. Each of this project's kernels is tried once, where its result is known.
"""

from __future__ import annotations

import math
from functools import cache

import torch

TRIAL_RESULTS = [-1.0, 1.0, 1.0, 0.5, -0.5, 3.0, 1.5, 0.0, *[2.0] * 8,
                 -7.0, 14.0, -7.0, 14.0, 15.0, 3.0, 15.0, 3.0]  # fmt: skip
"""Of two equal logits: log-probability, entropy, log of the sum, all in bits, and slopes. A gate of 40 for 3, as its
share, and the gradients at a gate of 0. The mean of 1 and 3. Heads (1, 2) with cosines 3 and 4, sines 5 and 6."""
TRIAL_ERROR = 1e-5


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
        return f"Triton cannot run here: {error_line(error)}"
    if any(abs(result - truth) > TRIAL_ERROR for result, truth in zip(results, TRIAL_RESULTS, strict=True)):
        return f"Triton's kernels compute {results}, and {TRIAL_RESULTS} is right"
    return None


def error_line(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
