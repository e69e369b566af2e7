// The engine against its plain loop over the stories that it wrote: the same values, the same bits in
// any batch and on any number of threads, nothing written after a story's end. And arguments that the engine refuses.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "cpu/plain.h"
#include "harness.h"

using namespace tinystory;

constexpr int64_t kEos = 2;

// A student's parameters by name.
struct Model {
  std::map<std::string, std::vector<float>> storage;
  std::map<std::string, cpu::Parameter> parameters;
  int64_t n_layer, n_head;
  cpu::StudentWeights w;
  unsigned seed = 1;

  void random(const std::string& name, const std::vector<int64_t>& shape, float scale, float mean = 0) {
    int64_t n = 1;
    for (int64_t size : shape) n *= size;
    auto& values = storage[name] = normal(n, seed++, scale);
    for (float& x : values) {
      x += mean;
      uint32_t bits;  // to bf16, so that both types of matmuls read the same weights
      std::memcpy(&bits, &x, 4);
      bits &= 0xffff0000;
      std::memcpy(&x, &bits, 4);
    }
    parameters[name] = {values.data(), shape};
  }
  void norm(const std::string& name, int64_t C) {
    random(name + ".weight", {C}, 0.1f, 1);
    random(name + ".bias", {C}, 0.1f);
  }
  void linear(const std::string& name, int64_t in, int64_t out) {
    random(name + ".weight", {out, in}, 0.15f);
    random(name + ".bias", {out}, 0.1f);
  }

  Model(int64_t layers, int64_t heads, int64_t C, int64_t V, int64_t context, bool tied = false)
      : n_layer(layers), n_head(heads) {
    random("wte.weight", {V, C}, 0.2f);
    if (!tied) random("lm_head.weight", {V, C}, 0.2f);
    random("wpe.weight", {context, C}, 0.2f);
    for (int64_t i = 0; i < layers; ++i) {
      const std::string block = "blocks." + std::to_string(i);
      norm(block + ".ln_1", C), linear(block + ".qkv", C, 3 * C), linear(block + ".attn_proj", C, C);
      norm(block + ".ln_2", C), linear(block + ".fc", C, 4 * C), linear(block + ".mlp_proj", 4 * C, C);
    }
    norm("ln_f", C), linear("value_head.linear", C, 1);
    // Stories end early.
    const auto& head = storage[tied ? "wte.weight" : "lm_head.weight"];
    for (int64_t c = 0; c < C; ++c) storage["ln_f.bias"][c] += head[kEos * C + c];
    w = cpu::find_weights(n_layer, n_head, parameters);
  }
};

struct Written {
  std::vector<int64_t> tokens;
  std::vector<float> logprobs, values, entropies;
  std::vector<int64_t> length;
};

enum Split : int64_t { kByColumns = 0, kByRows = 1 << 30 };

template <int kThreads>
cpu::Threads threads(Split split) {
  return {
      kThreads, split,
      [](const char*, int64_t items, const std::function<void(int64_t, int64_t)>& f) { parallel(items, kThreads, f); },
      [](const char*, int64_t items, const std::function<void(int64_t, int64_t)>& f) { f(0, items); }};
}

Written write(const Model& m, DType type, cpu::Threads threads, const std::vector<std::vector<int64_t>>& prompts,
              const std::vector<int64_t>& which, int64_t first, int64_t max_new, int64_t at_once = 1000) {
  const int64_t count = which.size();
  const size_t n = count * max_new;
  Written out{std::vector<int64_t>(n, -7), std::vector<float>(n, -7), std::vector<float>(n, -7),
              std::vector<float>(n, -7), std::vector<int64_t>(count)};
  const auto engine = cpu::make_engine(type, m.w, threads);
  engine->start({.prompts = prompts,
                 .prompt_of = which,
                 .max_new = max_new,
                 .eos = kEos,
                 .seed = 11,
                 .first_row = first,
                 .at_once = at_once,
                 .temperature = 0.9,
                 .top_k = 0,
                 .top_p = 1,
                 .tokens = out.tokens.data(),
                 .logprobs = out.logprobs.data(),
                 .values = out.values.data(),
                 .entropies = out.entropies.data()});
  for (int64_t ended = 0; ended < count;)
    for (const auto& [story, tokens] : engine->step()) out.length[story] = tokens, ++ended;
  CHECK(engine->step().empty());
  return out;
}

