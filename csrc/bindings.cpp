// Python bindings. The callers (r2ec_fast/packing.py, assembler.py) check types and give messages;
// sizes are checked here again, so that no call can read or write outside its arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

#include "assembler.hpp"
#include "packer.hpp"

namespace py = pybind11;

namespace {

using Int64 = py::array_t<int64_t, py::array::c_style>;
using Int32 = py::array_t<int32_t, py::array::c_style>;

r2ec::Offsets offsets_of(const Int64& array, int64_t num_values) {
  if (array.ndim() != 1) throw std::invalid_argument("offsets must have one dimension");
  return {array.data(), array.size(), num_values};
}

r2ec::Plan make_plan(const Int64& prompt_offsets, int64_t num_prompt_values,
                     const std::optional<Int64>& completion_offsets, int64_t num_completion_values,
                     int64_t num_generations, int64_t max_tokens, int64_t multiple,
                     bool share_prompts, bool oversize_alone) {
  const auto prompts = offsets_of(prompt_offsets, num_prompt_values);
  std::optional<r2ec::Offsets> completions;
  if (completion_offsets) completions = offsets_of(*completion_offsets, num_completion_values);
  const r2ec::PackOptions options{num_generations, max_tokens, multiple, share_prompts,
                                  oversize_alone};
  py::gil_scoped_release release;
  return r2ec::Plan(prompts, completions ? &*completions : nullptr, options);
}

py::array_t<int64_t> to_numpy(const std::vector<int64_t>& values) {
  return py::array_t<int64_t>(static_cast<py::ssize_t>(values.size()), values.data());
}

void need(int64_t size, int64_t expected, const char* name) {
  if (size != expected)
    throw std::invalid_argument(std::string(name) + " must have " + std::to_string(expected) +
                                " entries, got " + std::to_string(size));
}

template <typename T>
T* output(const py::dict& arrays, const char* name, int64_t expected) {
  const py::object found = arrays.attr("get")(name);
  if (found.is_none()) return nullptr;
  if (!py::isinstance<py::array_t<T, py::array::c_style>>(found))
    throw std::invalid_argument(std::string(name) + ": wrong dtype or memory order");
  auto array = py::reinterpret_borrow<py::array_t<T, py::array::c_style>>(found);
  need(array.size(), expected, name);
  return array.mutable_data();
}

template <typename T>
T* required(const py::dict& arrays, const char* name, int64_t expected) {
  T* const data = output<T>(arrays, name, expected);
  if (data == nullptr) throw std::invalid_argument(std::string(name) + " is missing");
  return data;
}

r2ec::Outputs outputs_of(const r2ec::Plan& plan, const py::dict& arrays) {
  const auto& starts = plan.starts();
  const int64_t tokens = starts.tokens.back(), predicted = starts.predicted.back();
  const int64_t cumulative = starts.sequences.back() + plan.num_batches();
  r2ec::Outputs out{};
  out.input_ids = required<int64_t>(arrays, "input_ids", tokens);
  out.position_ids = required<int64_t>(arrays, "position_ids", tokens);
  out.seq_idx = required<int32_t>(arrays, "seq_idx", tokens);
  out.cu_seq_lens_q = required<int32_t>(arrays, "cu_seq_lens_q", cumulative);
  out.cu_seq_lens_k = required<int32_t>(arrays, "cu_seq_lens_k", cumulative);
  out.predict_from = required<int64_t>(arrays, "predict_from", predicted);
  out.targets = required<int64_t>(arrays, "targets", predicted);
  out.trajectory = required<int64_t>(arrays, "trajectory", predicted);
  out.source = required<int64_t>(arrays, "source", predicted);
  out.kv_index = output<int64_t>(arrays, "kv_index", starts.keys.back());
  out.readout = output<int64_t>(arrays, "readout", starts.readouts.back());
  out.labels = output<int64_t>(arrays, "labels", tokens);
  return out;
}

template <typename Prompt, typename Completion>
void fill(const r2ec::Plan& plan, const py::array& prompts, const py::array& completions,
          const std::optional<Int64>& targets, const r2ec::Outputs& out, int64_t threads) {
  const auto* prompt_values = static_cast<const Prompt*>(prompts.data());
  const auto* completion_values = static_cast<const Completion*>(completions.data());
  const int64_t* wanted = targets ? targets->data() : nullptr;
  py::gil_scoped_release release;
  plan.fill(prompt_values, completion_values, wanted, out, threads);
}

bool is_int32(const py::array& values, const char* name) {
  if (values.ndim() != 1 || (values.flags() & py::array::c_style) == 0)
    throw std::invalid_argument(std::string(name) + " must be one contiguous dimension");
  if (py::isinstance<Int32>(values)) return true;
  if (py::isinstance<Int64>(values)) return false;
  throw std::invalid_argument(std::string(name) + " must be int32 or int64");
}

void fill_plan(const r2ec::Plan& plan, const py::array& prompts, const py::array& completions,
               const std::optional<Int64>& targets, const py::dict& arrays, int64_t threads) {
  const bool narrow_prompts = is_int32(prompts, "prompts");
  const bool narrow_completions = is_int32(completions, "completions");
  need(prompts.size(), plan.num_prompt_values(), "prompts");
  need(completions.size(), plan.num_completion_values(), "completions");
  if (targets) need(targets->size(), plan.num_completion_values(), "completion_targets");
  const auto out = outputs_of(plan, arrays);
  if (narrow_prompts && narrow_completions)
    fill<int32_t, int32_t>(plan, prompts, completions, targets, out, threads);
  else if (narrow_prompts)
    fill<int32_t, int64_t>(plan, prompts, completions, targets, out, threads);
  else if (narrow_completions)
    fill<int64_t, int32_t>(plan, prompts, completions, targets, out, threads);
  else
    fill<int64_t, int64_t>(plan, prompts, completions, targets, out, threads);
}

py::dict starts_of(const r2ec::Plan& plan) {
  const auto& starts = plan.starts();
  py::dict out;
  out["groups"] = to_numpy(starts.groups);
  out["tokens"] = to_numpy(starts.tokens);
  out["sequences"] = to_numpy(starts.sequences);
  out["keys"] = to_numpy(starts.keys);
  out["predicted"] = to_numpy(starts.predicted);
  out["readouts"] = to_numpy(starts.readouts);
  return out;
}

r2ec::SegmentTable table_of(const Int64& offsets, const Int32& values) {
  return {{offsets.data(), offsets.data() + offsets.size()},
          {values.data(), values.data() + values.size()}};
}

std::vector<int64_t> to_vector(const Int64& array) {
  return {array.data(), array.data() + array.size()};
}

// Keeps the arrays that the pointers of `view` lead to.
struct HistoryArrays {
  Int64 item, first, last;
  std::optional<Int64> timestamp, target_time;
  std::optional<py::array_t<float, py::array::c_style>> rating;

