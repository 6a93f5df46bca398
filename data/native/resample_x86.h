// x86 kernels of the resize. Each computes exactly what the portable one in resample.cpp does.
#pragma once
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define LOADER_X86 1
#include "resample.h"

namespace loader::x86 {

// AVX2: per output pixel one broadcast load of four taps. Returns the number of 4-tap groups.
int prepare_lanes(const Axis &axis, int base, std::vector<int> &bases, std::vector<uint8_t> &table);
void horizontal_lanes(int blocks, int groups, const int *bases, const uint8_t *table, const uint8_t *source,
                      size_t source_stride, int rows, uint8_t *out, size_t out_stride);

// AVX-512 VBMI + VNNI: four output pixels at once, their taps gathered by one byte permutation per tap pair.
// block_span: source pixels that the widest block of four outputs touches (16 fit one register, 32 two).
int block_span(const Axis &axis);
int prepare_permute(const Axis &axis, int base, std::vector<int> &bases, std::vector<uint8_t> &table);
void horizontal_permute(bool wide, int blocks, int pairs, const int *bases, const uint8_t *table, const uint8_t *source,
                        size_t source_stride, int rows, uint8_t *out, size_t out_stride);

void vertical_avx2(const uint8_t *first, size_t stride, const int32_t *weight, int count, int bytes, uint8_t *out);
void vertical_avx512(const uint8_t *first, size_t stride, const int32_t *weight, int count, int bytes, uint8_t *out);

}  // namespace loader::x86
#endif
