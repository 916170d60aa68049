// pybind11 only: hands pieces of checked arrays to workers, and their results to numpy. M queries,
// N rows (items), D columns, P pairs.
#include <pybind11/stl.h>

#include <functional>
#include <vector>

#include "arrays.hpp"
#include "row_search.hpp"
#include "topk_scan.hpp"

using namespace r2ec_bindings;

namespace {

// (complete, m float32 [M], l float64 [M], ahead int64 [M], near_ties int64 [P]) of all N rows,
// from what add(rank_queries, first, last, stats) finds in stretches of them. Stretches are the
// same for any number of threads, so that sums are added in one order. Not complete, and nothing
// counts, where a row's score has no bound or a stretch has more than its share of `max_near_ties`.
template <typename Add>
py::tuple add_stretches(const RankQueryArrays& arrays, int64_t rows, int64_t max_near_ties,
                        int64_t threads, const Add& add) {
  constexpr int64_t kStretches = 64;
  const int64_t length =
      std::max<int64_t>(r2ec::kGroup, (rows / kStretches / r2ec::kGroup + 1) * r2ec::kGroup);
  const int64_t stretches = (rows + length - 1) / length;
  const auto targets = arrays.targets();
  r2ec::RankStats total(targets);
  std::vector<r2ec::RankStats> found(stretches, total);
  std::vector<char> complete(stretches);
  const r2ec::RankQueries rank_queries = {
      targets, {arrays.excluded.data(), arrays.excluded.size()}, max_near_ties / kStretches};
  {
    py::gil_scoped_release release;
    in_parallel(stretches, threads, [&](int64_t, int64_t stretch) {
      auto& own = found[stretch];
      complete[stretch] =
          add(rank_queries, stretch * length, std::min(rows, (stretch + 1) * length), own) &&
          own.unbounded.empty();
    });
    total = r2ec::merged(found, targets, arrays.l.data());
  }
  const auto num_queries = static_cast<int64_t>(targets.size());
  Array<float> m(num_queries);
  Array<double> l(num_queries);
  for (int64_t q = 0; q < num_queries; ++q) {
    m.mutable_data()[q] = total.softmax[q].m;
    l.mutable_data()[q] = total.softmax[q].l;
  }
  const bool all = std::all_of(complete.begin(), complete.end(), [](char part) { return part; });
  return py::make_tuple(all, m, l, to_numpy(total.ahead), to_numpy(total.near_ties));
}

py::tuple rank_stats(const FloatArrays& arrays, const RankQueryArrays& rank_queries,
                     int64_t max_near_ties, int64_t threads, const std::string& cpu) {
  const auto& kernels = kernels_named(cpu);
  need(rank_queries.raw.size() == arrays.queries.shape(0), "raw: expected one for each query");
  const auto operand = arrays.operand(kernels, 3);
  const auto prepared = arrays.prepared(operand);
  const auto table = arrays.table();
  return add_stretches(
      rank_queries, arrays.rows.shape(0), max_near_ties, threads,
      [&](const r2ec::RankQueries& own, int64_t first, int64_t last, r2ec::RankStats& found) {
        return r2ec::add_rank_stats(table, prepared, arrays.similarity, arrays.huge, own, kernels,
                                    first, last, found);
      });
}

py::tuple code_rank_stats(const CodeArrays& high, const Array<int8_t>& low,
                          const RankQueryArrays& rank_queries, int64_t max_near_ties,
                          int64_t threads, const std::string& cpu) {
  const auto& kernels = kernels_named(cpu);
  need(rank_queries.raw.size() == high.queries.shape(0), "raw: expected one for each query");
  need(low.ndim() == 2 && low.shape(0) >= high.rows && low.shape(1) == high.codes.shape(1),
       "low: expected as many rows and columns as codes");
  const auto operand = high.operand(kernels);
  const r2ec::CodeQueries prepared = {operand, high.step.data()};
  const r2ec::FineTable table = {high.table(), low.data()};
  const float* const error = high.error.data();
  return add_stretches(
      rank_queries, high.rows, max_near_ties, threads,
      [&](const r2ec::RankQueries& own, int64_t first, int64_t last, r2ec::RankStats& found) {
        return r2ec::add_code_rank_stats(table, prepared, error, own, kernels, first, last, found);
      });
}

// Coarse scans into one TopkHeap, with the arrays that it reads.
class TopkScan {
 public:
  TopkScan(int64_t queries, int64_t k, int64_t limit, int64_t workers, Array<int64_t> excluded,
           const std::string& cpu)
      : excluded_(excluded),
        heap_(queries, k, limit, std::max<int64_t>(1, workers), excluded_.data(), excluded_.size()),
        kernels_(kernels_named(cpu)),
        feed_(heap_, kernels_) {}

