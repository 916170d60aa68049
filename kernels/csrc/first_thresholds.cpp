#include "first_thresholds.hpp"

#include <algorithm>
#include <functional>
#include <limits>
#include <type_traits>

namespace r2ec {

namespace {
// maxima for each of the k that count: with 4, the k-th largest has about 1.15 k rows above it
constexpr int64_t kMaxima = 4;
constexpr int64_t kTallest = 64;  // rows of a group
constexpr float kNothing = -std::numeric_limits<float>::infinity();
}  // namespace

FirstThresholds::FirstThresholds(TopkHeap& heap, const TileKernels& kernels, int64_t rows,
                                 bool by_row, float relative)
    : heap_(heap), kernels_(kernels), rows_(rows), relative_(relative) {
  place_ = heap.excluded_counts();
  int64_t most = 0;
  for (int64_t& place : place_) most = std::max(most, place += heap.k());
  height_ = std::min(kTallest, rows / (kMaxima * std::max<int64_t>(1, most)));
  if (height_ < 2) return;
  groups_ = (rows + height_ - 1) / height_;
  if (by_row) maxima_.resize(groups_ * heap.queries());
}

template <typename T>
void FirstThresholds::add(int64_t group, const T* products, int64_t stride, Epilogue epilogue) {
  const int64_t first = group * height_;
  const RowBlock<T> block = {products + first * stride, stride, std::min(height_, rows_ - first)};
  const Epilogue own = {epilogue.scale ? epilogue.scale + first : nullptr,
                        epilogue.half ? epilogue.half + first : nullptr};
  float* const maxima = maxima_.data() + group * heap_.queries();
  if constexpr (std::is_same_v<T, float>)
    kernels_.column_maxima_f32(block, heap_.queries(), own, relative_, maxima);
  else
    kernels_.column_maxima_bf16(block, heap_.queries(), own, relative_, maxima);
}

template void FirstThresholds::add<float>(int64_t, const float*, int64_t, Epilogue);
template void FirstThresholds::add<Bfloat16>(int64_t, const Bfloat16*, int64_t, Epilogue);

void FirstThresholds::raise(int64_t query, float error) {
  std::vector<float> own(groups_);
  for (int64_t group = 0; group < groups_; ++group)
    own[group] = maxima_[group * heap_.queries() + query];
  raise(query, error, own);
}

void FirstThresholds::raise_from(int64_t query, float error, const float* products) {
  std::vector<float> own(groups_);
  // rows of a group lie `groups` apart; fewer than `groups` at the end are in none
  kernels_.column_maxima_f32({products, groups_, rows_ / groups_}, groups_, {nullptr, nullptr},
                             relative_, own.data());
  raise(query, error, own);
}

void FirstThresholds::raise(int64_t query, float error, std::vector<float>& maxima) {
  const auto place = maxima.begin() + (place_[query] - 1);
  std::nth_element(maxima.begin(), place, maxima.end(), std::greater<float>());
  if (*place > kNothing) heap_.raise_threshold(query, *place - error);
}

}  // namespace r2ec
