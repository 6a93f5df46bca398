// Reads the processor's features and MAMBAVISION_ISA.
#include "isa.h"

#include <c10/util/Exception.h>

#include <cstdlib>
#include <string>

namespace mambavision {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512bf16: return "avx512bf16";
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "baseline";
  }
}

namespace {

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::avx512bf16;
  if (avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa choose_isa() {
  const Isa best = best_isa();
  const char* wanted = std::getenv("MAMBAVISION_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512bf16}) {
    if (std::string(wanted) != isa_name(isa)) continue;
    TORCH_CHECK_VALUE(isa <= best, "MAMBAVISION_ISA=", wanted, ": this processor only has ", isa_name(best),
                      "; unset the variable or set it to that");
    return isa;
  }
  TORCH_CHECK_VALUE(false, "MAMBAVISION_ISA=", wanted, " is unknown; use baseline, avx2, avx512 or avx512bf16, or unset it");
}

}  // namespace

Isa selected_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

}  // namespace mambavision
