// Products of rows with lines of weights, and sums of rows that others weigh, one thread's part of them.
//
// Every number of a row is a sum in an order that neither the other rows nor the threads have a part in.

#pragma once

#include "vectors.h"

namespace {

constexpr long ROW_BLOCK = 24;     // rows of a block of tiles
constexpr long FETCH_AHEAD = 8192; // bytes, of weights that are read from one end to the other

// What a product does with its sums: to (rows, outputs) = or, `adds`, += them + b where it is given.
struct Target {
    float* to;
    long outputs;
    const float* bias;
    bool adds;

    template <int M> void put(Vec<4> sums, long row, long output) const { // the first M of them
        float* y = to + row * outputs + output;
        Vec<4> before = {}, behind = {};
        if (adds) std::memcpy(&before, y, M * sizeof(float));
        if (bias) std::memcpy(&behind, bias + output, M * sizeof(float));
        const Vec<4> total = before + (sums + behind);
        std::memcpy(y, &total, M * sizeof(float));
    }
};

// How a product fetches weights that it will need: before each tile, at each step of one over the inputs, and at each place
// that it reads.
struct NoFetch {
    void tile() {}
    void step() {}
    template <class W> void at(const W*, long) {}
};

// those behind a place that is read: of one tile of rows, which reads weights from one end to the other
struct FetchBehind : NoFetch {
    template <class W> void at(const W* place, long k) {
        if (k * sizeof(W) % CACHE_LINE == 0) __builtin_prefetch(place + FETCH_AHEAD / sizeof(W), 0, 2);
    }
};

// Some weights, (lines, count) with a stride from one line to the next; none at all by default.
template <class W> struct Block {
    const W* first = nullptr;
    long lines = 0, stride = 0, count = 0;
};

// A block, little by little while another block is at work: with more than one tile of rows, memory would rest during the
// sums and the sums wait for memory. With few tiles that is at each of their steps: more cache lines at once than a core
// may wait for would stop the sums.
template <class W, bool BY_TILE> class FetchBlock : public NoFetch {
    static constexpr long AT_ONCE = CACHE_LINE / sizeof(W);
    Block<W> rest;
    const long total, turns;
    long left = total, at_line = 0, due = 0;

    void turn() {
        for (due += total; due >= turns && left > 0; due -= turns, --left) {
            __builtin_prefetch(rest.first + at_line, 0, 2);
            at_line += AT_ONCE;
            if (at_line >= rest.count) at_line = 0, rest.first += rest.stride;
        }
    }

  public:
    FetchBlock(Block<W> block, long tiles, long steps)
        : rest(block), total(block.lines * ((block.count + AT_ONCE - 1) / AT_ONCE)),
          turns(BY_TILE ? tiles : tiles * steps) {}

    void tile() {
        if (BY_TILE) turn();
    }
    void step() {
        if (!BY_TILE) turn();
    }
};

// How weights lie: line behind line.
template <class W> struct Lines {
    const W* first;
    long stride; // from one line to the next

    const W* at(long line, long k) const { return first + line * stride + k; }
    Lines from(long line, long k) const { return {at(line, k), stride}; }
    Block<W> block(long lines, long count) const { return {first, lines, stride, count}; }
};

// How weights lie that are read once: of OUTPUTS lines each cache line in turn, so that a tile is one stream.
template <class W> struct Groups {
    static constexpr long TOGETHER = CACHE_LINE / sizeof(W);
    const W* first;
    long stride; // numbers of a line

    const W* at(long line, long k) const { // of the first group
        return first + (k / TOGETHER * OUTPUTS + line) * TOGETHER + k % TOGETHER;
    }
    Groups from(long line, long k) const { return {first + line * stride + k * OUTPUTS, stride}; } // of whole groups
    Block<W> block(long lines, long count) const {
        return {first, lines / OUTPUTS, stride * OUTPUTS, count * OUTPUTS};
    }
};

// N rows of x, `stride` apart, times M lines of weights, over `count` inputs
template <int L, int N, int M, class X, template <class> class Weights, class W, class Fetch>
inline void tile(const X* x, long stride, Weights<W> w, long count, const Target& target, long row, long output,
                 Fetch& fetch) {
    Vec<L> parts[N][OUTPUTS]; // those beyond M stay 0
    UNROLL for (int r = 0; r < N; ++r)
        UNROLL for (int o = 0; o < OUTPUTS; ++o) parts[r][o] = Vec<L>{};
    for (long k = 0; k < count; k += PIECE<L, X>) {
        if (k % SPAN == 0) fetch.step();
        decltype(piece<L, X>(x)) xs[N];
        UNROLL for (int r = 0; r < N; ++r) {
            auto numbers = piece<L, X>(x + r * stride + k);
            hold(numbers);
            xs[r] = numbers;
        }
        UNROLL for (int o = 0; o < M; ++o) {
            const W* place = w.at(o, k);
            fetch.at(place, k);
            auto weights = piece<L, X>(place);
            hold(weights);
            UNROLL for (int r = 0; r < N; ++r) parts[r][o] = multiply_add<L>(xs[r], weights, parts[r][o]);
        }
    }
    UNROLL for (int r = 0; r < N; ++r)
        target.put<M>(sums<L>(parts[r][0], parts[r][1], parts[r][2], parts[r][3]), row + r, output);
}

template <int L, int M, int N = ROWS, class X, class... Rest> inline void tile_of(long rows, const X* x, Rest&&... rest) {
    if (N == 1 || rows == N) tile<L, N, M>(x, rest...);
    else tile_of<L, M, std::max(N - 1, 1)>(rows, x, rest...);
}

// of `rows` times `outputs` lines of weights
inline long tiles_of(long rows, long outputs) { return (outputs + OUTPUTS - 1) / OUTPUTS * ((rows + ROWS - 1) / ROWS); }

// rows of x, `stride` apart, times outputs [from, end), whose weights are the first ones of `weights`, over `count` inputs
template <int L, class X, template <class> class Weights, class W, class Fetch>
void block_product(const X* x, long rows, long stride, Weights<W> weights, long count, long from, long end, Fetch fetch,
                   const Target& target) {
    for (long row_block = 0; row_block < rows; row_block += ROW_BLOCK)
        for (long o = from; o < end; o += OUTPUTS)
            for (long r = row_block, row_end = std::min(row_block + ROW_BLOCK, rows), size; r < row_end; r += size) {
                const long tiles = (row_end - r + ROWS - 1) / ROWS;
                size = (row_end - r + tiles - 1) / tiles; // no tile of a single row beside a full one
                fetch.tile();
                const X* xs = x + r * stride;
                if (end - o >= OUTPUTS)
                    tile_of<L, OUTPUTS>(size, xs, stride, weights.from(o - from, 0), count, target, r, o, fetch);
                else
                    for (long i = o; i < end; ++i)
                        tile_of<L, 1>(size, xs, stride, weights.from(i - from, 0), count, target, r, i, fetch);
            }
}

// What several rows make of the same values: to (rows, size) += weights (rows, count) times values (count, size), each
// with a stride from one line to the next.
template <int L, class C> struct Weighing {
    const float* weights;
    long weights_stride, weights_step;
    const C* values;
    long values_stride, count, size;
    float* to;
    long to_stride;

    // Q rows from `row` on and N vectors of them from `d` on
    template <int Q, int N, class Fetch> void add(long row, long d, Fetch& fetch) const {
        Vec<L> outputs[Q][N];
        UNROLL for (int q = 0; q < Q; ++q)
            UNROLL for (int n = 0; n < N; ++n) outputs[q][n] = load<L>(to + (row + q) * to_stride + d + n * L);
        for (long i = 0; i < count; ++i) {
            fetch.step();
            Vec<L> value[N];
            UNROLL for (int n = 0; n < N; ++n) value[n] = load<L>(values + i * values_stride + d + n * L);
            UNROLL for (int q = 0; q < Q; ++q) {
                const Vec<L> weight = Vec<L>{} + weights[(row + q) * weights_stride + i * weights_step];
                UNROLL for (int n = 0; n < N; ++n) outputs[q][n] = multiply_add<L>(weight, value[n], outputs[q][n]);
            }
        }
        UNROLL for (int q = 0; q < Q; ++q)
            UNROLL for (int n = 0; n < N; ++n) store<L>(outputs[q][n], to + (row + q) * to_stride + d + n * L);
    }

    template <int Q, class Fetch> void add(long row, Fetch& fetch) const {
        constexpr int N = L == 16 ? 4 : 2; // sums that fit in registers beside what they add
        long d = 0;
        for (; d + N * L <= size; d += N * L) add<Q, N>(row, d, fetch);
        for (; d < size; d += L) add<Q, 1>(row, d, fetch);
    }

    template <class Fetch = NoFetch> void run(long rows, Fetch&& fetch = NoFetch()) const {
        long row = 0;
        for (; row + 6 <= rows; row += 6) add<6>(row, fetch);
        for (; row + 3 <= rows; row += 3) add<3>(row, fetch);
        if (rows - row == 2) add<2>(row, fetch);
        if (rows - row == 1) add<1>(row, fetch);
    }
};

} // namespace
