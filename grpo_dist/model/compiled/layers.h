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

// the gradient by x, for that by the result
inline void normalise_backward(const float* grad, const float* x, long size, const float* weight, float factor, float* to) {
    Vec<8> products = {};
    for (long k = 0; k < size; k += 8) products += load<8>(x + k) * (load<8>(weight + k) * load<8>(grad + k));
    const float share = sum<8>(products) / size * factor * factor;
    for (long k = 0; k < size; ++k) to[k] = factor * (grad[k] * weight[k] - x[k] * share);
}

inline Vec<LANES> sigmoid(Vec<LANES> x) { return 1.f / (1.f + exponential<LANES>(-x)); }

// silu(gate) · up, SwiGLU's gate (arXiv:2002.05202, equation 6), of up to LANES numbers
inline void gate_numbers(const float* gate, const float* up, long count, float* to) {
    const Vec<LANES> g = load_some<LANES>(gate, count);
    store_some<LANES>(g * sigmoid(g) * load_some<LANES>(up, count), to, count);
}

// the gradients by both, for that by the result
inline void gate_numbers_backward(const float* grad, const float* gate, const float* up, long count, float* of_gate,
                                  float* of_up) {
    const Vec<LANES> g = load_some<LANES>(gate, count), slope = load_some<LANES>(grad, count), share = sigmoid(g);
    const Vec<LANES> by_gate = slope * load_some<LANES>(up, count) * share * (1.f + g * (1.f - share));
    store_some<LANES>(slope * g * share, of_up, count);
    store_some<LANES>(by_gate, of_gate, count);
}

// Turns each half of heads x (heads, size) of a token against the other, by `cos` and `sin` (size,): rotary position
// embedding (arXiv:2104.09864, equation 34). Or, `back`, makes gradients by the result those by x.
inline void turn_heads(float* x, long heads, long size, const float* cos, const float* sin, bool back) {
    const long half = size / 2;
    for (float* head = x; head < x + heads * size; head += size)
        for (long d = 0; d < half; d += 4) {
            auto at = [d](const float* numbers) { return load<4>(numbers + d); };
            const Vec<4> first = at(head), second = at(head + half);
            const Vec<4> of_first = at(back ? sin + half : sin), of_second = at(back ? sin : sin + half);
            store<4>(first * at(cos) + second * (back ? of_first : -of_first), head + d);
            store<4>(second * at(cos + half) + first * (back ? -of_second : of_second), head + half + d);
        }
}

// `visit` every LANES numbers of `count`: where they begin, and how many there are
template <class Visit> inline void vectors(long count, Visit visit) {
    for (long k = 0; k < count; k += LANES) visit(k, std::min<long>(LANES, count - k));
}

constexpr long VALUES_AT_ONCE = 32; // they stay in the nearest cache while several queries weigh them

// scores (queries, stride) = q Kᵀ of queries (queries, size) and `count` keys, `line` apart
template <int L, class C, class Fetch = NoFetch>
void score(const float* query, long queries, long size, const C* keys, long line, long count, float* scores, long stride,
           Fetch fetch = {}) {
    block_product<L>(query, queries, size, Lines<C>{keys, line}, size, 0, count, fetch,
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
template <int L, class C, class Fetch = NoFetch>
void weigh(const float* weights, long stride, long queries, long size, const C* values, long line, long count, float* to,
           Fetch fetch = {}) {
    for (long j = 0; j < count; j += VALUES_AT_ONCE)
        Weighing<L, C>{weights + j, stride, 1, values + j * line, line, std::min(VALUES_AT_ONCE, count - j), size, to, size}
            .run(queries, fetch);
}

} // namespace
