// pybind11 only: checks arrays and hands out rows to workers. OpenMP shares its threads with torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>

#include "first_pass.hpp"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

constexpr int64_t kPiece = 1024;  // rows a worker takes at a time, a multiple of kGroup

void need(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

template <typename T>
const T* optional_rows(const std::optional<Array<T>>& array, int64_t rows, const char* what) {
  if (!array) return nullptr;
  need(array->size() >= rows, what);
  return array->data();
}

// Calls work(worker, first, last) for pieces that cover 0..rows-1, in any order.
template <typename Work>
void by_pieces(int64_t rows, int64_t workers, const Work& work) {
  const int64_t pieces = (rows + kPiece - 1) / kPiece;
#ifdef _OPENMP
  const int threads = static_cast<int>(std::min(workers, pieces));
#pragma omp parallel for schedule(dynamic) num_threads(std::max(1, threads))
#endif
  for (int64_t piece = 0; piece < pieces; ++piece) {
#ifdef _OPENMP
    const int64_t worker = omp_get_thread_num();
#else
    const int64_t worker = 0;
#endif
    work(worker, piece * kPiece, std::min(rows, (piece + 1) * kPiece));
  }
  (void)workers;
}

// A Selection with the arrays it reads.
class Collector {
 public:
  Collector(int64_t queries, int64_t k, int64_t limit, int64_t workers, Array<int64_t> excluded,
            const std::string& cpu)
      : excluded_(excluded),
        selection_(queries, k, limit, std::max<int64_t>(1, workers), excluded_.data(),
                   excluded_.size()),
        tiles_(cpu.empty() ? &r2ec::best_tiles() : r2ec::find_tiles(cpu.c_str())) {
    need(tiles_ != nullptr, "cpu: not one this machine can run");
  }

  void codes(const Array<int8_t>& codes, int64_t rows, const std::optional<Array<float>>& scale,
             const std::optional<Array<float>>& half, const std::optional<Array<bool>>& trusted,
             const Array<int16_t>& queries, const Array<float>& step, const Array<float>& error,
             float relative) {
    need(codes.ndim() == 2 && codes.shape(0) >= rows, "codes: expected [rows, columns]");
    const int64_t columns = codes.shape(1);
    need(columns % r2ec::kCodeColumns == 0, "codes: columns must be a multiple of 64");
    need(queries.ndim() == 2 && queries.shape(0) == selection_.queries() &&
             queries.shape(1) == columns,
         "queries: expected [queries, columns]");
    need(step.size() == selection_.queries(), "step: expected one for each query");
    const r2ec::CodeTable table = {codes.data(), columns, finish_of(scale, half, rows),
                                   optional_rows(trusted, rows, "trusted: too short")};
    const r2ec::CodeQueries prepared = {queries.data(), step.data()};
    run(rows, error, relative, [&](int64_t first, int64_t last, const r2ec::Offers& offers) {
      r2ec::scan_codes(table, prepared, first, last, offers);
    });
  }

  // Returns the rows whose scores cannot be bounded, in any order.
  Array<int64_t> floats(const py::array_t<float>& rows, const Array<float>& queries,
                        const Array<float>& norm, const Array<float>& floor, double unit,
                        const std::string& similarity, double huge) {
    need(rows.ndim() == 2 && (rows.shape(1) == 1 || rows.strides(1) == sizeof(float)),
         "rows: expected [rows, columns] with columns side by side");
    const int64_t stride = rows.strides(0) / static_cast<int64_t>(sizeof(float));
    const int64_t columns = rows.shape(1);
    need(queries.ndim() == 2 && queries.shape(0) == selection_.queries() &&
             queries.shape(1) >= columns && queries.shape(1) % r2ec::kFloatColumns == 0,
         "queries: expected [queries, columns padded to a multiple of 16]");
    need(norm.size() == selection_.queries() && floor.size() == selection_.queries(),
         "norm, floor: expected one for each query");
    need(similarity == "dot" || similarity == "cosine" || similarity == "l2",
         "similarity: expected dot, cosine or l2");
    const auto kind = similarity == "dot"      ? r2ec::Similarity::kDot
                      : similarity == "cosine" ? r2ec::Similarity::kCosine
                                               : r2ec::Similarity::kL2;
    const r2ec::FloatTable table = {rows.data(), stride, columns};
    const r2ec::FloatQueries prepared = {queries.data(), queries.shape(1), norm.data(),
                                         floor.data(), unit};
    std::vector<std::vector<int64_t>> doubtful(selection_.workers());
    run(rows.shape(0), floor, 0x1p-22f,
        [&](int64_t first, int64_t last, const r2ec::Offers& offers) {
          r2ec::scan_floats(table, prepared, kind, huge, first, last, offers,
                            doubtful[offers.worker]);
        });
    std::vector<int64_t> all;
    for (const auto& own : doubtful) all.insert(all.end(), own.begin(), own.end());
    return Array<int64_t>(all.size(), all.data());
  }

  // Products [rows, queries], bfloat16 as its bits or float32, or the transpose of float32
  // [queries, rows] in memory.
  void products(const py::array& products, int64_t start, int64_t rows,
                const std::optional<Array<float>>& scale, const std::optional<Array<float>>& half,
                const Array<float>& error, float relative) {
    need(products.ndim() == 2 && products.shape(0) >= rows &&
             products.shape(1) == selection_.queries(),
         "products: expected [rows, queries]");
    const auto own = finish_of(scale, half, rows);
    const int64_t size = products.itemsize();
    const int64_t by_row = products.strides(0) / size, by_query = products.strides(1) / size;
    const bool is_float = py::isinstance<py::array_t<float>>(products);
    need(is_float || py::isinstance<py::array_t<uint16_t>>(products),
         "products: expected float32 or the bits of bfloat16");
    const void* const values = products.data();
    if (by_query == 1 || selection_.queries() == 1) {
      run(rows, error, relative, [&](int64_t first, int64_t last, const r2ec::Offers& offers) {
        if (is_float)
          r2ec::scan_products(static_cast<const float*>(values), by_row, own, start, first, last,
                              offers);
        else
          r2ec::scan_products(static_cast<const r2ec::Bfloat16*>(values), by_row, own, start,
                              first, last, offers);
      });
    } else {
      need(is_float && by_row == 1, "products: expected rows or queries side by side");
      run(rows, error, relative, [&](int64_t first, int64_t last, const r2ec::Offers& offers) {
        r2ec::scan_product_columns(static_cast<const float*>(values), by_query, own, start, first,
                                   last, offers);
      });
    }
  }

  // (rows int64 [queries, most], -1 behind the last; failed bool [queries]; rows offered).
  py::tuple finish() {
    r2ec::Selection::Result result;
    {
      py::gil_scoped_release release;
      result = selection_.finish();
    }
    size_t most = 0;
    for (const auto& rows : result.rows) most = std::max(most, rows.size());
    const auto queries = static_cast<py::ssize_t>(result.rows.size());
    Array<int64_t> rows({queries, static_cast<py::ssize_t>(most)});
    Array<bool> failed(queries);
    for (py::ssize_t q = 0; q < queries; ++q) {
      int64_t* const out = rows.mutable_data() + q * static_cast<py::ssize_t>(most);
      std::fill(std::copy(result.rows[q].begin(), result.rows[q].end(), out), out + most, -1);
      failed.mutable_data()[q] = result.failed[q] != 0;
    }
    return py::make_tuple(rows, failed, result.offered);
  }

 private:
  static r2ec::Finish finish_of(const std::optional<Array<float>>& scale,
                             const std::optional<Array<float>>& half, int64_t rows) {
    return {optional_rows(scale, rows, "scale: too short"),
            optional_rows(half, rows, "half: too short")};
  }

  template <typename Scan>
  void run(int64_t rows, const Array<float>& error, float relative, const Scan& scan) {
    need(error.size() == selection_.queries(), "error: expected one for each query");
    const float* const bound = error.data();
    py::gil_scoped_release release;
    by_pieces(rows, selection_.workers(), [&](int64_t worker, int64_t first, int64_t last) {
      scan(first, last, r2ec::Offers{selection_, *tiles_, worker, bound, relative});
    });
  }

  Array<int64_t> excluded_;
  r2ec::Selection selection_;
  const r2ec::Tiles* tiles_;
};

void multiply_codes(const Array<int8_t>& codes, const Array<int16_t>& queries,
                    const Array<float>& step, py::array_t<float>& out, int64_t threads) {
  need(codes.ndim() == 2 && codes.shape(1) % r2ec::kCodeColumns == 0,
       "codes: expected [rows, a multiple of 64]");
  need(queries.ndim() == 2 && queries.shape(1) == codes.shape(1) &&
           step.size() == queries.shape(0),
       "queries: expected [queries, columns] and a step for each");
  need(out.ndim() == 2 && out.shape(0) == codes.shape(0) && out.shape(1) == queries.shape(0) &&
           (out.flags() & py::array::c_style),
       "out: expected [rows, queries]");
  const int8_t* const rows = codes.data();
  const int64_t columns = codes.shape(1), num_queries = queries.shape(0), n = codes.shape(0);
  const int16_t* const values = queries.data();
  const float* const steps = step.data();
  float* const to = out.mutable_data();
  py::gil_scoped_release release;
  by_pieces(n, threads, [&](int64_t, int64_t first, int64_t last) {
    std::vector<int32_t> sums(num_queries * r2ec::kGroup);
    for (int64_t row = first; row < last; row += r2ec::kGroup) {
      const int64_t count = std::min(r2ec::kGroup, last - row);
      r2ec::best_tiles().multiply_codes({rows + row * columns, columns, count}, values,
                                        num_queries, columns, sums.data());
      for (int64_t i = 0; i < count; ++i)
        for (int64_t q = 0; q < num_queries; ++q)
          to[(row + i) * num_queries + q] =
              static_cast<float>(sums[q * r2ec::kGroup + i]) * steps[q];
    }
  });
}

}  // namespace

