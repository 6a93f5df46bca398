// Reads the processor's features and MAMBAVISION_ISA; tells Python which instruction set won.
#include "isa.h"

#include <torch/library.h>

#include <cstdlib>
#include <string>

namespace mambavision {
namespace {

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::baseline;
}

const char* isa_name(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline";
}

Isa choose_isa() {
  const Isa best = best_isa();
  const char* wanted = std::getenv("MAMBAVISION_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (std::string(wanted) != isa_name(isa)) continue;
    TORCH_CHECK_VALUE(isa <= best, "MAMBAVISION_ISA=", wanted, ": this processor only has ", isa_name(best),
                      "; unset the variable or set it to that");
    return isa;
  }
  TORCH_CHECK_VALUE(false, "MAMBAVISION_ISA=", wanted, " is unknown; use baseline, avx2 or avx512, or unset it");
}

}  // namespace

Isa selected_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

}  // namespace mambavision

TORCH_LIBRARY_FRAGMENT(mambavision, library) {
  library.def("native_isa() -> str", [] { return std::string(mambavision::isa_name(mambavision::selected_isa())); });
}
