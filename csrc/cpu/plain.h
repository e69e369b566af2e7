// The CPU kernels as plain loops. Read these before the fast kernels; the native tests compare the two. Each function
// takes the arguments of the kernel (kernels.h) and computes the whole result: there are no ranges of items, chunks or
// workspaces. Every tensor is f32, regardless of the dtypes, and every sum is double.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "../kernels.h"
#include "../weights.h"
#include "engine.h"

namespace tinystory::plain {

using Row = std::vector<double>;

inline const float* f32(const void* p) { return static_cast<const float*>(p); }
inline float* f32(void* p) { return static_cast<float*>(p); }

inline double dot(const float* a, const float* b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += double(a[i]) * b[i];
  return sum;
}

// Replaces scores by the softmax of the scores. Returns the log-sum-exp.
inline double softmax(Row& scores) {
  const double top = *std::max_element(scores.begin(), scores.end());
  double total = 0;
  for (double s : scores) total += std::exp(s - top);
  const double lse = top + std::log(total);
  for (double& s : scores) s = std::exp(s - lse);
  return lse;
}

// --- attention.cpp ---------------------------------------------------------------------------------------------------
inline bool dropout_keeps(const Attention& x, int64_t head, int64_t i, int64_t j) {
  const Words4 w = dropout_words(dropout_keys(x.seed), uint32_t(head), uint32_t(i), uint32_t(j));
  const uint32_t words[4] = {w.x, w.y, w.z, w.w};
  return (words[i % 32 / 8] >> (j % 32 / 8 * 8) & 0xff) >= dropout_threshold(x.dropout);
}

// One query of one head: the offsets of vectors, and the query's rows of P and of Z, the dropout mask times the dropout
// scale.
struct Query {
  const Attention& x;
  int64_t b, h, i, head;
  double scale, lse;
  Row P, Z;

