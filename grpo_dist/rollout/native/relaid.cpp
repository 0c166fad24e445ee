// Float32 weights in the order in which steps of few rows read them.

#include "products.h"

// Weights (outputs, inputs) as `Linear` has its `halves`, a last line without a second one beside zeros. Returns whether
// bfloat16 holds every number; where it does not, what is written is of no use.
extern "C" int64_t put_halves(const uint32_t* weight, int64_t outputs, int64_t inputs, uint32_t* to, int64_t threads) {
    uint32_t lost = 0;
#pragma omp parallel for num_threads(threads) reduction(| : lost)
    for (int64_t o = 0; o < outputs; o += 2) {
        const uint32_t *first = weight + o * inputs, *second = first + inputs;
        uint32_t* words = to + o / 2 * inputs;
        if (lost & 0xffff) continue;
        if (o + 1 == outputs)
            for (int64_t k = 0; k < inputs; ++k) lost |= first[k], words[k] = first[k] >> 16;
        else
            for (int64_t k = 0; k < inputs; ++k)
                lost |= first[k] | second[k], words[k] = first[k] >> 16 | (second[k] & ~0xffffu);
    }
    return (lost & 0xffff) == 0;
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
