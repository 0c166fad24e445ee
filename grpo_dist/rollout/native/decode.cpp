// A decoding step of a model built as Llama is, Gemma's among them, on a CPU: one pass over the weights, in float32
// whatever they are held in. Where weights are in bfloat16 and the processor has products of it, what they are multiplied
// with is rounded to it first, as torch does; all else stays in float32, sums too.
//
// Every number of a row is a sum in an order that neither the other rows nor the threads have a part in; given the
// same rotations, a row comes out the same to the last bit in any batch.
//
// Shapes: R rows, H hidden, F intermediate, V vocabulary, Hq query heads, Hk key heads, D head size, P prompts,
// Lp slots of a prompt, S slots of a row. Weights are (outputs, inputs), caches (R or P, Hk, slots, D).

#include "drawing.h"
#include "layers.h"
#include "weights.h"
#include "work.h"

struct Layer {
    // of what comes in and what is added, by attention and by the feed-forward part, and of heads; null for none
    const float *input_norm, *output_norm, *mlp_norm, *down_norm, *query_norm, *key_norm;
    const float* sinks; // (query_heads,) a logit that joins a head's softmax without a value; null for none
    Linear query, key, value, output, gate, up, down;
    int64_t window; // the newest positions that a query sees, its own included
    int64_t kind;   // which of the rotations it takes
    void *own_keys, *own_values;
    const void *prompt_keys, *prompt_values;
};

struct Step {
    int64_t threads, layers, hidden, intermediate, vocabulary, query_heads, key_heads, head_size; // the model
    int64_t ranks; // of adapters that read the same input, the most
    int64_t gelu;  // whether gates go through GELU, and not SiLU
    float eps, scale, soft_cap, embedding_scale, logit_cap; // caps: 0 for none
    const void* embeddings;
    const float* norm;
    Linear head;
    const Layer* layer;
    int64_t rows, own_slots, prompt_slots; // the batch; without shared prompts prompt_slots is 0
    int64_t several; // whether some of `rows` are tokens of the same row of the cache, one after another
    Columns columns;
    const int64_t* prompt_lengths; // (P,)
    int64_t num_turns;
    const float *cos, *sin;  // (kinds, num_turns, D)
    float *logits, *scratch; // (R, V), or null where tokens are only to enter the cache; room for `scratch_floats`
};

namespace {

// --- attention -----------------------------------------------------------------------------------------------------

constexpr long MOST_SCORES = 1 << 17; // of the queries that attend to a prompt together: what the second cache holds

// cap · tanh(x / cap), in place (arXiv:2408.00118, section 2)
template <int L> void cap_all(float* x, long count, float cap) {
    for (long j = 0; j < count; j += L) {
        const long size = std::min<long>(L, count - j);
        const Vec<L> v = load_some<L>(x + j, size);
        store_some<L>(cap * (1.f - 2.f / (exponential<L>(v * (2.f / cap)) + 1.f)), x + j, size);
    }
}

// --- the step ------------------------------------------------------------------------------------------------------

// Where everything is that is neither a weight nor in the cache.
struct Room {
    long group;      // queries of a key head
    long block;      // rows that attend to their prompt together
    long stride;     // from one query's scores to the next one's, in floats
    long per_thread; // floats that the attention of a block takes
    // where each begins, in floats, and the end
    long x, normed, output, query, key, value, attended, gate, up, gated, low, attention, total;

