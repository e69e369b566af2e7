// Vectors of W floats, by the compiler's vector types, and by intrinsics only for operations that these types lack.
// The build passes -ffp-contract=off, so a multiplication and an addition are fused only by an explicit fma().
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../kernels.h"
#include "../weights.h"

namespace tinystory::cpu {

// A processor with AVX-512F alone (Knights Landing) runs AVX2.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#define TINYSTORY_AVX512
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int W = kVectorBytes / 4;

typedef float vf __attribute__((vector_size(kVectorBytes)));
typedef double vd __attribute__((vector_size(kVectorBytes)));
typedef int32_t vi __attribute__((vector_size(kVectorBytes)));
typedef uint32_t vu __attribute__((vector_size(kVectorBytes)));
typedef uint64_t vu64 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t vh __attribute__((vector_size(kVectorBytes / 2)));  // W bf16 or f16
typedef uint32_t vu_half __attribute__((vector_size(kVectorBytes / 2)));

template <class Vec>
inline Vec load(const void* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class Vec>
inline void store(void* p, Vec v) {
  std::memcpy(p, &v, sizeof v);
}
template <class Vec>
inline Vec max(Vec a, Vec b) {
  return a > b ? a : b;
}
template <class Vec>
inline Vec min(Vec a, Vec b) {
  return a < b ? a : b;
}
#if defined(TINYSTORY_AVX512)  // one instruction each; for the templates above, GCC emits a comparison and a blend
inline vf max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
inline vf min(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX__)
inline vf max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
inline vf min(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
#endif
template <class Vec>
inline Vec select(decltype(std::declval<Vec>() > std::declval<Vec>()) mask, Vec a, Vec b) {
  return mask ? a : b;
}

template <class T>
struct VecType;
template <>
struct VecType<float> {
  using type = vf;
};
template <>
struct VecType<double> {
  using type = vd;
};
template <class T>
using VecOf = typename VecType<T>::type;
template <class Vec>
constexpr int lanes = sizeof(Vec) / sizeof(std::declval<Vec>()[0]);

template <class Vec, class T>
inline Vec splat(T x) {
  return x - Vec{};  // x - 0 is always x; x + 0 is not (-0 + 0 is +0), so the compiler could not remove the addition
}

// Interleaves the elements of the lower halves of a and b, or with kUpper of the upper halves.
template <bool kUpper, class Vec, int... I>
Vec zip(Vec a, Vec b, std::integer_sequence<int, I...>) {
  constexpr int L = sizeof...(I), first = kUpper ? L / 2 : 0;
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, (first + I / 2 + I % 2 * L)...);
#else  // GCC before 12
  return __builtin_shuffle(a, b, decltype(a == b){(first + I / 2 + I % 2 * L)...});
#endif
}
template <bool kUpper, class Vec>
Vec zip(Vec a, Vec b) {
  return zip<kUpper>(a, b, std::make_integer_sequence<int, lanes<Vec>>());
}

inline vf fma(vf a, vf b, vf c) {
#if defined(TINYSTORY_AVX512)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
inline vd fma(vd a, vd b, vd c) { return a * b + c; }

template <class Vec>
inline auto sum(Vec v) {
  auto a = v;
  for (int w = lanes<Vec> / 2; w; w /= 2)
    for (int i = 0; i < w; ++i) a[i] += a[i + w];
  return a[0];
}
template <class Vec>
inline auto highest(Vec v) {
  auto a = v[0];
  for (int i = 1; i < lanes<Vec>; ++i) a = v[i] > a ? v[i] : a;
  return a;
}
#if defined(TINYSTORY_AVX512)
inline float sum(vf v) { return _mm512_reduce_add_ps((__m512)v); }
inline float highest(vf v) { return _mm512_reduce_max_ps((__m512)v); }
#elif defined(__AVX__)
inline float sum(vf v) {
  const __m128 a = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  const __m128 b = _mm_add_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
inline float highest(vf v) {
  const __m128 a = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  const __m128 b = _mm_max_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}
#endif

// 2^x for x <= 127; 0 if 2^x is below the smallest normal number; NaN for NaN.
inline vf exp2(vf x) {
  const vf magic = splat<vf>(kRounder);
  const vf clamped = max(splat<vf>(-126.0f), x);  // in this order, max returns NaN for NaN
  const vf shifted = clamped + magic;
  const vf f = clamped - (shifted - magic);
  vf p = splat<vf>(kExp2[6]);
  for (int i = 5; i >= 0; --i) p = fma(p, f, splat<vf>(kExp2[i]));
  const vf r = (vf)((vi)p + ((vi)shifted << 23));
  return select<vf>(x >= -126.0f, r, clamped + 126.0f);
}
inline vd exp2(vd x) {
  for (int i = 0; i < lanes<vd>; ++i) x[i] = std::exp2(x[i]);
  return x;
}

// tanh GELU, x s with s = sigmoid(u) and u = 2 sqrt(2 / pi) (x + 0.044715 x^3), and the derivative s + x s (1 - s) u'.
inline std::pair<vf, vf> gelu_and_slope(vf x) {
  constexpr float k = 2 * 0.7978845608028654;
  const vf xx = x * x, u = x * fma(xx, splat<vf>(0.044715f), splat<vf>(1.0f)) * (k * -1.4426950408889634f);
  const vf s = 1.0f / (exp2(min(u, splat<vf>(126.0f))) + 1.0f), y = x * s;
  return {y, fma(y * (1.0f - s), fma(xx, splat<vf>(3 * 0.044715f * k), splat<vf>(k)), s)};
}

// Layer norm of a row of C elements. Calls finish(c, y) for each vector. Returns the mean and 1 / standard deviation.
template <class F>
inline std::pair<float, float> layer_norm_row(const float* x, int64_t C, const float* weight, const float* bias,
                                              const F& finish) {
  vf sums{}, squares{};
  for (int64_t c = 0; c < C; c += W) sums += load<vf>(x + c);
  const float mean = sum(sums) / C;
  for (int64_t c = 0; c < C; c += W) {
    const vf d = load<vf>(x + c) - mean;
    squares = fma(d, d, squares);
  }
  const float scale = 1 / std::sqrt(sum(squares) / C + 1e-5f);
  for (int64_t c = 0; c < C; c += W)
    finish(c, fma((load<vf>(x + c) - mean) * scale, load<vf>(weight + c), load<vf>(bias + c)));
  return {mean, scale};
}

// --- 16-bit floats ---------------------------------------------------------------------------------------------------
inline vf from_bf16(vh x) { return (vf)(__builtin_convertvector(x, vu) << 16); }
inline vh to_bf16(vf x) {
#if defined(__AVX512BF16__)
  return (vh)_mm512_cvtneps_pbh((__m512)x);
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  return (vh)vcvt_bf16_f32((float32x4_t)x);
#else
  const vu u = (vu)x, rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return __builtin_convertvector(select<vu>((vu)(x != x) != 0u, (u >> 16) | 0x40, rounded), vh);
#endif
}

inline float from_f16(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
  uint32_t bits = rest << 13;
  if (rest >= 0x7c00) {
    bits |= 0x7f800000;
  } else if (rest >= 0x400) {
    bits += 112 << 23;  // changes the bias of the exponent from 15 to 127
  } else {
    const float subnormal = float(rest) * 0x1p-24f;  // a normal f32 number, so FTZ and DAZ do not change it
    std::memcpy(&bits, &subnormal, 4);
  }
  bits |= sign;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint16_t to_f16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint16_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;   // NaN
  if (bits >= 0x477ff000) return sign | 0x7c00;  // rounds beyond 65504: infinity
  if (bits < 0x38800000) {                       // subnormal in f16: the FPU rounds
    std::memcpy(&f, &bits, 4);
    f += 0.5f;  // the ulp in [0.5, 1) is 2^-24, the smallest step of f16
    std::memcpy(&bits, &f, 4);
    return sign | uint16_t(bits - 0x3f000000);
  }
  bits += 0xfff + (bits >> 13 & 1);  // to nearest, ties to even
  return sign | uint16_t((bits - 0x38000000) >> 13);
}
inline vf from_f16(vh x) {
#if defined(TINYSTORY_AVX512)
  return (vf)_mm512_cvtph_ps((__m256i)x);
#elif defined(__F16C__) && defined(__AVX__)
  return (vf)_mm256_cvtph_ps((__m128i)x);
#else
  vf r;
  for (int i = 0; i < W; ++i) r[i] = from_f16(x[i]);
  return r;
#endif
}
inline vh to_f16(vf x) {
#if defined(TINYSTORY_AVX512)
  return (vh)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__) && defined(__AVX__)
  return (vh)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
  vh r;
  for (int i = 0; i < W; ++i) r[i] = to_f16(x[i]);
  return r;
#endif
}

inline int64_t size_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }
inline const void* at(const void* p, DType t, int64_t i) { return static_cast<const char*>(p) + i * size_of(t); }
inline void* at(void* p, DType t, int64_t i) { return static_cast<char*>(p) + i * size_of(t); }

// load_as, store_as: load and store lanes<Vec> elements of type t, converted to and from Vec.
template <class Vec>
inline Vec load_as(const void* p, DType t);
template <>
inline vf load_as<vf>(const void* p, DType t) {
  return t == DType::f32 ? load<vf>(p) : t == DType::bf16 ? from_bf16(load<vh>(p)) : from_f16(load<vh>(p));
}
template <>
inline vd load_as<vd>(const void* p, DType) {
  return load<vd>(p);
}
inline void store_as(void* p, DType t, vf x) {
  if (t == DType::f32) store(p, x);
  else if (t == DType::bf16) store(p, to_bf16(x));
  else store(p, to_f16(x));
}
inline void store_as(void* p, DType, vd x) { store(p, x); }

// Stores like store_as, but bypasses the caches (non-temporal store). For data that is read much later: an ordinary
// store would first read the cache line from memory. The type is f32 or bf16, and p is aligned to the stored vector.
// Call end_streams before another thread reads the data.
inline void stream_as(void* p, DType t, vf x) {
#if defined(TINYSTORY_AVX512)
  if (t == DType::f32) _mm512_stream_ps(static_cast<float*>(p), (__m512)x);
  else _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)to_bf16(x));
#elif defined(__AVX__)
  if (t == DType::f32) _mm256_stream_ps(static_cast<float*>(p), (__m256)x);
  else _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)to_bf16(x));
#else
  store_as(p, t, x);
#endif
}
inline void end_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// load_tail: the first n <= lanes elements at p; the other lanes are `fill`. store_tail: stores the first n lanes.
// Bytes beyond the n elements are never touched.
template <class Vec>
inline Vec load_tail(const void* p, DType t, int64_t n, float fill) {
  char bytes[sizeof(Vec)] = {};
  std::memcpy(bytes, p, n * size_of(t));
  Vec v = load_as<Vec>(bytes, t);
  for (int64_t i = n; i < lanes<Vec>; ++i) v[i] = fill;
  return v;
}
template <class Vec>
inline void store_tail(void* p, DType t, int64_t n, Vec x) {
  char bytes[sizeof(Vec)];
  store_as(bytes, t, x);
  std::memcpy(p, bytes, n * size_of(t));
}

// Scratch memory of this thread, 64-byte aligned. The memory is kept between calls, because a new mmap per call would
// cost page faults. Buffers that are in use at the same time need different kNumber.
template <int kNumber = 0>
inline char* scratch(size_t bytes) {
  thread_local std::vector<char> memory;
  if (memory.size() < bytes + 64) memory.resize(bytes + 64);
  return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~uintptr_t(63));
}

}  // namespace tinystory::cpu
