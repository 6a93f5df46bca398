// The torch operators that operators.h lists: what Python and torch.compile see. X is what Python calls, X_forward and
// X_backward its two halves on the CPU. Those of fused inference are in token_inference.cpp and conv_inference.cpp.
//
// One file for all: what it includes takes several times longer to compile than what it says.
#include "operators.h"

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <string>

#include "matrix_units.h"
#include "isa.h"

namespace mm = mambavision;

TORCH_LIBRARY_FRAGMENT(mambavision, library) {
  library.def("native_isa() -> str", [] { return std::string(mm::isa_name(mm::selected_isa())); });
  library.def("matrix_units_available() -> bool", [] { return mm::matrix_units_available(); });

  library.def(
      "selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias) -> Tensor");
  library.def(
      "scan_forward(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, "
      "bool keep_states) -> (Tensor, Tensor)");
  library.def(
      "scan_backward(Tensor dy, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, "
      "Tensor checkpoints) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def("scan_exponentials(int per_thread) -> int", mm::scan_exponentials);

  library.def("token_conv(Tensor x, Tensor[] weights, bool causal, bool silu) -> Tensor[]");
  library.def("token_conv_forward(Tensor x, Tensor[] weights, bool causal, bool silu) -> Tensor[]");
  library.def(
      "token_conv_backward(Tensor[] dys, Tensor x, Tensor[] weights, bool causal, bool silu) -> (Tensor, Tensor[])");

  library.def("gelu(Tensor x, bool tanh_form) -> Tensor");
  library.def("gelu_forward(Tensor x, bool tanh_form) -> Tensor");
  library.def("gelu_backward(Tensor dy, Tensor x, bool tanh_form) -> Tensor");

  library.def(
      "batch_norm_training(Tensor x, Tensor weight, Tensor bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "float momentum, float eps, int activation, Tensor? residual, Tensor? row_scale) -> Tensor");
  library.def(
      "batch_norm_training_forward(Tensor x, Tensor weight, Tensor bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, float momentum, float eps, int activation, Tensor? residual, Tensor? row_scale) -> "
      "(Tensor, Tensor)");
  library.def(
      "batch_norm_training_backward(Tensor dy, Tensor x, Tensor constants, int activation, Tensor? row_scale) -> "
      "(Tensor, Tensor, Tensor)");
  library.def(
      "layer_norm_training(Tensor x, Tensor? branch, Tensor? row_scale, Tensor weight, Tensor bias, float eps) -> "
      "(Tensor, Tensor)");
  library.def(
      "layer_norm_training_forward(Tensor x, Tensor? branch, Tensor? row_scale, Tensor weight, Tensor bias, float eps) "
      "-> (Tensor, Tensor, Tensor)");
  library.def(
      "layer_norm_training_backward(Tensor? dsum, Tensor dy, Tensor sum, Tensor statistics, Tensor weight, "
      "Tensor? row_scale) -> (Tensor, Tensor, Tensor, Tensor)");

  library.def("global_norm(Tensor[] tensors) -> Tensor");
  library.def(
      "lamb_step(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, *, "
      "float gradient_scale, float lr, float beta1, float beta2, float eps, float weight_decay, float correction1, "
      "float correction2) -> ()");
  library.def("ema_update(Tensor(a!)[] averages, Tensor[] values, float weight) -> ()");
}

TORCH_LIBRARY_IMPL(mambavision, CompositeImplicitAutograd, library) {
  library.impl("selective_scan", mm::selective_scan);
  library.impl("token_conv", mm::token_conv);
  library.impl("gelu", mm::gelu);
  library.impl("batch_norm_training", mm::batch_norm_training);
  library.impl("layer_norm_training", mm::layer_norm_training);
}

TORCH_LIBRARY_IMPL(mambavision, CPU, library) {
  library.impl("scan_forward", mm::scan_forward);
  library.impl("scan_backward", mm::scan_backward);
  library.impl("token_conv_forward", mm::token_conv_forward);
  library.impl("token_conv_backward", mm::token_conv_backward);
  library.impl("gelu_forward", mm::gelu_forward);
  library.impl("gelu_backward", mm::gelu_backward);
  library.impl("batch_norm_training_forward", mm::batch_norm_training_forward);
  library.impl("batch_norm_training_backward", mm::batch_norm_training_backward);
  library.impl("layer_norm_training_forward", mm::layer_norm_training_forward);
  library.impl("layer_norm_training_backward", mm::layer_norm_training_backward);
  library.impl("global_norm", mm::global_norm);
  library.impl("lamb_step", mm::lamb_step);
  library.impl("ema_update", mm::ema_update);
}

TORCH_LIBRARY_IMPL(mambavision, Autograd, library) {  // first gradients pass; who differentiates them is told
  // Called where nothing asks for a gradient; a tangent of forward-mode differentiation would be dropped there.
  for (const char* name : {"scan_forward", "token_conv_forward", "gelu_forward"})
    library.impl(name, torch::autograd::autogradNotImplementedFallback());
  library.impl("scan_backward", mm::differentiable_scan_backward);
  library.impl("token_conv_backward", torch::autograd::autogradNotImplementedFallback());
  library.impl("gelu_backward", torch::autograd::autogradNotImplementedFallback());
  library.impl("batch_norm_training_backward", torch::autograd::autogradNotImplementedFallback());
  library.impl("layer_norm_training_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_FRAGMENT(mambavision, library) {
  library.def("linear_training(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  library.def("linear_training_forward(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  library.def(
      "linear_training_backward(Tensor dy, Tensor x, Tensor weight, bool has_bias, bool wants_dx) -> "
      "(Tensor, Tensor, Tensor)");
  library.def("mlp_training(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2) -> Tensor");
  library.def(
      "mlp_training_forward(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2) -> (Tensor, Tensor, Tensor)");
  library.def(
      "mlp_training_backward(Tensor dy, Tensor x, Tensor hidden, Tensor derivative, Tensor w1, Tensor w2) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def("attention_training(Tensor qkv, int heads) -> Tensor");
  library.def("attention_training_forward(Tensor qkv, int heads) -> (Tensor, Tensor)");
  library.def(
      "attention_training_backward(Tensor dout, Tensor qkv, Tensor out, Tensor log_sums, int heads) -> Tensor");
}

TORCH_LIBRARY_IMPL(mambavision, CompositeImplicitAutograd, library) {
  library.impl("linear_training", mm::linear_training);
  library.impl("mlp_training", mm::mlp_training);
  library.impl("attention_training", mm::attention_training);
}

TORCH_LIBRARY_IMPL(mambavision, CPU, library) {
  library.impl("linear_training_forward", mm::linear_training_forward);
  library.impl("linear_training_backward", mm::linear_training_backward);
  library.impl("mlp_training_forward", mm::mlp_training_forward);
  library.impl("mlp_training_backward", mm::mlp_training_backward);
  library.impl("attention_training_forward", mm::attention_training_forward);
  library.impl("attention_training_backward", mm::attention_training_backward);
}

TORCH_LIBRARY_IMPL(mambavision, Autograd, library) {
  library.impl("linear_training_backward", torch::autograd::autogradNotImplementedFallback());
  library.impl("mlp_training_backward", torch::autograd::autogradNotImplementedFallback());
  library.impl("attention_training_backward", torch::autograd::autogradNotImplementedFallback());
}

