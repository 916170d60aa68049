#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "check.hpp"
#include "coarse_scan.hpp"
#include "exact_score.hpp"

using namespace r2ec;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::vector<const Tiles*> kinds() {
  std::vector<const Tiles*> found;
  for (const char* name : {"portable", "avx2", "avx512", "amx"})
    if (const Tiles* tiles = find_tiles(name)) found.push_back(tiles);
  return found;
}

struct Random {
  std::mt19937 engine{7};
  std::vector<float> floats(int64_t n) {
    std::normal_distribution<float> normal;
    std::vector<float> out(n);
    for (auto& x : out) x = normal(engine);
    return out;
  }
  template <typename T>
  std::vector<T> integers(int64_t n, int low, int high) {
    std::uniform_int_distribution<int> uniform(low, high);
    std::vector<T> out(n);
    for (auto& x : out) x = static_cast<T>(uniform(engine));
    return out;
  }
};

double dot(const float* a, const float* b, int64_t n) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return sum;
}

double norm(const float* a, int64_t n) { return std::sqrt(dot(a, a, n)); }

TEST(code_products_are_exact) {
  Random random;
  for (const Tiles* tiles : kinds())
    for (int64_t queries : {1, 3, 6, 17, 33})
      for (int64_t count : {1, 5, 31, 32}) {
        const int64_t columns = 192;
        const auto codes = random.integers<int8_t>(kGroup * columns, -127, 127);
        const auto values = random.integers<int16_t>(queries * columns, -32000, 32000);
        CodeOperand operand = {queries, columns, values.data(), {}};
        tiles->prepare_codes(operand);
        std::vector<int32_t> out(queries * kGroup);
        tiles->multiply_codes({codes.data(), columns, count}, operand, out.data());
        for (int64_t q = 0; q < queries; ++q)
          for (int64_t i = 0; i < count; ++i) {
            int64_t want = 0;
            for (int64_t c = 0; c < columns; ++c)
              want += int64_t{codes[i * columns + c]} * values[q * columns + c];
            CHECK(out[q * kGroup + i] == want);
          }
      }
}

TEST(float_products_stay_within_their_bound) {
  Random random;
  for (const Tiles* tiles : kinds())
    for (int parts : {2, 3})
      for (int64_t queries : {1, 2, 3, 5, 16, 33})
        for (int64_t columns : {1, 7, 16, 33, 100}) {
          const int64_t count = columns % 2 ? 32 : 19, stride = columns + 3;
          const auto rows = random.floats(kGroup * stride);
          const auto values = random.floats(queries * columns);
          FloatOperand operand(values.data(), queries, columns, parts);
          tiles->prepare_floats(operand);
          CHECK(operand.terms > 0.0);
          std::vector<float> out(queries * kGroup), squares(kGroup);
          tiles->multiply_floats({rows.data(), stride, count}, operand, out.data(), squares.data());
          for (int64_t i = 0; i < count; ++i) {
            const float* row = rows.data() + i * stride;
            const double size = norm(row, columns);
            CHECK(std::fabs(squares[i] - size * size) <= (columns + 4) * 0x1p-24 * size * size);
            for (int64_t q = 0; q < queries; ++q) {
              const float* query = values.data() + q * columns;
              const double bound = operand.terms * 0x1p-24 * size * norm(query, columns);
              CHECK(std::fabs(out[q * kGroup + i] - dot(row, query, columns)) <= bound);
            }
          }
        }
}

TEST(reached_scores_are_found) {
  Random random;
  const auto products = random.floats(kGroup), scale = random.floats(kGroup);
  const auto half = random.floats(kGroup), need = random.floats(kGroup);
  for (const Tiles* tiles : kinds())
    for (int64_t count : {1, 9, 16, 31, 32}) {
      uint32_t one = 0, many = 0, narrow = 0;
      std::vector<Bfloat16> short_products;
      for (float p : products) {
        uint32_t bits;
        std::memcpy(&bits, &p, sizeof bits);
        short_products.push_back({static_cast<uint16_t>(bits >> 16)});
      }
      const auto upper = [](float p) { return std::fmaf(0.01f, std::fabs(p), p); };
      for (int64_t i = 0; i < count; ++i) {
        one |= static_cast<uint32_t>(upper(products[i] * scale[i]) >= 0.3f + half[i]) << i;
        many |= static_cast<uint32_t>(upper(products[i] * 1.5f) >= need[i] + 0.2f) << i;
        const float p = to_float(short_products[i]) * 1.5f;
        narrow |= static_cast<uint32_t>(upper(p) >= need[i] + 0.2f) << i;
      }
      const Finish finish = {scale.data(), half.data()};
      CHECK(tiles->reach(products.data(), count, finish, 0.3f, 0.01f) == one);
      CHECK(tiles->reach_f32(products.data(), count, 1.5f, 0.2f, need.data(), 0.01f) == many);
      CHECK(tiles->reach_bf16(short_products.data(), count, 1.5f, 0.2f, need.data(), 0.01f) ==
            narrow);
      CHECK(tiles->reach(products.data(), count, {nullptr, nullptr}, kInfinity, 0.0f) == 0);
    }
}

