// Tokens of rows that follow one another, drawn without anybody who looks at them in between.
//
// Shapes: R rows of the cache, N requests.

#pragma once

#include "draw.h"
#include "work.h"

// What a step computes: a number for each row that it has a part in.
struct Columns {
    int64_t *tokens, *slots; // the newest token, and where its key goes
    int64_t* prompt;         // those of a prompt one after another
    int64_t* cache_rows;     // where in the cache each is; null: at its own number
    int64_t* turns;          // its rotations; null: those of its own number
};

struct Drawing {
    int64_t steps, places; // the most tokens of a row; of a request in `drawn`
    double seconds;        // after which no step begins
    float inverse;         // of the temperature
    const int64_t* ends;   // (num_ends,) the tokens that end a row
    int64_t num_ends;
    const int64_t* request; // (R,)
    int64_t *last, *lengths; // (R,) the newest token, and tokens of its own in the cache
    bool* alive;             // (R,)
    const int64_t *keys, *offsets, *limits; // (N,)
    const bool* may_end;                    // (N,)
    int64_t* drawn;     // (N, places)
    float* logprobs;    // (N, places)
    int64_t* ended_at;  // (N,)
    int64_t num_drawn, num_steps; // so far
    double begun;
    bool is_over;

    // a row's place among its own tokens of the one that is drawn
    int64_t place(int64_t cache_row) const { return lengths[cache_row] + 1; }

    // After all are drawn: the rows that have ended leave, and the others go on. Returns how many do.
    int64_t take(Columns& rows, int64_t count) {
        int64_t left = 0;
        for (int64_t r = 0; r < count; ++r) {
            const int64_t row = rows.cache_rows[r], n = request[row], at = place(row), token = drawn[n * places + at];
            last[row] = token, lengths[row] = at;
            const bool ends_it = may_end[n] && std::find(ends, ends + num_ends, token) != ends + num_ends;
            alive[row] = !ends_it && at + 1 < limits[n];
            if (!alive[row]) {
                ended_at[n] = at + 1;
                continue;
            }
            rows.tokens[left] = token, rows.slots[left] = rows.slots[r] + 1, rows.prompt[left] = rows.prompt[r];
            rows.cache_rows[left] = row, rows.turns[left] = rows.turns[r] + 1;
            ++left;
        }
        num_drawn += count;
        is_over = ++num_steps == steps || left == 0 || omp_get_wtime() - begun > seconds;
        return left;
    }
};

namespace {

void draw_all(const Drawing& d, const Columns& rows, long count, const float* logits, long vocabulary, Member& member) {
    member.share(count, [&](long r) {
        const int64_t row = rows.cache_rows[r], n = d.request[row], at = d.place(row);
        draw_row(Row(logits + r * vocabulary, vocabulary, d.inverse), uniform(d.keys[n], d.offsets[n] + at),
                 d.drawn + n * d.places + at, d.logprobs + n * d.places + at);
    }, WORK);
    member.await(WORK);
}

} // namespace
