// Static splitting of independent work over threads: the result cannot depend on their number.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

namespace r2ec {

constexpr int64_t kMaxThreads = 256;

// Calls work(first, last) for consecutive ranges that cover 0..n-1, of about equal weight; `before`
// has n + 1 entries, the weight of everything before each index. Rethrows the first range's
// exception after all have ended.
template <typename Work>
void parallel_ranges(const std::vector<int64_t>& before, int64_t threads, const Work& work) {
  const int64_t n = static_cast<int64_t>(before.size()) - 1;
  const int64_t parts = std::max<int64_t>(1, std::min({threads, n, kMaxThreads}));
  if (parts == 1) {
    if (n > 0) work(int64_t{0}, n);
    return;
  }
  std::vector<int64_t> cut(parts + 1, n);
  cut[0] = 0;
  for (int64_t i = 1; i < parts; ++i) {
    const int64_t weight = before[n] / parts * i;
    cut[i] =
        std::lower_bound(before.begin() + cut[i - 1], before.end() - 1, weight) - before.begin();
  }
  std::vector<std::exception_ptr> thrown(parts);
  const auto guarded = [&](int64_t i) {
    try {
      work(cut[i], cut[i + 1]);
    } catch (...) {
      thrown[i] = std::current_exception();
    }
  };
  std::vector<std::thread> running;
  running.reserve(parts - 1);
  int64_t started = 1;
  try {
    for (; started < parts; ++started) running.emplace_back(guarded, started);
  } catch (const std::system_error&) {
    // The system grants no more threads: this one does what is left.
  }
  guarded(0);
  for (int64_t i = started; i < parts; ++i) guarded(i);
  for (auto& thread : running) thread.join();
  for (const auto& error : thrown)
    if (error) std::rethrow_exception(error);
}

}  // namespace r2ec
