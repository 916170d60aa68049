#include <algorithm>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "check.hpp"
#include "coarse_scan.hpp"
#include "first_thresholds.hpp"
#include "random.hpp"

using namespace r2ec;

namespace {

TopkHeap::Result finished(TopkHeap& heap) {
  auto result = heap.begin_result();
  for (int64_t query = 0; query < heap.queries(); ++query) heap.finish(query, result);
  return result;
}

// Workers on their own threads, as the bindings run them.
TEST(workers_share_thresholds_and_lose_nothing) {
  Random random;
  constexpr int64_t kRows = 6000, kColumns = 33, kQueries = 7, kWorkers = 3, kBest = 9;
  const auto rows = random.floats(kRows * kColumns), values = random.floats(kQueries * kColumns);
  std::vector<float> norms(kQueries), floor(kQueries, 0.0f);
  for (int64_t q = 0; q < kQueries; ++q)
    norms[q] = 1.01f * static_cast<float>(norm(values.data() + q * kColumns, kColumns));
  for (const TileKernels* kernels : kinds()) {
    FloatOperand operand(values.data(), kQueries, kColumns, 2);
    kernels->prepare_floats(operand);
    std::vector<int64_t> excluded;  // the best row of query 0
    std::vector<std::vector<std::pair<double, int64_t>>> sorted(kQueries);
    for (int64_t q = 0; q < kQueries; ++q) {
      for (int64_t row = 0; row < kRows; ++row)
        sorted[q].push_back(
            {-dot(rows.data() + row * kColumns, values.data() + q * kColumns, kColumns), row});
      std::sort(sorted[q].begin(), sorted[q].end());
    }
    excluded.push_back(sorted[0][0].second * kQueries);
    sorted[0].erase(sorted[0].begin());
    TopkHeap heap(kQueries, kBest, 600, kWorkers, excluded.data(), 1);
    std::vector<std::vector<int64_t>> unbounded(kWorkers);
    std::vector<std::thread> threads;
    for (int64_t worker = 0; worker < kWorkers; ++worker)
      threads.emplace_back([&, worker] {
        scan_floats({rows.data(), kColumns, kColumns}, {operand, norms.data(), floor.data()},
                    Similarity::kDot, 0x1p50, worker * 2000, (worker + 1) * 2000,
                    {heap, *kernels, worker, floor.data(), 0x1p-22f}, unbounded[worker]);
      });
    for (auto& thread : threads) thread.join();
    const auto result = finished(heap);
    for (int64_t q = 0; q < kQueries; ++q) {
      const std::set<uint32_t> found(result.rows[q].begin(), result.rows[q].end());
      CHECK(found.size() < 3 * kBest && !result.failed[q]);
      for (int64_t i = 0; i < kBest; ++i)
        CHECK(found.count(static_cast<uint32_t>(sorted[q][i].second)) == 1);
    }
    CHECK(unbounded[0].empty() && unbounded[1].empty() && unbounded[2].empty());
  }
}

// The k-th best of the rows that are wanted still reaches the threshold, and few others do.
TEST(first_thresholds_are_close_and_never_too_high) {
  Random random;
  constexpr int64_t kRows = 3000, kQueries = 9, kBest = 20;
  constexpr float kError = 0.01f, kRelative = 0x1p-22f;
  for (const TileKernels* kernels : kinds())
    for (bool by_row : {true, false})
      for (bool leaves_out : {true, false}) {
        const auto products = random.floats(kRows * kQueries);
        const auto at = [&](int64_t row, int64_t query) {
          return products[by_row ? row * kQueries + query : query * kRows + row];
        };
        std::vector<std::vector<std::pair<float, int64_t>>> sorted(kQueries);
        for (int64_t q = 0; q < kQueries; ++q) {
          for (int64_t row = 0; row < kRows; ++row) sorted[q].push_back({-at(row, q), row});
          std::sort(sorted[q].begin(), sorted[q].end());
        }
        std::vector<int64_t> excluded = {-9, -1};  // no pairs; and the ten best of query 2
        for (int64_t i = 0; leaves_out && i < 10; ++i)
          excluded.push_back(sorted[2][i].second * kQueries + 2);
        if (leaves_out) sorted[2].erase(sorted[2].begin(), sorted[2].begin() + 10);
        std::sort(excluded.begin(), excluded.end());
        TopkHeap heap(kQueries, kBest, 600, 1, excluded.data(), excluded.size());
        FirstThresholds first(heap, *kernels, kRows, by_row, kRelative);
        CHECK(first.groups() >= 4 * kBest);
        for (int64_t group = 0; by_row && group < first.groups(); ++group)
          first.add(group, products.data(), kQueries, {nullptr, nullptr});
        for (int64_t q = 0; q < kQueries; ++q) {
          if (by_row)
            first.raise(q, kError);
          else
            first.raise_from(q, kError, products.data() + q * kRows);
          CHECK(heap.threshold(q) <= -sorted[q][kBest - 1].first - kError);
          CHECK(heap.threshold(q) > -sorted[q][3 * kBest].first - 2 * kError);
        }
      }
  TopkHeap heap(1, 500, 4512, 1, nullptr, 0);  // too few rows for so large a k
  CHECK(FirstThresholds(heap, *kinds()[0], kRows, false, 0.0f).groups() == 0);
}

TEST(too_many_ties_give_up_and_nothing_is_kept_after) {
  TopkHeap heap(1, 2, 70, 1, nullptr, 0);
  for (int64_t row = 0; row < 1000; ++row) heap.push(0, 0, 1.0f, 1.0f, row);
  const auto result = finished(heap);
  CHECK(result.failed[0] && result.rows[0].empty() && result.accepted < 1000);
}

TEST(fewer_rows_than_asked_for_all_stay) {
  TopkHeap heap(1, 500, 4512, 1, nullptr, 0);
  for (int64_t row = 0; row < 40; ++row)
    heap.push(0, 0, static_cast<float>(row), static_cast<float>(row), row);
  heap.push(0, 0, -kInfinity, -kInfinity, 40);  // a masked row never passes
  CHECK(finished(heap).rows[0].size() == 40);
}

}  // namespace

int main() { return run_tests(); }
