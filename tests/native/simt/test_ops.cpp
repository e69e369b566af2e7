// Decode-step attention, sampling and log-probabilities on the SIMT machine, against float64; sampling also against the
// CPU kernel, which must draw the same tokens.
#include <algorithm>
#include <cstring>
#include <limits>

#include "check.h"

using namespace tinystory;
using namespace test;

namespace {

// --- decode_attention -----------------------------------------------------------------------------------------------
template <class Element>
void test_decode(int64_t B, int64_t P, int64_t H, int64_t D, std::vector<int64_t> lengths, int processors,
                 uint64_t seed) {
  const int64_t T = *std::max_element(lengths.begin(), lengths.end()) + 3, row = H * D;
  const std::string name = std::string("decode ") + Type<Element>::name + " B=" + std::to_string(B) +
                           " P=" + std::to_string(P) + " H=" + std::to_string(H) + " D=" + std::to_string(D) +
                           " T=" + std::to_string(T) + " processors=" + std::to_string(processors);
  std::mt19937_64 random(seed);
  std::vector<int64_t> spans;  // the whole prefix, then a part of it, then nothing, and again
  for (int64_t b = 0; b < B; ++b) spans.push_back(b % 3 ? P / 3 : 0), spans.push_back(b % 3 == 2 ? P / 3 : P);
  const auto qkv = normal<Element>(random, B * 3 * row), prefix = normal<Element>(random, P * 2 * row);
  auto cache = normal<Element>(random, B * T * 2 * row);
  for (int64_t b = 0; b < B; ++b)  // values beyond a row's length are never read
    std::fill(&cache[(b * T + lengths[b]) * 2 * row], &cache[(b + 1) * T * 2 * row - 1] + 1,
              cuda::from_float<Element>(NAN));
  std::vector<double> want(B * row), bound(B * row);
  const auto qkv_d = to_doubles(qkv), prefix_d = to_doubles(prefix), cache_d = to_doubles(cache);
  for (int64_t r = 0; r < B * H; ++r) {
    const int64_t b = r / H, h = r % H, begin = spans[2 * b], own = spans[2 * b + 1] - begin, n = own + lengths[b] + 1;
    const double* q = &qkv_d[b * 3 * row + h * D];
    const auto key = [&](int64_t j) {
      return j < own     ? &prefix_d[(begin + j) * 2 * row + h * D]
             : j + 1 < n ? &cache_d[(b * T + j - own) * 2 * row + h * D]
                         : q + row;
    };
    std::vector<double> p(n);
    double total = 0;
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t d = 0; d < D; ++d) p[j] += q[d] * key(j)[d] / std::sqrt(double(D));
      total += p[j] = std::exp(p[j]);
    }
    for (int64_t d = 0; d < D; ++d) {
      double size = 0;
      for (int64_t j = 0; j < n; ++j) {
        const double term = p[j] / total * key(j)[row + d];
        want[r * D + d] += term;
        size += std::fabs(term);
      }
      bound[r * D + d] = Type<Element>::unit * std::fabs(want[r * D + d]) * 1.01 + size * 0x1p-20 + 1e-7;
    }
  }
  simt::set_seed(seed);
  simt::set_multiprocessors(processors);
  run(name, [&] {
    const simt::Buffer<Element> new_token(qkv), shared(prefix);
    const simt::Buffer<int64_t> used(lengths), parts(spans);
    simt::Buffer<Element> grown(cache.size()), out(B * row);
    std::copy(cache.begin(), cache.end(), grown.data());
    const DecodeAttention x{
        Type<Element>::dtype, B,           P,         T, H, D, new_token.data(), shared.data(), parts.data(),
        grown.data(),         used.data(), out.data()};
    simt::Buffer<float> workspace(cuda::decode_attention_workspace(x));
    cuda::decode_attention(x, workspace.data(), nullptr);
    check_close(to_doubles(out.read()), want, bound, name);
    auto after = cache;
    for (int64_t b = 0; b < B; ++b)
      std::copy_n(&qkv[(3 * b + 1) * row], 2 * row, &after[(b * T + lengths[b]) * 2 * row]);
    check(std::memcmp(grown.read().data(), after.data(), after.size() * sizeof(Element)) == 0,
          name + ": the cache after it");
  });
}

