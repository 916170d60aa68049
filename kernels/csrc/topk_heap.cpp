#include "topk_heap.hpp"

#include <algorithm>
#include <functional>
#include <limits>

namespace r2ec {

namespace {
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kRoom = 64;     // candidates beyond those that stay before a pool is pruned again
constexpr int64_t kPadding = 16;  // counters of two workers never share a cache line
}  // namespace

TopkHeap::TopkHeap(int64_t queries, int64_t k, int64_t limit, int64_t workers,
                   const int64_t* excluded, int64_t num_excluded)
    : queries_(queries),
      k_(k),
      limit_(limit),
      workers_(workers),
      excluded_first_(excluded),
      excluded_last_(excluded + num_excluded),
      thresholds_(new std::atomic<float>[queries]),
      pools_(workers * queries, Pool{{}, std::min(limit, k) + std::max(kRoom, k)}),
      scratch_(workers),
      accepted_(workers * kPadding, 0) {
  for (int64_t query = 0; query < queries; ++query)
    thresholds_[query].store(-std::numeric_limits<float>::max(), std::memory_order_relaxed);
}

void TopkHeap::push(int64_t worker, int64_t query, float lower, float upper, int64_t row) {
  if (!(upper >= threshold(query)) || is_excluded(row, query)) return;
  auto& own = pool(worker, query);
  ++accepted_[worker * kPadding];
  own.candidates.push_back({lower, upper, static_cast<uint32_t>(row)});
  if (static_cast<int64_t>(own.candidates.size()) < own.full_at) return;
  prune(query, own.candidates, scratch_[worker]);
  const auto kept = static_cast<int64_t>(own.candidates.size());
  if (kept > limit_) {
    raise_threshold(query, kInfinity);
    own.candidates = {};
  }
  own.full_at = kept + std::max(kRoom, k_);
}

TopkHeap::Result TopkHeap::begin_result() const {
  Result result{std::vector<std::vector<uint32_t>>(queries_), std::vector<char>(queries_), 0};
  for (int64_t worker = 0; worker < workers_; ++worker)
    result.accepted += accepted_[worker * kPadding];
  return result;
}

void TopkHeap::finish(int64_t query, Result& result) {
  result.failed[query] = threshold(query) == kInfinity;
  if (result.failed[query]) return;
  std::vector<Candidate> all;
  for (int64_t worker = 0; worker < workers_; ++worker) {
    const auto& own = pool(worker, query).candidates;
    all.insert(all.end(), own.begin(), own.end());
  }
  std::vector<float> scratch;
  prune(query, all, scratch);
  auto& rows = result.rows[query];
  rows.reserve(all.size());
  for (const auto& candidate : all) rows.push_back(candidate.row);
}

std::vector<int64_t> TopkHeap::excluded_counts() const {
  std::vector<int64_t> counts(queries_, 0);
  for (const int64_t* pair = excluded_first_; pair != excluded_last_; ++pair)
    if (*pair >= 0) ++counts[*pair % queries_];
  return counts;
}

bool TopkHeap::is_excluded(int64_t row, int64_t query) const {
  return std::binary_search(excluded_first_, excluded_last_, row * queries_ + query);
}

void TopkHeap::raise_threshold(int64_t query, float threshold) {
  auto& shared = thresholds_[query];
  float known = shared.load(std::memory_order_relaxed);
  while (known < threshold &&
         !shared.compare_exchange_weak(known, threshold, std::memory_order_relaxed)) {
  }
}

// Raises the threshold to the k-th largest lower bound and drops what cannot reach it.
void TopkHeap::prune(int64_t query, std::vector<Candidate>& candidates,
                     std::vector<float>& scratch) {
  if (static_cast<int64_t>(candidates.size()) >= k_ && k_ > 0) {
    scratch.clear();
    for (const auto& candidate : candidates) scratch.push_back(candidate.lower);
    std::nth_element(scratch.begin(), scratch.begin() + (k_ - 1), scratch.end(),
                     std::greater<float>());
    raise_threshold(query, scratch[k_ - 1]);
  }
  const float least = threshold(query);
  candidates.erase(
      std::remove_if(candidates.begin(), candidates.end(),
                     [&](const Candidate& candidate) { return candidate.upper < least; }),
      candidates.end());
}

}  // namespace r2ec
