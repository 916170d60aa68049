#include "assembler.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "parallel.hpp"

namespace r2ec {
namespace {

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

std::string str(int64_t value) { return std::to_string(value); }

void check_table(const SegmentTable& table, int64_t size, const char* name) {
  const std::string where(name);
  if (table.size() != size)
    fail(where + ": expected " + str(size) + " segments, got " + str(table.size()));
  if (size == 0) return;
  if (table.offsets.front() != 0 ||
      table.offsets.back() != static_cast<int64_t>(table.values.size()))
    fail(where + ": offsets must run from 0 to the number of values");
  for (int64_t i = 0; i < size; ++i)
    if (table.offsets[i + 1] < table.offsets[i])
      fail(where + ": offsets must not fall, got " + str(table.offsets[i]) + " then " +
           str(table.offsets[i + 1]));
}

void check_seconds(const std::vector<int64_t>& segment_of_second, int64_t least, int64_t size,
                   const char* name) {
  const std::string where(name);
  if (static_cast<int64_t>(segment_of_second.size()) != kSecondsPerDay)
    fail(where + ": expected one segment for each of 86400 seconds");
  for (const int64_t segment : segment_of_second)
    if (segment < least || segment >= size)
      fail(where + ": segment " + str(segment) + " is outside " + str(least) + ".." +
           str(size - 1));
}

int64_t* append(const SegmentTable& table, int64_t i, int64_t* out) {
  return std::copy(table.values.data() + table.offsets[i],
                   table.values.data() + table.offsets[i + 1], out);
}

// Every prompt counts the lines it may show, plus one.
std::vector<int64_t> work_before(const Histories& histories, int64_t window) {
  std::vector<int64_t> before(histories.size + 1, 0);
  for (int64_t x = 0; x < histories.size; ++x)
    before[x + 1] = before[x] + 1 + std::min(window, histories.last[x] - histories.first[x]);
  return before;
}

}  // namespace

Assembler::Assembler(std::vector<int32_t> head, std::vector<int32_t> bare,
                     std::vector<int32_t> suffix, int64_t num_items, int64_t window,
                     int64_t max_tokens, int64_t max_days)
    : head_(std::move(head)),
      bare_(std::move(bare)),
      suffix_(std::move(suffix)),
      num_items_(num_items),
      window_(window),
      max_tokens_(max_tokens),
      max_days_(max_days) {
  if (num_items < 1 || window < 1 || max_tokens < 1 || max_days < 0)
    fail("num_items, window and max_tokens must be at least 1, max_days at least 0");
  if (static_cast<int64_t>(bare_.size()) > max_tokens)
    fail("max_tokens is " + str(max_tokens) + ", but the bare prompt has " +
         str(static_cast<int64_t>(bare_.size())) + " tokens");
}

void Assembler::set_ages(SegmentTable rests, std::vector<int64_t> within_unit,
                         std::vector<int64_t> within_rest, std::vector<int64_t> day_rest) {
  check_table(rests, rests.size(), "rests");
  check_seconds(within_unit, -1, kHours, "within_unit");
  check_seconds(within_rest, 0, rests.size(), "within_rest");
  check_seconds(day_rest, 0, rests.size(), "day_rest");
  rests_ = std::move(rests);
  within_unit_ = std::move(within_unit);
  within_rest_ = std::move(within_rest);
  day_rest_ = std::move(day_rest);
}

void Assembler::set_units(SegmentTable units) {
  check_table(units, units.size(), "units");
  units_ = std::move(units);
}

void Assembler::clear_items() {
  for (auto& items : items_) items = SegmentTable();
}

void Assembler::set_items(bool has_age, int ending, SegmentTable items,
                          const std::vector<bool>& whole_text) {
  if (ending < kRating || ending > kClosing) fail("ending must be 0, 1 or 2, got " + str(ending));
  check_table(items, num_items_, "items");
  if (static_cast<int64_t>(whole_text.size()) != num_items_)
    fail("whole_text: expected one entry an item");
  const int at = (has_age ? 3 : 0) + ending;
  items_[at] = std::move(items);
  whole_text_[at] = whole_text;
}

void Assembler::set_ratings(std::vector<float> values, SegmentTable newline, SegmentTable closing) {
  const int64_t size = static_cast<int64_t>(values.size());
  check_table(newline, size, "newline");
  check_table(closing, size, "closing");
  if (!std::is_sorted(values.begin(), values.end()) ||
      std::any_of(values.begin(), values.end(), [](float v) { return std::isnan(v); }))
    fail("values: ratings must be sorted numbers");
  rating_values_ = std::move(values);
  ratings_[0] = std::move(newline);
  ratings_[1] = std::move(closing);
}

void Assembler::check(const Histories& h) const {
  for (int64_t x = 0; x < h.size; ++x) {
    if (h.first[x] < 0 || h.last[x] > h.num_events || h.first[x] > h.last[x])
      fail("history " + str(x) + ": events " + str(h.first[x]) + ".." + str(h.last[x]) +
           " are not a slice of the " + str(h.num_events) + " events");
    if (h.first[x] == h.last[x])
      fail("history " + str(x) + " is empty: a prompt needs at least one event");
    const bool timed =
        h.timestamp != nullptr && h.target_time != nullptr && h.target_time[x] != kNoTime;
    for (int64_t e = std::max(h.first[x], h.last[x] - window_); e < h.last[x]; ++e) {
      if (h.item[e] < 0 || h.item[e] >= num_items_)
        fail("history " + str(x) + ": item " + str(h.item[e]) + " is outside 0.." +
             str(num_items_ - 1));
      if (timed && h.timestamp[e] > h.target_time[x])
        fail("history " + str(x) + ": an event at " + str(h.timestamp[e]) +
             " lies after the target's time " + str(h.target_time[x]));
    }
  }
}

// measure() and write() are two calls: what check() and measure() saw is looked at again.
Assembler::Found Assembler::find(const Histories& h, int64_t x, int64_t e, Line& line,
                                 Missing* missing) const {
  Found found = Found::kLine;
  line = Line();
  line.item = h.item[e];
  if (line.item < 0 || line.item >= num_items_) return Found::kWholeText;
  if (h.timestamp != nullptr && h.target_time != nullptr && h.target_time[x] != kNoTime) {
    int64_t age = 0;
    if (__builtin_sub_overflow(h.target_time[x], h.timestamp[e], &age) || age < 0)
      return Found::kWholeText;
    const int64_t second = age % kSecondsPerDay, day = age / kSecondsPerDay;
    if (within_rest_.empty() || day >= max_days_) return Found::kWholeText;
    line.unit = day == 0 ? within_unit_[second] : kHours + day;
    line.rest = day == 0 ? within_rest_[second] : day_rest_[second];
    if (line.unit >= units_.size()) {
      found = Found::kMissing;
      if (missing != nullptr) missing->units = std::max(missing->units, line.unit + 1);
    }
  }
  const bool newest = e + 1 == h.last[x];
  line.ending = newest ? kClosing : kNewline;
  const float rating = h.rating == nullptr ? NAN : h.rating[e];
  if (rating == 0.0f && std::signbit(rating)) return Found::kWholeText;  // reads "-0.0"
  if (!std::isnan(rating)) {
    const auto at = std::lower_bound(rating_values_.begin(), rating_values_.end(), rating);
    if (at == rating_values_.end() || *at != rating) {
      found = Found::kMissing;
      if (missing != nullptr) missing->ratings.push_back(rating);
    }
    line.rating = at - rating_values_.begin();
  }
  const int table = line.item_table();
  if (items_[table].offsets.empty()) {
    found = Found::kMissing;
    if (missing != nullptr) missing->item_tables |= 1u << table;
  } else if (whole_text_[table][line.item] && found == Found::kLine) {
    found = Found::kWholeText;
  }
  return found;
}

int64_t Assembler::length(const Line& line) const {
  int64_t sum = items_[line.item_table()].length(line.item);
  if (line.unit >= 0) sum += units_.length(line.unit);
  if (line.rest >= 0) sum += rests_.length(line.rest);
  if (line.rating >= 0) sum += ratings_[line.ending == kClosing].length(line.rating);
  return sum;
}

int64_t* Assembler::append(const Line& line, int64_t* out) const {
  if (line.unit >= 0) out = r2ec::append(units_, line.unit, out);
  if (line.rest >= 0) out = r2ec::append(rests_, line.rest, out);
  out = r2ec::append(items_[line.item_table()], line.item, out);
  if (line.rating >= 0) out = r2ec::append(ratings_[line.ending == kClosing], line.rating, out);
  return out;
}

void Assembler::measure_range(const Histories& h, int64_t first, int64_t last, Measured& out,
                              Missing& missing) const {
  const int64_t head = static_cast<int64_t>(head_.size());
  for (int64_t x = first; x < last; ++x) {
    int64_t tokens = head, lines = 0;
    bool whole = false, full = false;
    // Lines that no longer fit are looked at too: what counts as clean must not depend on the
    // budget.
    for (int64_t e = h.last[x] - 1; e >= std::max(h.first[x], h.last[x] - window_); --e) {
      Line line;
      const Found found = find(h, x, e, line, &missing);
      whole |= found != Found::kLine;
      if (whole || full) continue;
      const int64_t more = length(line);
      full = tokens + more > max_tokens_;
      if (full) continue;
      tokens += more;
      ++lines;
    }
    out.lines[x] = whole ? -1 : lines;
    out.length[x] = whole ? -1
                          : (lines == 0 ? static_cast<int64_t>(bare_.size()) : tokens) +
                                static_cast<int64_t>(suffix_.size());
  }
}

Measured Assembler::measure(const Histories& histories, int64_t threads) const {
  check(histories);
  Measured out;
  out.length.assign(histories.size, -1);
  out.lines.assign(histories.size, -1);
  std::mutex lock;
  parallel_ranges(work_before(histories, window_), threads, [&](int64_t first, int64_t last) {
    Missing missing;
    measure_range(histories, first, last, out, missing);
    std::sort(missing.ratings.begin(), missing.ratings.end());
    missing.ratings.erase(std::unique(missing.ratings.begin(), missing.ratings.end()),
                          missing.ratings.end());
    const std::lock_guard<std::mutex> guard(lock);
    out.missing.item_tables |= missing.item_tables;
    out.missing.units = std::max(out.missing.units, missing.units);
    out.missing.ratings.insert(out.missing.ratings.end(), missing.ratings.begin(),
                               missing.ratings.end());
  });
  auto& ratings = out.missing.ratings;
  std::sort(ratings.begin(), ratings.end());
  ratings.erase(std::unique(ratings.begin(), ratings.end()), ratings.end());
  return out;
}

void Assembler::write(const Histories& h, const std::vector<int64_t>& lines,
                      const std::vector<int64_t>& offsets, int64_t* out, int64_t threads) const {
  if (static_cast<int64_t>(lines.size()) != h.size ||
      static_cast<int64_t>(offsets.size()) != h.size + 1)
    fail("lines and offsets must match the histories");
  check(h);
  std::atomic<bool> changed{false};
  parallel_ranges(work_before(h, window_), threads, [&](int64_t first, int64_t last) {
    std::vector<Line> kept;
    for (int64_t x = first; x < last; ++x) {
      if (lines[x] < 0) continue;
      kept.clear();
      int64_t tokens = static_cast<int64_t>((lines[x] == 0 ? bare_ : head_).size());
      bool clean = lines[x] <= h.last[x] - h.first[x];
      for (int64_t e = h.last[x] - lines[x]; clean && e < h.last[x]; ++e) {
        Line line;
        clean = find(h, x, e, line, nullptr) == Found::kLine;
        if (!clean) break;
        tokens += length(line);
        kept.push_back(line);
      }
      tokens += static_cast<int64_t>(suffix_.size());
      if (!clean || tokens != offsets[x + 1] - offsets[x]) {
        changed = true;
        continue;
      }
      const auto& start = lines[x] == 0 ? bare_ : head_;
      int64_t* to = std::copy(start.begin(), start.end(), out + offsets[x]);
      for (const Line& line : kept) to = append(line, to);
      std::copy(suffix_.begin(), suffix_.end(), to);
    }
  });
  if (changed) fail("the histories changed while they were assembled");
}

}  // namespace r2ec
