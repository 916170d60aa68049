#include "first_pass.hpp"

#include <algorithm>
#include <cmath>
#include <type_traits>

namespace r2ec {

namespace {

Finish from(const Finish& finish, int64_t row) {
  return {finish.scale ? finish.scale + row : nullptr, finish.half ? finish.half + row : nullptr};
}

void offer_score(const Offers& offers, int64_t query, float product, Finish finish, int64_t i,
                 float error, int64_t row) {
  const float p = product * (finish.scale ? finish.scale[i] : 1.0f);
  const float score = p - (finish.half ? finish.half[i] : 0.0f);
  const float slack = error + offers.relative * std::fabs(p);
  offers.selection.offer(offers.worker, query, score - slack, score + slack, row);
}

// Offers those of a group's products with one query that meet its threshold. `row` is that of the
// first; `finish` is the group's, rows outside `allowed` are left out.
void offer_group(const Offers& offers, int64_t query, const float* products, int64_t count,
                 Finish finish, float error, int64_t row, uint32_t allowed = ~0u) {
  const float need = offers.selection.threshold(query) - error;
  uint32_t met = allowed & offers.tiles.reach(products, count, finish, need, offers.relative);
  for (; met; met &= met - 1) {
    const int i = __builtin_ctz(met);
    offer_score(offers, query, products[i], finish, i, error, row + i);
  }
}

}  // namespace

void scan_codes(const CodeTable& table, const CodeQueries& queries, int64_t first, int64_t last,
                const Offers& offers) {
  const int64_t num_queries = offers.selection.queries();
  std::vector<int32_t> sums(num_queries * kGroup);
  float products[kGroup];
  for (int64_t row = first; row < last; row += kGroup) {
    const int64_t count = std::min(kGroup, last - row);
    uint32_t allowed = ~0u;
    if (table.trusted)
      for (int64_t i = 0; i < count; ++i)
        if (!table.trusted[row + i]) allowed &= ~(1u << i);
    offers.tiles.multiply_codes({table.codes + row * table.columns, table.columns, count},
                                queries.value, num_queries, table.columns, sums.data());
    for (int64_t q = 0; q < num_queries; ++q) {
      for (int64_t i = 0; i < count; ++i)
        products[i] = static_cast<float>(sums[q * kGroup + i]) * queries.step[q];
      offer_group(offers, q, products, count, from(table.finish, row), offers.error[q], row,
                  allowed);
    }
  }
}

void scan_floats(const FloatTable& table, const FloatQueries& queries, Similarity similarity,
                 double huge, int64_t first, int64_t last, const Offers& offers,
                 std::vector<int64_t>& doubtful) {
  const int64_t num_queries = offers.selection.queries();
  std::vector<float> products(num_queries * kGroup);
  float squares[kGroup], scale[kGroup], half[kGroup];
  // Squares below float32's normal range may be lost from a norm.
  const double lost = std::sqrt(static_cast<double>(table.columns)) * 0x1p-62;
  for (int64_t row = first; row < last; row += kGroup) {
    const int64_t count = std::min(kGroup, last - row);
    offers.tiles.multiply_floats({table.rows + row * table.stride, table.stride, count},
                                 queries.value, queries.stride, num_queries, table.columns,
                                 products.data(), squares);
    uint32_t allowed = ~0u;
    double largest = 0.0;
    for (int64_t i = 0; i < count; ++i) {
      const double norm = std::sqrt(static_cast<double>(squares[i]));
      scale[i] = norm > 0.0 ? static_cast<float>(1.0 / norm) : 0.0f;
      half[i] = 0.5f * squares[i];
      bool trusted = norm <= huge;  // false for NaN
      if (similarity == Similarity::kCosine && norm < 1.0 / huge) {
        const float* values = table.rows + (row + i) * table.stride;
        trusted = std::all_of(values, values + table.columns, [](float x) { return x == 0.0f; });
      }
      if (trusted) {
        largest = std::max(largest, norm);
      } else {
        allowed &= ~(1u << i);
        doubtful.push_back(row + i);
      }
    }
    const Finish finish = {similarity == Similarity::kCosine ? scale : nullptr,
                           similarity == Similarity::kL2 ? half : nullptr};
    largest = largest * 1.001 + lost;
    for (int64_t q = 0; q < num_queries; ++q) {
      const double norm = queries.norm[q];
      const double size = similarity == Similarity::kCosine ? norm
                          : similarity == Similarity::kL2   ? (norm + largest) * (norm + largest)
                                                            : norm * largest;
      const auto error = static_cast<float>((queries.unit * size + queries.floor[q]) * (1 + 0x1p-20));
      offer_group(offers, q, products.data() + q * kGroup, count, finish, error, row, allowed);
    }
  }
}

template <typename T>
void scan_products(const T* products, int64_t stride, Finish finish, int64_t start, int64_t first,
                   int64_t last, const Offers& offers) {
  const auto reach = [&] {
    if constexpr (std::is_same_v<T, float>)
      return offers.tiles.reach_f32;
    else
      return offers.tiles.reach_bf16;
  }();
  const int64_t num_queries = offers.selection.queries();
  std::vector<float> need(num_queries);
  for (int64_t row = first; row < last; ++row) {
    if ((row - first) % kGroup == 0)
      for (int64_t q = 0; q < num_queries; ++q)
        need[q] = offers.selection.threshold(q) - offers.error[q];
    const T* const values = products + row * stride;
    const Finish own = from(finish, row);
    const float scale = own.scale ? *own.scale : 1.0f, half = own.half ? *own.half : 0.0f;
    for (int64_t begin = 0; begin < num_queries; begin += kGroup) {
      uint32_t met = reach(values + begin, std::min(kGroup, num_queries - begin), scale, half,
                           need.data() + begin, offers.relative);
      for (; met; met &= met - 1) {
        const int64_t q = begin + __builtin_ctz(met);
        offer_score(offers, q, to_float(values[q]), own, 0, offers.error[q], start + row);
      }
    }
  }
}

template void scan_products<float>(const float*, int64_t, Finish, int64_t, int64_t, int64_t,
                                   const Offers&);
template void scan_products<Bfloat16>(const Bfloat16*, int64_t, Finish, int64_t, int64_t, int64_t,
                                      const Offers&);

void scan_product_columns(const float* products, int64_t stride, Finish finish, int64_t start,
                          int64_t first, int64_t last, const Offers& offers) {
  constexpr int64_t kStretch = 1024;  // rows of a query that are read in one go
  for (int64_t begin = first; begin < last; begin += kStretch) {
    const int64_t end = std::min(last, begin + kStretch);
    for (int64_t q = 0; q < offers.selection.queries(); ++q)
      for (int64_t row = begin; row < end; row += kGroup)
        offer_group(offers, q, products + q * stride + row, std::min(kGroup, end - row),
                    from(finish, row), offers.error[q], start + row);
  }
}

}  // namespace r2ec
