// Plain C++ for any CPU, and the choice among the kinds.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>

#include "online_softmax.hpp"
#include "simd/tiles.hpp"

namespace r2ec {

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

uint32_t reach_one(const float* products, int64_t count, Finish finish, float need,
                   float relative) {
  uint32_t rows = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float p = products[i] * (finish.scale ? finish.scale[i] : 1.0f);
    const float least = need + (finish.half ? finish.half[i] : 0.0f);
    rows |= static_cast<uint32_t>(p + relative * std::fabs(p) >= least) << i;
  }
  return rows;
}

template <typename T>
uint32_t reach_many(const T* products, int64_t count, float scale, float half, const float* need,
                    float relative) {
  uint32_t queries = 0;
  for (int64_t q = 0; q < count; ++q) {
    const float p = to_float(products[q]) * scale;
    queries |= static_cast<uint32_t>(p + relative * std::fabs(p) >= need[q] + half) << q;
  }
  return queries;
}

int64_t fold(float* products, const float* scale, uint32_t allowed, Fold& into, uint32_t& near) {
  return fold_group(products, scale, allowed, into, near);
}

}  // namespace

FloatOperand::FloatOperand(const float* queries, int64_t num_queries, int64_t columns, int parts)
    : num_queries(num_queries),
      columns(columns),
      stride((columns + kFloatColumns - 1) / kFloatColumns * kFloatColumns),
      values(num_queries * stride, 0.0f),
      parts(parts) {
  for (int64_t q = 0; q < num_queries; ++q)
    std::copy(queries + q * columns, queries + (q + 1) * columns, values.begin() + q * stride);
}

uint32_t portable_reach_bf16(const Bfloat16* products, int64_t count, float scale, float half,
                             const float* need, float relative) {
  return reach_many(products, count, scale, half, need, relative);
}
uint32_t portable_reach_f32(const float* products, int64_t count, float scale, float half,
                            const float* need, float relative) {
  return reach_many(products, count, scale, half, need, relative);
}

extern const Tiles kPortableTiles = {"portable",          keep_codes,         multiply_codes,
                                     prepare_lanes<1>,    multiply_floats,    reach_one,
                                     portable_reach_bf16, portable_reach_f32, fold};

const Tiles* find_tiles(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
  if (avx512 && !std::strcmp(name, kAmxTiles.name) && has_amx()) return &kAmxTiles;
  if (avx512 && !std::strcmp(name, kAvx512Tiles.name)) return &kAvx512Tiles;
  if (avx2 && !std::strcmp(name, kAvx2Tiles.name)) return &kAvx2Tiles;
#endif
  return std::strcmp(name, kPortableTiles.name) ? nullptr : &kPortableTiles;
}

const Tiles& best_tiles() {
  static const Tiles* const best = [] {
    for (const char* name : {"amx", "avx512", "avx2"})
      if (const Tiles* found = find_tiles(name)) return found;
    return &kPortableTiles;
  }();
  return *best;
}

}  // namespace r2ec
