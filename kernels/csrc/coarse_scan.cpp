#include "coarse_scan.hpp"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "group_scores.hpp"

namespace r2ec {

namespace {

Epilogue shifted(const Epilogue& epilogue, int64_t row) {
  return {epilogue.scale ? epilogue.scale + row : nullptr,
          epilogue.half ? epilogue.half + row : nullptr};
}

// Item i of a group, row `row` of the table, with the bounds of its score.
void push_score(const ScanSink& sink, int64_t query, float product, Epilogue epilogue, int64_t i,
                float error, int64_t row) {
  const float p = product * (epilogue.scale ? epilogue.scale[i] : 1.0f);
  const float score = p - (epilogue.half ? epilogue.half[i] : 0.0f);
  const float slack = error + sink.relative * std::fabs(p);
  sink.heap.push(sink.worker, query, score - slack, score + slack, row);
}

// Pushes those of a group's products with one query that reach its threshold. `row` is that of the
// first, `epilogue` the group's; rows outside `allowed` are left out.
void push_group(const ScanSink& sink, int64_t query, const float* products, int64_t count,
                Epilogue epilogue, float error, int64_t row, uint32_t allowed = ~0u) {
  const float need = sink.heap.threshold(query) - error;
  uint32_t met = allowed & sink.kernels.rows_above(products, count, epilogue, need, sink.relative);
  for (; met; met &= met - 1) {
    const int i = __builtin_ctz(met);
    push_score(sink, query, products[i], epilogue, i, error, row + i);
  }
}

}  // namespace

// The product in int32 is exact; the rounding of its float32 is part of `relative`.
void scan_codes(const CodeTable& table, const CodeQueries& queries, int64_t first, int64_t last,
                const ScanSink& sink) {
  const int64_t num_queries = sink.heap.queries();
  std::vector<int32_t> sums(num_queries * kGroup);
  float products[kGroup];
  for (int64_t row = first; row < last; row += kGroup) {
    const int64_t count = std::min(kGroup, last - row);
    const uint32_t allowed = bounded_rows(table, row, count);
    sink.kernels.multiply_codes({table.codes + row * table.columns, table.columns, count},
                                queries.operand, sums.data());
    for (int64_t q = 0; q < num_queries; ++q) {
      for (int64_t i = 0; i < count; ++i)
        products[i] = static_cast<float>(sums[q * kGroup + i]) * queries.step[q];
      push_group(sink, q, products, count, shifted(table.epilogue, row), sink.error[q], row,
                 allowed);
    }
  }
}

void scan_floats(const FloatTable& table, const FloatQueries& queries, Similarity similarity,
                 double huge, int64_t first, int64_t last, const ScanSink& sink,
                 std::vector<int64_t>& unbounded) {
  FloatGroup group(table, queries, similarity, huge, sink.kernels);
  for (int64_t row = first; row < last; row += kGroup) {
    const int64_t count = std::min(kGroup, last - row);
    group.multiply(row, count, unbounded);
    for (int64_t q = 0; q < sink.heap.queries(); ++q)
      push_group(sink, q, group.products(q), count, group.epilogue(),
                 static_cast<float>(group.error(q)), row, group.allowed());
  }
}

template <typename T>
void scan_products(const T* products, int64_t stride, Epilogue epilogue, int64_t start,
                   int64_t first, int64_t last, const ScanSink& sink) {
  const auto reach = [&] {
    if constexpr (std::is_same_v<T, float>)
      return sink.kernels.queries_above_f32;
    else
      return sink.kernels.queries_above_bf16;
  }();
  const int64_t num_queries = sink.heap.queries();
  std::vector<float> need(num_queries);
  for (int64_t row = first; row < last; ++row) {
    if ((row - first) % kGroup == 0)
      for (int64_t q = 0; q < num_queries; ++q) need[q] = sink.heap.threshold(q) - sink.error[q];
    const T* const values = products + row * stride;
    const Epilogue own = shifted(epilogue, row);
    const float scale = own.scale ? *own.scale : 1.0f, half = own.half ? *own.half : 0.0f;
    for (int64_t begin = 0; begin < num_queries; begin += kGroup) {
      uint32_t met = reach(values + begin, std::min(kGroup, num_queries - begin), scale, half,
                           need.data() + begin, sink.relative);
      for (; met; met &= met - 1) {
        const int64_t q = begin + __builtin_ctz(met);
        push_score(sink, q, to_float(values[q]), own, 0, sink.error[q], start + row);
      }
    }
  }
}

template void scan_products<float>(const float*, int64_t, Epilogue, int64_t, int64_t, int64_t,
                                   const ScanSink&);
template void scan_products<Bfloat16>(const Bfloat16*, int64_t, Epilogue, int64_t, int64_t, int64_t,
                                      const ScanSink&);

void scan_product_columns(const float* products, int64_t stride, Epilogue epilogue, int64_t start,
                          int64_t first, int64_t last, const ScanSink& sink) {
  constexpr int64_t kStretch = 1024;  // rows of a query that are read in one go
  for (int64_t begin = first; begin < last; begin += kStretch) {
    const int64_t end = std::min(last, begin + kStretch);
    for (int64_t q = 0; q < sink.heap.queries(); ++q)
      for (int64_t row = begin; row < end; row += kGroup)
        push_group(sink, q, products + q * stride + row, std::min(kGroup, end - row),
                   shifted(epilogue, row), sink.error[q], start + row);
  }
}

}  // namespace r2ec