template <class Element>
void test_decode() {
  uint64_t seed = 0;
  for (const int64_t D : {32, 64, 128})
    for (const int processors : {1, 40}) {
      test_decode<Element>(1, 0, 1, D, {0}, processors, ++seed);
      test_decode<Element>(3, 20, 2, D, {5, 64, 0}, processors, ++seed);
      test_decode<Element>(2, 130, 3, D, {600, 33}, processors, ++seed);
    }
}

// A key that is NaN must not be ignored: the student's output shows that its weights are damaged.
void test_nan_key() {
  constexpr int64_t D = 64, T = 9;
  std::mt19937_64 random(1);
  for (int64_t key = 0; key < T; ++key) {
    auto cache = normal<cuda::bf16>(random, T * 2 * D);
    auto qkv = normal<cuda::bf16>(random, 3 * D);
    std::fill_n(key + 1 < T ? &cache[key * 2 * D] : &qkv[D], D, cuda::from_float<cuda::bf16>(NAN));
    const simt::Buffer<cuda::bf16> new_token(qkv);
    const simt::Buffer<int64_t> used(std::vector<int64_t>{T - 1}), parts(std::vector<int64_t>{0, 0});
    simt::Buffer<cuda::bf16> grown(cache.size()), out(D);
    std::copy(cache.begin(), cache.end(), grown.data());
    const DecodeAttention x{DType::bf16,  1,           0,         T, 1, D, new_token.data(), nullptr, parts.data(),
                            grown.data(), used.data(), out.data()};
    simt::Buffer<float> workspace(cuda::decode_attention_workspace(x));
    cuda::decode_attention(x, workspace.data(), nullptr);
    for (const double value : to_doubles(out.read()))
      check(std::isnan(value), "decode ignores that key " + std::to_string(key) + " is NaN");
  }
}

// An invalid value that only the kernel can see, and that would lead outside the buffers.
template <class F>
void expect_assertion(const std::string& words, const F& f) {
  std::string said;
  try {
    f();
  } catch (const simt::Error& e) {
    said = e.what();
  }
  check(said.find(words) != std::string::npos, "no assertion '" + words + "', but '" + said + "'");
}

void test_assertions() {
  const simt::Buffer<float> numbers(3 * 32), results(32);
  for (const int64_t length : {-1, 3})
    expect_assertion("an entry of lengths is not in 0 .. T_max - 1", [&] {
      const simt::Buffer<int64_t> lengths(std::vector<int64_t>{length});
      const simt::Buffer<float> cache(3 * 2 * 32);
      const simt::Buffer<int64_t> spans(std::vector<int64_t>{0, 0});
      cuda::decode_attention({DType::f32, 1, 0, 3, 1, 32, numbers.data(), nullptr, spans.data(), cache.data(),
                              lengths.data(), results.data()},
                             nullptr, nullptr);
    });
  for (const std::vector<int64_t>& span : {std::vector<int64_t>{-1, 1}, {0, 3}, {2, 1}})
    expect_assertion("an entry of spans is not in 0 .. P", [&] {
      const simt::Buffer<int64_t> lengths(std::vector<int64_t>{0}), spans(span);
      const simt::Buffer<float> cache(3 * 2 * 32), prefix(2 * 2 * 32);
      cuda::decode_attention({DType::f32, 1, 2, 3, 1, 32, numbers.data(), prefix.data(), spans.data(), cache.data(),
                              lengths.data(), results.data()},
                             nullptr, nullptr);
    });
  for (const int64_t target : {-1, 32})
    expect_assertion("an entry of targets is not in 0 .. V - 1", [&] {
      const simt::Buffer<int64_t> targets(std::vector<int64_t>{target});
      const simt::Buffer<double> lse(1);
      cuda::logit_stats({DType::f32, 1, 32, 32, numbers.data(), nullptr, targets.data(), results.data(), results.data(),
                         lse.data(), nullptr, nullptr, 0},
                        nullptr);
    });
}

