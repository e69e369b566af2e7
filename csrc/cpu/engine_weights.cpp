// Finds the parameters that engine.cpp uses, by name, among those of a student.
#include <set>
#include <sstream>
#include <stdexcept>

#include "engine.h"

namespace tinystory::cpu {
namespace {

template <class... Words>
[[noreturn]] void refuse(const Words&... words) {
  std::ostringstream message;
  message << "Engine: ";
  (message << ... << words);
  message
      << "; change csrc/cpu/engine.cpp as tinystory/student/model.py was changed, or set TINYSTORY_KERNELS=reference"
         " to decode in plain PyTorch";
  throw std::invalid_argument(message.str());
}

std::string text(const std::vector<int64_t>& shape) {
  std::string s = "(";
  for (int64_t size : shape) s += (s.size() > 1 ? ", " : "") + std::to_string(size);
  return s + ")";
}

}  // namespace

StudentWeights find_weights(int64_t n_layer, int64_t n_head, const std::map<std::string, Parameter>& parameters) {
  std::set<std::string> used;
  const auto find = [&](const std::string& name) -> const Parameter& {
    const auto found = parameters.find(name);
    if (found == parameters.end()) refuse("parameter ", name, " is missing");
    used.insert(name);
    return found->second;
  };
  const auto take = [&](const std::string& name, const std::vector<int64_t>& shape) {
    const Parameter& p = find(name);
    if (p.shape != shape) refuse("parameter ", name, " must have shape ", text(shape), ", not ", text(p.shape));
    return p.data;
  };
  const auto matrix = [&](const std::string& name) {
    const Parameter& p = find(name);
    if (p.shape.size() != 2) refuse("parameter ", name, " must be a matrix, not of shape ", text(p.shape));
    return p.shape;
  };
  const int64_t V = matrix("wte.weight")[0], C = matrix("wte.weight")[1], context = matrix("wpe.weight")[0];
  const auto norm = [&](const std::string& name) {
    return StudentWeights::Affine{take(name + ".weight", {C}), take(name + ".bias", {C})};
  };
  const auto linear = [&](const std::string& name, int64_t in, int64_t out) {
    return StudentWeights::Affine{take(name + ".weight", {out, in}), take(name + ".bias", {out})};
  };

  const int64_t D = n_head > 0 && C % n_head == 0 ? C / n_head : 0;
  if (D < 16 || D > 256 || D % 16)
    refuse("n_embd / n_head = ", C, " / ", n_head, " must be a multiple of 16 up to 256");
  const char* head = parameters.count("lm_head.weight") ? "lm_head.weight" : "wte.weight";
  StudentWeights w{.heads = n_head,
                   .C = C,
                   .V = V,
                   .context = context,
                   .wte = take("wte.weight", {V, C}),
                   .wpe = take("wpe.weight", {context, C}),
                   .lm_head = take(head, {V, C}),
                   .blocks = {},
                   .ln_f = norm("ln_f"),
                   .value = {}};
  for (int64_t i = 0; i < n_layer; ++i) {
    const std::string block = "blocks." + std::to_string(i) + ".";
    w.blocks.push_back({.ln_1 = norm(block + "ln_1"),
                        .qkv = linear(block + "qkv", C, 3 * C),
                        .attn_proj = linear(block + "attn_proj", C, C),
                        .ln_2 = norm(block + "ln_2"),
                        .fc = linear(block + "fc", C, 4 * C),
                        .mlp_proj = linear(block + "mlp_proj", 4 * C, C)});
  }
  if (parameters.count("value_head.linear.weight")) w.value = linear("value_head.linear", C, 1);
  for (const auto& [name, parameter] : parameters)
    if (!used.count(name)) refuse("parameter ", name, " of shape ", text(parameter.shape), " is unexpected");
  return w;
}

}  // namespace tinystory::cpu
