#include "canonical.hpp"

#include <cmath>
#include <cstring>

namespace r2ec {

int64_t order_key(float score, int64_t id) {
  constexpr int64_t kMaxItems = 4294967295;  // 2^32 - 1
  int32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  const int64_t ordered = bits < 0 ? bits ^ 0x7fffffff : bits;
  return ordered * (kMaxItems + 1) + (kMaxItems - id);
}

// Products are stored before they are added: no compiler may fuse the two roundings.
float Scorer::score(int64_t query, int64_t row) {
  const int64_t columns = scoring_.table.columns;
  const double* const q = scoring_.queries + query * columns;
  const float* const x = scoring_.table.rows + row * scoring_.table.stride;
  double value = 0.0;
  if (scoring_.similarity == Similarity::kL2) {
    for (int64_t c = 0; c < columns; ++c) {
      const double difference = q[c] - static_cast<double>(x[c]);
      terms_[c] = difference * difference;
    }
    value = -std::sqrt(fold());
  } else {
    for (int64_t c = 0; c < columns; ++c) terms_[c] = q[c] * static_cast<double>(x[c]);
    value = fold();
    if (scoring_.similarity == Similarity::kCosine) {
      for (int64_t c = 0; c < columns; ++c) terms_[c] = q[c] * q[c];
      const double query_norm = std::sqrt(fold());
      for (int64_t c = 0; c < columns; ++c)
        terms_[c] = static_cast<double>(x[c]) * static_cast<double>(x[c]);
      const double scale = query_norm * std::sqrt(fold());
      value = scale == 0.0 ? 0.0 : value / scale;
    }
  }
  return static_cast<float>(value / scoring_.temperature) + 0.0f;  // -0.0 becomes 0.0
}

double Scorer::fold() {
  auto width = static_cast<int64_t>(terms_.size());
  if (width == 0) return 0.0;
  while (width > 1) {
    const int64_t half = width / 2;
    double* const low = terms_.data();
    const double* const high = low + (width - half);
    for (int64_t c = 0; c < half; ++c) low[c] += high[c];
    width -= half;
  }
  return terms_[0];
}

}  // namespace r2ec
