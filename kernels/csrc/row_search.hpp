// A search of float32 rows from the queries to the results, for calls so small that their fixed
// costs count: what Python's certified search (topk/impl/common.py) does in some sixty array
// operations.
//
//   queries -> norms, bounds -> scan(), or add(products) block by block -> finish() -> results
//
// It gives up (`bounded` false, or finish() without results) where numbers leave the range in which
// its bounds hold, where k is large beside the rows, and in mass ties: the caller then searches in
// the general way. Results are the same, bit for bit.
//
// Queries are not scaled: their norms lie in 1/kLargest .. kLargest, or are 0, so that with rows of
// at most `huge` and temperatures of at least 1/huge neither products nor scores leave float32's
// range. Bounds are those of group_scores.hpp.
#pragma once

#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "arrays.hpp"
#include "group_scores.hpp"
#include "topk_scan.hpp"

namespace r2ec_bindings {

class RowSearch {
 public:
  // excluded, offsets: rows [E] that query q does not want, from offsets[q] to offsets[q + 1]; -1
  // for none. limit: candidates of a query beyond which the search gives up.
  RowSearch(py::array_t<float> rows, Array<float> queries, const std::string& similarity,
            double temperature, double huge, int64_t k, int64_t limit,
            std::optional<Array<int64_t>> excluded, std::optional<Array<int64_t>> offsets,
            int64_t threads, const std::string& cpu)
      : rows_(rows),
        queries_(queries),
        similarity_(similarity_of(similarity)),
        huge_(huge),
        k_(k),
        threads_(std::max<int64_t>(1, threads)),
        exact_(queries.data(), queries.data() + queries.size()),
        scoring_(table_of(rows), exact_.data(), queries.shape(0), similarity_, temperature,
                 cpu.empty() ? nullptr : cpu.c_str()),
        excluded_(pairs(excluded, offsets)),
        heap_(queries.shape(0), k, limit, threads_, excluded_.data(), excluded_.size()),
        kernels_(kernels_named(cpu)),
        feed_(heap_, kernels_) {
    need(queries.ndim() == 2 && queries.shape(1) == rows.shape(1),
         "queries: expected [queries, columns]");
    need(k > 0, "k: expected at least 1");
    bound_queries(temperature);
  }

  bool bounded() const { return bounded_; }

  // Makes the products here: for few queries. False where a row's score has no bound.
  bool scan() {
    py::gil_scoped_release release;
    r2ec::FloatOperand operand(queries_.data(), queries_.shape(0), queries_.shape(1), 2);
    kernels_.prepare_floats(operand);
    return feed_
        .floats(scoring_.table, rows_.shape(0), {operand, norm_.data(), floor_.data()}, similarity_,
                huge_)
        .empty();
  }

  // Products of the rows start.. with the queries, and the rows' norms.
  bool add(const py::array& products, int64_t start, const Array<float>& norms) {
    const int64_t rows = norms.size(), queries = heap_.queries();
    need(start >= 0 && start + rows <= rows_.shape(0), "start: out of range");
    const ProductBlock block(products, rows, queries);
    const float* const norm = norms.data();
    py::gil_scoped_release release;
    double largest = 0.0;
    for (int64_t i = 0; i < rows; ++i) {
      if (!r2ec::is_bounded(scoring_.table, similarity_, huge_, start + i, norm[i])) return false;
      largest = std::max(largest, static_cast<double>(norm[i]));
    }
    largest = r2ec::norm_bound(largest, scoring_.table.columns);
    const double unit = r2ec::error_unit(similarity_, static_cast<double>(queries_.shape(1)));
    std::vector<float> error(queries), of_row;
    for (int64_t q = 0; q < queries; ++q)
      error[q] =
          static_cast<float>(r2ec::score_error(similarity_, unit, norm_[q], largest, floor_[q]));
    r2ec::Epilogue epilogue = {nullptr, nullptr};
    if (similarity_ == r2ec::Similarity::kCosine) {
      for (int64_t i = 0; i < rows; ++i) of_row.push_back(norm[i] > 0.0f ? 1.0f / norm[i] : 0.0f);
      epilogue.scale = of_row.data();
    } else if (similarity_ == r2ec::Similarity::kL2) {
      for (int64_t i = 0; i < rows; ++i) of_row.push_back(0.5f * (norm[i] * norm[i]));
      epilogue.half = of_row.data();
    }
    feed_.products(block, epilogue, start, error.data(), 0x1p-22f);
    return true;
  }

