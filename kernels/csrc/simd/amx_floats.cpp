// float32 rows times float32 queries by AMX tiles, which multiply bfloat16 and sum in float32.
//
// A number x is split into a sum of bfloat16 parts, x = h + m (+ l). Two parts miss at most 2^-16
// of it; three miss nothing, or, of a query, 2^-24. A product of two numbers is then
//
//   two parts     h h + (h m + m h)                              within 3 * 2^-16: for scans
//   three parts   h h + (m h + m m) + (l h + h l) + h m          as good as float32: for ranks
//
// Terms in brackets share a tile of sums; h h has its own, so that the sum of the large terms has
// the error of any float32 sum. `error_terms` adds up what is left out and what is rounded.
//
// 16 rows at a time are split into tiles [chunk of 32 columns][part], 4 or 6 bytes a number, in a
// buffer that stays in the cache; then all queries pass over them, 32 at a time (two parts) or 16
// (three). Work for 16 rows x 16 queries x 32 columns: 3 or 6 tile products. Fewer than
// kMinFloatQueries queries go to AVX-512, which needs no splitting.
#if defined(__x86_64__)
#include <vector>

#include "simd/amx.hpp"
#include "simd/amx_tiles.hpp"
#include "simd/avx512.hpp"

namespace r2ec::amx {

namespace {

constexpr int64_t kTileColumns = 32;                 // bfloat16 of a tile's row
constexpr int64_t kTile = kTileRows * kTileColumns;  // elements
constexpr int64_t kPrefetchRows = 24;
constexpr int64_t kMinFloatQueries = 5;  // fewer are multiplied by AVX-512

int64_t chunks_of(int64_t columns) { return (columns + kTileColumns - 1) / kTileColumns; }

// Two times 16 floats as P times 32 parts, `kTile` apart: one of the first, one of the second and
// so on, an order that rows and queries share. Parts are rounded, or cut off, so that three are the
// number itself.
template <int P, bool kRounds>
TARGET inline void split(__m512 first, __m512 second, uint16_t* out) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  const __m512 upper = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(0xffff0000)));
  for (int part = 0; part < P; ++part) {
    __m512i a = _mm512_castps_si512(first), b = _mm512_castps_si512(second);
    if (kRounds) {
      a = _mm512_add_epi32(a, half);
      b = _mm512_add_epi32(b, half);
    }
    const __m512i both = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(a, 16), b);
    _mm512_storeu_si512(out + part * kTile, both);
    if (part + 1 == P) break;
    first = _mm512_sub_ps(first, _mm512_and_ps(_mm512_castsi512_ps(a), upper));
    second = _mm512_sub_ps(second, _mm512_and_ps(_mm512_castsi512_ps(b), upper));
  }
}

// Splits 16 rows into tiles [chunk][part], and takes their squared norms; beyond the block's last
// row that one again. Four rows at a time, so that none waits for another.
template <int P>
TARGET void split_rows(const RowBlock<float>& block, int64_t first, int64_t columns,
                       uint16_t* tiles, float* squares) {
  constexpr int kRows = 4;
  for (int64_t begin = 0; begin < kTileRows; begin += kRows) {
    const float* rows[kRows];
    __m512 square[kRows];
    for (int r = 0; r < kRows; ++r) {
      const int64_t i = first + begin + r;
      rows[r] = block.rows + (i < block.count ? i : block.count - 1) * block.stride;
      square[r] = _mm512_setzero_ps();
    }
    for (int64_t c = 0, chunk = 0; c < columns; c += kTileColumns, ++chunk) {
      const int64_t left = columns - c;
      const uint32_t mask = left < kTileColumns ? (1u << left) - 1 : ~0u;
      uint16_t* const out = tiles + P * chunk * kTile + begin * kTileColumns;
      for (int r = 0; r < kRows; ++r) {
        const float* const at = rows[r] + c;
        const __m512 a = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), at);
        const __m512 b = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), at + 16);
        _mm_prefetch(reinterpret_cast<const char*>(at + kPrefetchRows * block.stride), _MM_HINT_T1);
        _mm_prefetch(reinterpret_cast<const char*>(at + kPrefetchRows * block.stride + 16),
                     _MM_HINT_T1);
        square[r] = _mm512_fmadd_ps(a, a, _mm512_fmadd_ps(b, b, square[r]));
        split<P, P == 2>(a, b, out + r * kTileColumns);
      }
    }
    for (int r = 0; r < kRows; ++r)
      if (first + begin + r < block.count)
        squares[first + begin + r] = _mm512_reduce_add_ps(square[r]);
  }
}

