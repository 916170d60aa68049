// AVX2 and FMA: 8 float or 16 int16 lanes. Built as the AVX-512 kind is.
#if defined(__x86_64__)
#include <immintrin.h>

#include "online_softmax.hpp"
#include "simd/four_rows.hpp"
#include "simd/tiles.hpp"

#define TARGET __attribute__((target("avx2,fma")))

namespace r2ec {

namespace {

TARGET inline int32_t sum_of(__m256i lanes) {
  const __m128i four =
      _mm_add_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
  const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}

// A mask of the first `count` of eight lanes.
TARGET inline __m256i first_lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

TARGET inline float sum_of(__m256 lanes) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

template <int Q>
TARGET void codes_tile(const FourRows<int8_t>& rows, const int16_t* queries, int64_t columns,
                       int32_t* out) {
  __m256i sum[kRows][Q];
  for (int r = 0; r < kRows; ++r)
    for (int q = 0; q < Q; ++q) sum[r][q] = _mm256_setzero_si256();
  for (int64_t c = 0; c < columns; c += kCodeColumns) {
    for (int part = 0; part < 4; ++part) {
      const int64_t at = c + 16 * part;
      __m256i row[kRows];
      for (int r = 0; r < kRows; ++r)
        row[r] = _mm256_cvtepi8_epi16(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows.row[r] + at)));
      for (int q = 0; q < Q; ++q) {
        const __m256i query =
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(queries + q * columns + at));
        for (int r = 0; r < kRows; ++r)
          sum[r][q] = _mm256_add_epi32(sum[r][q], _mm256_madd_epi16(row[r], query));
      }
    }
    for (int r = 0; r < kRows; ++r)
      _mm_prefetch(reinterpret_cast<const char*>(rows.row[r] + c + rows.ahead), _MM_HINT_T0);
  }
  for (int q = 0; q < Q; ++q)
    for (int r = 0; r < rows.count; ++r) out[q * kGroup + r] = sum_of(sum[r][q]);
}

TARGET void multiply_codes(RowBlock<int8_t> block, const CodeOperand& operand, int32_t* out) {
  const int16_t* const queries = operand.values;
  const int64_t num_queries = operand.num_queries, columns = operand.columns;
  for (int64_t i = 0; i < block.count; i += kRows) {
    const FourRows<int8_t> rows(block, i);
    int64_t q = 0;
    for (; q + 2 <= num_queries; q += 2)
      codes_tile<2>(rows, queries + q * columns, columns, out + q * kGroup + i);
    if (q < num_queries) codes_tile<1>(rows, queries + q * columns, columns, out + q * kGroup + i);
  }
}

template <int Q, bool kSquares>
TARGET void floats_tile(const FourRows<float>& rows, const float* queries, int64_t query_stride,
                        int64_t columns, float* out, float* squares) {
  __m256 sum[kRows][Q], square[kRows];
  for (int r = 0; r < kRows; ++r) {
    square[r] = _mm256_setzero_ps();
    for (int q = 0; q < Q; ++q) sum[r][q] = _mm256_setzero_ps();
  }
  for (int64_t c = 0; c < columns; c += 8) {
    __m256 row[kRows];
    for (int r = 0; r < kRows; ++r) {
      row[r] = columns - c >= 8 ? _mm256_loadu_ps(rows.row[r] + c)
                                : _mm256_maskload_ps(rows.row[r] + c, first_lanes(columns - c));
      if (c % 16 == 0)
        _mm_prefetch(reinterpret_cast<const char*>(rows.row[r] + c + rows.ahead), _MM_HINT_T0);
      if (kSquares) square[r] = _mm256_fmadd_ps(row[r], row[r], square[r]);
    }
    for (int q = 0; q < Q; ++q) {
      const __m256 query = _mm256_loadu_ps(queries + q * query_stride + c);
      for (int r = 0; r < kRows; ++r) sum[r][q] = _mm256_fmadd_ps(row[r], query, sum[r][q]);
    }
  }
  for (int r = 0; r < rows.count; ++r) {
    for (int q = 0; q < Q; ++q) out[q * kGroup + r] = sum_of(sum[r][q]);
    if (kSquares) squares[r] = sum_of(square[r]);
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
    tile(floats_tile<1, true>, 0);
    int64_t q = 1;
    for (; q + 2 <= num_queries; q += 2) tile(floats_tile<2, false>, q);
    if (q < num_queries) tile(floats_tile<1, false>, q);
  }
}

TARGET inline __m256 magnitude(__m256 value) {
  return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), value);
}

TARGET uint32_t reach_one(const float* products, int64_t count, Finish finish, float need,
                          float relative) {
  if (count != kGroup) return kPortableTiles.reach(products, count, finish, need, relative);
  const __m256 growth = _mm256_set1_ps(relative);
  uint32_t rows = 0;
  for (int64_t i = 0; i < kGroup; i += 8) {
    __m256 p = _mm256_loadu_ps(products + i), least = _mm256_set1_ps(need);
    if (finish.scale) p = _mm256_mul_ps(p, _mm256_loadu_ps(finish.scale + i));
    if (finish.half) least = _mm256_add_ps(least, _mm256_loadu_ps(finish.half + i));
    const __m256 upper = _mm256_fmadd_ps(growth, magnitude(p), p);
    rows |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(upper, least, _CMP_GE_OQ))) << i;
  }
  return rows;
}

TARGET int64_t fold(float* products, const float* scale, uint32_t allowed, Fold& into,
                    uint32_t& near) {
  return fold_group(products, scale, allowed, into, near);
}

}  // namespace

extern const Tiles kAvx2Tiles = {"avx2",
                                 keep_codes,
                                 multiply_codes,
                                 prepare_lanes<8>,
                                 multiply_floats,
                                 reach_one,
                                 portable_reach_bf16,
                                 portable_reach_f32,
                                 fold};

}  // namespace r2ec
#endif
