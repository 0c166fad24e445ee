// A decoding step of a model built as Llama is, on a CPU: one pass over the weights, in float32 whatever they are held in.
//
// Every number is a sum in an order that depends on nothing but the model: not on the other rows, nor on the threads.
//
// Shapes: R rows, H hidden, F intermediate, V vocabulary, Hq query heads, Hk key heads, D head size, P prompts,
// Lp slots of a prompt, S slots of a row. Weights are (outputs, inputs), caches (R or P, Hk, slots, D).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <omp.h>

namespace {

struct bfloat16 {
    uint16_t bits;
};

// L numbers at once
template <int L> struct Lanes {
    typedef float Float __attribute__((vector_size(4 * L)));
    typedef int32_t Int __attribute__((vector_size(4 * L)));
    typedef uint16_t Half __attribute__((vector_size(2 * L)));
};
template <int L> using Vec = typename Lanes<L>::Float;
template <int L> using Ints = typename Lanes<L>::Int;

template <int L> inline Vec<L> load(const float* from) {
    Vec<L> v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

template <int L> inline Vec<L> load(const bfloat16* from) {
    typename Lanes<L>::Half h;
    std::memcpy(&h, from, sizeof h);
    return (Vec<L>)(__builtin_convertvector(h, Ints<L>) << 16);
}

template <int L> inline void store(Vec<L> v, float* to) { std::memcpy(to, &v, sizeof v); }

inline void store(float x, float* to) { *to = x; }

inline void store(float x, bfloat16* to) { // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    to->bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

#ifdef __clang__
#define SHUFFLE(a, b, L, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, L, ...) __builtin_shuffle(a, b, Ints<L>{__VA_ARGS__})
#endif

// sums of neighbours, first those of a, then those of b
inline Vec<8> neighbours(Vec<8> a, Vec<8> b) {
    return SHUFFLE(a, b, 8, 0, 2, 4, 6, 8, 10, 12, 14) + SHUFFLE(a, b, 8, 1, 3, 5, 7, 9, 11, 13, 15);
}

inline Vec<16> neighbours(Vec<16> a, Vec<16> b) {
    return SHUFFLE(a, b, 16, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           SHUFFLE(a, b, 16, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

// the sum of each of N vectors; with N = L, a number for each lane
template <int L, int N = L> inline Vec<L> sums(const Vec<L>* of) {
    if constexpr (N == 1) return *of;
    else return neighbours(sums<L, N / 2>(of), sums<L, N / 2>(of + N / 2));
}

// e^x by a polynomial on [-ln 2 / 2, ln 2 / 2]: coefficients of Cephes' expf (S. L. Moshier), 1 unit in the last place
template <int L> inline Vec<L> exponential(Vec<L> x) {
    const Vec<L> zero = {};
    x = x > 88.f ? zero + 88.f : x;
    x = x < -87.f ? zero - 87.f : x;
    Ints<L> n = __builtin_convertvector(x * 1.44269504f + (x < zero ? zero - 0.5f : zero + 0.5f), Ints<L>);
    Vec<L> whole = __builtin_convertvector(n, Vec<L>);
    Vec<L> r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Vec<L> p = ((((1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r +
                1.6666665459e-1f) * r + 5.0000001201e-1f;
    return (p * r * r + r + 1.f) * (Vec<L>)((n + 127) << 23);
}

#ifdef __AVX512F__
constexpr int LANES = 16, ROWS = 4; // rows of a tile: as many sums as fit in registers beside what they add
#else
constexpr int LANES = 8, ROWS = 2;
#endif
constexpr int OUTPUTS = 4;  // outputs of a tile
constexpr long CHUNK = 512; // inputs at once: what a tile reads of weights and rows then stays in the nearest cache
constexpr long MANY_ROWS = 16; // from here on the next weights are fetched while these are at work

// values (ROWS, OUTPUTS) = N rows of x (N, stride) times OUTPUTS lines of weights, over `count` inputs
template <int L, int N, class W>
inline void tile(const float* x, long stride, const W* const* w, long count, float* values) {
    Vec<L> parts[ROWS * OUTPUTS] = {};
    for (long k = 0; k < count; k += L) {
        Vec<L> weights[OUTPUTS];
        for (int o = 0; o < OUTPUTS; ++o) weights[o] = load<L>(w[o] + k);
        for (int r = 0; r < N; ++r) {
            Vec<L> xs = load<L>(x + r * stride + k);
            for (int o = 0; o < OUTPUTS; ++o) parts[r * OUTPUTS + o] += xs * weights[o];
        }
    }
    for (int n = 0; n < ROWS * OUTPUTS; n += L) store<L>(sums<L>(parts + n), values + n);
}

template <int L, int N = ROWS, class W>
inline void any_tile(long rows, const float* x, long stride, const W* const* w, long count, float* values) {
    if (N == 1 || rows >= N) tile<L, N>(x, stride, w, count, values);
    else any_tile<L, std::max(N - 1, 1)>(rows, x, stride, w, count, values);
}

struct Linear {
    const void* weight;
    const float* bias;
};

struct Share { // a thread's part of outputs numbered from 0, in whole tiles
    long from, to;
    explicit Share(long count) {
        long tiles = (count + OUTPUTS - 1) / OUTPUTS, thread = omp_get_thread_num(), threads = omp_get_num_threads();
        from = tiles * thread / threads * OUTPUTS;
        to = std::min(count, tiles * (thread + 1) / threads * OUTPUTS);
    }
};

// to (rows, outputs) = or, `adds`, += W x + b; this thread's share of the outputs
template <int L, class W, bool adds>
void product(const float* x, long rows, long inputs, long outputs, Linear layer, float* to) {
    Share mine(outputs);
    const W* weight = static_cast<const W*>(layer.weight);
    for (long o = mine.from; o < mine.to; o += OUTPUTS) {
        int outputs_here = std::min<long>(OUTPUTS, outputs - o);
        float bias[OUTPUTS] = {}, values[ROWS * OUTPUTS];
        if (layer.bias) std::copy(layer.bias + o, layer.bias + o + outputs_here, bias);
        for (long k = 0; k < inputs; k += CHUNK) {
            const W* lines[OUTPUTS];
            for (int i = 0; i < OUTPUTS; ++i) lines[i] = weight + std::min(o + i, outputs - 1) * inputs + k;
            long count = std::min(CHUNK, inputs - k);
            bool more = k + CHUNK < inputs || o + OUTPUTS < mine.to;
            const W* next = k + CHUNK < inputs ? lines[0] + CHUNK : weight + (o + OUTPUTS) * inputs;
            for (long r = 0; r < rows; r += ROWS) {
                if (more && rows >= MANY_ROWS)
                    for (int i = 0; i < OUTPUTS; ++i)
                        for (long at = count * r / rows; at < count * (r + ROWS) / rows; at += 64 / sizeof(W))
                            __builtin_prefetch(next + i * inputs + at, 0, 2);
                any_tile<L>(rows - r, x + r * inputs + k, inputs, lines, count, values);
                for (int i = 0; i < std::min<long>(ROWS, rows - r); ++i) {
                    float *at = to + (r + i) * outputs + o, *line = values + i * OUTPUTS;
                    for (int j = 0; j < outputs_here; ++j) at[j] = (adds || k ? at[j] : bias[j]) + line[j];
                }
            }
        }
    }
}

// x · weight / sqrt(mean square + eps), RMSNorm (arXiv:1910.07467, equation 4)
template <int L> void normalise(const float* x, long size, const float* weight, float eps, float* to) {
    Vec<L> squares = {};
    for (long k = 0; k < size; k += L) squares += load<L>(x + k) * load<L>(x + k);
    float total = 0;
    for (int i = 0; i < L; ++i) total += squares[i];
    float factor = 1 / std::sqrt(total / size + eps);
    for (long k = 0; k < size; ++k) to[k] = weight[k] * (x[k] * factor);
}

struct Part { // keys that follow one another
    const void *keys, *values;
    long count;
};

constexpr long VALUES_AT_ONCE = 32; // values that stay in the nearest cache while several queries weigh them

// to (size,) += weights (count,) times values (count, stride); N vectors at once
template <int L, int N = 4, class C>
void add_values(const float* weights, long count, const C* values, long stride, long size, float* to) {
    long d = 0;
    for (; d + N * L <= size; d += N * L) {
        Vec<L> outputs[N];
        for (int n = 0; n < N; ++n) outputs[n] = load<L>(to + d + n * L);
        for (long i = 0; i < count; ++i)
            for (int n = 0; n < N; ++n) outputs[n] += weights[i] * load<L>(values + i * stride + d + n * L);
        for (int n = 0; n < N; ++n) store<L>(outputs[n], to + d + n * L);
    }
    if constexpr (N > 1)
        if (d < size) add_values<L, 1>(weights, count, values + d, stride, size - d, to + d);
}

// softmax(scale · q Kᵀ) V of `queries` (count, D) with the same keys, over both parts; scores (count, stride) is scratch
template <int L, class C>
void attend(const float* queries, long count, long size, const Part* parts, float scale, float* scores, long stride,
            float* to) {
    long seen = 0;
    for (int part = 0; part < 2; ++part) {
        const C* keys = static_cast<const C*>(parts[part].keys);
        long last = parts[part].count - 1;
        for (long j = 0; j <= last; j += L)
            for (long q = 0; q < count; ++q) {
                Vec<L> products[L] = {};
                for (long d = 0; d < size; d += L) {
                    Vec<L> query = load<L>(queries + q * size + d);
                    for (int i = 0; i < L; ++i) products[i] += query * load<L>(keys + std::min(j + i, last) * size + d);
                }
                store<L>(sums<L>(products) * scale, scores + q * stride + seen + j); // what is beyond is written over
            }
        seen += parts[part].count;
    }
    for (long q = 0; q < count; ++q) {
        float *row = scores + q * stride, most = *std::max_element(row, row + seen), total = 0;
        for (int i = 0; i < L; ++i) row[seen + i] = -INFINITY;
        for (long j = 0; j < seen; j += L) store<L>(exponential<L>(load<L>(row + j) - most), row + j);
        for (long j = 0; j < seen; ++j) total += row[j];
        for (long j = 0; j < seen; ++j) row[j] /= total;
    }
    std::fill(to, to + count * size, 0.f);
    seen = 0;
    for (int part = 0; part < 2; ++part) {
        const C* values = static_cast<const C*>(parts[part].values);
        for (long j = 0; j < parts[part].count; j += VALUES_AT_ONCE) {
            long end = std::min(j + VALUES_AT_ONCE, parts[part].count);
            for (long q = 0; q < count; ++q)
                add_values<L>(scores + q * stride + seen + j, end - j, values + j * size, size, size, to + q * size);
        }
        seen += parts[part].count;
    }
}

} // namespace

struct Layer {
    const float *input_norm, *mlp_norm, *query_norm, *key_norm; // the last two: null for none
    Linear query, key, value, output, gate, up, down;
    void *own_keys, *own_values;
    const void *prompt_keys, *prompt_values;
};

struct Step {
    int64_t threads, layers, hidden, intermediate, vocabulary, query_heads, key_heads, head_size; // the model
    float eps, scale;
    const void* embeddings;
    const float* norm;
    Linear head;
    const Layer* layer;
    int64_t rows, own_slots, prompt_slots; // the batch; without shared prompts prompt_slots is 0
    const int64_t *tokens, *slots;         // (R,) newest token, and where its key goes
    const int64_t *prompt, *prompt_lengths; // (R,) and (P,)
    const float *cos, *sin;                // (R, D)
    float* logits;                         // (R, V)
};

namespace {

// rotary position embedding (arXiv:2104.09864, equation 34, with halves in place of pairs) of a head, in place
void turn(float* x, long size, const float* cos, const float* sin) {
    long half = size / 2;
    for (long d = 0; d < half; ++d) {
        float first = x[d], second = x[d + half];
        x[d] = first * cos[d] - second * sin[d];
        x[d + half] = second * cos[d + half] + first * sin[d + half];
    }
}

template <int L, class W> class Decoding {
    const Step& s;
    const long rows = s.rows, hidden = s.hidden, size = s.head_size, group = s.query_heads / s.key_heads;
    const long queries = s.query_heads * size, keys = s.key_heads * size;
    const long stride = s.prompt_slots + s.own_slots + 2 * L;
    using Buffer = std::unique_ptr<float[]>;
    static Buffer buffer(long numbers) { return Buffer(new float[numbers]); }
    Buffer x = buffer(rows * hidden), query = buffer(rows * queries), key = buffer(rows * keys);
    Buffer value = buffer(rows * keys), inner = buffer(rows * s.intermediate), up = buffer(rows * s.intermediate);

    // one row's new key and value into the cache, and the attention of the queries that share them
    void attend_head(const Layer& layer, long row, long head, float* scores) {
        const float *cos = s.cos + row * size, *sin = s.sin + row * size;
        float *q = &query[row * queries + head * group * size], *k = &key[row * keys + head * size];
        for (long n = 0; n < group; ++n) {
            if (layer.query_norm) normalise<L>(q + n * size, size, layer.query_norm, s.eps, q + n * size);
            turn(q + n * size, size, cos, sin);
        }
        if (layer.key_norm) normalise<L>(k, size, layer.key_norm, s.eps, k);
        turn(k, size, cos, sin);
        long own = (row * s.key_heads + head) * s.own_slots * size, slot = s.slots[row];
        W *own_keys = static_cast<W*>(layer.own_keys) + own, *own_values = static_cast<W*>(layer.own_values) + own;
        for (long d = 0; d < size; ++d) {
            store(k[d], own_keys + slot * size + d);
            store(value[row * keys + head * size + d], own_values + slot * size + d);
        }
        Part parts[2] = {{nullptr, nullptr, 0}, {own_keys, own_values, slot + 1}};
        if (s.prompt_slots) {
            long prompt = (s.prompt[row] * s.key_heads + head) * s.prompt_slots * size;
            parts[0] = {static_cast<const W*>(layer.prompt_keys) + prompt,
                        static_cast<const W*>(layer.prompt_values) + prompt, s.prompt_lengths[s.prompt[row]]};
        }
        float* output = scores + group * stride;
        attend<L, W>(q, group, size, parts, s.scale, scores, stride, output);
        std::copy(output, output + group * size, q);
    }

    // SwiGLU (arXiv:2002.05202, section 2) of this thread's share of a row, in place
    void gate(float* x, const float* by) {
        Share mine(s.intermediate);
        for (long k = mine.from; k < mine.to; k += OUTPUTS) {
            Vec<OUTPUTS> v = load<OUTPUTS>(x + k);
            store<OUTPUTS>(v / (1.f + exponential<OUTPUTS>(-v)) * load<OUTPUTS>(by + k), x + k);
        }
    }

  public:
    explicit Decoding(const Step& step) : s(step) {}

    void run() { // by all threads together
        Buffer normed = buffer(rows * hidden), scores = buffer(group * (stride + size));
        auto norm_rows = [&](const float* weight) { // each thread for itself: cheaper than to wait for one another
            for (long r = 0; r < rows; ++r) normalise<L>(&x[r * hidden], hidden, weight, s.eps, &normed[r * hidden]);
        };
#pragma omp for
        for (long r = 0; r < rows; ++r)
            for (long k = 0; k < hidden; k += L)
                store<L>(load<L>(static_cast<const W*>(s.embeddings) + s.tokens[r] * hidden + k), &x[r * hidden + k]);
        for (const Layer* layer = s.layer; layer < s.layer + s.layers; ++layer) {
            norm_rows(layer->input_norm);
            product<L, W, false>(normed.get(), rows, hidden, queries, layer->query, query.get());
            product<L, W, false>(normed.get(), rows, hidden, keys, layer->key, key.get());
            product<L, W, false>(normed.get(), rows, hidden, keys, layer->value, value.get());
#pragma omp barrier
#pragma omp for schedule(dynamic)
            for (long n = 0; n < rows * s.key_heads; ++n) attend_head(*layer, n % rows, n / rows, scores.get());
            product<L, W, true>(query.get(), rows, queries, hidden, layer->output, x.get());
#pragma omp barrier
            norm_rows(layer->mlp_norm);
            product<L, W, false>(normed.get(), rows, hidden, s.intermediate, layer->gate, inner.get());
            product<L, W, false>(normed.get(), rows, hidden, s.intermediate, layer->up, up.get());
            for (long r = 0; r < rows; ++r) gate(&inner[r * s.intermediate], &up[r * s.intermediate]);
#pragma omp barrier
            product<L, W, true>(inner.get(), rows, s.intermediate, hidden, layer->down, x.get());
#pragma omp barrier
        }
        norm_rows(s.norm);
        product<L, W, false>(normed.get(), rows, hidden, s.vocabulary, s.head, s.logits);
    }
};

template <int L, class W> void decode(const Step& step) {
    Decoding<L, W> decoding(step);
#pragma omp parallel num_threads(step.threads)
    decoding.run();
}

template <class W> void decode(const Step& step) {
    bool fits = step.hidden % LANES == 0 && step.intermediate % LANES == 0 && step.head_size % LANES == 0;
    if (fits) decode<LANES, W>(step);
    else decode<8, W>(step); // half as wide, or the same
}

} // namespace

extern "C" void decode_float32(const Step* step) { decode<float>(*step); }
extern "C" void decode_bfloat16(const Step* step) { decode<bfloat16>(*step); }
