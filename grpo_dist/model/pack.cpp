// What a pass over a pack computes on a CPU in float32 beside its products with weights: attention, RMSNorm, SwiGLU's
// gate, rotations and log-probabilities, each with its gradient. torch has several operations for each, and each of these
// reads and writes all of its numbers.
//
// What is computed of a token depends neither on other sequences of the pack nor on the number of threads.
//
// Shapes: T tokens, Hq query heads, Hk key heads, D head size.

#include "attending.h"
#include "decoder_layer.h"

namespace {

constexpr long FEW = 1 << 14; // numbers for which threads are not worth waking

// `visit` every L numbers of `count`: where they begin, and how many there are
template <class Visit> void each_vector(int64_t count, int64_t threads, Visit visit) {
    constexpr long AT_ONCE = 4096 / LANES;
#pragma omp parallel for schedule(dynamic, AT_ONCE) num_threads(threads) if (count > FEW)
    for (long k = 0; k < count; k += LANES) visit(k, std::min<long>(LANES, count - k));
}

template <class Visit> void each_row(int64_t rows, int64_t size, int64_t threads, Visit visit) {
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads) if (rows * size > FEW)
    for (long r = 0; r < rows; ++r) visit(r);
}

constexpr long SUMMED = 4096; // numbers that are summed in float32, before their sum is added to the others' in float64

// Of a row of logits that are divided by a temperature: log-probability of a target and entropy of their softmax. With
// `slopes` the derivative of that log-probability by the logits takes their place.
void score_row(float* x, long size, long target, float inverse, bool slopes, float* logprob, float* entropy) {
    const float peak = largest<LANES>(x, size, x[0]), shown = (x[target] - peak) * inverse;
    double total = 0, weighted = 0;
    for (long from = 0; from < size; from += SUMMED) {
        Vec<LANES> sum_of = {}, weighted_of = {};
        for (long k = from, end = std::min(size, from + SUMMED); k < end; k += LANES) {
            const long n = std::min<long>(LANES, end - k);
            Vec<LANES> v = (load_some<LANES>(x + k, n) - peak) * inverse;
            v = v < -87.f ? Vec<LANES>{} - 87.f : v; // the least that `exponential` takes
            Vec<LANES> share = exponential<LANES>(v);
            for (long i = n; i < LANES; ++i) share[i] = 0;
            if (slopes) store_some<LANES>(share, x + k, n);
            sum_of += share, weighted_of += share * v;
        }
        total += sum<LANES>(sum_of), weighted += sum<LANES>(weighted_of);
    }
    *logprob = shown - std::log(total);
    *entropy = std::log(total) - weighted / total;
    if (!slopes) return;
    const float factor = -inverse / total;
    for (long k = 0; k < size; ++k) x[k] *= factor;
    x[target] += inverse;
}

} // namespace

extern "C" void attend(int64_t threads, const Attention* a) {
    if (a->head_size % LANES == 0) Attending<LANES>(*a, threads).forward();
    else Attending<8>(*a, threads).forward();
}

extern "C" void attend_backward(int64_t threads, const Attention* a) {
    if (a->head_size % LANES == 0) Attending<LANES>(*a, threads).backward();
    else Attending<8>(*a, threads).backward();
}

// RMSNorm of x (rows, size): x · weight · factor, and the factor of each row, 1 / sqrt(mean square + eps)
extern "C" void norm(int64_t threads, const float* x, const float* weight, float eps, int64_t rows, int64_t size, float* to,
                     float* factors) {
    each_row(rows, size, threads,
             [=](long r) { factors[r] = normalise<8>(x + r * size, size, weight, eps, to + r * size); });
}

extern "C" void norm_backward(int64_t threads, const float* grad, const float* x, const float* weight, const float* factors,
                              int64_t rows, int64_t size, float* to) {
    each_row(rows, size, threads, [=](long r) {
        normalise_backward(grad + r * size, x + r * size, size, weight, factors[r], to + r * size);
    });
}

// `score_row` of logits (rows, size)
extern "C" void score_rows(int64_t threads, float* logits, const int64_t* targets, int64_t rows, int64_t size, float inverse,
                           int64_t slopes, float* logprobs, float* entropies) {
    each_row(rows, size, threads, [=](long r) {
        score_row(logits + r * size, size, targets[r], inverse, slopes, logprobs + r, entropies + r);
    });
}

// `gate_numbers` of all
extern "C" void gated(int64_t threads, const float* gate, const float* up, int64_t count, float* to) {
    each_vector(count, threads, [=](long k, long n) { gate_numbers(gate + k, up + k, n, to + k); });
}

extern "C" void gated_backward(int64_t threads, const float* grad, const float* gate, const float* up, int64_t count,
                               float* of_gate, float* of_up) {
    each_vector(count, threads, [=](long k, long n) {
        gate_numbers_backward(grad + k, gate + k, up + k, n, of_gate + k, of_up + k);
    });
}

// `turn_heads` of all tokens: x (T, heads, D), `cos` and `sin` (T, D)
extern "C" void rotate(int64_t threads, const float* x, const float* cos, const float* sin, int64_t tokens, int64_t heads,
                       int64_t size, int64_t back, float* to) {
    each_row(tokens, heads * size, threads, [=](long t) {
        const long line = heads * size;
        std::copy_n(x + t * line, line, to + t * line);
        turn_heads(to + t * line, heads, size, cos + t * size, sin + t * size, back);
    });
}

namespace {
template <class Visit> void with_lanes(const DecoderLayer& s, Visit visit) {
    const Attention& a = s.attention;
    if (s.hidden % LANES || s.inner % LANES || a.head_size % LANES) visit(std::integral_constant<int, 8>());
    else visit(std::integral_constant<int, LANES>());
}
} // namespace

extern "C" void decoder_layer(int64_t threads, const DecoderLayer* layer) {
    with_lanes(*layer, [=](auto lanes) { Decoder<lanes.value>(*layer, threads).forward(); });
}

extern "C" void decoder_layer_backward(int64_t threads, const DecoderLayer* layer) {
    with_lanes(*layer, [=](auto lanes) { Decoder<lanes.value>(*layer, threads).backward(); });
}
