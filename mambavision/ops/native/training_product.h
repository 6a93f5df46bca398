// Matrix products of training on the matrix units: rows with a weight, and the gradient of a weight.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <vector>

#include "bf16_gemm.h"
#include "isa.h"
#include "pack_kernel.h"

namespace mambavision {

inline const PackKernels& pack_kernels() { return ISA_TABLE(pack_kernels); }

inline int64_t ceil_divide(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }
inline int64_t align_up(int64_t value, int64_t multiple) { return ceil_divide(value, multiple) * multiple; }

// Working memory, aligned to a cache line.
inline at::Tensor scratch(at::IntArrayRef sizes, at::ScalarType type) {
  return at::Tensor(at::detail::empty_cpu(sizes, type));
}

inline Matrix matrix_of(const at::Tensor& tensor) {  // (rows, columns), columns contiguous
  return {tensor.const_data_ptr(), tensor.scalar_type() == at::kBFloat16, tensor.size(0), tensor.size(1),
          tensor.stride(0)};
}

inline Matrix part_of(const Matrix& m, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  const int64_t size = m.bfloat16 ? 2 : 4;
  return {static_cast<const char*>(m.data) + (row * m.stride + column) * size, m.bfloat16, rows, columns, m.stride};
}

// A weight as the second factor: x W^T (`transposed`: W is (columns, inner)) or dy W (W is (inner, columns)).
struct TrainingWeight {
  int64_t columns;
  at::Tensor storage;
  PackedWeight packed;

  TrainingWeight(const at::Tensor& weight, bool transposed)
      : columns(weight.size(transposed ? 0 : 1)), storage(pack(weight, transposed)), packed(storage) {}

 private:
  static at::Tensor pack(const at::Tensor& weight, bool transposed) {
    const int64_t columns = weight.size(transposed ? 0 : 1), pairs = weight.size(transposed ? 1 : 0) / 2;
    const int64_t blocks = ceil_divide(columns, kPanelColumns);
    const at::Tensor storage = weight.new_empty({blocks, pairs, 2 * kPanelColumns}, at::kBFloat16);
    const Matrix whole = matrix_of(weight);
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; block++) {
        const int64_t column = block * kPanelColumns, live = std::min(kPanelColumns, columns - column);
        uint32_t* to = static_cast<uint32_t*>(storage.data_ptr()) + block * pairs * kPanelColumns;
        if (transposed)
          pack_kernels().pair_columns(part_of(whole, column, live, 0, 2 * pairs), to, kPanelColumns, kPanelColumns);
        else
          pack_kernels().pair_rows(part_of(whole, 0, 2 * pairs, column, live), to, kPanelColumns, kPanelColumns, nullptr);
      }
    });
    return storage;
  }
};

// Rows are worked on in groups that stay in the second-level cache while the blocks of a weight go by. The cut changes no
// result, as nothing is summed over rows here.
template <class Work>  // work(matrix units, first row, last row)
void over_row_groups(int64_t rows, int64_t widest_row, const Work& work) {
  constexpr int64_t kCacheBytes = 768 * 1024;
  int64_t groups = ceil_divide(2 * rows * widest_row, kCacheBytes);
  groups = align_up(std::max<int64_t>(groups, 1), at::get_num_threads());
  const int64_t group = align_up(ceil_divide(rows, groups), kPanelRows);
  at::parallel_for(0, ceil_divide(rows, group), 1, [&](int64_t begin, int64_t end) {
    MatrixUnits units;
    for (int64_t g = begin; g < end; g++) work(units, g * group, std::min((g + 1) * group, rows));
  });
}

// finish(A x weight) for these rows of A, bfloat16.
inline void product(MatrixUnits& units, const Matrix& A, int64_t first, int64_t last, const TrainingWeight& weight,
                    const ProductFinish& finish) {
  constexpr int64_t kNearBytes = 256 * 1024;  // of the weight, beside the rows of a group
  const PackedWeight& packed = weight.packed;
  const int64_t some = std::max<int64_t>(1, kNearBytes / (2 * packed.inner * kPanelColumns));
  for (int64_t block = 0; block < packed.blocks; block += some)
    for (int64_t row = first; row < last; row += kPanelRows) {
      const int64_t rows = std::min(kPanelRows, last - row);
      multiply_blocks(units, rows, static_cast<const BFloat16*>(A.data) + row * A.stride, A.stride, packed, block,
                      std::min(block + some, packed.blocks), weight.columns,
                      [&](int64_t column, int64_t columns, const float* sums) {
                        const int64_t offset = row * finish.stride + column;
                        ProductFinish part = finish;
                        if (part.bias) part.bias += column;
                        part.out = static_cast<BFloat16*>(part.out) + offset;
                        if (part.factor) part.factor = static_cast<const BFloat16*>(part.factor) + offset;
                        if (part.derivative) part.derivative = static_cast<BFloat16*>(part.derivative) + offset;
                        pack_kernels().finish(sums, kPanelColumns, rows, columns, part);
                      });
    }
}

