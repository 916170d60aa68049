// The inner loops of every pass over the items, one set for each kind of CPU.
//
// In: up to 32 item rows and M prepared queries. Out: their 32 x M products, column by column.
//
//               D columns                          M queries
//            +---------------+                  +-----------------+
//   32 item  |  int8 codes   |   x  queries  =  | out[q * 32 + i] |   row i . query q
//     rows   |  or float32   |     [M, D]       | int32 or float  |
//            +---------------+                  +-----------------+
//
// The rows stay in the cache while all queries pass over them, so a scan reads its table from
// memory once: N * D bytes of codes, or 4 * N * D of float32, whatever M is. The work is
// 2 * N * M * D operations, and 2 * N * D more for the squared norms of float32 rows.
//
// Numerics:
//   codes   int8 x int16, summed in int32. Exact, since queries are so small that no sum overflows.
//   floats  float32 products, summed in several lanes that are added at the end. The error of a
//           product is at most error_terms * 2^-24 * |query| * |row|; each kind of CPU sets its own
//           `error_terms`, because each sums in its own order.
//
// The other loops take these products while they are in the cache: `rows_above` and
// `queries_above_*` compare them with the threshold of a top-k scan, `column_maxima_*` give a first
// one, `update_softmax` adds them to an online softmax.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace r2ec {

constexpr int64_t kGroup = 32;         // item rows that are multiplied together
constexpr int64_t kCodeColumns = 64;   // codes and their queries have a multiple of it as columns
constexpr int64_t kFloatColumns = 16;  // float queries are padded with zeros to a multiple of it

struct Bfloat16 {
  uint16_t bits;
};

// Rows that are read in the caller's layout: row i begins at rows + i * stride.
template <typename T>
struct RowBlock {
  const T* rows;
  int64_t stride;  // elements
  int64_t count;   // 1..kGroup where they are multiplied
};

// What makes a raw score of a product p: p * scale - half. One of each for a row; null: 1 and 0.
struct Epilogue {
  const float* scale;
  const float* half;
};

// int16 queries [M, columns], as `multiply_codes` of the kernels that prepared them reads them.
struct CodeOperand {
  int64_t num_queries, columns;  // columns: a multiple of kCodeColumns
  const int16_t* values;         // the caller's
  std::vector<int8_t> split;  // two int8 parts laid out for AMX tiles, where they serve; else empty
};

// Float queries [M, columns], as `multiply_floats` of the kernels that prepared them reads them.
struct FloatOperand {
  int64_t num_queries, columns;
  int64_t stride;               // of `values`: columns rounded up to kFloatColumns, zeros behind
  std::vector<float> values;    // [M, stride]
  int parts;                    // bfloat16 numbers that AMX may split a float into: 2 or 3
  std::vector<uint16_t> split;  // these parts laid out for AMX tiles, where they serve; else empty
  double error_terms = 0.0;     // products have errors of at most error_terms * 2^-24 |query| |row|

  FloatOperand(const float* queries, int64_t num_queries, int64_t columns, int parts);
};

// A query's running log-sum-exp, in powers of two, and the limits that its target sets for the
// rank.
struct OnlineSoftmax {
  float origin, log2_scale;  // a score s has the exponent (s - origin) * log2_scale
  float lower, upper;        // above `upper`: ahead of the target; below `lower`: behind it
  float m;                   // running maximum of the exponents
  double l;                  // normalizer: the sum of 2^(exponent - m)
};

struct TileKernels {
  const char* name;
  // Lays the queries out for `multiply_codes`.
  void (*prepare_codes)(CodeOperand& operand);
  // out[q * kGroup + i] = row i . query q, exact: |code| <= 127, and queries so small that sums
  // stay inside int32.
  void (*multiply_codes)(RowBlock<int8_t> block, const CodeOperand& operand, int32_t* out);
  // Lays queries out beyond what FloatOperand's constructor does, and sets `error_terms`.
  void (*prepare_floats)(FloatOperand& operand);
  // The same in float32, and squares[i] = |row i|^2.
  void (*multiply_floats)(RowBlock<float> block, const FloatOperand& operand, float* out,
                          float* squares);
  // Products of `count` rows with one query. Bit i: the upper bound s + relative |p| of row i
  // reaches `need`, for its raw score s = p - half and p = products[i] * scale; false for NaN.
  uint32_t (*rows_above)(const float* products, int64_t count, Epilogue epilogue, float need,
                         float relative);
  // Products of one row with `count` queries, up to kGroup. Bit q: the same with need[q]; `scale`
  // and `half` are the row's.
  uint32_t (*queries_above_bf16)(const Bfloat16* products, int64_t count, float scale, float half,
                                 const float* need, float relative);
  uint32_t (*queries_above_f32)(const float* products, int64_t count, float scale, float half,
                                const float* need, float relative);
  // The largest lower bound s - relative |p| of each column's scores, s and p as above, of a block
  // of products, each row `columns` wide; NaN counts for nothing, -inf where there is no other. The
  // epilogue is that of the rows.
  void (*column_maxima_bf16)(RowBlock<Bfloat16> block, int64_t columns, Epilogue epilogue,
                             float relative, float* maxima);
  void (*column_maxima_f32)(RowBlock<float> block, int64_t columns, Epilogue epilogue,
                            float relative, float* maxima);
  // Adds the scores products[i] * scale[i] (scale may be null) of the rows whose bit is set in
  // `allowed`; overwrites the products. Returns how many lie above `upper`; `near_ties` receives
  // the bits of those in lower..upper.
  int64_t (*update_softmax)(float* products, const float* scale, uint32_t allowed,
                            OnlineSoftmax& softmax, uint32_t& near_ties);
};

// A bfloat16 number as a float.
inline float to_float(Bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}
inline float to_float(float value) { return value; }

inline void keep_codes(CodeOperand&) {}  // the caller's layout serves

// For products that are summed in `lanes` sums, which are then added: `lanes` a power of two.
template <int lanes>
void prepare_lanes(FloatOperand& operand) {
  double levels = 1.0;
  for (int width = lanes; width > 1; width /= 2) ++levels;
  operand.error_terms = static_cast<double>((operand.columns + lanes - 1) / lanes) + levels;
}

extern const TileKernels kPortableKernels;
#if defined(__x86_64__)
extern const TileKernels kAvx2Kernels, kAvx512Kernels, kAmxKernels;
#endif

// The best that this CPU can run.
const TileKernels& best_kernels();
// By name: "amx", "avx512", "avx2" or "portable"; null where this CPU cannot run it.
const TileKernels* find_kernels(const char* name);

}  // namespace r2ec
