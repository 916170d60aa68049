// One loop over 16 lanes, compiled for each kind of CPU: the lanes have fixed trip counts, which
// compilers turn into vectors of any width.
#include "simd/float64_sums.hpp"

#include <cstring>

namespace r2ec {

namespace {

constexpr int64_t kLanes = 16;

// The lanes' sum: halves are added, so that compilers add vectors to the last.
inline __attribute__((always_inline)) double total(double* lanes) {
  for (int64_t width = kLanes / 2; width; width /= 2)
    for (int64_t lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  return lanes[0];
}

inline __attribute__((always_inline)) Float64Sums products_of(const double* query, const float* row,
                                                              int64_t columns) {
  double dot[kLanes] = {}, square[kLanes] = {};
  int64_t c = 0;
  for (; c + kLanes <= columns; c += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const double x = static_cast<double>(row[c + lane]);
      dot[lane] += query[c + lane] * x;
      square[lane] += x * x;
    }
  for (int64_t lane = 0; c < columns; ++c, ++lane) {
    const double x = static_cast<double>(row[c]);
    dot[lane] += query[c] * x;
    square[lane] += x * x;
  }
  return {total(dot), total(square)};
}

inline __attribute__((always_inline)) double distance_of(const double* query, const float* row,
                                                         int64_t columns) {
  double distance[kLanes] = {};
  int64_t c = 0;
  for (; c + kLanes <= columns; c += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const double gap = query[c + lane] - static_cast<double>(row[c + lane]);
      distance[lane] += gap * gap;
    }
  for (int64_t lane = 0; c < columns; ++c, ++lane) {
    const double gap = query[c] - static_cast<double>(row[c]);
    distance[lane] += gap * gap;
  }
  return total(distance);
}

#define R2EC_FLOAT64_SUMMER(name, attributes)                                                \
  attributes Float64Sums name##_products(const double* query, const float* row, int64_t n) { \
    return products_of(query, row, n);                                                       \
  }                                                                                          \
  attributes double name##_distance(const double* query, const float* row, int64_t n) {      \
    return distance_of(query, row, n);                                                       \
  }                                                                                          \
  constexpr Float64Summer name = {name##_products, name##_distance};

R2EC_FLOAT64_SUMMER(portable, )
#if defined(__x86_64__)
R2EC_FLOAT64_SUMMER(avx2, __attribute__((target("avx2,fma"))))
R2EC_FLOAT64_SUMMER(avx512, __attribute__((target("avx512f,avx2,fma,prefer-vector-width=512"))))
#endif
#undef R2EC_FLOAT64_SUMMER

}  // namespace

Float64Summer float64_summer(const char* cpu) {
#if defined(__x86_64__)
  if (!std::strcmp(cpu, "avx512") || !std::strcmp(cpu, "amx")) return avx512;
  if (!std::strcmp(cpu, "avx2")) return avx2;
#endif
  return portable;
}

}  // namespace r2ec
