// AVX-512 (F, BW, VL): 16 float or 32 int16 lanes.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>

#include "online_softmax.hpp"
#include "simd/four_rows.hpp"
#include "simd/tiles.hpp"

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")))

namespace r2ec {

namespace {

template <int Q>
TARGET void codes_tile(const FourRows<int8_t>& rows, const int16_t* queries, int64_t columns,
                       int32_t* out) {
  __m512i sum[kRows][Q];
  for (int r = 0; r < kRows; ++r)
    for (int q = 0; q < Q; ++q) sum[r][q] = _mm512_setzero_si512();
  for (int64_t c = 0; c < columns; c += kCodeColumns) {
    for (int part = 0; part < 2; ++part) {
      const int64_t at = c + 32 * part;
      __m512i row[kRows];
      for (int r = 0; r < kRows; ++r)
        row[r] = _mm512_cvtepi8_epi16(
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows.row[r] + at)));
      for (int q = 0; q < Q; ++q) {
        const __m512i query = _mm512_loadu_si512(queries + q * columns + at);
        for (int r = 0; r < kRows; ++r) sum[r][q] = _mm512_dpwssd_epi32(sum[r][q], row[r], query);
      }
    }
    for (int r = 0; r < kRows; ++r)
      _mm_prefetch(reinterpret_cast<const char*>(rows.row[r] + c + rows.ahead), _MM_HINT_T0);
  }
  for (int q = 0; q < Q; ++q)
    for (int r = 0; r < rows.count; ++r) out[q * kGroup + r] = _mm512_reduce_add_epi32(sum[r][q]);
}

TARGET void multiply_codes(RowBlock<int8_t> block, const CodeOperand& operand, int32_t* out) {
  const int16_t* const queries = operand.values;
  const int64_t num_queries = operand.num_queries, columns = operand.columns;
  for (int64_t i = 0; i < block.count; i += kRows) {
    const FourRows<int8_t> rows(block, i);
    int64_t q = 0;
    for (; q + 4 <= num_queries; q += 4)
      codes_tile<4>(rows, queries + q * columns, columns, out + q * kGroup + i);
    for (; q + 2 <= num_queries; q += 2)
      codes_tile<2>(rows, queries + q * columns, columns, out + q * kGroup + i);
    if (q < num_queries) codes_tile<1>(rows, queries + q * columns, columns, out + q * kGroup + i);
  }
}

template <int Q, bool kSquares>
TARGET void floats_tile(const FourRows<float>& rows, const float* queries, int64_t query_stride,
                        int64_t columns, float* out, float* squares) {
  __m512 sum[kRows][Q], square[kRows];
  for (int r = 0; r < kRows; ++r) {
    square[r] = _mm512_setzero_ps();
    for (int q = 0; q < Q; ++q) sum[r][q] = _mm512_setzero_ps();
  }
  for (int64_t c = 0; c < columns; c += kFloatColumns) {
    const int64_t left = columns - c;
    const __mmask16 mask = left < kFloatColumns ? (1u << left) - 1 : 0xffff;
    __m512 row[kRows];
    for (int r = 0; r < kRows; ++r) {
      row[r] = _mm512_maskz_loadu_ps(mask, rows.row[r] + c);
      _mm_prefetch(reinterpret_cast<const char*>(rows.row[r] + c + rows.ahead), _MM_HINT_T0);
      if (kSquares) square[r] = _mm512_fmadd_ps(row[r], row[r], square[r]);
    }
    for (int q = 0; q < Q; ++q) {
      const __m512 query = _mm512_loadu_ps(queries + q * query_stride + c);
      for (int r = 0; r < kRows; ++r) sum[r][q] = _mm512_fmadd_ps(row[r], query, sum[r][q]);
    }
  }
  for (int r = 0; r < rows.count; ++r) {
    for (int q = 0; q < Q; ++q) out[q * kGroup + r] = _mm512_reduce_add_ps(sum[r][q]);
    if (kSquares) squares[r] = _mm512_reduce_add_ps(square[r]);
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
    if (num_queries == 1) {
      tile(floats_tile<1, true>, 0);
    } else if (num_queries == 2) {
      tile(floats_tile<2, true>, 0);
    } else if (num_queries == 3) {
      tile(floats_tile<3, true>, 0);
    } else {
      tile(floats_tile<4, true>, 0);
      int64_t q = 4;
      for (; q + 4 <= num_queries; q += 4) tile(floats_tile<4, false>, q);
      for (; q < num_queries; ++q) tile(floats_tile<1, false>, q);
    }
  }
}