PYBIND11_MODULE(_first_pass, module) {
  module.doc() = "C++ side of r2ec_kernels.search.compiled";
  module.def("cpu_kind", [] { return r2ec::best_tiles().name; });
  module.def("multiply_codes", &multiply_codes, py::arg("codes"), py::arg("queries"),
             py::arg("step"), py::arg("out"), py::arg("threads"));
  py::class_<Collector>(module, "Collector")
      .def(py::init<int64_t, int64_t, int64_t, int64_t, Array<int64_t>, const std::string&>(),
           py::arg("queries"), py::arg("k"), py::arg("limit"), py::arg("workers"),
           py::arg("excluded"), py::arg("cpu"))
      .def("codes", &Collector::codes, py::arg("codes"), py::arg("rows"), py::arg("scale").none(true),
           py::arg("half").none(true), py::arg("trusted").none(true), py::arg("queries"),
           py::arg("step"), py::arg("error"), py::arg("relative"))
      .def("floats", &Collector::floats, py::arg("rows"), py::arg("queries"), py::arg("norm"),
           py::arg("floor"), py::arg("unit"), py::arg("similarity"), py::arg("huge"))
      .def("products", &Collector::products, py::arg("products"), py::arg("start"), py::arg("rows"),
           py::arg("scale").none(true), py::arg("half").none(true), py::arg("error"),
           py::arg("relative"))
      .def("finish", &Collector::finish);
}
