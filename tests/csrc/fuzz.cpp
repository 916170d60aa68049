// Random calls of the packer and the assembler, most of them slightly or badly broken.
//
//   fuzz SECONDS [SEED]
//
// An own, plain check says beforehand whether a call is valid (128-bit arithmetic) and afterwards
// whether every token is where it belongs. A refused valid call, an accepted broken one, a wrong or
// unwritten token or any exception but std::invalid_argument ends the run with the seed of the
// call.
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <ctime>

#include "fuzz_assembler.hpp"
#include "fuzz_packer.hpp"

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 10;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  // processor time: on a busy machine a run does as much as on a free one
  const auto elapsed = [] { return static_cast<double>(std::clock()) / CLOCKS_PER_SEC; };
  Counts counts;
  uint64_t round = 0;
  for (; elapsed() < seconds; ++round) {
    current_seed = seed + round;
    Random r(current_seed * 0x9E3779B97F4A7C15ull + 1);
    const Tables tables = make_tables(r);
    const r2ec::Assembler assembler = make_assembler(tables);
    for (int i = 0; i < 200; ++i) {
      fuzz_pack(r, counts);
      fuzz_assemble(r, tables, assembler, counts);
    }
  }
  std::printf("fuzz: %.0f s of processor time, seeds %" PRIu64 "..%" PRIu64
              "\n"
              "packer: %" PRId64 " packed (%" PRId64 " batches, %" PRId64
              " tokens checked), %" PRId64 " planned only, %" PRId64
              " refused\n"
              "assembler: %" PRId64 " calls (%" PRId64 " prompts checked), %" PRId64
              " refused, %" PRId64 " writes refused\n",
              elapsed(), seed, seed + round - 1, counts.packed, counts.batches, counts.tokens,
              counts.planned_only, counts.pack_refused, counts.assembled, counts.prompts,
              counts.assemble_refused, counts.write_refused);
  const bool both = counts.packed > 0 && counts.pack_refused > 0 && counts.planned_only > 0 &&
                    counts.assembled > 0 && counts.assemble_refused > 0 && counts.write_refused > 0;
  if (!both) std::printf("the run was too short to reach every kind of call\n");
  return both ? 0 : 1;
}
