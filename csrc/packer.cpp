#include "packer.hpp"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

#include "best_fit.hpp"
#include "parallel.hpp"

namespace r2ec {
namespace {

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

std::string str(int64_t value) { return std::to_string(value); }

template <typename T>
void copy_tokens(const T* from, int64_t count, int64_t* to) {
  std::copy(from, from + count, to);
}

void count_up(int64_t* to, int64_t count, int64_t from) { std::iota(to, to + count, from); }

// Entries first..first+size-1 of a values array.
struct Row {
  int64_t first, size;
};

Row row_of(const std::vector<int64_t>& offsets, int64_t row) {
  return {offsets[row], offsets[row + 1] - offsets[row]};
}

// Writes the sequences of one batch, one behind the other, into its parts of all outputs.
template <typename Prompt, typename Completion>
class BatchWriter {
 public:
  BatchWriter(const Starts& starts, int64_t batch, const Prompt* prompt_values,
              const Completion* completion_values, const int64_t* targets, const Outputs& out)
      : prompt_values_(prompt_values),
        completion_values_(completion_values),
        targets_(targets),
        out_(out),
        input_ids_(out.input_ids + starts.tokens[batch]),
        position_ids_(out.position_ids + starts.tokens[batch]),
        seq_idx_(out.seq_idx + starts.tokens[batch]),
        labels_(out.labels == nullptr ? nullptr : out.labels + starts.tokens[batch]),
        // batches before this one hold one extra cu_seq_lens entry each
        cu_q_(out.cu_seq_lens_q + starts.sequences[batch] + batch),
        cu_k_(out.cu_seq_lens_k + starts.sequences[batch] + batch),
        kv_(out.kv_index == nullptr ? nullptr : out.kv_index + starts.keys[batch]),
        predicted_(starts.predicted[batch]),
        readout_(starts.readouts[batch]) {
    *cu_q_++ = 0;
    *cu_k_++ = 0;
  }

  int64_t length() const { return length_; }  // tokens so far

  void add_prompt(Row prompt) {
    const Prompt* const tokens = prompt_values_ + prompt.first;
    copy_tokens(tokens, prompt.size, input_ids_ + length_);
    if (labels_ != nullptr) {
      labels_[length_] = kIgnore;
      copy_tokens(tokens + 1, prompt.size - 1, labels_ + length_ + 1);
    }
    close(prompt.size, 0, 0);
  }

  // A completion whose prompt is shared (its tokens lie from `prefix` on) or repeated before it.
  void add_completion(Row prompt, Row completion, bool shared, int64_t prefix) {
    const int64_t repeated = shared ? 0 : prompt.size;
    const Completion* const tokens = completion_values_ + completion.first;
    copy_tokens(prompt_values_ + prompt.first, repeated, input_ids_ + length_);
    copy_tokens(tokens, completion.size, input_ids_ + length_ + repeated);
    int64_t* const wanted = out_.targets + predicted_;
    if (targets_ == nullptr)
      copy_tokens(tokens, completion.size, wanted);
    else
      copy_tokens(targets_ + completion.first, completion.size, wanted);
    if (labels_ != nullptr) {
      std::fill_n(labels_ + length_, repeated, kIgnore);
      copy_tokens(wanted, completion.size, labels_ + length_ + repeated);
    }
    // the prompt's last token predicts the first, each of the others the next
    out_.predict_from[predicted_] = (shared ? prefix : length_) + prompt.size - 1;
    count_up(out_.predict_from + predicted_ + 1, completion.size - 1, length_ + repeated);
    std::fill_n(out_.trajectory + predicted_, completion.size, trajectory_++);
    count_up(out_.source + predicted_, completion.size, completion.first);
    predicted_ += completion.size;
    close(repeated + completion.size, prompt.size - repeated, prefix);
  }

  void add_tail(int64_t size) {
    if (size == 0) return;
    std::fill_n(input_ids_ + length_, size, int64_t{0});
    if (labels_ != nullptr) std::fill_n(labels_ + length_, size, kIgnore);
    close(size, 0, 0);
  }

  // The state of the last token so far is what the item head reads.
  void read_out() {
    if (out_.readout != nullptr) out_.readout[readout_++] = length_ - 1;
  }

 private:
  // Ends the sequence whose `own` tokens were just written; it sees `shared` tokens from `prefix`.
  void close(int64_t own, int64_t shared, int64_t prefix) {
    count_up(position_ids_ + length_, own, shared);
    std::fill_n(seq_idx_ + length_, own, sequence_++);
    if (kv_ != nullptr) {
      count_up(kv_, shared, prefix);
      count_up(kv_ + shared, own, length_);
      kv_ += shared + own;
    }
    length_ += own;
    keys_ += shared + own;
    *cu_q_++ = static_cast<int32_t>(length_);
    *cu_k_++ = static_cast<int32_t>(keys_);
  }

  const Prompt* const prompt_values_;
  const Completion* const completion_values_;
  const int64_t* const targets_;
  const Outputs& out_;
  int64_t *const input_ids_, *const position_ids_;
  int32_t* const seq_idx_;
  int64_t* const labels_;
  int32_t *cu_q_, *cu_k_;
  int64_t* kv_;
  int64_t predicted_, readout_;
  int64_t length_ = 0, keys_ = 0, trajectory_ = 0;
  int32_t sequence_ = 0;
};

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
  BatchWriter<Prompt, Completion> writer(starts_, batch, prompt_values, completion_values, targets,
                                         out);
  for (int64_t i = starts_.groups[batch]; i < starts_.groups[batch + 1]; ++i) {
    const int64_t group = groups_[i];
    const Row prompt = row_of(prompts_, group);
    const int64_t prefix = writer.length();
    if (g == 0 || options_.share_prompts) writer.add_prompt(prompt);
    if (g == 0) writer.read_out();
    for (int64_t row = group * g; row < (group + 1) * g; ++row) {
      writer.add_completion(prompt, row_of(completions_, row), options_.share_prompts, prefix);
      writer.read_out();
    }
  }
  writer.add_tail(starts_.tokens[batch + 1] - starts_.tokens[batch] - writer.length());
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
