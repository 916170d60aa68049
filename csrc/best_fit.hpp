// Best-fit decreasing bin packing: which groups share a batch.
//
// Groups are taken by falling size (ties: lower index first), and each is put into the fullest
// batch that has room for it (ties: the batch that was opened first), or opens a new one:
//
//   sizes 6 5 4 3 2, capacity 10      batch 0 | 6       | 4     |
//                                     batch 1 | 5     | 3   | 2 |
//
// The sort counts sizes where they are small, O(groups). The fullest batch with room is the one
// with the least free space >= size: batches lie in a bucket for each free space, and masks of 64
// bits over the buckets, three levels deep, find the next one that is not empty in a few
// instructions. A heap in each bucket gives the batch opened first. Where the capacity is too large
// for buckets, an ordered set does the same in O(log batches).
#pragma once

#include <cstdint>
#include <vector>

namespace r2ec {

// Writes the batch of every group and returns the number of batches. Sizes above `capacity` open a
// batch of their own.
int64_t best_fit_decreasing(const std::vector<int64_t>& sizes, int64_t capacity,
                            std::vector<int64_t>& batch_of_group);

}  // namespace r2ec
