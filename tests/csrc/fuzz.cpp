// Random calls of the packer and the assembler, most of them slightly or badly broken.
//
//   fuzz SECONDS [SEED]
//
// An own, plain check says beforehand whether a call is valid (128-bit arithmetic) and afterwards
// whether every token is where it belongs. A refused valid call, an accepted broken one, a wrong or
// unwritten token or any exception but std::invalid_argument ends the run with the seed of the
// call.
#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "arrays.hpp"
#include "assembler.hpp"
#include "packer.hpp"

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

// ---- packer -------------------------------------------------------------------------------------

struct PackCase {
  Ints prompts, completions;
  int64_t num_prompt_values = 0, num_completion_values = 0;
  bool has_completions = false;
  r2ec::PackOptions options;
};

Ints rising(Random& r, int64_t rows, int64_t longest) {
  Ints out{0};
  for (int64_t i = 0; i < rows; ++i) out.push_back(out.back() + 1 + r.below(longest));
  return out;
}

void spoil(Random& r, Ints& offsets) {
  if (offsets.empty()) return;
  switch (r.below(8)) {
    case 0: offsets[r.below(offsets.size())] = r.nasty(); break;
    case 1: offsets.clear(); break;
    case 2: offsets.pop_back(); break;
    case 3: std::swap(offsets[r.below(offsets.size())], offsets[r.below(offsets.size())]); break;
    case 4: offsets.push_back(offsets.back()); break;
    case 5:
      for (auto& o : offsets) o += r.below(3) - 1;
      break;
    case 6: offsets.back() = int64_t{1} << (20 + r.below(43)); break;
    case 7: offsets[r.below(offsets.size())] += r.below(5) - 2; break;
  }
}

PackCase pack_case(Random& r) {
  PackCase c;
  const int64_t rows = r.below(r.chance(8) ? 200 : 12),
                longest = 1 + r.below(r.chance(8) ? 500 : 9);
  c.prompts = rising(r, rows, longest);
  c.has_completions = r.chance(2);
  auto& o = c.options;
  if (c.has_completions) {
    o.num_generations = 1 + r.below(4);
    o.share_prompts = r.chance(2);
    c.completions = rising(r, rows * o.num_generations, 1 + r.below(9));
  }
  o.max_tokens = r.chance(3) ? 1 + r.below(20) : 64 + r.below(r.chance(4) ? 3'000'000 : 2000);
  o.multiple = r.chance(2) ? 1 : 1 + r.below(std::min<int64_t>(o.max_tokens, 64));
  o.oversize_alone = !r.chance(3);
  if (r.chance(3)) spoil(r, c.prompts);
  if (c.has_completions && r.chance(4)) spoil(r, c.completions);
  c.num_prompt_values = c.prompts.empty() ? 0 : c.prompts.back();
  c.num_completion_values = c.completions.empty() ? 0 : c.completions.back();
  if (r.chance(16)) c.num_prompt_values = r.nasty();
  if (r.chance(16)) c.num_completion_values = r.nasty();
  if (r.chance(16)) o.max_tokens = r.nasty();
  if (r.chance(16)) o.multiple = r.nasty();
  if (r.chance(16)) o.num_generations = r.nasty();
  if (r.chance(16)) o.share_prompts = !o.share_prompts;
  return c;
}

bool offsets_valid(const Ints& offsets, int64_t num_values) {
  if (offsets.empty() || offsets[0] != 0 || offsets.back() != num_values) return false;
  for (size_t i = 0; i + 1 < offsets.size(); ++i)
    if (offsets[i + 1] <= offsets[i]) return false;
  return true;
}

