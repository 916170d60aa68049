// Float64 sums over the columns of one query and one row, in whatever order is fast.
//
// In: float64 query [D], float32 row [D]. Out: their product and the squares that bound its error.
//
// Numerics: every product and every addition is rounded once. Two orders of summing D terms t
// differ by at most 2 (D + 2) 2^-53 sum |t|; exact_score.cpp uses the sums within that bound.
#pragma once

#include <cstdint>

namespace r2ec {

struct Float64Sums {
  double dot;     // query . row
  double square;  // |row|^2
};

struct Float64Summer {
  Float64Sums (*products)(const double* query, const float* row, int64_t columns);
  double (*distance)(const double* query, const float* row, int64_t columns);  // |query - row|^2
};

// By the name of a CPU's kernels (tiles.hpp); AMX has those of AVX-512.
Float64Summer float64_summer(const char* cpu);

}  // namespace r2ec