// The `tiles` tiles of sums [16 rows, 16 queries], added -> out[q * kGroup + row] of `count`
// queries.
TARGET void store_sums(const float* sums, int tiles, float* out, int64_t count) {
  __m512 rows[16];
  for (int i = 0; i < 16; ++i) {
    rows[i] = _mm512_load_ps(sums + (tiles - 1) * 256 + 16 * i);
    for (int tile = tiles - 2; tile >= 0; --tile)
      rows[i] = _mm512_add_ps(_mm512_load_ps(sums + tile * 256 + 16 * i), rows[i]);
  }
  if (count >= 16) {
    transpose(rows, out, kGroup);
    return;
  }
  alignas(64) float turned[256];
  transpose(rows, turned, 16);
  for (int64_t q = 0; q < count; ++q)
    _mm512_storeu_ps(out + q * kGroup, _mm512_load_ps(turned + 16 * q));
}

// Products of 16 rows in two parts with up to 16 (or 32) queries. Tiles (the intrinsics want their
// numbers spelled out): 0 and 2 h h, 1 and 3 m h + h m; 4 and 5 the parts of the rows, 6 and 7
// those of 16 queries.
template <bool kTwo>
TARGET void multiply_two(const uint16_t* rows, const uint16_t* queries, int64_t chunks, float* out,
                         int64_t count) {
  alignas(64) float sums[512];
  _tile_zero(0);
  _tile_zero(1);
  if (kTwo) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const uint16_t* const row = rows + 2 * chunk * kTile;
    const uint16_t* const query = queries + 2 * chunk * kTile;
    _tile_loadd(4, row, 64);
    _tile_loadd(5, row + kTile, 64);
    _tile_loadd(6, query, 64);
    _tile_loadd(7, query + kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (kTwo) {
      const uint16_t* const next = query + 2 * chunks * kTile;
      _tile_loadd(6, next, 64);
      _tile_loadd(7, next + kTile, 64);
      _tile_dpbf16ps(2, 4, 6);
      _tile_dpbf16ps(3, 5, 6);
      _tile_dpbf16ps(3, 4, 7);
    }
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  store_sums(sums, 2, out, count < 16 ? count : 16);
  if (kTwo) {
    _tile_stored(2, sums, 64);
    _tile_stored(3, sums + 256, 64);
    store_sums(sums, 2, out + 16 * kGroup, count - 16);
  }
}

// The same of rows in three parts with up to 16 queries. Tiles: 0 h h, 1 m h + m m, 2 l h + h l,
// 3 h m; 4, 5 and 6 the parts of the rows, 7 one part of the queries after another.
TARGET void multiply_three(const uint16_t* rows, const uint16_t* queries, int64_t chunks,
                           float* out, int64_t count) {
  alignas(64) float sums[1024];
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const uint16_t* const row = rows + 3 * chunk * kTile;
    const uint16_t* const query = queries + 3 * chunk * kTile;
    _tile_loadd(4, row, 64);
    _tile_loadd(5, row + kTile, 64);
    _tile_loadd(6, row + 2 * kTile, 64);
    _tile_loadd(7, query, 64);
    _tile_dpbf16ps(0, 4, 7);
    _tile_dpbf16ps(1, 5, 7);
    _tile_dpbf16ps(2, 6, 7);
    _tile_loadd(7, query + kTile, 64);
    _tile_dpbf16ps(3, 4, 7);
    _tile_dpbf16ps(1, 5, 7);
    _tile_loadd(7, query + 2 * kTile, 64);
    _tile_dpbf16ps(2, 4, 7);
  }
  _tile_stored(0, sums, 64);
  _tile_stored(3, sums + 256, 64);
  _tile_stored(1, sums + 512, 64);
  _tile_stored(2, sums + 768, 64);
  store_sums(sums, 4, out, count);
}

}  // namespace

