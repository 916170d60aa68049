// int8 codes times int16 queries by AMX tiles.
//
// A query is split once into two int8 parts, value = 256 * high + low, so that
//
//   code . query = 256 * (code . high) + code . low
//
// is an exact sum of two int8 products. 32 rows of codes are two tiles, read where they lie; each
// pair of query tiles (high, low) serves both, so that four sums of 16 x 16 are open at a time:
//
//                         high of 16 queries (6)   low of 16 queries (7)
//     rows  0..15 (4)            sum 0                    sum 1
//     rows 16..31 (5)            sum 2                    sum 3
//
// Work: 2 * 32 * 16 * D multiply-adds for 16 queries, twice the products that int16 would need, at
// many times the rate. Rows of the next group are fetched to the second-level cache during the
// first 16 queries. Fewer than kMinCodeQueries queries, and the last incomplete group, go to
// AVX-512, which is as fast for few queries and never reads behind the table.
#if defined(__x86_64__)
#include "simd/amx.hpp"
#include "simd/amx_tiles.hpp"
#include "simd/avx512.hpp"

namespace r2ec::amx {

namespace {

constexpr int64_t kCodeTile = kTileRows * kCodeColumns;  // elements
constexpr int64_t kPrefetchRows = 32;
constexpr int64_t kMinCodeQueries = 6;  // fewer are multiplied by AVX-512

// The sums 256 high + low of 16 rows with `count` queries.
TARGET void store_code_sums(const int32_t* high, const int32_t* low, int32_t* out, int64_t count) {
  __m512 lines[16];
  for (int i = 0; i < 16; ++i) {
    const __m512i more = _mm512_slli_epi32(_mm512_load_si512(high + 16 * i), 8);
    lines[i] = _mm512_castsi512_ps(_mm512_add_epi32(more, _mm512_load_si512(low + 16 * i)));
  }
  if (count >= 16) {
    transpose(lines, reinterpret_cast<float*>(out), kGroup);
    return;
  }
  alignas(64) int32_t sums[256];
  transpose(lines, reinterpret_cast<float*>(sums), 16);
  for (int64_t q = 0; q < count; ++q)
    _mm512_storeu_si512(out + q * kGroup, _mm512_load_si512(sums + 16 * q));
}

// Products of kGroup rows of codes with up to 16 queries, whose tiles serve both halves of the
// rows. Tiles: 0 and 1 the sums of the high and low parts of the queries with the first 16 rows, 2
// and 3 those of the others, 4 and 5 the rows, 6 and 7 the parts. Fetches the rows after them where
// asked to.
template <bool kFetch>
TARGET void multiply_code_tiles(const int8_t* rows, int64_t stride, const int8_t* queries,
                                int64_t chunks, int32_t* out, int64_t count) {
  alignas(64) int32_t high[256], low[256];
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int8_t* const at = rows + chunk * kCodeColumns;
    if (kFetch)
      for (int64_t r = kPrefetchRows; r < kPrefetchRows + kGroup; ++r)
        _mm_prefetch(reinterpret_cast<const char*>(at + r * stride), _MM_HINT_T1);
    _tile_loadd(6, queries + 2 * chunk * kCodeTile, 64);
    _tile_loadd(4, at, stride);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, queries + (2 * chunk + 1) * kCodeTile, 64);
    _tile_dpbssd(1, 4, 7);
    _tile_loadd(5, at + kTileRows * stride, stride);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_stored(0, high, 64);
  _tile_stored(1, low, 64);
  store_code_sums(high, low, out, count);
  _tile_stored(2, high, 64);
  _tile_stored(3, low, 64);
  store_code_sums(high, low, out + kTileRows, count);
}

}  // namespace

// Tiles [16 queries][chunk][high, low]; four neighbouring numbers of a query lie side by side,
// queries beyond the last are zero.
void prepare_codes(CodeOperand& operand) {
  if (operand.num_queries < kMinCodeQueries) return;
  const int64_t chunks = operand.columns / kCodeColumns;
  operand.split.assign((operand.num_queries + 15) / 16 * chunks * 2 * kCodeTile, 0);
  for (int64_t q = 0; q < operand.num_queries; ++q)
    for (int64_t c = 0; c < operand.columns; ++c) {
      const int value = operand.values[q * operand.columns + c];
      const int high = (value + 128) >> 8, k = static_cast<int>(c % kCodeColumns);
      int8_t* const tile =
          operand.split.data() + ((q / 16) * chunks + c / kCodeColumns) * 2 * kCodeTile;
      const int64_t at = (k / 4) * kCodeColumns + 4 * (q % 16) + k % 4;
      tile[at] = static_cast<int8_t>(high);
      tile[kCodeTile + at] = static_cast<int8_t>(value - 256 * high);
    }
}

TARGET void multiply_codes(RowBlock<int8_t> block, const CodeOperand& operand, int32_t* out) {
  if (operand.split.empty() || block.count < kGroup) {
    avx512::multiply_codes(block, operand, out);
    return;
  }
  const int64_t chunks = operand.columns / kCodeColumns;
  const TileScope scope;
  for (int64_t q = 0; q < operand.num_queries; q += 16) {
    const auto run = q == 0 ? multiply_code_tiles<true> : multiply_code_tiles<false>;
    run(block.rows, block.stride, operand.split.data() + (q / 16) * chunks * 2 * kCodeTile, chunks,
        out + q * kGroup, operand.num_queries - q < 16 ? operand.num_queries - q : 16);
  }
}

}  // namespace r2ec::amx
#endif
