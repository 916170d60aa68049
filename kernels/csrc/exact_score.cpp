#include "exact_score.hpp"

#include <cmath>
#include <cstring>

#include "simd/tiles.hpp"

namespace r2ec {

namespace {
constexpr int64_t kMaxItems = 4294967295;  // 2^32 - 1
}

int64_t order_key(float score, int64_t id) {
  if (std::isnan(score)) return kNoKey;
  int32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  const int64_t ordered = bits < 0 ? bits ^ 0x7fffffff : bits;
  return ordered * (kMaxItems + 1) + (kMaxItems - id);
}

void from_order_key(int64_t key, float& score, int64_t& id) {
  const auto ordered = static_cast<int32_t>(key >> 32);
  const int32_t bits = ordered < 0 ? ordered ^ 0x7fffffff : ordered;
  id = kMaxItems - (key & kMaxItems);
  std::memcpy(&score, &bits, sizeof score);
}

namespace {

// Sums the terms in the fixed order, overwriting them: halves are added until one is left; of an
// odd number, the one in the middle waits.
double pairwise_sum(std::vector<double>& terms) {
  auto width = static_cast<int64_t>(terms.size());
  if (width == 0) return 0.0;
  while (width > 1) {
    const int64_t half = width / 2;
    double* const low = terms.data();
    const double* const high = low + (width - half);
    for (int64_t c = 0; c < half; ++c) low[c] += high[c];
    width -= half;
  }
  return terms[0];
}

// Products are stored before they are added: no compiler may fuse the two roundings.
template <typename A, typename B>
double product(const A* a, const B* b, std::vector<double>& terms) {
  for (size_t c = 0; c < terms.size(); ++c)
    terms[c] = static_cast<double>(a[c]) * static_cast<double>(b[c]);
  return pairwise_sum(terms);
}

constexpr double kUnit = 1.0 / 9007199254740992.0;  // 2^-53

// The float32 number that every value of low..high becomes; false where they become several.
bool rounded(double low, double high, double temperature, float& score) {
  const float first = static_cast<float>(low / temperature);
  const float last = static_cast<float>(high / temperature);
  score = first + 0.0f;  // -0.0 becomes 0.0
  return first == last;
}

}  // namespace

Scoring::Scoring(FloatTable table, const double* queries, int64_t num_queries,
                 Similarity similarity, double temperature, const char* cpu)
    : table(table),
      queries(queries),
      similarity(similarity),
      temperature(temperature),
      sums(float64_summer(cpu ? cpu : best_kernels().name)) {
  std::vector<double> terms(table.columns);
  for (int64_t q = 0; q < num_queries; ++q) {
    const double* const query = queries + q * table.columns;
    query_norms.push_back(std::sqrt(product(query, query, terms)));
  }
}

float Scorer::score(int64_t query, int64_t row) {
  const int64_t columns = scoring_.table.columns;
  const double* const q = scoring_.queries + query * columns;
  const float* const x = scoring_.table.rows + row * scoring_.table.stride;
  // above what two orders of summing the same terms differ by, relative to the sum of their sizes
  const double unit = 2.5 * static_cast<double>(columns + 4) * kUnit;
  const double temperature = scoring_.temperature, norm = scoring_.query_norms[query];
  float score;
  bool sure = false;
  if (scoring_.similarity == Similarity::kL2) {
    const double distance = scoring_.sums.distance(q, x, columns), error = unit * distance;
    sure = rounded(-std::sqrt(distance + error), -std::sqrt(distance - error), temperature, score);
  } else {
    const Float64Sums sums = scoring_.sums.products(q, x, columns);
    const double scale = norm * std::sqrt(sums.square);
    if (scoring_.similarity == Similarity::kDot) {
      const double error = unit * scale;
      sure = rounded(sums.dot - error, sums.dot + error, temperature, score);
    } else if (scale > 0.0) {
      const double cosine = sums.dot / scale, error = 2.0 * unit;
      sure = rounded(cosine - error, cosine + error, temperature, score);
    }
  }
  return sure ? score : defining_score(q, x, norm);
}

float Scorer::defining_score(const double* q, const float* x, double norm) {
  double value = 0.0;
  if (scoring_.similarity == Similarity::kL2) {
    for (size_t c = 0; c < terms_.size(); ++c) {
      const double difference = q[c] - static_cast<double>(x[c]);
      terms_[c] = difference * difference;
    }
    value = -std::sqrt(pairwise_sum(terms_));
  } else {
    value = product(q, x, terms_);
    if (scoring_.similarity == Similarity::kCosine) {
      const double scale = norm * std::sqrt(product(x, x, terms_));
      value = scale == 0.0 ? 0.0 : value / scale;
    }
  }
  return static_cast<float>(value / scoring_.temperature) + 0.0f;  // -0.0 becomes 0.0
}

}  // namespace r2ec
