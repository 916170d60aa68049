#include "packer.hpp"

#include <algorithm>
#include <functional>
#include <numeric>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

#include "parallel.hpp"

namespace r2ec {
namespace {

constexpr int64_t kMaxBuckets = int64_t{1} << 20;

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

std::string str(int64_t value) { return std::to_string(value); }

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

template <typename T>
void copy_tokens(const T* from, int64_t count, int64_t* to) {
  std::copy(from, from + count, to);
}

void count_up(int64_t* to, int64_t count, int64_t from) { std::iota(to, to + count, from); }

}  // namespace

void check_offsets(const Offsets& offsets, const char* name) {
  const std::string where(name);
  if (offsets.size < 1)
    fail(where + ": offsets must hold at least the entry 0, got an empty array");
  if (offsets.data[0] != 0) fail(where + ": offsets must start at 0, got " + str(offsets.data[0]));
  for (int64_t row = 0; row + 1 < offsets.size; ++row) {
    const int64_t begin = offsets.data[row], end = offsets.data[row + 1];
    if (end == begin)
      fail(where + ": row " + str(row) + " is empty; every row needs at least one token");
    if (end < begin)
      fail(where + ": offsets must not fall, got " + str(begin) + " then " + str(end) + " at row " +
           str(row));
  }
  const int64_t last = offsets.data[offsets.size - 1];
  if (last != offsets.num_values)
    fail(where + ": the last offset must be the number of values (" + str(offsets.num_values) +
         "), got " + str(last));
}

int64_t best_fit_decreasing(const std::vector<int64_t>& sizes, int64_t capacity,
                            std::vector<int64_t>& batch_of_group) {
  const auto order = by_falling_size(sizes);
  batch_of_group.assign(sizes.size(), -1);
  const int64_t n = static_cast<int64_t>(sizes.size());
  if (capacity <= kMaxBuckets && capacity / 64 <= n + 64)
    return place(sizes, order, capacity, SpaceBuckets(capacity), batch_of_group);
  return place(sizes, order, capacity, SpaceSet(), batch_of_group);
}

Plan::Plan(const Offsets& prompts, const Offsets* completions, const PackOptions& options)
    : options_(options) {
  if (options.max_tokens < 1 || options.max_tokens > kInt32Max)
    fail("max_tokens must be in 1.." + str(kInt32Max) + ", got " + str(options.max_tokens));
  if (options.multiple < 1 || options.multiple > options.max_tokens)
    fail("pad_to_multiple_of must be in 1..max_tokens, got " + str(options.multiple));
  check_offsets(prompts, "prompts");
  prompts_.assign(prompts.data, prompts.data + prompts.size);
  if (completions != nullptr) {
    check_offsets(*completions, "completions");
    int64_t expected = 0;
    if (options.num_generations < 1 || options.num_generations > kInt32Max ||
        __builtin_mul_overflow(prompts.size - 1, options.num_generations, &expected) ||
        expected != completions->size - 1)
      fail("completions must have num_generations rows for each prompt");
    completions_.assign(completions->data, completions->data + completions->size);
  } else if (options.num_generations != 0 || options.share_prompts) {
    fail("num_generations and share_prompts need completions");
  }

  const int64_t n = prompts.size - 1;
  const int64_t capacity = options.max_tokens / options.multiple * options.multiple;
  std::vector<int64_t> sizes(n);
  for (int64_t group = 0; group < n; ++group) sizes[group] = group_size(group).tokens;
  if (!options.oversize_alone) {
    // The largest group, lowest index first: the one that a plain placement would meet first.
    const auto largest = std::max_element(sizes.begin(), sizes.end());
    if (largest != sizes.end() && *largest > capacity)
      fail((completions == nullptr ? "row " : "group ") + str(largest - sizes.begin()) + " has " +
           str(*largest) + " tokens, more than the budget of " + str(capacity) +
           "; raise max_tokens, shorten it, or pass oversize=\"alone\"");
  }
  std::vector<int64_t> batch_of_group;
  const int64_t num_batches = best_fit_decreasing(sizes, capacity, batch_of_group);
  measure(batch_of_group, num_batches);
}

Plan::Size Plan::group_size(int64_t group) const {
  const int64_t prompt = prompts_[group + 1] - prompts_[group];
  const int64_t g = options_.num_generations;
  if (g == 0) return {prompt, prompt};
  const int64_t own = completions_[(group + 1) * g] - completions_[group * g];
  int64_t repeated = 0, tokens = 0, keys = 0;
  bool overflow = __builtin_mul_overflow(prompt, options_.share_prompts ? g + 1 : g, &repeated);
  overflow |= __builtin_add_overflow(repeated, own, &keys);
  overflow |= __builtin_add_overflow(options_.share_prompts ? prompt : repeated, own, &tokens);
  if (overflow) fail("group " + str(group) + ": its token count does not fit into 63 bits");
  return {tokens, keys};
}

// Fills groups_, the prefix sums and the longest sequences; refuses what int32 cannot index.
void Plan::measure(const std::vector<int64_t>& batch_of_group, int64_t num_batches) {
  const int64_t n = static_cast<int64_t>(batch_of_group.size());
  const int64_t g = options_.num_generations;
  num_tokens_.assign(num_batches, 0);
  max_length_q_.assign(num_batches, 0);
  max_length_k_.assign(num_batches, 0);
  std::vector<int64_t> keys(num_batches, 0);
  starts_.groups.assign(num_batches + 1, 0);
  starts_.predicted.assign(num_batches + 1, 0);
  for (int64_t group = 0; group < n; ++group) {
    const int64_t batch = batch_of_group[group];
    const Size size = group_size(group);
    const int64_t prompt = prompts_[group + 1] - prompts_[group];
    ++starts_.groups[batch + 1];
    if (__builtin_add_overflow(num_tokens_[batch], size.tokens, &num_tokens_[batch]) ||
        __builtin_add_overflow(keys[batch], size.keys, &keys[batch]))
      fail("a batch would hold more tokens than fit into 63 bits");
    int64_t longest_q = prompt, longest_k = prompt;
    for (int64_t row = group * g; row < (group + 1) * g; ++row) {
      const int64_t own = completions_[row + 1] - completions_[row];
      starts_.predicted[batch + 1] += own;
      longest_k = std::max(longest_k, prompt + own);
      longest_q = std::max(longest_q, options_.share_prompts ? own : prompt + own);
    }
    max_length_q_[batch] = std::max(max_length_q_[batch], longest_q);
    max_length_k_[batch] = std::max(max_length_k_[batch], longest_k);
  }
  starts_.tokens.assign(num_batches + 1, 0);
  starts_.sequences.assign(num_batches + 1, 0);
  starts_.keys.assign(num_batches + 1, 0);
  starts_.readouts.assign(num_batches + 1, 0);
  const int64_t sequences_a_group = g == 0 ? 1 : (options_.share_prompts ? g + 1 : g);
  for (int64_t batch = 0; batch < num_batches; ++batch) {
    const int64_t over = num_tokens_[batch] % options_.multiple;
    const int64_t tail = over == 0 ? 0 : options_.multiple - over;
    if (num_tokens_[batch] > kInt32Max - tail || keys[batch] > kInt32Max - tail)
      fail("a batch would hold " + str(num_tokens_[batch]) + " tokens and " + str(keys[batch]) +
           " keys; with the tail, sequence lengths must fit into int32");
    max_length_q_[batch] = std::max(max_length_q_[batch], tail);
    max_length_k_[batch] = std::max(max_length_k_[batch], tail);
    const int64_t groups = starts_.groups[batch + 1];
    starts_.groups[batch + 1] += starts_.groups[batch];
    starts_.predicted[batch + 1] += starts_.predicted[batch];
    starts_.tokens[batch + 1] = starts_.tokens[batch] + num_tokens_[batch] + tail;
    starts_.keys[batch + 1] = starts_.keys[batch] + keys[batch] + tail;
    starts_.readouts[batch + 1] = starts_.readouts[batch] + groups * std::max<int64_t>(g, 1);
    starts_.sequences[batch + 1] =
        starts_.sequences[batch] + groups * sequences_a_group + (tail > 0 ? 1 : 0);
  }
  groups_.resize(n);
  std::vector<int64_t> at(starts_.groups.begin(), starts_.groups.end() - 1);
  for (int64_t group = 0; group < n; ++group) groups_[at[batch_of_group[group]]++] = group;
}

template <typename Prompt, typename Completion>
void Plan::fill(const Prompt* prompt_values, const Completion* completion_values,
                const int64_t* targets, const Outputs& out, int64_t threads) const {
  parallel_ranges(starts_.tokens, threads, [&](int64_t first, int64_t last) {
    for (int64_t batch = first; batch < last; ++batch)
      fill_batch(batch, prompt_values, completion_values, targets, out);
  });
}

template <typename Prompt, typename Completion>
void Plan::fill_batch(int64_t batch, const Prompt* prompt_values,
                      const Completion* completion_values, const int64_t* targets,
                      const Outputs& out) const {
  const int64_t g = options_.num_generations;
  const int64_t base = starts_.tokens[batch];
  int64_t* const input_ids = out.input_ids + base;
  int64_t* const labels = out.labels == nullptr ? nullptr : out.labels + base;
  // Batches before this one hold one extra cu_seq_lens entry each.
  int32_t* cu_q = out.cu_seq_lens_q + starts_.sequences[batch] + batch;
  int32_t* cu_k = out.cu_seq_lens_k + starts_.sequences[batch] + batch;
  int64_t* kv = out.kv_index == nullptr ? nullptr : out.kv_index + starts_.keys[batch];
  int64_t predicted = starts_.predicted[batch], readout = starts_.readouts[batch];
  int64_t length = 0, keys = 0, trajectory = 0;
  int32_t sequence = 0;
  *cu_q++ = 0;
  *cu_k++ = 0;

  // Closes the sequence whose `own` tokens were just written; it sees `shared` rows from `prefix`.
  const auto close = [&](int64_t own, int64_t shared, int64_t prefix) {
    count_up(out.position_ids + base + length, own, shared);
    std::fill_n(out.seq_idx + base + length, own, sequence++);
    if (kv != nullptr) {
      count_up(kv, shared, prefix);
      count_up(kv + shared, own, length);
      kv += shared + own;
    }
    length += own;
    keys += shared + own;
    *cu_q++ = static_cast<int32_t>(length);
    *cu_k++ = static_cast<int32_t>(keys);
  };
  const auto read_out = [&] {
    if (out.readout != nullptr) out.readout[readout++] = length - 1;
  };

  for (int64_t i = starts_.groups[batch]; i < starts_.groups[batch + 1]; ++i) {
    const int64_t group = groups_[i];
    const Prompt* const prompt = prompt_values + prompts_[group];
    const int64_t p = prompts_[group + 1] - prompts_[group];
    const int64_t prefix = length;
    if (g == 0 || options_.share_prompts) {
      copy_tokens(prompt, p, input_ids + length);
      if (labels != nullptr) {
        labels[length] = kIgnore;
        copy_tokens(prompt + 1, p - 1, labels + length + 1);
      }
      close(p, 0, 0);
      if (g == 0) read_out();
    }
    for (int64_t row = group * g; row < (group + 1) * g; ++row) {
      const int64_t first = completions_[row], r = completions_[row + 1] - first;
      const int64_t repeated = options_.share_prompts ? 0 : p;
      copy_tokens(prompt, repeated, input_ids + length);
      copy_tokens(completion_values + first, r, input_ids + length + repeated);
      int64_t* const wanted = out.targets + predicted;
      if (targets == nullptr) {
        copy_tokens(completion_values + first, r, wanted);
      } else {
        std::copy(targets + first, targets + first + r, wanted);
      }
      if (labels != nullptr) {
        std::fill_n(labels + length, repeated, kIgnore);
        std::copy(wanted, wanted + r, labels + length + repeated);
      }
      out.predict_from[predicted] = options_.share_prompts ? prefix + p - 1 : length + p - 1;
      count_up(out.predict_from + predicted + 1, r - 1, length + repeated);
      std::fill_n(out.trajectory + predicted, r, trajectory++);
      count_up(out.source + predicted, r, first);
      predicted += r;
      close(repeated + r, p - repeated, prefix);
      read_out();
    }
  }
  const int64_t tail = starts_.tokens[batch + 1] - base - length;
  if (tail > 0) {
    std::fill_n(input_ids + length, tail, int64_t{0});
    if (labels != nullptr) std::fill_n(labels + length, tail, kIgnore);
    close(tail, 0, 0);
  }
}

#define R2EC_FILL(Prompt, Completion)                                                        \
  template void Plan::fill(const Prompt*, const Completion*, const int64_t*, const Outputs&, \
                           int64_t) const;
R2EC_FILL(int32_t, int32_t)
R2EC_FILL(int32_t, int64_t)
R2EC_FILL(int64_t, int32_t)
R2EC_FILL(int64_t, int64_t)
#undef R2EC_FILL

}  // namespace r2ec