  void scan_codes(const CodeArrays& arrays, float relative) {
    need(arrays.queries.shape(0) == heap_.queries(), "queries: expected one for each");
    const auto table = arrays.table();
    const auto operand = arrays.operand(kernels_);
    const r2ec::CodeQueries prepared = {operand, arrays.step.data()};
    const float* const error = of_queries(arrays.error);
    py::gil_scoped_release release;
    feed_.run(arrays.rows, error, relative,
              [&](int64_t first, int64_t last, const r2ec::ScanSink& sink) {
                r2ec::scan_codes(table, prepared, first, last, sink);
              });
  }

  // Returns the rows whose scores have no bound, in any order.
  Array<int64_t> scan_floats(const FloatArrays& arrays) {
    need(arrays.queries.shape(0) == heap_.queries(), "queries: expected one for each");
    const auto operand = arrays.operand(kernels_, 2);
    const auto prepared = arrays.prepared(operand);
    const auto table = arrays.table();
    std::vector<int64_t> unbounded;
    {
      py::gil_scoped_release release;
      unbounded =
          feed_.floats(table, arrays.rows.shape(0), prepared, arrays.similarity, arrays.huge);
    }
    return to_numpy(unbounded);
  }

  // Products [N, M], bfloat16 as its bits or float32, or the transpose of float32 [M, N] in memory.
  void scan_products(const py::array& products, int64_t start, int64_t rows,
                     const std::optional<Array<float>>& scale,
                     const std::optional<Array<float>>& half, const Array<float>& error,
                     float relative) {
    const auto own = epilogue_of(scale, half, rows);
    const ProductBlock block(products, rows, heap_.queries());
    const float* const bound = of_queries(error);
    py::gil_scoped_release release;
    feed_.products(block, own, start, bound, relative);
  }

  // (rows int64 [M, most], -1 behind the last; failed bool [M]; how many scores were accepted).
  py::tuple finish() {
    r2ec::TopkHeap::Result result;
    {
      py::gil_scoped_release release;
      result = finished(heap_);
    }
    const auto queries = static_cast<py::ssize_t>(result.rows.size());
    Array<int64_t> rows({queries, static_cast<py::ssize_t>(most_rows(result))});
    write_rows(result, rows.mutable_data());
    Array<bool> failed(queries);
    std::copy(result.failed.begin(), result.failed.end(), failed.mutable_data());
    return py::make_tuple(rows, failed, result.accepted);
  }

 private:
  const float* of_queries(const Array<float>& error) const {
    need(error.size() == heap_.queries(), "error: expected one for each query");
    return error.data();
  }

