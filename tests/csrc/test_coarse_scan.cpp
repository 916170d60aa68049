#include <algorithm>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "check.hpp"
#include "coarse_scan.hpp"
#include "random.hpp"

using namespace r2ec;

namespace {

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
    const auto result = heap.finish();
    for (int64_t q = 0; q < kQueries; ++q) {
      const std::set<uint32_t> found(result.rows[q].begin(), result.rows[q].end());
      CHECK(found.size() < 3 * kBest && !result.failed[q]);
      for (int64_t i = 0; i < kBest; ++i)
        CHECK(found.count(static_cast<uint32_t>(sorted[q][i].second)) == 1);
    }
    CHECK(unbounded[0].empty() && unbounded[1].empty() && unbounded[2].empty());
  }
}

TEST(too_many_ties_give_up_and_nothing_is_kept_after) {
  TopkHeap heap(1, 2, 70, 1, nullptr, 0);
  for (int64_t row = 0; row < 1000; ++row) heap.push(0, 0, 1.0f, 1.0f, row);
  const auto result = heap.finish();
  CHECK(result.failed[0] && result.rows[0].empty() && result.accepted < 1000);
}

TEST(fewer_rows_than_asked_for_all_stay) {
  TopkHeap heap(1, 500, 4512, 1, nullptr, 0);
  for (int64_t row = 0; row < 40; ++row)
    heap.push(0, 0, static_cast<float>(row), static_cast<float>(row), row);
  heap.push(0, 0, -kInfinity, -kInfinity, 40);  // a masked row never passes
  CHECK(heap.finish().rows[0].size() == 40);
}

}  // namespace

int main() { return run_tests(); }
