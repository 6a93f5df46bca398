// GELU as torch operators: any dense layout, float32 or bfloat16, arithmetic in float32, autograd.
//
//   gelu            what Python calls; differentiable
//   gelu_forward    y, in x's layout
//   gelu_backward   the gradient of x; itself not differentiable
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "gelu_kernel.h"
#include "isa.h"

namespace mambavision {
namespace {

using at::Tensor;

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

Tensor gelu_forward(const Tensor& x_in, bool tanh_form) {
  const Tensor x = dense(x_in), y = at::empty_like(x);
  const Gelu gelu = describe(x, y, tanh_form);
  at::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) { kernels().forward(gelu, begin, end); });
  return y;
}

Tensor gelu_backward(const Tensor& dy_in, const Tensor& x_in, bool tanh_form) {
  const Tensor x = dense(x_in), dx = at::empty_like(x);
  TORCH_CHECK(dy_in.sizes() == x.sizes(), "gelu_backward got a gradient of shape ", dy_in.sizes());
  Tensor dy = dy_in;
  if (dy.scalar_type() != x.scalar_type() || dy.strides() != x.strides()) dy = at::empty_like(x).copy_(dy);
  Gelu gelu = describe(x, dx, tanh_form);
  gelu.dy = dy.const_data_ptr();
  at::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) { kernels().backward(gelu, begin, end); });
  return dx;
}

const auto& forward_operator() {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("mambavision::gelu_forward", "")
                       .typed<decltype(gelu_forward)>();
  return op;
}

const auto& backward_operator() {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("mambavision::gelu_backward", "")
                       .typed<decltype(gelu_backward)>();
  return op;
}

struct GeluFunction : torch::autograd::Function<GeluFunction> {
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& x, bool tanh_form) {
    at::AutoDispatchBelowADInplaceOrView below;
    context->save_for_backward({x});
    context->saved_data["tanh_form"] = tanh_form;
    return forward_operator().call(x, tanh_form);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& dy) {
    const Tensor x = context->get_saved_variables()[0];
    return {backward_operator().call(dy[0], x, context->saved_data["tanh_form"].toBool()), Tensor()};
  }
};

Tensor gelu(const Tensor& x, bool tanh_form) {
  return at::GradMode::is_enabled() && x.requires_grad() ? GeluFunction::apply(x, tanh_form)
                                                         : forward_operator().call(x, tanh_form);
}

}  // namespace
}  // namespace mambavision

TORCH_LIBRARY_FRAGMENT(mambavision, library) {
  library.def("gelu(Tensor x, bool tanh_form) -> Tensor");
  library.def("gelu_forward(Tensor x, bool tanh_form) -> Tensor");
  library.def("gelu_backward(Tensor dy, Tensor x, bool tanh_form) -> Tensor");
}

TORCH_LIBRARY_IMPL(mambavision, CompositeImplicitAutograd, library) { library.impl("gelu", mambavision::gelu); }

TORCH_LIBRARY_IMPL(mambavision, CPU, library) {
  library.impl("gelu_forward", mambavision::gelu_forward);
  library.impl("gelu_backward", mambavision::gelu_backward);
}

TORCH_LIBRARY_IMPL(mambavision, Autograd, library) {  // first gradients pass; who differentiates them is told
  library.impl("gelu_backward", torch::autograd::autogradNotImplementedFallback());
}
