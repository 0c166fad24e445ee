// A decoder layer built as Llama's, of all tokens of a pack in float32, and its gradients. Some tokens go through it after
// others: what is made of them is used again while it is in the nearest caches.
//
// Shapes: T tokens, H hidden, F intermediate, Hq query heads, Hk key heads, D head size.

#pragma once

#include "adapted.h"
#include "attending.h"

struct DecoderLayer {
    int64_t tokens, hidden, inner;
    float eps;
    const float *input_norm, *mlp_norm, *cos, *sin; // (H,), (H,), (T, D), (T, D)
    Attention attention;
    AdaptedLinear query, key, value, output, gate, up, down;
    const float* x;                            // (T, H)
    float *input_factors, *mlp_factors;        // (T,), what the norms multiply by
    float *middle, *gates, *ups, *y;           // (T, H) behind attention, (T, F), (T, F), (T, H)
    const float* grad;                         // (T, H), by y
    float *grad_x, *grad_middle;               // (T, H), the first or null
    float *normed, *mlp_normed, *gated, *grad_gates, *grad_ups; // (T, H), (T, H), (T, F), (T, F), (T, F)
};

namespace {

template <int L> class Decoder {
    static constexpr long MOST_ROWS = 16 * ROW_BLOCK, PIECES = 8; // of a block; of a thread's work, at least
    const DecoderLayer& s;
    const Attention& a = s.attention;
    const int64_t threads;
    const long hidden = s.hidden, inner = s.inner, queries = a.query_heads * a.head_size, keys = a.key_heads * a.head_size;

    // `block` of some tokens after others: the first one, how many they are, and room for `floats` numbers of each
    template <class Do> void blocks(long floats, Do block) const {
        const long each = std::clamp(s.tokens / (PIECES * threads) / ROW_BLOCK * ROW_BLOCK, ROW_BLOCK, MOST_ROWS);
#pragma omp parallel num_threads(threads)
        {
            std::vector<float> room(floats * each);
#pragma omp for schedule(dynamic)
            for (long from = 0; from < s.tokens; from += each) block(from, std::min<long>(each, s.tokens - from), room.data());
        }
    }

    // `visit` each linear layer, its inputs and the gradient by its outputs
    template <class Visit> void linears(Visit visit) const {
        visit(s.query, s.normed, a.grad_query), visit(s.key, s.normed, a.grad_key), visit(s.value, s.normed, a.grad_value);
        visit(s.output, a.output, s.grad_middle);
        visit(s.gate, s.mlp_normed, s.grad_gates), visit(s.up, s.mlp_normed, s.grad_ups), visit(s.down, s.gated, s.grad);
    }

    void turn_adapters() const {
        linears([](const AdaptedLinear& l, auto...) { Adapted<L>{l}.turn_b(); });
    }

    void norm(const float* x, long rows, const float* weight, float* factors, float* to) const {
        for (long r = 0; r < rows; ++r) factors[r] = normalise<8>(x + r * hidden, hidden, weight, s.eps, to + r * hidden);
    }

    // Of `rows` that `norm` was given: what it made of them, and to = before + the gradient by x for `grad` by that.
    void norm_backward(const float* grad, const float* x, long rows, const float* weight, const float* factors,
                       const float* before, float* normed, float* to) const {
        for (long r = 0; r < rows; ++r) {
            const long begin = r * hidden, end = begin + hidden;
            for (long k = begin; k < end; ++k) normed[k] = weight[k - begin] * (x[k] * factors[r]);
            if (!to) continue;
            normalise_backward(grad + begin, x + begin, hidden, weight, factors[r], to + begin);
            for (long k = begin; k < end; ++k) to[k] += before[k];
        }
    }

    void rotate(float* x, long from, long rows, long heads, bool back) const {
        const long size = a.head_size;
        for (long t = from; t < from + rows; ++t)
            turn_heads(x + t * heads * size, heads, size, s.cos + t * size, s.sin + t * size, back);
    }

    void attention_inputs(long from, long rows, float* normed) const {
        norm(s.x + from * hidden, rows, s.input_norm, s.input_factors + from, normed);
        Adapted<L>{s.query}.template forward<false>(normed, from, rows, a.query + from * queries);
        Adapted<L>{s.key}.template forward<false>(normed, from, rows, a.key + from * keys);
        Adapted<L>{s.value}.template forward<false>(normed, from, rows, a.value + from * keys);
        rotate(a.query, from, rows, a.query_heads, false);
        rotate(a.key, from, rows, a.key_heads, false);
    }

    void feed_forward(long from, long rows, float* normed, float* gated) const {
        float *middle = s.middle + from * hidden, *y = s.y + from * hidden;
        float *gates = s.gates + from * inner, *ups = s.ups + from * inner;
        std::copy_n(s.x + from * hidden, rows * hidden, middle);
        Adapted<L>{s.output}.template forward<true>(a.output + from * queries, from, rows, middle);
        norm(middle, rows, s.mlp_norm, s.mlp_factors + from, normed);
        Adapted<L>{s.gate}.template forward<false>(normed, from, rows, gates);
        Adapted<L>{s.up}.template forward<false>(normed, from, rows, ups);
        vectors(rows * inner, [=](long k, long n) { gate_numbers(gates + k, ups + k, n, gated + k); });
        std::copy_n(middle, rows * hidden, y);
        Adapted<L>{s.down}.template forward<true>(gated, from, rows, y);
    }

    void feed_forward_backward(long from, long rows, float* grad_gated, float* grad_normed) const {
        const float *grad = s.grad + from * hidden, *gates = s.gates + from * inner, *ups = s.ups + from * inner;
        float *gated = s.gated + from * inner, *grad_middle = s.grad_middle + from * hidden;
        float *grad_gates = s.grad_gates + from * inner, *grad_ups = s.grad_ups + from * inner;
        std::fill_n(grad_gated, rows * inner, 0.f);
        Adapted<L>{s.down}.backward(grad, from, rows, grad_gated);
        vectors(rows * inner, [=](long k, long n) {
            gate_numbers(gates + k, ups + k, n, gated + k);
            gate_numbers_backward(grad_gated + k, gates + k, ups + k, n, grad_gates + k, grad_ups + k);
        });
        std::fill_n(grad_normed, rows * hidden, 0.f);
        Adapted<L>{s.gate}.backward(grad_gates, from, rows, grad_normed);
        Adapted<L>{s.up}.backward(grad_ups, from, rows, grad_normed);
        norm_backward(grad_normed, s.middle + from * hidden, rows, s.mlp_norm, s.mlp_factors + from, grad,
                      s.mlp_normed + from * hidden, grad_middle);
        std::fill_n(a.grad + from * queries, rows * queries, 0.f);
        Adapted<L>{s.output}.backward(grad_middle, from, rows, a.grad + from * queries);
    }

    void attention_inputs_backward(long from, long rows, float* room) const {
        rotate(a.grad_query, from, rows, a.query_heads, true);
        rotate(a.grad_key, from, rows, a.key_heads, true);
        float* grad_normed = s.grad_x ? room : nullptr;
        std::fill_n(room, rows * hidden, 0.f);
        Adapted<L>{s.query}.backward(a.grad_query + from * queries, from, rows, grad_normed);
        Adapted<L>{s.key}.backward(a.grad_key + from * keys, from, rows, grad_normed);
        Adapted<L>{s.value}.backward(a.grad_value + from * keys, from, rows, grad_normed);
        norm_backward(grad_normed, s.x + from * hidden, rows, s.input_norm, s.input_factors + from,
                      s.grad_middle + from * hidden, s.normed + from * hidden,
                      s.grad_x ? s.grad_x + from * hidden : nullptr);
    }

    void sum_adapters() const {
        struct Piece {
            Adapted<L> layer;
            const float *x, *grad;
            long number;
        };
        std::vector<Piece> pieces;
        long most_rank = 0;
        linears([&](const AdaptedLinear& l, const float* x, const float* grad) {
            most_rank = std::max<long>(most_rank, l.rank);
            for (long n = 0; n < Adapted<L>{l}.pieces(); ++n) pieces.push_back({{l}, x, grad, n});
        });
#pragma omp parallel num_threads(threads)
        {
            std::vector<float> room(2 * most_rank * SUMMED_COLUMNS);
#pragma omp for schedule(dynamic)
            for (size_t n = 0; n < pieces.size(); ++n) {
                const Piece& p = pieces[n];
                p.layer.sum_piece(p.number, p.x, p.grad, s.tokens, room.data());
            }
        }
    }

  public:
    Decoder(const DecoderLayer& layer, int64_t threads) : s(layer), threads(threads) {}

    void forward() const {
        turn_adapters();
        blocks(hidden, [=](long from, long rows, float* room) { attention_inputs(from, rows, room); });
        Attending<L>(a, threads).forward();
        blocks(hidden + inner, [=](long from, long rows, float* room) {
            feed_forward(from, rows, room, room + rows * hidden);
        });
    }

    void backward() const {
        turn_adapters();
        blocks(inner + hidden, [=](long from, long rows, float* room) {
            feed_forward_backward(from, rows, room, room + rows * inner);
        });
        Attending<L>(a, threads).backward();
        blocks(hidden, [=](long from, long rows, float* room) { attention_inputs_backward(from, rows, room); });
        sum_adapters();
    }
};

} // namespace
