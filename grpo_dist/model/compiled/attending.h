// Attention of a pack in float32: sequences behind shared prompts, with gradients.
//
// Shapes: T tokens, Hq query heads, Hk key heads, D head size.

#pragma once

#include "layers.h"
#include <vector>

// Tokens [from, to) of one sequence, which see the earlier ones of it and its prompt. A prompt's own is empty.
struct Segment {
    int64_t from, to, prompt_from, prompt_to;
};

// Segments [first, last) behind the same prompt. Their gradients of its keys and values are added up by themselves, at
// `sums` (in tokens), before they are added to the prompt's own.
struct Run {
    int64_t first, last, sums;
};

struct Attention {
    int64_t query_heads, key_heads, head_size;
    int64_t segments, runs, longest; // of a prompt with one of its completions, in tokens
    int64_t sums;                    // of all runs, in tokens
    int64_t window;                  // the newest positions of its sequence that a query sees, its own included
    float scale;
    const Segment* segment;
    const Run* run;
    float *query, *key, *value;                             // (T, Hq, D), (T, Hk, D)
    float *output, *lse;                                    // (T, Hq, D), (T, Hq): the logarithm of each softmax's sum
    float* grad;                                            // (T, Hq, D), by the output
    float *grad_query, *grad_key, *grad_value, *key_sums, *value_sums; // the last two (sums, Hk, D)
};

