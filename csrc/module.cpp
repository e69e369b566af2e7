// The Python module. Importing the module registers the operators of ops.cpp. The module also has the class of the
// decoding engine, the only object with state between calls. Operators are registered with TORCH_LIBRARY, because
// autograd, torch.compile and opcheck must understand them. The engine is used only by our Python code, so pybind11
// binds it.
#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <ATen/record_function.h>
#include <torch/csrc/utils/pybind.h>

#include "arguments.h"
#include "cpu/engine.h"
#include "memory.h"
#include "parallel.h"

namespace tinystory {
namespace {

// cpu::Engine, and the tensors that the engine reads and writes.
class Engine {
 public:
  using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

  Engine(std::map<std::string, Tensor> parameters, int64_t n_layer, int64_t n_head, at::ScalarType dtype, int64_t cache)
      : parameters_(std::move(parameters)) {
    TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kBFloat16, "Engine: dtype must be float32 or bfloat16, not ",
                      dtype);
    TORCH_CHECK_VALUE(dtype == at::kFloat || cpu::engine_has_bf16(), "Engine: this processor has no bfloat16 matmul");
    std::map<std::string, cpu::Parameter> named;
    for (const auto& [name, t] : parameters_) {
      TORCH_CHECK_VALUE(t.scalar_type() == at::kFloat && t.is_contiguous() && t.device().is_cpu(), "Engine: parameter ",
                        name, " must be contiguous float32 on the CPU, not ", t.scalar_type(), " on ", t.device(),
                        t.is_contiguous() ? "" : ", not contiguous");
      named[name] = {t.const_data_ptr<float>(), t.sizes().vec()};
    }
    cpu::StudentWeights weights = cpu::find_weights(n_layer, n_head, named);
    vocabulary_ = weights.V, context_ = weights.context;
    const auto run = [](const char* phase, int64_t items, const std::function<void(int64_t, int64_t)>& f) {
      RECORD_USER_SCOPE(phase);
      parallel(items, f);
    };
    const auto run_here = [](const char* phase, int64_t items, const std::function<void(int64_t, int64_t)>& f) {
      RECORD_USER_SCOPE(phase);
      f(0, items);
    };
    engine_ = cpu::make_engine(dtype == at::kBFloat16 ? DType::bf16 : DType::f32, std::move(weights),
                               {at::get_num_threads(), cache, run, run_here});
  }

  Outputs start(const std::vector<Tensor>& prompts, const Tensor& prompt_of, int64_t max_new, int64_t eos, int64_t seed,
                int64_t first_row, int64_t at_once, double temperature, int64_t top_k, double top_p) {
    constexpr auto op = "Engine.start";
    const int64_t count = prompt_of.numel();
    std::vector<std::vector<int64_t>> openings;
    for (const Tensor& prompt : prompts) {
      openings.push_back(ids(prompt, vocabulary_, "prompt"));
      TORCH_CHECK(prompt.numel() >= 1 && count >= 1 && max_new >= 1 && prompt.numel() + max_new <= context_, op,
                  ": a prompt of ", prompt.numel(), " tokens, ", count, " stories of ", max_new,
                  " tokens: each must be at least 1, and prompt and story must fit the context of ", context_);
    }
    const std::vector<int64_t> continues = ids(prompt_of, openings.size(), "prompt_of");
    TORCH_CHECK(at_once >= 1, op, ": at_once must be at least 1, not ", at_once);
    check_sampling(temperature, top_k, top_p, op);
    tokens_ = at::zeros({count, max_new}, at::kLong);
    logprobs_ = at::zeros({count, max_new}, at::kFloat);
    values_ = at::zeros_like(logprobs_), entropies_ = at::zeros_like(logprobs_);
    engine_->start({.prompts = openings,
                    .prompt_of = continues,
                    .max_new = max_new,
                    .eos = eos,
                    .seed = uint64_t(seed),
                    .first_row = first_row,
                    .at_once = at_once,
                    .temperature = temperature,
                    .top_k = top_k,
                    .top_p = top_p,
                    .tokens = tokens_.data_ptr<int64_t>(),
                    .logprobs = logprobs_.data_ptr<float>(),
                    .values = values_.data_ptr<float>(),
                    .entropies = entropies_.data_ptr<float>()});
    return {tokens_, logprobs_, values_, entropies_};
  }

  // (row of the outputs, number of tokens) of each story that ends in this step.
  std::vector<std::pair<int64_t, int64_t>> step() {
    TORCH_CHECK(tokens_.defined(), "Engine.step: call start first");
    std::vector<std::pair<int64_t, int64_t>> ended;
    for (const auto& [story, tokens] : engine_->step()) ended.emplace_back(story, tokens);
    return ended;
  }

 private:
  // The elements of a (n,) int64 tensor, each in 0 .. end - 1.
  std::vector<int64_t> ids(const Tensor& t, int64_t end, const char* name) const {
    constexpr auto op = "Engine.start";
    check_ids(t, t.numel(), parameters_.begin()->second, op, name);
    const Tensor flat = t.contiguous();
    const std::vector<int64_t> elements(flat.const_data_ptr<int64_t>(), flat.const_data_ptr<int64_t>() + flat.numel());
    for (size_t i = 0; i < elements.size(); ++i)
      TORCH_CHECK(elements[i] >= 0 && elements[i] < end, op, ": ", name, "[", i, "] is not in 0 .. ", end - 1);
    return elements;
  }

  std::map<std::string, Tensor> parameters_;  // keeps the memory alive to which the engine has pointers
  int64_t vocabulary_, context_;
  std::unique_ptr<cpu::Engine> engine_;
  Tensor tokens_, logprobs_, values_, entropies_;
};

}  // namespace
}  // namespace tinystory

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  namespace py = pybind11;
  using tinystory::Engine;
  // pybind11 converts arguments and results with the GIL held. The GIL is released while the engine computes.
  using NoGil = py::call_guard<py::gil_scoped_release>;
  m.doc() = "tinystory's compiled kernels; tinystory/ops/ is their documented face.";
  m.def("engine_has_bf16", tinystory::cpu::engine_has_bf16);
  m.def("instructions", tinystory::cpu::instructions);
  m.def("keep_freed_memory", tinystory::keep_freed_memory);
  py::class_<Engine>(m, "Engine")
      .def(py::init<std::map<std::string, at::Tensor>, int64_t, int64_t, at::ScalarType, int64_t>(), NoGil())
      .def("start", &Engine::start, NoGil())
      .def("step", &Engine::step, NoGil());
}
