// AVX2 kernels of the resize. Each computes exactly what the portable one in resample.cpp does.
#pragma once
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define LOADER_X86 1
#include "resample.h"

namespace loader::x86 {

// Wider vectors were tried (AVX-512 VBMI and VNNI, four output pixels a step): the resize alone took a fifth less time,
// the whole decoding 2 % more.

// One broadcast load of four taps per output pixel. Returns the number of 4-tap groups.
int prepare(const Axis &axis, int base, std::vector<int> &bases, std::vector<uint8_t> &table);
void horizontal(int blocks, int groups, const int *bases, const uint8_t *table, const uint8_t *source,
                size_t source_stride, int rows, uint8_t *out, size_t out_stride);
void vertical(const uint8_t *first, size_t stride, const int32_t *weight, int count, int bytes, uint8_t *out);

}  // namespace loader::x86
#endif
