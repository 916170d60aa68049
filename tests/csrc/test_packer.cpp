#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "arrays.hpp"
#include "best_fit.hpp"
#include "check.hpp"
#include "packer.hpp"
#include "parallel.hpp"

using r2ec::Offsets;
using r2ec::PackOptions;
using r2ec::Plan;
using Ints = std::vector<int64_t>;

namespace {

Offsets view(const Ints& offsets, int64_t num_values) {
  return {offsets.data(), static_cast<int64_t>(offsets.size()), num_values};
}

Plan plan(const Ints& prompts, const Ints* completions, const PackOptions& options) {
  const auto p = view(prompts, prompts.empty() ? 0 : prompts.back());
  if (completions == nullptr) return Plan(p, nullptr, options);
  const auto c = view(*completions, completions->back());
  return Plan(p, &c, options);
}

PackOptions budget(int64_t max_tokens) {
  PackOptions options;
  options.max_tokens = max_tokens;
  return options;
}

template <typename T>
std::vector<T> slice(const T* data, int64_t size) {
  return {data, data + size};
}

Ints random_offsets(std::mt19937& rng, int64_t rows, int64_t longest) {
  Ints out{0};
  for (int64_t i = 0; i < rows; ++i) out.push_back(out.back() + 1 + rng() % longest);
  return out;
}

Ints brute_force(const Ints& sizes, int64_t capacity) {
  Ints order(sizes.size()), batch(sizes.size()), space;
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return sizes[a] > sizes[b]; });
  for (const int64_t i : order) {
    int64_t best = -1;
    for (size_t b = 0; b < space.size(); ++b)
      if (space[b] >= sizes[i] && (best < 0 || space[b] < space[best])) best = b;
    if (best < 0) {
      best = space.size();
      space.push_back(capacity);
    }
    space[best] -= sizes[i];
    batch[i] = best;
  }
  return batch;
}

}  // namespace

TEST(rows_alone_are_laid_out) {
  const Ints prompts{0, 3, 5};
  auto options = budget(8);
  options.multiple = 4;
  const Plan p = plan(prompts, nullptr, options);
  CHECK(p.num_batches() == 1);
  Arrays a(p, false, true);
  const int32_t values[] = {11, 12, 13, 21, 22};
  p.fill<int32_t, int64_t>(values, nullptr, nullptr, a.out, 1);
  CHECK(slice(a.input_ids.get(), 8) == (Ints{11, 12, 13, 21, 22, 0, 0, 0}));
  CHECK(slice(a.labels.get(), 8) == (Ints{-100, 12, 13, -100, 22, -100, -100, -100}));
  CHECK(slice(a.position_ids.get(), 8) == (Ints{0, 1, 2, 0, 1, 0, 1, 2}));
  CHECK(slice(a.cu_q.get(), 4) == (std::vector<int32_t>{0, 3, 5, 8}));
  CHECK(slice(a.readout.get(), 2) == (Ints{2, 4}));
}

TEST(shared_prompts_are_laid_out) {
  const Ints prompts{0, 2}, completions{0, 1, 3};
  auto options = budget(5);
  options.num_generations = 2;
  options.share_prompts = true;
  const Plan p = plan(prompts, &completions, options);
  Arrays a(p, true, false);
  const int64_t prompt_values[] = {1, 2}, completion_values[] = {7, 8, 9};
  p.fill(prompt_values, completion_values, nullptr, a.out, 3);
  CHECK(slice(a.input_ids.get(), 5) == (Ints{1, 2, 7, 8, 9}));
  CHECK(slice(a.position_ids.get(), 5) == (Ints{0, 1, 2, 2, 3}));
  CHECK(slice(a.kv_index.get(), 9) == (Ints{0, 1, 0, 1, 2, 0, 1, 3, 4}));
  CHECK(slice(a.cu_k.get(), 4) == (std::vector<int32_t>{0, 2, 5, 9}));
  CHECK(slice(a.predict_from.get(), 3) == (Ints{1, 1, 3}));
  CHECK(slice(a.trajectory.get(), 3) == (Ints{0, 1, 1}));
  CHECK(slice(a.source.get(), 3) == (Ints{0, 1, 2}));
  CHECK(slice(a.readout.get(), 2) == (Ints{2, 4}));
}

TEST(best_fit_is_the_brute_force_one) {
  std::mt19937 rng(1);
  for (int trial = 0; trial < 60; ++trial) {
    const int64_t capacity = trial % 3 == 0 ? 7 : trial % 3 == 1 ? 700 : (int64_t{1} << 21);
    Ints sizes(rng() % 300);
    for (auto& s : sizes) s = 1 + rng() % std::min<int64_t>(capacity, 1000);
    Ints batch;
    r2ec::best_fit_decreasing(sizes, capacity, batch);
    CHECK(batch == brute_force(sizes, capacity));
  }
}

