#include <cmath>
#include <cstring>
#include <vector>

#include "check.hpp"
#include "random.hpp"
#include "simd/tiles.hpp"

using namespace r2ec;

namespace {

TEST(code_products_are_exact) {
  Random random;
  for (const TileKernels* kernels : kinds())
    for (int64_t queries : {1, 3, 6, 17, 33})
      for (int64_t count : {1, 5, 31, 32}) {
        const int64_t columns = 192;
        const auto codes = random.integers<int8_t>(kGroup * columns, -127, 127);
        const auto values = random.integers<int16_t>(queries * columns, -32000, 32000);
        CodeOperand operand = {queries, columns, values.data(), {}};
        kernels->prepare_codes(operand);
        std::vector<int32_t> out(queries * kGroup);
        kernels->multiply_codes({codes.data(), columns, count}, operand, out.data());
        for (int64_t q = 0; q < queries; ++q)
          for (int64_t i = 0; i < count; ++i) {
            int64_t want = 0;
            for (int64_t c = 0; c < columns; ++c)
              want += int64_t{codes[i * columns + c]} * values[q * columns + c];
            CHECK(out[q * kGroup + i] == want);
          }
      }
}

TEST(float_products_stay_within_their_bound) {
  Random random;
  for (const TileKernels* kernels : kinds())
    for (int parts : {2, 3})
      for (int64_t queries : {1, 2, 3, 5, 16, 33})
        for (int64_t columns : {1, 7, 16, 33, 100}) {
          const int64_t count = columns % 2 ? 32 : 19, stride = columns + 3;
          const auto rows = random.floats(kGroup * stride);
          const auto values = random.floats(queries * columns);
          FloatOperand operand(values.data(), queries, columns, parts);
          kernels->prepare_floats(operand);
          CHECK(operand.error_terms > 0.0);
          std::vector<float> out(queries * kGroup), squares(kGroup);
          kernels->multiply_floats({rows.data(), stride, count}, operand, out.data(),
                                   squares.data());
          for (int64_t i = 0; i < count; ++i) {
            const float* row = rows.data() + i * stride;
            const double size = norm(row, columns);
            CHECK(std::fabs(squares[i] - size * size) <= (columns + 4) * 0x1p-24 * size * size);
            for (int64_t q = 0; q < queries; ++q) {
              const float* query = values.data() + q * columns;
              const double bound = operand.error_terms * 0x1p-24 * size * norm(query, columns);
              CHECK(std::fabs(out[q * kGroup + i] - dot(row, query, columns)) <= bound);
            }
          }
        }
}

TEST(reached_scores_are_found) {
  Random random;
  const auto products = random.floats(kGroup), scale = random.floats(kGroup);
  const auto half = random.floats(kGroup), need = random.floats(kGroup);
  for (const TileKernels* kernels : kinds())
    for (int64_t count : {1, 9, 16, 31, 32}) {
      uint32_t one = 0, many = 0, narrow = 0;
      std::vector<Bfloat16> short_products;
      for (float p : products) {
        uint32_t bits;
        std::memcpy(&bits, &p, sizeof bits);
        short_products.push_back({static_cast<uint16_t>(bits >> 16)});
      }
      const auto upper = [](float p) { return std::fmaf(0.01f, std::fabs(p), p); };
      for (int64_t i = 0; i < count; ++i) {
        one |= static_cast<uint32_t>(upper(products[i] * scale[i]) >= 0.3f + half[i]) << i;
        many |= static_cast<uint32_t>(upper(products[i] * 1.5f) >= need[i] + 0.2f) << i;
        const float p = to_float(short_products[i]) * 1.5f;
        narrow |= static_cast<uint32_t>(upper(p) >= need[i] + 0.2f) << i;
      }
      const Epilogue epilogue = {scale.data(), half.data()};
      CHECK(kernels->rows_above(products.data(), count, epilogue, 0.3f, 0.01f) == one);
      CHECK(kernels->queries_above_f32(products.data(), count, 1.5f, 0.2f, need.data(), 0.01f) ==
            many);
      CHECK(kernels->queries_above_bf16(short_products.data(), count, 1.5f, 0.2f, need.data(),
                                        0.01f) == narrow);
      CHECK(kernels->rows_above(products.data(), count, {nullptr, nullptr}, kInfinity, 0.0f) == 0);
    }
}

TEST(largest_lower_bounds_of_columns) {
  Random random;
  constexpr int64_t kRows = 5, kStride = 41;
  auto products = random.floats(kRows * kStride);
  const auto scale = random.floats(kRows), half = random.floats(kRows);
  std::vector<Bfloat16> short_products;
  for (float p : products) {
    uint32_t bits;
    std::memcpy(&bits, &p, sizeof bits);
    short_products.push_back({static_cast<uint16_t>(bits >> 16)});
  }
  products[2 * kStride + 3] = std::nanf("");  // counts for nothing
  for (int64_t row = 0; row < kRows; ++row) products[row * kStride + 4] = std::nanf("");
  for (const TileKernels* kernels : kinds())
    for (int64_t columns : {1, 7, 16, 33, 41})
      for (bool plain : {false, true}) {
        const Epilogue epilogue = {plain ? nullptr : scale.data(), plain ? nullptr : half.data()};
        std::vector<float> maxima(columns + 1, 7.0f), narrow(columns + 1, 7.0f);
        kernels->column_maxima_f32({products.data(), kStride, kRows}, columns, epilogue, 0.01f,
                                   maxima.data());
        kernels->column_maxima_bf16({short_products.data(), kStride, kRows}, columns, epilogue,
                                    0.01f, narrow.data());
        for (int64_t i = 0; i < columns; ++i) {
          const auto largest = [&](const auto& values) {
            double found = -kInfinity;
            for (int64_t row = 0; row < kRows; ++row) {
              const double p = static_cast<double>(to_float(values[row * kStride + i])) *
                               (plain ? 1.0 : static_cast<double>(scale[row]));
              const double low =
                  p - (plain ? 0.0 : static_cast<double>(half[row])) - 0.01 * std::fabs(p);
              if (low > found) found = low;
            }
            return found;
          };
          const auto close = [](float got, double want) {
            return static_cast<double>(got) == want ||
                   std::fabs(static_cast<double>(got) - want) < 1e-5;
          };
          CHECK(close(maxima[i], largest(products)));
          CHECK(close(narrow[i], largest(short_products)));
        }
        CHECK(maxima[columns] == 7.0f && narrow[columns] == 7.0f);
      }
}

TEST(weights_are_summed) {
  Random random;
  for (const TileKernels* kernels : kinds()) {
    auto products = random.floats(kGroup);
    products[3] = kInfinity;  // left out
    const auto kept = products;
    OnlineSoftmax softmax = {0.1f, 20.0f, 0.2f, 0.6f, 0.0f, 0.0};
    uint32_t near_ties = 0;
    const uint32_t allowed = ~(1u << 3);
    const int64_t ahead =
        kernels->update_softmax(products.data(), nullptr, allowed, softmax, near_ties);
    int64_t want = 0;
    double l = 0.0;
    for (int i = 0; i < kGroup; ++i) {
      if (i == 3) continue;
      want += kept[i] > 0.6f;
      CHECK(((near_ties >> i) & 1) == static_cast<uint32_t>(kept[i] >= 0.2f && kept[i] <= 0.6f));
      l += std::exp2((static_cast<double>(kept[i]) - 0.1f) * 20.0);
    }
    CHECK(ahead == want);
    CHECK(std::fabs(softmax.l * std::exp2(static_cast<double>(softmax.m)) / l - 1.0) < 1e-5);
  }
}

}  // namespace

int main() { return run_tests(); }
