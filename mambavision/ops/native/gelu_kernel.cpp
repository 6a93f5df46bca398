// GELU, forward and backward, for one instruction set.
#include "gelu_kernel.h"

#include "gelu_forms.h"
#include "isa.h"
#include "simd.h"

namespace {

using mambavision::Gelu;

template <class T, GeluValue kForm(Vec), bool kBackward>
INLINE void one_vector(const Gelu& gelu, int64_t at, int count) {
  const Vec x = load((const T*)gelu.x + at, count);
  const GeluValue value = kForm(x);
  const Vec out = kBackward ? load((const T*)gelu.dy + at, count) * value.derivative : x * value.gate;
  store((T*)gelu.out + at, out, count);
}

template <class T, GeluValue kForm(Vec), bool kBackward>
void run(const Gelu& gelu, int64_t begin, int64_t end) {
  int64_t at = begin;
  for (; at + 2 * kLanes <= end; at += 2 * kLanes) {  // two chains of operations at a time
    one_vector<T, kForm, kBackward>(gelu, at, kLanes);
    one_vector<T, kForm, kBackward>(gelu, at + kLanes, kLanes);
  }
  for (; at < end; at += kLanes) one_vector<T, kForm, kBackward>(gelu, at, (int)(end - at < kLanes ? end - at : kLanes));
}

template <bool kBackward>
void dispatch(const Gelu& gelu, int64_t begin, int64_t end) {
  if (gelu.bfloat16)
    gelu.tanh_form ? run<bfloat16, gelu_tanh, kBackward>(gelu, begin, end)
                   : run<bfloat16, gelu_exact, kBackward>(gelu, begin, end);
  else
    gelu.tanh_form ? run<float, gelu_tanh, kBackward>(gelu, begin, end) : run<float, gelu_exact, kBackward>(gelu, begin, end);
}

}  // namespace

namespace mambavision {

extern const GeluKernels ISA_SYMBOL(gelu_kernels);
const GeluKernels ISA_SYMBOL(gelu_kernels) = {dispatch<false>, dispatch<true>};

}  // namespace mambavision
