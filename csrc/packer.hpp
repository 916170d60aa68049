// History packing: ragged token rows -> padding-free batches. No Python in here.
//
// In: prompts as ragged rows (values, offsets), with G completions each or none; a prompt and its
// completions are a group, and stay together. Out: batches of at most max_tokens tokens, each a run
// of sequences without padding between them, and the arrays that attention and the loss need.
//
//   share_prompts     | prompt 0 | c00 | c01 | prompt 1 | c10 | c11 | tail |
//   repeated prompts  | prompt 0 c00 | prompt 0 c01 | prompt 1 c10 | prompt 1 c11 | tail |
//   no completions    | prompt 0 | prompt 1 | prompt 2 | tail |
//
// A shared prompt is computed once; its completions see it through kv_index, which lists for every
// sequence the tokens that are its keys. The tail pads a batch to a multiple, as one more sequence.
//
// A Plan decides which groups share a batch and how large every output is; fill() writes the
// outputs into memory of the caller, who can allocate them at their exact size.
//
//   Plan   places groups by best-fit decreasing (best_fit.hpp) and adds up the sizes.
//   fill   copies every token once and writes 20 bytes for it (id, position, sequence), 8 for each
//          key and 32 for each predicted token. Batches are independent: threads take ranges.
//
// Both are deterministic, fill() for any number of threads. Sizes are checked in 64 bits before
// they are written as int32; what does not fit is refused.
#pragma once

#include <cstdint>
#include <vector>

namespace r2ec {

constexpr int64_t kInt32Max = INT32_MAX;
constexpr int64_t kIgnore = -100;

// Row r of `count` rows is values[offsets[r] : offsets[r + 1]]; offsets has count + 1 entries.
struct Offsets {
  const int64_t* data;
  int64_t size;        // count + 1
  int64_t num_values;  // entries of the values array they index
};

struct PackOptions {
  int64_t num_generations = 0;  // completions a prompt; 0: there are none, every row stands alone
  int64_t max_tokens = 0;
  int64_t multiple = 1;  // batches are padded to a multiple of it by one extra sequence
  bool share_prompts = false;
  bool oversize_alone = false;
};

// Exclusive prefix sums over batches: batch b owns entries [at[b], at[b + 1]) of an output.
struct Starts {
  std::vector<int64_t> groups, tokens, sequences, keys, predicted, readouts;
};

// Outputs of all batches, one after the other. readout, labels and kv_index may be null.
// cu_seq_lens_* hold sequences + 1 entries a batch.
struct Outputs {
  int64_t* input_ids;
  int64_t* position_ids;
  int32_t* seq_idx;
  int32_t* cu_seq_lens_q;
  int32_t* cu_seq_lens_k;
  int64_t* kv_index;
  int64_t* predict_from;
  int64_t* targets;
  int64_t* trajectory;
  int64_t* source;
  int64_t* readout;
  int64_t* labels;
};

// Throws std::invalid_argument unless offsets rise strictly from 0 to num_values.
void check_offsets(const Offsets& offsets, const char* name);

class Plan {
 public:
  // Copies the offsets: a caller who changes them later cannot make fill() leave its arrays.
  Plan(const Offsets& prompts, const Offsets* completions, const PackOptions& options);

  int64_t num_batches() const { return static_cast<int64_t>(max_length_q_.size()); }
  const Starts& starts() const { return starts_; }
  const PackOptions& options() const { return options_; }
  const std::vector<int64_t>& groups() const { return groups_; }  // of all batches, in layout order
  const std::vector<int64_t>& num_tokens() const { return num_tokens_; }  // without the tail
  const std::vector<int64_t>& max_length_q() const { return max_length_q_; }
  const std::vector<int64_t>& max_length_k() const { return max_length_k_; }
  int64_t num_prompt_values() const { return prompts_.back(); }
  int64_t num_completion_values() const { return completions_.empty() ? 0 : completions_.back(); }

  // Values are int32 or int64; `targets` (null: the completion tokens themselves) is aligned with
  // the completion values.
  template <typename Prompt, typename Completion>
  void fill(const Prompt* prompt_values, const Completion* completion_values,
            const int64_t* targets, const Outputs& out, int64_t threads) const;

 private:
  struct Size {
    int64_t tokens, keys;
  };
  Size group_size(int64_t group) const;
  void measure(const std::vector<int64_t>& batch_of_group, int64_t num_batches);
  template <typename Prompt, typename Completion>
  void fill_batch(int64_t batch, const Prompt* prompt_values, const Completion* completion_values,
                  const int64_t* targets, const Outputs& out) const;

  PackOptions options_;
  std::vector<int64_t> prompts_, completions_;  // offsets
  std::vector<int64_t> groups_, num_tokens_, max_length_q_, max_length_k_;
  Starts starts_;
};

}  // namespace r2ec
