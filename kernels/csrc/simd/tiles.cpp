// Which kernels this CPU runs: AMX before AVX-512 before AVX2 before plain C++. The x86 kernels are
// compiled into every build, each with its own target attribute, and chosen when they are first
// needed.
#include "simd/tiles.hpp"

#include <algorithm>
#include <cstring>
#include <initializer_list>

#if defined(__x86_64__)
#include "simd/amx.hpp"
#endif

namespace r2ec {

FloatOperand::FloatOperand(const float* queries, int64_t num_queries, int64_t columns, int parts)
    : num_queries(num_queries),
      columns(columns),
      stride((columns + kFloatColumns - 1) / kFloatColumns * kFloatColumns),
      values(num_queries * stride, 0.0f),
      parts(parts) {
  for (int64_t q = 0; q < num_queries; ++q)
    std::copy(queries + q * columns, queries + (q + 1) * columns, values.begin() + q * stride);
}

const TileKernels* find_kernels(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
  if (avx512 && !std::strcmp(name, kAmxKernels.name) && amx::is_available()) return &kAmxKernels;
  if (avx512 && !std::strcmp(name, kAvx512Kernels.name)) return &kAvx512Kernels;
  if (avx2 && !std::strcmp(name, kAvx2Kernels.name)) return &kAvx2Kernels;
#endif
  return std::strcmp(name, kPortableKernels.name) ? nullptr : &kPortableKernels;
}

const TileKernels& best_kernels() {
  static const TileKernels* const best = [] {
    for (const char* name : {"amx", "avx512", "avx2"})
      if (const TileKernels* found = find_kernels(name)) return found;
    return &kPortableKernels;
  }();
  return *best;
}

}  // namespace r2ec
