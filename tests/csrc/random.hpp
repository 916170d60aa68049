// What the tests of item scans share: the kinds of CPU this one can be, random arrays, and products
// in float64.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "simd/tiles.hpp"

namespace r2ec {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline std::vector<const TileKernels*> kinds() {
  std::vector<const TileKernels*> found;
  for (const char* name : {"portable", "avx2", "avx512", "amx"})
    if (const TileKernels* kernels = find_kernels(name)) found.push_back(kernels);
  return found;
}

struct Random {
  std::mt19937 engine{7};
  std::vector<float> floats(int64_t n) {
    std::normal_distribution<float> normal;
    std::vector<float> out(n);
    for (auto& x : out) x = normal(engine);
    return out;
  }
  template <typename T>
  std::vector<T> integers(int64_t n, int low, int high) {
    std::uniform_int_distribution<int> uniform(low, high);
    std::vector<T> out(n);
    for (auto& x : out) x = static_cast<T>(uniform(engine));
    return out;
  }
};

inline double dot(const float* a, const float* b, int64_t n) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return sum;
}

inline double norm(const float* a, int64_t n) { return std::sqrt(dot(a, a, n)); }

}  // namespace r2ec
