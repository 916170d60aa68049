#include "best_fit.hpp"

#include <algorithm>
#include <functional>
#include <numeric>
#include <set>
#include <utility>

namespace r2ec {
namespace {

constexpr int64_t kMaxBuckets = int64_t{1} << 20;

// Open batches by free space, in an ordered set. Takes any capacity.
class SpaceSet {
 public:
  // The batch with the least space >= size (ties: lowest index) and its space, or -1.
  std::pair<int64_t, int64_t> take(int64_t size) {
    const auto at = open_.lower_bound({size, 0});
    if (at == open_.end()) return {-1, 0};
    const auto [space, batch] = *at;
    open_.erase(at);
    return {batch, space};
  }
  void put(int64_t space, int64_t batch) { open_.insert({space, batch}); }

 private:
  std::set<std::pair<int64_t, int64_t>> open_;
};

// The same for a capacity that may have a bucket a value: heaps, and three levels of 64-bit masks
// which find the next bucket that is not empty.
class SpaceBuckets {
 public:
  explicit SpaceBuckets(int64_t capacity) : buckets_(capacity + 1) {
    for (int64_t bits = capacity + 1; masks_.empty() || bits > 1;) {
      bits = (bits + 63) / 64;
      masks_.emplace_back(bits, 0);
    }
  }
  std::pair<int64_t, int64_t> take(int64_t size) {
    const int64_t space = next(size);
    if (space < 0) return {-1, 0};
    auto& heap = buckets_[space];
    std::pop_heap(heap.begin(), heap.end(), std::greater<>());
    const int64_t batch = heap.back();
    heap.pop_back();
    if (heap.empty()) clear(space);
    return {batch, space};
  }
  void put(int64_t space, int64_t batch) {
    auto& heap = buckets_[space];
    if (heap.empty()) set(space);
    heap.push_back(batch);
    std::push_heap(heap.begin(), heap.end(), std::greater<>());
  }

 private:
  void set(int64_t bit) {
    for (auto& level : masks_) {
      level[bit >> 6] |= uint64_t{1} << (bit & 63);
      bit >>= 6;
    }
  }
  void clear(int64_t bit) {
    for (auto& level : masks_) {
      level[bit >> 6] &= ~(uint64_t{1} << (bit & 63));
      if (level[bit >> 6] != 0) return;
      bit >>= 6;
    }
  }
  // Lowest set bit >= bit, or -1: up until a mask has one, then down to its first.
  int64_t next(int64_t bit) const {
    for (size_t level = 0; level < masks_.size(); ++level) {
      const auto& masks = masks_[level];
      const int64_t word = bit >> 6;
      if (word >= static_cast<int64_t>(masks.size())) return -1;
      const uint64_t rest = masks[word] >> (bit & 63);
      if (rest != 0) {
        bit += __builtin_ctzll(rest);
        while (level-- > 0) bit = bit * 64 + __builtin_ctzll(masks_[level][bit]);
        return bit;
      }
      bit = word + 1;
    }
    return -1;
  }

  std::vector<std::vector<int64_t>> buckets_;
  std::vector<std::vector<uint64_t>> masks_;
};

template <typename Open>
int64_t place(const std::vector<int64_t>& sizes, const std::vector<int64_t>& order,
              int64_t capacity, Open open, std::vector<int64_t>& batch_of_group) {
  int64_t num_batches = 0;
  for (const int64_t group : order) {
    const int64_t size = sizes[group];
    auto [batch, space] = size > capacity ? std::pair<int64_t, int64_t>{-1, 0} : open.take(size);
    if (batch < 0) {
      batch = num_batches++;
      space = capacity;
    }
    batch_of_group[group] = batch;
    if (space > size) open.put(space - size, batch);
  }
  return num_batches;
}

std::vector<int64_t> by_falling_size(const std::vector<int64_t>& sizes) {
  const int64_t n = static_cast<int64_t>(sizes.size());
  std::vector<int64_t> order(n);
  const int64_t largest = n == 0 ? 0 : *std::max_element(sizes.begin(), sizes.end());
  if (largest > 4 * n + 4096) {
    std::iota(order.begin(), order.end(), int64_t{0});
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return sizes[a] > sizes[b]; });
    return order;
  }
  std::vector<int64_t> at(largest + 2, 0);  // at[largest - size + 1] counts, then starts
  for (const int64_t size : sizes) ++at[largest - size + 1];
  std::partial_sum(at.begin(), at.end(), at.begin());
  for (int64_t group = 0; group < n; ++group) order[at[largest - sizes[group]]++] = group;
  return order;
}

}  // namespace

int64_t best_fit_decreasing(const std::vector<int64_t>& sizes, int64_t capacity,
                            std::vector<int64_t>& batch_of_group) {
  const auto order = by_falling_size(sizes);
  batch_of_group.assign(sizes.size(), -1);
  const int64_t n = static_cast<int64_t>(sizes.size());
  if (capacity <= kMaxBuckets && capacity / 64 <= n + 64)
    return place(sizes, order, capacity, SpaceBuckets(capacity), batch_of_group);
  return place(sizes, order, capacity, SpaceSet(), batch_of_group);
}

}  // namespace r2ec
