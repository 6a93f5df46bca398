// Functions marked CLONES are compiled twice on x86 with glibc, for AVX2 and for any processor, and the loader of shared
// libraries picks one. Elsewhere they are compiled once for what the compiler takes as the baseline (NEON on aarch64).
#pragma once
#include <cstdint>
// Nor with AddressSanitizer, which is not ready yet when that choice is made.
#if defined(__x86_64__) && defined(__GLIBC__) && (!defined(__clang__) || __clang_major__ >= 14) && !defined(__SANITIZE_ADDRESS__)
#define CLONES __attribute__((target_clones("avx2", "default")))
#else
#define CLONES
#endif
#define INLINE inline __attribute__((always_inline))
