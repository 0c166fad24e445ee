"""The functions of `pack.cpp`: attention, norms, gates, rotations and log-probabilities of a pack in float32 on a CPU,
with gradients.

Where they cannot be compiled torch's operations take their place.

Shapes: T tokens, Hq query heads, Hk key heads, D head size, F features, V vocabulary. All tensors are float32,
without gaps.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..types import integers
from .compiled.library import CannotCompile, library
from .layout import Pieces

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("pack.cpp")
MULTIPLE = 8
"""Head sizes and rows of norms have to be multiples of this."""
MOST_RUNS = 8
"""Most parts of a prompt's completions whose gradients of the prompt are summed each by itself."""
_IS_TRACED = ContextVar("traced", default=False)


@contextmanager
def traced_kernels() -> Iterator[None]:
    """Inside, the functions also take tensors without memory, and only make tensors for their results."""
    token = _IS_TRACED.set(True)
    try:
        yield
    finally:
        _IS_TRACED.reset(token)


def fits(*tensors: Tensor, multiple: int = MULTIPLE) -> bool:
    """Whether the functions take these tensors: float32 numbers in this machine's memory, last sizes multiples of 8, or
    for `score_rows` of 1."""
    # a tensor of another type may have no memory, or a part of the numbers
    kinds = (FakeTensor,) if _IS_TRACED.get() else (Tensor, nn.Parameter)
    for x in tensors:
        if type(x) not in kinds or x.device.type != "cpu" or x.dtype != torch.float32 or x.shape[-1] % multiple:
            return False
    return _code() is not None


@cache
def _code() -> ctypes.CDLL | None:
    try:
        return library(SOURCE)
    except CannotCompile as error:
        log.info("attention, norms and gates of packs: torch's operations, slower than those of pack.cpp (%s)", error)
        return None


def call(name: str, *arguments: Tensor | int | float | ctypes.Structure) -> None:
    """Call a function with the number of threads and these arguments; whole numbers are int64, others float32."""
    if _IS_TRACED.get():
        return
    code = _code()
    assert code is not None, "`fits` was not asked"
    getattr(code, name)(c_int64(torch.get_num_threads()), *map(_argument, arguments))


def _argument(x: Tensor | int | float | ctypes.Structure) -> Any:
    if isinstance(x, Tensor):
        return c_void_p(address(x))
    if isinstance(x, ctypes.Structure):
        return ctypes.byref(x)
    return c_int64(x) if isinstance(x, int) else c_float(x)


def address(x: Tensor) -> int:
    """Where a tensor's numbers begin, for the functions; 0 where it has no memory."""
    assert x.is_contiguous() and x.dtype in (torch.float32, torch.int64)
    return 0 if isinstance(x, FakeTensor) else x.data_ptr()


def normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`x · weight / sqrt(mean square + eps)` (arXiv:1910.07467, equation 4) of rows (T, F), and each row's factor."""
    to, factors = torch.empty_like(x), x.new_empty(len(x))
    call("norm", x, weight, eps, *x.shape, to, factors)
    return to, factors


