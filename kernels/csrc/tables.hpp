// Item tables and queries, as the passes over the items read them. N rows (items), M queries, D
// columns. Nothing here owns memory.
#pragma once

#include <cstdint>

#include "simd/tiles.hpp"

namespace r2ec {

// Raw scores, which a pass compares, keep the order of canonical scores: q . x (dot), q . x / |x|
// (cosine), q . x - |x|^2 / 2 (l2). docs/search.md derives them and their bounds.
enum class Similarity { kDot, kCosine, kL2 };

struct FloatTable {
  const float* rows;
  int64_t stride, columns;
};

// The bound of a row's raw score is u * size + floor[q]. u follows from the operand's error_terms;
// size is norm[q] times the row's norm (dot), norm[q] (cosine), or the square of their sum (l2).
struct FloatQueries {
  const FloatOperand& operand;  // prepared by the kernels that multiply it
  const float* norm;
  const float* floor;
};

// Rows as int8 codes: row i stands for scale[i] * code[i].
struct CodeTable {
  const int8_t* codes;
  int64_t columns;      // a multiple of kCodeColumns; rows lie so far apart
  Epilogue epilogue;    // of all rows
  const bool* bounded;  // of each row, or null: rows without a bound are left out
};

// Query q stands for step[q] times the operand's.
struct CodeQueries {
  const CodeOperand& operand;  // prepared by the kernels that multiply it
  const float* step;
};

// Rows as two int8 codes: row i stands for scale[i] * (high[i] + low[i] / kLowParts). LOW_PARTS in
// Python.
constexpr int kLowParts = 254;
struct FineTable {
  CodeTable high;  // scores are not halved: not for l2
  const int8_t* low;
};

}  // namespace r2ec
