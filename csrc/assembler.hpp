// User prompts put together from token segments that were tokenised once. No Python in here.
//
// In: tables of segments (ragged int32 rows) and histories as slices of event arrays. Out: ragged
// int64 prompts.
//
//   prompt   | head | line | line | ... | line | suffix |
//                     oldest              newest
//   line     | unit | rest | item | rating |
//
// Unit and rest are the age of the event, where it has one ("3d" and what follows it); the rating
// is left out where there is none. The newest line ends with the text that closes the prompt. As
// many of the newest lines are kept as fit into max_tokens beside the head (the suffix comes on
// top); with none the prompt is `bare`. r2ec_fast/assembler.py says which texts the segments hold.
//
// Two calls, so that the caller allocates exact sizes: measure() walks each history from the newest
// event back, adds up segment lengths until the budget is full, and lists segments that the tables
// lack; write() copies them. Work: O(window) look-ups for each prompt in measure(), and again in
// write() with one copy of each token; no text is read. Prompts are independent: threads take
// ranges of about equal work, and results do not depend on their number. Where a text does not
// tokenise the same in parts as in one piece, the prompt is reported (-1) and the caller tokenises
// it whole.
#pragma once

#include <cstdint>
#include <vector>

namespace r2ec {

constexpr int64_t kNoTime = INT64_MIN;
constexpr int64_t kSecondsPerDay = 86400;
constexpr int64_t kHours = 24;

// Segment i is values[offsets[i] : offsets[i + 1]]. A table never built has no offsets.
struct SegmentTable {
  std::vector<int64_t> offsets;
  std::vector<int32_t> values;

  int64_t size() const { return offsets.empty() ? 0 : static_cast<int64_t>(offsets.size()) - 1; }
  int64_t length(int64_t i) const { return offsets[i + 1] - offsets[i]; }
};

// What follows an item or a rating on its line.
enum Ending { kRating = 0, kNewline = 1, kClosing = 2 };

// Histories as slices of event arrays: prompt x shows events first[x]..last[x]-1, oldest first.
// timestamp, rating and target_time may be null; target_time kNoTime and rating NaN mean "none".
struct Histories {
  const int64_t* item;
  const int64_t* timestamp;
  const float* rating;
  int64_t num_events;
  const int64_t* first;
  const int64_t* last;
  const int64_t* target_time;
  int64_t size;
};

// Segments that a call would need and the tables lack.
struct Missing {
  uint32_t item_tables = 0;  // bit has_age * 3 + ending
  std::vector<float> ratings;
  int64_t units = 0;  // the table of units must reach this size
  bool any() const { return item_tables != 0 || !ratings.empty() || units != 0; }
};

struct Measured {
  std::vector<int64_t> length;  // tokens of each prompt; -1: tokenise its whole text instead
  std::vector<int64_t> lines;   // newest lines it keeps
  Missing missing;              // if any, length and lines do not count
};

class Assembler {
 public:
  // Ages of `max_days` days or more take the whole text.
  Assembler(std::vector<int32_t> head, std::vector<int32_t> bare, std::vector<int32_t> suffix,
            int64_t num_items, int64_t window, int64_t max_tokens, int64_t max_days);

  // An age below one day: unit within_unit[second] (-1: none) and rest within_rest[second]; one of
  // d days: unit kHours + d and rest day_rest[second of the day].
  void set_ages(SegmentTable rests, std::vector<int64_t> within_unit,
                std::vector<int64_t> within_rest, std::vector<int64_t> day_rest);
  // "0h" .. "23h", "0d", "1d", ...
  void set_units(SegmentTable units);
  // `whole_text[i]`: item i does not assemble cleanly, its prompts take the whole text.
  void set_items(bool has_age, int ending, SegmentTable items, const std::vector<bool>& whole_text);
  void clear_items();
  // Two segments a rating: followed by a new line, and by the closing text.
  void set_ratings(std::vector<float> values, SegmentTable newline, SegmentTable closing);

  // Throws std::invalid_argument for an empty history, an unknown item or an event after its
  // target.
  Measured measure(const Histories& histories, int64_t threads) const;

  // Writes prompt x to out[offsets[x] : offsets[x + 1]] where lines[x] >= 0, and nothing elsewhere.
  // Throws if a length is not what measure() found: the arrays have been changed since.
  void write(const Histories& histories, const std::vector<int64_t>& lines,
             const std::vector<int64_t>& offsets, int64_t* out, int64_t threads) const;

 private:
  struct Line {
    int64_t unit = -1, rest = -1, item = -1, rating = -1;
    int ending = kClosing;

    int item_table() const { return (rest >= 0 ? 3 : 0) + (rating >= 0 ? int{kRating} : ending); }
  };
  enum class Found { kLine, kWholeText, kMissing };

  void check(const Histories& histories) const;
  Found find(const Histories& histories, int64_t prompt, int64_t event, Line& line,
             Missing* missing) const;
  int64_t length(const Line& line) const;
  int64_t* append(const Line& line, int64_t* out) const;
  void measure_range(const Histories& histories, int64_t first, int64_t last, Measured& out,
                     Missing& missing) const;

  std::vector<int32_t> head_, bare_, suffix_;
  int64_t num_items_, window_, max_tokens_, max_days_;
  SegmentTable rests_, units_;
  std::vector<int64_t> within_unit_, within_rest_, day_rest_;
  SegmentTable items_[6];
  std::vector<bool> whole_text_[6];
  std::vector<float> rating_values_;
  SegmentTable ratings_[2];
};

}  // namespace r2ec
