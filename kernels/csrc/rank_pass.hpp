// The rank of each query's target and the log-sum-exp over all items, in one pass over the table.
//
// In: a table of N rows, M prepared queries, the exact raw score of each query's target, and the
// (row, query) pairs that do not compete. Out, for each query: how many rows are certainly ahead of
// the target, the pairs that the error bound leaves open (near ties, for an exact re-score), and
// the online softmax (m, l) of all competing rows.
//
//            M queries
//          +-----------+     q = 0 .. M-1:  score > upper      ahead += 1
//   32     |  products |                    lower .. upper     a near tie
//   rows   |  32 x M   |                    all that compete   (m, l) of the online softmax
//          +-----------+
//
// lower and upper are the target's score -+ (error of the group + both canonical roundings).
//
// Bytes: the table once, N * D * 2 for two int8 codes or 4 * N * D for float32, nothing of size
// N * M. FLOPs: 2 * N * M * D for float32, twice that for two codes, about 25 * N * M for the
// softmax and the comparisons.
// Numerics: the count is exact once the near ties are scored. Weights are float32, relative to the
// target's score, and summed in float64. Parts of the table are merged in one order, so that the
// result does not depend on the number of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "simd/tiles.hpp"
#include "tables.hpp"

namespace r2ec {

// What a rank and a log-softmax need of each query's target.
struct TargetScore {
  double raw;                 // its raw score
  float rounded, log2_scale;  // a score s weighs 2^((s - rounded) * log2_scale)
};

// Pairs (row * M + query, sorted) that do not compete, among them each query and its target.
struct ExcludedPairs {
  const int64_t* pairs;
  int64_t count;
};

// What all rows are compared with, and how many near ties a call may leave.
struct RankQueries {
  const std::vector<TargetScore>& targets;
  ExcludedPairs excluded;
  int64_t max_near_ties;
};

struct RankStats {
  std::vector<OnlineSoftmax> softmax;  // by query
  std::vector<int64_t> ahead;          // by query: rows certainly ahead of the target
  std::vector<int64_t> near_ties;      // row * M + query of pairs that the bound leaves open
  std::vector<int64_t> unbounded;      // rows whose scores have no bound; they are not counted

  explicit RankStats(const std::vector<TargetScore>& targets);  // of no rows
};

// Add rows first..last-1 to `stats`; not for l2. Return false, and stop, where there are more near
// ties than allowed. `error` is the bound of the codes' raw scores, of each query.
bool add_rank_stats(const FloatTable& table, const FloatQueries& queries, Similarity similarity,
                    double huge, const RankQueries& rank_queries, const TileKernels& kernels,
                    int64_t first, int64_t last, RankStats& stats);
bool add_code_rank_stats(const FineTable& table, const CodeQueries& queries, const float* error,
                         const RankQueries& rank_queries, const TileKernels& kernels, int64_t first,
                         int64_t last, RankStats& stats);

// The sum of parts of a table, and of the targets' own terms target_l[q] (relative to m = 0), added
// in the order of the parts.
RankStats merged(const std::vector<RankStats>& parts, const std::vector<TargetScore>& targets,
                 const double* target_l);

}  // namespace r2ec
