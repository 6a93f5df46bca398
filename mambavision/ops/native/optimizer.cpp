// The optimizer's operators on the CPU: one call for a whole list of tensors, work cut into chunks of fixed size.
// Chunks depend on the tensors alone, never on the number of threads, so sums come out bit for bit the same.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "isa.h"
#include "operators.h"
#include "optimizer_kernel.h"

namespace mambavision {
namespace {

constexpr int64_t kChunk = 16384;  // elements; the five arrays of a LAMB chunk take 320 KiB, within a second-level cache
// Elements per thread between the two passes of LAMB, so that the second still finds what it needs in the cache.
constexpr int64_t kElementsPerThread = 4 * kChunk;

const OptimizerKernels& kernels() { return ISA_TABLE(optimizer_kernels); }

struct Piece {
  int64_t tensor, begin, size;
};

void append_pieces(std::vector<Piece>& pieces, int64_t tensor, int64_t numel) {
  for (int64_t begin = 0; begin < numel; begin += kChunk)
    pieces.push_back({tensor, begin, std::min(kChunk, numel - begin)});
}

void check_state(const Tensor& tensor, const Tensor& parameter, const char* name) {
  TORCH_CHECK(tensor.scalar_type() == at::kFloat && tensor.device().is_cpu() && tensor.sizes() == parameter.sizes() &&
                  tensor.strides() == parameter.strides() && tensor.is_non_overlapping_and_dense(),
              name, " must be float32 on the CPU, dense, and laid out as its parameter; got ", tensor.scalar_type(),
              " on ", tensor.device(), ", shape ", tensor.sizes(), ", strides ", tensor.strides(), " beside shape ",
              parameter.sizes(), ", strides ", parameter.strides());
}

// A gradient may come in another memory format than its weight; the kernels walk both in storage order.
Tensor laid_out_as(const Tensor& tensor, const Tensor& parameter) {
  if (tensor.scalar_type() == at::kFloat && tensor.strides() == parameter.strides()) return tensor;
  return new_like(parameter).copy_(tensor);
}

void mark_changed(TensorList tensors) {  // as autograd expects of an operation in place
  for (const Tensor& tensor : tensors) tensor.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

Tensor global_norm(TensorList tensors) {
  std::vector<Tensor> dense;
  std::vector<Piece> pieces;
  for (const Tensor& tensor : tensors) {
    TORCH_CHECK(tensor.device().is_cpu() && tensor.layout() == at::kStrided, "gradients must be dense CPU tensors");
    const bool fits = tensor.scalar_type() == at::kFloat && tensor.is_non_overlapping_and_dense();
    dense.push_back(fits ? tensor : tensor.to(at::kFloat).contiguous());
    append_pieces(pieces, static_cast<int64_t>(dense.size()) - 1, tensor.numel());
  }
  std::vector<double> sums(pieces.size());
  at::parallel_for(0, pieces.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; k++)
      sums[k] = kernels().sum_of_squares(dense[pieces[k].tensor].const_data_ptr<float>() + pieces[k].begin,
                                         pieces[k].size);
  });
  double total = 0;
  for (double sum : sums) total += sum;
  return tensors[0].new_full({}, std::sqrt(total), at::kFloat);
}

namespace {

struct LambList {
  TensorList parameters, first_moments, second_moments;
  std::vector<Tensor> gradients;
  LambScalars scalars;
  float lr;
};

// Both passes over tensors [first, last): the direction and its norm, then the step along it.
void lamb_tensors(const LambList& list, int64_t first, int64_t last, float* scratch) {
  std::vector<Piece> pieces;
  std::vector<int64_t> offsets;  // of each piece in scratch
  int64_t offset = 0;
  for (int64_t t = first; t < last; t++) append_pieces(pieces, t, list.parameters[t].numel());
  for (const Piece& piece : pieces) offsets.push_back(offset), offset += piece.size;

  std::vector<SquaredNorms> norms(pieces.size());
  at::parallel_for(0, pieces.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; k++) {
      const auto [t, at, size] = pieces[k];
      norms[k] = kernels().lamb_direction({list.parameters[t].const_data_ptr<float>() + at,
                                           list.gradients[t].const_data_ptr<float>() + at,
                                           list.first_moments[t].mutable_data_ptr<float>() + at,
                                           list.second_moments[t].mutable_data_ptr<float>() + at, scratch + offsets[k],
                                           size},
                                          list.scalars);
    }
  });

