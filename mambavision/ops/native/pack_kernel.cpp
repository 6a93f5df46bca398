// Packing for the matrix units and the epilogues of training's products, for one instruction set.
#include "pack_kernel.h"

#include "gelu_forms.h"
#include "isa.h"
#include "simd.h"

namespace {

using mambavision::Matrix;
using mambavision::ProductFinish;

INLINE int live_lanes(int64_t columns, int64_t at) { return columns - at < kLanes ? (int)(columns - at) : kLanes; }

// The bits of bfloat16 values, rounded to nearest even, in the upper halves; the lower ones are not cleared.
INLINE Bits rounded_bits(Vec value) {
  const Bits bits = (Bits)value;
  const Bits rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return value == value ? rounded : bits | 0x400000u;
}

template <class T>
INLINE Bits pair(Vec low, Vec high) {  // of T's values: what comes from bfloat16 needs no rounding
  if constexpr (sizeof(T) == 2) return ((Bits)low >> 16) | (Bits)high;
  return (rounded_bits(low) >> 16) | (rounded_bits(high) & 0xffff0000u);
}

// rows 16 x 16 of uint32_t -> transposed; only so many columns and rows (of the input) are there.
INLINE void transpose_tile(const uint32_t (&in)[16][16], uint32_t* out, int64_t stride, int64_t columns, int64_t rows) {
#if defined(__AVX512F__)
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i++) a[i] = _mm512_load_si512(in[i]);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int i = 0; i < 4; i++) {  // a[4 g + i]: column i of each lane of four, rows 4 g to 4 g + 3
    b[i] = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88);
    b[4 + i] = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
    b[8 + i] = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd);
    b[12 + i] = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
  }
  const __mmask16 live = (__mmask16)first_lanes(rows < 16 ? (int)rows : 16);
  auto put = [&](int column, __m512i value) {
    if (column < columns) _mm512_mask_storeu_epi32(out + column * stride, live, value);
  };
  for (int i = 0; i < 4; i++) {
    put(i, _mm512_shuffle_i32x4(b[i], b[4 + i], 0x88));
    put(8 + i, _mm512_shuffle_i32x4(b[i], b[4 + i], 0xdd));
    put(4 + i, _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0x88));
    put(12 + i, _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0xdd));
  }
#else
  for (int column = 0; column < columns && column < 16; column++)
    for (int row = 0; row < rows && row < 16; row++) out[column * stride + row] = in[row][column];
#endif
}

template <class T>
INLINE const T* row_of(const Matrix& m, int64_t row) {
  return (const T*)m.data + row * m.stride;
}

template <class T>
void pair_rows_of(const Matrix& in, uint32_t* out, int64_t out_stride, int64_t padded, float* sums) {
  for (int64_t r = 0; r < in.rows; r += 2) {
    const T *first = row_of<T>(in, r), *second = row_of<T>(in, r + 1);
    const bool last = r + 1 == in.rows;
    uint32_t* to = out + r / 2 * out_stride;
    for (int64_t c = 0; c < in.columns; c += kLanes) {
      const int live = live_lanes(in.columns, c);
      const Vec low = load(first + c, live), high = last ? Vec{} : load(second + c, live);
      const Bits both = pair<T>(low, high);
      store((float*)to + c, (Vec)both, live);
      if (sums) store(sums + c, load(sums + c, live) + low + high, live);
    }
    for (int64_t c = in.columns; c < padded; c++) to[c] = 0;
  }
}

INLINE uint32_t element_bits(const float* from) { return rounded_bits(splat(*from))[0] >> 16; }
INLINE uint32_t element_bits(const bfloat16* from) { return from->bits; }

template <class T>
INLINE void copy_pairs(const T* from, int64_t elements, uint32_t (&to)[16]) {  // one row's next 32 elements
  if (elements >= 32) {
    if constexpr (sizeof(T) == 2) {
      memcpy(to, from, 64);
    } else {
      for (int i = 0; i < 32; i += kLanes) store((bfloat16*)to + i, load(from + i));
    }
    return;
  }
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2) {
    const __mmask32 live = elements > 0 ? (1u << elements) - 1 : 0;
    return _mm512_store_si512(to, _mm512_maskz_loadu_epi16(live, from));
  }
#endif
  for (int i = 0; i < 16; i++)
    to[i] = (2 * i < elements ? element_bits(from + 2 * i) : 0) |
            (2 * i + 1 < elements ? element_bits(from + 2 * i + 1) << 16 : 0);
}

template <class T>
void pair_columns_of(const Matrix& in, uint32_t* out, int64_t out_stride, int64_t padded) {
  alignas(64) uint32_t tile[16][16];
  const int64_t pairs = (in.columns + 1) / 2;
  for (int64_t r = 0; r < padded; r += 16)
    for (int64_t p = 0; p < pairs; p += 16) {
      for (int i = 0; i < 16; i++)
        copy_pairs(row_of<T>(in, r + i < in.rows ? r + i : 0) + 2 * p, r + i < in.rows ? in.columns - 2 * p : 0, tile[i]);
      transpose_tile(tile, out + p * out_stride + r, out_stride, pairs - p, padded - r);
    }
}

