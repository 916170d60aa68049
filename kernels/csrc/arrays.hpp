// The arrays that Python hands over, as views that the passes read. Shapes are checked here, so
// that no call can read or write outside its arrays; M queries, N rows (items), D columns. And the
// workers that take pieces of a table: OpenMP, which shares its threads with torch.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <exception>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "coarse_scan.hpp"
#include "exact_score.hpp"
#include "rank_pass.hpp"
#include "tables.hpp"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace r2ec_bindings {

namespace py = pybind11;

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

constexpr int64_t kPiece = 1024;  // rows a worker takes at a time, a multiple of kGroup

inline void need(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

template <typename T>
const T* optional_rows(const std::optional<Array<T>>& array, int64_t rows, const char* what) {
  if (!array) return nullptr;
  need(array->size() >= rows, what);
  return array->data();
}

// Calls work(worker, i) for i in 0..count-1, in any order; rethrows what one of them threw.
template <typename Work>
void in_parallel(int64_t count, int64_t workers, const Work& work) {
  std::exception_ptr thrown;
  const auto guarded = [&](int64_t worker, int64_t i) {
    try {
      work(worker, i);
    } catch (...) {
#pragma omp critical
      thrown = std::current_exception();
    }
  };
#ifdef _OPENMP
  const int threads = static_cast<int>(std::max<int64_t>(1, std::min(workers, count)));
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t i = 0; i < count; ++i) guarded(omp_get_thread_num(), i);
#else
  (void)workers;
  for (int64_t i = 0; i < count; ++i) guarded(0, i);
#endif
  if (thrown) std::rethrow_exception(thrown);
}

// Calls work(worker, first, last) for pieces that cover 0..rows-1, in any order.
template <typename Work>
void by_pieces(int64_t rows, int64_t workers, const Work& work) {
  in_parallel((rows + kPiece - 1) / kPiece, workers, [&](int64_t worker, int64_t piece) {
    work(worker, piece * kPiece, std::min(rows, (piece + 1) * kPiece));
  });
}

inline Array<int64_t> to_numpy(const std::vector<int64_t>& values) {
  return Array<int64_t>(values.size(), values.data());
}

inline r2ec::Similarity similarity_of(const std::string& name) {
  if (name == "dot") return r2ec::Similarity::kDot;
  if (name == "cosine") return r2ec::Similarity::kCosine;
  need(name == "l2", "similarity: expected dot, cosine or l2");
  return r2ec::Similarity::kL2;
}

inline r2ec::FloatTable table_of(const py::array_t<float>& rows) {
  need(rows.ndim() == 2 && (rows.shape(1) == 1 || rows.strides(1) == sizeof(float)),
       "rows: expected [rows, columns] with columns side by side");
  return {rows.data(), rows.strides(0) / static_cast<int64_t>(sizeof(float)), rows.shape(1)};
}

// float32 rows [N, D] and queries for them, as tables.hpp describes them.
struct FloatArrays {
  py::array_t<float> rows;
  Array<float> queries, norm, floor;
  double huge;
  r2ec::Similarity similarity;

  FloatArrays(py::array_t<float> rows, Array<float> queries, Array<float> norm, Array<float> floor,
              const std::string& similarity, double huge)
      : rows(rows), queries(queries), norm(norm), floor(floor), huge(huge) {
    need(queries.ndim() == 2 && queries.shape(1) == table().columns,
         "queries: expected [queries, columns]");
    need(norm.size() == queries.shape(0) && floor.size() == queries.shape(0),
         "norm, floor: expected one for each query");
    this->similarity = similarity_of(similarity);
  }

  r2ec::FloatTable table() const { return table_of(rows); }
  r2ec::FloatOperand operand(const r2ec::TileKernels& kernels, int parts) const {
    need(parts == 2 || parts == 3, "parts: expected 2 or 3");
    r2ec::FloatOperand made(queries.data(), queries.shape(0), queries.shape(1), parts);
    kernels.prepare_floats(made);
    return made;
  }
  r2ec::FloatQueries prepared(const r2ec::FloatOperand& operand) const {
    return {operand, norm.data(), floor.data()};
  }
};