  // (scores float32 [M, k], ids int64 [M, k], rows re-scored, scores accepted), or None where some
  // query has to be searched in the general way. ids: of each row, or null: its position.
  py::object finish(const std::optional<Array<int64_t>>& ids) {
    const int64_t* const id = optional_rows(ids, rows_.shape(0), "ids: too short");
    const int64_t queries = heap_.queries();
    Array<float> scores({queries, k_});
    Array<int64_t> found({queries, k_});
    float* const score = scores.mutable_data();
    int64_t* const key = found.mutable_data();
    int64_t candidates = 0, accepted = 0;
    {
      py::gil_scoped_release release;
      const auto result = finished(heap_);
      accepted = result.accepted;
      for (int64_t q = 0; q < queries; ++q) {
        if (result.failed[q]) complete_ = false;
        candidates += static_cast<int64_t>(result.rows[q].size());
      }
      const int64_t width = most_rows(result);
      std::vector<int64_t> rows(queries * width);
      write_rows(result, rows.data());
      if (complete_)
        write_best_keys(scoring_, id, {rows.data(), queries, width}, k_, threads_, key);
      for (int64_t i = 0; complete_ && i < queries * k_; ++i) {
        if (key[i] == r2ec::kNoKey) complete_ = false;
        r2ec::from_order_key(key[i], score[i], key[i]);
      }
    }
    if (!complete_) return py::none();
    return py::make_tuple(scores, found, candidates, accepted);
  }

 private:
  static constexpr double kLargest = 0x1p25;  // of a query's norm
  static constexpr int64_t kDenseShare = 8;   // DENSE_SHARE in Python

  std::vector<int64_t> pairs(const std::optional<Array<int64_t>>& excluded,
                             const std::optional<Array<int64_t>>& offsets) const {
    std::vector<int64_t> made;
    if (!excluded) return made;
    const int64_t queries = queries_.shape(0);
    need(offsets && offsets->size() == queries + 1, "offsets: expected one more than queries");
    const int64_t* const from = offsets->data();
    need(from[0] == 0 && from[queries] == excluded->size(), "offsets: expected 0 .. excluded");
    for (int64_t q = 0; q < queries; ++q) {
      need(from[q] <= from[q + 1], "offsets: expected to rise");
      for (int64_t i = from[q]; i < from[q + 1]; ++i) {
        const int64_t row = excluded->data()[i];
        need(row < rows_.shape(0), "excluded: out of range");
        if (row >= 0) made.push_back(row * queries + q);
      }
    }
    std::sort(made.begin(), made.end());
    made.erase(std::unique(made.begin(), made.end()), made.end());
    return made;
  }

  void bound_queries(double temperature) {
    const bool cosine = similarity_ == r2ec::Similarity::kCosine;
    const bool l2 = similarity_ == r2ec::Similarity::kL2;
    // products below float32's normal range, and the canonical score's own smallest step
    const double flushed =
        static_cast<double>(queries_.shape(1)) * 0x1p-126 * (cosine ? 2.0 * huge_ : 4.0);
    const double floor = flushed + temperature * 0x1p-148 * (l2 ? 4.0 * huge_ : 2.0);
    bounded_ = temperature >= 1.0 / huge_ && temperature <= huge_;
    for (const double norm : scoring_.query_norms) {
      bounded_ = bounded_ && (norm == 0.0 || (norm >= 1.0 / kLargest && norm <= kLargest));
      norm_.push_back(static_cast<float>(1.01 * norm));
      floor_.push_back(static_cast<float>(floor));
    }
    for (const int64_t left_out : heap_.excluded_counts())
      bounded_ = bounded_ && rows_.shape(0) - left_out >= kDenseShare * k_;
  }

  py::array_t<float> rows_;
  Array<float> queries_;
  r2ec::Similarity similarity_;
  double huge_;
  int64_t k_, threads_;
  std::vector<double> exact_;  // the queries
  r2ec::Scoring scoring_;
  std::vector<int64_t> excluded_;
  r2ec::TopkHeap heap_;
  const r2ec::TileKernels& kernels_;
  HeapFeed feed_;
  std::vector<float> norm_, floor_;  // of each query: an upper bound; an absolute error
  bool bounded_ = false, complete_ = true;
};

}  // namespace r2ec_bindings
