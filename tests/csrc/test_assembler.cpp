#include <cmath>
#include <vector>

#include "assembler.hpp"
#include "check.hpp"

using r2ec::Assembler;
using r2ec::Histories;
using r2ec::SegmentTable;
using Ints = std::vector<int64_t>;

namespace {

// Segment i of `size`: `length` copies of base + i.
SegmentTable table(int64_t size, int64_t length, int32_t base) {
  SegmentTable out;
  out.offsets.push_back(0);
  for (int64_t i = 0; i < size; ++i) {
    for (int64_t j = 0; j < length; ++j) out.values.push_back(base + static_cast<int32_t>(i));
    out.offsets.push_back(static_cast<int64_t>(out.values.size()));
  }
  return out;
}

struct Events {
  Ints item, timestamp, first, last, target;
  std::vector<float> rating;

  Histories view() const {
    return {item.data(),
            timestamp.empty() ? nullptr : timestamp.data(),
            rating.empty() ? nullptr : rating.data(),
            static_cast<int64_t>(item.size()),
            first.data(),
            last.data(),
            target.empty() ? nullptr : target.data(),
            static_cast<int64_t>(first.size())};
  }
};

// 3 items: tokens 100.. before a rating, 200.. a new line, 300.. the closing; +30 behind an age.
Assembler make(int64_t window = 3, int64_t max_tokens = 100) {
  Assembler a({1, 2}, {9}, {77}, 3, window, max_tokens, 1000);
  for (const bool age : {false, true})
    for (int ending = 0; ending < 3; ++ending)
      a.set_items(age, ending, table(3, 2, 100 * (ending + 1) + (age ? 30 : 0)), {0, 0, 0});
  Ints unit(r2ec::kSecondsPerDay, -1), rest(r2ec::kSecondsPerDay, 0), day(r2ec::kSecondsPerDay, 1);
  unit[7200] = 2;
  a.set_ages(table(2, 1, 500), unit, rest, day);
  a.set_units(table(r2ec::kHours + 10, 1, 1000));
  a.set_ratings({1.0f, 4.5f}, table(2, 1, 600), table(2, 1, 700));
  return a;
}

Ints assemble(const Assembler& a, const Events& events, int64_t threads = 1) {
  const auto measured = a.measure(events.view(), threads);
  CHECK(!measured.missing.any());
  Ints offsets{0};
  for (const int64_t n : measured.length)
    offsets.push_back(offsets.back() + std::max<int64_t>(n, 0));
  Ints out(offsets.back(), -5);
  a.write(events.view(), measured.lines, offsets, out.data(), threads);
  return out;
}

}  // namespace

TEST(lines_follow_one_another) {
  const Events plain{{0, 1, 2}, {}, {0}, {3}, {}, {}};
  CHECK(assemble(make(), plain) == (Ints{1, 2, 200, 200, 201, 201, 302, 302, 77}));
  const Events rated{{0, 1}, {}, {0}, {2}, {}, {4.5f, NAN}};
  CHECK(assemble(make(), rated) == (Ints{1, 2, 100, 100, 601, 301, 301, 77}));
  const Events closing{{1}, {}, {0}, {1}, {}, {1.0f}};
  CHECK(assemble(make(), closing) == (Ints{1, 2, 101, 101, 700, 77}));
}

TEST(ages_below_and_above_a_day) {
  const Events timed{{0, 1, 2}, {0, 86400 * 3 - 7200, 86400 * 3}, {0}, {3}, {86400 * 3}, {}};
  CHECK(assemble(make(), timed) ==
        (Ints{1, 2, 1027, 501, 230, 230, 1002, 500, 231, 231, 500, 332, 332, 77}));
  const Events untimed{{0}, {5}, {0}, {1}, {r2ec::kNoTime}, {}};
  CHECK(assemble(make(), untimed) == (Ints{1, 2, 300, 300, 77}));
}

TEST(the_oldest_lines_go_first) {
  const Events plain{{0, 1, 2}, {}, {0}, {3}, {}, {}};
  CHECK(assemble(make(3, 7), plain) == (Ints{1, 2, 201, 201, 302, 302, 77}));
  CHECK(assemble(make(3, 6), plain) == (Ints{1, 2, 201, 201, 302, 302, 77}));
  CHECK(assemble(make(3, 5), plain) == (Ints{1, 2, 302, 302, 77}));
  CHECK(assemble(make(1, 100), plain) == (Ints{1, 2, 302, 302, 77}));
  CHECK(assemble(make(3, 3), plain) == (Ints{9, 77}));
}