def normed_backward(grad: Tensor, x: Tensor, weight: Tensor, factors: Tensor) -> Tensor:
    """The gradient by x, for that by the result."""
    to = torch.empty_like(x)
    call("norm_backward", grad, x, weight, factors, *x.shape, to)
    return to


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) · up` (arXiv:2002.05202, equation 6), both (T, F)."""
    to = torch.empty_like(gate)
    call("gated", gate, up, gate.numel(), to)
    return to


def gated_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients by both, for that by the result."""
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
    call("gated_backward", grad, gate, up, gate.numel(), of_gate, of_up)
    return of_gate, of_up


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> tuple[Tensor, Tensor]:
    """`x · cos + rotate_half(x) · sin` (arXiv:2104.09864, equation 34) of queries (T, Hq, D) and keys (T, Hk, D), for
    `cos` and `sin` (T, D); with `back`, the gradients by them for those by the results."""
    outputs = torch.empty_like(query), torch.empty_like(key)
    for x, to in zip((query, key), outputs, strict=True):
        call("rotate", x, cos, sin, *x.shape, int(back), to)
    return outputs


def score_rows(logits: Tensor, targets: Tensor, temperature: float, slopes: bool) -> tuple[Tensor, Tensor]:
    """Log-probabilities of targets (M,) int64 and entropies, both (M,), of logits (M, V) divided by a temperature. With
    `slopes` the logits become the derivatives of the log-probabilities by them."""
    logprobs, entropies = logits.new_empty(2, len(logits))
    call("score_rows", logits, targets, *logits.shape, 1 / temperature, int(slopes), logprobs, entropies)
    return logprobs, entropies


@dataclass(frozen=True)
class Sequences:
    """The sequences of a row, as `pack.cpp` takes them."""

    segments: Tensor
    """(N, 4) int64: where a prompt or a completion begins and ends, and where its prompt does (empty for a prompt)."""
    runs: Tensor
    """(M, 3) int64: segments [first, last) behind one prompt, and where the sums of their gradients of it begin."""
    longest: int
    sums: int
    """Tokens of the prompts of all runs."""

    @classmethod
    def of(cls, pieces: Pieces) -> Sequences:
        """Those of a row of pieces. How completions are divided into runs depends on their piece alone."""
        segments: list[tuple[int, int, int, int]] = []
        runs: list[tuple[int, int, int]] = []
        start = sums = 0
        for prompt, completions in pieces:
            behind = start + prompt
            runs.append((len(segments), len(segments) + 1, 0))
            segments.append((start, behind, start, start))
            # more runs keep more threads busy; their sums shall take no more memory than the completions
            number = max(1, min(MOST_RUNS, sum(completions) // prompt, len(completions)))
            cuts = [len(completions) * n // number for n in range(number + 1)]
            for first, last in pairwise(cuts):
                if last > first:
                    runs.append((len(segments) + first, len(segments) + last, sums))
                    sums += prompt
            places = list(accumulate(completions, initial=behind))
            segments += [(*each, start, behind) for each in pairwise(places)]
            start = places[-1]
        longest = max(prompt + max(completions, default=0) for prompt, completions in pieces)
        return cls(integers(segments), integers(runs), longest, sums)


class AttentionFields(ctypes.Structure):
    """That of `pack.cpp`, field by field."""

    _fields_ = [
        *((name, c_int64) for name in ("query_heads", "key_heads", "head_size")),
        *((name, c_int64) for name in ("segments", "runs", "longest", "sums", "window")), ("scale", c_float),
        *((name, c_void_p) for name in ("segment", "run", "query", "key", "value", "output", "lse")),
        *((name, c_void_p) for name in ("grad", "grad_query", "grad_key", "grad_value", "key_sums", "value_sums")),
    ]  # fmt: skip


def attend(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """Attention of queries (T, Hq, D) to keys and values (T, Hk, D), and each softmax's log-sum-exp (T, Hq).

    A query sees the newest `window` positions of its sequence, its own included, or all.
    """
    output, lse = torch.empty_like(query), query.new_empty(query.shape[:2])
    _attend("attend", sequences, scale, window, query=query, key=key, value=value, output=output, lse=lse)
    return output, lse


def attend_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor,
    sequences: Sequences, scale: float, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients by queries, keys and values, for that by the output (T, Hq, D)."""
    of_query, of_key, of_value = (torch.empty_like(each) for each in (query, key, value))
    sums = key.new_empty(2, sequences.sums, *key.shape[1:])
    _attend("attend_backward", sequences, scale, window, query=query, key=key, value=value, output=output, lse=lse,
            grad=grad, grad_query=of_query, grad_key=of_key, grad_value=of_value, key_sums=sums[0],
            value_sums=sums[1])  # fmt: skip
    return of_query, of_key, of_value


def _attend(name: str, sequences: Sequences, scale: float, window: int | None, **tensors: Tensor) -> None:
    call(name, AttentionFields(
        tensors["query"].shape[1], *tensors["key"].shape[1:], len(sequences.segments), len(sequences.runs),
        sequences.longest, sequences.sums, sequences.longest if window is None else window, scale,
        **{each: address(x) for each, x in tensors.items()},
        segment=address(sequences.segments), run=address(sequences.runs),
    ))  # fmt: skip
