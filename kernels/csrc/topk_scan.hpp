// What a top-k search does on all threads: feed a TopkHeap, finish it, re-score what it leaves.
#pragma once

#include <algorithm>
#include <functional>
#include <utility>
#include <vector>

#include "arrays.hpp"
#include "first_thresholds.hpp"

namespace r2ec_bindings {

// Products of some rows with all queries, made by a matrix library: [rows, queries], bfloat16 as
// its bits or float32, or the transpose of float32 [queries, rows] in memory.
struct ProductBlock {
  const void* values;
  bool is_float;
  int64_t rows, by_row, by_query;  // strides in elements
  bool side_by_side;               // the products of a row are

  ProductBlock(const py::array& products, int64_t rows, int64_t queries) : rows(rows) {
    need(products.ndim() == 2 && products.shape(0) >= rows && products.shape(1) == queries,
         "products: expected [rows, queries]");
    const int64_t size = products.itemsize();
    by_row = products.strides(0) / size;
    by_query = products.strides(1) / size;
    is_float = py::isinstance<py::array_t<float>>(products);
    need(is_float || py::isinstance<py::array_t<uint16_t>>(products),
         "products: expected float32 or the bits of bfloat16");
    side_by_side = by_query == 1 || queries == 1;
    need(side_by_side || (is_float && by_row == 1),
         "products: expected rows or queries side by side");
    values = products.data();
  }
};

// Offers scores to a heap. Nothing here touches Python: callers release its lock.
class HeapFeed {
 public:
  HeapFeed(r2ec::TopkHeap& heap, const r2ec::TileKernels& kernels)
      : heap_(heap), kernels_(kernels) {}

  // Calls scan(first, last, sink) for pieces of rows. error: of each query.
  template <typename Scan>
  void run(int64_t rows, const float* error, float relative, const Scan& scan) {
    by_pieces(rows, heap_.workers(), [&](int64_t worker, int64_t first, int64_t last) {
      scan(first, last, r2ec::ScanSink{heap_, kernels_, worker, error, relative});
    });
  }

  // Multiplies and offers all rows of a table; returns those whose scores have no bound.
  std::vector<int64_t> floats(const r2ec::FloatTable& table, int64_t rows,
                              const r2ec::FloatQueries& queries, r2ec::Similarity similarity,
                              double huge) {
    std::vector<std::vector<int64_t>> unbounded(heap_.workers());
    run(rows, nullptr, 0x1p-22f, [&](int64_t first, int64_t last, const r2ec::ScanSink& sink) {
      r2ec::scan_floats(table, queries, similarity, huge, first, last, sink,
                        unbounded[sink.worker]);
    });
    std::vector<int64_t> all;
    for (const auto& own : unbounded) all.insert(all.end(), own.begin(), own.end());
    return all;
  }

  // Offers the scores of the rows start.., which `epilogue` makes of the block's products.
  void products(const ProductBlock& block, r2ec::Epilogue epilogue, int64_t start,
                const float* error, float relative) {
    const bool first_block = std::exchange(first_block_, false);
    if (block.side_by_side && block.is_float)
      by_row(static_cast<const float*>(block.values), block, epilogue, start, error, relative,
             first_block);
    else if (block.side_by_side)
      by_row(static_cast<const r2ec::Bfloat16*>(block.values), block, epilogue, start, error,
             relative, first_block);
    else
      by_column(static_cast<const float*>(block.values), block, epilogue, start, error, relative,
                first_block);
  }

 private:
  static constexpr int64_t kManyQueries = 8;  // fewer fill no vector: a row's maxima cost too much

