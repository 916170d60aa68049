// The coarse scan of a top-k search: approximate scores with error bounds, made on the fly.
//
// In: a table of N rows, M prepared queries. Out: in a TopkHeap, for each query every row that may
// still be among its k best; an exact re-score of these few rows gives the result.
//
//            M queries
//          +-----------+
//   32     |  products |   q = 0 .. M-1:  score +- error against threshold(q);
//   rows   |  32 x M   |                  the few rows that reach it go to the heap
//          +-----------+
//   next 32 rows ...                      (the products are overwritten: no score is stored)
//
// Bytes: the table once, N * D for int8 codes or 4 * N * D for float32, and nothing of size N * M.
// FLOPs: 2 * N * M * D for the products, about 3 * N * M for the comparison.
// Numerics: a raw score s, made of a product p, lies within s +- (error + relative |p|) of the
// exact one. A row is dropped only where its upper bound is below the k-th largest lower bound, so
// that ties are kept. docs/search.md derives raw scores and bounds.
#pragma once

#include <cstdint>
#include <vector>

#include "simd/tiles.hpp"
#include "tables.hpp"
#include "topk_heap.hpp"

namespace r2ec {

// Where a worker's scores go, and the bounds of their errors.
struct ScanSink {
  TopkHeap& heap;
  const TileKernels& kernels;
  int64_t worker;
  const float* error;  // of each query
  float relative;
};

// Each scans rows first..last-1 of a table.
void scan_codes(const CodeTable& table, const CodeQueries& queries, int64_t first, int64_t last,
                const ScanSink& sink);
// `sink.error` is not used. Rows whose norm float32 may have lost (outside 1/huge..huge) have no
// bound: they are left out and appended to `unbounded`.
void scan_floats(const FloatTable& table, const FloatQueries& queries, Similarity similarity,
                 double huge, int64_t first, int64_t last, const ScanSink& sink,
                 std::vector<int64_t>& unbounded);

// Products of rows start.. of a table with all queries, made by a matrix library; `epilogue` and
// `first`, `last` count from `start`. [rows, queries] in memory, or [queries, rows].
template <typename T>
void scan_products(const T* products, int64_t stride, Epilogue epilogue, int64_t start,
                   int64_t first, int64_t last, const ScanSink& sink);
void scan_product_columns(const float* products, int64_t stride, Epilogue epilogue, int64_t start,
                          int64_t first, int64_t last, const ScanSink& sink);

}  // namespace r2ec
