// Random packing calls. Valid or not by the definition alone; of a packed one, every token,
// position, key and target is looked up again.
#pragma once

#include <algorithm>
#include <stdexcept>

#include "arrays.hpp"
#include "fuzz_random.hpp"
#include "packer.hpp"

namespace {

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

}  // namespace
