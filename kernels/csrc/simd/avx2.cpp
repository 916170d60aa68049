// AVX2 and FMA: vectors of 8 float32 or 16 int16 lanes, register tiles of four rows x two queries
// (8 sums, 4 rows and a query in 16 registers). Squared norms are made beside one query alone,
// since their four sums need the registers of a second.
//
// Numerics: codes by vpmaddwd, exact. Floats in 8 lanes with fused multiply-adds; at the end the
// lanes are added in three levels, which is what prepare_lanes<8> bounds.
#if defined(__x86_64__)
#include <immintrin.h>

#include <limits>

#define TARGET __attribute__((target("avx2,fma")))

#include "online_softmax.hpp"
#include "simd/four_rows.hpp"
#include "simd/portable.hpp"
#include "simd/tiles.hpp"

namespace r2ec {

namespace {

struct Avx2 {
  using Ints = __m256i;
  static constexpr int64_t kCodes = 16;
  TARGET static inline Ints zero_ints() { return _mm256_setzero_si256(); }
  TARGET static inline Ints widen(const int8_t* codes) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  }
  TARGET static inline Ints load(const int16_t* values) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
  }
  TARGET static inline Ints multiply_add(Ints sum, Ints row, Ints query) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(row, query));
  }
  TARGET static inline int32_t sum_of(__m256i lanes) {
    const __m128i four =
        _mm_add_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
    const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
  }

  using Floats = __m256;
  static constexpr int64_t kFloats = 8;
  TARGET static inline Floats zero_floats() { return _mm256_setzero_ps(); }
  TARGET static inline Floats load(const float* values) { return _mm256_loadu_ps(values); }
  // A mask of the first `count` of eight lanes.
  TARGET static inline __m256i first_lanes(int64_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  // The first `left` lanes, or all where there are more; zeros behind them.
  TARGET static inline Floats load_first(const float* values, int64_t left) {
    return left >= kFloats ? _mm256_loadu_ps(values)
                           : _mm256_maskload_ps(values, first_lanes(left));
  }
  TARGET static inline Floats multiply_add(Floats sum, Floats row, Floats other) {
    return _mm256_fmadd_ps(row, other, sum);
  }
  TARGET static inline float sum_of(__m256 lanes) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
};

TARGET void multiply_codes(RowBlock<int8_t> block, const CodeOperand& operand, int32_t* out) {
  const int16_t* const queries = operand.values;
  const int64_t num_queries = operand.num_queries, columns = operand.columns;
  for (int64_t i = 0; i < block.count; i += kRows) {
    const FourRows<int8_t> rows(block, i);
    int64_t q = 0;
    for (; q + 2 <= num_queries; q += 2)
      codes_tile<Avx2, 2>(rows, queries + q * columns, columns, out + q * kGroup + i);
    if (q < num_queries)
      codes_tile<Avx2, 1>(rows, queries + q * columns, columns, out + q * kGroup + i);
  }
}

TARGET void multiply_floats(RowBlock<float> block, const FloatOperand& operand, float* out,
                            float* squares) {
  const float* const queries = operand.values.data();
  const int64_t query_stride = operand.stride, num_queries = operand.num_queries;
  const int64_t columns = operand.columns;
  for (int64_t i = 0; i < block.count; i += kRows) {
    const FourRows<float> rows(block, i);
    const auto tile = [&](auto run, int64_t q) {
      run(rows, queries + q * query_stride, query_stride, columns, out + q * kGroup + i,
          squares + i);
    };
    tile(floats_tile<Avx2, 1, true>, 0);
    int64_t q = 1;
    for (; q + 2 <= num_queries; q += 2) tile(floats_tile<Avx2, 2, false>, q);
    if (q < num_queries) tile(floats_tile<Avx2, 1, false>, q);
  }
}

TARGET inline __m256 magnitude(__m256 value) {
  return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), value);
}

TARGET uint32_t rows_above(const float* products, int64_t count, Epilogue epilogue, float need,
                           float relative) {
  if (count != kGroup) return portable::rows_above(products, count, epilogue, need, relative);
  const __m256 growth = _mm256_set1_ps(relative);
  uint32_t rows = 0;
  for (int64_t i = 0; i < kGroup; i += 8) {
    __m256 p = _mm256_loadu_ps(products + i), least = _mm256_set1_ps(need);
    if (epilogue.scale) p = _mm256_mul_ps(p, _mm256_loadu_ps(epilogue.scale + i));
    if (epilogue.half) least = _mm256_add_ps(least, _mm256_loadu_ps(epilogue.half + i));
    const __m256 upper = _mm256_fmadd_ps(growth, magnitude(p), p);
    rows |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(upper, least, _CMP_GE_OQ))) << i;
  }
  return rows;
}

TARGET void column_maxima_f32(RowBlock<float> block, int64_t columns, Epilogue epilogue,
                              float relative, float* maxima) {
  const __m256 growth = _mm256_set1_ps(relative);
  int64_t i = 0;
  for (; i + 8 <= columns; i += 8) {
    __m256 largest = _mm256_set1_ps(-std::numeric_limits<float>::infinity());
    for (int64_t row = 0; row < block.count; ++row) {
      __m256 p = _mm256_loadu_ps(block.rows + row * block.stride + i);
      if (epilogue.scale) p = _mm256_mul_ps(p, _mm256_set1_ps(epilogue.scale[row]));
      __m256 score = p;
      if (epilogue.half) score = _mm256_sub_ps(p, _mm256_set1_ps(epilogue.half[row]));
      // of two numbers of which one is NaN, max takes the second
      largest = _mm256_max_ps(_mm256_fnmadd_ps(growth, magnitude(p), score), largest);
    }
    _mm256_storeu_ps(maxima + i, largest);
  }
  if (i < columns)
    portable::column_maxima_f32({block.rows + i, block.stride, block.count}, columns - i, epilogue,
                                relative, maxima + i);
}

TARGET int64_t update_softmax(float* products, const float* scale, uint32_t allowed,
                              OnlineSoftmax& softmax, uint32_t& near_ties) {
  return online_softmax_update(products, scale, allowed, softmax, near_ties);
}

}  // namespace

extern const TileKernels kAvx2Kernels = {
    "avx2",
    keep_codes,
    multiply_codes,
    prepare_lanes<8>,
    multiply_floats,
    rows_above,
    portable::queries_above_bf16,
    portable::queries_above_f32,
    portable::column_maxima_bf16,
    column_maxima_f32,
    update_softmax,
};

}  // namespace r2ec
#endif
