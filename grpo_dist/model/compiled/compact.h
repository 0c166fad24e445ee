// Products of few rows with weights that bfloat16 holds, without loss: few rows wait for memory.
//
// Where pairs of them are multiplied they take 12 bits each. Weights of a line differ little in size: almost all of their
// exponents are among 15 that follow one another. So 4 bits name an exponent, or zero's. Products in float32 would take
// longer over that than they wait, and read 16 bits each.

#pragma once

#include "products.h"

// The numbers of two lines, of each SPAN to a block. For pairs they lie line behind line: a byte of sign and digits for
// each, then their codes, those of the first line in the low bits; or, where a block has other exponents, itself `whole`.
// For products in float32 all blocks are whole, and the lines' numbers lie in turn, the first one's in the low half of a
// word.
struct Compact {
    const uint8_t* blocks; // null for none
    const int64_t* starts; // of two lines, in bytes
    const uint16_t* bases; // of two lines, what to add to a code that is not 0, where bfloat16 has its exponent
    const uint8_t* whole;  // of each block
};

namespace {

constexpr long COMPACT_BYTES = 3 * SPAN, WHOLE_BYTES = 4 * SPAN;
constexpr long COMPACT_ROWS = 2 * ROWS; // most rows of a tile of two lines
constexpr int DIGITS = 7;               // of a number in bfloat16, behind its first one

template <int L, class Large, class Small> inline Pairs<L> widened_bytes(const uint8_t* from) {
    Small bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    return (Pairs<L>)widened<Large>(bytes, std::make_index_sequence<2 * L>{});
}

// 2 L numbers of a block for pairs, from number `at` on
template <int L, bool WHOLE> inline Pairs<L> numbers(const uint8_t* block, Pairs<L> base, long at) {
    if constexpr (WHOLE) return piece<L, bfloat16>(block + 2 * at);
    using T = Types<2 * L>;
    const Pairs<L> codes = widened_bytes<L, Pairs<L>, typename T::UnsignedByte>(block + 2 * SPAN + at % SPAN);
    const Pairs<L> code = (at < SPAN ? codes << DIGITS : codes << (DIGITS - 4)) & (15 << DIGITS);
    // the sign fills all bits above the digits
    const Pairs<L> rest = widened_bytes<L, typename T::SignedHalf, typename T::Byte>(block + at);
    return (rest & (1 << 15 | ((1 << DIGITS) - 1))) | (code != 0 ? code + base : code);
}

// the products of N rows of x, `stride` apart, with a block are added to `parts`
template <int L, bool WHOLE, int N, class X>
inline void add_block(const X* x, long stride, const uint8_t* block, Pairs<L> base, Vec<L> (&parts)[N][2]) {
    UNROLL for (long k = 0; k < SPAN; k += PIECE<L, X>) {
        auto multiply = [&](auto first, auto second) {
            hold(first), hold(second);
            UNROLL for (int r = 0; r < N; ++r) {
                auto xs = piece<L, X>(x + r * stride + k);
                hold(xs);
                parts[r][0] = multiply_add<L>(xs, first, parts[r][0]);
                parts[r][1] = multiply_add<L>(xs, second, parts[r][1]);
            }
        };
        if constexpr (std::is_same_v<X, float>) {
            const Ints<L> words = (Ints<L>)piece<L, bfloat16>(block + 4 * k);
            multiply((Vec<L>)(words << 16), (Vec<L>)(words & ~0xffff));
        } else {
            multiply(numbers<L, WHOLE>(block, base, k), numbers<L, WHOLE>(block, base, SPAN + k));
        }
    }
}

// N rows of x, `stride` apart, times two lines over `count` inputs; the sums of the first `lines` of them are put. Returns
// where the next block begins. One stream of whole cache lines, as long as memory is: what processors fetch ahead best,
// with some help.
template <int L, int N = COMPACT_ROWS, class X>
inline const uint8_t* tile_of_compact(long rows, const X* x, long stride, const uint8_t* block, const uint8_t* whole,
                                      Pairs<L> base, long count, long lines, const Target& target, long row, long output) {
    if constexpr (N > 1)
        if (rows < N)
            return tile_of_compact<L, N - 1>(rows, x, stride, block, whole, base, count, lines, target, row, output);
    Vec<L> parts[N][2];
    UNROLL for (int r = 0; r < N; ++r) parts[r][0] = parts[r][1] = Vec<L>{};
    for (long k = 0; k < count; k += SPAN) {
        const bool is_whole = std::is_same_v<X, float> || whole[k / SPAN];
        for (long byte = 0; byte < (is_whole ? WHOLE_BYTES : COMPACT_BYTES); byte += CACHE_LINE)
            __builtin_prefetch(block + FETCH_AHEAD + byte, 0, 2);
        if (is_whole) add_block<L, true>(x + k, stride, block, base, parts);
        else add_block<L, false>(x + k, stride, block, base, parts);
        block += is_whole ? WHOLE_BYTES : COMPACT_BYTES;
    }
    UNROLL for (int r = 0; r < N; r += 2) {
        const int next = std::min(r + 1, N - 1); // r itself where no row follows
        const Vec<4> four = sums<L>(parts[r][0], parts[r][1], parts[next][0], parts[next][1]);
        auto put = [&](Vec<4> two, int to) {
            if (lines == 2) target.put<2>(two, row + to, output);
            else target.put<1>(two, row + to, output);
        };
        put(four, r);
        if (next != r) put(Vec<4>{four[2], four[3]}, next);
    }
    return block;
}

} // namespace
