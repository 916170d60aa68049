// First passes over a part of a table: scores of rows are offered to a Selection as they are made, and
// no score is stored. Raw scores and their bounds: docs/search.md.
#pragma once

#include <cstdint>
#include <vector>

#include "selection.hpp"
#include "tiles.hpp"

namespace r2ec {

// A Selection and what a worker's passes offer to it; the bound of a raw score s made from a product
// p is s +- (error + relative |p|).
struct Offers {
  Selection& selection;
  const Tiles& tiles;
  int64_t worker;
  const float* error;  // of each query
  float relative;
};

// Rows as int8 codes: row i is scale[i] * code[i].
struct CodeTable {
  const int8_t* codes;
  int64_t columns;      // a multiple of kCodeColumns; rows lie so far apart
  Finish finish;        // of all rows
  const bool* trusted;  // of each row, or null: rows that are not are left out
};

// Queries as step[q] * value[q] with value int16 [queries, columns].
struct CodeQueries {
  const int16_t* value;
  const float* step;
};

void scan_codes(const CodeTable& table, const CodeQueries& queries, int64_t first, int64_t last,
                const Offers& offers);

enum class Similarity { kDot, kCosine, kL2 };

struct FloatTable {
  const float* rows;
  int64_t stride, columns;
};

// The bound of a row's raw score is unit * size + floor[q]; size is norm[q] times the row's norm
// (dot), norm[q] (cosine), or the square of their sum (l2). docs/search.md, section 1.
struct FloatQueries {
  const float* value;  // [queries, stride], zeros from `columns` on
  int64_t stride;      // a multiple of kFloatColumns
  const float* norm;
  const float* floor;
  double unit;
};

// `offers.error` is not used. Rows whose norm float32 cannot be trusted with (outside 1/huge..huge)
// are left out and appended to `doubtful`.
void scan_floats(const FloatTable& table, const FloatQueries& queries, Similarity similarity,
                 double huge, int64_t first, int64_t last, const Offers& offers,
                 std::vector<int64_t>& doubtful);

// Products of rows start.. of a table with all queries, made by a matrix library; `finish` and
// `first`, `last` count from `start`. [rows, queries] in memory, or [queries, rows].
template <typename T>
void scan_products(const T* products, int64_t stride, Finish finish, int64_t start, int64_t first,
                   int64_t last, const Offers& offers);
void scan_product_columns(const float* products, int64_t stride, Finish finish, int64_t start,
                          int64_t first, int64_t last, const Offers& offers);

}  // namespace r2ec