  r2ec::Histories view() const {
    if (timestamp) need(timestamp->size(), item.size(), "timestamp");
    if (rating) need(rating->size(), item.size(), "rating");
    need(last.size(), first.size(), "last");
    if (target_time) need(target_time->size(), first.size(), "target_time");
    return {item.data(),
            timestamp ? timestamp->data() : nullptr,
            rating ? rating->data() : nullptr,
            item.size(),
            first.data(),
            last.data(),
            target_time ? target_time->data() : nullptr,
            first.size()};
  }
};

py::tuple measure(const r2ec::Assembler& assembler, const HistoryArrays& arrays, int64_t threads) {
  const auto histories = arrays.view();
  r2ec::Measured out;
  {
    py::gil_scoped_release release;
    out = assembler.measure(histories, threads);
  }
  return py::make_tuple(to_numpy(out.length), to_numpy(out.lines), out.missing.item_tables,
                        out.missing.ratings, out.missing.units);
}

void write(const r2ec::Assembler& assembler, const HistoryArrays& arrays, const Int64& lines,
           const Int64& offsets, Int64& values, int64_t threads) {
  const auto histories = arrays.view();
  const auto kept = to_vector(lines), at = to_vector(offsets);
  for (size_t i = 0; i + 1 < at.size(); ++i)
    if (at[i] > at[i + 1]) throw std::invalid_argument("offsets must not fall");
  if (at.empty() || at.front() != 0) throw std::invalid_argument("offsets must start at 0");
  need(values.size(), at.back(), "values");
  int64_t* const out = values.mutable_data();
  py::gil_scoped_release release;
  assembler.write(histories, kept, at, out, threads);
}

void bind_assembler(py::module_& module) {
  using r2ec::Assembler;
  py::class_<HistoryArrays>(module, "Histories")
      .def(py::init([](Int64 item, std::optional<Int64> timestamp,
                       std::optional<py::array_t<float, py::array::c_style>> rating, Int64 first,
                       Int64 last, std::optional<Int64> target_time) {
             return HistoryArrays{item, first, last, timestamp, target_time, rating};
           }),
           py::arg("item"), py::arg("timestamp"), py::arg("rating"), py::arg("first"),
           py::arg("last"), py::arg("target_time"));
  py::class_<Assembler>(module, "Assembler")
      .def(py::init<std::vector<int32_t>, std::vector<int32_t>, std::vector<int32_t>, int64_t,
                    int64_t, int64_t, int64_t>(),
           py::arg("head"), py::arg("bare"), py::arg("suffix"), py::arg("num_items"),
           py::arg("window"), py::arg("max_tokens"), py::arg("max_days"))
      .def("set_ages",
           [](Assembler& self, const Int64& offsets, const Int32& values, const Int64& within_unit,
              const Int64& within_rest, const Int64& day_rest) {
             self.set_ages(table_of(offsets, values), to_vector(within_unit),
                           to_vector(within_rest), to_vector(day_rest));
           })
      .def("set_units", [](Assembler& self, const Int64& offsets,
                           const Int32& values) { self.set_units(table_of(offsets, values)); })
      .def("clear_items", &Assembler::clear_items)
      .def("set_items",
           [](Assembler& self, bool has_age, int ending, const Int64& offsets, const Int32& values,
              const std::vector<bool>& whole_text) {
             self.set_items(has_age, ending, table_of(offsets, values), whole_text);
           })
      .def("set_ratings",
           [](Assembler& self, std::vector<float> values, const Int64& newline_offsets,
              const Int32& newline_values, const Int64& closing_offsets,
              const Int32& closing_values) {
             self.set_ratings(std::move(values), table_of(newline_offsets, newline_values),
                              table_of(closing_offsets, closing_values));
           })
      .def("measure", &measure, py::arg("histories"), py::arg("threads"))
      .def("write", &write, py::arg("histories"), py::arg("lines"), py::arg("offsets"),
           py::arg("values"), py::arg("threads"));
}

}  // namespace

PYBIND11_MODULE(_packing, module) {
  module.doc() = "C++ side of r2ec_fast.packing";
  py::class_<r2ec::Plan>(module, "Plan")
      .def(py::init(&make_plan), py::arg("prompt_offsets"), py::arg("num_prompt_values"),
           py::arg("completion_offsets"), py::arg("num_completion_values"),
           py::arg("num_generations"), py::arg("max_tokens"), py::arg("multiple"),
           py::arg("share_prompts"), py::arg("oversize_alone"))
      .def_property_readonly("num_batches", &r2ec::Plan::num_batches)
      .def_property_readonly("starts", &starts_of)
      .def_property_readonly("groups", [](const r2ec::Plan& p) { return to_numpy(p.groups()); })
      .def_property_readonly("num_tokens", &r2ec::Plan::num_tokens)
      .def_property_readonly("max_length_q", &r2ec::Plan::max_length_q)
      .def_property_readonly("max_length_k", &r2ec::Plan::max_length_k)
      .def("fill", &fill_plan, py::arg("prompts"), py::arg("completions"), py::arg("targets"),
           py::arg("arrays"), py::arg("threads"));
  bind_assembler(module);
}
