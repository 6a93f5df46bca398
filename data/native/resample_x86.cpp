#include "resample_x86.h"
#ifdef LOADER_X86
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#define TARGET_AVX2 __attribute__((target("avx2")))
#define INLINE inline __attribute__((always_inline))

namespace loader::x86 {

namespace {

// weight = high * 2^SPLIT_BITS + low with low in [-2^14, 2^14): both fit 16 bits.
struct Split {
    int16_t high, low;
    explicit Split(int32_t weight) {
        const int32_t rounded = (weight + (1 << (SPLIT_BITS - 1))) >> SPLIT_BITS;
        high = (int16_t)rounded;
        low = (int16_t)(weight - rounded * (1 << SPLIT_BITS));
    }
};

INLINE int32_t pair(int16_t a, int16_t b) { return (int32_t)((uint32_t)(uint16_t)a | (uint32_t)(uint16_t)b << 16); }

}  // namespace

int prepare(const Axis &axis, int base, std::vector<int> &bases, std::vector<uint8_t> &table) {
    int most = 1;
    for (int o = 0; o < axis.out; o++) most = std::max(most, axis.count[o]);
    const int groups = (most + 3) / 4, padded = (axis.out + 3) / 4 * 4;
    bases.resize(padded);
    table.resize((size_t)padded * groups * 64);
    int16_t *t = (int16_t *)table.data();
    for (int o = 0; o < padded; o++) {
        const bool real = o < axis.out;
        bases[o] = real ? axis.first[o] - base : 0;
        for (int g = 0; g < groups; g++, t += 32) {
            for (int k = 0; k < 4; k++) {
                const int tap = 4 * g + k;
                const Split w(real && tap < axis.count[o] ? axis.weight[(size_t)o * axis.stride + tap] : 0);
                for (int c = 0; c < 4; c++) {  // lane k / 2 holds [w0 w1] for each of the four channels
                    t[8 * (k / 2) + 2 * c + k % 2] = w.high;
                    t[16 + 8 * (k / 2) + 2 * c + k % 2] = w.low;
                }
            }
        }
    }
    return groups;
}

namespace {

template <int GROUPS>
TARGET_AVX2 INLINE __m256i weighted_pixel(const uint8_t *p, const __m256i *w, int groups) {
    const __m256i gather = _mm256_setr_epi8(0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, 3, -1, 7, -1, 8, -1, 12, -1, 9, -1,
                                            13, -1, 10, -1, 14, -1, 11, -1, 15, -1);
    __m256i high = _mm256_setzero_si256(), low = high;
    const int n = GROUPS ? GROUPS : groups;
    for (int g = 0; g < n; g++) {
        __m256i v = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(p + 16 * g)));
        v = _mm256_shuffle_epi8(v, gather);
        high = _mm256_add_epi32(high, _mm256_madd_epi16(v, _mm256_loadu_si256(w + 2 * g)));
        low = _mm256_add_epi32(low, _mm256_madd_epi16(v, _mm256_loadu_si256(w + 2 * g + 1)));
    }
    return _mm256_add_epi32(_mm256_slli_epi32(high, SPLIT_BITS), low);
}

TARGET_AVX2 INLINE __m256i fold_two(__m256i a, __m256i b) {
    const __m256i sum = _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
    return _mm256_srai_epi32(_mm256_add_epi32(sum, _mm256_set1_epi32(1 << (WEIGHT_BITS - 1))), WEIGHT_BITS);
}

