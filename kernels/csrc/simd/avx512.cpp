// AVX-512 (F, BW, VL, VNNI): vectors of 16 float32 or 32 int16 lanes, register tiles of four rows x
// four queries (16 sums, 4 squared norms, 4 rows and a query in 32 registers).
//
// Numerics: codes by vpdpwssd, exact. Floats in 16 lanes with fused multiply-adds; at the end the
// lanes are added in four levels, which is what prepare_lanes<16> bounds. The online softmax is
// that of online_softmax.hpp with fused multiply-adds in the polynomial and vscalefps for the
// power, so that its normalizer may differ from other CPUs' in the last bits; the ranks are the
// same.
#if defined(__x86_64__)
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")))

#include "simd/avx512.hpp"

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "online_softmax.hpp"
#include "simd/four_rows.hpp"

namespace r2ec {

namespace {

struct Avx512 {
  using Ints = __m512i;
  static constexpr int64_t kCodes = 32;
  TARGET static inline Ints zero_ints() { return _mm512_setzero_si512(); }
  TARGET static inline Ints widen(const int8_t* codes) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
  }
  TARGET static inline Ints load(const int16_t* values) { return _mm512_loadu_si512(values); }
  TARGET static inline Ints multiply_add(Ints sum, Ints row, Ints query) {
    return _mm512_dpwssd_epi32(sum, row, query);
  }
  TARGET static inline int32_t sum_of(Ints lanes) { return _mm512_reduce_add_epi32(lanes); }

  using Floats = __m512;
  static constexpr int64_t kFloats = 16;
  TARGET static inline Floats zero_floats() { return _mm512_setzero_ps(); }
  TARGET static inline Floats load(const float* values) { return _mm512_loadu_ps(values); }
  // The first `left` lanes, or all where there are more; zeros behind them.
  TARGET static inline Floats load_first(const float* values, int64_t left) {
    const __mmask16 mask = left < kFloats ? (1u << left) - 1 : 0xffff;
    return _mm512_maskz_loadu_ps(mask, values);
  }
  TARGET static inline Floats multiply_add(Floats sum, Floats row, Floats other) {
    return _mm512_fmadd_ps(row, other, sum);
  }
  TARGET static inline float sum_of(Floats lanes) { return _mm512_reduce_add_ps(lanes); }
};

TARGET inline __m512 load(const float* values, __mmask16 mask) {
  return _mm512_maskz_loadu_ps(mask, values);
}
TARGET inline __m512 load(const Bfloat16* values, __mmask16 mask) {
  const __m256i bits = _mm256_maskz_loadu_epi16(mask, values);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

template <typename T>
TARGET uint32_t any_queries_above(const T* products, int64_t count, float scale, float half,
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

template <typename T>
TARGET void any_column_maxima(RowBlock<T> block, int64_t columns, Epilogue epilogue, float relative,
                              float* maxima) {
  const __m512 growth = _mm512_set1_ps(relative);
  for (int64_t i = 0; i < columns; i += 16) {
    const int64_t left = columns - i;
    const __mmask16 mask = left < 16 ? (1u << left) - 1 : 0xffff;
    __m512 largest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    for (int64_t row = 0; row < block.count; ++row) {
      __m512 p = load(block.rows + row * block.stride + i, mask);
      if (epilogue.scale) p = _mm512_mul_ps(p, _mm512_set1_ps(epilogue.scale[row]));
      __m512 score = p;
      if (epilogue.half) score = _mm512_sub_ps(p, _mm512_set1_ps(epilogue.half[row]));
      // of two numbers of which one is NaN, max takes the second
      largest = _mm512_max_ps(_mm512_fnmadd_ps(growth, _mm512_abs_ps(p), score), largest);
    }
    _mm512_mask_storeu_ps(maxima + i, mask, largest);
  }
}

// 2^x for x <= 0; the polynomial of online_softmax.hpp.
TARGET inline __m512 exp2_of(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, whole);
  __m512 p = _mm512_set1_ps(kExp2[0]);
  for (int i = 1; i < kExp2Terms; ++i) p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kExp2[i]));
  return _mm512_scalef_ps(p, whole);
}

}  // namespace

