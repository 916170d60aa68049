// Plain C++ for any CPU. Rows and queries are multiplied one by one: codes in one int32 sum, floats
// in eight float32 lanes and the rest of the columns in a sum of its own, all added in order. Fixed
// trip counts let compilers vectorize the lanes.
//
// prepare_lanes<1> gives a bound for the worst order of summing, one sum over all columns.
#include "simd/portable.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "online_softmax.hpp"

namespace r2ec {
namespace portable {
namespace {

void multiply_codes(RowBlock<int8_t> block, const CodeOperand& operand, int32_t* out) {
  const int64_t columns = operand.columns;
  for (int64_t i = 0; i < block.count; ++i) {
    const int8_t* row = block.rows + i * block.stride;
    for (int64_t q = 0; q < operand.num_queries; ++q) {
      const int16_t* query = operand.values + q * columns;
      int32_t sum = 0;
      for (int64_t c = 0; c < columns; ++c) sum += row[c] * query[c];
      out[q * kGroup + i] = sum;
    }
  }
}

void multiply_floats(RowBlock<float> block, const FloatOperand& operand, float* out,
                     float* squares) {
  constexpr int64_t kLanes = 8;
  const int64_t columns = operand.columns;
  for (int64_t i = 0; i < block.count; ++i) {
    const float* row = block.rows + i * block.stride;
    for (int64_t q = -1; q < operand.num_queries; ++q) {
      const float* other = q < 0 ? row : operand.values.data() + q * operand.stride;
      float lanes[kLanes] = {};
      int64_t c = 0;
      for (; c + kLanes <= columns; c += kLanes)
        for (int64_t lane = 0; lane < kLanes; ++lane)
          lanes[lane] += row[c + lane] * other[c + lane];
      float sum = 0.0f;
      for (; c < columns; ++c) sum += row[c] * other[c];
      for (float lane : lanes) sum += lane;
      (q < 0 ? squares[i] : out[q * kGroup + i]) = sum;
    }
  }
}

template <typename T>
uint32_t any_queries_above(const T* products, int64_t count, float scale, float half,
                           const float* need, float relative) {
  uint32_t queries = 0;
  for (int64_t q = 0; q < count; ++q) {
    const float p = to_float(products[q]) * scale;
    queries |= static_cast<uint32_t>(p + relative * std::fabs(p) >= need[q] + half) << q;
  }
  return queries;
}

template <typename T>
void any_column_maxima(RowBlock<T> block, int64_t columns, Epilogue epilogue, float relative,
                       float* maxima) {
  std::fill(maxima, maxima + columns, -std::numeric_limits<float>::infinity());
  for (int64_t row = 0; row < block.count; ++row) {
    const T* const products = block.rows + row * block.stride;
    const float scale = epilogue.scale ? epilogue.scale[row] : 1.0f;
    const float half = epilogue.half ? epilogue.half[row] : 0.0f;
    for (int64_t i = 0; i < columns; ++i) {
      const float p = to_float(products[i]) * scale;
      const float lower = p - half - relative * std::fabs(p);
      maxima[i] = lower > maxima[i] ? lower : maxima[i];
    }
  }
}

int64_t update_softmax(float* products, const float* scale, uint32_t allowed,
                       OnlineSoftmax& softmax, uint32_t& near_ties) {
  return online_softmax_update(products, scale, allowed, softmax, near_ties);
}

}  // namespace

uint32_t rows_above(const float* products, int64_t count, Epilogue epilogue, float need,
                    float relative) {
  uint32_t rows = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float p = products[i] * (epilogue.scale ? epilogue.scale[i] : 1.0f);
    const float least = need + (epilogue.half ? epilogue.half[i] : 0.0f);
    rows |= static_cast<uint32_t>(p + relative * std::fabs(p) >= least) << i;
  }
  return rows;
}

uint32_t queries_above_bf16(const Bfloat16* products, int64_t count, float scale, float half,
                            const float* need, float relative) {
  return any_queries_above(products, count, scale, half, need, relative);
}
uint32_t queries_above_f32(const float* products, int64_t count, float scale, float half,
                           const float* need, float relative) {
  return any_queries_above(products, count, scale, half, need, relative);
}

void column_maxima_bf16(RowBlock<Bfloat16> block, int64_t columns, Epilogue epilogue,
                        float relative, float* maxima) {
  any_column_maxima(block, columns, epilogue, relative, maxima);
}
void column_maxima_f32(RowBlock<float> block, int64_t columns, Epilogue epilogue, float relative,
                       float* maxima) {
  any_column_maxima(block, columns, epilogue, relative, maxima);
}

}  // namespace portable

extern const TileKernels kPortableKernels = {
    "portable",
    keep_codes,
    portable::multiply_codes,
    prepare_lanes<1>,
    portable::multiply_floats,
    portable::rows_above,
    portable::queries_above_bf16,
    portable::queries_above_f32,
    portable::column_maxima_bf16,
    portable::column_maxima_f32,
    portable::update_softmax,
};

}  // namespace r2ec