  Query(const Attention& x, int64_t b, int64_t h, int64_t i)
      : x(x), b(b), h(h), i(i), head(b * x.H + h), scale(1 / std::sqrt(double(x.D))), P(i + 1), Z(i + 1) {
    const double kept = dropout_scale(dropout_threshold(x.dropout));
    for (int64_t j = 0; j <= i; ++j) {
      P[j] = scale * dot(f32(x.qkv) + at(0, i), f32(x.qkv) + at(1, j), x.D);
      Z[j] = dropout_keeps(x, head, i, j) ? kept : 0;
    }
    lse = softmax(P);
  }
  // Offset in qkv of the query (which = 0), key (1) or value (2) of position t.
  int64_t at(int which, int64_t t) const { return (((b * x.T + t) * 3 + which) * x.H + h) * x.D; }
  int64_t at_out() const { return ((b * x.T + i) * x.H + h) * x.D; }
};

template <class F>
void each_query(const Attention& x, const F& f) {
  for (int64_t b = 0; b < x.B; ++b)
    for (int64_t h = 0; h < x.H; ++h)
      for (int64_t i = 0; i < x.T; ++i) f(Query(x, b, h, i));
}

inline void attention_forward(const Attention& x) {
  each_query(x, [&](const Query& query) {
    Row O(x.D);
    for (int64_t j = 0; j <= query.i; ++j)
      for (int64_t d = 0; d < x.D; ++d) O[d] += query.P[j] * query.Z[j] * f32(x.qkv)[query.at(2, j) + d];
    std::copy(O.begin(), O.end(), f32(x.out) + query.at_out());
    f32(x.lse)[query.head * x.T + query.i] = float(query.lse);
  });
}

inline void attention_backward(const Attention& x) {
  const float* qkv = f32(x.qkv);
  Row grad(x.B * x.T * 3 * x.H * x.D);
  each_query(x, [&](const Query& query) {
    const float* dO = f32(x.grad_out) + query.at_out();
    const int64_t q = query.at(0, query.i);
    Row dP(query.i + 1);
    double delta = 0;
    for (int64_t j = 0; j <= query.i; ++j) {
      dP[j] = query.Z[j] * dot(dO, qkv + query.at(2, j), x.D);
      delta += query.P[j] * dP[j];
    }
    for (int64_t j = 0; j <= query.i; ++j) {
      const double dS = query.P[j] * (dP[j] - delta);
      const int64_t k = query.at(1, j), v = query.at(2, j);
      for (int64_t d = 0; d < x.D; ++d) {
        grad[q + d] += query.scale * dS * qkv[k + d];
        grad[k + d] += query.scale * dS * qkv[q + d];
        grad[v + d] += query.Z[j] * query.P[j] * dO[d];
      }
    }
  });
  std::copy(grad.begin(), grad.end(), f32(x.grad_qkv));
}

// --- attention_decode.cpp --------------------------------------------------------------------------------------------
inline void decode_attention(const DecodeAttention& x) {
  const int64_t row = x.H * x.D;
  for (int64_t b = 0; b < x.B; ++b) {
    const float* own = f32(x.qkv) + (3 * b + 1) * row;  // the new token's key; the value follows after `row` elements
    float* cache = f32(x.cache) + b * x.T * 2 * row;
    std::copy(own, own + 2 * row, cache + x.lengths[b] * 2 * row);
    std::vector<const float*> keys;
    for (int64_t j = x.spans[2 * b]; j < x.spans[2 * b + 1]; ++j) keys.push_back(f32(x.prefix) + j * 2 * row);
    for (int64_t j = 0; j <= x.lengths[b]; ++j) keys.push_back(cache + j * 2 * row);
    for (int64_t h = 0; h < x.H; ++h) {
      const float* q = f32(x.qkv) + 3 * b * row + h * x.D;
      Row P, O(x.D);
      for (const float* key : keys) P.push_back(dot(q, key + h * x.D, x.D) / std::sqrt(double(x.D)));
      softmax(P);
      for (size_t j = 0; j < keys.size(); ++j)
        for (int64_t d = 0; d < x.D; ++d) O[d] += P[j] * keys[j][row + h * x.D + d];
      std::copy(O.begin(), O.end(), f32(x.out) + (b * x.H + h) * x.D);
    }
  }
}

// --- sampling.cpp ----------------------------------------------------------------------------------------------------
// The fixed-point weight of a token (weights.h): floor(2^40 * 2^t), with the float operations that every device uses.
inline uint64_t sampling_weight(float logit, float top, float scale) {
  const float t = std::max((logit - top) * scale, kLowest);
  const float shifted = t + kRounder, fraction = t - (shifted - kRounder);
  float p = kExp2[6];
  for (int i = 5; i >= 0; --i) p = p * fraction + kExp2[i];
  int32_t bits;
  std::memcpy(&bits, &shifted, 4);
  return (uint64_t(p * 0x1p24f) << (kWeightBits - 24)) >> (kRounderBits - bits);
}

inline void sample_row(const Sample& x, int64_t b) {
  const float* logits = f32(x.logits) + b * x.V;
  x.logprobs[b] = x.entropy[b] = 0;
  for (int64_t v = 0; v < x.V; ++v)
    if (!(logits[v] < INFINITY)) {
      x.tokens[b] = kNotANumber;
      return;
    }
  const float top = *std::max_element(logits, logits + x.V);
  if (top == -INFINITY) {
    x.tokens[b] = kNoToken;
    return;
  }
  std::vector<uint64_t> weights(x.V);
  std::vector<int64_t> order(x.V);  // the most likely token first; ties by index
  for (int64_t v = 0; v < x.V; ++v) weights[v] = sampling_weight(logits[v], top, weight_scale(x.temperature));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return logits[i] > logits[j]; });
  if (x.top_k > 0)
    for (int64_t i = x.top_k; i < x.V; ++i) weights[order[i]] = 0;
  uint64_t total = std::accumulate(weights.begin(), weights.end(), uint64_t(0));
  if (x.top_p < 1) {
    const uint64_t need = top_p_need(top_p_fixed(x.top_p), total);
    total = 0;
    for (int64_t v : order) {
      if (total >= need) weights[v] = 0;
      total += weights[v];
    }
  }
  uint64_t draw = below(sample_bits(x.seed, uint64_t(x.rows[b]), uint32_t(x.steps[b])), total);
  int64_t token = 0;
  while (draw >= weights[token]) draw -= weights[token++];
  Row log_p(logits, logits + x.V), p(x.V);  // log-probability and entropy ignore top-k and top-p
  for (int64_t v = 0; v < x.V; ++v) p[v] = log_p[v] /= x.temperature;
  const double lse = softmax(p);
  double entropy = 0;
  for (int64_t v = 0; v < x.V; ++v)
    if (p[v] > 0) entropy -= p[v] * (log_p[v] - lse);
  x.tokens[b] = token;
  x.logprobs[b] = float(log_p[token] - lse);
  x.entropy[b] = float(entropy);
}

