// L numbers at once, on processors of any width.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <omp.h>
#include <type_traits>
#include <utility>
#ifdef __FMA__
#include <immintrin.h>
#endif

namespace {

struct bfloat16 {
    uint16_t bits;
};

// --- L numbers at once ---------------------------------------------------------------------------------------------

#ifdef __AVX512F__
#define WIDE // a test defines it too, so that the tiles for these processors run on all others
#endif
#if defined(__AVX512F__) && defined(__AVX512BF16__)
#define PAIRS // multiplies pairs of numbers in bfloat16; a test defines it, too
#endif
#ifdef WIDE
constexpr int LANES = 16, ROWS = 6; // rows of a tile: as many sums as fit in registers beside what they add
#else
constexpr int LANES = 8, ROWS = 3;
#endif
// of `library.py`: OUTPUTS of a tile, HIGH_BLOCK, SPAN, and CACHE_LINE

template <int L> struct Types {
    typedef float Float __attribute__((vector_size(4 * L)));
    typedef int32_t Int __attribute__((vector_size(4 * L)));
    typedef uint16_t Half __attribute__((vector_size(2 * L)));
    typedef int16_t SignedHalf __attribute__((vector_size(2 * L)));
    typedef int8_t Byte __attribute__((vector_size(L)));
    typedef uint8_t UnsignedByte __attribute__((vector_size(L)));
};
template <int L> using Vec = typename Types<L>::Float;
template <int L> using Ints = typename Types<L>::Int;
template <int L> using Pairs = typename Types<2 * L>::Half; // of numbers in bfloat16

template <int L> inline Vec<L> load(const float* from) {
    Vec<L> v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

// number by number, which compilers make one instruction of; of __builtin_convertvector GCC 12 makes five
template <class Large, class Small, size_t... I> inline Large widened(Small of, std::index_sequence<I...>) {
    return Large{of[I]...};
}

template <int L> inline Vec<L> load(const bfloat16* from) {
    typename Types<L>::Half h;
    std::memcpy(&h, from, sizeof h);
    return (Vec<L>)(widened<Ints<L>>(h, std::make_index_sequence<L>{}) << 16);
}

template <int L> inline Vec<L> load(const int8_t* from) {
    typename Types<L>::Byte b;
    std::memcpy(&b, from, sizeof b);
    return __builtin_convertvector(widened<Ints<L>>(b, std::make_index_sequence<L>{}), Vec<L>);
}

// a · b + c, rounded once where the processor can. Left to the compiler, that would depend on the shape of the loop.
template <int L> inline Vec<L> multiply_add(Vec<L> a, Vec<L> b, Vec<L> c) {
#ifdef __AVX512F__
    if constexpr (L == 16) return _mm512_fmadd_ps(a, b, c);
#endif
#ifdef __FMA__
    if constexpr (L == 8) return _mm256_fmadd_ps(a, b, c);
#endif
    return a * b + c;
}

// a · b + c of each pair, the second product first
template <int L> inline Vec<L> multiply_add(Pairs<L> a, Pairs<L> b, Vec<L> c) {
#ifdef __AVX512BF16__
    if constexpr (L == 16) return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
#endif
    const Ints<L> x = (Ints<L>)a, y = (Ints<L>)b;
    const Vec<L> second = multiply_add<L>((Vec<L>)(x & ~0xffff), (Vec<L>)(y & ~0xffff), c);
    return multiply_add<L>((Vec<L>)(x << 16), (Vec<L>)(y << 16), second);
}

// Keeps a vector in a register. GCC would read it from memory anew for each product, and reads are what a tile waits for.
template <class V> inline void hold(V& v) {
#if defined(__AVX512F__) || defined(__AVX__) && !defined(WIDE)
    asm("" : "+v"(v));
#else
    (void)v;
#endif
}

template <int L> inline void store(Vec<L> v, float* to) { std::memcpy(to, &v, sizeof v); }

// Loops over a tile are written out, so that its sums stay in registers. GCC by itself would keep those of a large one in
// memory.
#define UNROLL _Pragma("GCC unroll 16")

// the first `count` of L numbers, beside zeros
template <int L> inline Vec<L> load_some(const float* from, long count) {
    if (count == L) return load<L>(from);
    Vec<L> v = {};
    std::memcpy(&v, from, count * sizeof(float));
    return v;
}

template <int L> inline void store_some(Vec<L> v, float* to, long count) {
    if (count == L) store<L>(v, to);
    else std::memcpy(to, &v, count * sizeof(float));
}

inline void store(float x, float* to) { *to = x; }

inline void store(float x, bfloat16* to) { // to the nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    to->bits = x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
}

// What is multiplied at once: L numbers in float32 or L pairs in bfloat16.
template <int L, class X> constexpr long PIECE = std::is_same_v<X, float> ? L : 2 * L;

template <int L, class X, class W> inline auto piece(const W* from) {
    if constexpr (std::is_same_v<X, float>) return load<L>(from);
    else {
        Pairs<L> pairs;
        std::memcpy(&pairs, from, sizeof pairs);
        return pairs;
    }
}

// numbers as W holds them: to the nearest, ties to even
template <int L, class W> inline Vec<L> rounded(Vec<L> v) {
    if constexpr (std::is_same_v<W, float>) return v;
    Ints<L> bits = (Ints<L>)v;
    return (Vec<L>)((bits + 0x7fff + (bits >> 16 & 1)) & ~0xffff);
}

template <int L> inline void store(Vec<L> v, bfloat16* to) {
    const auto halves = __builtin_convertvector((Ints<L>)rounded<L, bfloat16>(v) >> 16, typename Types<L>::Half);
    std::memcpy(to, &halves, sizeof halves);
}

#ifdef __clang__
#define SHUFFLE(a, b, L, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, L, ...) __builtin_shuffle(a, b, Ints<L>{__VA_ARGS__})
#endif

// Sums of neighbours, of a and of b in turn: two of each in every quarter of 16 numbers or half of 8, as instructions
// shuffle them.
inline Vec<8> neighbours(Vec<8> a, Vec<8> b) {
    return SHUFFLE(a, b, 8, 0, 2, 8, 10, 4, 6, 12, 14) + SHUFFLE(a, b, 8, 1, 3, 9, 11, 5, 7, 13, 15);
}

#ifdef WIDE
inline Vec<16> neighbours(Vec<16> a, Vec<16> b) {
    return SHUFFLE(a, b, 16, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
           SHUFFLE(a, b, 16, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
}
#endif

// the sum of each of four vectors
template <int L> inline Vec<4> sums(Vec<L> a, Vec<L> b, Vec<L> c, Vec<L> d) {
    const Vec<L> quarters = neighbours(neighbours(a, b), neighbours(c, d));
    Vec<4> parts[L / 4];
    std::memcpy(parts, &quarters, sizeof quarters);
    if constexpr (L == 8) return parts[0] + parts[1];
    else return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

template <int L> inline float sum(Vec<L> of) {
    float total = 0;
    for (int i = 0; i < L; ++i) total += of[i];
    return total;
}

// the largest of `count` numbers and `peak`
template <int L> inline float largest(const float* of, long count, float peak) {
    Vec<L> most = Vec<L>{} + peak;
    long k = 0;
    for (; k + L <= count; k += L) most = load<L>(of + k) > most ? load<L>(of + k) : most;
    for (int i = 0; i < L; ++i) peak = std::max(peak, most[i]);
    for (; k < count; ++k) peak = std::max(peak, of[k]);
    return peak;
}

// e^x by a polynomial on [-ln 2 / 2, ln 2 / 2], coefficients of Cephes' expf (S. L. Moshier); below -87 it is e^-87
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

} // namespace
