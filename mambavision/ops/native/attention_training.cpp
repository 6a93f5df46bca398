// The operators of attention over short windows in training, on the matrix units: one head of one window at a time, its
// scores in the cache. The backward computes the scores again, transposed, so that only the gradient of the queries needs a
// transposition. Nothing is summed across heads or windows: results do not depend on the number of threads.
//
//   attention_training_forward    softmax(q k^T / sqrt(width)) v of qkv (b, L, 3 heads width), bfloat16
//   attention_training_backward   the gradient of qkv
#include <cmath>

#include "attention_kernel.h"
#include "operators.h"
#include "training_product.h"

namespace mambavision {
namespace {

const AttentionKernels& kernels() { return ISA_TABLE(attention_kernels); }

struct Sizes {
  int64_t batch, tokens, heads, width, padded, padded_width, even;
  float scale;

  Sizes(const Tensor& qkv, int64_t heads) : batch(qkv.size(0)), tokens(qkv.size(1)), heads(heads) {
    TORCH_CHECK_VALUE(qkv.dim() == 3 && qkv.scalar_type() == at::kBFloat16 && heads > 0 &&
                          qkv.size(2) % (6 * heads) == 0 && qkv.device().is_cpu(),
                      "attention in training takes bfloat16 (batch, tokens, 3 heads width) on the CPU with an even width, got ",
                      qkv.scalar_type(), " ", qkv.sizes(), " and ", heads, " heads");
    width = qkv.size(2) / (3 * heads);
    padded = align_up(tokens, 16), padded_width = align_up(width, 16), even = align_up(tokens, 2);
    scale = 1.0f / std::sqrt(static_cast<float>(width));
  }
  int64_t dim() const { return heads * width; }
};

// Rows of one head within `data`, where a token takes `stride` elements and the head's part begins at `first`.
Matrix head_rows(const Sizes& s, const Tensor& data, int64_t item, int64_t first) {
  const int64_t stride = data.size(2), row = item / s.heads * s.tokens;
  return {static_cast<const BFloat16*>(data.const_data_ptr()) + row * stride + first + item % s.heads * s.width, true,
          s.tokens, s.width, stride};
}
BFloat16* head_data(const Sizes& s, const Tensor& data, int64_t item, int64_t first) {
  return static_cast<BFloat16*>(const_cast<void*>(head_rows(s, data, item, first).data));
}
const BFloat16* elements(const Matrix& m) { return static_cast<const BFloat16*>(m.data); }
const BFloat16* elements(const uint32_t* pairs) { return reinterpret_cast<const BFloat16*>(pairs); }

struct Scratch {  // of one thread
  explicit Scratch(const Sizes& s)
      : floats(scratch({2 * s.tokens * s.padded + s.tokens * s.padded_width + 3 * s.padded}, at::kFloat)),
        halves(scratch({2 * s.tokens * s.padded}, at::kBFloat16)),
        words(scratch({4 * s.padded * s.padded_width + s.padded * s.padded}, at::kInt)),
        scores(floats.mutable_data_ptr<float>()),
        dweights(scores + s.tokens * s.padded),
        sums(dweights + s.tokens * s.padded),
        row(sums + s.tokens * s.padded_width),
        weights(halves.mutable_data_ptr<BFloat16>()),
        dscores(weights + s.tokens * s.padded),
        pairs(static_cast<uint32_t*>(words.data_ptr())) {}
  uint32_t* packed(const Sizes& s, int index) { return pairs + index * s.padded * s.padded_width; }

