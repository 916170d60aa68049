#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <random>
#include <vector>

#include "check.hpp"
#include "exact_score.hpp"
#include "random.hpp"
#include "simd/tiles.hpp"

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

// The definition, written out: the upper half is added to the lower half until one is left.
double halving_sum(std::vector<double> terms) {
  while (terms.size() > 1) {
    const size_t half = terms.size() / 2, low = terms.size() - half;
    for (size_t c = 0; c < half; ++c) terms[c] += terms[low + c];
    terms.resize(low);
  }
  return terms.empty() ? 0.0 : terms[0];
}

template <typename Term>
double sum_of(int64_t columns, Term term) {
  std::vector<double> terms;
  for (int64_t c = 0; c < columns; ++c) terms.push_back(term(c));
  return halving_sum(terms);
}

float defined(const double* q, const float* x, int64_t columns, Similarity similarity,
              double temperature) {
  const auto at = [x](int64_t c) { return static_cast<double>(x[c]); };
  double value;
  if (similarity == Similarity::kL2) {
    value = -std::sqrt(sum_of(columns, [&](int64_t c) { return (q[c] - at(c)) * (q[c] - at(c)); }));
  } else {
    value = sum_of(columns, [&](int64_t c) { return q[c] * at(c); });
    if (similarity == Similarity::kCosine) {
      const double scale = std::sqrt(sum_of(columns, [&](int64_t c) { return q[c] * q[c]; })) *
                           std::sqrt(sum_of(columns, [&](int64_t c) { return at(c) * at(c); }));
      value = scale == 0.0 ? 0.0 : value / scale;
    }
  }
  return static_cast<float>(value / temperature) + 0.0f;
}

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

void check_scores(const std::vector<double>& queries, const std::vector<float>& rows,
                  int64_t columns) {
  const int64_t num_queries = queries.size() / columns, num_rows = rows.size() / columns;
  for (const char* cpu : {"portable", "avx2", "avx512"}) {
    if (!find_kernels(cpu)) continue;
    for (const auto similarity : {Similarity::kDot, Similarity::kCosine, Similarity::kL2})
      for (const double temperature : {1.0, 0.02}) {
        const Scoring scoring({rows.data(), columns, columns}, queries.data(), num_queries,
                              similarity, temperature, cpu);
        Scorer scorer(scoring);
        for (int64_t q = 0; q < num_queries; ++q)
          for (int64_t i = 0; i < num_rows; ++i) {
            const float got = scorer.score(q, i);
            const float wanted = defined(&queries[q * columns], &rows[i * columns], columns,
                                         similarity, temperature);
            CHECK(bits_of(got) == bits_of(wanted) || (std::isnan(got) && std::isnan(wanted)));
          }
      }
  }
}

TEST(fast_sums_give_the_defined_score) {
  std::mt19937_64 random(1);
  std::normal_distribution<double> normal;
  for (const int64_t columns : {1, 2, 3, 15, 16, 17, 33, 64, 100, 577}) {
    std::vector<double> queries(3 * columns);
    std::vector<float> rows(20 * columns);
    for (auto& value : queries) value = static_cast<float>(normal(random));
    for (auto& value : rows) value = static_cast<float>(normal(random));
    // a row of zeros, one across the query, and one with its values
    for (int64_t c = 0; c < columns; ++c) {
      rows[c] = 0.0f;
      rows[columns + c] =
          static_cast<float>(c % 2 ? -queries[c - 1] : queries[std::min(c + 1, columns - 1)]);
      rows[2 * columns + c] = static_cast<float>(queries[c]);
    }
    check_scores(queries, rows, columns);
  }
}

// Sums that lie half-way between two float32 numbers, and sums of large terms that cancel: the
// order of adding decides, so only the fixed one gives the score.
TEST(the_fixed_order_decides_where_the_bound_cannot) {
  const std::vector<double> queries(32, 1.0);
  std::vector<float> rows;
  std::mt19937_64 random(2);
  for (int row = 0; row < 200; ++row) {
    std::vector<float> own(32, 0.0f);
    own[0] = 1.0f;
    own[random() % 31 + 1] = 0x1p-24f;
    if (row % 2) own[random() % 31 + 1] += (row % 4 == 1 ? 1 : -1) * 0x1p-77f;
    if (row % 3 == 0) {
      own[random() % 31 + 1] += 0x1p30f;
      own[random() % 31 + 1] -= 0x1p30f;
    }
    rows.insert(rows.end(), own.begin(), own.end());
  }
  check_scores(queries, rows, 32);
}

// Distances whose square is (1 + 2^-24)^2, the root half-way between two float32 numbers, and terms
// of 2^-54, which are lost one by one beside 1 and are not where they are added up first.
TEST(the_fixed_order_decides_between_distances) {
  std::mt19937_64 random(3);
  std::vector<float> rows;
  for (int row = 0; row < 200; ++row) {
    std::vector<float> own(32, 0x1p-27f);
    own[0] = 1.0f;
    own[1] = own[2] = 0x1p-12f;
    own[3] = 0x1p-24f;
    std::shuffle(own.begin(), own.end(), random);
    rows.insert(rows.end(), own.begin(), own.end());
  }
  check_scores(std::vector<double>(32, 0.0), rows, 32);
}

TEST(numbers_beyond_the_finite_keep_their_meaning) {
  const std::vector<double> queries = {1.0, -2.0, 0.5};
  const std::vector<float> rows = {kInfinity, 1.0f,   0.0f,   -kInfinity, kInfinity,  1.0f,
                                   NAN,       1.0f,   1.0f,   3.4e38f,    -3.4e38f,   3.4e38f,
                                   1e-45f,    1e-45f, 1e-45f, kInfinity,  -kInfinity, kInfinity};
  check_scores(queries, rows, 3);
  check_scores({kInfinity, 1.0, 1.0}, rows, 3);
  check_scores({0.0, 0.0, 0.0}, rows, 3);
}

}  // namespace

int main() { return run_tests(); }
