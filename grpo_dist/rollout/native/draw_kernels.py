"""The kernels that draw a token on a GPU, each in few passes over the logits; `fused_draw.py` launches them.

With BANS `bans` says of each token where it may not be drawn (`Rules.bans_of`), and `places` of each row where it is.

Shapes: R rows, V vocabulary, B blocks of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...algorithm.hashing import GAMMA, MIX1, MIX2
from ..sampling import UNITS

# a kernel reads no globals but constants of its own language
_GAMMA, _MIX1, _MIX2, _UNITS = (tl.constexpr(each) for each in (GAMMA, MIX1, MIX2, UNITS))


@triton.jit
def _scaled(logits, row, k, size, temperature, bans, places, least, BANS: tl.constexpr):
    """Logits at the sampling temperature, -inf behind the last one and for those that may not be drawn."""
    x = tl.load(logits + row * size + k, mask=k < size, other=-float("inf")).to(tl.float32)
    if BANS:
        early = (tl.load(places + row) < least).to(tl.int32)
        x = tl.where(tl.load(bans + k, mask=k < size, other=0).to(tl.int32) + early > 1, -float("inf"), x)
    return tl.div_rn(x, temperature)


@triton.jit
def sum_blocks(logits, floors, peaks, totals, size, blocks, temperature, bans, places, least, BANS: tl.constexpr,
               FLOOR: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Peak and sum of exponentials of each block of a row's scaled logits, of those not below the row's floor: (R, B)
    float32 each."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x = _scaled(logits, row, block * BLOCK + tl.arange(0, BLOCK), size, temperature, bans, places, least, BANS)
    if FLOOR:
        x = tl.where(x >= tl.load(floors + row), x, -float("inf"))
    peak = tl.max(x)
    tl.store(peaks + row * blocks + block, peak)
    tl.store(totals + row * blocks + block, tl.sum(tl.exp(x - tl.where(peak == -float("inf"), 0.0, peak))))


@triton.jit
def _as_number(key):
    """The float32 with a key, where keys are int32 in the order of the numbers."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _as_key(number):
    key = number.to(tl.int32, bitcast=True)
    return key ^ ((key >> 31) & 0x7FFFFFFF)


@triton.jit
def _lowest(logits, peaks, row, peak, most, top_k, size, blocks, temperature, bans, places, least, BANS: tl.constexpr,
            BLOCK: tl.constexpr, WAYS: tl.constexpr, PASSES: tl.constexpr):  # fmt: skip
    """The lowest scaled logit of a row above which there are less than `most` units of mass and `top_k` tokens.

    Both grow as the number falls, so that it is searched for: each pass cuts the range into WAYS + 1 parts, and leaves
    out the blocks with nothing above the range.
    """
    k, way = tl.arange(0, BLOCK), tl.arange(0, WAYS)
    # the bounds of the range: too much lies above the lower one, and not too much above the upper one
    bottom = _as_key(tl.full((1,), -float("inf"), tl.float32)).to(tl.int64)
    lower, upper = tl.sum(bottom), tl.sum(_as_key(tl.full((1,), 0.0, tl.float32) + peak).to(tl.int64))
    for _ in range(PASSES):
        keys = lower + (upper - lower) * (way + 1) // (WAYS + 1)
        bounds = _as_number(keys.to(tl.int32))
        lowest = tl.min(bounds)
        mass, count = tl.zeros((WAYS,), tl.int64), tl.zeros((WAYS,), tl.int32)
        for block in range(blocks):
            if tl.load(peaks + row * blocks + block) > lowest:
                x = _scaled(logits, row, block * BLOCK + k, size, temperature, bans, places, least, BANS)
                above = x[None, :] > bounds[:, None]
                units = (tl.exp(x - peak) * _UNITS).to(tl.int64)
                mass += tl.sum(tl.where(above, units[None, :], 0), 1)
                count += tl.sum(above.to(tl.int32), 1)
        fits = (mass < most) & (count < top_k)
        lower = tl.max(tl.where(fits, lower, keys))
        upper = tl.min(tl.where(fits, keys, upper))
    return tl.max(_as_number(tl.full((1,), 0, tl.int32) + upper.to(tl.int32)))


