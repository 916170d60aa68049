// AMX: whether it may be used, and which kernels it has. amx_codes.cpp multiplies codes,
// amx_floats.cpp multiplies float32 rows.
#if defined(__x86_64__)
#include "simd/amx.hpp"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "simd/avx512.hpp"

namespace r2ec {

bool amx::is_available() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tile = d & (1u << 24), bf16 = d & (1u << 22), int8 = d & (1u << 25);
  if (!tile || !bf16 || !int8 || !__get_cpuid_count(7, 1, &a, &b, &c, &d)) return false;
  const bool convert = a & (1u << 5);                // AVX512_BF16
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  static const bool granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return convert && granted;
}

extern const TileKernels kAmxKernels = {
    "amx",
    amx::prepare_codes,
    amx::multiply_codes,
    amx::prepare_floats,
    amx::multiply_floats,
    avx512::rows_above,
    avx512::queries_above_bf16,
    avx512::queries_above_f32,
    avx512::column_maxima_bf16,
    avx512::column_maxima_f32,
    avx512::update_softmax,
};

}  // namespace r2ec
#endif