inline void sample(const Sample& x) {
  for (int64_t b = 0; b < x.B; ++b) sample_row(x, b);
}

// --- token_logprob.cpp -----------------------------------------------------------------------------------------------
inline Row logits_of_row(const TokenLogprob& x, int64_t i) {
  Row logits(x.V);
  for (int64_t v = 0; v < x.V; ++v) logits[v] = dot(f32(x.hidden) + i * x.C, f32(x.weight) + v * x.C, x.C);
  return logits;
}

inline void token_logprob(const TokenLogprob& x) {
  for (int64_t i = 0; i < x.N; ++i) {
    const Row logits = logits_of_row(x, i);
    Row p = logits;
    x.lse[i] = softmax(p);
    double entropy = 0;
    for (int64_t v = 0; v < x.V; ++v) entropy -= p[v] * (logits[v] - x.lse[i]);
    f32(x.logprob)[i] = float(logits[x.targets[i]] - x.lse[i]);
    f32(x.entropy)[i] = float(entropy);
  }
}

// The rows of grad_hidden and grad_weight are C' elements apart.
inline void token_logprob_backward(const TokenLogprob& x) {
  const int64_t stride = (x.C + 63) / 64 * 64;
  Row grad_weight(x.V * x.C);
  for (int64_t i = 0; i < x.N; ++i) {
    const double g = x.grad_logprob ? f32(x.grad_logprob)[i] : x.grad_everywhere;
    const double g_entropy = x.grad_entropy ? f32(x.grad_entropy)[i] : 0;
    const Row logits = logits_of_row(x, i);
    Row grad_hidden(x.C);
    for (int64_t v = 0; v < x.V; ++v) {
      const double log_p = logits[v] - x.lse[i], p = std::exp(log_p);
      const double target = v == x.targets[i];
      const double grad = g * (target - p) - g_entropy * p * (log_p + f32(x.entropy)[i]);
      for (int64_t c = 0; c < x.C; ++c) {
        grad_hidden[c] += grad * f32(x.weight)[v * x.C + c];
        grad_weight[v * x.C + c] += grad * f32(x.hidden)[i * x.C + c];
      }
    }
    std::copy(grad_hidden.begin(), grad_hidden.end(), f32(x.grad_hidden) + i * stride);
  }
  for (int64_t v = 0; v < x.V; ++v)
    for (int64_t c = 0; c < x.C; ++c) f32(x.grad_weight)[v * stride + c] = float(grad_weight[v * x.C + c]);
}

// --- linear.cpp ------------------------------------------------------------------------------------------------------
// tanh GELU. Sets `slope` to the derivative.
inline double gelu(double x, double& slope) {
  constexpr double k = 0.7978845608028654;  // sqrt(2 / pi)
  const double t = std::tanh(k * (x + 0.044715 * x * x * x));
  slope = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * k * (1 + 3 * 0.044715 * x * x);
  return 0.5 * x * (1 + t);
}