  Array<int64_t> excluded_;
  r2ec::TopkHeap heap_;
  const r2ec::TileKernels& kernels_;
  HeapFeed feed_;
};

// Canonical scores float32 [P] of the pairs (query[i], row[i]).
Array<float> pair_scores(const ScoringArrays& arrays, const Array<int64_t>& query,
                         const Array<int64_t>& row, int64_t threads) {
  const int64_t n = query.size();
  need(row.size() == n, "query, row: expected one of each for a pair");
  const int64_t *const whose = query.data(), *const where = row.data();
  for (int64_t i = 0; i < n; ++i) {
    need(whose[i] >= 0 && whose[i] < arrays.queries.shape(0) && where[i] >= 0,
         "query, row: out of range");
    arrays.check_row(where[i]);
  }
  Array<float> scores(n);
  float* const out = scores.mutable_data();
  const auto view = arrays.view();
  {
    py::gil_scoped_release release;
    constexpr int64_t kPairs = 32;  // taken at a time
    in_parallel((n + kPairs - 1) / kPairs, threads, [&](int64_t, int64_t piece) {
      r2ec::Scorer scorer(view);
      const int64_t end = std::min(n, (piece + 1) * kPairs);
      for (int64_t i = piece * kPairs; i < end; ++i) {
        if (i + 1 < end) scorer.ask_for(where[i + 1]);
        out[i] = scorer.score(whose[i], where[i]);
      }
    });
  }
  return scores;
}

// Order keys int64 [M, k] of the best candidates [M, n] (row positions, -1 for none).
Array<int64_t> best_keys(const ScoringArrays& arrays, const std::optional<Array<int64_t>>& ids,
                         const Array<int64_t>& candidates, int64_t k, int64_t threads) {
  const int64_t num_queries = arrays.queries.shape(0);
  need(candidates.ndim() == 2 && candidates.shape(0) == num_queries,
       "candidates: expected [queries, n]");
  const int64_t* const id = optional_rows(ids, arrays.rows.shape(0), "ids: too short");
  for (int64_t i = 0; i < candidates.size(); ++i) arrays.check_row(candidates.data()[i]);
  Array<int64_t> keys({num_queries, k});
  int64_t* const out = keys.mutable_data();
  const auto view = arrays.view();
  {
    py::gil_scoped_release release;
    write_best_keys(view, id, {candidates.data(), num_queries, candidates.shape(1)}, k, threads,
                    out);
  }
  return keys;
}

void multiply_codes(const Array<int8_t>& codes, const Array<int16_t>& queries,
                    const Array<float>& step, py::array_t<float>& out, int64_t threads,
                    const std::string& cpu) {
  need(codes.ndim() == 2 && codes.shape(1) % r2ec::kCodeColumns == 0,
       "codes: expected [rows, a multiple of 64]");
  need(queries.ndim() == 2 && queries.shape(1) == codes.shape(1) && step.size() == queries.shape(0),
       "queries: expected [queries, columns] and a step for each");
  need(out.ndim() == 2 && out.shape(0) == queries.shape(0) && out.shape(1) == codes.shape(0) &&
           (out.flags() & py::array::c_style),
       "out: expected [queries, rows]");
  const int8_t* const rows = codes.data();
  const int64_t columns = codes.shape(1), num_queries = queries.shape(0), n = codes.shape(0);
  const auto& kernels = kernels_named(cpu);
  r2ec::CodeOperand operand = {num_queries, columns, queries.data(), {}};
  kernels.prepare_codes(operand);
  const float* const steps = step.data();
  float* const to = out.mutable_data();
  py::gil_scoped_release release;
  by_pieces(n, threads, [&](int64_t, int64_t first, int64_t last) {
    std::vector<int32_t> sums(num_queries * r2ec::kGroup);
    for (int64_t row = first; row < last; row += r2ec::kGroup) {
      const int64_t count = std::min(r2ec::kGroup, last - row);
      kernels.multiply_codes({rows + row * columns, columns, count}, operand, sums.data());
      for (int64_t q = 0; q < num_queries; ++q)
        for (int64_t i = 0; i < count; ++i)
          to[q * n + row + i] = static_cast<float>(sums[q * r2ec::kGroup + i]) * steps[q];
    }
  });
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "C++ side of r2ec_kernels.compiled";
  module.def("cpu_kinds", [] {  // that this one can run, the best first
    std::vector<std::string> kinds;
    for (const char* name : {"amx", "avx512", "avx2", "portable"})
      if (r2ec::find_kernels(name)) kinds.emplace_back(name);
    return kinds;
  });
  module.def("multiply_codes", &multiply_codes, py::arg("codes"), py::arg("queries"),
             py::arg("step"), py::arg("out"), py::arg("threads"), py::arg("cpu"));
  py::class_<ScoringArrays>(module, "ScoringArrays")
      .def(py::init<py::array_t<float>, Array<double>, const std::string&, double>(),
           py::arg("rows"), py::arg("queries"), py::arg("similarity"), py::arg("temperature"));
  module.def("pair_scores", &pair_scores, py::arg("arrays"), py::arg("query"), py::arg("row"),
             py::arg("threads"));
  module.def("best_keys", &best_keys, py::arg("arrays"), py::arg("ids").none(true),
             py::arg("candidates"), py::arg("k"), py::arg("threads"));
  py::class_<FloatArrays>(module, "FloatArrays")
      .def(py::init<py::array_t<float>, Array<float>, Array<float>, Array<float>,
                    const std::string&, double>(),
           py::arg("rows"), py::arg("queries"), py::arg("norm"), py::arg("floor"),
           py::arg("similarity"), py::arg("huge"));
  py::class_<CodeArrays>(module, "CodeArrays")
      .def(
          py::init<Array<int8_t>, int64_t, std::optional<Array<float>>, std::optional<Array<float>>,
                   std::optional<Array<bool>>, Array<int16_t>, Array<float>, Array<float>>(),
          py::arg("codes"), py::arg("rows"), py::arg("scale").none(true),
          py::arg("half").none(true), py::arg("bounded").none(true), py::arg("queries"),
          py::arg("step"), py::arg("error"));
  py::class_<RankQueryArrays>(module, "RankQueryArrays")
      .def(py::init<Array<double>, Array<float>, Array<float>, Array<double>, Array<int64_t>>(),
           py::arg("raw"), py::arg("rounded"), py::arg("log2_scale"), py::arg("l"),
           py::arg("excluded"));
  module.def("rank_stats", &rank_stats, py::arg("arrays"), py::arg("rank_queries"),
             py::arg("max_near_ties"), py::arg("threads"), py::arg("cpu"));
  module.def("code_rank_stats", &code_rank_stats, py::arg("high"), py::arg("low"),
             py::arg("rank_queries"), py::arg("max_near_ties"), py::arg("threads"), py::arg("cpu"));
  py::class_<TopkScan>(module, "TopkScan")
      .def(py::init<int64_t, int64_t, int64_t, int64_t, Array<int64_t>, const std::string&>(),
           py::arg("queries"), py::arg("k"), py::arg("limit"), py::arg("workers"),
           py::arg("excluded"), py::arg("cpu"))
      .def("scan_codes", &TopkScan::scan_codes, py::arg("arrays"), py::arg("relative"))
      .def("scan_floats", &TopkScan::scan_floats, py::arg("arrays"))
      .def("scan_products", &TopkScan::scan_products, py::arg("products"), py::arg("start"),
           py::arg("rows"), py::arg("scale").none(true), py::arg("half").none(true),
           py::arg("error"), py::arg("relative"))
      .def("finish", &TopkScan::finish);
  py::class_<RowSearch>(module, "RowSearch")
      .def(py::init<py::array_t<float>, Array<float>, const std::string&, double, double, int64_t,
                    int64_t, std::optional<Array<int64_t>>, std::optional<Array<int64_t>>, int64_t,
                    const std::string&>(),
           py::arg("rows"), py::arg("queries"), py::arg("similarity"), py::arg("temperature"),
           py::arg("huge"), py::arg("k"), py::arg("limit"), py::arg("excluded").none(true),
           py::arg("offsets").none(true), py::arg("threads"), py::arg("cpu"))
      .def_property_readonly("bounded", &RowSearch::bounded)
      .def("scan", &RowSearch::scan)
      .def("add", &RowSearch::add, py::arg("products"), py::arg("start"), py::arg("norms"))
      .def("finish", &RowSearch::finish, py::arg("ids").none(true));
}