TEST(what_is_missing_is_listed) {
  Assembler a({1}, {9}, {}, 3, 3, 100, 1000);
  const Events events{{0, 1, 2}, {}, {0}, {3}, {}, {2.0f, 1.5f, 2.0f}};
  auto measured = a.measure(events.view(), 2);
  CHECK(measured.missing.item_tables == 1u);
  CHECK(measured.missing.ratings == (std::vector<float>{1.5f, 2.0f}));
  Assembler b = make();
  const Events old{{0}, {0}, {0}, {1}, {86400 * 500}, {}};
  CHECK(b.measure(old.view(), 1).missing.units == r2ec::kHours + 501);
  const Events older{{0}, {0}, {0}, {1}, {int64_t{86400} * 1000}, {}};
  measured = b.measure(older.view(), 1);
  CHECK(!measured.missing.any() && measured.lines == Ints{-1});
}

TEST(items_that_do_not_assemble_are_left_to_the_caller) {
  Assembler a = make();
  a.set_items(false, r2ec::kClosing, table(3, 2, 300), {0, 1, 0});
  const Events events{{0, 1, 2, 1}, {}, {0, 0, 0}, {1, 2, 3}, {}, {}};
  const auto measured = a.measure(events.view(), 1);
  CHECK(measured.lines == (Ints{1, -1, 3}));
  const Ints offsets{0, 5, 8, 17};
  Ints out(17, -5);
  a.write(events.view(), measured.lines, offsets, out.data(), 2);
  CHECK(out[5] == -5 && out[6] == -5 && out[7] == -5 && out[8] == 1 && out[16] == 77);
}

TEST(broken_histories_are_refused) {
  const Assembler a = make();
  const auto measure = [&](const Events& events) { a.measure(events.view(), 1); };
  CHECK_REFUSED(measure({{0}, {}, {0}, {2}, {}, {}}), "not a slice");
  CHECK_REFUSED(measure({{0}, {}, {-1}, {1}, {}, {}}), "not a slice");
  CHECK_REFUSED(measure({{0}, {}, {1}, {0}, {}, {}}), "not a slice");
  CHECK_REFUSED(measure({{0}, {}, {INT64_MIN}, {INT64_MAX}, {}, {}}), "not a slice");
  CHECK_REFUSED(measure({{0}, {}, {1}, {1}, {}, {}}), "is empty");
  CHECK_REFUSED(measure({{3}, {}, {0}, {1}, {}, {}}), "outside 0..2");
  CHECK_REFUSED(measure({{0}, {11}, {0}, {1}, {10}, {}}), "lies after");
}

TEST(a_write_that_does_not_fit_is_refused) {
  const Assembler a = make();
  const Events events{{0, 1}, {}, {0}, {2}, {}, {}};
  Ints out(64);
  CHECK_REFUSED(a.write(events.view(), {2}, {0, 6}, out.data(), 1), "changed");
  CHECK_REFUSED(a.write(events.view(), {3}, {0, 9}, out.data(), 1), "changed");
  CHECK_REFUSED(a.write(events.view(), {2}, {0}, out.data(), 1), "must match");
}

TEST(broken_tables_are_refused) {
  Assembler a = make();
  SegmentTable bad = table(3, 1, 0);
  bad.offsets[1] = 3;
  CHECK_REFUSED(a.set_items(true, 0, bad, {0, 0, 0}), "must not fall");
  bad = table(3, 1, 0);
  bad.offsets[3] = 4;
  CHECK_REFUSED(a.set_units(bad), "number of values");
  CHECK_REFUSED(a.set_items(true, 0, table(2, 1, 0), {0, 0, 0}), "expected 3 segments");
  CHECK_REFUSED(a.set_items(true, 5, table(3, 1, 0), {0, 0, 0}), "ending");
  CHECK_REFUSED(a.set_ratings({2, 1}, table(2, 1, 0), table(2, 1, 0)), "sorted");
  CHECK_REFUSED(a.set_ratings({NAN}, table(1, 1, 0), table(1, 1, 0)), "sorted");
  CHECK_REFUSED(a.set_ages(table(1, 1, 0), Ints(10), Ints(10), Ints(10)), "86400");
  CHECK_REFUSED(Assembler({1}, {1, 2, 3}, {}, 1, 1, 2, 1), "bare prompt has 3");
}

TEST(threads_do_not_change_prompts) {
  Events events;
  for (int64_t i = 0; i < 500; ++i) {
    events.item.push_back(i % 3);
    events.rating.push_back(i % 4 == 0 ? NAN : (i % 2 ? 1.0f : 4.5f));
    events.timestamp.push_back(i * 100);
    events.first.push_back(i / 2);
    events.last.push_back(i + 1);
    events.target.push_back(i % 5 == 0 ? r2ec::kNoTime : 100 * i + 86400 * (i % 9));
  }
  const Assembler a = make(20, 60);
  const Ints one = assemble(a, events, 1);
  for (const int64_t threads : {2, 3, 300}) CHECK(assemble(a, events, threads) == one);
}

int main() { return run_tests(); }
