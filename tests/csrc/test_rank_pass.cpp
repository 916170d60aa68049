#include <cmath>
#include <limits>
#include <vector>

#include "check.hpp"
#include "random.hpp"
#include "rank_pass.hpp"

using namespace r2ec;

namespace {

// How many pairs of each query are still open.
std::vector<int64_t> open_pairs(const RankStats& stats) {
  const auto queries = static_cast<int64_t>(stats.softmax.size());
  std::vector<int64_t> open(queries);
  for (int64_t pair : stats.near_ties) ++open[pair % queries];
  return open;
}

TEST(stats_count_and_sum_what_competes) {
  Random random;
  constexpr int64_t kRows = 777, kColumns = 20, kQueries = 6;
  auto rows = random.floats(kRows * kColumns);
  const auto values = random.floats(kQueries * kColumns);
  rows[5 * kColumns] = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> norms(kQueries), floor(kQueries, 0.0f);
  std::vector<TargetScore> targets;
  std::vector<int64_t> excluded;
  for (int64_t q = 0; q < kQueries; ++q) {
    norms[q] = 1.01f * static_cast<float>(norm(values.data() + q * kColumns, kColumns));
    const double raw =
        dot(rows.data() + (10 + q) * kColumns, values.data() + q * kColumns, kColumns);
    targets.push_back({raw, static_cast<float>(raw), 1.0f});
    excluded.push_back((10 + q) * kQueries + q);
  }
  for (const TileKernels* kernels : kinds()) {
    FloatOperand operand(values.data(), kQueries, kColumns, 3);
    kernels->prepare_floats(operand);
    RankStats stats(targets);
    const RankQueries rank_queries = {targets, {excluded.data(), kQueries}, 1000};
    CHECK(add_rank_stats({rows.data(), kColumns, kColumns}, {operand, norms.data(), floor.data()},
                         Similarity::kDot, 0x1p50, rank_queries, *kernels, 0, kRows, stats));
    CHECK(stats.unbounded == std::vector<int64_t>{5});
    const auto open = open_pairs(stats);
    for (int64_t q = 0; q < kQueries; ++q) {
      int64_t ahead = 0;
      double l = 0.0;
      for (int64_t row = 0; row < kRows; ++row) {
        if (row == 5 || row == 10 + q) continue;
        const double score =
            dot(rows.data() + row * kColumns, values.data() + q * kColumns, kColumns);
        ahead += score > targets[q].raw;
        l += std::exp2(score - targets[q].raw);
      }
      CHECK(stats.ahead[q] <= ahead && ahead <= stats.ahead[q] + open[q] && open[q] < 5);
      const auto& softmax = stats.softmax[q];
      CHECK(std::fabs(softmax.l * std::exp2(static_cast<double>(softmax.m)) / l - 1) < 1e-5);
    }
  }
}

TEST(stats_of_two_codes_are_those_of_the_rows_they_stand_for) {
  Random random;
  constexpr int64_t kRows = 75, kColumns = 128, kQueries = 19;
  const auto high = random.integers<int8_t>(kRows * kColumns, -127, 127);
  const auto low = random.integers<int8_t>(kRows * kColumns, -127, 127);
  const auto values = random.integers<int16_t>(kQueries * kColumns, -10000, 10000);
  auto scale = random.integers<float>(kRows, 1, 9), step = random.integers<float>(kQueries, 1, 9);
  const std::vector<float> error(kQueries, 1e-5f);
  for (auto& s : scale) s *= 1e-3f;
  for (auto& s : step) s *= 1e-6f;
  bool bounded[kRows];
  for (bool& row : bounded) row = true;
  bounded[3] = false;
  const auto score = [&](int64_t row, int64_t q) {
    double sum = 0.0;
    for (int64_t c = 0; c < kColumns; ++c)
      sum +=
          (high[row * kColumns + c] + low[row * kColumns + c] / 254.0) * values[q * kColumns + c];
    return sum * scale[row] * step[q];
  };
  std::vector<TargetScore> targets;
  for (int64_t q = 0; q < kQueries; ++q)
    targets.push_back({score(q, q), static_cast<float>(score(q, q)), 0.5f});
  for (const TileKernels* kernels : kinds()) {
    CodeOperand operand = {kQueries, kColumns, values.data(), {}};
    kernels->prepare_codes(operand);
    RankStats stats(targets);
    const FineTable table = {{high.data(), kColumns, {scale.data(), nullptr}, bounded}, low.data()};
    CHECK(add_code_rank_stats(table, {operand, step.data()}, error.data(),
                              {targets, {nullptr, 0}, 1000}, *kernels, 0, kRows, stats));
    CHECK(stats.unbounded == std::vector<int64_t>{3});
    const auto open = open_pairs(stats);
    for (int64_t q = 0; q < kQueries; ++q) {
      int64_t ahead = 0;
      double l = 0.0;
      for (int64_t row = 0; row < kRows; ++row) {
        if (row == 3) continue;
        ahead += score(row, q) > targets[q].raw;
        l += std::exp2(0.5 * (score(row, q) - targets[q].raw));
      }
      if (q != 3) CHECK(open[q] >= 1);  // its own row
      CHECK(stats.ahead[q] <= ahead && ahead <= stats.ahead[q] + open[q] && open[q] < 4);
      const auto& softmax = stats.softmax[q];
      CHECK(std::fabs(softmax.l * std::exp2(static_cast<double>(softmax.m)) / l - 1) < 1e-4);
    }
  }
}

TEST(parts_of_a_table_add_up_to_all_of_it) {
  Random random;
  constexpr int64_t kRows = 200, kColumns = 16, kQueries = 3, kCut = 96;
  const auto rows = random.floats(kRows * kColumns), values = random.floats(kQueries * kColumns);
  std::vector<float> norms(kQueries), floor(kQueries, 0.0f);
  for (int64_t q = 0; q < kQueries; ++q)
    norms[q] = 1.01f * static_cast<float>(norm(values.data() + q * kColumns, kColumns));
  const std::vector<TargetScore> targets = {
      {1.0, 1.0f, 2.0f}, {0.0, 0.0f, 1.0f}, {-9.0, -9.0f, 1.0f}};
  const RankQueries rank_queries = {targets, {nullptr, 0}, 1000};
  for (const TileKernels* kernels : kinds()) {
    FloatOperand operand(values.data(), kQueries, kColumns, 3);
    kernels->prepare_floats(operand);
    const auto add = [&](int64_t first, int64_t last, RankStats& stats) {
      CHECK(add_rank_stats({rows.data(), kColumns, kColumns}, {operand, norms.data(), floor.data()},
                           Similarity::kDot, 0x1p50, rank_queries, *kernels, first, last, stats));
    };
    RankStats whole(targets);
    add(0, kRows, whole);
    std::vector<RankStats> parts(2, RankStats(targets));
    add(0, kCut, parts[0]);
    add(kCut, kRows, parts[1]);
    const double target_l[kQueries] = {0.0, 3.0, 0.5};
    const RankStats total = merged(parts, targets, target_l);
    CHECK(total.ahead == whole.ahead && total.near_ties == whole.near_ties);
    for (int64_t q = 0; q < kQueries; ++q) {
      const double m = whole.softmax[q].m, l = whole.softmax[q].l + target_l[q] * std::exp2(-m);
      CHECK(total.softmax[q].m == whole.softmax[q].m);
      CHECK(std::fabs(total.softmax[q].l / l - 1.0) < 1e-5);
    }
  }
}

}  // namespace

int main() { return run_tests(); }
