// Four rows of a block at a time, so that a query's load serves four products.
#pragma once

#include "simd/tiles.hpp"

namespace r2ec {

constexpr int kRows = 4;
constexpr int64_t kAhead = 8;  // rows that are fetched before their turn

template <typename T>
struct FourRows {
  const T* row[kRows];
  int64_t count;  // of them that exist; the block's last row stands for those beyond
  int64_t ahead;  // elements from a row to the one to be fetched

  FourRows(const RowBlock<T>& block, int64_t first)
      : count(block.count - first < kRows ? block.count - first : kRows),
        ahead(kAhead * block.stride) {
    for (int64_t r = 0; r < kRows; ++r)
      row[r] = block.rows + (first + (r < count ? r : count - 1)) * block.stride;
  }
};

}  // namespace r2ec
