"""Check that this project's Triton kernels work on this machine.

Triton compiles on the machine. Without a C compiler, the driver's library or a supported GPU, its import works but its
first kernel fails.
"""

from __future__ import annotations

from functools import cache

import torch


@cache
def triton_obstacle() -> str | None:
    """The reason why Triton's kernels cannot run on the current CUDA device, in one line, or None."""
    try:
        from .head_kernel import score_rows

        logits, targets = torch.zeros((1, 2), device="cuda"), torch.zeros(1, dtype=torch.long, device="cuda")
        score_rows(logits, targets, 1.0, None)
    # a missing library is an AssertionError, a missing compiler a RuntimeError, and neither is documented
    except Exception as error:
        return f"Triton cannot run here: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return None