@triton.jit
def find_floors(logits, peaks, floors, size, blocks, temperature, bans, places, least, top_p, top_k, log_min_p,
                BANS: tl.constexpr, PEAKS: tl.constexpr, BLOCK: tl.constexpr, WAYS: tl.constexpr,
                PASSES: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr):  # fmt: skip
    """The least scaled logit of a row that may be drawn, without sorting: `sampling.allowed` says which those are."""
    row = tl.program_id(0).to(tl.int64)
    b, k = tl.arange(0, PEAKS), tl.arange(0, BLOCK)
    peak = tl.max(tl.load(peaks + row * blocks + b, mask=b < blocks, other=-float("inf")))
    floor = peak + log_min_p
    kth = -float("inf")
    if TOP_K:
        kth = _lowest(logits, peaks, row, peak, 0x7FFFFFFFFFFFFFFF, top_k, size, blocks, temperature, bans, places,
                      least, BANS, BLOCK, WAYS, PASSES)  # fmt: skip
        floor = tl.maximum(floor, kth)
    if TOP_P:
        total = tl.zeros((BLOCK,), tl.int64)
        for block in range(blocks):
            x = _scaled(logits, row, block * BLOCK + k, size, temperature, bans, places, least, BANS)
            total += tl.where(x >= kth, (tl.exp(x - peak) * _UNITS).to(tl.int64), 0)
        most = tl.ceil(tl.sum(total).to(tl.float64) * top_p).to(tl.int64)
        floor = tl.maximum(floor, _lowest(logits, peaks, row, peak, most, size, size, blocks, temperature, bans, places,
                                          least, BANS, BLOCK, WAYS, PASSES))  # fmt: skip
    tl.store(floors + row, floor)


@triton.jit
def _hashed(x):
    """The mixing of splitmix64, as `hashing.hashed`."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def draw_token(logits, floors, peaks, totals, all_peaks, all_totals, keys, token, logprob, size, blocks, temperature,
               bans, places, least, BANS: tl.constexpr, FLOOR: tl.constexpr, BLOCK: tl.constexpr,
               PEAKS: tl.constexpr):  # fmt: skip
    """The token at which a row's running sum of probabilities passes the uniform number of its key and place, and its
    log-probability among all tokens."""
    row = tl.program_id(0).to(tl.int64)
    b = tl.arange(0, PEAKS)
    block_peaks = tl.load(peaks + row * blocks + b, mask=b < blocks, other=-float("inf"))
    peak = tl.max(block_peaks)
    sums = tl.load(totals + row * blocks + b, mask=b < blocks, other=0.0) * tl.exp(block_peaks - peak)
    running = tl.cumsum(sums.to(tl.float64), 0)
    total = tl.max(running)
    number = _hashed(tl.load(keys + row) + (tl.load(places + row) + 1) * _GAMMA)
    target = ((number >> 11) & 0x1FFFFFFFFFFFFF).to(tl.float64) * 1.1102230246251565e-16 * total
    # rounding may put the target at the total: then the last block with a probability is taken
    last = tl.max(tl.where(sums > 0, b, 0))
    block = tl.minimum(tl.sum((running <= target).to(tl.int32)), last)
    before = tl.sum(tl.where(b < block, sums, 0.0).to(tl.float64))
    share = (target - before) / tl.sum(tl.where(b == block, sums, 0.0).to(tl.float64))
    k = tl.arange(0, BLOCK)
    x = _scaled(logits, row, block * BLOCK + k, size, temperature, bans, places, least, BANS)
    weights = tl.exp(x - peak)
    if FLOOR:
        weights = tl.where(x >= tl.load(floors + row), weights, 0.0)
    inner = tl.cumsum(weights.to(tl.float64), 0)
    final = tl.max(tl.where(weights > 0, k, 0))
    chosen = tl.minimum(tl.sum((inner <= share * tl.max(inner)).to(tl.int32)), final)
    tl.store(token + row, (block * BLOCK + chosen).to(tl.int64))
    value = tl.sum(tl.where(k == chosen, x, 0.0))
    of_all = tl.load(all_totals + row * blocks + b, mask=b < blocks, other=0.0)
    tops = tl.load(all_peaks + row * blocks + b, mask=b < blocks, other=-float("inf"))
    top = tl.max(tops)
    of_all *= tl.exp(tops - top)
    tl.store(logprob + row, value - top - tl.log(tl.sum(of_all.to(tl.float64)).to(tl.float32)))