// --- sample ---------------------------------------------------------------------------------------------------------
struct Drawn {
  std::vector<int64_t> tokens;
  std::vector<float> logprobs, entropy;
};
struct Rule {
  double temperature = 1;
  int64_t top_k = 0;
  double top_p = 1;
};

template <class Element>
void test_sample(const std::vector<Element>& logits, int64_t B, int64_t V, const Rule& rule, uint64_t seed,
                 const std::string& what) {
  const std::string name = "sample " + what + " " + Type<Element>::name + " V=" + std::to_string(V) +
                           " t=" + std::to_string(rule.temperature) + " k=" + std::to_string(rule.top_k) +
                           " p=" + std::to_string(rule.top_p);
  std::vector<int64_t> rows(B), steps(B);
  for (int64_t b = 0; b < B; ++b) rows[b] = 17 * b + (int64_t(b) << 33), steps[b] = b + 5;
  Sample x{Type<Element>::dtype, B,          V,          nullptr, nullptr, nullptr, seed,
           rule.temperature,     rule.top_k, rule.top_p, nullptr, nullptr, nullptr};
  Drawn want{std::vector<int64_t>(B), std::vector<float>(B), std::vector<float>(B)};
  x.logits = logits.data(), x.rows = rows.data(), x.steps = steps.data();
  x.tokens = want.tokens.data(), x.logprobs = want.logprobs.data(), x.entropy = want.entropy.data();
  cpu::sample(x, 0, B);

  simt::set_seed(seed);
  run(name, [&] {
    const simt::Buffer<Element> in(logits);
    const simt::Buffer<int64_t> row_ids(rows), step_ids(steps);
    simt::Buffer<int64_t> tokens(B);
    simt::Buffer<float> logprobs(B), entropy(B);
    x.logits = in.data(), x.rows = row_ids.data(), x.steps = step_ids.data();
    x.tokens = tokens.data(), x.logprobs = logprobs.data(), x.entropy = entropy.data();
    cuda::sample(x, nullptr);
    const auto got = tokens.read();
    const auto got_logprobs = logprobs.read(), got_entropy = entropy.read();
    for (int64_t b = 0; b < B; ++b) {
      check(got[b] == want.tokens[b], name + ": row " + std::to_string(b) + " drew " + std::to_string(got[b]) +
                                          ", the CPU " + std::to_string(want.tokens[b]));
      if (want.tokens[b] < 0) continue;
      check(std::fabs(got_logprobs[b] - want.logprobs[b]) <= 2e-6 * (1 + std::fabs(want.logprobs[b])),
            name + " logprob");
      check(std::fabs(got_entropy[b] - want.entropy[b]) <= 2e-5 * (1 + std::fabs(want.entropy[b])), name + " entropy");
    }
  });
}

template <class Element>
void test_sample() {
  std::mt19937_64 random(1);
  const Rule rules[] = {{}, {0.7}, {1.5, 5}, {1, 0, 0.9}, {0.9, 40, 0.5}, {1, 1}, {1, 3, 1e-9}};
  uint64_t seed = 0;
  for (const int64_t V : {1, 2, 7, 250, 1000, 4099, 20000})
    for (const Rule& rule : rules)
      test_sample<Element>(normal<Element>(random, 4 * V, 3), 4, V, rule, ++seed, "normal");
  const float inf = std::numeric_limits<float>::infinity();
  const int64_t V = 300;
  for (const Rule& rule : rules) {
    std::vector<Element> equal(2 * V, cuda::from_float<Element>(2.5f)), few(2 * V, cuda::from_float<Element>(-inf)),
        zeros(2 * V);
    for (int i : {3, 77, 299, 300, 599}) few[i] = cuda::from_float<Element>(1);
    for (int64_t i = 0; i < 2 * V; ++i) zeros[i] = cuda::from_float<Element>(i % 3 ? 0.0f : -0.0f);
    test_sample<Element>(equal, 2, V, rule, ++seed, "all equal");
    test_sample<Element>(few, 2, V, rule, ++seed, "mostly -inf");
    test_sample<Element>(zeros, 2, V, rule, ++seed, "zeros of both signs");
    auto bad = normal<Element>(random, 4 * V);
    bad[V - 1] = cuda::from_float<Element>(NAN), bad[V] = cuda::from_float<Element>(inf);
    for (int64_t i = 2 * V; i < 3 * V; ++i) bad[i] = cuda::from_float<Element>(-inf);
    test_sample<Element>(bad, 4, V, rule, ++seed, "NaN, inf, all -inf, sound");
  }
}

