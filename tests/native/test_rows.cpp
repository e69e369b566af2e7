// Sampling and log-probabilities against their plain loops: rows in any split over threads, odd lengths, guards behind
// every output.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "cpu/plain.h"
#include "cpu/vec.h"
#include "harness.h"

using namespace tinystory;

void test_sample(int64_t B, int64_t V, double temperature, int64_t top_k, double top_p) {
  std::vector<float> logits = normal(B * V, unsigned(V), 3);
  for (int64_t i = 0; i < B * V; i += 3) logits[i] = std::round(logits[i]);  // ties
  std::vector<int64_t> rows(B), steps(B, 5), tokens(B), again(B), want(B);
  std::iota(rows.begin(), rows.end(), 1000);
  std::vector<float> logprobs(B), entropy(B), want_logprobs(B), want_entropy(B);
  Sample x{.dtype = DType::f32,
           .B = B,
           .V = V,
           .logits = logits.data(),
           .rows = rows.data(),
           .steps = steps.data(),
           .seed = 77,
           .temperature = temperature,
           .top_k = top_k,
           .top_p = top_p,
           .tokens = tokens.data(),
           .logprobs = logprobs.data(),
           .entropy = entropy.data()};
  parallel(B, 3, [&](int64_t begin, int64_t end) { cpu::sample(x, begin, end); });
  x.tokens = again.data();
  for (int64_t b = B; b-- > 0;) cpu::sample(x, b, b + 1);
  CHECK(tokens == again);
  x.tokens = want.data(), x.logprobs = want_logprobs.data(), x.entropy = want_entropy.data();
  plain::sample(x);
  CHECK(tokens == want);
  check_near(logprobs, want_logprobs, 1e-5, "logprobs");
  check_near(entropy, want_entropy, 2e-5, "entropy");
}

void test_wrong_rows() {
  const int64_t V = 50;
  std::vector<float> logits = normal(4 * V, 1);
  logits[1 * V + 49] = NAN;
  logits[2 * V + 3] = INFINITY;
  std::fill_n(&logits[3 * V], V, -INFINITY);
  const int64_t rows[4] = {}, steps[4] = {};
  int64_t tokens[4];
  float logprobs[4], entropy[4];
  const Sample x{.dtype = DType::f32,
                 .B = 4,
                 .V = V,
                 .logits = logits.data(),
                 .rows = rows,
                 .steps = steps,
                 .seed = 1,
                 .temperature = 1,
                 .top_k = 0,
                 .top_p = 1,
                 .tokens = tokens,
                 .logprobs = logprobs,
                 .entropy = entropy};
  const auto check = [&] {
    CHECK(tokens[0] >= 0 && tokens[1] == kNotANumber && tokens[2] == kNotANumber && tokens[3] == kNoToken);
  };
  cpu::sample(x, 0, 4);
  check();
  plain::sample(x);
  check();
}

