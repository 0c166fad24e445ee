"""Random numbers as functions of counters: no state for checkpoints or for ranks to share. Pure.

A key is a 64-bit hash of a number's purpose (seed, step, prompt, …). Further counters are mixed into it on the device.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

# Multipliers and increment of splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
# OOPSLA 2014) as signed 64-bit numbers, because torch has no unsigned multiplication.
GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
MIX1 = 0xBF58476D1CE4E5B9 - (1 << 64)
MIX2 = 0x94D049BB133111EB - (1 << 64)


def stream_key(*counters: int | str) -> int:
    """Key of a stream of random numbers, a signed 64-bit hash of its counters."""
    digest = hashlib.blake2b("/".join(map(str, counters)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: that of torch copies the sign bit."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def hashed(keys: Tensor, counters: Tensor) -> Tensor:
    """64 random bits for each pair of a key and a counter, all int64; shapes broadcast."""
    x = keys + (counters + 1) * GAMMA
    x.bitwise_xor_(_shift_right(x, 30)).mul_(MIX1)
    x.bitwise_xor_(_shift_right(x, 27)).mul_(MIX2)
    return x.bitwise_xor_(_shift_right(x, 31))


def uniforms(keys: Tensor, counters: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) as float64, one for each pair of a key and a counter; both int64."""
    return _shift_right(hashed(keys, counters), 11).double() * 2.0**-53


def short_numbers(keys: Tensor, count: int) -> Tensor:
    """`count` uniform integers in [-32768, 32767] for each of `keys` (T,) int64: (T, count) int16."""
    words = torch.arange(-(-count // 4), device=keys.device)
    return hashed(keys[:, None], words).view(torch.int16)[:, :count]
