// The operators of linear layers and MLPs in a training step: bfloat16 activations, float32 or bfloat16 weights, sums in
// float32, gradients of weights in the weights' own type. The weights are rounded while they are packed, the bias, GELU and
// its derivative are applied to sums still in the cache, and a bias's gradient is summed while its rows are packed.
#include <algorithm>
#include <vector>

#include "operators.h"
#include "training_product.h"

namespace mambavision {
namespace {

Tensor rows_of(const Tensor& x) {  // (..., inner) -> (rows, inner), a view wherever the layout allows
  TORCH_CHECK_VALUE(x.scalar_type() == at::kBFloat16 && x.device().is_cpu(),
                    "linear layers in training take bfloat16 on the CPU, got ", x.scalar_type(), " on ", x.device());
  const Tensor rows = x.reshape({-1, x.size(-1)});
  return rows.stride(1) == 1 ? rows : rows.contiguous();
}

Tensor weight_of(const Tensor& weight, int64_t inner) {
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(1) == inner && inner % 2 == 0 && weight.size(0) % 2 == 0,
                    "a weight of (even, ", inner, ") is wanted for rows of an even width, got ", weight.sizes());
  TORCH_CHECK_VALUE(weight.scalar_type() == at::kFloat || weight.scalar_type() == at::kBFloat16,
                    "a weight in training is float32 or bfloat16, got ", weight.scalar_type());
  return weight.contiguous();
}

Tensor float_bias(const OptionalTensor& bias, int64_t columns) {
  if (!bias.has_value()) return Tensor();
  TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == columns, "a bias of ", columns, " is wanted, got ", bias->sizes());
  return bias->to(at::kFloat).contiguous();
}

Tensor empty_rows(const Tensor& like, int64_t columns) {  // (..., columns), bfloat16
  std::vector<int64_t> sizes = like.sizes().vec();
  sizes.back() = columns;
  return like.new_empty(sizes, at::kBFloat16);
}

ProductFinish into(const Tensor& out, const Tensor& bias = {}) {
  ProductFinish finish;
  finish.out = out.mutable_data_ptr(), finish.stride = out.size(-1);
  finish.bias = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
  return finish;
}

void apply(const Tensor& x, const TrainingWeight& weight, const ProductFinish& finish) {
  const Matrix rows = matrix_of(x);
  over_row_groups(rows.rows, weight.packed.inner, [&](MatrixUnits& units, int64_t first, int64_t last) {
    product(units, rows, first, last, weight, finish);
  });
}

// Two products in a row: what lies between them is read while it is in the cache.
void apply_both(const Tensor& x, const TrainingWeight& first_weight, const ProductFinish& first_finish,
                const Tensor& between, const TrainingWeight& second_weight, const ProductFinish& second_finish) {
  const Matrix rows = matrix_of(x), hidden = matrix_of(between);
  over_row_groups(rows.rows, hidden.columns, [&](MatrixUnits& units, int64_t first, int64_t last) {
    product(units, rows, first, last, first_weight, first_finish);
    product(units, hidden, first, last, second_weight, second_finish);
  });
}

Two gradients_of(const Tensor& dy, const Tensor& x, at::ScalarType type, bool has_bias) {
  const Tensor weight = x.new_empty({dy.size(1), x.size(1)}, at::kFloat);
  const Tensor bias = has_bias ? weight.new_empty({dy.size(1)}) : Tensor();
  weight_gradient(matrix_of(dy), matrix_of(x), weight.mutable_data_ptr<float>(),
                  has_bias ? bias.mutable_data_ptr<float>() : nullptr);
  return {weight.to(type), has_bias ? bias : weight.new_empty({0})};
}

}  // namespace

Tensor linear_training_forward(const Tensor& x_in, const Tensor& weight_in, const OptionalTensor& bias) {
  const Tensor x = rows_of(x_in), weight = weight_of(weight_in, x.size(1)), y = empty_rows(x_in, weight.size(0));
  if (y.numel() > 0) {
    const Tensor shift = float_bias(bias, weight.size(0));
    apply(x, TrainingWeight(weight, /*transposed=*/true), into(y, shift));
  }
  return y;
}

Three linear_training_backward(const Tensor& dy_in, const Tensor& x_in, const Tensor& weight_in, bool has_bias,
                               bool wants_dx) {
  const Tensor dy = rows_of(dy_in.to(at::kBFloat16)), x = rows_of(x_in), weight = weight_of(weight_in, x.size(1));
  const Tensor dx = wants_dx ? empty_rows(x_in, x.size(1)) : x.new_empty({0});
  if (wants_dx && dx.numel() > 0) apply(dy, TrainingWeight(weight, /*transposed=*/false), into(dx));
  auto [dweight, dbias] = gradients_of(dy, x, weight.scalar_type(), has_bias);
  return {dx, dweight, dbias};
}

Three mlp_training_forward(const Tensor& x_in, const Tensor& w1_in, const Tensor& b1, const Tensor& w2_in,
                           const Tensor& b2) {
  const Tensor x = rows_of(x_in), w1 = weight_of(w1_in, x.size(1)), w2 = weight_of(w2_in, w1.size(0));
  const Tensor hidden = x.new_empty({x.size(0), w1.size(0)}), derivative = new_like(hidden);
  const Tensor y = empty_rows(x_in, w2.size(0));
  if (y.numel() > 0) {
    const Tensor shift1 = float_bias(b1, w1.size(0)), shift2 = float_bias(b2, w2.size(0));
    ProductFinish gelu = into(hidden, shift1);
    gelu.gelu = true, gelu.derivative = derivative.mutable_data_ptr();
    apply_both(x, TrainingWeight(w1, /*transposed=*/true), gelu, hidden, TrainingWeight(w2, /*transposed=*/true),
               into(y, shift2));
  }
  return {y, hidden, derivative};
}

Five mlp_training_backward(const Tensor& dy_in, const Tensor& x_in, const Tensor& hidden, const Tensor& derivative,
                           const Tensor& w1_in, const Tensor& w2_in) {
  const Tensor dy = rows_of(dy_in.to(at::kBFloat16)), x = rows_of(x_in);
  const Tensor w1 = weight_of(w1_in, x.size(1)), w2 = weight_of(w2_in, hidden.size(1));
  const Tensor dhidden = new_like(hidden), dx = empty_rows(x_in, x.size(1));
  if (dx.numel() > 0) {
    ProductFinish times_derivative = into(dhidden);
    times_derivative.factor = derivative.const_data_ptr();
    apply_both(dy, TrainingWeight(w2, /*transposed=*/false), times_derivative, dhidden,
               TrainingWeight(w1, /*transposed=*/false), into(dx));
  }
  auto [dw2, db2] = gradients_of(dy, hidden, w2.scalar_type(), true);
  auto [dw1, db1] = gradients_of(dhidden, x, w1.scalar_type(), true);
  return {dx, dw1, db1, dw2, db2};
}

}  // namespace mambavision

