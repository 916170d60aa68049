// Products of one group of rows (up to kGroup) with all queries, and how far their scores may be
// off.
//
// A pass takes a table group by group: multiply() makes the products, products(q) are those with
// one query, epilogue() makes raw scores of them, error(q) bounds the scores' errors, allowed() has
// a bit for each row that has such a bound.
//
// The raw score of a float32 row and the one that exact arithmetic gives differ by at most
//
//   error(q) = u * size(q) + 2 * floor[q],     u = 1.01 * (error_terms + roundings) * 2^-24
//
// with the `size` of tables.hpp for the largest norm in the group. Where a norm lies outside
// 1/huge .. huge, float32 may have lost it: such a row has no bound and is reported as unbounded.
// Rows of codes come with their bound, error[q], which the quantizer derives.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "simd/tiles.hpp"
#include "tables.hpp"

namespace r2ec {

// Bits of the rows whose scores have a bound.
inline uint32_t bounded_rows(const CodeTable& table, int64_t row, int64_t count) {
  if (!table.bounded) return ~0u;
  uint32_t allowed = 0;
  for (int64_t i = 0; i < count; ++i) allowed |= static_cast<uint32_t>(table.bounded[row + i]) << i;
  return allowed;
}

// Error of a raw score relative to its size, where a product has errors of `terms` * 2^-24:
// canonical rounding, the norm and its reciprocal (cosine) or its square (l2) included.
inline double error_unit(Similarity similarity, double terms) {
  constexpr double kSafety = 1.01;  // second-order terms and float32 norms
  const double all = similarity == Similarity::kCosine ? 1.5 * terms + 12.0 : terms + 10.0;
  return kSafety * all * 0x1p-24;
}

// An upper bound of rows' norms, of which `largest` is the largest in float32: squares below
// float32's normal range may be lost from a norm.
inline double norm_bound(double largest, int64_t columns) {
  return largest * 1.001 + std::sqrt(static_cast<double>(columns)) * 0x1p-62;
}

// Bound of the raw scores' errors of a query, for rows of at most `row_norm`. AMX tiles flush parts
// and sums below the normal range to 0, not only products: twice the floor.
inline double score_error(Similarity similarity, double unit, double query_norm, double row_norm,
                          double floor) {
  const double size = similarity == Similarity::kCosine ? query_norm
                      : similarity == Similarity::kL2
                          ? (query_norm + row_norm) * (query_norm + row_norm)
                          : query_norm * row_norm;
  return (unit * size + 2.0 * floor) * (1 + 0x1p-20);
}

// Whether float32 holds a row's norm, so that its score has a bound.
inline bool is_bounded(const FloatTable& table, Similarity similarity, double huge, int64_t row,
                       double norm) {
  if (similarity == Similarity::kCosine && norm < 1.0 / huge) {
    const float* const values = table.rows + row * table.stride;
    return std::all_of(values, values + table.columns, [](float x) { return x == 0.0f; });
  }
  return norm <= huge;  // false for NaN
}

// A group of float32 rows.
class FloatGroup {
 public:
  FloatGroup(const FloatTable& table, const FloatQueries& queries, Similarity similarity,
             double huge, const TileKernels& kernels)
      : table_(table),
        queries_(queries),
        similarity_(similarity),
        huge_(huge),
        kernels_(kernels),
        error_unit_(error_unit(similarity, queries.operand.error_terms)),
        products_(queries.operand.num_queries * kGroup) {}

  // Rows without a bound are appended to `unbounded`.
  void multiply(int64_t row, int64_t count, std::vector<int64_t>& unbounded) {
    float squares[kGroup];
    kernels_.multiply_floats({table_.rows + row * table_.stride, table_.stride, count},
                             queries_.operand, products_.data(), squares);
    allowed_ = 0;
    largest_ = 0.0;
    for (int64_t i = 0; i < count; ++i) {
      const double norm = std::sqrt(static_cast<double>(squares[i]));
      scale_[i] = norm > 0.0 ? static_cast<float>(1.0 / norm) : 0.0f;
      half_[i] = 0.5f * squares[i];
      if (is_bounded(table_, similarity_, huge_, row + i, norm)) {
        largest_ = std::max(largest_, norm);
        allowed_ |= 1u << i;
      } else {
        unbounded.push_back(row + i);
      }
    }
    largest_ = norm_bound(largest_, table_.columns);
  }

  float* products(int64_t query) { return products_.data() + query * kGroup; }
  Epilogue epilogue() const {
    return {similarity_ == Similarity::kCosine ? scale_ : nullptr,
            similarity_ == Similarity::kL2 ? half_ : nullptr};
  }
  uint32_t allowed() const { return allowed_; }  // bits of bounded rows

  double error(int64_t query) const {
    return score_error(similarity_, error_unit_, queries_.norm[query], largest_,
                       queries_.floor[query]);
  }

 private:
  const FloatTable& table_;
  const FloatQueries& queries_;
  const Similarity similarity_;
  const double huge_;
  const TileKernels& kernels_;
  const double error_unit_;
  std::vector<float> products_;  // [queries, kGroup]
  float scale_[kGroup], half_[kGroup];
  uint32_t allowed_ = 0;
  double largest_ = 0.0;
};

// A group of rows as two codes: products of both, as (254 * high + low) * step / 254.
class FineGroup {
 public:
  FineGroup(const FineTable& table, const CodeQueries& queries, const float* error,
            const TileKernels& kernels)
      : table_(table),
        queries_(queries),
        error_(error),
        kernels_(kernels),
        high_(queries.operand.num_queries * kGroup),
        low_(high_.size()),
        products_(high_.size()) {}

  void multiply(int64_t row, int64_t count, std::vector<int64_t>& unbounded) {
    const CodeTable& table = table_.high;
    const int64_t at = row * table.columns;
    kernels_.multiply_codes({table.codes + at, table.columns, count}, queries_.operand,
                            high_.data());
    kernels_.multiply_codes({table_.low + at, table.columns, count}, queries_.operand, low_.data());
    for (int64_t q = 0; q < queries_.operand.num_queries; ++q) {
      const float step = queries_.step[q] / kLowParts;
      const int32_t *const high = high_.data() + q * kGroup, *const low = low_.data() + q * kGroup;
      float* const out = products(q);
      for (int64_t i = 0; i < kGroup; ++i)
        out[i] = (static_cast<float>(high[i]) * kLowParts + static_cast<float>(low[i])) * step;
    }
    scale_ = table.epilogue.scale ? table.epilogue.scale + row : nullptr;
    allowed_ = bounded_rows(table, row, count);
    for (int64_t i = 0; i < count; ++i)
      if (!(allowed_ >> i & 1)) unbounded.push_back(row + i);
    if (count < kGroup) {  // what lies behind the last row is not read
      allowed_ &= (1u << count) - 1;
      for (int64_t i = 0; scale_ && i < count; ++i) last_scale_[i] = scale_[i];
      if (scale_) scale_ = last_scale_;
    }
  }

  float* products(int64_t query) { return products_.data() + query * kGroup; }
  Epilogue epilogue() const { return {scale_, nullptr}; }
  uint32_t allowed() const { return allowed_; }
  double error(int64_t query) const { return error_[query]; }

 private:
  const FineTable& table_;
  const CodeQueries& queries_;
  const float* const error_;
  const TileKernels& kernels_;
  std::vector<int32_t> high_, low_;  // [queries, kGroup]
  std::vector<float> products_;
  const float* scale_ = nullptr;
  float last_scale_[kGroup] = {};
  uint32_t allowed_ = 0;
};

}  // namespace r2ec
