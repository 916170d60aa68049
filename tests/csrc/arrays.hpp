// Outputs of a plan with exactly the promised sizes, so that AddressSanitizer sees one entry more.
#pragma once

#include <cstdint>
#include <memory>

#include "packer.hpp"

template <typename T>
std::unique_ptr<T[]> poisoned(int64_t size) {
  std::unique_ptr<T[]> out(new T[size]);
  for (int64_t i = 0; i < size; ++i) out[i] = static_cast<T>(-7777777);
  return out;
}

struct Arrays {
  std::unique_ptr<int64_t[]> input_ids, position_ids, kv_index, predict_from, targets, trajectory,
      source, readout, labels;
  std::unique_ptr<int32_t[]> seq_idx, cu_q, cu_k;
  r2ec::Outputs out;

  Arrays(const r2ec::Plan& plan, bool with_kv, bool with_labels) {
    const auto& s = plan.starts();
    const int64_t tokens = s.tokens.back(), predicted = s.predicted.back();
    const int64_t cumulative = s.sequences.back() + plan.num_batches();
    input_ids = poisoned<int64_t>(tokens);
    position_ids = poisoned<int64_t>(tokens);
    seq_idx = poisoned<int32_t>(tokens);
    cu_q = poisoned<int32_t>(cumulative);
    cu_k = poisoned<int32_t>(cumulative);
    predict_from = poisoned<int64_t>(predicted);
    targets = poisoned<int64_t>(predicted);
    trajectory = poisoned<int64_t>(predicted);
    source = poisoned<int64_t>(predicted);
    readout = poisoned<int64_t>(s.readouts.back());
    if (with_kv) kv_index = poisoned<int64_t>(s.keys.back());
    if (with_labels) labels = poisoned<int64_t>(tokens);
    out = {input_ids.get(),  position_ids.get(), seq_idx.get(),      cu_q.get(),
           cu_k.get(),       kv_index.get(),     predict_from.get(), targets.get(),
           trajectory.get(), source.get(),       readout.get(),      labels.get()};
  }
};
