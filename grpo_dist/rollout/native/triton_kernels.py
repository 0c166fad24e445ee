"""The kernels of a decoding step on a GPU that no library has: attention over pages, norms, rotations and sampling.

Each does in one pass over its data what torch would do in five or more. They are imported where Triton is; the
functions that launch them are in `fused.py`, which says what each computes in torch's terms.

Shapes: R rows, Hq query heads, Hk key heads, G = Hq / Hk, D head size, V vocabulary; a page holds PAGE tokens of one
layer as (Hk, PAGE, D).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _attend(query, keys, values, table, first, last, length, scale, head, HK: tl.constexpr, PAGE: tl.constexpr,
            D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr):  # fmt: skip
    """Pages [first, last) of a table, of which `length` tokens count: peak (M,) in base 2, sum (M,), output (M, DP)."""
    place, d = tl.arange(0, PAGE), tl.arange(0, DP)
    inside = (d < D)[None, :]
    peak = tl.full((M,), -float("inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    output = tl.zeros((M, DP), tl.float32)
    for number in range(first, last):
        page = tl.load(table + number).to(tl.int64)
        at = (page * HK + head) * PAGE * D + place[:, None] * D + d[None, :]
        seen = number * PAGE + place < length
        key = tl.load(keys + at, mask=inside, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * (scale * LOG2E)
        scores = tl.where(seen[None, :], scores, -float("inf"))
        now = tl.maximum(peak, tl.max(scores, 1))
        weights, old = tl.exp2(scores - now[:, None]), tl.exp2(peak - now)
        value = tl.load(values + at, mask=inside & seen[:, None], other=0.0)
        output = output * old[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        total = total * old + tl.sum(weights, 1)
        peak = now
    return peak, total, output


@triton.jit
def attend_prompts(query, keys, values, table, lengths, tile_prompt, tile_rows, output, sums, num_rows, scale, width,
                   HK: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
                   PAGE: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr):  # fmt: skip
    """Rows of one prompt, a tile at a time, over a split of its pages; output (SPLITS, R, Hq, D), log-sums likewise."""
    tile, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    prompt = tl.load(tile_prompt + tile)
    if prompt < 0:
        return
    M: tl.constexpr = ROWS * GP
    m, d = tl.arange(0, M), tl.arange(0, DP)
    row, group = tl.load(tile_rows + tile * ROWS + m // GP), m % GP
    real = (row >= 0) & (group < G)
    at = (row * HK * G + head * G + group).to(tl.int64)
    q = tl.load(query + at[:, None] * D + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
    length = tl.load(lengths + prompt)
    pages = tl.cdiv(length, PAGE)
    each = tl.cdiv(pages, SPLITS)
    first = split * each
    peak, total, out = _attend(q, keys, values, table + prompt * width, first, tl.minimum(first + each, pages), length,
                               scale, head, HK, PAGE, D, DP, M)  # fmt: skip
    to = split * num_rows * HK * G + at
    empty = total == 0.0
    out = out / tl.where(empty, 1.0, total)[:, None]
    tl.store(output + to[:, None] * D + d[None, :], out, mask=real[:, None] & (d < D)[None, :])
    tl.store(sums + to, tl.where(empty, -float("inf"), peak + tl.log2(total)), mask=real)


@triton.jit
def attend_own(query, keys, values, table, lengths, shared, shared_sums, output, sums, num_rows, scale, width,
               HK: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
               PAGE: tl.constexpr, SPLITS: tl.constexpr, SHARED: tl.constexpr):  # fmt: skip
    """A row over a split of its own pages, its newest token's among them.

    With one split the SHARED parts of its prompt are joined in and the result (R, Hq, D) is written; with several, a
    part like those of `attend_prompts`, which `join` takes.
    """
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    g, d = tl.arange(0, GP), tl.arange(0, DP)
    real = g < G
    at = (row * HK * G + head * G + g).to(tl.int64)
    inside = real[:, None] & (d < D)[None, :]
    q = tl.load(query + at[:, None] * D + d[None, :], mask=inside, other=0.0)
    length = tl.load(lengths + row) + 1
    pages = tl.cdiv(length, PAGE)
    each = tl.cdiv(pages, SPLITS)
    first = split * each
    peak, total, out = _attend(q, keys, values, table + row.to(tl.int64) * width, first,
                               tl.minimum(first + each, pages), length, scale, head, HK, PAGE, D, DP, GP)  # fmt: skip
    if SPLITS == 1:
        for part in range(SHARED):
            to = part * num_rows * HK * G + at
            other = tl.load(shared_sums + to, mask=real, other=-float("inf"))
            now = tl.maximum(peak, other)
            old, new = tl.exp2(peak - now), tl.exp2(other - now)
            more = tl.load(shared + to[:, None] * D + d[None, :], mask=inside, other=0.0)
            out = out * old[:, None] + more * new[:, None]
            total = total * old + new
            peak = now
        out = out / total[:, None]
        tl.store(output + at[:, None] * D + d[None, :], out.to(output.dtype.element_ty), mask=inside)
    else:
        to = split * num_rows * HK * G + at
        empty = total == 0.0
        out = out / tl.where(empty, 1.0, total)[:, None]
        tl.store(output + to[:, None] * D + d[None, :], out, mask=inside)
        tl.store(sums + to, tl.where(empty, -float("inf"), peak + tl.log2(total)), mask=real)


@triton.jit
def join(own, own_sums, shared, shared_sums, output, num_queries, D: tl.constexpr, DP: tl.constexpr,
         OWN: tl.constexpr, SHARED: tl.constexpr):  # fmt: skip
    """Parts of one query's attention, weighted by their sums of exponentials (arXiv:2205.14135, section 3.1)."""
    at = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DP)
    inside = d < D
    # the newest token is in some own part, so that the peak is finite
    peak = -float("inf")
    for part in tl.static_range(OWN):
        peak = tl.maximum(peak, tl.load(own_sums + part * num_queries + at))
    for part in tl.static_range(SHARED):
        peak = tl.maximum(peak, tl.load(shared_sums + part * num_queries + at))
    total = 0.0
    out = tl.zeros((DP,), tl.float32)
    for part in tl.static_range(OWN):
        share = tl.exp2(tl.load(own_sums + part * num_queries + at) - peak)
        out += share * tl.load(own + (part * num_queries + at) * D + d, mask=inside, other=0.0)
        total += share
    for part in tl.static_range(SHARED):
        share = tl.exp2(tl.load(shared_sums + part * num_queries + at) - peak)
        out += share * tl.load(shared + (part * num_queries + at) * D + d, mask=inside, other=0.0)
        total += share
    tl.store(output + at * D + d, (out / total).to(output.dtype.element_ty), mask=inside)