// --- token_logprob --------------------------------------------------------------------------------------------------
template <class Element>
void test_logprob(int64_t N, int64_t V, double scale, bool with_entropy, uint64_t seed) {
  const std::string name =
      std::string("logprob ") + Type<Element>::name + " V=" + std::to_string(V) + " scale=" + std::to_string(scale);
  std::mt19937_64 random(seed);
  auto logits = normal<float>(random, N * V, scale);
  if (V > 2) logits[1] = -INFINITY;
  std::vector<int64_t> targets(N);
  for (int64_t& t : targets) t = int64_t(random() % V);
  targets[0] = 0;
  auto g = normal<float>(random, N);
  const auto ge = normal<float>(random, N);
  const bool everywhere = seed % 4 == 0 && !with_entropy;
  if (everywhere) std::fill(g.begin(), g.end(), g[0]);
  const auto x = to_doubles(logits);
  std::vector<double> logprob(N), entropy(N), lse(N), grad(N * V), bound(N * V);
  for (int64_t n = 0; n < N; ++n) {
    const double* row = &x[n * V];
    const double top = *std::max_element(row, row + V);
    double total = 0;
    for (int64_t v = 0; v < V; ++v) total += std::exp(row[v] - top);
    lse[n] = top + std::log(total);
    logprob[n] = row[targets[n]] - lse[n];
    for (int64_t v = 0; v < V; ++v)
      if (row[v] > -INFINITY) entropy[n] -= std::exp(row[v] - lse[n]) * (row[v] - lse[n]);
    for (int64_t v = 0; v < V; ++v) {
      const double p = std::exp(row[v] - lse[n]), log_p = std::max(row[v] - lse[n], -1000.0);
      const double e = with_entropy ? ge[n] : 0.0;
      grad[n * V + v] = double(g[n]) * ((v == targets[n]) - p) - e * p * (log_p + entropy[n]);
      const double size = std::fabs(g[n]) * (v == targets[n] ? std::fabs(std::expm1(log_p)) : p) +
                          std::fabs(e) * p * (std::fabs(log_p) + entropy[n]);
      bound[n * V + v] = Type<Element>::unit * 1.05 * std::fabs(grad[n * V + v]) + size * (2e-6 - 2e-7 * log_p) +
                         (sizeof(Element) == 2 ? 6e-8 : 1e-30);
    }
  }
  simt::set_seed(seed);
  run(name, [&] {
    const int64_t stride = seed % 2 ? V : (V + 7) / 8 * 8;  // rows one after another, or from multiples of 16 bytes on
    const auto of_rows = [&](const auto& padded) {
      std::vector<double> r;
      for (int64_t n = 0; n < N; ++n)
        for (int64_t v = 0; v < V; ++v) r.push_back(cuda::to_float(padded[n * stride + v]));
      return r;
    };
    std::vector<float> padded(N * stride, NAN);
    for (int64_t n = 0; n < N; ++n) std::copy_n(&logits[n * V], V, &padded[n * stride]);
    const simt::Buffer<float> in(padded);
    simt::Buffer<Element> out_grad(N * stride);
    const auto untouched = out_grad.read();
    const simt::Buffer<int64_t> target_ids(targets);
    const simt::Buffer<float> dg(g), dge(ge);
    simt::Buffer<float> out_logprob(N), out_entropy(N);
    simt::Buffer<double> out_lse(N);
    cuda::LogitChunk s{Type<Element>::dtype,
                       N,
                       V,
                       stride,
                       in.data(),
                       out_grad.data(),
                       target_ids.data(),
                       out_logprob.data(),
                       out_entropy.data(),
                       out_lse.data(),
                       dg.data(),
                       with_entropy ? dge.data() : nullptr,
                       0};
    if (everywhere) s.grad_logprob = nullptr, s.grad_everywhere = g[0];
    cuda::logit_stats(s, nullptr);
    const auto near = [&](const std::vector<double>& want) {
      std::vector<double> r;
      for (double w : want) r.push_back(2e-6 * (1 + std::fabs(w)));
      return r;
    };
    check_close(to_doubles(out_logprob.read()), logprob, near(logprob), name + " logprob");
    check_close(to_doubles(out_entropy.read()), entropy, near(entropy), name + " entropy");
    check_close(out_lse.read(), lse, near(lse), name + " lse");
    cuda::logit_grad(s, nullptr);
    const auto found = out_grad.read();
    check_close(of_rows(found), grad, bound, name + " grad");
    for (int64_t n = 0; n < N; ++n)
      check(std::memcmp(&found[n * stride + V - 1] + 1, &untouched[n * stride + V - 1] + 1,
                        (stride - V) * sizeof(Element)) == 0,
            name + ": what lies after a row of gradients");
  });
}

