// Attention of one query a row over a key-value cache, bound by reading the cache once. Keys and values are walked in
// the order in which they lie, all heads of a position together, or the memory's prefetcher would lose its way.
#include <algorithm>

#include "vec.h"

namespace tinystory::cpu {
namespace {

// Heads first .. last - 1 of row b.
template <class Acc, DType type>
void decode(const DecodeAttention& x, int64_t b, int64_t first, int64_t last) {
  using V = Vec<Acc>;
  constexpr int64_t L = lanes<V>;
  const int64_t n = x.lengths[b], D = x.D, heads = last - first;
  Acc* q = reinterpret_cast<Acc*>(scratch(heads * (2 * D + n + 1) * sizeof(Acc)));
  Acc *out = q + heads * D, *weights = out + heads * D, *total = weights + heads * n;
  const auto row = [&](const void* base, const int64_t* stride, int64_t j, int64_t h) {
    return at(base, type, b * stride[0] + j * stride[1] + (first + h) * stride[2]);
  };
  const V to_log2 = splat<V>(Acc(1.4426950408889634 / std::sqrt(double(D))));
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t d = 0; d < D; d += L) {
      const void* query = at(x.q, type, b * x.q_stride[0] + (first + h) * x.q_stride[1] + d);
      store(q + h * D + d, load_as<V>(query, type) * to_log2);
      store(out + h * D + d, V{});
    }

  for (int64_t j = 0; j < n; ++j)
    for (int64_t h = 0; h < heads; ++h) {
      const void* key = row(x.k, x.k_stride, j, h);
      V dot{};
      for (int64_t d = 0; d < D; d += L) dot = fma(load<V>(q + h * D + d), load_as<V>(at(key, type, d), type), dot);
      weights[h * n + j] = sum(dot);
    }
  for (int64_t h = 0; h < heads; ++h) {
    Acc* p = weights + h * n;
    const Acc top = *std::max_element(p, p + n);
    V sums{};
    for (int64_t j = 0; j < n; j += L) {
      const int64_t valid = std::min(L, n - j);
      V v = splat<V>(Acc(-INFINITY));
      std::memcpy(&v, p + j, valid * sizeof(Acc));
      v = exp2(v - top);
      sums += v;
      std::memcpy(p + j, &v, valid * sizeof(Acc));
    }
    total[h] = sum(sums);
  }
  for (int64_t j = 0; j < n; ++j)
    for (int64_t h = 0; h < heads; ++h) {
      const void* value = row(x.v, x.v_stride, j, h);
      const V p = splat<V>(weights[h * n + j]);
      Acc* o = out + h * D;
      for (int64_t d = 0; d < D; d += L) store(o + d, fma(p, load_as<V>(at(value, type, d), type), load<V>(o + d)));
    }
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t d = 0; d < D; d += L)
      store_as(at(x.out, type, (b * x.H + first + h) * D + d), type, load<V>(out + h * D + d) / total[h]);
}

}  // namespace

void decode_attention(const DecodeAttention& x, int64_t begin, int64_t end) {
  const auto kernel = x.dtype == DType::f32    ? decode<float, DType::f32>
                      : x.dtype == DType::bf16 ? decode<float, DType::bf16>
                      : x.dtype == DType::f16  ? decode<float, DType::f16>
                                               : decode<double, DType::f64>;
  for (int64_t i = begin; i < end;) {
    const int64_t b = i / x.H, last = std::min(end - b * x.H, x.H);
    kernel(x, b, i - b * x.H, last);
    i = b * x.H + last;
  }
}

}  // namespace tinystory::cpu