namespace {

constexpr long QUERIES = 64;  // that attend together: those of a few tokens and all heads that share a key

template <int L> class Attending {
    const Attention& a;
    const int64_t threads;
    const long size = a.head_size, group = a.query_heads / a.key_heads, heads = group * size;
    const long query_line = a.query_heads * size, key_line = a.key_heads * size;
    const long stride = a.longest + 2 * LANES; // from a query's scores to the next one's: some can be written behind
    const long at_once = std::max(1L, QUERIES / group), most = at_once * group;

    // Some tokens' queries of a head of keys, and what any of them sees: `before` tokens of the prompt, then own ones.
    struct Block {
        long from, to, head, count; // tokens, and how many queries
        long prompt_from, before, own_from, all;
    };

    Block block(const Segment& s, long from, long head) const {
        const long to = std::min<long>(from + at_once, s.to), prompt = s.prompt_to - s.prompt_from;
        const long passed = std::max<long>(0, prompt + from - s.from + 1 - a.window); // by the window of its first query
        const long before = std::max(0L, prompt - passed), own_from = s.from + std::max(0L, passed - prompt);
        return {from, to, head, (to - from) * group, s.prompt_to - before, before, own_from, before + to - own_from};
    }

    // rows (count, D) = the block's part of x (T, Hq, D), scaled
    void take(const Block& b, const float* x, float scale, float* rows) const {
        for (long t = b.from; t < b.to; ++t)
            for (long d = 0; d < heads; d += L)
                store<L>(load<L>(x + t * query_line + b.head * heads + d) * scale, rows + (t - b.from) * heads + d);
    }

    void put(const Block& b, const float* rows, float scale, float* x) const {
        for (long t = b.from; t < b.to; ++t)
            for (long d = 0; d < heads; d += L)
                store<L>(load<L>(rows + (t - b.from) * heads + d) * scale, x + t * query_line + b.head * heads + d);
    }

    // `visit` the two ranges of tokens that a block sees: where one begins, how many, and how many are before it
    template <class Visit> static void ranges(const Block& b, Visit visit) {
        visit(b.prompt_from, b.before, 0L);
        visit(b.own_from, b.all - b.before, b.before);
    }

    // scores (count, stride) = rows times what the block sees of x (T, Hk, D)
    void score(const Block& b, const float* rows, const float* x, float* scores) const {
        ranges(b, [&](long first, long number, long at) {
            ::score<L>(rows, b.count, size, x + first * key_line + b.head * size, key_line, number, scores + at, stride);
        });
    }

    // rows = weights (count, stride) times what the block sees of x
    void weigh(const Block& b, const float* weights, const float* x, float* rows) const {
        std::fill_n(rows, b.count * size, 0.f);
        ranges(b, [&](long first, long number, long at) {
            ::weigh<L>(weights + at, stride, b.count, size, x + first * key_line + b.head * size, key_line, number, rows);
        });
    }

    // to += weights transposed times rows: the block's share of the gradients of what it sees
    void spread(const Block& b, const float* weights, const float* rows, float* of_prompt, float* own) const {
        auto add = [&](long at, long number, float* to) {
            Weighing<L, float>{weights + at, 1, stride, rows, size, b.count, size, to, key_line}.run(number);
        };
        add(0, b.before, of_prompt);
        add(b.before, b.all - b.before, own + b.own_from * key_line + b.head * size);
    }

    // `visit` each query of a block: its number, its place in (T, Hq), and the first key that it sees and the end of them
    template <class Visit> void queries(const Block& b, Visit visit) const {
        for (long r = 0; r < b.count; ++r) {
            const long t = b.from + r / group, end = b.before + t + 1 - b.own_from;
            visit(r, t * a.query_heads + b.head * group + r % group, std::max<long>(0, end - a.window), end);
        }
    }

    // nothing for keys that a query does not see
    void clear_unseen(const Block& b, float* row, long first, long end) const {
        std::fill(row, row + first, 0.f);
        std::fill(row + end, row + b.all, 0.f);
    }

    void forward(const Block& b, float* scratch) const {
        float *rows = scratch, *scores = rows + most * size;
        take(b, a.query, a.scale, rows);
        score(b, rows, a.key, scores);
        queries(b, [&](long r, long place, long first, long end) {
            float* row = scores + r * stride;
            a.lse[place] = softmax<L>(row + first, end - first, -INFINITY);
            clear_unseen(b, row, first, end);
        });
        weigh(b, scores, a.value, rows);
        put(b, rows, 1.f, a.output);
    }

    // FlashAttention's gradients (arXiv:2205.14135, section B.4); those of the prompt's keys and values are added to
    // `keys` and `values`, in which it begins at its token `prompt`
    void backward(const Block& b, long prompt, float* keys, float* values, float* scratch) const {
        float *rows = scratch, *grads = rows + most * size, *shares = grads + most * size, *slopes = shares + most * stride;
        take(b, a.query, a.scale, rows);
        take(b, a.grad, 1.f, grads);
        score(b, rows, a.key, shares);
        score(b, grads, a.value, slopes);
        queries(b, [&](long r, long place, long first, long end) {
            Vec<L> products = {};
            for (long d = 0; d < size; d += L)
                products += load<L>(a.output + place * size + d) * load<L>(grads + r * size + d);
            const float mean = sum<L>(products), lse = a.lse[place];
            float *share = shares + r * stride, *slope = slopes + r * stride;
            for (long j = first; j < end; j += L) {
                const Vec<L> p = exponential<L>(load<L>(share + j) - lse);
                store<L>(p, share + j);
                store<L>(p * (load<L>(slope + j) - mean), slope + j);
            }
            clear_unseen(b, share, first, end);
            clear_unseen(b, slope, first, end);
        });
        const long at = (b.prompt_from - prompt) * key_line;
        spread(b, slopes, rows, keys + at, a.grad_key);
        spread(b, shares, grads, values + at, a.grad_value);
        weigh(b, slopes, a.key, rows);
        put(b, rows, a.scale, a.grad_query);
    }

    void clear(float* x, long from, long to, long head) const {
        for (long t = from; t < to; ++t) std::fill_n(x + t * key_line + head * size, size, 0.f);
    }

    void backward(const Run& run, long head, float* scratch) const {
        const Segment* first = a.segment + run.first;
        const long prompt = first->prompt_to - first->prompt_from;
        for (float* sums : {a.key_sums, a.value_sums}) clear(sums, run.sums, run.sums + prompt, head);
        const long at = run.sums * key_line + head * size;
        for (const Segment* s = first; s < a.segment + run.last; ++s) {
            for (float* x : {a.grad_key, a.grad_value}) clear(x, s->from, s->to, head);
            for (long from = s->from; from < s->to; from += at_once)
                backward(block(*s, from, head), s->prompt_from, a.key_sums + at, a.value_sums + at, scratch);
        }
    }

    // what a run has summed for its prompt
    void collect(const Run& run, long head) const {
        const Segment& s = a.segment[run.first];
        for (long t = s.prompt_from; t < s.prompt_to; ++t)
            for (long d = head * size; d < (head + 1) * size; d += L) {
                const long to = t * key_line + d, from = (run.sums + t - s.prompt_from) * key_line + d;
                store<L>(load<L>(a.grad_key + to) + load<L>(a.key_sums + from), a.grad_key + to);
                store<L>(load<L>(a.grad_value + to) + load<L>(a.value_sums + from), a.grad_value + to);
            }
    }

  public:
    Attending(const Attention& attention, int64_t threads) : a(attention), threads(threads) {}

    void forward() const {
        std::vector<std::pair<const Segment*, long>> places;
        for (const Segment* s = a.segment; s < a.segment + a.segments; ++s)
            for (long from = s->from; from < s->to; from += at_once) places.emplace_back(s, from);
#pragma omp parallel num_threads(threads)
        {
            std::vector<float> scratch(most * (size + stride));
#pragma omp for schedule(dynamic) collapse(2)
            for (size_t n = 0; n < places.size(); ++n)
                for (long head = 0; head < a.key_heads; ++head)
                    forward(block(*places[n].first, places[n].second, head), scratch.data());
        }
    }

    void backward() const {
#pragma omp parallel num_threads(threads)
        {
            std::vector<float> scratch(2 * most * (size + stride));
#pragma omp for schedule(dynamic) collapse(2)
            for (long n = 0; n < a.runs; ++n)
                for (long head = 0; head < a.key_heads; ++head) backward(a.run[n], head, scratch.data());
#pragma omp for
            for (long head = 0; head < a.key_heads; ++head)
                for (long n = 0; n < a.runs; ++n) collect(a.run[n], head);
        }
    }
};

} // namespace