template <class Element>
void test_logprob() {
  uint64_t seed = 0;
  for (const int64_t V : {1, 2, 9, 255, 256, 2048, 5001})
    for (const double scale : {0.5, 8.0}) test_logprob<Element>(3, V, scale, V % 2 == 0, ++seed);
}

// --- gelu_backward --------------------------------------------------------------------------------------------------
template <class Element>
void test_gelu(int64_t rows, int64_t N, double scale, uint64_t seed) {
  const std::string name = std::string("gelu ") + Type<Element>::name + " rows=" + std::to_string(rows) +
                           " N=" + std::to_string(N) + " scale=" + std::to_string(scale);
  std::mt19937_64 random(seed);
  const auto x = normal<Element>(random, rows * N, scale), grad_y = normal<Element>(random, rows * N);
  const auto v = to_doubles(x), dy = to_doubles(grad_y);
  std::vector<double> grad(rows * N), bound(rows * N), sums(N), sums_bound(N, 1e-30);
  for (int64_t i = 0; i < rows * N; ++i) {
    const double k = std::sqrt(2 / M_PI), t = std::tanh(k * (v[i] + 0.044715 * v[i] * v[i] * v[i]));
    const double tail = v[i] * (1 - t * t) * k * (1 + 3 * 0.044715 * v[i] * v[i]);
    grad[i] = dy[i] * 0.5 * (1 + t + tail);
    const double error = 4e-6 * std::fabs(dy[i]) * (1 + std::fabs(t) + std::fabs(tail));
    bound[i] = Type<Element>::unit * 1.05 * std::fabs(grad[i]) + error + (sizeof(Element) == 2 ? 6e-8 : 0);
    sums[i % N] += grad[i], sums_bound[i % N] += error + 1e-6 * std::fabs(grad[i]);
  }
  simt::set_seed(seed);
  run(name, [&] {
    const simt::Buffer<Element> in(x), dout(grad_y);
    simt::Buffer<Element> out(rows * N);
    const int64_t blocks = cuda::gelu_blocks(rows);
    simt::Buffer<float> parts(blocks * N);
    cuda::gelu_backward({Type<Element>::dtype, rows, N, dout.data(), in.data(), out.data(), parts.data()}, nullptr);
    check_close(to_doubles(out.read()), grad, bound, name + " grad");
    const auto found = parts.read();
    std::vector<double> total(N);
    for (int64_t i = 0; i < blocks * N; ++i) total[i % N] += found[i];
    check_close(total, sums, sums_bound, name + " grad_bias");
  });
}

template <class Element>
void test_gelu() {
  uint64_t seed = 0;
  for (const int64_t rows : {1, 63, 64, 150})
    for (const int64_t N : {8, 248, 256, 520}) test_gelu<Element>(rows, N, rows == 63 ? 8 : 1.5, ++seed);
}

