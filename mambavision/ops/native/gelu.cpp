// The operators of GELU: any dense layout, float32 or bfloat16, arithmetic in float32.
//
//   gelu_forward    y, in x's layout
//   gelu_backward   the gradient of x; itself not differentiable
#include <ATen/Parallel.h>

#include "gelu_kernel.h"
#include "isa.h"
#include "operators.h"

namespace mambavision {
namespace {

constexpr int64_t kGrain = 16384;  // elements worth a thread of their own

const GeluKernels& kernels() { return ISA_TABLE(gelu_kernels); }

Tensor dense(const Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kBFloat16,
                    "the CPU GELU takes float32 or bfloat16, got ", tensor.scalar_type());
  return tensor.is_non_overlapping_and_dense() ? tensor : tensor.contiguous();
}

Gelu describe(const Tensor& x, const Tensor& out, bool tanh_form) {
  return {tanh_form, x.scalar_type() == at::kBFloat16, x.const_data_ptr(), nullptr, out.mutable_data_ptr()};
}

}  // namespace

Tensor gelu_forward(const Tensor& x_in, bool tanh_form) {
  const Tensor x = dense(x_in), y = new_like(x);
  const Gelu gelu = describe(x, y, tanh_form);
  at::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) { kernels().forward(gelu, begin, end); });
  return y;
}

Tensor gelu_backward(const Tensor& dy_in, const Tensor& x_in, bool tanh_form) {
  const Tensor x = dense(x_in), dx = new_like(x);
  TORCH_CHECK(dy_in.sizes() == x.sizes(), "gelu_backward got a gradient of shape ", dy_in.sizes());
  Tensor dy = dy_in;
  if (dy.scalar_type() != x.scalar_type() || dy.strides() != x.strides()) dy = new_like(x).copy_(dy);
  Gelu gelu = describe(x, dx, tanh_form);
  gelu.dy = dy.const_data_ptr();
  at::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) { kernels().backward(gelu, begin, end); });
  return dx;
}

}  // namespace mambavision
