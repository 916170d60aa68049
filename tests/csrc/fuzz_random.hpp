// What both fuzzers share: random numbers, counts of what was tried, and the end of a run that
// found a bug.
#pragma once

#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

using Ints = std::vector<int64_t>;
using Wide = __int128;

namespace {

struct Counts {
  int64_t packed = 0, pack_refused = 0, planned_only = 0, assembled = 0, assemble_refused = 0;
  int64_t batches = 0, tokens = 0, prompts = 0, write_refused = 0;
};

uint64_t current_seed = 0;

[[noreturn]] void bug(const std::string& what) {
  std::printf("BUG at seed %" PRIu64 ": %s\n", current_seed, what.c_str());
  std::fflush(stdout);
  std::abort();
}

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t below(int64_t n) { return static_cast<int64_t>(engine_() % static_cast<uint64_t>(n)); }
  bool chance(int64_t one_in) { return below(one_in) == 0; }
  // Values that break arithmetic: the ends of int32 and int64, powers of two, small ones.
  int64_t nasty() {
    static const int64_t values[] = {INT64_MIN,
                                     INT64_MIN + 1,
                                     INT64_MAX,
                                     INT64_MAX - 1,
                                     INT32_MAX,
                                     int64_t{INT32_MAX} + 1,
                                     INT32_MIN,
                                     int64_t{1} << 32,
                                     int64_t{1} << 40,
                                     int64_t{1} << 62,
                                     -1,
                                     0,
                                     1,
                                     2,
                                     3,
                                     7};
    const int64_t value = values[below(16)];
    return chance(4) ? static_cast<int64_t>(engine_()) : value;
  }

 private:
  std::mt19937_64 engine_;
};

}  // namespace