void test_logprob(DType type, int64_t N, int64_t V, int64_t C, int64_t chunk) {
  std::vector<float> hidden = normal(N * C, 1), weight = normal(V * C, 2, 2 / std::sqrt(float(C)));
  std::vector<uint16_t> half;
  if (type == DType::bf16)
    for (auto* wide : {&hidden, &weight})
      for (float& f : *wide) {
        uint32_t u;
        std::memcpy(&u, &f, 4);
        half.push_back(u >> 16);
        u &= 0xffff0000;
        std::memcpy(&f, &u, 4);
      }
  const std::vector<float> g = normal(N, 3), ge = normal(N, 4);
  const int64_t padded = (C + 63) / 64 * 64;
  std::vector<int64_t> targets(N);
  for (int64_t i = 0; i < N; ++i) targets[i] = i * 31 % V;
  std::vector<float> logprob(N + 9, 777), entropy(N + 9, 777), dh(N * padded + 64, 777), dw(V * padded + 64, 777);
  std::vector<double> lse(N);
  const int64_t groups = (V + kLogprobGroup - 1) / kLogprobGroup;
  TokenLogprob x{.dtype = type,
                 .weight_dtype = type,
                 .N = N,
                 .C = C,
                 .V = V,
                 .hidden = hidden.data(),
                 .weight = weight.data(),
                 .targets = targets.data(),
                 .logprob = logprob.data(),
                 .entropy = entropy.data(),
                 .lse = lse.data(),
                 .grad_logprob = g.data(),
                 .grad_entropy = ge.data(),
                 .grad_everywhere = 0,
                 .grad_hidden = dh.data(),
                 .grad_weight = dw.data(),
                 .first = 0,
                 .rows = chunk,
                 .first_group = 0,
                 .groups = groups,
                 .kept_logits = nullptr,
                 .kept_groups = 0,
                 .workspace = nullptr};
  if (type == DType::bf16) x.hidden = half.data(), x.weight = half.data() + N * C;
  constexpr char kNaN = -1;  // in any float: padding that is read must have been written
  std::vector<char> workspace(cpu::logprob_workspace(x) + 64, kNaN);
  x.workspace = workspace.data();
  const auto step = [&](auto kernel, int64_t items) {
    parallel(items, 3, [&](int64_t begin, int64_t end) {
      std::memset(cpu::scratch(1 << 19), kNaN, 1 << 19);
      kernel(x, begin, end);
    });
  };
  const auto rows = [&](bool stats, bool grads) {
    x.logprob = stats ? logprob.data() : nullptr, x.grad_hidden = grads ? dh.data() : nullptr;
    for (x.first = 0; x.first < N; x.first += chunk) {
      x.rows = std::min(chunk, N - x.first);
      step(cpu::logprob_pack, (x.rows + 1) / 2);
      if (stats) step(cpu::logprob_logits, x.groups), step(cpu::logprob_stats, x.rows);
      if (grads) step(cpu::logprob_grad_weight, x.groups);
      if (grads) step(cpu::logprob_grad_hidden, (x.rows + kLogprobRows - 1) / kLogprobRows);
    }
  };
  rows(true, true);
  // The gradients by chunks of columns are the same to the bit, whether the logits are kept for them or not.
  const std::vector<float> dh_whole = dh, dw_whole = dw;
  for (int64_t kept : {int64_t(0), std::min<int64_t>(1, groups - 1), groups}) {
    std::vector<float> kept_logits(kept * N * kLogprobStride);
    x.kept_logits = kept_logits.data(), x.kept_groups = kept;
    x.first_group = 0, x.groups = groups;
    if (kept) rows(true, false);
    for (x.first_group = 0; x.first_group < groups; x.first_group += 2) {
      x.groups = std::min<int64_t>(2, groups - x.first_group);
      x.grad_weight = dw.data() + x.first_group * kLogprobGroup * padded;
      rows(false, true);
    }
    CHECK(dh == dh_whole && dw == dw_whole);
  }
  const double tolerance = type == DType::bf16 ? 0.05 : 3e-5;  // of gradients: d is rounded to bf16
  std::vector<float> want_logprob(N + 9, 777), want_entropy(N + 9, 777), want_dh = dh, want_dw = dw;
  x.hidden = hidden.data(), x.weight = weight.data();  // as float32, with the values that bf16 has
  x.logprob = want_logprob.data(), x.entropy = want_entropy.data();
  x.grad_hidden = want_dh.data(), x.grad_weight = want_dw.data();
  plain::token_logprob(x);
  plain::token_logprob_backward(x);
  check_near(logprob, want_logprob, 1e-5, "logprob");
  check_near(entropy, want_entropy, 2e-5, "entropy");
  check_near(dh, want_dh, tolerance, "grad_hidden");
  check_near(dw, want_dw, tolerance, "grad_weight");
  for (int i = 0; i < 64; ++i)
    CHECK(dh[N * padded + i] == 777 && dw[V * padded + i] == 777 && workspace[workspace.size() - 64 + i] == kNaN);
  for (int i = 0; i < 9; ++i) CHECK(logprob[N + i] == 777 && entropy[N + i] == 777);
}

int main() {
  for (int64_t V : {1, 2, 15, 16, 17, 1000, 1024, 1025, 5000})
    for (double temperature : {1.0, 0.4}) {
      test_sample(5, V, temperature, 0, 1);
      test_sample(5, V, temperature, 7, 1);
      test_sample(5, V, temperature, 0, 0.6);
      test_sample(5, V, temperature, 20, 0.8);
    }
  test_wrong_rows();
  for (int64_t V : {1, 2, 16, 33, 255, 256, 257, 700})
    for (int64_t C : {8, 64, 100}) {
      for (DType type : {DType::f32, DType::bf16}) {
        test_logprob(type, 7, V, C, 7);
        test_logprob(type, 20, V, C, 6);
      }
    }
}