template <int GROUPS>
TARGET_AVX2 void lanes(int blocks, int groups, const int *bases, const uint8_t *table, const uint8_t *source,
                       size_t source_stride, int rows, uint8_t *out, size_t out_stride) {
    const int n = GROUPS ? GROUPS : groups;
    const __m128i drop_fourth = _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
    for (int r = 0; r < rows; r++, source += source_stride, out += out_stride) {
        const __m256i *w = (const __m256i *)table;
        for (int b = 0; b < blocks; b++, w += 8 * n) {
            const __m256i p0 = weighted_pixel<GROUPS>(source + 4 * (size_t)bases[4 * b], w, n);
            const __m256i p1 = weighted_pixel<GROUPS>(source + 4 * (size_t)bases[4 * b + 1], w + 2 * n, n);
            const __m256i p2 = weighted_pixel<GROUPS>(source + 4 * (size_t)bases[4 * b + 2], w + 4 * n, n);
            const __m256i p3 = weighted_pixel<GROUPS>(source + 4 * (size_t)bases[4 * b + 3], w + 6 * n, n);
            __m256i bytes = _mm256_packs_epi32(fold_two(p0, p1), fold_two(p2, p3));  // lanes: p0 p2 | p1 p3
            bytes = _mm256_packus_epi16(bytes, bytes);
            const __m128i four = _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
            _mm_storeu_si128((__m128i *)(out + 12 * b), _mm_shuffle_epi8(four, drop_fourth));
        }
    }
}

}  // namespace

void horizontal(int blocks, int groups, const int *bases, const uint8_t *table, const uint8_t *source,
                      size_t source_stride, int rows, uint8_t *out, size_t out_stride) {
    const auto kernel = groups == 1 ? lanes<1> : groups == 2 ? lanes<2> : groups == 3 ? lanes<3> : lanes<0>;
    kernel(blocks, groups, bases, table, source, source_stride, rows, out, out_stride);
}

TARGET_AVX2 void vertical(const uint8_t *first, size_t stride, const int32_t *weight, int count, int bytes, uint8_t *out) {
    const __m256i zero = _mm256_setzero_si256(), half = _mm256_set1_epi32(1 << (WEIGHT_BITS - 1));
    for (int at = 0; at < bytes; at += 32) {
        __m256i high[4], low[4];
        for (int i = 0; i < 4; i++) high[i] = zero, low[i] = half;
        for (int t = 0; t < count; t += 2) {
            const bool two = t + 1 < count;
            const Split w0(weight[t]), w1(two ? weight[t + 1] : 0);
            const __m256i wh = _mm256_set1_epi32(pair(w0.high, w1.high)), wl = _mm256_set1_epi32(pair(w0.low, w1.low));
            const uint8_t *p = first + t * stride + at;
            const __m256i a = _mm256_loadu_si256((const __m256i *)p);
            const __m256i b = _mm256_loadu_si256((const __m256i *)(two ? p + stride : p));
            const __m256i left = _mm256_unpacklo_epi8(a, b), right = _mm256_unpackhi_epi8(a, b);
            const __m256i v[4] = {_mm256_unpacklo_epi8(left, zero), _mm256_unpackhi_epi8(left, zero),
                                  _mm256_unpacklo_epi8(right, zero), _mm256_unpackhi_epi8(right, zero)};
            for (int i = 0; i < 4; i++) {
                high[i] = _mm256_add_epi32(high[i], _mm256_madd_epi16(v[i], wh));
                low[i] = _mm256_add_epi32(low[i], _mm256_madd_epi16(v[i], wl));
            }
        }
        for (int i = 0; i < 4; i++)
            low[i] = _mm256_srai_epi32(_mm256_add_epi32(_mm256_slli_epi32(high[i], SPLIT_BITS), low[i]), WEIGHT_BITS);
        const __m256i packed = _mm256_packus_epi16(_mm256_packs_epi32(low[0], low[1]), _mm256_packs_epi32(low[2], low[3]));
        if (at + 32 <= bytes) {
            _mm256_storeu_si256((__m256i *)(out + at), packed);
        } else {
            alignas(32) uint8_t tail[32];
            _mm256_store_si256((__m256i *)tail, packed);
            memcpy(out + at, tail, bytes - at);
        }
    }
}

}  // namespace loader::x86
#endif