  std::vector<float> factors(last - first, list.lr);
  if (list.scalars.weight_decay != 0) {  // without decay there is no trust ratio
    std::vector<SquaredNorms> totals(last - first, SquaredNorms{0, 0});
    for (size_t k = 0; k < pieces.size(); k++) {
      totals[pieces[k].tensor - first].parameter += norms[k].parameter;
      totals[pieces[k].tensor - first].update += norms[k].update;
    }
    for (size_t t = 0; t < totals.size(); t++)
      if (totals[t].parameter > 0 && totals[t].update > 0)
        factors[t] = static_cast<float>(list.lr * std::sqrt(totals[t].parameter / totals[t].update));
  }

  at::parallel_for(0, pieces.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; k++) {
      const auto [t, at, size] = pieces[k];
      kernels().subtract(list.parameters[t].mutable_data_ptr<float>() + at, scratch + offsets[k], factors[t - first],
                         size);
    }
  });
}

}  // namespace

void lamb_step(TensorList parameters, TensorList gradients, TensorList first_moments, TensorList second_moments,
               double gradient_scale, double lr, double beta1, double beta2, double eps, double weight_decay,
               double correction1, double correction2) {
  TORCH_CHECK(gradients.size() == parameters.size() && first_moments.size() == parameters.size() &&
                  second_moments.size() == parameters.size(),
              "lamb_step wants as many gradients and moments as parameters");
  LambList list{parameters, first_moments, second_moments, {}, {}, static_cast<float>(lr)};
  auto& scalars = list.scalars;
  scalars.gradient_scale = static_cast<float>(gradient_scale);
  scalars.beta2 = static_cast<float>(beta2);
  scalars.eps = static_cast<float>(eps);
  scalars.weight_decay = static_cast<float>(weight_decay);
  scalars.one_minus_beta1 = static_cast<float>(1 - beta1);
  scalars.one_minus_beta2 = static_cast<float>(1 - beta2);
  scalars.inverse_correction1 = static_cast<float>(1 / correction1);
  scalars.inverse_root_correction2 = static_cast<float>(1 / std::sqrt(correction2));
  for (size_t t = 0; t < parameters.size(); t++) {
    check_state(parameters[t], parameters[t], "a parameter");
    check_state(first_moments[t], parameters[t], "exp_avg");
    check_state(second_moments[t], parameters[t], "exp_avg_sq");
    list.gradients.push_back(laid_out_as(gradients[t], parameters[t]));
  }

  // Consecutive tensors go together until every thread has enough to do.
  const int64_t enough = kElementsPerThread * at::get_num_threads(), count = parameters.size();
  std::vector<int64_t> bounds{0};
  int64_t elements = 0, most = 0;
  for (int64_t t = 0; t < count; t++) {
    elements += parameters[t].numel();
    if (elements < enough && t + 1 < count) continue;
    bounds.push_back(t + 1);
    most = std::max(most, elements), elements = 0;
  }
  const std::unique_ptr<float[]> scratch(new float[most]);
  for (size_t k = 0; k + 1 < bounds.size(); k++) lamb_tensors(list, bounds[k], bounds[k + 1], scratch.get());
  mark_changed(parameters);
}

void ema_update(TensorList averages, TensorList values, double weight) {
  TORCH_CHECK(averages.size() == values.size(), "ema_update wants as many values as averages");
  std::vector<Tensor> laid_out;
  std::vector<Piece> pieces;
  for (size_t t = 0; t < averages.size(); t++) {
    check_state(averages[t], averages[t], "an average");
    laid_out.push_back(laid_out_as(values[t], averages[t]));
    append_pieces(pieces, t, averages[t].numel());
  }
  at::parallel_for(0, pieces.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; k++) {
      const auto [t, at, size] = pieces[k];
      kernels().move_towards(averages[t].mutable_data_ptr<float>() + at, laid_out[t].const_data_ptr<float>() + at,
                             static_cast<float>(weight), size);
    }
  });
  mark_changed(averages);
}

}  // namespace mambavision