template <class T>
void transpose_of(const Matrix& in, uint32_t* out, int64_t out_stride, int64_t pairs, float* sums) {
  alignas(64) uint32_t tile[16][16];
  for (int64_t p = 0; p < pairs; p += 16)
    for (int64_t c = 0; c < in.columns; c += 16) {
      for (int lanes = 0; lanes < 16; lanes += kLanes) {
        const int64_t left = in.columns - c - lanes;
        const int live = left >= kLanes ? kLanes : left > 0 ? (int)left : 0;
        Vec sum = {};
        for (int i = 0; i < 16; i++) {
          const int64_t r = 2 * (p + i);
          const Vec low = r < in.rows ? load(row_of<T>(in, r) + c + lanes, live) : Vec{};
          const Vec high = r + 1 < in.rows ? load(row_of<T>(in, r + 1) + c + lanes, live) : Vec{};
          const Bits both = pair<T>(low, high);
          memcpy(&tile[i][lanes], &both, sizeof both);
          sum += low + high;
        }
        if (sums && live > 0) store(sums + c + lanes, load(sums + c + lanes, live) + sum, live);
      }
      transpose_tile(tile, out + c * out_stride + p, out_stride, in.columns - c, pairs - p);
    }
}

void pair_rows(const Matrix& in, uint32_t* out, int64_t out_stride, int64_t padded, float* sums) {
  in.bfloat16 ? pair_rows_of<bfloat16>(in, out, out_stride, padded, sums)
              : pair_rows_of<float>(in, out, out_stride, padded, sums);
}

void pair_columns(const Matrix& in, uint32_t* out, int64_t out_stride, int64_t padded) {
  in.bfloat16 ? pair_columns_of<bfloat16>(in, out, out_stride, padded)
              : pair_columns_of<float>(in, out, out_stride, padded);
}

void transpose(const Matrix& in, uint32_t* out, int64_t out_stride, int64_t pairs, float* sums) {
  in.bfloat16 ? transpose_of<bfloat16>(in, out, out_stride, pairs, sums)
              : transpose_of<float>(in, out, out_stride, pairs, sums);
}

void reduce(const float* in, int64_t slots, int64_t slot_stride, int64_t stride, int64_t rows, int64_t columns,
            bool transposed, float* out, int64_t out_stride) {
  alignas(64) uint32_t tile[16][16] = {};
  for (int64_t c = 0; c < columns; c += 16) {
    const int64_t live = columns - c < 16 ? columns - c : 16;
    for (int64_t r = 0; r < rows; r++)
      for (int lanes = 0; lanes < 16; lanes += kLanes) {
        const int64_t left = live - lanes;
        const int some = left >= kLanes ? kLanes : left > 0 ? (int)left : 0;
        const float* from = in + r * stride + c + lanes;
        Vec sum = load(from, some);
        for (int64_t slot = 1; slot < slots; slot++) sum += load(from + slot * slot_stride, some);
        if (transposed)
          memcpy(&tile[r][lanes], &sum, sizeof sum);
        else if (some > 0)
          store(out + r * out_stride + c + lanes, sum, some);
      }
    if (transposed) transpose_tile(tile, (uint32_t*)out + c * out_stride, out_stride, live, rows);
  }
}

// gelu_exact where the results are rounded to bfloat16: 12 bits of the reciprocal and of the exponential's mantissa do.
INLINE GeluValue gelu_rough(Vec x) {
#if defined(__AVX512F__)
  const Vec distance = at_most(magnitude(x), kFar);
  const Vec bell = exp2_product_rough(distance, distance * (-0.5f * kLog2E));
  const Vec t = (Vec)_mm512_rcp14_ps((__m512)(1.0f + distance * (0.3275911f * 0.707106781f)));
  const Vec tail = bell * t * (0.127414796f + t * (-0.142248368f + t * (0.7107068705f + t * (-0.7265760135f +
                   t * 0.5307027145f))));
  const Vec gate = x < 0.0f ? tail : 1.0f - tail;
  return {gate, gate + x * bell * 0.398942280f};
#else
  return gelu_exact(x);
#endif
}

template <bool kGelu, bool kBias, bool kFactor>
void finish_rows(const float* sums, int64_t stride, int64_t rows, int64_t columns, const ProductFinish& f) {
  for (int64_t r = 0; r < rows; r++) {
    const float* from = sums + r * stride;
    bfloat16* out = (bfloat16*)f.out + r * f.stride;
    for (int64_t c = 0; c < columns; c += kLanes) {
      const int live = live_lanes(columns, c);
      Vec value = load(from + c, live);
      if (kBias) value += load(f.bias + c, live);
      if (kFactor) value *= load((const bfloat16*)f.factor + r * f.stride + c, live);
      if (kGelu) {
        const GeluValue gelu = gelu_rough(value);
        value *= gelu.gate;
        store((bfloat16*)f.derivative + r * f.stride + c, gelu.derivative, live);
      }
      store(out + c, value, live);
    }
  }
}

void finish(const float* sums, int64_t stride, int64_t rows, int64_t columns, const ProductFinish& f) {
  if (f.gelu) return finish_rows<true, true, false>(sums, stride, rows, columns, f);
  if (f.factor) return finish_rows<false, false, true>(sums, stride, rows, columns, f);
  if (f.bias) return finish_rows<false, true, false>(sums, stride, rows, columns, f);
  finish_rows<false, false, false>(sums, stride, rows, columns, f);
}

}  // namespace

namespace mambavision {

extern const PackKernels ISA_SYMBOL(pack_kernels);
const PackKernels ISA_SYMBOL(pack_kernels) = {pair_rows, pair_columns, transpose, reduce, finish};

}  // namespace mambavision
