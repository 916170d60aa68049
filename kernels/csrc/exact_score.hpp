// The exact re-score of candidates: canonical scores and order keys, bit for bit those of
// r2ec_kernels/canonical.py, which defines them.
//
// In: float32 rows, float64 queries, (query, row) pairs. Out: a float32 score of each.
//
// Numerics: every product is rounded to float64, and the D of them are added in one fixed order
// that vectorizes anywhere: the second half to the first, over and over, so that the result is the
// same on every machine. Compiled without contraction: a fused multiply-add would skip a rounding.
// Then division by norms (cosine), the negative root (l2), the temperature, and one rounding to
// float32.
//
// Work: 2 * D operations and 4 * D bytes of a row for each pair; twice the operations for
// cosine, whose row norm is made anew.
#pragma once

#include <cstdint>
#include <vector>

#include "tables.hpp"

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

constexpr int64_t kNoKey = INT64_MIN;  // of no item: below every item's key
// The integer by which results are ordered, descending: score first, then the lower id. kNoKey for
// NaN, which cannot be compared.
int64_t order_key(float score, int64_t id);

}  // namespace r2ec
