// Python's view of the core: argument checks, and nothing computed. Arrays are never copied or
// converted; a wrong dtype or stride is a TypeError. Long lists of tensors come as addresses.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "driver.h"
#include "weights.h"

namespace py = pybind11;

namespace {

using Array = py::array_t<float, py::array::c_style>;
using OptionalArray = std::optional<Array>;

void expect_size(const char* name, const Array& array, int64_t size) {
  if (array.size() != size)
    throw std::invalid_argument(std::string(name) + " must have " + std::to_string(size) + " elements, got " +
                                std::to_string(array.size()));
}

// Weights packed for the kernels, with the width of the preprocessing.
struct PackedWeights {
  l2l::Weights packed;
  int features;

  PackedWeights(const Array& flat, double log_p, double output_scale) : features(log_p == 0 ? 1 : 2) {
    expect_size("weights", flat, size());
    l2l::pack_weights(flat.data(), features, log_p, output_scale, packed);
  }
  int64_t size() const { return l2l::kFlat - (features == 1 ? l2l::kRows : 0); }
};

void step_in_place(const PackedWeights& weights, const std::vector<uintptr_t>& params,
                   const std::vector<uintptr_t>& grads, const std::vector<uintptr_t>& states,
                   const std::vector<int64_t>& sizes, int dtype, int state_dtype, double lr, double weight_decay,
                   bool maximize, bool skip_nonfinite, int threads) {
  if (grads.size() != params.size() || states.size() != params.size() || sizes.size() != params.size())
    throw std::invalid_argument("params, grads, states and sizes must have the same length");
  std::vector<l2l::StepTensor> tensors;
  tensors.reserve(params.size());
  int64_t tile = 0;
  for (size_t i = 0; i < params.size(); i++) {
    if (sizes[i] == 0) continue;
    if (!params[i] || !grads[i] || !states[i])
      throw std::invalid_argument(
          "a parameter, gradient or state has no memory of its own: it is a wrapper such as a DTensor, or its storage "
          "was freed");
    tensors.push_back({reinterpret_cast<void*>(params[i]), reinterpret_cast<const void*>(grads[i]),
                       reinterpret_cast<void*>(states[i]), sizes[i], tile});
    tile += (sizes[i] + l2l::kTile - 1) / l2l::kTile;
  }
  const l2l::StepArgs args = {&weights.packed,
                              tensors.data(),
                              static_cast<l2l::Dtype>(dtype),
                              static_cast<l2l::Dtype>(state_dtype),
                              static_cast<float>(lr),
                              static_cast<float>(1.0 - lr * weight_decay),
                              maximize ? -1.0f : 1.0f,
                              skip_nonfinite};
  const py::gil_scoped_release release;
  l2l::step(args, static_cast<int64_t>(tensors.size()), threads);
}

void step(const PackedWeights& weights, const Array& grad, const Array& state, Array& update, Array& new_state,
          int threads) {
  const int64_t n = grad.size();
  expect_size("state", state, n * l2l::kRows);
  expect_size("update", update, n);
  expect_size("new_state", new_state, n * l2l::kRows);
  const l2l::ForwardArgs args = {&weights.packed,         n, grad.data(), state.data(), update.mutable_data(),
                                 new_state.mutable_data()};
  const py::gil_scoped_release release;
  l2l::forward(args, threads);
}

void backward(const PackedWeights& weights, const Array& grads, const Array& terms, const Array& loss_weights,
              const OptionalArray& state, const OptionalArray& d_last_state, Array& d_weights, OptionalArray& d_grads,
              OptionalArray& d_state, int threads) {
  const int64_t steps = loss_weights.size();
  const int64_t n = steps ? grads.size() / steps : 0;
  expect_size("grads", grads, steps * n);
  expect_size("terms", terms, steps * n);
  expect_size("d_weights", d_weights, weights.size());
  if (state) expect_size("state", *state, n * l2l::kRows);
  if (d_last_state) expect_size("d_last_state", *d_last_state, n * l2l::kRows);
  if (d_grads) expect_size("d_grads", *d_grads, steps * n);
  if (d_state) expect_size("d_state", *d_state, n * l2l::kRows);
  const l2l::BackwardArgs args = {&weights.packed,
                                  n,
                                  steps,
                                  grads.data(),
                                  terms.data(),
                                  loss_weights.data(),
                                  state ? state->data() : nullptr,
                                  d_last_state ? d_last_state->data() : nullptr,
                                  d_grads ? d_grads->mutable_data() : nullptr,
                                  d_state ? d_state->mutable_data() : nullptr};
  float* out = d_weights.mutable_data();
  const py::gil_scoped_release release;
  l2l::backward(args, weights.features, out, threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The C++ core of l2l_fast. Private: use l2l_fast.backends.";
  m.attr("HIDDEN_SIZE") = l2l::kHidden;
  m.attr("TILE") = l2l::kTile;
  m.attr("FLOAT32") = static_cast<int>(l2l::Dtype::f32);
  m.attr("FLOAT16") = static_cast<int>(l2l::Dtype::f16);
  m.attr("BFLOAT16") = static_cast<int>(l2l::Dtype::bf16);
  m.attr("INT8") = static_cast<int>(l2l::Dtype::i8);

  m.def("instruction_sets", &l2l::instruction_sets);
  m.def("instruction_set", [] { return std::string(l2l::kernels().name); });
  m.def("use_instruction_set", &l2l::use_instruction_set, py::arg("name"));
  m.def("fma_peak", &l2l::fma_peak, py::arg("iterations"), py::call_guard<py::gil_scoped_release>());

  py::class_<PackedWeights>(m, "Weights")
      .def(py::init<const Array&, double, double>(), py::arg("flat").noconvert(), py::arg("log_p"),
           py::arg("output_scale"));
  m.def("step_in_place", &step_in_place, py::arg("weights"), py::arg("params"), py::arg("grads"), py::arg("states"),
        py::arg("sizes"), py::arg("dtype"), py::arg("state_dtype"), py::arg("lr"), py::arg("weight_decay"),
        py::arg("maximize"), py::arg("skip_nonfinite"), py::arg("threads"));
  m.def("step", &step, py::arg("weights"), py::arg("grad").noconvert(), py::arg("state").noconvert(),
        py::arg("update").noconvert(), py::arg("new_state").noconvert(), py::arg("threads"));
  m.def("backward", &backward, py::arg("weights"), py::arg("grads").noconvert(), py::arg("terms").noconvert(),
        py::arg("loss_weights").noconvert(), py::arg("state").noconvert().none(true),
        py::arg("d_last_state").noconvert().none(true), py::arg("d_weights").noconvert(),
        py::arg("d_grads").noconvert().none(true), py::arg("d_state").noconvert().none(true), py::arg("threads"));
}
