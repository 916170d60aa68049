// Random prompts. Each is put together a second time by plain code and compared token by token.
#pragma once

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "arrays.hpp"
#include "assembler.hpp"
#include "fuzz_random.hpp"

namespace {

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