  Tensor floats, halves, words;
  float *scores, *dweights, *sums, *row;
  BFloat16 *weights, *dscores;
  uint32_t* pairs;
};

}  // namespace

Two attention_training_forward(const Tensor& qkv_in, int64_t heads) {
  const Tensor qkv = qkv_in.contiguous();
  const Sizes s(qkv, heads);
  const Tensor out = qkv.new_empty({s.batch, s.tokens, s.dim()});
  const Tensor log_sums = qkv.new_empty({s.batch * heads, s.padded}, at::kFloat);
  at::parallel_for(0, s.batch * heads, 1, [&](int64_t begin, int64_t end) {
    MatrixUnits units;
    Scratch own(s);
    for (int64_t item = begin; item < end; item++) {
      const Matrix q = head_rows(s, qkv, item, 0), k = head_rows(s, qkv, item, s.dim());
      const Matrix v = head_rows(s, qkv, item, 2 * s.dim());
      uint32_t *keys = own.packed(s, 0), *values = own.packed(s, 1);
      pack_kernels().pair_columns(k, keys, s.padded, s.padded);
      pack_kernels().pair_rows(v, values, s.padded_width, s.padded_width, nullptr);
      units.multiply(s.tokens, s.padded, s.width, elements(q), q.stride, elements(keys), s.padded, own.scores, s.padded);
      float* logs = log_sums.mutable_data_ptr<float>() + item * s.padded;
      kernels().softmax(own.scores, s.padded, s.tokens, s.tokens, s.padded, s.scale, own.weights, own.row, logs);
      for (int64_t i = s.tokens; i < s.padded; i++) logs[i] = 0.0f;
      units.multiply(s.tokens, s.padded_width, s.even, own.weights, s.padded, elements(values), s.padded_width, own.sums,
               s.padded_width);
      kernels().scale_rows(own.sums, s.padded_width, s.tokens, s.width, own.row, head_data(s, out, item, 0), s.dim());
    }
  });
  return {out, log_sums};
}

Tensor attention_training_backward(const Tensor& dout_in, const Tensor& qkv_in, const Tensor& out_in,
                                   const Tensor& log_sums, int64_t heads) {
  const Tensor qkv = qkv_in.contiguous(), out = out_in.contiguous(), dout = dout_in.to(at::kBFloat16).contiguous();
  const Sizes s(qkv, heads);
  TORCH_CHECK(dout.sizes() == out.sizes(), "attention_training_backward got a gradient of shape ", dout.sizes());
  const Tensor dqkv = new_like(qkv);
  at::parallel_for(0, s.batch * heads, 1, [&](int64_t begin, int64_t end) {
    MatrixUnits units;
    Scratch own(s);
    uint32_t *columns = own.packed(s, 0), *rows = own.packed(s, 1), *flipped = own.packed(s, 4);
    const auto into = [&](const BFloat16* A, int64_t stride, const Matrix& B, int64_t item, int64_t first) {
      pack_kernels().pair_rows(B, rows, s.padded_width, s.padded_width, nullptr);
      units.multiply(s.tokens, s.padded_width, s.even, A, stride, elements(rows), s.padded_width, own.sums, s.padded_width);
      kernels().scale_rows(own.sums, s.padded_width, s.tokens, s.width, nullptr, head_data(s, dqkv, item, first),
                           3 * s.dim());
    };
    for (int64_t item = begin; item < end; item++) {
      const Matrix q = head_rows(s, qkv, item, 0), k = head_rows(s, qkv, item, s.dim());
      const Matrix v = head_rows(s, qkv, item, 2 * s.dim()), dy = head_rows(s, dout, item, 0);
      pack_kernels().pair_columns(q, columns, s.padded, s.padded);
      units.multiply(s.tokens, s.padded, s.width, elements(k), k.stride, elements(columns), s.padded, own.scores, s.padded);
      pack_kernels().pair_columns(dy, columns, s.padded, s.padded);
      units.multiply(s.tokens, s.padded, s.width, elements(v), v.stride, elements(columns), s.padded, own.dweights, s.padded);
      kernels().dot_rows(dy.data, head_rows(s, out, item, 0).data, s.dim(), s.tokens, s.width, own.row);
      for (int64_t i = s.tokens; i < s.padded; i++) own.row[i] = 0.0f;
      kernels().softmax_backward(own.scores, own.dweights, s.padded, s.tokens, s.padded, s.scale,
                                 log_sums.const_data_ptr<float>() + item * s.padded, own.row, own.weights, own.dscores);
      into(own.weights, s.padded, dy, item, 2 * s.dim());
      into(own.dscores, s.padded, q, item, s.dim());
      pack_kernels().transpose({own.dscores, true, s.tokens, s.padded, s.padded}, flipped, s.padded / 2, s.even / 2, nullptr);
      into(elements(flipped), s.padded, k, item, 0);
    }
  });
  return dqkv;
}

}  // namespace mambavision