// Valid by the definition alone; `exact` is false where only the batches decide (int32 limits).
bool pack_valid(const PackCase& c, bool& exact) {
  const auto& o = c.options;
  exact = true;
  if (o.max_tokens < 1 || o.max_tokens > INT32_MAX || o.multiple < 1 || o.multiple > o.max_tokens)
    return false;
  if (!offsets_valid(c.prompts, c.num_prompt_values)) return false;
  if (c.has_completions) {
    if (!offsets_valid(c.completions, c.num_completion_values)) return false;
    if (o.num_generations < 1 || o.num_generations > INT32_MAX) return false;
    if (Wide(c.prompts.size() - 1) * o.num_generations != Wide(c.completions.size() - 1))
      return false;
  } else if (o.num_generations != 0 || o.share_prompts) {
    return false;
  }
  const int64_t g = o.num_generations, capacity = o.max_tokens / o.multiple * o.multiple;
  for (size_t i = 0; i + 1 < c.prompts.size(); ++i) {
    const Wide p = Wide(c.prompts[i + 1]) - c.prompts[i];
    Wide tokens = p, keys = p;
    if (g > 0) {
      const Wide own = Wide(c.completions[(i + 1) * g]) - c.completions[i * g];
      keys = p * (o.share_prompts ? g + 1 : g) + own;
      tokens = o.share_prompts ? p + own : p * g + own;
    }
    if (!o.oversize_alone && tokens > capacity) return false;
    if (tokens + o.multiple > INT32_MAX || keys + o.multiple > INT32_MAX) exact = false;
    // several groups share a batch of at most `capacity` tokens, each of which may be a key g+1
    // times
    if (Wide(capacity) * (g + 1) > INT32_MAX) exact = false;
  }
  return true;
}

void check_batches(const PackCase& c, const r2ec::Plan& plan, const Arrays& a, const Ints& p_values,
                   const Ints& c_values, const Ints* targets) {
  const auto& s = plan.starts();
  const int64_t g = c.options.num_generations;
  const bool share = c.options.share_prompts;
  const int64_t capacity = c.options.max_tokens / c.options.multiple * c.options.multiple;
  std::vector<char> seen(c.prompts.size() - 1, 0);
  int64_t predicted = 0, readout = 0;
  for (int64_t b = 0; b < plan.num_batches(); ++b) {
    const int64_t base = s.tokens[b], length = s.tokens[b + 1] - base;
    if (length % c.options.multiple != 0) bug("a batch is not padded");
    if (length > capacity && s.groups[b + 1] - s.groups[b] != 1) bug("a batch is over the budget");
    const int32_t* cu_q = a.cu_q.get() + s.sequences[b] + b;
    const int32_t* cu_k = a.cu_k.get() + s.sequences[b] + b;
    const int64_t* kv = share ? a.kv_index.get() + s.keys[b] : nullptr;
    int64_t at = 0, sequence = 0, trajectory = 0;
    const auto key = [&](int64_t i) { return kv == nullptr ? i : kv[i]; };
    const auto token = [&](int64_t i) { return a.input_ids[base + i]; };
    // The sequence at `at` holds `own` tokens and its keys spell out `expected`.
    const auto sequence_is = [&](int64_t own, const Ints& expected) {
      if (cu_q[sequence] != at || cu_q[sequence + 1] != at + own) bug("cu_seq_lens_q");
      const int64_t keys = cu_k[sequence + 1] - cu_k[sequence];
      if (keys != static_cast<int64_t>(expected.size())) bug("cu_seq_lens_k");
      for (int64_t i = 0; i < keys; ++i)
        if (token(key(cu_k[sequence] + i)) != expected[i]) bug("a key is not its token");
      for (int64_t i = 0; i < own; ++i) {
        if (a.position_ids[base + at + i] != keys - own + i) bug("position_ids");
        if (a.seq_idx[base + at + i] != sequence) bug("seq_idx");
        if (key(cu_k[sequence] + keys - own + i) != at + i) bug("own keys");
      }
      at += own;
      ++sequence;
    };
    for (int64_t i = s.groups[b]; i < s.groups[b + 1]; ++i) {
      const int64_t group = plan.groups()[i];
      if (seen.at(group)++) bug("a group is packed twice");
      const Ints prompt(p_values.begin() + c.prompts[group],
                        p_values.begin() + c.prompts[group + 1]);
      const int64_t prefix_end = at + static_cast<int64_t>(prompt.size()) - 1;
      if (g == 0 || share) sequence_is(prompt.size(), prompt);
      if (g == 0 && a.readout[readout++] != at - 1) bug("readout");
      for (int64_t row = group * g; row < (group + 1) * g; ++row) {
        const int64_t first = c.completions[row], r = c.completions[row + 1] - first;
        Ints whole = prompt;
        whole.insert(whole.end(), c_values.begin() + first, c_values.begin() + first + r);
        int64_t before = share ? prefix_end : at + static_cast<int64_t>(prompt.size()) - 1;
        sequence_is(share ? r : static_cast<int64_t>(whole.size()), whole);
        for (int64_t t = 0; t < r; ++t, ++predicted) {
          if (a.predict_from[predicted] != before) bug("predict_from");
          before = at - r + t;
          const int64_t wanted = targets == nullptr ? c_values[first + t] : (*targets)[first + t];
          if (a.targets[predicted] != wanted) bug("targets");
          if (a.trajectory[predicted] != trajectory) bug("trajectory");
          if (a.source[predicted] != first + t) bug("source");
        }
        ++trajectory;
        if (a.readout[readout++] != at - 1) bug("readout");
      }
    }
    if (plan.num_tokens()[b] != at) bug("num_tokens");
    if (at < length) sequence_is(length - at, Ints(length - at, 0));
    if (at != length || sequence != s.sequences[b + 1] - s.sequences[b])
      bug("a batch is cut short");
  }
  if (std::count(seen.begin(), seen.end(), 1) != static_cast<int64_t>(seen.size()))
    bug("a group is missing");
  if (predicted != (g > 0 ? c.completions.back() : 0)) bug("completion tokens are missing");
}

