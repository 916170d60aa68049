// The inner products of a first pass: up to kGroup rows with a few queries, for each kind of CPU.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace r2ec {

constexpr int64_t kGroup = 32;         // rows of a tile
constexpr int64_t kCodeColumns = 64;   // columns of codes and of their queries: a multiple of it
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

// int16 queries [num_queries, columns] as `multiply_codes` of the tiles that prepared them wants
// them.
struct CodeOperand {
  int64_t num_queries, columns;  // a multiple of kCodeColumns
  const int16_t* values;         // the caller's
  std::vector<int8_t> split;     // two int8 parts for matrix units, where they serve; else empty
};

// Float queries [num_queries, columns] as `multiply_floats` of the tiles that prepared them wants
// them.
struct FloatOperand {
  int64_t num_queries, columns;
  int64_t stride;               // of `values`: columns rounded up to kFloatColumns, zeros behind
  std::vector<float> values;    // [num_queries, stride]
  int parts;                    // bfloat16 numbers that a float may be split into: 2 or 3
  std::vector<uint16_t> split;  // these parts for matrix units, where they serve; else empty
  double terms = 0.0;           // products of an x have errors of at most terms * 2^-24 |q| |x|

  FloatOperand(const float* queries, int64_t num_queries, int64_t columns, int parts);
};

// What `fold` adds up for a query: scores are compared with its target's.
struct Fold {
  float origin, logit;  // a score s weighs exp2((s - origin) * logit)
  float low, high;      // scores above `high` are ahead of the target, those below `low` behind
  float peak;           // the largest (s - origin) * logit so far
  double mass;          // the sum of weights / exp2(peak)
};

struct Bfloat16 {
  uint16_t bits;
};

struct Tiles {
  const char* name;
  void (*prepare_codes)(CodeOperand& operand);
  // out[q * kGroup + i] = row i . query q, exact: |code| <= 127, and queries so small that sums
  // stay inside int32.
  void (*multiply_codes)(RowBlock<int8_t> block, const CodeOperand& operand, int32_t* out);
  // Readies queries beyond what FloatOperand's constructor does, and sets `terms`.
  void (*prepare_floats)(FloatOperand& operand);
  // The same in float32, and squares[i] = |row i|^2.
  void (*multiply_floats)(RowBlock<float> block, const FloatOperand& operand, float* out,
                          float* squares);
  // Bit i of the result: s + relative |p| >= need for the raw score s of products[i]; false for
  // NaN.
  uint32_t (*reach)(const float* products, int64_t count, Finish finish, float need,
                    float relative);
  // Bit q: the same for the products of one row with up to kGroup queries and need[q]; `scale` and
  // `half` are the row's.
  uint32_t (*reach_bf16)(const Bfloat16* products, int64_t count, float scale, float half,
                         const float* need, float relative);
  uint32_t (*reach_f32)(const float* products, int64_t count, float scale, float half,
                        const float* need, float relative);
  // Adds the scores products[i] * scale[i] (scale may be null) of the rows in the bits of
  // `allowed`; overwrites the products. `near`: rows between low and high. Returns how many are
  // above high.
  int64_t (*fold)(float* products, const float* scale, uint32_t allowed, Fold& fold,
                  uint32_t& near);
};

// A bfloat16 number as a float.
inline float to_float(Bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}
inline float to_float(float value) { return value; }

inline void keep_codes(CodeOperand&) {}

// For products that are summed in `lanes` sums, which are then added: `lanes` a power of two.
template <int lanes>
void prepare_lanes(FloatOperand& operand) {
  double levels = 1.0;
  for (int width = lanes; width > 1; width /= 2) ++levels;
  operand.terms = static_cast<double>((operand.columns + lanes - 1) / lanes) + levels;
}

uint32_t portable_reach_bf16(const Bfloat16* products, int64_t count, float scale, float half,
                             const float* need, float relative);
uint32_t portable_reach_f32(const float* products, int64_t count, float scale, float half,
                            const float* need, float relative);

extern const Tiles kPortableTiles;
#if defined(__x86_64__)
extern const Tiles kAvx2Tiles, kAvx512Tiles, kAmxTiles;
bool has_amx();  // and this process may use it
void avx512_multiply_codes(RowBlock<int8_t> block, const CodeOperand& operand, int32_t* out);
void avx512_multiply_floats(RowBlock<float> block, const FloatOperand& operand, float* out,
                            float* squares);
#endif

// The best that this CPU can run.
const Tiles& best_tiles();
// By name: "amx", "avx512", "avx2" or "portable"; null where this CPU cannot run it.
const Tiles* find_tiles(const char* name);

}  // namespace r2ec
