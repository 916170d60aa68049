// A threshold for every query before a top-k scan keeps its first row.
//
// In: the first block of products, some thousand rows. Out: in a TopkHeap, thresholds close to
// those that the whole block will leave, so that it keeps little more than k rows of the block for
// each query, instead of k (1 + ln(rows / k)) that come and go.
//
//   rows     [ group 0 | group 1 | group 2 | ... ]     the largest lower bound of each group;
//   maxima       .9        .2        .7                the k-th largest of these, at most the
//                                                      k-th largest of all: the threshold
//
// Of `excluded` rows any may be a maximum: for a query with e of them the (k + e)-th largest.
// Work: one read of the products and a selection among 4 k maxima for each query.
#pragma once

#include <cstdint>
#include <vector>

#include "simd/tiles.hpp"
#include "topk_heap.hpp"

namespace r2ec {

class FirstThresholds {
 public:
  // rows: of the block, which lie one after another in memory if `by_row`, else the queries do;
  // relative: errors of its scores are at most error(query) + relative |p|.
  FirstThresholds(TopkHeap& heap, const TileKernels& kernels, int64_t rows, bool by_row,
                  float relative);

  // 0 where the block has too few rows for it.
  int64_t groups() const { return groups_; }

  // Products [rows, queries]: each group once, in any order, then raise() for each query.
  template <typename T>
  void add(int64_t group, const T* products, int64_t stride, Epilogue epilogue);
  void raise(int64_t query, float error);
  // Products [queries, rows], without scale and half: those of one query.
  void raise_from(int64_t query, float error, const float* products);

 private:
  void raise(int64_t query, float error, std::vector<float>& maxima);

  TopkHeap& heap_;
  const TileKernels& kernels_;
  const int64_t rows_;
  const float relative_;
  std::vector<int64_t> place_;  // of the maximum that counts, by query: k and its excluded rows
  int64_t groups_ = 0, height_ = 0;
  std::vector<float> maxima_;  // [groups, queries]
};

}  // namespace r2ec