TARGET inline __m512 load(const float* values, __mmask16 mask) {
  return _mm512_maskz_loadu_ps(mask, values);
}
TARGET inline __m512 load(const Bfloat16* values, __mmask16 mask) {
  const __m256i bits = _mm256_maskz_loadu_epi16(mask, values);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

TARGET uint32_t reach_one(const float* products, int64_t count, Finish finish, float need,
                          float relative) {
  const __m512 growth = _mm512_set1_ps(relative);
  uint32_t rows = 0;
  for (int64_t i = 0; i < count; i += 16) {
    const int64_t left = count - i;
    const __mmask16 mask = left < 16 ? (1u << left) - 1 : 0xffff;
    __m512 p = load(products + i, mask), least = _mm512_set1_ps(need);
    if (finish.scale) p = _mm512_mul_ps(p, load(finish.scale + i, mask));
    if (finish.half) least = _mm512_add_ps(least, load(finish.half + i, mask));
    const __m512 upper = _mm512_fmadd_ps(growth, _mm512_abs_ps(p), p);
    rows |= static_cast<uint32_t>(_mm512_mask_cmp_ps_mask(mask, upper, least, _CMP_GE_OQ)) << i;
  }
  return rows;
}

template <typename T>
TARGET uint32_t reach_many(const T* products, int64_t count, float scale, float half,
                           const float* need, float relative) {
  const __m512 growth = _mm512_set1_ps(relative);
  const __m512 factor = _mm512_set1_ps(scale), less = _mm512_set1_ps(half);
  uint32_t queries = 0;
  for (int64_t q = 0; q < count; q += 16) {
    const int64_t left = count - q;
    const __mmask16 mask = left < 16 ? (1u << left) - 1 : 0xffff;
    const __m512 p = _mm512_mul_ps(load(products + q, mask), factor);
    const __m512 upper = _mm512_fmadd_ps(growth, _mm512_abs_ps(p), p);
    const __m512 least = _mm512_add_ps(load(need + q, mask), less);
    queries |= static_cast<uint32_t>(_mm512_mask_cmp_ps_mask(mask, upper, least, _CMP_GE_OQ)) << q;
  }
  return queries;
}

// 2^x for x <= 0; the polynomial of online_softmax.hpp.
TARGET inline __m512 exp2_of(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, whole);
  __m512 p = _mm512_set1_ps(kExp2[0]);
  for (int i = 1; i < kExp2Terms; ++i) p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kExp2[i]));
  return _mm512_scalef_ps(p, whole);
}

// fold_group of online_softmax.hpp; it leaves the products as they are.
TARGET int64_t fold(float* products, const float* scale, uint32_t allowed, Fold& into,
                    uint32_t& near) {
  static_assert(kGroup == 32, "two vectors");
  const __m512 origin = _mm512_set1_ps(into.origin), logit = _mm512_set1_ps(into.logit);
  const __m512 low = _mm512_set1_ps(into.low), high = _mm512_set1_ps(into.high);
  __m512 t[2];
  __mmask16 counts[2];
  uint32_t ahead = 0, reached = 0;
  bool rises = false;
  for (int half = 0; half < 2; ++half) {
    counts[half] = static_cast<__mmask16>(allowed >> (16 * half));
    __m512 score = _mm512_loadu_ps(products + 16 * half);
    if (scale) score = _mm512_mul_ps(score, _mm512_loadu_ps(scale + 16 * half));
    const __mmask16 above = _mm512_mask_cmp_ps_mask(counts[half], score, high, _CMP_GT_OQ);
    const __mmask16 reach = _mm512_mask_cmp_ps_mask(counts[half], score, low, _CMP_GE_OQ);
    ahead |= static_cast<uint32_t>(above) << (16 * half);
    reached |= static_cast<uint32_t>(reach) << (16 * half);
    t[half] = _mm512_mul_ps(_mm512_sub_ps(score, origin), logit);
    rises |= _mm512_mask_cmp_ps_mask(counts[half], t[half], _mm512_set1_ps(into.peak), _CMP_GT_OQ);
  }
  if (rises) {
    const float peak = std::max(_mm512_mask_reduce_max_ps(counts[0], t[0]),
                                _mm512_mask_reduce_max_ps(counts[1], t[1]));
    into.mass *= std::exp2(static_cast<double>(into.peak) - static_cast<double>(peak));
    into.peak = peak;
  }
  const __m512 peak = _mm512_set1_ps(into.peak);
  const __m512 first = _mm512_maskz_mov_ps(counts[0], exp2_of(_mm512_sub_ps(t[0], peak)));
  const __m512 second = _mm512_maskz_mov_ps(counts[1], exp2_of(_mm512_sub_ps(t[1], peak)));
  into.mass += static_cast<double>(_mm512_reduce_add_ps(_mm512_add_ps(first, second)));
  near = reached & ~ahead;
  return __builtin_popcount(ahead);
}

}  // namespace

void avx512_multiply_codes(RowBlock<int8_t> block, const CodeOperand& operand, int32_t* out) {
  multiply_codes(block, operand, out);
}

void avx512_multiply_floats(RowBlock<float> block, const FloatOperand& operand, float* out,
                            float* squares) {
  multiply_floats(block, operand, out, squares);
}

extern const Tiles kAvx512Tiles = {"avx512",
                                   keep_codes,
                                   multiply_codes,
                                   prepare_lanes<16>,
                                   multiply_floats,
                                   reach_one,
                                   reach_many<Bfloat16>,
                                   reach_many<float>,
                                   fold};

// All but the products.
extern const Tiles kAmxTiles;
void amx_prepare_codes(CodeOperand& operand);
void amx_multiply_codes(RowBlock<int8_t> block, const CodeOperand& operand, int32_t* out);
void amx_prepare_floats(FloatOperand& operand);
void amx_multiply_floats(RowBlock<float> block, const FloatOperand& operand, float* out,
                         float* squares);
extern const Tiles kAmxTiles = {"amx",
                                amx_prepare_codes,
                                amx_multiply_codes,
                                amx_prepare_floats,
                                amx_multiply_floats,
                                reach_one,
                                reach_many<Bfloat16>,
                                reach_many<float>,
                                fold};

}  // namespace r2ec
#endif
