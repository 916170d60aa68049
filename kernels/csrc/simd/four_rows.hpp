// The register tile of AVX2 and AVX-512: four item rows times Q queries, for any width of vectors.
//
//   one column step:      query 0 .. Q-1 (a vector of each, loaded in turn)
//              row 0      sum[0][0] .. sum[0][Q-1]
//              row 1      sum[1][0] .. sum[1][Q-1]      a vector of the row times a vector of the
//              row 2      sum[2][0] .. sum[2][Q-1]      query is added to each sum
//              row 3      sum[3][0] .. sum[3][Q-1]
//
// The 4 x Q sums, the four rows and one query stay in registers: a query's load serves four
// products, a row's Q. The lanes of a sum are added after the last column. While a row is
// multiplied, the one `kPrefetchRows` behind it is fetched into the first-level cache.
//
// A file that includes this defines TARGET, the attribute of its instructions, and a class V:
//   V::Ints, V::kCodes          int16 lanes of a vector, in pairs: multiply_add sums two products
//   V::Floats, V::kFloats       float32 lanes
// Everything is local to that file, so that no code for one CPU is linked into the kernels of
// another.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>

#include "simd/tiles.hpp"

#ifndef TARGET
#error "define TARGET, the attribute of the instructions, before this header"
#endif

namespace r2ec {
namespace {

constexpr int kRows = 4;
constexpr int64_t kPrefetchRows = 8;

template <typename T>
struct FourRows {
  const T* row[kRows];
  int64_t count;     // of them that exist; the block's last row stands for those beyond
  int64_t prefetch;  // elements from a row to the one to be fetched

  FourRows(const RowBlock<T>& block, int64_t first)
      : count(block.count - first < kRows ? block.count - first : kRows),
        prefetch(kPrefetchRows * block.stride) {
    for (int64_t r = 0; r < kRows; ++r)
      row[r] = block.rows + (first + (r < count ? r : count - 1)) * block.stride;
  }
};

template <typename V, int Q>
TARGET void codes_tile(const FourRows<int8_t>& rows, const int16_t* queries, int64_t columns,
                       int32_t* out) {
  typename V::Ints sum[kRows][Q];
  for (int r = 0; r < kRows; ++r)
    for (int q = 0; q < Q; ++q) sum[r][q] = V::zero_ints();
  for (int64_t c = 0; c < columns; c += kCodeColumns) {
    for (int part = 0; part < kCodeColumns / V::kCodes; ++part) {
      const int64_t at = c + V::kCodes * part;
      typename V::Ints row[kRows];
      for (int r = 0; r < kRows; ++r) row[r] = V::widen(rows.row[r] + at);
      for (int q = 0; q < Q; ++q) {
        const typename V::Ints query = V::load(queries + q * columns + at);
        for (int r = 0; r < kRows; ++r) sum[r][q] = V::multiply_add(sum[r][q], row[r], query);
      }
    }
    for (int r = 0; r < kRows; ++r)
      _mm_prefetch(reinterpret_cast<const char*>(rows.row[r] + c + rows.prefetch), _MM_HINT_T0);
  }
  for (int q = 0; q < Q; ++q)
    for (int r = 0; r < rows.count; ++r) out[q * kGroup + r] = V::sum_of(sum[r][q]);
}

// `squares` of the rows are made beside the first queries alone.
template <typename V, int Q, bool kSquares>
TARGET void floats_tile(const FourRows<float>& rows, const float* queries, int64_t query_stride,
                        int64_t columns, float* out, float* squares) {
  typename V::Floats sum[kRows][Q], square[kRows];
  for (int r = 0; r < kRows; ++r) {
    square[r] = V::zero_floats();
    for (int q = 0; q < Q; ++q) sum[r][q] = V::zero_floats();
  }
  for (int64_t c = 0; c < columns; c += V::kFloats) {
    typename V::Floats row[kRows];
    for (int r = 0; r < kRows; ++r) {
      row[r] = V::load_first(rows.row[r] + c, columns - c);
      if (V::kFloats >= 16 || c % 16 == 0)  // once a cache line
        _mm_prefetch(reinterpret_cast<const char*>(rows.row[r] + c + rows.prefetch), _MM_HINT_T0);
      if (kSquares) square[r] = V::multiply_add(square[r], row[r], row[r]);
    }
    for (int q = 0; q < Q; ++q) {
      const typename V::Floats query = V::load(queries + q * query_stride + c);
      for (int r = 0; r < kRows; ++r) sum[r][q] = V::multiply_add(sum[r][q], row[r], query);
    }
  }
  for (int r = 0; r < rows.count; ++r) {
    for (int q = 0; q < Q; ++q) out[q * kGroup + r] = V::sum_of(sum[r][q]);
    if (kSquares) squares[r] = V::sum_of(square[r]);
  }
}

}  // namespace
}  // namespace r2ec
#endif
