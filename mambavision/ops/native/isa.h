// Which instruction set the kernels use: chosen once at run time, so that a library built on one node runs on any other.
#pragma once

namespace mambavision {

enum class Isa { baseline, avx2, avx512, avx512bf16 };

// The best set this processor has, or what MAMBAVISION_ISA=baseline|avx2|avx512|avx512bf16 asks for (an error if it is not
// there). All x86-64 compilers that can build torch extensions know these flags.
Isa selected_isa();

const char* isa_name(Isa isa);

}  // namespace mambavision

// Files listed with per_isa=True in native_build.py are compiled once per instruction set with NATIVE_ISA naming it;
// ISA_SYMBOL(scan_kernels) is then scan_kernels_avx2 and so on. Such a file must define no other external symbol: an
// inline function of a shared header, compiled for AVX-512 here, could replace the portable copy used elsewhere.
#define ISA_PASTE_(name, isa) name##_##isa
#define ISA_PASTE(name, isa) ISA_PASTE_(name, isa)
#define ISA_SYMBOL(name) ISA_PASTE(name, NATIVE_ISA)

// In a kernel's header: its tables, one for each instruction set. ISA_TABLE(name) is the one to use.
#if defined(__x86_64__)
#define ISA_DECLARE(type, name) extern const type name##_baseline, name##_avx2, name##_avx512, name##_avx512bf16
#define ISA_TABLE(name)                                                                  \
  (::mambavision::selected_isa() == ::mambavision::Isa::avx512bf16 ? name##_avx512bf16   \
   : ::mambavision::selected_isa() == ::mambavision::Isa::avx512   ? name##_avx512       \
   : ::mambavision::selected_isa() == ::mambavision::Isa::avx2     ? name##_avx2         \
                                                                   : name##_baseline)
#else
#define ISA_DECLARE(type, name) extern const type name##_baseline
#define ISA_TABLE(name) (name##_baseline)
#endif
