// What the GELU kernels and the torch operators that call them agree on.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace mambavision {

// Arrays of `count` float32 or bfloat16 elements; tanh_form picks the approximation that PyTorch calls "tanh".
struct Gelu {
  bool tanh_form, bfloat16;
  const void* x;
  const void* dy;  // backward
  void* out;       // y, or dx in the backward
};

struct GeluKernels {
  void (*forward)(const Gelu& gelu, int64_t begin, int64_t end);
  void (*backward)(const Gelu& gelu, int64_t begin, int64_t end);
};

ISA_DECLARE(GeluKernels, gelu_kernels);

}  // namespace mambavision