inline void linear_forward(const Linear& l) {
  for (int64_t i = 0; i < l.M; ++i)
    for (int64_t j = 0; j < l.N; ++j) {
      double y = dot(f32(l.x) + i * l.K, l.weight + j * l.K, l.K);
      if (l.bias) y += l.bias[j];
      if (l.gelu) {
        double slope;
        y = gelu(y, slope);
        f32(l.slope)[i * l.N + j] = float(slope);
      }
      f32(l.y)[i * l.N + j] = float(y);
    }
}

inline void linear_backward(const Linear& l) {
  const int64_t blocks = (l.M + kLinearRows - 1) / kLinearRows;
  Row grad_x(l.M * l.K), grad_weight(l.N * l.K), bias_parts(blocks * l.N);
  for (int64_t i = 0; i < l.M; ++i)
    for (int64_t j = 0; j < l.N; ++j) {
      double g = f32(l.grad_y)[i * l.N + j];
      if (l.gelu) g *= f32(l.slope)[i * l.N + j];
      bias_parts[i / kLinearRows * l.N + j] += g;
      for (int64_t k = 0; k < l.K; ++k) {
        grad_x[i * l.K + k] += g * l.weight[j * l.K + k];
        grad_weight[j * l.K + k] += g * f32(l.x)[i * l.K + k];
      }
    }
  std::copy(grad_x.begin(), grad_x.end(), f32(l.grad_x));
  std::copy(grad_weight.begin(), grad_weight.end(), l.grad_weight);
  std::copy(bias_parts.begin(), bias_parts.end(), l.bias_parts);
}

// Dropout factor of an element of the branch: 0 or the scale; 1 without dropout.
inline double branch_factor(const LayerNorm& n, int64_t row, int64_t c) {
  if (n.dropout <= 0) return 1;
  const int64_t group = c / 4;
  const Words4 w = branch_words(dropout_keys(n.seed), uint64_t(row), uint32_t(group));
  const uint32_t words[4] = {w.x, w.y, w.z, w.w}, threshold = dropout_threshold(n.dropout);
  const uint32_t byte = words[group / 32 % 4] >> (8 * (c % 4)) & 0xff;
  return byte >= threshold ? double(float(dropout_scale(threshold))) : 0;
}

inline void layer_norm(const LayerNorm& n) {
  for (int64_t i = 0; i < n.rows; ++i) {
    const float* x = n.x + i * n.C;
    if (n.branch) {
      float* sum = n.sum + i * n.C;
      for (int64_t c = 0; c < n.C; ++c)
        sum[c] = x[c] + f32(n.branch)[i * n.C + c] * float(branch_factor(n, i, c));  // rounded to f32, as it is stored
      x = sum;
    }
    double mean = 0, variance = 0;
    for (int64_t c = 0; c < n.C; ++c) mean += double(x[c]) / n.C;
    for (int64_t c = 0; c < n.C; ++c) variance += (x[c] - mean) * (x[c] - mean) / n.C;
    const double scale = 1 / std::sqrt(variance + 1e-5);
    for (int64_t c = 0; c < n.C; ++c) f32(n.y)[i * n.C + c] = float((x[c] - mean) * scale * n.weight[c] + n.bias[c]);
    n.mean[i] = float(mean), n.scale[i] = float(scale);
  }
}

