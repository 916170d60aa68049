// Canonical scores and order keys, bit for bit those of r2ec_kernels/canonical.py, which defines
// them.
#pragma once

#include <cstdint>
#include <vector>

#include "coarse_scan.hpp"

namespace r2ec {

// Float32 rows and float64 queries [queries, columns] of a search.
struct Scoring {
  FloatTable table;
  const double* queries;
  Similarity similarity;
  double temperature;
  std::vector<double> query_norms;  // cosine

  Scoring(FloatTable table, const double* queries, int64_t num_queries, Similarity similarity,
          double temperature);
};

// Scores of one query and row after another; keeps memory for the terms of a sum.
class Scorer {
 public:
  explicit Scorer(const Scoring& scoring) : scoring_(scoring), terms_(scoring.table.columns) {}
  float score(int64_t query, int64_t row);

 private:
  const Scoring& scoring_;
  std::vector<double> terms_;
};

// The integer by which results are ordered, descending: score first, then the lower id.
int64_t order_key(float score, int64_t id);
constexpr int64_t kNoKey = INT64_MIN;  // of no item: below every item's key

}  // namespace r2ec
