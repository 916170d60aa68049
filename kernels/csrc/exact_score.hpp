// The exact re-score of candidates: canonical scores and order keys, bit for bit those of
// r2ec_kernels/canonical.py, which defines them.
//
// In: float32 rows, float64 queries, (query, row) pairs. Out: a float32 score of each.
//
// Numerics: a score is defined as a sum of D products, each rounded to float64, that are added in
// one fixed order (the second half to the first, over and over), divided by norms (cosine), as the
// negative root (l2), divided by the temperature, and rounded once to float32. It is computed by
// sums in a faster order, with the bound of what another order may change: where both ends of the
// bound round to the same float32 number, that is the score, and only else the fixed order decides.
// Compiled without contraction: a fused multiply-add would skip a rounding of the fixed order.
//
// Work: 4 * D operations (l2: 3 * D) and 4 * D bytes of a row for each pair.
#pragma once

#include <cstdint>
#include <vector>

#include "simd/float64_sums.hpp"
#include "tables.hpp"

namespace r2ec {

// Float32 rows and float64 queries [queries, columns] of a search.
struct Scoring {
  FloatTable table;
  const double* queries;
  Similarity similarity;
  double temperature;
  Float64Summer sums;
  std::vector<double> query_norms;

  // cpu: whose sums serve (tiles.hpp); null: this one's best.
  Scoring(FloatTable table, const double* queries, int64_t num_queries, Similarity similarity,
          double temperature, const char* cpu = nullptr);
};

// Scores of one query and row after another; keeps memory for the terms of a sum.
class Scorer {
 public:
  explicit Scorer(const Scoring& scoring) : scoring_(scoring), terms_(scoring.table.columns) {}
  float score(int64_t query, int64_t row);
  // Asks for a row that will be scored next: rows lie anywhere in a table.
  void ask_for(int64_t row) const {
    constexpr int64_t kLine = 16;  // floats of a cache line
    const float* const x = scoring_.table.rows + row * scoring_.table.stride;
    for (int64_t c = 0; c < scoring_.table.columns; c += kLine) __builtin_prefetch(x + c);
  }

 private:
  float defining_score(const double* query, const float* row, double norm);

  const Scoring& scoring_;
  std::vector<double> terms_;
};

constexpr int64_t kNoKey = INT64_MIN;  // of no item: below every item's key
// The integer by which results are ordered, descending: score first, then the lower id. kNoKey for
// NaN, which cannot be compared.
int64_t order_key(float score, int64_t id);
// The score and the id of an item's key.
void from_order_key(int64_t key, float& score, int64_t& id);

}  // namespace r2ec
