// What both kinds of AMX products need: the configuration of the tile registers, and a transpose.
//
// AMX has eight tile registers of 16 rows x 64 bytes. One instruction multiplies two of them and
// adds to a third: 16 x 32 bfloat16 times 32 x 16 (16 * 16 * 32 multiply-adds), or 16 x 64 int8
// times 64 x 16. Of the second operand, two (bfloat16) or four (int8) neighbouring columns of a
// query lie side by side:
//
//     rows [16, 32 bf16]        queries, 16 lines of 16 pairs
//     +------------------+      +-------------------------------------+
//     | x0 x1 ... x31    |      | q0[0] q0[1]   q1[0] q1[1]   ...     |   line 0: columns 0 and 1
//     | ...              |      | q0[2] q0[3]   q1[2] q1[3]   ...     |   line 1: columns 2 and 3
//     +------------------+      +-------------------------------------+
//
// Sums come out as [16 rows, 16 queries]; callers want [query][row], so they are transposed.
#pragma once

#include <immintrin.h>

#include <atomic>
#include <cstdint>

#define TARGET           \
  __attribute__((target( \
      "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,amx-int8,avx2,fma")))

namespace r2ec::amx {
namespace {

constexpr int64_t kTileRows = 16;

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

}  // namespace
}  // namespace r2ec::amx
