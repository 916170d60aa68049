// The candidates of a top-k scan: for each query the rows that may still be among its k best.
//
// In: rows with a lower and an upper bound of their score, from any number of workers, in any
// order. Out: for each query a set of rows that holds every one that can win or tie.
//
// It does the work of a k-best heap by buffering: each worker keeps one pool for each query. A full
// pool is pruned by nth_element to what can still win, which costs O(1) a pushed row on average,
// and raises the query's threshold. Workers share the thresholds alone, by atomics:
//
//             query 0    query 1    ...            thresholds (shared)
//   worker 0  [pool]     [pool]                    of each query the k-th largest lower bound
//   worker 1  [pool]     [pool]                    that some worker has seen; only ever raised
//
// A row whose upper bound is below the threshold can neither win nor tie. Which of the others are
// kept may depend on the order of the workers; that all winners are among them does not.
// Memory: O(k + 64) candidates of 12 bytes for each worker and query, at most `limit` more in ties.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

namespace r2ec {

// A row and the bounds of its raw score.
struct Candidate {
  float lower, upper;
  uint32_t row;
};

class TopkHeap {
 public:
  // limit: candidates of a query and worker beyond which the query is given up, since too many rows
  // tie. excluded: sorted row * queries + query of pairs that are not wanted, negative for none;
  // must outlive this.
  TopkHeap(int64_t queries, int64_t k, int64_t limit, int64_t workers, const int64_t* excluded,
           int64_t num_excluded);

  int64_t queries() const { return queries_; }
  int64_t k() const { return k_; }
  int64_t workers() const { return workers_; }

  // -FLT_MAX at first, so that a score of -inf never meets it; +inf once the query is given up.
  float threshold(int64_t query) const {
    return thresholds_[query].load(std::memory_order_relaxed);
  }

  // At least k rows that are not excluded have scores of at least `threshold`.
  void raise_threshold(int64_t query, float threshold);
  // Rows that are not wanted, by query.
  std::vector<int64_t> excluded_counts() const;

  // Keeps a row unless it is excluded or cannot matter. One thread at a time for each worker.
  void push(int64_t worker, int64_t query, float lower, float upper, int64_t row);

  struct Result {
    std::vector<std::vector<uint32_t>> rows;  // by query
    std::vector<char> failed;                 // by query: given up
    int64_t accepted;                         // scores that reached a threshold
  };
  // Merges the workers, when no `push` runs any more: a result to be filled query by query.
  Result begin_result() const;
  void finish(int64_t query, Result& result);

 private:
  struct Pool {
    std::vector<Candidate> candidates;
    int64_t full_at;  // size at which the threshold is raised and the pool pruned
  };

  Pool& pool(int64_t worker, int64_t query) { return pools_[worker * queries_ + query]; }
  bool is_excluded(int64_t row, int64_t query) const;
  void prune(int64_t query, std::vector<Candidate>& candidates, std::vector<float>& scratch);

  int64_t queries_, k_, limit_, workers_;
  const int64_t *excluded_first_, *excluded_last_;
  std::unique_ptr<std::atomic<float>[]> thresholds_;
  std::vector<Pool> pools_;                  // [workers, queries]
  std::vector<std::vector<float>> scratch_;  // by worker
  std::vector<int64_t> accepted_;            // [workers * kPadding]
};

}  // namespace r2ec