// The stories go through the prompts in turn.
void test(const Model& m, DType type, const std::vector<std::vector<int64_t>>& prompts, int64_t count,
          int64_t max_new) {
  std::vector<int64_t> which(count);
  for (int64_t i = 0; i < count; ++i) which[i] = i % prompts.size();
  const Written all = write(m, type, threads<3>(kByRows), prompts, which, 100, max_new);
  // With bf16 only the rounding of activations and cache differs.
  const double tolerance = type == DType::bf16 ? 0.15 : 2e-4;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t n = all.length[i], at = i * max_new;
    const std::vector<int64_t>& prompt = prompts[which[i]];
    std::vector<int64_t> story = prompt;
    story.insert(story.end(), &all.tokens[at], &all.tokens[at] + n - 1);
    const plain::Reading want = plain::read(m.w, story);
    for (int64_t t = 0; t < max_new; ++t) {
      if (t >= n) {
        CHECK(all.tokens[at + t] == -7 && all.logprobs[at + t] == -7, "story %ld goes on after its end", long(i));
        continue;
      }
      const bool last = all.tokens[at + t] == kEos || t + 1 == max_new;
      CHECK(last == (t + 1 == n), "story %ld ends at %ld", long(i), long(n));
      const int64_t position = prompt.size() - 1 + t;
      plain::Row p(&want.logits[position * m.w.V], &want.logits[(position + 1) * m.w.V]);
      for (double& logit : p) logit /= 0.9;
      plain::softmax(p);
      double entropy = 0;
      for (double probability : p) entropy -= probability * std::log(probability);
      const double logprob = std::log(p[all.tokens[at + t]]), value = want.values[position];
      CHECK(std::fabs(logprob - all.logprobs[at + t]) < tolerance, "%g %g", logprob, all.logprobs[at + t]);
      CHECK(std::fabs(entropy - all.entropies[at + t]) < tolerance, "%g %g", entropy, all.entropies[at + t]);
      CHECK(std::fabs(value - all.values[at + t]) < tolerance, "%g %g", value, all.values[at + t]);
    }
  }
  const auto check_same = [&](const Written& part, int64_t first) {
    CHECK(std::equal(part.tokens.begin(), part.tokens.end(), all.tokens.begin() + first * max_new));
    CHECK(std::equal(part.logprobs.begin(), part.logprobs.end(), all.logprobs.begin() + first * max_new));
    CHECK(std::equal(part.values.begin(), part.values.end(), all.values.begin() + first * max_new));
    CHECK(std::equal(part.entropies.begin(), part.entropies.end(), all.entropies.begin() + first * max_new));
    CHECK(std::equal(part.length.begin(), part.length.end(), all.length.begin() + first));
  };
  for (const int64_t at_once : {1, 4, 1000})
    check_same(write(m, type, threads<2>(kByColumns), prompts, which, 100, max_new, at_once), 0);
  check_same(write(m, type, threads<2>(kByRows), prompts, which, 100, max_new, 3), 0);
  // The last two thirds, with the prompts in another order and one that nobody continues.
  const int64_t third = count / 3;
  std::vector<std::vector<int64_t>> others(prompts.rbegin(), prompts.rend());
  others.insert(others.begin(), {1, 2, 3});
  std::vector<int64_t> continued;
  for (int64_t i = third; i < count; ++i) continued.push_back(prompts.size() - which[i]);
  check_same(write(m, type, threads<1>(kByRows), others, continued, 100 + third, max_new), third);
}

template <class Change>
void test_refusal(const char* words, const Change& change) {
  Model m(2, 1, 32, 40, 8);
  change(m);
  try {
    cpu::find_weights(m.n_layer, m.n_head, m.parameters);
    CHECK(false, "not refused: %s", words);
  } catch (const std::invalid_argument& error) {
    CHECK(std::strstr(error.what(), words), "%s", error.what());
  }
}

void test_refusals() {
  test_refusal("parameter blocks.1.fc.bias is missing", [](Model& m) { m.parameters.erase("blocks.1.fc.bias"); });
  test_refusal("parameter wpe.weight is missing", [](Model& m) { m.parameters.erase("wpe.weight"); });
  test_refusal("parameter value_head.linear.bias is missing",
               [](Model& m) { m.parameters.erase("value_head.linear.bias"); });
  test_refusal("parameter lm_head.weight must have shape (40, 32), not (8, 32)",
               [](Model& m) { m.parameters["lm_head.weight"] = m.parameters["wpe.weight"]; });
  test_refusal("parameter blocks.1.attn_proj.bias of shape (32) is unexpected", [](Model& m) { m.n_layer = 1; });
  test_refusal("parameter blocks.0.fc.weight must have shape (128, 32), not (96, 32)",
               [](Model& m) { m.parameters["blocks.0.fc.weight"].shape = {96, 32}; });
  test_refusal("parameter wte.weight must be a matrix", [](Model& m) { m.parameters["wte.weight"].shape.pop_back(); });
  test_refusal("n_embd / n_head = 32 / 4 must be a multiple of 16", [](Model& m) { m.n_head = 4; });
}

int main() {
  test_refusals();
  const Model narrow(2, 3, 48, 70, 64), wide(1, 1, 160, 131, 64, true);
  std::vector<DType> types{DType::f32};
  if (cpu::engine_has_bf16()) types.push_back(DType::bf16);
  for (DType type : types) {
    test(narrow, type, {{5, 6, 7, 8}}, 13, 20);
    test(narrow, type, {{5}}, 1, 1);
    test(narrow, type, {std::vector<int64_t>(33, 9)}, 5, 17);
    test(narrow, type, {{5, 6, 7, 8}, {5}, std::vector<int64_t>(33, 9), {5, 6}}, 11, 20);
    test(wide, type, {{5, 64, 130}}, 7, 18);
  }
  Model broken(1, 1, 64, 65, 8);
  broken.storage["ln_f.bias"][3] = NAN;
  try {
    write(broken, DType::f32, threads<2>(kByRows), {{1}}, {0, 0}, 40, 3);
    CHECK(false, "NaN was drawn from");
  } catch (const std::runtime_error& error) {
    CHECK(std::strstr(error.what(), "story 40 at token 0"), "%s", error.what());
  }
}