TEST(weights_are_summed) {
  Random random;
  for (const Tiles* tiles : kinds()) {
    auto products = random.floats(kGroup);
    products[3] = kInfinity;  // left out
    const auto kept = products;
    Fold fold = {0.1f, 20.0f, 0.2f, 0.6f, 0.0f, 0.0};
    uint32_t near = 0;
    const uint32_t allowed = ~(1u << 3);
    const int64_t ahead = tiles->fold(products.data(), nullptr, allowed, fold, near);
    int64_t want = 0;
    double mass = 0.0;
    for (int i = 0; i < kGroup; ++i) {
      if (i == 3) continue;
      want += kept[i] > 0.6f;
      CHECK(((near >> i) & 1) == static_cast<uint32_t>(kept[i] >= 0.2f && kept[i] <= 0.6f));
      mass += std::exp2((static_cast<double>(kept[i]) - 0.1f) * 20.0);
    }
    CHECK(ahead == want);
    CHECK(std::fabs(fold.mass * std::exp2(static_cast<double>(fold.peak)) / mass - 1.0) < 1e-5);
  }
}

// Workers on their own threads, as the bindings run them.
TEST(workers_share_thresholds_and_lose_nothing) {
  Random random;
  constexpr int64_t kRows = 6000, kColumns = 33, kQueries = 7, kWorkers = 3, kBest = 9;
  const auto rows = random.floats(kRows * kColumns), values = random.floats(kQueries * kColumns);
  std::vector<float> norms(kQueries), floor(kQueries, 0.0f);
  for (int64_t q = 0; q < kQueries; ++q)
    norms[q] = 1.01f * static_cast<float>(norm(values.data() + q * kColumns, kColumns));
  for (const Tiles* tiles : kinds()) {
    FloatOperand operand(values.data(), kQueries, kColumns, 2);
    tiles->prepare_floats(operand);
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
    Selection selection(kQueries, kBest, 600, kWorkers, excluded.data(), 1);
    std::vector<std::vector<int64_t>> doubtful(kWorkers);
    std::vector<std::thread> threads;
    for (int64_t worker = 0; worker < kWorkers; ++worker)
      threads.emplace_back([&, worker] {
        scan_floats({rows.data(), kColumns, kColumns}, {operand, norms.data(), floor.data()},
                    Similarity::kDot, 0x1p50, worker * 2000, (worker + 1) * 2000,
                    {selection, *tiles, worker, floor.data(), 0x1p-22f}, doubtful[worker]);
      });
    for (auto& thread : threads) thread.join();
    const auto result = selection.finish();
    for (int64_t q = 0; q < kQueries; ++q) {
      const std::set<uint32_t> found(result.rows[q].begin(), result.rows[q].end());
      CHECK(found.size() < 3 * kBest && !result.failed[q]);
      for (int64_t i = 0; i < kBest; ++i)
        CHECK(found.count(static_cast<uint32_t>(sorted[q][i].second)) == 1);
    }
    CHECK(doubtful[0].empty() && doubtful[1].empty() && doubtful[2].empty());
  }
}

TEST(mass_ties_give_up_and_nothing_is_offered_after) {
  Selection selection(1, 2, 70, 1, nullptr, 0);
  for (int64_t row = 0; row < 1000; ++row) selection.offer(0, 0, 1.0f, 1.0f, row);
  const auto result = selection.finish();
  CHECK(result.failed[0] && result.rows[0].empty() && result.offered < 1000);
}

TEST(fewer_rows_than_asked_for_all_stay) {
  Selection selection(1, 500, 4512, 1, nullptr, 0);
  for (int64_t row = 0; row < 40; ++row)
    selection.offer(0, 0, static_cast<float>(row), static_cast<float>(row), row);
  selection.offer(0, 0, -kInfinity, -kInfinity, 40);  // a masked row never passes
  CHECK(selection.finish().rows[0].size() == 40);
}

Stats nothing_found(const std::vector<Target>& targets) {
  Stats stats;
  for (const auto& target : targets)
    stats.folds.push_back({target.rounded, target.logit, 0.0f, 0.0f, 0.0f, 0.0});
  stats.ahead.resize(targets.size());
  return stats;
}

// How many pairs of each query are still open.
std::vector<int64_t> open_pairs(const Stats& stats) {
  const auto queries = static_cast<int64_t>(stats.folds.size());
  std::vector<int64_t> open(queries);
  for (int64_t pair : stats.near) ++open[pair % queries];
  return open;
}