// Tiles [16 queries][chunk][part]; two neighbouring numbers of a query lie side by side, queries
// beyond the last are zero.
TARGET void prepare_floats(FloatOperand& operand) {
  prepare_lanes<16>(operand);
  if (operand.num_queries < kMinFloatQueries) return;
  const int64_t parts = operand.parts, chunks = chunks_of(operand.columns);
  const int64_t groups = (operand.num_queries + 15) / 16;
  operand.split.assign(groups * chunks * parts * kTile, 0);
  // The sum of h h; the small sums; and what the parts leave out. Two parts: 3 * 2^-16, which is
  // 768 * 2^-24. Three, with parts of rows up to 2^-7 and 2^-14 and of queries up to 2^-8 and
  // 2^-16: m l + l m + l l and 2^-24, less than 8 * 2^-24.
  const auto columns = static_cast<double>(operand.columns);
  operand.error_terms = columns + columns / 32.0 + 6.0 + (parts == 2 ? 768.0 : 8.0);
  std::vector<uint16_t> split_query(3 * kTile);
  for (int64_t q = 0; q < operand.num_queries; ++q)
    for (int64_t c = 0; c < operand.columns; c += kTileColumns) {
      const float* const from = operand.values.data() + q * operand.stride + c;
      const bool whole = c + 16 < operand.stride;
      split<3, true>(_mm512_loadu_ps(from),
                     whole ? _mm512_loadu_ps(from + 16) : _mm512_setzero_ps(), split_query.data());
      uint16_t* const tile =
          operand.split.data() + ((q / 16) * chunks + c / kTileColumns) * parts * kTile;
      for (int64_t part = 0; part < parts; ++part)
        for (int64_t k = 0; k < kTileColumns; ++k)
          tile[part * kTile + (k / 2) * kTileColumns + 2 * (q % 16) + k % 2] =
              split_query[part * kTile + k];
    }
}

TARGET void multiply_floats(RowBlock<float> block, const FloatOperand& operand, float* out,
                            float* squares) {
  if (operand.split.empty()) {
    avx512::multiply_floats(block, operand, out, squares);
    return;
  }
  const int64_t parts = operand.parts, chunks = chunks_of(operand.columns);
  static thread_local std::vector<uint16_t> memory;
  memory.resize(parts * chunks * kTile + 32);
  auto* const tiles = reinterpret_cast<uint16_t*>(
      (reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~uintptr_t{63});
  const TileScope scope;
  for (int64_t first = 0; first < block.count; first += kTileRows) {
    if (parts == 2)
      split_rows<2>(block, first, operand.columns, tiles, squares);
    else
      split_rows<3>(block, first, operand.columns, tiles, squares);
    memory_fence();
    const int64_t step = parts == 2 ? 32 : 16;
    for (int64_t q = 0; q < operand.num_queries; q += step) {
      const uint16_t* const queries = operand.split.data() + (q / 16) * chunks * parts * kTile;
      const int64_t count = operand.num_queries - q < step ? operand.num_queries - q : step;
      float* const to = out + q * kGroup + first;
      if (parts == 3)
        multiply_three(tiles, queries, chunks, to, count);
      else if (count > 16)
        multiply_two<true>(tiles, queries, chunks, to, count);
      else
        multiply_two<false>(tiles, queries, chunks, to, count);
    }
  }
}

}  // namespace r2ec::amx
#endif
