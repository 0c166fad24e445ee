// The draw of a token from a row of logits, as `rollout/sampling.py` does it, in one pass behind that for the largest one.

#pragma once

#include <vector>

#include "vectors.h"

namespace {

constexpr long DRAW_BLOCK = 128; // tokens whose probabilities are summed at once

// `hashing.uniforms`, to the bit
double uniform(int64_t key, int64_t counter) {
    uint64_t x = static_cast<uint64_t>(key) + (static_cast<uint64_t>(counter) + 1) * 0x9E3779B97F4A7C15;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
    x = (x ^ x >> 27) * 0x94D049BB133111EB;
    return static_cast<double>((x ^ x >> 31) >> 11) * 0x1p-53;
}

// A row of logits that are divided by a temperature.
struct Row {
    const float* x;
    long size;
    float inverse, peak;

    Row(const float* x, long size, float inverse)
        : x(x), size(size), inverse(inverse), peak(largest<LANES>(x, size, x[0])) {}

    float shown(long k) const { return (x[k] - peak) * inverse; }

    // Probabilities of tokens from `k` on, as shares of the likeliest one's; 0 below e^-87, so for logits of -inf, and
    // behind the last token.
    Vec<LANES> weights(long k) const {
        const long n = std::min<long>(LANES, size - k);
        const Vec<LANES> v = (load_some<LANES>(x + k, n) - peak) * inverse;
        Vec<LANES> weight = v < -87.f ? Vec<LANES>{} : exponential<LANES>(v);
        for (long i = n; i < LANES; ++i) weight[i] = 0;
        return weight;
    }

    double sum_block(long first) const {
        Vec<LANES> total = {};
        for (long k = first, end = std::min(size, first + DRAW_BLOCK); k < end; k += LANES) total += weights(k);
        return sum<LANES>(total);
    }
};

// The first of `count` parts at which their running sum is above `target`, or, where rounding has put it beyond, the last
// one above 0; the sum before it goes to `before`.
template <class Part> long first_above(long count, double target, double& before, Part part) {
    double running = 0;
    long last = 0;
    for (long n = 0; n < count; ++n) {
        const double each = part(n);
        if (each > 0) last = n, before = running;
        running += each;
        if (running > target) return last;
    }
    return last;
}

void draw_row(const Row& row, double u, int64_t* token, float* logprob) {
    thread_local std::vector<double> sums; // of blocks
    sums.resize((row.size + DRAW_BLOCK - 1) / DRAW_BLOCK);
    double total = 0, before = 0, inside = 0, unused = 0;
    for (long n = 0; n < static_cast<long>(sums.size()); ++n) total += sums[n] = row.sum_block(n * DRAW_BLOCK);
    const long block = first_above(sums.size(), u * total, before, [&](long n) { return sums[n]; });
    alignas(CACHE_LINE) float weights[DRAW_BLOCK];
    for (long k = 0; k < DRAW_BLOCK; k += LANES)
        store<LANES>(block * DRAW_BLOCK + k < row.size ? row.weights(block * DRAW_BLOCK + k) : Vec<LANES>{}, weights + k);
    for (float weight : weights) inside += weight;
    // as a share of the block, because its sum was rounded in float32
    const double share = (u * total - before) / sums[block];
    *token = block * DRAW_BLOCK + first_above(DRAW_BLOCK, share * inside, unused, [&](long n) { return weights[n]; });
    *logprob = static_cast<float>(row.shown(*token) - std::log(total));
}

} // namespace