  template <typename T>
  void by_row(const T* values, const ProductBlock& block, r2ec::Epilogue epilogue, int64_t start,
              const float* error, float relative, bool first_block) {
    if (first_block && heap_.queries() >= kManyQueries) {
      r2ec::FirstThresholds first(heap_, kernels_, block.rows, true, relative);
      in_parallel(first.groups(), heap_.workers(), [&](int64_t, int64_t group) {
        first.add(group, values, block.by_row, epilogue);
      });
      in_parallel(first.groups() ? heap_.queries() : 0, heap_.workers(),
                  [&](int64_t, int64_t query) { first.raise(query, error[query]); });
    }
    run(block.rows, error, relative, [&](int64_t first, int64_t last, const r2ec::ScanSink& sink) {
      r2ec::scan_products(values, block.by_row, epilogue, start, first, last, sink);
    });
  }

  void by_column(const float* values, const ProductBlock& block, r2ec::Epilogue epilogue,
                 int64_t start, const float* error, float relative, bool first_block) {
    if (first_block && !epilogue.scale && !epilogue.half) {
      r2ec::FirstThresholds first(heap_, kernels_, block.rows, false, relative);
      in_parallel(first.groups() ? heap_.queries() : 0, heap_.workers(),
                  [&](int64_t, int64_t query) {
                    first.raise_from(query, error[query], values + query * block.by_query);
                  });
    }
    run(block.rows, error, relative, [&](int64_t first, int64_t last, const r2ec::ScanSink& sink) {
      r2ec::scan_product_columns(values, block.by_query, epilogue, start, first, last, sink);
    });
  }

  r2ec::TopkHeap& heap_;
  const r2ec::TileKernels& kernels_;
  bool first_block_ = true;
};

inline r2ec::TopkHeap::Result finished(r2ec::TopkHeap& heap) {
  auto result = heap.begin_result();
  in_parallel(heap.queries(), heap.workers(),
              [&](int64_t, int64_t query) { heap.finish(query, result); });
  return result;
}

inline int64_t most_rows(const r2ec::TopkHeap::Result& result) {
  size_t most = 0;
  for (const auto& rows : result.rows) most = std::max(most, rows.size());
  return static_cast<int64_t>(most);
}

// Rows [queries, most_rows], -1 behind a query's last.
inline void write_rows(const r2ec::TopkHeap::Result& result, int64_t* out) {
  const int64_t most = most_rows(result);
  for (const auto& rows : result.rows) {
    std::fill(std::copy(rows.begin(), rows.end(), out), out + most, -1);
    out += most;
  }
}

// Row positions [queries, width], -1 for none.
struct CandidateRows {
  const int64_t* rows;
  int64_t queries, width;
};

// Order keys [queries, k] of the best candidates. id: of each row, or null: its position.
inline void write_best_keys(const r2ec::Scoring& scoring, const int64_t* id,
                            const CandidateRows& candidates, int64_t k, int64_t threads,
                            int64_t* out) {
  const int64_t width = candidates.width, pairs = candidates.queries * width;
  const int64_t* const from = candidates.rows;
  std::vector<int64_t> all(pairs, r2ec::kNoKey);
  constexpr int64_t kPairs = 16;  // taken at a time
  in_parallel((pairs + kPairs - 1) / kPairs, threads, [&](int64_t, int64_t piece) {
    r2ec::Scorer scorer(scoring);
    const int64_t end = std::min(pairs, (piece + 1) * kPairs);
    for (int64_t i = piece * kPairs; i < end; ++i) {
      const int64_t row = from[i];
      if (i + 1 < end && from[i + 1] >= 0) scorer.ask_for(from[i + 1]);
      if (row >= 0) all[i] = r2ec::order_key(scorer.score(i / width, row), id ? id[row] : row);
    }
  });
  in_parallel(candidates.queries, threads, [&](int64_t, int64_t q) {
    int64_t* const own = all.data() + q * width;
    const int64_t kept = std::min(k, width);
    std::partial_sort(own, own + kept, own + width, std::greater<int64_t>());
    std::fill(std::copy(own, own + kept, out + q * k), out + (q + 1) * k, r2ec::kNoKey);
  });
}

}  // namespace r2ec_bindings
