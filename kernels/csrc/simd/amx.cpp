// AMX: products by matrix units. An int16 query is 256 high + low with int8 parts, so that products
// with int8 codes are exact sums of two integer products.
//
// For float32 rows the units take bfloat16: a number is split into parts, x = h + m (+ l). Two
// parts miss at most 2^-16 of it; three nothing, or, of a query, 2^-24. Two parts: h h + (h m + m
// h), within 3 * 2^-16; three: h h + (m h + m m) + (l h + h l) + h m, as good as float32. Terms in
// brackets share a tile of sums; h h has its own, so that the sum of the large terms has the error
// of any float32 sum.
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>

#include "simd/tiles.hpp"

#define TARGET           \
  __attribute__((target( \
      "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,amx-int8,avx2,fma")))

namespace r2ec {

namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileColumns = 32;                 // bfloat16 of a tile's row
constexpr int64_t kTile = kTileRows * kTileColumns;  // elements
constexpr int64_t kAhead = 24;                       // rows that are fetched ahead
constexpr int64_t kCodesAhead = 32;                  // and of codes
constexpr int64_t kFewQueries = 5;      // fewer are multiplied without matrix units: floats
constexpr int64_t kFewCodeQueries = 6;  // and codes
constexpr int64_t kCodeTile = kTileRows * kCodeColumns;  // elements

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};

// Compilers do not know that tile instructions read memory.
inline void memory_fence() { std::atomic_signal_fence(std::memory_order_seq_cst); }

// All tiles 16 rows of 64 bytes; puts back what was configured before, for the library that did it.
class TileScope {
 public:
  TARGET TileScope() {
    _tile_storeconfig(&before_);
    TileConfig own = {};
    own.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
      own.bytes[tile] = 64;
      own.rows[tile] = kTileRows;
    }
    memory_fence();
    _tile_loadconfig(&own);
  }
  TARGET ~TileScope() {
    if (before_.palette)
      _tile_loadconfig(&before_);
    else
      _tile_release();
  }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

 private:
  TileConfig before_;
};

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
        _mm_prefetch(reinterpret_cast<const char*>(at + kAhead * block.stride), _MM_HINT_T1);
        _mm_prefetch(reinterpret_cast<const char*>(at + kAhead * block.stride + 16), _MM_HINT_T1);
        square[r] = _mm512_fmadd_ps(a, a, _mm512_fmadd_ps(b, b, square[r]));
        split<P, P == 2>(a, b, out + r * kTileColumns);
      }
    }
    for (int r = 0; r < kRows; ++r)
      if (first + begin + r < block.count)
        squares[first + begin + r] = _mm512_reduce_add_ps(square[r]);
  }
}

// 16 x 16 floats, rows to columns; row i of the result goes to out + i * stride.
TARGET void transpose(const __m512* in, float* out, int64_t stride) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(in[i], in[i + 1]);
    a[i + 1] = _mm512_unpackhi_ps(in[i], in[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      const __m512d low = _mm512_castps_pd(a[i + j]), high = _mm512_castps_pd(a[i + j + 2]);
      b[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      b[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88);
    a[i + 4] = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd);
    a[i + 8] = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_ps(out + i * stride, _mm512_shuffle_f32x4(a[i], a[i + 8], 0x88));
    _mm512_storeu_ps(out + (i + 4) * stride, _mm512_shuffle_f32x4(a[i + 4], a[i + 12], 0x88));
    _mm512_storeu_ps(out + (i + 8) * stride, _mm512_shuffle_f32x4(a[i], a[i + 8], 0xdd));
    _mm512_storeu_ps(out + (i + 12) * stride, _mm512_shuffle_f32x4(a[i + 4], a[i + 12], 0xdd));
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
      for (int64_t r = kCodesAhead; r < kCodesAhead + kGroup; ++r)
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

bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tile = d & (1u << 24), bf16 = d & (1u << 22), int8 = d & (1u << 25);
  if (!tile || !bf16 || !int8 || !__get_cpuid_count(7, 1, &a, &b, &c, &d)) return false;
  const bool convert = a & (1u << 5);                // AVX512_BF16
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  static const bool granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return convert && granted;
}

// Tiles [16 queries][chunk][high, low]; four neighbouring numbers of a query lie side by side,
// queries beyond the last are zero.
void amx_prepare_codes(CodeOperand& operand) {
  if (operand.num_queries < kFewCodeQueries) return;
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

TARGET void amx_multiply_codes(RowBlock<int8_t> block, const CodeOperand& operand, int32_t* out) {
  if (operand.split.empty() || block.count < kGroup) {
    avx512_multiply_codes(block, operand, out);
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

// Tiles [16 queries][chunk][part]; two neighbouring numbers of a query lie side by side, queries
// beyond the last are zero.
TARGET void amx_prepare_floats(FloatOperand& operand) {
  prepare_lanes<16>(operand);
  if (operand.num_queries < kFewQueries) return;
  const int64_t parts = operand.parts, chunks = chunks_of(operand.columns);
  const int64_t groups = (operand.num_queries + 15) / 16;
  operand.split.assign(groups * chunks * parts * kTile, 0);
  // The sum of h h; the small sums; what the parts leave out, 3 * 2^-16 or, with parts of rows up
  // to 2^-7 and 2^-14 and of queries up to 2^-8 and 2^-16, m l + l m + l l and 2^-24: below 8 *
  // 2^-24.
  const auto columns = static_cast<double>(operand.columns);
  operand.terms = columns + columns / 32.0 + 6.0 + (parts == 2 ? 768.0 : 8.0);
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

TARGET void amx_multiply_floats(RowBlock<float> block, const FloatOperand& operand, float* out,
                                float* squares) {
  if (operand.split.empty()) {
    avx512_multiply_floats(block, operand, out, squares);
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

}  // namespace r2ec
#endif
