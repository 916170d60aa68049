// One step of an online softmax over 32 scores, with the count of those ahead of a target: what
// TileKernels::update_softmax runs on CPUs without AVX-512.
//
// In: 32 products with one query, the rows' scales, the bits of the rows that take part, and the
// query's state (m, l). With x = (score - origin) * log2_scale of the rows that take part:
//
//   m' = max(m, max x)
//   l' = l * 2^(m - m') + sum of 2^(x - m')
//
// Out: the new state, how many scores lie above `upper` (certainly ahead of the target), and the
// bits of those between `lower` and `upper` (near ties, which the caller scores exactly). About 20
// operations a score, none of them a branch: loops of fixed length that compilers vectorize.
//
// Numerics: x, the powers and the sum of 32 are float32, added as a tree of five levels; l is a
// float64, so that the number of items does not widen its error. 2^f is a polynomial of degree 6 on
// -0.5..0.5, within two rounding units; powers below 2^-126 are 0.
#pragma once

#include "simd/tiles.hpp"

namespace r2ec {

// 2^f on -0.5..0.5, the highest power first.
constexpr int kExp2Terms = 7;
constexpr float kExp2[kExp2Terms] = {1.535336188e-4f,
                                     1.339887440e-3f,
                                     9.618437357e-3f,
                                     5.550332548e-2f,
                                     2.402264791e-1f,
                                     6.931472028e-1f,
                                     1.0f};

// 2^x for x <= 0 to within two rounding units; 0 below -126.
inline __attribute__((always_inline)) float exp2_of(float x) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = x + kShift;
  const float f = x - (shifted - kShift);  // -0.5..0.5
  float p = kExp2[0];
  for (int i = 1; i < kExp2Terms; ++i) p = p * f + kExp2[i];
  uint32_t bits, power;
  std::memcpy(&bits, &p, sizeof bits);
  std::memcpy(&power, &shifted, sizeof power);
  bits += power << 23;
  std::memcpy(&p, &bits, sizeof p);
  return x >= -126.0f ? p : 0.0f;
}

inline __attribute__((always_inline)) int64_t online_softmax_update(float* products,
                                                                    const float* scale,
                                                                    uint32_t allowed,
                                                                    OnlineSoftmax& softmax,
                                                                    uint32_t& near_ties) {
  constexpr float kLeast = -3.0e38f;
  float score[kGroup], other[kGroup];
  uint32_t ahead[kGroup], close[kGroup];
  for (int i = 0; i < kGroup; ++i) score[i] = scale ? products[i] * scale[i] : products[i];
  for (int i = 0; i < kGroup; ++i) {
    const uint32_t counts = (allowed >> i) & 1;
    ahead[i] = counts & static_cast<uint32_t>(score[i] > softmax.upper);
    close[i] = (counts & static_cast<uint32_t>(score[i] >= softmax.lower)) << i;
    const float t = (score[i] - softmax.origin) * softmax.log2_scale;
    score[i] = counts ? t : kLeast;
    other[i] = score[i];
  }
  for (int half = kGroup / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i)
      other[i] = other[i] > other[i + half] ? other[i] : other[i + half];
  if (other[0] > softmax.m) {
    softmax.l *= static_cast<double>(exp2_of(softmax.m - other[0]));
    softmax.m = other[0];
  }
  for (int i = 0; i < kGroup; ++i) score[i] = exp2_of(score[i] - softmax.m);
  for (int half = kGroup / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) score[i] += score[i + half];
  softmax.l += static_cast<double>(score[0]);
  uint32_t count = 0, bits = 0, above = 0;
  for (int i = 0; i < kGroup; ++i) {
    count += ahead[i];
    bits |= close[i];
    above |= ahead[i] << i;
  }
  near_ties = bits & ~above;
  return count;
}

}  // namespace r2ec
