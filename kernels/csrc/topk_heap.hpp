// The rows that may still be among the k best of each query, while a first pass runs over a table.
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

// Every worker keeps its own candidates, so that workers share nothing but the thresholds: of each
// query the k-th largest lower bound that some worker has seen. A row whose upper bound is below it
// can neither win nor tie. What `finish` returns depends on the bounds alone as far as it matters:
// it always holds every row that can win or tie.
class Selection {
 public:
  // limit: candidates of a query and worker beyond which the query is given up (mass ties).
  // excluded: sorted row * queries + query of pairs that are not wanted; must outlive this object.
  Selection(int64_t queries, int64_t k, int64_t limit, int64_t workers, const int64_t* excluded,
            int64_t num_excluded);

  int64_t queries() const { return queries_; }
  int64_t workers() const { return workers_; }

  // -FLT_MAX at first, so that a score of -inf never meets it; +inf once the query is given up.
  float threshold(int64_t query) const {
    return thresholds_[query].load(std::memory_order_relaxed);
  }

  // Takes a row unless it is excluded or cannot matter. One thread at a time for each worker.
  void offer(int64_t worker, int64_t query, float lower, float upper, int64_t row);

  struct Result {
    std::vector<std::vector<uint32_t>> rows;  // by query
    std::vector<char> failed;                 // by query: given up
    int64_t offered;                          // rows that met a threshold
  };
  // Merges the workers, when no `offer` runs any more.
  Result finish();

 private:
  struct Pool {
    std::vector<Candidate> candidates;
    int64_t full_at;  // size at which the threshold is raised and the pool thinned out
  };

  Pool& pool(int64_t worker, int64_t query) { return pools_[worker * queries_ + query]; }
  bool is_excluded(int64_t row, int64_t query) const;
  void raise(int64_t query, float threshold);
  void thin(int64_t query, std::vector<Candidate>& candidates, std::vector<float>& scratch);

  int64_t queries_, k_, limit_, workers_;
  const int64_t *excluded_first_, *excluded_last_;
  std::unique_ptr<std::atomic<float>[]> thresholds_;
  std::vector<Pool> pools_;                  // [workers, queries]
  std::vector<std::vector<float>> scratch_;  // by worker
  std::vector<int64_t> offered_;             // [workers * kPadding]
};

}  // namespace r2ec
