"""The structures that decode.cpp takes, field by field, and where in memory what they point to lies."""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_double, c_float, c_int64, c_void_p

import torch
from torch import Tensor

from .relaid import Compact


class LinearFields(ctypes.Structure):
    """`Linear` of weights.h."""

    _fields_ = [
        ("weight", c_void_p), ("grouped", c_int64), ("compact", Compact),
        *((name, c_void_p) for name in ("bias", "scales", "values")), ("block", c_int64),
        *((name, c_void_p) for name in ("low", "high")), ("rank", c_int64),
    ]  # fmt: skip


class LayerFields(ctypes.Structure):
    """`Layer` of decode.cpp."""

    _fields_ = [
        *((name, c_void_p) for name in ("input_norm", "output_norm", "mlp_norm", "down_norm")),
        *((name, c_void_p) for name in ("query_norm", "key_norm", "sinks")),
        *((name, LinearFields) for name in ("query", "key", "value", "output", "gate", "up", "down")),
        ("window", c_int64), ("kind", c_int64),
        *((name, c_void_p) for name in ("own_keys", "own_values", "prompt_keys", "prompt_values")),
    ]  # fmt: skip


class StepFields(ctypes.Structure):
    """`Step` of decode.cpp."""

    _fields_ = [
        *((name, c_int64) for name in ("threads", "layers", "hidden", "intermediate", "vocabulary")),
        *((name, c_int64) for name in ("query_heads", "key_heads", "head_size", "ranks", "gelu")),
        *((name, c_float) for name in ("eps", "scale", "soft_cap", "embedding_scale", "logit_cap")),
        *((name, c_void_p) for name in ("embeddings", "norm")), ("head", LinearFields), ("layer", c_void_p),
        *((name, c_int64) for name in ("rows", "own_slots", "prompt_slots", "several")),
        *((name, c_void_p) for name in ("tokens", "slots", "prompt", "cache_rows", "turns", "prompt_lengths")),
        ("num_turns", c_int64), *((name, c_void_p) for name in ("cos", "sin", "logits", "scratch")),
    ]  # fmt: skip


class DrawingFields(ctypes.Structure):
    """`Drawing` of drawing.h."""

    _fields_ = [
        *((name, c_int64) for name in ("steps", "places")), ("seconds", c_double), ("inverse", c_float),
        ("ends", c_void_p), ("num_ends", c_int64),
        *((name, c_void_p) for name in ("request", "last", "lengths", "alive", "keys", "offsets", "limits", "may_end")),
        *((name, c_void_p) for name in ("drawn", "logprobs", "ended_at")),
        *((name, c_int64) for name in ("num_drawn", "num_steps")), ("begun", c_double), ("is_over", c_bool),
    ]  # fmt: skip


def address_of(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Where a tensor lies, which is what the kernel takes it for. Raises ValueError."""
    if x.shape != shape or x.dtype != dtype or x.device.type != "cpu" or not x.is_contiguous():
        raise ValueError(f"{x.dtype} {tuple(x.shape)} on {x.device}, strides {x.stride()}, expected {dtype} {shape} on "
                         "the CPU without gaps")  # fmt: skip
    return x.data_ptr()