inline const r2ec::TileKernels& kernels_named(const std::string& cpu) {
  const r2ec::TileKernels* const found =
      cpu.empty() ? &r2ec::best_kernels() : r2ec::find_kernels(cpu.c_str());
  need(found != nullptr, "cpu: not one this machine can run");
  return *found;
}

inline r2ec::Epilogue epilogue_of(const std::optional<Array<float>>& scale,
                                  const std::optional<Array<float>>& half, int64_t rows) {
  return {optional_rows(scale, rows, "scale: too short"),
          optional_rows(half, rows, "half: too short")};
}

// int8 codes [N or more, D] and int16 queries for them, as tables.hpp describes them.
struct CodeArrays {
  Array<int8_t> codes;
  int64_t rows;
  std::optional<Array<float>> scale, half;
  std::optional<Array<bool>> bounded;
  Array<int16_t> queries;
  Array<float> step, error;

  CodeArrays(Array<int8_t> codes, int64_t rows, std::optional<Array<float>> scale,
             std::optional<Array<float>> half, std::optional<Array<bool>> bounded,
             Array<int16_t> queries, Array<float> step, Array<float> error)
      : codes(codes),
        rows(rows),
        scale(scale),
        half(half),
        bounded(bounded),
        queries(queries),
        step(step),
        error(error) {
    need(codes.ndim() == 2 && codes.shape(0) >= rows, "codes: expected [rows, columns]");
    need(codes.shape(1) % r2ec::kCodeColumns == 0, "codes: columns must be a multiple of 64");
    need(queries.ndim() == 2 && queries.shape(1) == codes.shape(1),
         "queries: expected [queries, columns]");
    need(step.size() == queries.shape(0) && error.size() == queries.shape(0),
         "step, error: expected one for each query");
  }

  r2ec::CodeTable table() const {
    return {codes.data(), codes.shape(1), epilogue_of(scale, half, rows),
            optional_rows(bounded, rows, "bounded: too short")};
  }
  r2ec::CodeOperand operand(const r2ec::TileKernels& kernels) const {
    r2ec::CodeOperand made = {queries.shape(0), queries.shape(1), queries.data(), {}};
    kernels.prepare_codes(made);
    return made;
  }
};

// What a rank pass compares scores with: of each query, and the pairs that do not compete.
// rank_pass.hpp. l: the weights of the targets themselves, relative to m = 0.
struct RankQueryArrays {
  Array<double> raw, l;
  Array<float> rounded, log2_scale;
  Array<int64_t> excluded;

  RankQueryArrays(Array<double> raw, Array<float> rounded, Array<float> log2_scale, Array<double> l,
                  Array<int64_t> excluded)
      : raw(raw), l(l), rounded(rounded), log2_scale(log2_scale), excluded(excluded) {
    need(rounded.size() == raw.size() && log2_scale.size() == raw.size() && l.size() == raw.size(),
         "raw, rounded, log2_scale, l: expected one for each query");
  }

  std::vector<r2ec::TargetScore> targets() const {
    std::vector<r2ec::TargetScore> made;
    for (py::ssize_t q = 0; q < raw.size(); ++q)
      made.push_back({raw.data()[q], rounded.data()[q], log2_scale.data()[q]});
    return made;
  }
};

// float32 rows [N, D], float64 queries and how they are scored, as exact_score.hpp wants
// them.
struct ScoringArrays {
  py::array_t<float> rows;
  Array<double> queries;
  r2ec::Similarity similarity;
  double temperature;

  ScoringArrays(py::array_t<float> rows, Array<double> queries, const std::string& similarity,
                double temperature)
      : rows(rows),
        queries(queries),
        similarity(similarity_of(similarity)),
        temperature(temperature) {
    need(queries.ndim() == 2 && queries.shape(1) == table_of(rows).columns,
         "queries: expected [queries, columns]");
  }

  r2ec::Scoring view() const {
    return {table_of(rows), queries.data(), queries.shape(0), similarity, temperature};
  }
  void check_row(int64_t row) const { need(row < rows.shape(0), "rows: out of range"); }
};

}  // namespace r2ec_bindings