// grad_x = scale (g - mean(g) - h mean(g h)), where g = grad_y weight, and h is the normalised row.
inline void layer_norm_backward(const LayerNorm& n) {
  const int64_t blocks = (n.rows + kLinearRows - 1) / kLinearRows;
  Row parts(2 * blocks * n.C);
  for (int64_t i = 0; i < n.rows; ++i) {
    const float *x = n.x + i * n.C, *grad_y = f32(n.grad_y) + i * n.C;
    Row g(n.C), h(n.C);
    double mean_g = 0, mean_gh = 0;
    for (int64_t c = 0; c < n.C; ++c) {
      g[c] = double(grad_y[c]) * n.weight[c];
      h[c] = (double(x[c]) - n.mean[i]) * n.scale[i];
      mean_g += g[c] / n.C;
      mean_gh += g[c] * h[c] / n.C;
      parts[i / kLinearRows * n.C + c] += grad_y[c] * h[c];
      parts[(blocks + i / kLinearRows) * n.C + c] += grad_y[c];
    }
    for (int64_t c = 0; c < n.C; ++c) {
      double grad = n.scale[i] * (g[c] - mean_g - h[c] * mean_gh);
      if (n.grad_sum) grad += n.grad_sum[i * n.C + c];
      n.grad_x[i * n.C + c] = float(grad);
      if (n.grad_branch) f32(n.grad_branch)[i * n.C + c] = float(grad * branch_factor(n, i, c));
    }
  }
  std::copy(parts.begin(), parts.end(), n.parts);
}

// --- engine.cpp ------------------------------------------------------------------------------------------------------
using Matrix = std::vector<float>;

inline Matrix linear(const Matrix& x, const cpu::StudentWeights::Affine& affine, int64_t in, int64_t out,
                     bool gelu = false) {
  const int64_t rows = int64_t(x.size()) / in;
  Matrix y(rows * out), slope(rows * out);
  Linear l{};
  l.gelu = gelu;
  l.M = rows, l.K = in, l.N = out;
  l.x = x.data(), l.weight = affine.weight, l.bias = affine.bias;
  l.y = y.data(), l.slope = slope.data();
  linear_forward(l);
  return y;
}

inline Matrix layer_norm(const Matrix& x, const cpu::StudentWeights::Affine& affine, int64_t C) {
  const int64_t rows = int64_t(x.size()) / C;
  Matrix y(x.size()), mean(rows), scale(rows);
  LayerNorm n{};
  n.rows = rows, n.C = C;
  n.x = x.data(), n.weight = affine.weight, n.bias = affine.bias;
  n.mean = mean.data(), n.scale = scale.data(), n.y = y.data();
  layer_norm(n);
  return y;
}

inline Matrix attention(const Matrix& qkv, int64_t heads, int64_t C) {
  const int64_t T = int64_t(qkv.size()) / (3 * C);
  Matrix out(T * C), lse(heads * T);
  Attention x{};
  x.B = 1, x.T = T, x.H = heads, x.D = C / heads;
  x.qkv = qkv.data(), x.out = out.data(), x.lse = lse.data();
  attention_forward(x);
  return out;
}

inline void add(Matrix& to, const Matrix& x) {
  for (size_t i = 0; i < to.size(); ++i) to[i] += x[i];
}

struct Reading {
  Matrix logits, values;  // (T, V), (T,)
};
// Logits and values of the student's forward pass over a story of T tokens.
inline Reading read(const cpu::StudentWeights& w, const std::vector<int64_t>& tokens) {
  const int64_t T = int64_t(tokens.size()), C = w.C;
  Matrix x(T * C);
  for (int64_t t = 0; t < T; ++t)
    for (int64_t c = 0; c < C; ++c) x[t * C + c] = w.wte[tokens[t] * C + c] + w.wpe[t * C + c];
  for (const auto& block : w.blocks) {
    const Matrix qkv = linear(layer_norm(x, block.ln_1, C), block.qkv, C, 3 * C);
    add(x, linear(attention(qkv, w.heads, C), block.attn_proj, C, C));
    const Matrix inner = linear(layer_norm(x, block.ln_2, C), block.fc, C, 4 * C, true);
    add(x, linear(inner, block.mlp_proj, 4 * C, C));
  }
  const Matrix last = layer_norm(x, w.ln_f, C);
  Matrix values(T);
  if (w.value.weight) values = linear(last, w.value, C, 1);
  return {linear(last, {w.lm_head, nullptr}, C, w.V), values};
}

}  // namespace tinystory::plain