TEST(every_entry_is_written_for_any_number_of_threads) {
  std::mt19937 rng(2);
  const Ints prompts = random_offsets(rng, 200, 40), completions = random_offsets(rng, 600, 20);
  Ints p_values(prompts.back()), c_values(completions.back());
  for (auto& v : p_values) v = rng() % 1000;
  for (auto& v : c_values) v = rng() % 1000;
  for (const bool share : {false, true}) {
    auto options = budget(256);
    options.num_generations = 3;
    options.share_prompts = share;
    options.multiple = 8;
    const Plan p = plan(prompts, &completions, options);
    Arrays one(p, share, !share), many(p, share, !share);
    p.fill(p_values.data(), c_values.data(), nullptr, one.out, 1);
    for (const int64_t threads : {2, 5, 1000}) {
      p.fill(p_values.data(), c_values.data(), nullptr, many.out, threads);
      const int64_t tokens = p.starts().tokens.back(), m = p.starts().predicted.back();
      CHECK(slice(one.input_ids.get(), tokens) == slice(many.input_ids.get(), tokens));
      CHECK(slice(one.seq_idx.get(), tokens) == slice(many.seq_idx.get(), tokens));
      CHECK(slice(one.position_ids.get(), tokens) == slice(many.position_ids.get(), tokens));
      CHECK(slice(one.predict_from.get(), m) == slice(many.predict_from.get(), m));
      CHECK(slice(one.targets.get(), m) == slice(many.targets.get(), m));
    }
    const auto written = [](const Ints& v) {
      return std::find(v.begin(), v.end(), -7777777) == v.end();
    };
    const auto& s = p.starts();
    CHECK(written(slice(one.input_ids.get(), s.tokens.back())));
    CHECK(written(slice(one.position_ids.get(), s.tokens.back())));
    CHECK(written(slice(one.predict_from.get(), s.predicted.back())));
    CHECK(written(slice(one.trajectory.get(), s.predicted.back())));
    CHECK(written(slice(one.source.get(), s.predicted.back())));
    CHECK(written(slice(one.readout.get(), s.readouts.back())));
    if (share) CHECK(written(slice(one.kv_index.get(), s.keys.back())));
    if (!share) CHECK(written(slice(one.labels.get(), s.tokens.back())));
  }
}

TEST(broken_offsets_are_refused) {
  const auto p = [](const Ints& offsets, int64_t num_values) {
    Plan(view(offsets, num_values), nullptr, budget(8));
  };
  CHECK_REFUSED(p({}, 0), "at least the entry 0");
  CHECK_REFUSED(p({1, 2}, 2), "must start at 0");
  CHECK_REFUSED(p({0, 2, 2}, 2), "row 1 is empty");
  CHECK_REFUSED(p({0, 3, 2}, 2), "must not fall");
  CHECK_REFUSED(p({0, INT64_MAX, INT64_MIN}, 2), "must not fall");
  CHECK_REFUSED(p({0, 2}, 3), "must be the number of values");
  CHECK_REFUSED(p({0, 9}, 9), "row 0 has 9 tokens");
}

TEST(broken_options_are_refused) {
  const Ints prompts{0, 2, 4}, completions{0, 1, 2};
  PackOptions options = budget(8);
  options.num_generations = 2;
  CHECK_REFUSED(plan(prompts, &completions, options), "num_generations rows");
  options.num_generations = INT64_MAX;
  CHECK_REFUSED(plan(prompts, &completions, options), "num_generations rows");
  options.num_generations = 0;
  options.share_prompts = true;
  CHECK_REFUSED(plan(prompts, nullptr, options), "need completions");
  CHECK_REFUSED(plan(prompts, nullptr, budget(0)), "max_tokens must be");
  CHECK_REFUSED(plan(prompts, nullptr, budget(int64_t{1} << 31)), "max_tokens must be");
  options = budget(8);
  options.multiple = 9;
  CHECK_REFUSED(plan(prompts, nullptr, options), "pad_to_multiple_of");
}

TEST(sizes_past_int32_and_int64_are_refused) {
  auto options = budget(r2ec::kInt32Max);
  options.oversize_alone = true;
  const int64_t big = int64_t{1} << 31;
  CHECK_REFUSED(plan({0, big}, nullptr, options), "would hold 2147483648 tokens");
  CHECK(plan({0, big - 1, 2 * (big - 1)}, nullptr, options).num_batches() == 2);
  const Ints completions{0, 1, 2};
  options.num_generations = 2;
  options.share_prompts = true;
  CHECK_REFUSED(plan({0, big / 2}, &completions, options), "3221225474 keys");
  CHECK_REFUSED(plan({0, INT64_MAX}, &completions, options), "does not fit into 63 bits");
  options.multiple = 1000;
  const Ints one{0, big - 10};
  options.num_generations = 0;
  options.share_prompts = false;
  CHECK_REFUSED(plan(one, nullptr, options), "tokens and");
}

TEST(ranges_cover_everything_once) {
  std::mt19937 rng(3);
  for (int trial = 0; trial < 200; ++trial) {
    Ints before{0};
    const int64_t n = rng() % 40;
    for (int64_t i = 0; i < n; ++i) before.push_back(before.back() + rng() % 5);
    std::vector<int> seen(n, 0);
    r2ec::parallel_ranges(before, 1 + rng() % 9, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) ++seen[i];
    });
    CHECK(std::count(seen.begin(), seen.end(), 1) == n);
  }
}

TEST(an_exception_in_a_range_reaches_the_caller) {
  const Ints before{0, 1, 2, 3, 4};
  CHECK_REFUSED(r2ec::parallel_ranges(before, 4,
                                      [](int64_t first, int64_t) {
                                        if (first == 2) throw std::invalid_argument("range 2");
                                      }),
                "range 2");
}

int main() { return run_tests(); }
