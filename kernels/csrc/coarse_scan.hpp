// First passes over a part of a table: scores of rows are offered to a Selection as they are made,
// and no score is stored. Raw scores and their bounds: docs/search.md.
#pragma once

#include <cstdint>
#include <vector>

#include "simd/tiles.hpp"
#include "topk_heap.hpp"

namespace r2ec {

// A Selection and what a worker's passes offer to it; the bound of a raw score s made from a
// product p is s +- (error + relative |p|).
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

// Queries as step[q] times the operand's.
struct CodeQueries {
  const CodeOperand& operand;  // prepared by the tiles
  const float* step;
};

void scan_codes(const CodeTable& table, const CodeQueries& queries, int64_t first, int64_t last,
                const Offers& offers);

enum class Similarity { kDot, kCosine, kL2 };

struct FloatTable {
  const float* rows;
  int64_t stride, columns;
};

// The bound of a row's raw score is unit * size + floor[q], the unit by the operand's terms; size
// is norm[q] times the row's norm (dot), norm[q] (cosine), or the square of their sum (l2).
// docs/search.md, section 1.
struct FloatQueries {
  const FloatOperand& operand;  // prepared by the tiles
  const float* norm;
  const float* floor;
};

// `offers.error` is not used. Rows whose norm float32 cannot be trusted with (outside 1/huge..huge)
// are left out and appended to `doubtful`.
void scan_floats(const FloatTable& table, const FloatQueries& queries, Similarity similarity,
                 double huge, int64_t first, int64_t last, const Offers& offers,
                 std::vector<int64_t>& doubtful);

// Rows as two int8 codes: row i is scale[i] * (high[i] + low[i] / kLowParts), LOW_PARTS in Python.
constexpr int kLowParts = 254;
struct FineTable {
  CodeTable high;  // scores are not halved: not for l2
  const int8_t* low;
};

// What a log-softmax and a rank need of each query's target.
struct Target {
  double raw;            // its raw score
  float rounded, logit;  // scores s weigh exp2((s - rounded) * logit)
};

// Pairs (row * queries + query, sorted) that do not compete, among them each query and its target.
struct LeftOut {
  const int64_t* pairs;
  int64_t count;
};

struct Stats {
  std::vector<Fold> folds;        // by query: peak and mass
  std::vector<int64_t> ahead;     // by query: rows certainly ahead of the target
  std::vector<int64_t> near;      // row * queries + query of pairs that the bound leaves open
  std::vector<int64_t> doubtful;  // rows whose scores cannot be bounded; they are not counted
};

// What all rows are compared with, and how many open pairs a call may leave.
struct Contest {
  const std::vector<Target>& targets;
  LeftOut left_out;
  int64_t most_near;
};

// Add rows first..last-1 to `stats`; not for l2. Return false, and stop, where more pairs are open
// than there may be. `error` is the bound of the codes' raw scores, of each query.
bool add_stats(const FloatTable& table, const FloatQueries& queries, Similarity similarity,
               double huge, const Contest& contest, const Tiles& tiles, int64_t first, int64_t last,
               Stats& stats);
bool add_code_stats(const FineTable& table, const CodeQueries& queries, const float* error,
                    const Contest& contest, const Tiles& tiles, int64_t first, int64_t last,
                    Stats& stats);

// Products of rows start.. of a table with all queries, made by a matrix library; `finish` and
// `first`, `last` count from `start`. [rows, queries] in memory, or [queries, rows].
template <typename T>
void scan_products(const T* products, int64_t stride, Finish finish, int64_t start, int64_t first,
                   int64_t last, const Offers& offers);
void scan_product_columns(const float* products, int64_t stride, Finish finish, int64_t start,
                          int64_t first, int64_t last, const Offers& offers);

}  // namespace r2ec
