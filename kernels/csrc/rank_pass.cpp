#include "rank_pass.hpp"

#include <algorithm>
#include <cmath>

#include "group_scores.hpp"

namespace r2ec {

namespace {

// Adds rows first..last-1, multiplied by `group`. The excluded pairs are sorted by row, so that
// those of a group are the next ones: their bits are set in `out` before the group and cleared
// after it.
template <typename Group>
bool add_groups(Group& group, const RankQueries& rank_queries, const TileKernels& kernels,
                int64_t first, int64_t last, RankStats& stats) {
  const auto& targets = rank_queries.targets;
  const auto num_queries = static_cast<int64_t>(targets.size());
  const int64_t* const end = rank_queries.excluded.pairs + rank_queries.excluded.count;
  const int64_t* pair = std::lower_bound(rank_queries.excluded.pairs, end, first * num_queries);
  std::vector<uint32_t> out(num_queries);  // bits of the group's rows that do not compete
  for (int64_t row = first; row < last; row += kGroup) {
    const int64_t count = std::min(kGroup, last - row);
    group.multiply(row, count, stats.unbounded);
    const int64_t* const own = pair;
    for (; pair != end && *pair < (row + count) * num_queries; ++pair)
      out[*pair % num_queries] |= 1u << (*pair / num_queries - row);
    for (int64_t q = 0; q < num_queries; ++q) {
      // both canonical roundings and that of the two limits
      const double error = group.error(q) + std::fabs(targets[q].raw) * 0x1p-22;
      auto& softmax = stats.softmax[q];
      softmax.upper = static_cast<float>(targets[q].raw + error);
      softmax.lower = static_cast<float>(targets[q].raw - error);
      uint32_t near_ties = 0;
      stats.ahead[q] += kernels.update_softmax(group.products(q), group.epilogue().scale,
                                               group.allowed() & ~out[q], softmax, near_ties);
      for (; near_ties; near_ties &= near_ties - 1)
        stats.near_ties.push_back((row + __builtin_ctz(near_ties)) * num_queries + q);
    }
    for (const int64_t* used = own; used != pair; ++used) out[*used % num_queries] = 0;
    if (static_cast<int64_t>(stats.near_ties.size()) > rank_queries.max_near_ties) return false;
  }
  return true;
}

}  // namespace

RankStats::RankStats(const std::vector<TargetScore>& targets) : ahead(targets.size(), 0) {
  for (const auto& target : targets)
    softmax.push_back({target.rounded, target.log2_scale, 0.0f, 0.0f, 0.0f, 0.0});
}

bool add_rank_stats(const FloatTable& table, const FloatQueries& queries, Similarity similarity,
                    double huge, const RankQueries& rank_queries, const TileKernels& kernels,
                    int64_t first, int64_t last, RankStats& stats) {
  FloatGroup group(table, queries, similarity, huge, kernels);
  return add_groups(group, rank_queries, kernels, first, last, stats);
}

bool add_code_rank_stats(const FineTable& table, const CodeQueries& queries, const float* error,
                         const RankQueries& rank_queries, const TileKernels& kernels, int64_t first,
                         int64_t last, RankStats& stats) {
  FineGroup group(table, queries, error, kernels);
  return add_groups(group, rank_queries, kernels, first, last, stats);
}

RankStats merged(const std::vector<RankStats>& parts, const std::vector<TargetScore>& targets,
                 const double* target_l) {
  RankStats total(targets);
  for (size_t q = 0; q < targets.size(); ++q) {
    auto& sum = total.softmax[q];
    for (const auto& part : parts) sum.m = std::max(sum.m, part.softmax[q].m);
    sum.l = target_l[q] * std::exp2(-static_cast<double>(sum.m));
    for (const auto& part : parts) {
      const auto& softmax = part.softmax[q];
      sum.l += softmax.l * std::exp2(static_cast<double>(softmax.m) - sum.m);
      total.ahead[q] += part.ahead[q];
    }
  }
  for (const auto& part : parts)
    total.near_ties.insert(total.near_ties.end(), part.near_ties.begin(), part.near_ties.end());
  return total;
}

}  // namespace r2ec
