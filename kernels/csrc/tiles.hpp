// The inner products of a first pass: up to kGroup rows with a few queries, for each kind of CPU.
#pragma once

#include <cstdint>
#include <cstring>

namespace r2ec {

constexpr int64_t kGroup = 32;      // rows of a tile
constexpr int64_t kCodeColumns = 64;  // columns of codes and of their queries: a multiple of it
constexpr int64_t kFloatColumns = 16;  // columns of float queries: padded with zeros to a multiple

// Rows that are multiplied in the caller's layout: row i begins at rows + i * stride.
template <typename T>
struct RowBlock {
  const T* rows;
  int64_t stride;  // elements
  int64_t count;   // 1..kGroup
};

// How products p become raw scores: p * scale - half of their row; null where there is none.
struct Finish {
  const float* scale;
  const float* half;
};

struct Bfloat16 {
  uint16_t bits;
};

struct Tiles {
  const char* name;
  // out[q * kGroup + i] = row i . query q, exact; columns a multiple of kCodeColumns, and
  // |code| <= 127 with queries so small that sums stay inside int32.
  void (*multiply_codes)(RowBlock<int8_t> block, const int16_t* queries, int64_t num_queries,
                         int64_t columns, int32_t* out);
  // The same in float32 in some order of additions, and squares[i] = |row i|^2. Rows have `columns`
  // elements, queries lie `query_stride` (a multiple of kFloatColumns) apart, zeros behind.
  void (*multiply_floats)(RowBlock<float> block, const float* queries, int64_t query_stride,
                          int64_t num_queries, int64_t columns, float* out, float* squares);
  // Bit i of the result: s + relative |p| >= need for the raw score s of products[i]; false for NaN.
  uint32_t (*reach)(const float* products, int64_t count, Finish finish, float need, float relative);
  // Bit q: the same for the products of one row with up to kGroup queries and need[q]; `scale` and
  // `half` are the row's.
  uint32_t (*reach_bf16)(const Bfloat16* products, int64_t count, float scale, float half,
                         const float* need, float relative);
  uint32_t (*reach_f32)(const float* products, int64_t count, float scale, float half,
                        const float* need, float relative);
};

// A bfloat16 number as a float.
inline float to_float(Bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}
inline float to_float(float value) { return value; }

uint32_t portable_reach_bf16(const Bfloat16* products, int64_t count, float scale, float half,
                             const float* need, float relative);
uint32_t portable_reach_f32(const float* products, int64_t count, float scale, float half,
                            const float* need, float relative);

extern const Tiles kPortableTiles;
#if defined(__x86_64__)
extern const Tiles kAvx2Tiles, kAvx512Tiles;
#endif

// The best that this CPU can run.
const Tiles& best_tiles();
// By name: "avx512", "avx2" or "portable"; null where this CPU cannot run it.
const Tiles* find_tiles(const char* name);

}  // namespace r2ec