// gradient (dy.columns, x.columns), float32, = dy^T x; bias_gradient (dy.columns), unless null, = the columns' sums of dy.
// The narrower of the two is transposed. The rows are cut by the problem's size alone, so that sums are repeatable.
inline void weight_gradient(const Matrix& dy, const Matrix& x, float* gradient, float* bias_gradient) {
  constexpr int64_t kRows = 320, kSlotRows = 1536, kMostSlots = 4, kWidest = 640;
  const bool flipped = dy.columns > x.columns;  // then it is gradient^T = x^T dy that is computed
  const Matrix &narrow = flipped ? x : dy, &wide = flipped ? dy : x;
  const int64_t rows = dy.rows, height = narrow.columns, width = wide.columns;
  const int64_t slots = std::clamp<int64_t>(rows / kSlotRows, 1, kMostSlots);
  const int64_t blocks = ceil_divide(width, kWidest), block = align_up(ceil_divide(width, blocks), 32);
  const int64_t slot_rows = align_up(ceil_divide(rows, slots), 32);
  const int64_t padded = blocks * block;
  const at::Tensor partial = scratch({slots, height, padded}, at::kFloat);
  std::vector<float> bias_partial(bias_gradient ? slots * dy.columns : 0, 0.0f);
  float* sums = partial.mutable_data_ptr<float>();
  float* bias_sums = bias_gradient ? bias_partial.data() : nullptr;
  at::parallel_for(0, slots * blocks, 1, [&](int64_t begin, int64_t end) {
    MatrixUnits units;
    const at::Tensor left = scratch({height, kRows / 2}, at::kInt), right = scratch({kRows / 2, block}, at::kInt);
    uint32_t* A = static_cast<uint32_t*>(left.data_ptr());
    uint32_t* B = static_cast<uint32_t*>(right.data_ptr());  // (columns / kPanelColumns, pairs, kPanelColumns)
    for (int64_t item = begin; item < end; item++) {
      const int64_t slot = item / blocks, column = item % blocks * block;
      float* to = sums + slot * height * padded + column;
      float* bias_to = bias_sums ? bias_sums + slot * dy.columns : nullptr;
      const int64_t last = std::min((slot + 1) * slot_rows, rows);
      for (int64_t row = slot * slot_rows; row < last; row += kRows) {
        const int64_t count = std::min(kRows, last - row), pairs = align_up(count, kTileInner) / 2;
        const int64_t size = pairs * kPanelColumns;
        pack_kernels().transpose(part_of(narrow, row, count, 0, height), A, kRows / 2, pairs,
                                 flipped || column > 0 ? nullptr : bias_to);
        for (int64_t c = 0; c < block; c += kPanelColumns) {
          uint32_t* to_block = B + c / kPanelColumns * size;
          const int64_t live = std::clamp<int64_t>(width - column - c, 0, kPanelColumns);
          pack_kernels().pair_rows(part_of(wide, row, count, column + c, live), to_block, kPanelColumns, kPanelColumns,
                                   flipped && bias_to ? bias_to + column + c : nullptr);
          const int64_t written = ceil_divide(count, 2) * kPanelColumns;
          std::fill(to_block + written, to_block + size, 0u);
        }
        for (int64_t r = 0; r < height; r += kPanelRows)
          for (int64_t c = 0; c < block; c += kPanelColumns)
            multiply_block(units, std::min(kPanelRows, height - r), kPanelColumns, 2 * pairs,
                           reinterpret_cast<BFloat16*>(A) + r * kRows, kRows,
                           reinterpret_cast<BFloat16*>(B + c / kPanelColumns * size), to + r * padded + c, padded,
                           row > slot * slot_rows);
      }
    }
  });
  at::parallel_for(0, ceil_divide(height, 16), 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; tile++)
      pack_kernels().reduce(sums + tile * 16 * padded, slots, height * padded, padded,
                            std::min<int64_t>(16, height - tile * 16), width, flipped, flipped ? gradient + tile * 16 : gradient + tile * 16 * width,
                            flipped ? height : width);
  });
  if (bias_gradient)
    for (int64_t c = 0; c < dy.columns; c++) {
      float sum = 0.0f;
      for (int64_t slot = 0; slot < slots; slot++) sum += bias_sums[slot * dy.columns + c];
      bias_gradient[c] = sum;
    }
}

}  // namespace mambavision