// --- layer_norm -----------------------------------------------------------------------------------------------------
template <class Branch, class Out>
void test_norm(int64_t rows, int64_t C, bool with_branch, double dropout, bool with_grad_sum, uint64_t seed) {
  const std::string name = std::string("layer_norm ") + Type<Branch>::name + " to " + Type<Out>::name +
                           " rows=" + std::to_string(rows) + " C=" + std::to_string(C) +
                           (with_branch ? " branch" : "") + " dropout=" + std::to_string(dropout);
  std::mt19937_64 random(seed);
  const size_t n = rows * C;
  auto x = normal<float>(random, n, 2);
  for (int64_t c = 0; c < C; ++c) x[c] += 30;  // a mean far from 0
  const auto branch = normal<Branch>(random, n);
  const auto weight = normal<float>(random, C), bias = normal<float>(random, C);
  const auto grad_y = normal<Out>(random, n);
  const auto grad_sum = normal<float>(random, n);
  const uint32_t threshold = dropout > 0 ? dropout_threshold(dropout) : 0;
  const auto factor = [&](int64_t row, int64_t column) {
    const auto group = uint32_t(column / 4);
    const Words4 w = branch_words(dropout_keys(seed), uint64_t(row), group);
    const uint32_t words[] = {w.x, w.y, w.z, w.w};
    const uint32_t byte = words[group / 32 % 4] >> (8 * (column % 4)) & 0xff;
    return !threshold ? 1.0 : byte >= threshold ? double(float(dropout_scale(threshold))) : 0.0;
  };
  const auto b = to_doubles(branch), dy = to_doubles(grad_y);
  std::vector<double> sum(n), y(n), y_bound(n), dx(n), dx_bound(n), db(n), db_bound(n), dw(2 * C), dw_bound(2 * C);
  for (int64_t r = 0; r < rows; ++r) {
    double mean = 0, variance = 0, g_mean = 0, gn_mean = 0, size = 0;
    for (int64_t c = 0; c < C; ++c) {
      sum[r * C + c] = x[r * C + c];
      // The stream is rounded to float32, and the norm is that of the rounded stream.
      if (with_branch) sum[r * C + c] = float(float(x[r * C + c]) + float(float(b[r * C + c]) * float(factor(r, c))));
      mean += sum[r * C + c] / C;
    }
    for (int64_t c = 0; c < C; ++c) variance += (sum[r * C + c] - mean) * (sum[r * C + c] - mean) / C;
    const double scale = 1 / std::sqrt(variance + 1e-5), far = std::fabs(mean) * scale;
    const auto norm = [&](int64_t c) { return (sum[r * C + c] - mean) * scale; };
    for (int64_t c = 0; c < C; ++c) {
      const double g = dy[r * C + c] * weight[c];
      g_mean += g / C, gn_mean += g * norm(c) / C;
      size += std::fabs(g) * (1 + std::fabs(norm(c))) / C;
      y[r * C + c] = norm(c) * weight[c] + bias[c];
      y_bound[r * C + c] =
          Type<Out>::unit * 1.05 * std::fabs(y[r * C + c]) +
          3e-6 * (std::fabs(norm(c) * weight[c]) + std::fabs(weight[c]) * (1 + far) + std::fabs(bias[c]));
      dw[c] += dy[r * C + c] * norm(c), dw[C + c] += dy[r * C + c];
      dw_bound[c] += 3e-6 * std::fabs(dy[r * C + c]) * (1 + std::fabs(norm(c)) + far) + 1e-7;
      dw_bound[C + c] += 1e-6 * std::fabs(dy[r * C + c]) + 1e-7;
    }
    for (int64_t c = 0; c < C; ++c) {
      const int64_t i = r * C + c;
      const double g = dy[i] * weight[c];
      dx[i] = scale * (g - g_mean - norm(c) * gn_mean) + (with_grad_sum ? double(grad_sum[i]) : 0);
      dx_bound[i] =
          5e-6 * (scale * (std::fabs(g) + size * (1 + std::fabs(norm(c))) * (1 + far)) + std::fabs(grad_sum[i]));
      db[i] = dx[i] * factor(r, c);
      db_bound[i] = (Type<Branch>::unit * 1.05 * std::fabs(dx[i]) + dx_bound[i]) * 2 + 1e-6;
    }
  }
  simt::set_seed(seed);
  run(name, [&] {
    const simt::Buffer<float> in(x), w(weight), shift(bias), dsum(grad_sum);
    const simt::Buffer<Branch> added(branch);
    const simt::Buffer<Out> grad(grad_y);
    simt::Buffer<float> out_sum(n), mean(rows), scale(rows), out_dx(n), parts(2 * cuda::layer_norm_blocks(rows) * C);
    simt::Buffer<Out> out(n);
    simt::Buffer<Branch> out_db(n);
    LayerNorm p{.branch_type = Type<Branch>::dtype,
                .y_type = Type<Out>::dtype,
                .rows = rows,
                .C = C,
                .dropout = dropout,
                .seed = seed,
                .x = in.data(),
                .branch = with_branch ? added.data() : nullptr,
                .weight = w.data(),
                .bias = shift.data(),
                .sum = with_branch ? out_sum.data() : nullptr,
                .mean = mean.data(),
                .scale = scale.data(),
                .y = out.data(),
                .grad_y = grad.data(),
                .grad_sum = with_grad_sum ? dsum.data() : nullptr,
                .grad_x = out_dx.data(),
                .grad_branch = with_branch ? out_db.data() : nullptr,
                .parts = parts.data()};
    cuda::layer_norm(p, nullptr);
    if (with_branch) check_close(to_doubles(out_sum.read()), sum, std::vector<double>(n, 1e-30), name + " sum");
    check_close(to_doubles(out.read()), y, y_bound, name + " y");
    if (with_branch) p.x = out_sum.data();
    cuda::layer_norm_backward(p, nullptr);
    check_close(to_doubles(out_dx.read()), dx, dx_bound, name + " grad_x");
    if (with_branch) check_close(to_doubles(out_db.read()), db, db_bound, name + " grad_branch");
    std::vector<double> sums(2 * C);
    const auto found = parts.read();
    const int64_t blocks = cuda::layer_norm_blocks(rows);
    for (int64_t i = 0; i < 2 * blocks * C; ++i) sums[i / (blocks * C) * C + i % C] += found[i];
    check_close(sums, dw, dw_bound, name + " grad_weight, grad_bias");
  });
}