    explicit Room(const Step& s) {
        group = s.query_heads / s.key_heads;
        stride = s.prompt_slots + s.own_slots + 2 * LANES; // what is written behind scores, of both parts
        long even = s.rows * s.key_heads / (4 * s.threads); // enough for all threads
        block = std::clamp(std::min(even, MOST_SCORES / (group * stride)), 1L, ROW_BLOCK);
        per_thread = block * group * (stride + 2 * s.head_size);
        long at = 0;
        auto take = [&at](long floats) { return std::exchange(at, at + floats); };
        x = take(s.rows * s.hidden), normed = take(s.rows * s.hidden), output = take(s.rows * s.hidden);
        query = take(s.rows * s.query_heads * s.head_size), attended = take(s.rows * s.query_heads * s.head_size);
        key = take(s.rows * s.key_heads * s.head_size), value = take(s.rows * s.key_heads * s.head_size);
        gate = take(s.rows * s.intermediate), up = take(s.rows * s.intermediate);
        gated = take(s.rows * s.intermediate);
        low = take(s.rows * s.ranks);
        attention = take(per_thread * s.threads);
        total = at;
    }
};

constexpr long PIECES = 4;          // of a thread's work, at least, as long as they are whole tiles
constexpr long REDUCED_AT_ONCE = 8; // outputs of adapters' first matrices

// A layer, where its outputs (rows, outputs) go, and (rows, rank) what its adapters' first matrix makes of its inputs.
struct Product {
    const Linear& layer;
    long outputs;
    float *to, *reduced = nullptr;
};

// One thread's part of a step. X is what weights are multiplied with.
template <int L, class W, class X> class Decoding {
    const Step& s;
    Member& member;
    const Room room{s};
    const long rows = s.rows, hidden = s.hidden, inner = s.intermediate, size = s.head_size, group = room.group;
    const long queries = s.query_heads * size, keys = s.key_heads * size;
    float *x = s.scratch + room.x, *output = s.scratch + room.output, *query = s.scratch + room.query;
    float *key = s.scratch + room.key, *value = s.scratch + room.value;
    float *gate = s.scratch + room.gate, *up = s.scratch + room.up, *low = s.scratch + room.low;
    X *normed = factors(room.normed), *attended = factors(room.attended), *gated = factors(room.gated);

    X* factors(long at) const { return reinterpret_cast<X*>(s.scratch + at); }

    W* own(void* cache, long row, long head) const {
        const long place = s.columns.cache_rows ? s.columns.cache_rows[row] : row;
        return static_cast<W*>(cache) + (place * s.key_heads + head) * s.own_slots * size;
    }

    // where in `cos` and `sin` the rotations of a row are
    long angles(const Layer& layer, long row) const {
        return (layer.kind * s.num_turns + (s.columns.turns ? s.columns.turns[row] : row)) * size;
    }

    // a row's new key and value of a head go to the cache
    void enter(const Layer& layer, long row, long head) {
        float *k = key + row * keys + head * size, *v = value + row * keys + head * size;
        if (layer.key_norm) normalise<L>(k, size, layer.key_norm, s.eps, k);
        turn_heads(k, 1, size, s.cos + angles(layer, row), s.sin + angles(layer, row), false);
        for (long d = 0; d < size; ++d) {
            store(k[d], own(layer.own_keys, row, head) + s.columns.slots[row] * size + d);
            store(v[d], own(layer.own_values, row, head) + s.columns.slots[row] * size + d);
        }
    }

    // the first position that a row's newest token sees, behind `shared` of its prompt
    long first_seen(const Layer& layer, long row, long shared) const {
        return std::max(0L, shared + s.columns.slots[row] + 1 - static_cast<long>(layer.window));
    }

    // A head of rows [from, to) of one prompt: new keys and values go to the cache, the queries attend to the prompt
    // together and to their rows' own tokens each, and their outputs go to `attended`.
    void attend(const Layer& layer, long from, long to, long head) {
        const long count = (to - from) * group, prompt = s.prompt_slots ? s.columns.prompt[from] : 0;
        const long shared = s.prompt_slots ? s.prompt_lengths[prompt] : 0;
        float* turned = s.scratch + room.attention + room.per_thread * member.thread(); // (count, size)
        float *outputs = turned + count * size, *scores = outputs + count * size; // (count, size), (count, stride)
        auto prompts = [&](const void* cache, long slot) {
            return static_cast<const W*>(cache) + ((prompt * s.key_heads + head) * s.prompt_slots + slot) * size;
        };
        long skipped = shared; // of the prompt, as no row sees them; whole vectors, so that sums keep their order
        for (long row = from; row < to; ++row) {
            float* q = turned + (row - from) * group * size;
            std::copy_n(query + row * queries + head * group * size, group * size, q);
            for (float* each = q; each < q + group * size; each += size) {
                if (layer.query_norm) normalise<L>(each, size, layer.query_norm, s.eps, each);
                turn_heads(each, 1, size, s.cos + angles(layer, row), s.sin + angles(layer, row), false);
                for (long d = 0; d < size; ++d) each[d] *= s.scale;
            }
            if (!s.several) enter(layer, row, head);
            skipped = std::min(skipped, first_seen(layer, row, shared));
        }
        skipped = skipped / L * L;
        const long before = shared - skipped;
        score<L>(turned, count, size, prompts(layer.prompt_keys, skipped), size, before, scores, room.stride);
        auto own_block = [&](void* cache, long row) { // the keys or values that a row sees of its own; none for no row
            if (row == rows) return Block<W>{};
            const long passed = std::max(0L, first_seen(layer, row, shared) - shared);
            return Block<W>{own(cache, row, head) + passed * size, 1, 0, (s.columns.slots[row] + 1 - passed) * size};
        };
        for (long row = from; row < to; ++row) {
            const Block<W> seen_keys = own_block(layer.own_keys, row);
            const long first = (row - from) * group, seen = seen_keys.count / size;
            score<L>(turned + first * size, group, size, seen_keys.first, size, seen,
                     scores + first * room.stride + before, room.stride,
                     FetchBlock<W, true>(row + 1 < to ? own_block(layer.own_keys, row + 1)
                                                      : own_block(layer.own_values, from),
                                         tiles_of(group, seen), 1));
            const long unseen = std::clamp(first_seen(layer, row, shared) - skipped, 0L, before);
            for (long n = 0; n < group; ++n) {
                float* q = scores + (first + n) * room.stride;
                if (s.soft_cap) cap_all<L>(q, before + seen, s.soft_cap);
                std::fill_n(q, unseen, -INFINITY);
                const float sink = layer.sinks ? layer.sinks[head * group + n] : -INFINITY;
                softmax<L>(q + unseen / L * L, before + seen - unseen / L * L, sink);
                std::fill_n(q, unseen, 0.f);
            }
        }
        std::fill_n(outputs, count * size, 0.f);
        weigh<L>(scores, room.stride, count, size, prompts(layer.prompt_values, skipped), size, before, outputs);
        for (long row = from; row < to; ++row) {
            const Block<W> seen_values = own_block(layer.own_values, row);
            const long first = (row - from) * group, seen = seen_values.count / size;
            weigh<L>(scores + first * room.stride + before, room.stride, group, size, seen_values.first, size, seen,
                     outputs + first * size,
                     FetchBlock<W, false>(own_block(row + 1 < to ? layer.own_values : layer.own_keys, row + 1), 1, seen));
            X* result = attended + row * queries + head * group * size;
            for (long d = 0; d < group * size; d += L) store<L>(load<L>(outputs + first * size + d), result + d);
        }
    }

    // done by all threads, each piece by one
    template <class Do> void all(long count, Do piece) {
        member.share(count, piece, WORK);
        member.await(WORK);
    }

    // outputs [0, count) in pieces of at most `most`; of fewer, but whole tiles, where there are too few for all threads
    template <class Do> void share_outputs(long count, long most, int kind, Do piece) {
        const long each = outputs_at_once(count, most), pieces = (count + each - 1) / each;
        const long last = member.end_of_mine(pieces) - 1;
        member.share(pieces, [&](long n) {
            piece(Outputs{n * each, std::min(count, (n + 1) * each)}, n == last);
        }, kind);
    }

    long outputs_at_once(long count, long most) const {
        return std::clamp<long>(count / (PIECES * s.threads) / OUTPUTS * OUTPUTS, OUTPUTS, most);
    }

    // the weights that this thread begins a product with
    Block<W> first_of_mine(const Linear& layer, long inputs, long outputs) const {
        const long each = outputs_at_once(outputs, at_once(layer));
        const long from = member.begin_of_mine((outputs + each - 1) / each) * each;
        return first_block<L, W, X>(inputs, {from, std::min(outputs, from + each)}, layer);
    }

    static long at_once(const Linear& layer) { return layer.rank ? HIGH_BLOCK : OUTPUT_BLOCK; }

    void attend_all(const Layer& layer) {
        if (s.several) // a row's later tokens attend to its earlier ones, which other threads may compute
            all(s.key_heads * rows, [&](long n) { enter(layer, n % rows, n / rows); });
        const long blocks = (rows + room.block - 1) / room.block;
        all(s.key_heads * blocks, [&](long n) {
            const long head = n / blocks, begin = n % blocks * room.block, end = std::min(begin + room.block, rows);
            for (long from = begin, to; from < end; from = to) {
                to = from + 1; // without shared prompts each row attends alone
                while (s.prompt_slots && to < end && s.columns.prompt[to] == s.columns.prompt[from]) ++to;
                attend(layer, from, to, head);
            }
        });
    }

    // Norms of x; first what lies in `output` is added to x, where it has a norm of its own, `added`.
    void norm_rows(const float* weight, const float* added) {
        all(rows, [&](long r) {
            float *row = x + r * hidden, *before = output + r * hidden;
            if (added) {
                normalise<L>(before, hidden, added, s.eps, before);
                for (long k = 0; k < hidden; ++k) row[k] += before[k];
            }
            normalise<L>(row, hidden, weight, s.eps, normed + r * hidden);
        });
    }

    // SwiGLU or GEGLU (arXiv:2002.05202, section 2). GELU is its approximation by tanh (arXiv:1606.08415, section 2), in
    // which (1 + tanh(y)) / 2 = 1 / (1 + exp(-2 y)).
    Vec<L> activated(Vec<L> v, Vec<L> other) const {
        const Vec<L> y = s.gelu ? v * (1.5957691216f + 0.0713548163f * v * v) : v;
        return v / (1.f + exponential<L>(-y)) * other;
    }

    void activate(Outputs part) {
        for (long r = 0; r < rows; ++r) {
            long k = r * inner + part.from, end = r * inner + part.to;
            for (; k + L <= end; k += L) store<L>(activated(load<L>(gate + k), load<L>(up + k)), gated + k);
            if (k == end) continue;
            X numbers[L];
            store<L>(activated(load_some<L>(gate + k, end - k), load_some<L>(up + k, end - k)), numbers);
            std::memcpy(gated + k, numbers, (end - k) * sizeof(X));
        }
    }

    // What adapters make of `from` with their first matrices. `apply` awaits it, and has other work until then.
    template <size_t N> void reduce(const X* from, long inputs, Product (&products)[N]) {
        float* next = low;
        for (Product& y : products) {
            const long rank = y.layer.rank;
            y.reduced = std::exchange(next, next + rows * rank);
            Linear first{};
            first.weight = y.layer.low;
            share_outputs(rank, REDUCED_AT_ONCE, REDUCTION, [&](Outputs part, bool) {
                product<L, W, false>(from, rows, inputs, rank, part, first, y.reduced);
            });
        }
    }

    // of a layer's outputs those of `part`: put, or, `adds`, added
    template <bool adds>
    void apply(const X* from, long inputs, const Product& y, Outputs part, const Block<W>* next = nullptr) {
        const Linear& layer = y.layer;
        if (layer.compact.blocks && rows <= MOST_FROM_COMPACT<X>)
            product_of_compact<L, adds>(from, rows, inputs, y.outputs, part, layer, y.to);
        else product<L, W, adds>(from, rows, inputs, y.outputs, part, layer, y.to, next);
        if (!layer.rank) return;
        member.await(REDUCTION);
        add_low_rank<L>(y.reduced, rows, y.outputs, part, layer, y.to);
    }

    // layers with the same input; `next` is what the thread reads after them
    template <bool adds, size_t N>
    void apply_all(const X* from, long inputs, Product (&&products)[N], const Block<W>& next) {
        reduce(from, inputs, products);
        for (size_t n = 0; n < N; ++n) {
            const Product& y = products[n];
            const Block<W> then = n + 1 < N ? first_of_mine(products[n + 1].layer, inputs, products[n + 1].outputs) : next;
            share_outputs(y.outputs, at_once(y.layer), WORK, [&](Outputs part, bool is_last) {
                apply<adds>(from, inputs, y, part, is_last ? &then : nullptr);
            });
        }
        member.await(WORK);
    }

    // A part's last layer: its outputs are added to x or, where `norm` is for them first, put into `output`.
    void leave(const X* from, long inputs, const Linear& layer, const float* norm, const Block<W>& next) {
        if (norm) apply_all<false>(from, inputs, {{layer, hidden, output}}, next);
        else apply_all<true>(from, inputs, {{layer, hidden, x}}, next);
    }

  public:
    Decoding(const Step& step, Member& member) : s(step), member(member) {}

    // By all threads together. Between two awaited works nothing is both read and written by different threads.
    void run() {
        all(rows, [&](long r) {
            for (long k = 0; k < hidden; k += L)
                store<L>(load<L>(static_cast<const W*>(s.embeddings) + s.columns.tokens[r] * hidden + k) * s.embedding_scale,
                         x + r * hidden + k);
        });
        const float* added = nullptr; // the norm of what lies in `output` and is not yet part of x
        for (const Layer* layer = s.layer; layer < s.layer + s.layers; ++layer) {
            norm_rows(layer->input_norm, added);
            apply_all<false>(normed, hidden,
                             {{layer->query, queries, query}, {layer->key, keys, key}, {layer->value, keys, value}},
                             first_of_mine(layer->output, queries, hidden));
            attend_all(*layer);
            leave(attended, queries, layer->output, layer->output_norm, first_of_mine(layer->gate, hidden, inner));
            norm_rows(layer->mlp_norm, layer->output_norm);
            Product gates[] = {{layer->gate, inner, gate}, {layer->up, inner, up}};
            reduce(normed, hidden, gates);
            const Block<W> down = first_of_mine(layer->down, inner, hidden), none;
            share_outputs(inner, at_once(layer->gate), WORK, [&](Outputs part, bool is_last) {
                apply<false>(normed, hidden, gates[0], part, is_last ? &none : nullptr);
                apply<false>(normed, hidden, gates[1], part, is_last ? &down : nullptr);
                activate(part);
            });
            member.await(WORK);
            const Layer* next = layer + 1;
            const Block<W> behind = next < s.layer + s.layers ? first_of_mine(next->query, hidden, queries)
                                    : s.logits ? first_of_mine(s.head, hidden, s.vocabulary) : none;
            leave(gated, inner, layer->down, added = layer->down_norm, behind);
        }
        if (!s.logits) return;
        norm_rows(s.norm, added);
        apply_all<false>(normed, hidden, {{s.head, s.vocabulary, s.logits}}, {});
        if (!s.logit_cap) return;
        all(rows, [&](long r) { cap_all<L>(s.logits + r * s.vocabulary, s.vocabulary, s.logit_cap); });
    }
};

// One step or, with a drawing, its tokens.
template <int L, class W, class X> void decode(Step& step, Drawing* drawing) {
    Team team(step.threads);
    if (drawing) drawing->begun = omp_get_wtime();
#pragma omp parallel num_threads(step.threads)
    for (Member member(team);;) {
        Decoding<L, W, X>(step, member).run();
        if (!drawing) break;
        draw_all(*drawing, step.columns, step.rows, step.logits, step.vocabulary, member);
#pragma omp barrier // somebody may still look at the rows
#pragma omp single
        {
            step.rows = drawing->take(step.columns, step.rows);
            drawing->is_over |= !member.can_count(drawing->num_steps + 1, drawing->num_steps);
        }
        if (drawing->is_over) break;
    }
}

bool fits_lanes(const Step& step) {
    return step.hidden % LANES == 0 && step.intermediate % LANES == 0 && step.head_size % LANES == 0;
}

// whether weights in bfloat16 are multiplied with numbers in it
bool fits_pairs(const Step& step) {
#ifdef PAIRS
    constexpr long PAIR = PIECE<LANES, bfloat16>;
    return fits_lanes(step) && step.hidden % PAIR == 0 && step.intermediate % PAIR == 0 &&
           step.query_heads * step.head_size % PAIR == 0;
#else
    (void)step;
    return false;
#endif
}

template <class W> void decode(Step& step, Drawing* drawing) {
#ifdef PAIRS
    if constexpr (std::is_same_v<W, bfloat16>)
        if (fits_pairs(step)) return decode<LANES, W, bfloat16>(step, drawing);
#endif
    if (fits_lanes(step)) decode<LANES, W, float>(step, drawing);
    else decode<8, W, float>(step, drawing); // half as wide, or the same
}

} // namespace

extern "C" int64_t scratch_floats(const Step* step) { return Room(*step).total; }
extern "C" int64_t multiplies_pairs(const Step* step) { return fits_pairs(*step); }
// From logits (rows, size) a token of each row, and its log-probability; `inverse` of the temperature, noise of `keys` and
// `positions` (rows,).
extern "C" void draw_rows(int64_t threads, const float* logits, int64_t rows, int64_t size, float inverse,
                          const int64_t* keys, const int64_t* positions, int64_t* tokens, float* logprobs) {
#pragma omp parallel for schedule(dynamic) num_threads(std::min(threads, rows))
    for (int64_t r = 0; r < rows; ++r)
        draw_row(Row(logits + r * size, size, inverse), uniform(keys[r], positions[r]), tokens + r, logprobs + r);
}
// `drawing` may be null: then what is computed is one step, without a draw.
extern "C" void decode_float32(Step* step, Drawing* drawing) { decode<float>(*step, drawing); }
extern "C" void decode_bfloat16(Step* step, Drawing* drawing) { decode<bfloat16>(*step, drawing); }