void fuzz_pack(Random& r, Counts& counts) {
  const PackCase c = pack_case(r);
  bool exact = true;
  const bool valid = pack_valid(c, exact);
  try {
    const r2ec::Offsets prompts{c.prompts.data(), static_cast<int64_t>(c.prompts.size()),
                                c.num_prompt_values};
    const r2ec::Offsets completions{
        c.completions.data(), static_cast<int64_t>(c.completions.size()), c.num_completion_values};
    const r2ec::Plan plan(prompts, c.has_completions ? &completions : nullptr, c.options);
    if (!valid) bug("a broken packing call was accepted");
    counts.batches += plan.num_batches();
    if (plan.starts().tokens.back() > 200'000 || plan.starts().keys.back() > 400'000 ||
        c.prompts.back() > 200'000) {
      ++counts.planned_only;
      return;
    }
    ++counts.packed;
    counts.tokens += plan.starts().tokens.back();
    // never 0, which the tail holds
    Ints p_values(c.prompts.back()), c_values(c.has_completions ? c.completions.back() : 0);
    for (auto& v : p_values) v = 1 + r.below(100'000);
    for (auto& v : c_values) v = 1 + r.below(100'000);
    Ints targets = c_values;
    for (auto& t : targets) t = r.chance(4) ? r2ec::kIgnore : t;
    const bool use_targets = r.chance(2);
    Arrays a(plan, c.options.share_prompts, r.chance(2) && !c.options.share_prompts);
    const int64_t* wanted = use_targets ? targets.data() : nullptr;
    if (r.chance(2)) {
      const std::vector<int32_t> narrow(p_values.begin(), p_values.end());
      plan.fill(narrow.data(), c_values.data(), wanted, a.out, 1 + r.below(4));
    } else {
      plan.fill(p_values.data(), c_values.data(), wanted, a.out, 1 + r.below(4));
    }
    check_batches(c, plan, a, p_values, c_values, use_targets ? &targets : nullptr);
  } catch (const std::invalid_argument& error) {
    if (valid && exact) bug(std::string("a valid packing call was refused: ") + error.what());
    ++counts.pack_refused;
  }
}

// ---- assembler ----------------------------------------------------------------------------------

r2ec::SegmentTable table(Random& r, int64_t size, int64_t longest) {
  r2ec::SegmentTable out;
  out.offsets.push_back(0);
  for (int64_t i = 0; i < size; ++i) {
    const int64_t length = r.below(longest + 1);
    for (int64_t j = 0; j < length; ++j)
      out.values.push_back(static_cast<int32_t>(r.below(1 << 20)));
    out.offsets.push_back(static_cast<int64_t>(out.values.size()));
  }
  return out;
}

void put(const r2ec::SegmentTable& t, int64_t i, Ints& out) {
  out.insert(out.end(), t.values.begin() + t.offsets[i], t.values.begin() + t.offsets[i + 1]);
}

struct Tables {
  std::vector<int32_t> head, bare, suffix;
  r2ec::SegmentTable rests, units, items[6], rating_newline, rating_closing;
  std::vector<bool> whole_text[6];
  std::vector<float> ratings;
  Ints within_unit, within_rest, day_rest;
  int64_t num_items, window, max_tokens, max_days;
};

Tables make_tables(Random& r) {
  Tables t;
  t.num_items = 1 + r.below(6);
  t.window = 1 + r.below(6);
  t.max_tokens = 3 + r.below(40);
  t.max_days = r.below(30);
  t.head.assign(r.below(4), 5);
  t.bare.assign(r.below(4), 6);
  t.suffix.assign(r.below(3), 7);
  t.rests = table(r, 3, 3);
  t.units = table(r, r2ec::kHours + 1 + r.below(40), 2);
  for (int i = 0; i < 6; ++i) {
    t.items[i] = table(r, t.num_items, 6);
    t.whole_text[i].resize(t.num_items);
    for (int64_t j = 0; j < t.num_items; ++j) t.whole_text[i][j] = r.chance(12);
  }
  t.ratings = {-2.5f, 1.0f, 4.5f};
  t.rating_newline = table(r, 3, 3);
  t.rating_closing = table(r, 3, 3);
  for (int64_t s = 0; s < r2ec::kSecondsPerDay; ++s) {
    t.within_unit.push_back(s % (r2ec::kHours + 1) - 1);
    t.within_rest.push_back(s % 3);
    t.day_rest.push_back((s + 1) % 3);
  }
  return t;
}

r2ec::Assembler make_assembler(const Tables& t) {
  r2ec::Assembler a(t.head, t.bare, t.suffix, t.num_items, t.window, t.max_tokens, t.max_days);
  a.set_ages(t.rests, t.within_unit, t.within_rest, t.day_rest);
  a.set_units(t.units);
  for (int i = 0; i < 6; ++i) a.set_items(i >= 3, i % 3, t.items[i], t.whole_text[i]);
  a.set_ratings(t.ratings, t.rating_newline, t.rating_closing);
  return a;
}

struct Events {
  Ints item, timestamp, first, last, target;
  std::vector<float> rating;
  bool timed, rated;
};

Events make_events(Random& r, const Tables& t) {
  Events e;
  const int64_t n = r.below(30), rows = r.below(8);
  e.timed = r.chance(2);
  e.rated = r.chance(2);
  for (int64_t i = 0; i < n; ++i) {
    e.item.push_back(r.chance(200) ? r.nasty() : r.below(t.num_items));
    e.timestamp.push_back(r.chance(100) ? r.nasty() : r.below(r.chance(3) ? 4'000'000 : 90'000));
    e.rating.push_back(r.chance(3) ? NAN : r.chance(50) ? -0.0f : t.ratings[r.below(3)]);
  }
  for (int64_t x = 0; x < rows; ++x) {
    const int64_t a = n == 0 ? 0 : r.below(n), b = n == 0 ? 0 : r.below(n + 1);
    e.first.push_back(r.chance(60) ? r.nasty() : std::min(a, b));
    e.last.push_back(r.chance(60) ? r.nasty() : std::max(a + (r.chance(20) ? 0 : 1), b));
    e.target.push_back(r.chance(8)    ? r2ec::kNoTime
                       : r.chance(60) ? r.nasty()
                                      : 4'000'000 + r.below(100'000));
  }
  return e;
}

// 0: fine, 1: refuse, 2: whole text
int expected_prompt(const Tables& t, const Events& e, int64_t x, Ints& out) {
  const int64_t n = static_cast<int64_t>(e.item.size());
  if (e.first[x] < 0 || e.last[x] > n || e.first[x] >= e.last[x]) return 1;
  const bool timed = e.timed && e.target[x] != r2ec::kNoTime;
  std::vector<Ints> lines;
  bool whole = false;
  for (int64_t i = std::max(e.first[x], e.last[x] - t.window); i < e.last[x]; ++i) {
    if (e.item[i] < 0 || e.item[i] >= t.num_items) return 1;
    if (timed && e.timestamp[i] > e.target[x]) return 1;
  }
  for (int64_t i = std::max(e.first[x], e.last[x] - t.window); i < e.last[x]; ++i) {
    Ints line;
    if (timed) {
      const Wide age = Wide(e.target[x]) - e.timestamp[i];
      const Wide day = age / r2ec::kSecondsPerDay;
      if (age > INT64_MAX || day >= t.max_days) {
        whole = true;
        continue;
      }
      const int64_t second = static_cast<int64_t>(age % r2ec::kSecondsPerDay);
      const int64_t unit =
          day == 0 ? t.within_unit[second] : r2ec::kHours + static_cast<int64_t>(day);
      if (unit >= t.units.size()) {
        whole = true;  // reported as missing; the caller would add it
        continue;
      }
      if (unit >= 0) put(t.units, unit, line);
      put(t.rests, day == 0 ? t.within_rest[second] : t.day_rest[second], line);
    }
    const bool newest = i + 1 == e.last[x];
    const bool rated = e.rated && !std::isnan(e.rating[i]);
    if (rated && e.rating[i] == 0.0f) whole = true;
    const int items = (timed ? 3 : 0) + (rated ? 0 : newest ? 2 : 1);
    whole = whole || t.whole_text[items][e.item[i]];
    put(t.items[items], e.item[i], line);
    if (rated && e.rating[i] != 0.0f) {
      const auto at = std::find(t.ratings.begin(), t.ratings.end(), e.rating[i]);
      put(newest ? t.rating_closing : t.rating_newline, at - t.ratings.begin(), line);
    }
    lines.push_back(line);
  }
  if (whole) return 2;
  size_t kept = 0, tokens = t.head.size();
  while (kept < lines.size() &&
         tokens + lines[lines.size() - 1 - kept].size() <= static_cast<size_t>(t.max_tokens))
    tokens += lines[lines.size() - 1 - kept++].size();
  out.assign(t.head.begin(), t.head.end());
  if (kept == 0) out.assign(t.bare.begin(), t.bare.end());
  for (size_t i = lines.size() - kept; i < lines.size(); ++i)
    out.insert(out.end(), lines[i].begin(), lines[i].end());
  out.insert(out.end(), t.suffix.begin(), t.suffix.end());
  return 0;
}

void fuzz_assemble(Random& r, const Tables& t, const r2ec::Assembler& a, Counts& counts) {
  const Events e = make_events(r, t);
  const int64_t rows = static_cast<int64_t>(e.first.size());
  const r2ec::Histories h{e.item.data(),
                          e.timed ? e.timestamp.data() : nullptr,
                          e.rated ? e.rating.data() : nullptr,
                          static_cast<int64_t>(e.item.size()),
                          e.first.data(),
                          e.last.data(),
                          e.timed ? e.target.data() : nullptr,
                          rows};
  std::vector<Ints> expected(rows);
  Ints kind(rows);
  bool valid = true;
  for (int64_t x = 0; x < rows; ++x) {
    kind[x] = expected_prompt(t, e, x, expected[x]);
    valid = valid && kind[x] != 1;
  }
  r2ec::Measured measured;
  try {
    measured = a.measure(h, 1 + r.below(3));
    if (!valid) bug("broken histories were accepted");
  } catch (const std::invalid_argument& error) {
    if (valid) bug(std::string("valid histories were refused: ") + error.what());
    ++counts.assemble_refused;
    return;
  }
  Ints offsets{0};
  for (int64_t x = 0; x < rows; ++x) {
    if ((measured.lines[x] < 0) != (kind[x] == 2)) bug("whole-text prompts differ");
    const int64_t n = kind[x] == 2 ? r.below(3) : static_cast<int64_t>(expected[x].size());
    if (kind[x] == 0 && measured.length[x] != n) bug("a prompt has another length");
    offsets.push_back(offsets.back() + n);
  }
  const auto out = poisoned<int64_t>(offsets.back());
  a.write(h, measured.lines, offsets, out.get(), 1 + r.below(3));
  for (int64_t x = 0; x < rows; ++x)
    for (int64_t i = 0; i < offsets[x + 1] - offsets[x]; ++i)
      if (out[offsets[x] + i] != (kind[x] == 2 ? -7777777 : expected[x][i]))
        bug("a token is wrong");
  counts.prompts += rows;
  ++counts.assembled;
  if (rows == 0) return;
  Ints wrong = measured.lines;
  int64_t& spoiled = wrong[r.below(rows)];
  spoiled = spoiled < 0 ? spoiled : spoiled + 1 + r.below(40);
  try {
    a.write(h, wrong, offsets, out.get(), 1);
    // a line of no tokens more is no harm
  } catch (const std::invalid_argument&) {
    ++counts.write_refused;
  }
}

}  // namespace

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