template <class Branch, class Out>
void test_norm() {
  std::mt19937_64 random(sizeof(Branch) + sizeof(Out));
  uint64_t seed = 0;
  for (int i = 0; i < 24; ++i) {  // the lengths of rows cross those that a warp, or a call of Philox, serves at once
    const int64_t C = i == 0 ? 4 : i == 1 ? 128 : i == 2 ? 4400 : int64_t(random() % 180 + 1) * 4;
    const int64_t rows = i == 2 ? 3 : int64_t(random() % 80 + 1);
    const bool branch = i % 4 != 0;
    test_norm<Branch, Out>(rows, C, branch, branch && i % 2 ? (i % 3 ? 0.1 : 0.5) : 0, i % 3 != 1, ++seed);
  }
}

}  // namespace

int main(int argc, char** argv) {  // names of ops to test, default all
  const auto wanted = [&](const std::string& op) {
    return argc == 1 || std::find(argv + 1, argv + argc, op) != argv + argc;
  };
  if (wanted("decode")) test_decode<float>(), test_decode<bf16>(), test_decode<f16>(), test_nan_key();
  if (wanted("logprob")) test_logprob<float>(), test_logprob<bf16>(), test_logprob<f16>();
  if (wanted("gelu")) test_gelu<bf16>(), test_gelu<f16>();
  if (wanted("norm")) {
    test_norm<float, float>(), test_norm<bf16, bf16>(), test_norm<bf16, float>();
    test_norm<f16, f16>(), test_norm<f16, float>();
  }
  if (wanted("sample")) test_sample<float>(), test_sample<bf16>(), test_sample<f16>();
  if (wanted("assertions")) test_assertions();
  return report("simt_ops");
}