namespace avx512 {

TARGET void multiply_codes(RowBlock<int8_t> block, const CodeOperand& operand, int32_t* out) {
  const int16_t* const queries = operand.values;
  const int64_t num_queries = operand.num_queries, columns = operand.columns;
  for (int64_t i = 0; i < block.count; i += kRows) {
    const FourRows<int8_t> rows(block, i);
    int64_t q = 0;
    for (; q + 4 <= num_queries; q += 4)
      codes_tile<Avx512, 4>(rows, queries + q * columns, columns, out + q * kGroup + i);
    for (; q + 2 <= num_queries; q += 2)
      codes_tile<Avx512, 2>(rows, queries + q * columns, columns, out + q * kGroup + i);
    if (q < num_queries)
      codes_tile<Avx512, 1>(rows, queries + q * columns, columns, out + q * kGroup + i);
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
      tile(floats_tile<Avx512, 1, true>, 0);
    } else if (num_queries == 2) {
      tile(floats_tile<Avx512, 2, true>, 0);
    } else if (num_queries == 3) {
      tile(floats_tile<Avx512, 3, true>, 0);
    } else {
      tile(floats_tile<Avx512, 4, true>, 0);
      int64_t q = 4;
      for (; q + 4 <= num_queries; q += 4) tile(floats_tile<Avx512, 4, false>, q);
      for (; q < num_queries; ++q) tile(floats_tile<Avx512, 1, false>, q);
    }
  }
}

TARGET uint32_t rows_above(const float* products, int64_t count, Epilogue epilogue, float need,
                           float relative) {
  const __m512 growth = _mm512_set1_ps(relative);
  uint32_t rows = 0;
  for (int64_t i = 0; i < count; i += 16) {
    const int64_t left = count - i;
    const __mmask16 mask = left < 16 ? (1u << left) - 1 : 0xffff;
    __m512 p = load(products + i, mask), least = _mm512_set1_ps(need);
    if (epilogue.scale) p = _mm512_mul_ps(p, load(epilogue.scale + i, mask));
    if (epilogue.half) least = _mm512_add_ps(least, load(epilogue.half + i, mask));
    const __m512 upper = _mm512_fmadd_ps(growth, _mm512_abs_ps(p), p);
    rows |= static_cast<uint32_t>(_mm512_mask_cmp_ps_mask(mask, upper, least, _CMP_GE_OQ)) << i;
  }
  return rows;
}

// online_softmax_update of online_softmax.hpp; it leaves the products as they are.
TARGET int64_t update_softmax(float* products, const float* scale, uint32_t allowed,
                              OnlineSoftmax& softmax, uint32_t& near_ties) {
  static_assert(kGroup == 32, "two vectors");
  const __m512 origin = _mm512_set1_ps(softmax.origin),
               log2_scale = _mm512_set1_ps(softmax.log2_scale);
  const __m512 low = _mm512_set1_ps(softmax.lower), high = _mm512_set1_ps(softmax.upper);
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
    t[half] = _mm512_mul_ps(_mm512_sub_ps(score, origin), log2_scale);
    rises |= _mm512_mask_cmp_ps_mask(counts[half], t[half], _mm512_set1_ps(softmax.m), _CMP_GT_OQ);
  }
  if (rises) {
    const float m = std::max(_mm512_mask_reduce_max_ps(counts[0], t[0]),
                             _mm512_mask_reduce_max_ps(counts[1], t[1]));
    softmax.l *= std::exp2(static_cast<double>(softmax.m) - static_cast<double>(m));
    softmax.m = m;
  }
  const __m512 m = _mm512_set1_ps(softmax.m);
  const __m512 first = _mm512_maskz_mov_ps(counts[0], exp2_of(_mm512_sub_ps(t[0], m)));
  const __m512 second = _mm512_maskz_mov_ps(counts[1], exp2_of(_mm512_sub_ps(t[1], m)));
  softmax.l += static_cast<double>(_mm512_reduce_add_ps(_mm512_add_ps(first, second)));
  near_ties = reached & ~ahead;
  return __builtin_popcount(ahead);
}

TARGET uint32_t queries_above_bf16(const Bfloat16* products, int64_t count, float scale, float half,
                                   const float* need, float relative) {
  return any_queries_above(products, count, scale, half, need, relative);
}
TARGET uint32_t queries_above_f32(const float* products, int64_t count, float scale, float half,
                                  const float* need, float relative) {
  return any_queries_above(products, count, scale, half, need, relative);
}

TARGET void column_maxima_bf16(RowBlock<Bfloat16> block, int64_t columns, Epilogue epilogue,
                               float relative, float* maxima) {
  any_column_maxima(block, columns, epilogue, relative, maxima);
}
TARGET void column_maxima_f32(RowBlock<float> block, int64_t columns, Epilogue epilogue,
                              float relative, float* maxima) {
  any_column_maxima(block, columns, epilogue, relative, maxima);
}

}  // namespace avx512

extern const TileKernels kAvx512Kernels = {
    "avx512",
    keep_codes,
    avx512::multiply_codes,
    prepare_lanes<16>,
    avx512::multiply_floats,
    avx512::rows_above,
    avx512::queries_above_bf16,
    avx512::queries_above_f32,
    avx512::column_maxima_bf16,
    avx512::column_maxima_f32,
    avx512::update_softmax,
};

}  // namespace r2ec
#endif
