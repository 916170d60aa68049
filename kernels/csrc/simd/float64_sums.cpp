// One loop over 16 lanes, compiled for each kind of CPU: the lanes have fixed trip counts, which
// compilers turn into vectors of any width.
#include "simd/float64_sums.hpp"

#include <cstring>

namespace r2ec {

namespace {

constexpr int64_t kLanes = 16;

inline __attribute__((always_inline)) Float64Sums sums(const double* query, const float* row,
                                                       int64_t columns) {
  double dot[kLanes] = {}, square[kLanes] = {}, distance[kLanes] = {};
  int64_t c = 0;
  for (; c + kLanes <= columns; c += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const double q = query[c + lane], x = static_cast<double>(row[c + lane]), gap = q - x;
      dot[lane] += q * x;
      square[lane] += x * x;
      distance[lane] += gap * gap;
    }
  for (int64_t lane = 0; c < columns; ++c, ++lane) {
    const double q = query[c], x = static_cast<double>(row[c]), gap = q - x;
    dot[lane] += q * x;
    square[lane] += x * x;
    distance[lane] += gap * gap;
  }
  Float64Sums total = {};
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    total.dot += dot[lane];
    total.square += square[lane];
    total.distance += distance[lane];
  }
  return total;
}

Float64Sums portable(const double* query, const float* row, int64_t columns) {
  return sums(query, row, columns);
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) Float64Sums avx2(const double* query, const float* row,
                                                     int64_t columns) {
  return sums(query, row, columns);
}

__attribute__((target("avx512f,avx2,fma"))) Float64Sums avx512(const double* query,
                                                               const float* row, int64_t columns) {
  return sums(query, row, columns);
}
#endif

}  // namespace

Float64Summer float64_summer(const char* cpu) {
#if defined(__x86_64__)
  if (!std::strcmp(cpu, "avx512") || !std::strcmp(cpu, "amx")) return avx512;
  if (!std::strcmp(cpu, "avx2")) return avx2;
#endif
  return portable;
}

}  // namespace r2ec
