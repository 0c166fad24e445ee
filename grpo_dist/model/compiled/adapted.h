// A linear layer with low-rank adapters (arXiv:2106.09685, equation 3) in float32, of some rows at a time, and its gradients.
//
// Every number of a row is a sum in an order that neither the other rows nor the threads have a part in. What is summed
// over rows is summed in parts that begin at the same rows for any number of threads.
//
// Shapes: T rows, I inputs, O outputs, r rank.

#pragma once

#include "weights.h"
#include <vector>

struct AdaptedLinear {
    int64_t inputs, outputs, rank; // rank 0 for no adapters
    float scaling;
    const float *weight, *bias, *a, *b; // (O, I), (O,) or null, (r, I), (O, r)
    float *low, *turned;                // (T, r): scaling · x Aᵀ; (r, O): B transposed
    float *grad_low, *grad_a, *grad_b;  // (T, r): scaling · grad B; gradients by A and B
};

namespace {

// of weights that rows share, which stay in the nearest caches meanwhile
constexpr long LINES_AT_ONCE = 128, COLUMNS_AT_ONCE = 256;
constexpr long SUMMED_COLUMNS = 64; // of a piece of an adapter's gradient

// to (rows, size) += weights (rows, count) times values (count, size)
template <int L>
void add_weighted(const float* weights, long rows, long count, const float* values, long size, float* to) {
    for (long column = 0; column < size; column += COLUMNS_AT_ONCE)
        for (long line = 0; line < count; line += LINES_AT_ONCE)
            Weighing<L, float>{weights + line, count, 1, values + line * size + column, size,
                               std::min(LINES_AT_ONCE, count - line), std::min(COLUMNS_AT_ONCE, size - column),
                               to + column, size}.run(rows);
}

// to (rows, outputs) = scaling · x times `lines` (outputs, inputs) transposed
template <int L>
void reduce_rows(const float* x, long rows, long inputs, const float* lines, long outputs, float scaling, float* to) {
    product_of_stored<L, false>(x, rows, inputs, outputs, Outputs{0, outputs}, Lines<float>{lines, inputs}, nullptr, to);
    for (long n = 0; n < rows * outputs; ++n) to[n] *= scaling;
}

template <int L> struct Adapted {
    const AdaptedLinear& l;

    void turn_b() const {
        for (long o = 0; o < l.outputs; ++o)
            for (long n = 0; n < l.rank; ++n) l.turned[n * l.outputs + o] = l.b[o * l.rank + n];
    }

    // of rows [from, from + rows), which x and y begin with: y = or, `adds`, += x Wᵀ + bias + low Bᵀ
    template <bool adds> void forward(const float* x, long from, long rows, float* y) const {
        product_of_stored<L, adds>(x, rows, l.inputs, l.outputs, Outputs{0, l.outputs}, Lines<float>{l.weight, l.inputs},
                                   l.bias, y);
        if (!l.rank) return;
        float* low = l.low + from * l.rank;
        reduce_rows<L>(x, rows, l.inputs, l.a, l.rank, l.scaling, low);
        add_weighted<L>(low, rows, l.rank, l.turned, l.outputs, y);
    }

    // grad_low of these rows and, where `to` is not null, to += the gradient by x, for that by y
    void backward(const float* grad, long from, long rows, float* to) const {
        float* low = l.grad_low + from * l.rank;
        if (l.rank) reduce_rows<L>(grad, rows, l.outputs, l.turned, l.rank, l.scaling, low);
        if (!to) return;
        add_weighted<L>(grad, rows, l.outputs, l.weight, l.inputs, to);
        if (l.rank) add_weighted<L>(low, rows, l.rank, l.a, l.inputs, to);
    }

    // pieces of the adapters' gradients
    long pieces() const { return l.rank ? pieces_of(l.inputs) + pieces_of(l.outputs) : 0; }

    static long pieces_of(long columns) { return (columns + SUMMED_COLUMNS - 1) / SUMMED_COLUMNS; }

    // one of them, of all rows of x and of the gradient by y; room for two of (r, SUMMED_COLUMNS)
    void sum_piece(long piece, const float* x, const float* grad, long rows, float* room) const {
        const bool of_a = piece < pieces_of(l.inputs);
        const long line = of_a ? l.inputs : l.outputs, from = (of_a ? piece : piece - pieces_of(l.inputs)) * SUMMED_COLUMNS;
        const long columns = std::min(SUMMED_COLUMNS, line - from);
        const float *weights = of_a ? l.grad_low : l.low, *values = (of_a ? x : grad) + from;
        float *total = room, *part = room + l.rank * SUMMED_COLUMNS;
        std::fill_n(total, l.rank * columns, 0.f);
        for (long row = 0; row < rows; row += LINES_AT_ONCE) {
            std::fill_n(part, l.rank * columns, 0.f);
            Weighing<L, float>{weights + row * l.rank, 1, l.rank, values + row * line, line,
                               std::min(LINES_AT_ONCE, rows - row), columns, part, columns}.run(l.rank);
            for (long n = 0; n < l.rank * columns; ++n) total[n] += part[n];
        }
        for (long n = 0; n < l.rank; ++n)
            for (long k = 0; k < columns; ++k)
                if (of_a) l.grad_a[n * line + from + k] = total[n * columns + k];
                else l.grad_b[(from + k) * l.rank + n] = total[n * columns + k];
    }
};

} // namespace