TEST(stats_count_and_sum_what_competes) {
  Random random;
  constexpr int64_t kRows = 777, kColumns = 20, kQueries = 6;
  auto rows = random.floats(kRows * kColumns);
  const auto values = random.floats(kQueries * kColumns);
  rows[5 * kColumns] = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> norms(kQueries), floor(kQueries, 0.0f);
  std::vector<Target> targets;
  std::vector<int64_t> left_out;
  for (int64_t q = 0; q < kQueries; ++q) {
    norms[q] = 1.01f * static_cast<float>(norm(values.data() + q * kColumns, kColumns));
    const double raw =
        dot(rows.data() + (10 + q) * kColumns, values.data() + q * kColumns, kColumns);
    targets.push_back({raw, static_cast<float>(raw), 1.0f});
    left_out.push_back((10 + q) * kQueries + q);
  }
  for (const Tiles* tiles : kinds()) {
    FloatOperand operand(values.data(), kQueries, kColumns, 3);
    tiles->prepare_floats(operand);
    Stats stats = nothing_found(targets);
    const Contest contest = {targets, {left_out.data(), kQueries}, 1000};
    CHECK(add_stats({rows.data(), kColumns, kColumns}, {operand, norms.data(), floor.data()},
                    Similarity::kDot, 0x1p50, contest, *tiles, 0, kRows, stats));
    CHECK(stats.doubtful == std::vector<int64_t>{5});
    const auto open = open_pairs(stats);
    for (int64_t q = 0; q < kQueries; ++q) {
      int64_t ahead = 0;
      double mass = 0.0;
      for (int64_t row = 0; row < kRows; ++row) {
        if (row == 5 || row == 10 + q) continue;
        const double score =
            dot(rows.data() + row * kColumns, values.data() + q * kColumns, kColumns);
        ahead += score > targets[q].raw;
        mass += std::exp2(score - targets[q].raw);
      }
      CHECK(stats.ahead[q] <= ahead && ahead <= stats.ahead[q] + open[q] && open[q] < 5);
      const auto& fold = stats.folds[q];
      CHECK(std::fabs(fold.mass * std::exp2(static_cast<double>(fold.peak)) / mass - 1) < 1e-5);
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
  bool trusted[kRows];
  for (bool& row : trusted) row = true;
  trusted[3] = false;
  const auto score = [&](int64_t row, int64_t q) {
    double sum = 0.0;
    for (int64_t c = 0; c < kColumns; ++c)
      sum +=
          (high[row * kColumns + c] + low[row * kColumns + c] / 254.0) * values[q * kColumns + c];
    return sum * scale[row] * step[q];
  };
  std::vector<Target> targets;
  for (int64_t q = 0; q < kQueries; ++q)
    targets.push_back({score(q, q), static_cast<float>(score(q, q)), 0.5f});
  for (const Tiles* tiles : kinds()) {
    CodeOperand operand = {kQueries, kColumns, values.data(), {}};
    tiles->prepare_codes(operand);
    Stats stats = nothing_found(targets);
    const FineTable table = {{high.data(), kColumns, {scale.data(), nullptr}, trusted}, low.data()};
    CHECK(add_code_stats(table, {operand, step.data()}, error.data(), {targets, {nullptr, 0}, 1000},
                         *tiles, 0, kRows, stats));
    CHECK(stats.doubtful == std::vector<int64_t>{3});
    const auto open = open_pairs(stats);
    for (int64_t q = 0; q < kQueries; ++q) {
      int64_t ahead = 0;
      double mass = 0.0;
      for (int64_t row = 0; row < kRows; ++row) {
        if (row == 3) continue;
        ahead += score(row, q) > targets[q].raw;
        mass += std::exp2(0.5 * (score(row, q) - targets[q].raw));
      }
      if (q != 3) CHECK(open[q] >= 1);  // its own row
      CHECK(stats.ahead[q] <= ahead && ahead <= stats.ahead[q] + open[q] && open[q] < 4);
      const auto& fold = stats.folds[q];
      CHECK(std::fabs(fold.mass * std::exp2(static_cast<double>(fold.peak)) / mass - 1) < 1e-4);
    }
  }
}

TEST(order_keys_put_scores_first_and_low_ids_next) {
  const float scores[] = {kInfinity, 2.0f, 1.0f, 0.0f, -1.0f, -2.0f, -kInfinity};
  for (size_t i = 0; i + 1 < std::size(scores); ++i) {
    CHECK(order_key(scores[i], 4294967294) > order_key(scores[i + 1], 0));
    CHECK(order_key(scores[i], 3) > order_key(scores[i], 4));
  }
  CHECK(order_key(-kInfinity, 4294967294) > kNoKey);
}

}  // namespace

int main() { return run_tests(); }
