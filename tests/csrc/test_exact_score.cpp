#include <cmath>
#include <iterator>

#include "check.hpp"
#include "exact_score.hpp"
#include "random.hpp"

using namespace r2ec;

namespace {

TEST(order_keys_put_scores_first_and_low_ids_next) {
  const float scores[] = {kInfinity, 2.0f, 1.0f, 0.0f, -1.0f, -2.0f, -kInfinity};
  for (size_t i = 0; i + 1 < std::size(scores); ++i) {
    CHECK(order_key(scores[i], 4294967294) > order_key(scores[i + 1], 0));
    CHECK(order_key(scores[i], 3) > order_key(scores[i], 4));
  }
  CHECK(order_key(-kInfinity, 4294967294) > kNoKey);
}

TEST(a_score_that_cannot_be_compared_has_the_key_of_no_item) {
  for (const float score : {std::nanf(""), -std::nanf(""), kInfinity - kInfinity})
    for (const int64_t id : {int64_t{0}, int64_t{7}, int64_t{4294967294}})
      CHECK(order_key(score, id) == kNoKey);
}

}  // namespace

int main() { return run_tests(); }
