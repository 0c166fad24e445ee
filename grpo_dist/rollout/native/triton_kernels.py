"""The kernels of a decoding step on a GPU that no library has: attention over pages, norms, rotations and gates.

Each does in one pass over its data what torch would do in five or more. They are imported where Triton is; the
functions that launch them are in `fused.py`, which says what each computes in torch's terms.

Where a layer has adapters, the kernel that takes the layer's output adds what they make of it: `low` (R, r) times
`high` (r, outputs), in float32. An update too small for an output of 16 bits still reaches what is computed from it.

Shapes: R rows, Hq query heads, Hk key heads, G = Hq / Hk, D head size, r adapters' rank; a page holds PAGE tokens of
one layer as (Hk, PAGE, D).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...model.gate_kernel import inputs

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _attend(query, keys, values, table, first, last, low, start, length, scale, cap, head, HK: tl.constexpr,
            PAGE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, CAPPED: tl.constexpr,
            TOKENS: tl.constexpr):  # fmt: skip
    """Pages [first, last) of a table, TOKENS at a time: peak (M,) in base 2, sum (M,), output (M, DP).

    The tokens [low, length) are read, of which a query sees those from its `start` (M, 1) on.
    """
    token, d = tl.arange(0, TOKENS), tl.arange(0, DP)
    pieces: tl.constexpr = PAGE // TOKENS
    inside = (d < D)[None, :]
    peak = tl.full((M,), -float("inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    output = tl.zeros((M, DP), tl.float32)
    for number in range(first * pieces, last * pieces):
        page = tl.load(table + number // pieces).to(tl.int64)
        at = ((page * HK + head) * PAGE + number % pieces * TOKENS) * D + token[:, None] * D + d[None, :]
        place = number * TOKENS + token
        used = (place >= low) & (place < length)
        key = tl.load(keys + at, mask=inside & used[:, None], other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        if CAPPED:
            scores = cap * (1 - 2 / (tl.exp(2 * scores / cap) + 1))
        scores = tl.where(used[None, :] & (place[None, :] >= start), scores * LOG2E, -float("inf"))
        now = tl.maximum(peak, tl.max(scores, 1))
        # a query whose window begins after this page has seen nothing yet
        shift = tl.where(now == -float("inf"), 0.0, now)
        weights, old = tl.exp2(scores - shift[:, None]), tl.exp2(peak - shift)
        value = tl.load(values + at, mask=inside & used[:, None], other=0.0)
        output = output * old[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        total = total * old + tl.sum(weights, 1)
        peak = now
    return peak, total, output


@triton.jit
def attend_prompts(query, keys, values, table, lengths, own_lengths, tile_prompt, tile_rows, output, sums, num_rows,
                   scale, window, cap, width, HK: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr,
                   DP: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
                   SPLITS: tl.constexpr, CAPPED: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    """Rows of one prompt, one of the PARTS of a tile at a time, over a split of its pages; output (SPLITS, R, Hq, D),
    log-sums likewise."""
    part, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    prompt = tl.load(tile_prompt + part // PARTS)
    if prompt < 0:
        return
    M: tl.constexpr = ROWS * GP
    m, d = tl.arange(0, M), tl.arange(0, DP)
    row, group = tl.load(tile_rows + part * ROWS + m // GP), m % GP
    real = (row >= 0) & (group < G)
    at = (row * HK * G + head * G + group).to(tl.int64)
    q = tl.load(query + at[:, None] * D + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
    length = tl.load(lengths + prompt)
    start = length + tl.load(own_lengths + row, mask=real, other=0) + 1 - window
    low = tl.minimum(tl.maximum(tl.min(tl.where(real, start, length)), 0), length)
    pages = tl.cdiv(length, PAGE)
    begin = low // PAGE
    each = tl.cdiv(pages - begin, SPLITS)
    first = begin + split * each
    peak, total, out = _attend(q, keys, values, table + prompt * width, first, tl.minimum(first + each, pages), low,
                               start[:, None], length, scale, cap, head, HK, PAGE, D, DP, M, CAPPED,
                               TOKENS)  # fmt: skip
    to = split * num_rows * HK * G + at
    empty = total == 0.0
    out = out / tl.where(empty, 1.0, total)[:, None]
    tl.store(output + to[:, None] * D + d[None, :], out, mask=real[:, None] & (d < D)[None, :])
    tl.store(sums + to, tl.where(empty, -float("inf"), peak + tl.log2(total)), mask=real)


@triton.jit
def attend_own(query, keys, values, table, lengths, sinks, shared, shared_sums, output, sums, num_rows, scale, window,
               cap, width, HK: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
               PAGE: tl.constexpr, SPLITS: tl.constexpr, SHARED: tl.constexpr, CAPPED: tl.constexpr,
               SINKS: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    """A row over a split of its own pages, its newest token's among them. Sinks (Hq,) join the first split.

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
    low = tl.maximum(length - window, 0)
    pages = tl.cdiv(length, PAGE)
    begin = low // PAGE
    each = tl.cdiv(pages - begin, SPLITS)
    first = begin + split * each
    peak, total, out = _attend(q, keys, values, table + row.to(tl.int64) * width, first,
                               tl.minimum(first + each, pages), low, low, length, scale, cap, head, HK, PAGE, D, DP, GP,
                               CAPPED, TOKENS)  # fmt: skip
    if SINKS:
        sink = tl.load(sinks + head * G + g, mask=real, other=-float("inf")).to(tl.float32) * LOG2E
        sink = tl.where(split == 0, sink, -float("inf"))
        now = tl.maximum(peak, sink)
        shift = tl.where(now == -float("inf"), 0.0, now)
        old = tl.exp2(peak - shift)
        out, total, peak = out * old[:, None], total * old + tl.exp2(sink - shift), now
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
def rotate_and_store(qkv, high, bias, q_weight, k_weight, cos, sin, query, keys, values, table, lengths, width, eps,
                     HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr,
                     RANK: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr):  # fmt: skip
    """One head of a row's newest token: adapters, bias, norm and rotation; a query goes to `query`, keys and values to
    a page. Behind its heads a row of `qkv` has `low` of the queries' adapters, of the keys' and of the values'."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, DP)
    inside = d < D
    half: tl.constexpr = D // 2
    other = tl.where(d < half, d + half, d - half)
    size: tl.constexpr = (HQ + 2 * HK) * D
    base = row * (size + 3 * RANK)
    x = tl.load(qkv + base + head * D + d, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(qkv + base + head * D + other, mask=inside, other=0.0).to(tl.float32)
    low = qkv + base + size + RANK * ((head >= HQ).to(tl.int32) + (head >= HQ + HK).to(tl.int32))
    for j in range(RANK):
        share = tl.load(low + j).to(tl.float32)
        to = high + j * size + head * D
        x += share * tl.load(to + d, mask=inside, other=0.0).to(tl.float32)
        y += share * tl.load(to + other, mask=inside, other=0.0).to(tl.float32)
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
def add_and_normalise(x, y, low, high, bias, added_weight, weight, normed, size, added_eps, eps, ADD: tl.constexpr,
                      RANK: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """x += y in place, with y's adapters and bias, and RMSNorm of the sum (arXiv:1910.07467, equation 4). With NORM it
    is the RMSNorm of y that is added."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    inside = k < size
    v = tl.load(x + row * size + k, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        more = tl.load(y + row * size + k, mask=inside, other=0.0).to(tl.float32)
        for j in range(RANK):
            share = tl.load(low + row * RANK + j).to(tl.float32)
            more += share * tl.load(high + j * size + k, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            more += tl.load(bias + k, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            share = tl.rsqrt(tl.sum(more * more) / size + added_eps)
            more = more * share * tl.load(added_weight + k, mask=inside, other=0.0).to(tl.float32)
        stored = (v + more).to(x.dtype.element_ty)
        tl.store(x + row * size + k, stored, mask=inside)
        v = stored.to(tl.float32)
    factor = tl.rsqrt(tl.sum(v * v) / size + eps)
    scaled = v * factor * tl.load(weight + k, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row * size + k, scaled.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def multiply_by_gate(gate, up, low, gate_high, up_high, gate_bias, up_bias, output, num_rows, size, RANK: tl.constexpr,
                     BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr):  # fmt: skip
    """SwiGLU (arXiv:2002.05202, equation 6) of a tile of rows and outputs, with the adapters of both layers: `low` has
    the gate's and, beside it, those of `up`. With GELU the gate goes through its approximation by tanh
    (arXiv:1606.08415, section 2), where (1 + tanh(y)) / 2 = 1 / (1 + exp(-2 y))."""
    m, k = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rows, columns = m < num_rows, k < size
    at = m.to(tl.int64)[:, None] * size + k[None, :]
    g, u = inputs(gate, up, low, gate_high, up_high, at, m, k, rows, columns, 1, size, RANK)
    if BIAS:
        g += tl.load(gate_bias + k, mask=columns, other=0.0).to(tl.float32)[None, :]
        u += tl.load(up_bias + k, mask=columns, other=0.0).to(tl.float32)[None, :]
    y = g * (1.5957691216 + 0.0713548163 * g * g) if GELU else g
    tl.store(output + at, (g / (1 + tl.exp(-y)) * u).to(output.dtype.element_ty), mask=rows[:, None] & columns[None, :])
