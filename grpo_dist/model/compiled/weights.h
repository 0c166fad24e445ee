// Products of rows with the weights of a linear layer, in any form that these are held in.
//
// Every number of a row is a sum in an order that neither the other rows nor the threads have a part in.

#pragma once

#include "compact.h"

struct Linear {
    const void* weight; // its numbers or, of a quantised layer, their codes, line behind line
    int64_t grouped;    // whether its numbers lie as `Groups`, and not line behind line
    Compact compact;    // the same numbers, which few rows wait for less long; without blocks for none
    const float* bias;  // null for none
    const float* scales; // of a quantised layer: one for `block` weights that follow one another; null for others
    const float* values; // of codes of 4 bits, two a byte, the first in its high half: the 16 that they name;
                         // null for codes that are whole numbers of 8 bits
    int64_t block;
    const void* low;   // (rank, inputs), the adapters' first matrix in the weights' dtype
    const float* high; // their second one, transposed and scaled: (outputs / HIGH_BLOCK, rank, HIGH_BLOCK)
    int64_t rank;      // 0 for no adapters
};

namespace {

// L codes of 4 bits; where a processor has its bytes in another order, the trial at the start of a run shows it
template <int L> inline Ints<L> codes_at(const uint8_t* from) {
    if constexpr (L == 8) {
        int32_t codes;
        std::memcpy(&codes, from, sizeof codes);
        return codes >> Ints<8>{4, 0, 12, 8, 20, 16, 28, 24} & 15;
    } else {
        typedef int64_t Pairs __attribute__((vector_size(64)));
        int64_t codes;
        std::memcpy(&codes, from, sizeof codes);
        const Pairs pairs = codes >> Pairs{0, 8, 16, 24, 32, 40, 48, 56};
        return (Ints<L>)((pairs >> 4 & 15) | (pairs & 15) << 32);
    }
}

// those of 16 numbers that the codes name
template <int L> inline Vec<L> named(const Vec<L>* table, Ints<L> codes) {
#ifdef __clang__
    Vec<L> v;
    for (int i = 0; i < L; ++i) v[i] = table[codes[i] / L][codes[i] % L];
    return v;
#else
    if constexpr (L == 16) return __builtin_shuffle(table[0], codes);
    else return __builtin_shuffle(table[0], table[1], codes);
#endif
}

// `count` weights of a quantised layer, from the one at `first` on, to the bit as W would hold them
template <int L, class W, class X> void dequantise(const Linear& layer, long first, long count, X* to) {
    const uint8_t* pairs = static_cast<const uint8_t*>(layer.weight);
    const int8_t* numbers = static_cast<const int8_t*>(layer.weight);
    for (long at = first, end = first + count, next; at < end; at = next) {
        const float scale = layer.scales[at / layer.block];
        next = std::min<long>(end, (at / layer.block + 1) * layer.block);
        if (layer.values) {
            Vec<L> table[16 / L]; // scaled once a block
            for (int n = 0; n < 16 / L; ++n) table[n] = rounded<L, W>(load<L>(layer.values + n * L) * scale);
            for (long k = at; k < next; k += L) store<L>(named<L>(table, codes_at<L>(pairs + (k >> 1))), to + k - first);
        } else {
            for (long k = at; k < next; k += L) store<L>(rounded<L, W>(load<L>(numbers + k) * scale), to + k - first);
        }
    }
}

struct Outputs { // of a layer, whole tiles but for its last one
    long from, to;
};

// Inputs are summed in equal parts of at most CHUNK_BYTES. Of such a part, a tile's OUTPUTS lines of weights and ROWS rows
// fit in the nearest cache, and a block's ROW_BLOCK rows and OUTPUT_BLOCK lines, and the next ones on their way, in the
// second.
constexpr long CHUNK_BYTES = 4096, OUTPUT_BLOCK = 32;
template <class X> constexpr long CHUNK = CHUNK_BYTES / sizeof(X);
// inputs are summed in equal parts of so many
template <int L, class X> long chunk_of(long inputs) {
    constexpr long WHOLE = SPAN; // cache lines, too
    const long parts = (inputs + CHUNK<X> - 1) / CHUNK<X>;
    return ((inputs + WHOLE - 1) / WHOLE + parts - 1) / parts * WHOLE;
}

// most rows for which to read what is compact; with more, a step computes for as long as it waits
template <class X> constexpr long MOST_FROM_COMPACT = std::is_same_v<X, float> ? 16 : ROWS;

// As `product`, of few rows and from what is compact: they wait for the weights, which this reads from one end to the
// other.
template <int L, bool adds, class X>
void product_of_compact(const X* x, long rows, long inputs, long outputs, Outputs mine, const Linear& layer, float* to) {
    const long chunk = chunk_of<L, X>(inputs), tiles = (rows + COMPACT_ROWS - 1) / COMPACT_ROWS;
    const Compact& compact = layer.compact;
    for (long o = mine.from; o < mine.to; o += 2) {
        const uint8_t *block = compact.blocks + compact.starts[o / 2], *next = block;
        const uint8_t* whole = compact.whole + o / 2 * (inputs / SPAN);
        const Pairs<L> base = Pairs<L>{} + compact.bases[o / 2];
        for (long k = 0; k < inputs; k += chunk, block = next) {
            const Target target{to, outputs, k ? nullptr : layer.bias, adds || k};
            for (long tile = 0, r = 0, end; tile < tiles; ++tile, r = end) {
                end = rows * (tile + 1) / tiles;
                next = tile_of_compact<L>(end - r, x + r * inputs + k, inputs, block, whole + k / SPAN, base,
                                          std::min(chunk, inputs - k), std::min(2L, mine.to - o), target, r, o);
            }
        }
    }
}

// As `product`, of rows that fit in a tile: they wait for the weights, which this reads from one end to the other.
template <int L, bool adds, class X, template <class> class Weights, class W>
void product_of_few(const X* x, long rows, long inputs, long outputs, Outputs mine, Weights<W> weights,
                    const float* bias, float* to) {
    const long chunk = chunk_of<L, X>(inputs);
    for (long o = mine.from; o < mine.to; o += OUTPUTS)
        for (long k = 0; k < inputs; k += chunk)
            block_product<L>(x + k, rows, inputs, weights.from(o, k), std::min(chunk, inputs - k), o,
                                   std::min<long>(o + OUTPUTS, mine.to), FetchBehind(),
                                   Target{to, outputs, k ? nullptr : bias, adds || k});
}

// As `product`, of weights that are converted beforehand, which tiles of few rows would do too often. What is converted is
// used at once, in the nearest cache where all rows are one block.
template <int L, class W, bool adds, class X>
void product_of_converted(const X* x, long rows, long inputs, long outputs, Outputs mine, const Linear& layer,
                          float* to) {
    const W* weight = static_cast<const W*>(layer.weight);
    const long chunk = chunk_of<L, X>(inputs), lines_at_once = rows <= ROW_BLOCK ? OUTPUTS : OUTPUT_BLOCK;
    alignas(CACHE_LINE) X dense[OUTPUT_BLOCK * CHUNK<X>];
    for (long block = mine.from, end; block < mine.to; block = end) {
        end = std::min(block + lines_at_once, mine.to);
        for (long k = 0; k < inputs; k += chunk) {
            const long count = std::min(chunk, inputs - k);
            for (long o = block; o < end; ++o) {
                X* line = dense + (o - block) * count;
                if (layer.scales) dequantise<L, W>(layer, o * inputs + k, count, line);
                else
                    for (long i = 0; i < count; i += L) store<L>(load<L>(weight + o * inputs + k + i), line + i);
            }
            block_product<L>(x + k, rows, inputs, Lines<X>{dense, count}, count, block, end, NoFetch(),
                             Target{to, outputs, k ? nullptr : layer.bias, adds || k});
        }
    }
}

// As `product`, of weights that lie as `Lines` or `Groups`.
template <int L, bool adds, class X, template <class> class Weights, class W>
void product_of_stored(const X* x, long rows, long inputs, long outputs, Outputs mine, Weights<W> weights,
                       const float* bias, float* to, const Block<W>* next = nullptr) {
    if (rows <= ROWS) return product_of_few<L, adds>(x, rows, inputs, outputs, mine, weights, bias, to);
    const long chunk = chunk_of<L, X>(inputs);
    for (long first = mine.from, end; first < mine.to; first = end) {
        end = std::min(first + OUTPUT_BLOCK, mine.to);
        const long tiles = tiles_of(rows, end - first);
        for (long k = 0, count; k < inputs; k += count) {
            count = std::min(chunk, inputs - k);
            Block<W> block = next ? *next : weights.from(end, 0).block(std::min(OUTPUT_BLOCK, outputs - end), chunk);
            if (k + count < inputs) block = weights.from(first, k + count).block(end - first, chunk);
            else if (next && end < mine.to) block = weights.from(end, 0).block(mine.to - end, chunk);
            auto fetching = [&](auto fetch) {
                block_product<L>(x + k, rows, inputs, weights.from(first, k), count, first, end, fetch,
                                 Target{to, outputs, k ? nullptr : bias, adds || k});
            };
            if (rows > ROW_BLOCK) fetching(FetchBlock<W, true>(block, tiles, 1));
            else fetching(FetchBlock<W, false>(block, tiles, (count + SPAN - 1) / SPAN));
        }
    }
}

// to (rows, outputs) = or, `adds`, += W x + b; those of the outputs that are `mine`. `next` is what is read after it, null
// for what follows in memory.
template <int L, class W, bool adds, class X>
void product(const X* x, long rows, long inputs, long outputs, Outputs mine, const Linear& layer, float* to,
             const Block<W>* next = nullptr) {
    if (layer.scales || (!std::is_same_v<W, X> && LANES == 8 && rows > ROW_BLOCK))
        return product_of_converted<L, W, adds>(x, rows, inputs, outputs, mine, layer, to);
    const W* weight = static_cast<const W*>(layer.weight);
    if constexpr (std::is_same_v<W, float>)
        if (layer.grouped)
            return product_of_stored<L, adds>(x, rows, inputs, outputs, mine, Groups<W>{weight, inputs}, layer.bias, to,
                                              next);
    product_of_stored<L, adds>(x, rows, inputs, outputs, mine, Lines<W>{weight, inputs}, layer.bias, to, next);
}

// what `product` reads first
template <int L, class W, class X> Block<W> first_block(long inputs, Outputs mine, const Linear& layer) {
    const long lines = std::min(OUTPUT_BLOCK, mine.to - mine.from), count = std::min(chunk_of<L, X>(inputs), inputs);
    if (layer.scales) return {};
    const W* weight = static_cast<const W*>(layer.weight);
    if (layer.grouped) return Groups<W>{weight, inputs}.from(mine.from, 0).block(lines, count);
    return Lines<W>{weight, inputs}.from(mine.from, 0).block(lines, count);
}

// to (rows, outputs) += low (rows, rank) times the adapters' second matrix; those of the outputs that are `mine`. What is
// added comes from blocks that begin at the same outputs for any number of threads.
template <int L>
void add_low_rank(const float* low, long rows, long outputs, Outputs mine, const Linear& layer, float* to) {
    // outputs, which stay in the nearest cache for all rows and are one stream, and rows
    constexpr long BLOCK = HIGH_BLOCK, AT_ONCE = 6;
    for (long block = mine.from / BLOCK * BLOCK; block < mine.to; block += BLOCK)
        for (long r = 0; r < rows; r += AT_ONCE) {
            const long count = std::min(AT_ONCE, rows - r);
            float added[AT_ONCE * BLOCK] = {};
            Weighing<L, float>{low + r * layer.rank, layer.rank, 1, layer.high + block * layer.rank, BLOCK, layer.rank,
                               BLOCK, added, BLOCK}.run(count);
            for (long n = 0; n < count; ++n)
                for (long o = std::max(block, mine.from); o < std::min(block + BLOCK, mine.to); ++o)
                    to[(r + n) * outputs + o] += added[n * BLOCK + o - block];
        }
}

} // namespace