@triton.jit
def rotate_and_store(qkv, bias, q_weight, k_weight, cos, sin, query, keys, values, table, lengths, width, eps,
                     HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr,
                     BIAS: tl.constexpr, NORM: tl.constexpr):  # fmt: skip
    """One head of a row's newest token: bias, norm and rotation; a query goes to `query`, keys and values to a page."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, DP)
    inside = d < D
    half: tl.constexpr = D // 2
    other = tl.where(d < half, d + half, d - half)
    base = row * (HQ + 2 * HK) * D + head * D
    x = tl.load(qkv + base + d, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(qkv + base + other, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        x += tl.load(bias + head * D + d, mask=inside, other=0.0).to(tl.float32)
        y += tl.load(bias + head * D + other, mask=inside, other=0.0).to(tl.float32)
    is_value = head >= HQ + HK
    if not is_value:
        if NORM:
            factor = tl.rsqrt(tl.sum(tl.where(inside, x * x, 0.0)) / D + eps)
            if head < HQ:
                weight = q_weight
            else:
                weight = k_weight
            x = x * factor * tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
            y = y * factor * tl.load(weight + other, mask=inside, other=0.0).to(tl.float32)
        turn = tl.load(sin + row * D + d, mask=inside, other=0.0).to(tl.float32)
        x = x * tl.load(cos + row * D + d, mask=inside, other=0.0).to(tl.float32) + tl.where(d < half, -y, y) * turn
    if head < HQ:
        tl.store(query + (row * HQ + head) * D + d, x.to(query.dtype.element_ty), mask=inside)
    else:
        slot = tl.load(lengths + row)
        page = tl.load(table + row * width + slot // PAGE).to(tl.int64)
        at = ((page * HK + (head - HQ) % HK) * PAGE + slot % PAGE) * D + d
        if is_value:
            tl.store(values + at, x.to(values.dtype.element_ty), mask=inside)
        else:
            tl.store(keys + at, x.to(keys.dtype.element_ty), mask=inside)


@triton.jit
def add_and_normalise(x, y, weight, normed, size, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """x += y in place, and RMSNorm of the sum (arXiv:1910.07467, equation 4)."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    inside = k < size
    v = tl.load(x + row * size + k, mask=inside, other=0.0)
    if ADD:
        v = v + tl.load(y + row * size + k, mask=inside, other=0.0)
        tl.store(x + row * size + k, v, mask=inside)
    v = v.to(tl.float32)
    factor = tl.rsqrt(tl.sum(v * v) / size + eps)
    scaled = v * factor * tl.load(weight + k, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row * size + k, scaled.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def sum_blocks(logits, peaks, totals, size, blocks, inverse_temperature, BLOCK: tl.constexpr):
    """Peak and sum of exponentials of each block of a row's scaled logits, (R, blocks) float32 each."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    k = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * size + k, mask=k < size, other=-float("inf")).to(tl.float32) * inverse_temperature
    peak = tl.max(x)
    tl.store(peaks + row * blocks + block, peak)
    tl.store(totals + row * blocks + block, tl.sum(tl.exp(x - peak)))


@triton.jit
def draw_token(logits, peaks, totals, uniform, token, logprob, size, blocks, inverse_temperature, BLOCK: tl.constexpr,
               BLOCKS: tl.constexpr):  # fmt: skip
    """The token at which a row's running sum of probabilities passes its uniform number, and its log-probability."""
    row = tl.program_id(0).to(tl.int64)
    b = tl.arange(0, BLOCKS)
    block_peaks = tl.load(peaks + row * blocks + b, mask=b < blocks, other=-float("inf"))
    peak = tl.max(block_peaks)
    sums = tl.load(totals + row * blocks + b, mask=b < blocks, other=0.0) * tl.exp(block_peaks - peak)
    running = tl.cumsum(sums.to(tl.float64), 0)
    total = tl.max(running)
    target = tl.load(uniform + row) * total
    # rounding may put the target at the total: then the last block with a probability is taken
    last = tl.max(tl.where(sums > 0, b, 0))
    block = tl.minimum(tl.sum((running <= target).to(tl.int32)), last)
    before = tl.sum(tl.where(b < block, sums, 0.0).to(tl.float64))
    share = (target - before) / tl.sum(tl.where(b == block, sums, 0.0).to(tl.float64))
    k = tl.arange(0, BLOCK)
    at = block * BLOCK + k
    x = tl.load(logits + row * size + at, mask=at < size, other=-float("inf")).to(tl.float32) * inverse_temperature
    weights = tl.exp(x - peak)
    inner = tl.cumsum(weights.to(tl.float64), 0)
    final = tl.max(tl.where(weights > 0, k, 0))
    chosen = tl.minimum(tl.sum((inner <= share * tl.max(inner)).to(tl.int32)), final)
    tl.store(token + row, (block * BLOCK + chosen).to(tl.int64))
    value = tl.sum(tl.where(k == chosen, x, 0.0))
    tl.store(logprob + row, value - peak - tl.log(total.to(tl.float32)))
