// From bytes to what a model sees, for training on the CPU: one pass where torch makes three over a float batch.
#include <cstddef>
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "clones.h"

namespace {

// A fresh batch of floats is tens of megabytes: in 4 KiB pages its first touch costs more than the arithmetic.
void ask_for_large_pages(float *first, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t LARGE = 2 << 20;
    const uintptr_t begin = ((uintptr_t)first + LARGE - 1) & ~(LARGE - 1), end = ((uintptr_t)first + bytes) & ~(LARGE - 1);
    if (begin < end) madvise((void *)begin, end - begin, MADV_HUGEPAGE);  // advice: a kernel without them changes nothing
#endif
}

// Packed RGB bytes to packed RGB floats: (v - mean) / std of its channel, rounded after each step as torch rounds.
CLONES void normalize(const uint8_t *in, float *out, int64_t pixels, const float *mean, const float *std) {
    constexpr int BLOCK = 48;  // values of 16 pixels: whole vectors of any width, each with its channels in one order
    float means[BLOCK], stds[BLOCK];
    for (int i = 0; i < BLOCK; i++) means[i] = mean[i % 3], stds[i] = std[i % 3];
    const int64_t values = 3 * pixels;
    ask_for_large_pages(out, values * sizeof(float));
    int64_t at = 0;
    for (; at + BLOCK <= values; at += BLOCK)
        for (int i = 0; i < BLOCK; i++) out[at + i] = ((float)in[at + i] - means[i]) / stds[i];
    for (; at < values; at++) out[at] = ((float)in[at] - mean[at % 3]) / std[at % 3];
}

}  // namespace

// A name of its own: clang gives the clones of an exported function other names.
extern "C" void loader_normalize(const uint8_t *in, float *out, int64_t pixels, const float *mean, const float *std) {
    normalize(in, out, pixels, mean, std);
}
