// Weights in the order in which steps of few rows read them.

#include "compact.h"
#include <vector>

namespace {

constexpr int CODES = 15; // beside zero's

uint16_t top_half(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits >> 16;
}
uint16_t top_half(bfloat16 x) { return x.bits; }

uint32_t lost(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits & 0xffff;
}
uint32_t lost(bfloat16) { return 0; }

// Two lines of weights (outputs, inputs); beside the last one of an odd number of them lie zeros.
template <class W> struct TwoLines {
    const W *first, *second; // the second one is null for zeros

    TwoLines(const W* weight, long outputs, long inputs, long output)
        : first(weight + output * inputs), second(output + 1 < outputs ? first + inputs : nullptr) {}

    // the numbers of a block, line behind line
    void read(long block, uint16_t* to) const {
        const W *a = first + block * SPAN, *b = second + block * SPAN;
        for (long k = 0; k < SPAN; ++k) to[k] = top_half(a[k]);
        for (long k = 0; k < SPAN; ++k) to[SPAN + k] = second ? top_half(b[k]) : 0;
    }

    // whether bfloat16 holds all of `inputs`
    bool fit(long inputs) const {
        uint32_t any = 0;
        for (long k = 0; k < inputs; ++k) any |= lost(first[k]);
        for (long k = 0; second && k < inputs; ++k) any |= lost(second[k]);
        return any == 0;
    }
};

constexpr uint16_t ONE = 1 << DIGITS; // of an exponent, where bfloat16 has it

uint16_t exponent(uint16_t number) { return number & 0xff << DIGITS; }

template <class W>
int64_t measure(const W* weight, int64_t outputs, int64_t inputs, bool in_turn, int64_t* starts, uint16_t* bases,
                uint8_t* whole, int64_t threads) {
    const long pairs = (outputs + 1) / 2, blocks = inputs / SPAN;
    bool fits = true;
#pragma omp parallel num_threads(threads) reduction(&& : fits)
    {
        std::vector<uint16_t> smallest(blocks); // exponents beside zero's, less ONE
#pragma omp for
        for (long pair = 0; pair < pairs; ++pair) {
            if (!fits) continue;
            const TwoLines<W> lines(weight, outputs, inputs, 2 * pair);
            fits = lines.fit(inputs);
            uint16_t top = 0;
            for (long block = 0; block < blocks && !in_turn; ++block) {
                uint16_t numbers[2 * SPAN], least = -1;
                lines.read(block, numbers);
                for (uint16_t number : numbers) {
                    top = std::max(top, exponent(number));
                    least = std::min<uint16_t>(least, exponent(number) - ONE); // zero's is more than any other
                }
                smallest[block] = least;
            }
            const uint16_t base = std::max(top - CODES * ONE, 0);
            long bytes = 0;
            for (long block = 0; block < blocks; ++block) {
                const bool is_whole = in_turn || smallest[block] < base;
                whole[pair * blocks + block] = is_whole;
                bytes += is_whole ? WHOLE_BYTES : COMPACT_BYTES;
            }
            bases[pair] = base, starts[pair] = bytes;
        }
    }
    int64_t total = 0;
    for (long pair = 0; pair < pairs; ++pair) total += std::exchange(starts[pair], total);
    return fits ? total : -1;
}

void put_block(const uint16_t* numbers, uint16_t base, uint8_t* to) {
    uint8_t codes[2 * SPAN];
    for (long n = 0; n < 2 * SPAN; ++n) {
        const uint16_t number = numbers[n], from = exponent(number) ? base : 0;
        to[n] = (number >> 8 & 1 << DIGITS) | (number & (ONE - 1));
        codes[n] = (exponent(number) - from) >> DIGITS;
    }
    for (long n = 0; n < SPAN; ++n) to[2 * SPAN + n] = codes[n] | codes[SPAN + n] << 4;
}

template <class W>
void put(const W* weight, int64_t outputs, int64_t inputs, bool in_turn, const Compact& compact, uint8_t* to,
         int64_t threads) {
    const long blocks = inputs / SPAN;
#pragma omp parallel for num_threads(threads)
    for (long pair = 0; pair < (outputs + 1) / 2; ++pair) {
        const TwoLines<W> lines(weight, outputs, inputs, 2 * pair);
        uint8_t* next = to + compact.starts[pair];
        for (long block = 0; block < blocks; ++block) {
            uint16_t numbers[2 * SPAN], ordered[2 * SPAN];
            lines.read(block, numbers);
            for (long k = 0; k < SPAN; ++k)
                ordered[in_turn ? 2 * k : k] = numbers[k], ordered[in_turn ? 2 * k + 1 : SPAN + k] = numbers[SPAN + k];
            if (compact.whole[pair * blocks + block]) {
                std::memcpy(next, ordered, WHOLE_BYTES);
                next += WHOLE_BYTES;
            } else {
                put_block(ordered, compact.bases[pair], next);
                next += COMPACT_BYTES;
            }
        }
    }
}

} // namespace

// How many bytes the blocks of weights (outputs, inputs) take, inputs of whole blocks, and all else of `Compact`; -1 where
// bfloat16 does not hold every number. Weights are in float32 or, `half`, in bfloat16; `in_turn`, they are for products in
// float32.
extern "C" int64_t measure_compact(const void* weight, int64_t half, int64_t outputs, int64_t inputs, int64_t in_turn,
                                   int64_t* starts, uint16_t* bases, uint8_t* whole, int64_t threads) {
    if (half) return measure(static_cast<const bfloat16*>(weight), outputs, inputs, in_turn, starts, bases, whole, threads);
    return measure(static_cast<const float*>(weight), outputs, inputs, in_turn, starts, bases, whole, threads);
}

// The blocks themselves.
extern "C" void put_compact(const void* weight, int64_t half, int64_t outputs, int64_t inputs, int64_t in_turn,
                            const Compact* compact, uint8_t* to, int64_t threads) {
    if (half) put(static_cast<const bfloat16*>(weight), outputs, inputs, in_turn, *compact, to, threads);
    else put(static_cast<const float*>(weight), outputs, inputs, in_turn, *compact, to, threads);
}

// Weights (outputs, inputs), in whole groups of whole cache lines, as `Groups`.
extern "C" void put_groups(const float* weight, int64_t outputs, int64_t inputs, float* to, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t o = 0; o < outputs; o += OUTPUTS)
        for (int64_t k = 0; k < inputs; k += Groups<float>::TOGETHER)
            for (int64_t line = 0; line < OUTPUTS; ++line)
                std::copy_n(weight + (o + line) * inputs + k, Groups<float>::TOGETHER,
                            to + o * inputs + k * OUTPUTS + line * Groups<float>::TOGETHER);
}
