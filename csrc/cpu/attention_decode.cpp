// Decode-step attention: one new token per row attends to the row's KV cache. The time is bound by the memory bandwidth
// of one read of the cache. Keys and values are read in memory order, all heads of a position together, so that the
// hardware prefetcher works.
#include <algorithm>

#include "vec.h"

namespace tinystory::cpu {
namespace {

// Heads first to last - 1 of row b.
template <class Acc, DType type>
void decode(const DecodeAttention& x, int64_t b, int64_t first, int64_t last) {
  using Vec = VecOf<Acc>;
  constexpr int64_t L = lanes<Vec>;
  const int64_t span = x.spans[2 * b], P = x.spans[2 * b + 1] - span;
  const int64_t length = x.lengths[b], n = P + length + 1, D = x.D, heads = last - first, row = x.H * D;
  Acc* q = reinterpret_cast<Acc*>(scratch(heads * (2 * D + n + 1) * sizeof(Acc)));
  Acc *out = q + heads * D, *weights = out + heads * D, *total = weights + heads * n;
  const void *query = at(x.qkv, type, b * 3 * row + first * D), *own = at(query, type, row);
  const auto position = [&](int64_t j) {  // the keys of position j; the values follow after `row` elements
    return j < P       ? at(x.prefix, type, (span + j) * 2 * row + first * D)
           : j + 1 < n ? at(x.cache, type, (b * x.T + j - P) * 2 * row + first * D)
                       : own;
  };
  const Vec to_log2 = splat<Vec>(Acc(1.4426950408889634 / std::sqrt(double(D))));
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t d = 0; d < D; d += L) {
      store(q + h * D + d, load_as<Vec>(at(query, type, h * D + d), type) * to_log2);
      store(out + h * D + d, Vec{});
    }

  for (int64_t j = 0; j < n; ++j) {
    const void* keys = position(j);
    for (int64_t h = 0; h < heads; ++h) {
      const void* key = at(keys, type, h * D);
      Vec dot{};
      for (int64_t d = 0; d < D; d += L) dot = fma(load<Vec>(q + h * D + d), load_as<Vec>(at(key, type, d), type), dot);
      weights[h * n + j] = sum(dot);
    }
  }
  for (int64_t h = 0; h < heads; ++h) {
    Acc* p = weights + h * n;
    const Acc top = *std::max_element(p, p + n);
    Vec sums{};
    for (int64_t j = 0; j < n; j += L) {
      const int64_t valid = std::min(L, n - j);
      Vec v = splat<Vec>(Acc(-INFINITY));
      std::memcpy(&v, p + j, valid * sizeof(Acc));
      v = exp2(v - top);
      sums += v;
      std::memcpy(p + j, &v, valid * sizeof(Acc));
    }
    total[h] = sum(sums);
  }
  for (int64_t j = 0; j < n; ++j) {
    const void* values = at(position(j), type, row);
    for (int64_t h = 0; h < heads; ++h) {
      const void* value = at(values, type, h * D);
      const Vec p = splat<Vec>(weights[h * n + j]);
      Acc* o = out + h * D;
      for (int64_t d = 0; d < D; d += L) store(o + d, fma(p, load_as<Vec>(at(value, type, d), type), load<Vec>(o + d)));
    }
  }
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t d = 0; d < D; d += L)
      store_as(at(x.out, type, (b * x.H + first + h) * D + d), type, load<Vec>(out + h * D + d) / total[h]);
  void* appended = at(x.cache, type, (b * x.T + length) * 2 * row + first * D);
  for (const int64_t offset : {int64_t(0), row})
    std::memcpy(at(appended, type, offset), at(own, type, offset), heads * D * size_of(type));
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
