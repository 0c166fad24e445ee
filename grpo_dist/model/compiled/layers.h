// What layers compute of a row beside products with weights.

#pragma once

#include "products.h"

namespace {

// x · weight / sqrt(mean square + eps), RMSNorm (arXiv:1910.07467, equation 4); returns what x was
// multiplied by beside the weight
template <int L, class X> float normalise(const float* x, long size, const float* weight, float eps, X* to) {
    Vec<L> squares = {};
    for (long k = 0; k < size; k += L) squares += load<L>(x + k) * load<L>(x + k);
    float factor = 1 / std::sqrt(sum<L>(squares) / size + eps);
    for (long k = 0; k < size; ++k) store(weight[k] * (x[k] * factor), to + k);
    return factor;
}

constexpr long VALUES_AT_ONCE = 32; // they stay in the nearest cache while several queries weigh them

// scores (queries, stride) = q Kᵀ of queries (queries, size) and `count` keys, `line` apart
template <int L, class C>
void score(const float* query, long queries, long size, const C* keys, long line, long count, float* scores, long stride) {
    block_product<L>(query, queries, size, Lines<C>{keys, line}, size, 0, count, Ahead<C>(),
                     Target{scores, stride, nullptr, false});
}

// softmax of `count` scores and a sink (-INFINITY: none), in place; L more can be written behind them. Returns the
// logarithm of what they were divided by.
template <int L> float softmax(float* scores, long count, float sink) {
    for (int i = 0; i < L; ++i) scores[count + i] = -INFINITY;
    const float peak = largest<L>(scores, count, sink);
    Vec<L> total = {};
    for (long j = 0; j < count; j += L) {
        Vec<L> weights = exponential<L>(load<L>(scores + j) - peak);
        store<L>(weights, scores + j);
        total += weights;
    }
    const float whole = sum<L>(total) + std::exp(sink - peak); // what is behind adds e^-87 at most
    for (long j = 0; j < count; ++j) scores[j] *= 1 / whole;
    return peak + std::log(whole);
}

// to (queries, size) += weights (queries, stride) times `count` values, `line` apart
template <int L, class C>
void weigh(const float* weights, long stride, long queries, long size, const C* values, long line, long count, float* to) {
    for (long j = 0; j < count; j += VALUES_AT_ONCE)
        Weighing<L, C>{weights + j, stride, 1, values + j * line, line, std::min(VALUES_AT_ONCE, count - j), size, to, size}
            .run(queries);
}

} // namespace
