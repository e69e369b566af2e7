// The primitives of csrc/cuda/primitives.cuh on the SIMT machine, in plain C++.
#pragma once
#include <algorithm>
#include <cmath>

#include "simt.h"
#include "trace.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

namespace tinystory::cuda {

// Every primitive takes the call site as default arguments.
#define SIMT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define SIMT_HERE \
  simt::Site { __func__, file, line }
// For loops over registers only, which report nothing and would take long.
#define SIMT_UNTRACED __attribute__((no_sanitize("thread")))

inline char* shared_memory() { return simt::shared_memory(); }
inline void sync_block(SIMT_SITE) { simt::sync_block(SIMT_HERE); }
inline void sync_warp(SIMT_SITE) { simt::sync_warp(SIMT_HERE); }

template <class Value>
Value shuffle(Value value, int source, SIMT_SITE) {
  struct Args {
    Value value, result;
    int source;
  } a{value, {}, source};
  simt::meet<Args>(SIMT_HERE, a, [](Args* const(&lanes)[32]) {
    for (Args* l : lanes) l->result = lanes[l->source & 31]->value;
  });
  return a.result;
}
template <class Value>
Value shuffle_xor(Value value, int mask, SIMT_SITE) {
  return shuffle(value, int(threadIdx.x % 32) ^ mask, file, line);
}
inline uint32_t ballot(bool predicate, SIMT_SITE) {
  struct Args {
    bool predicate;
    uint32_t result;
  } a{predicate, 0};
  simt::meet<Args>(SIMT_HERE, a, [](Args* const(&lanes)[32]) {
    uint32_t bits = 0;
    for (int i = 0; i < 32; ++i) bits |= uint32_t(lanes[i]->predicate) << i;
    for (Args* l : lanes) l->result = bits;
  });
  return a.result;
}
inline void require(bool ok, const char* what, SIMT_SITE) {
  if (!ok) simt::fail(SIMT_HERE, what);
}
inline int lowest_bit(uint32_t x) { return __builtin_ctz(x); }
inline void atomic_add_shared(uint64_t* p, uint64_t x, SIMT_SITE) { simt::atomic_add_shared(p, x, SIMT_HERE); }

// --- arithmetic ------------------------------------------------------------------------------------------------------
inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }
template <class Int>
Int recomputed(Int x) {
  return x;
}
inline float add_rn(float a, float b) { return a + b; }  // built with -ffp-contract=off
inline float mul_rn(float a, float b) { return a * b; }
inline uint32_t float_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline float bits_float(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

inline uint32_t spread_signs(uint32_t low, uint32_t high, int byte) {
  return (low >> (8 * byte + 7) & 1) * 0xffffu | (high >> (8 * byte + 7) & 1) * 0xffff0000u;
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits_float(uint32_t(x.bits) << 16); }
inline float to_float(f16 x) {
  _Float16 h;
  std::memcpy(&h, &x, 2);
  return float(h);
}
template <class Element>
Element from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  const uint32_t u = float_bits(x);
  return {uint16_t(x != x ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
template <>
inline f16 from_float<f16>(float x) {
  const _Float16 h = _Float16(x);
  f16 r;
  std::memcpy(&r, &h, 2);
  return r;
}
template <class Element>
uint32_t pack2(float low, float high) {
  return from_float<Element>(low).bits | uint32_t(from_float<Element>(high).bits) << 16;
}
template <class Element>
float low_half(uint32_t pair) {
  return to_float(Element{uint16_t(pair)});
}
template <class Element>
float high_half(uint32_t pair) {
  return to_float(Element{uint16_t(pair >> 16)});
}

// --- memory ----------------------------------------------------------------------------------------------------------
inline Vec16 load16(const void* p, SIMT_SITE) {
  Vec16 v;
  simt::load_global(&v, p, 16, SIMT_HERE);
  return v;
}
inline void store16(void* p, Vec16 v, SIMT_SITE) { simt::store_global(p, &v, 16, SIMT_HERE); }
inline Vec8 load8(const void* p, SIMT_SITE) {
  Vec8 v;
  simt::load_global(&v, p, 8, SIMT_HERE);
  return v;
}
inline void store8(void* p, Vec8 v, SIMT_SITE) { simt::store_global(p, &v, 8, SIMT_HERE); }
inline Vec16 load16_shared(const void* p, SIMT_SITE) {
  Vec16 v;
  simt::load_shared(&v, p, 16, SIMT_HERE);
  return v;
}
inline void copy_async16(void* to, const void* from, bool valid, SIMT_SITE) {
  simt::copy_async(to, from, 16, valid, SIMT_HERE);
}
inline void copy_commit() { simt::copy_commit(); }
template <int kPendingGroups>
void copy_wait() {
  simt::copy_wait(kPendingGroups);
}

// --- order between blocks --------------------------------------------------------------------------------------------
inline int take_ticket(int* counter, SIMT_SITE) { return simt::take_ticket(counter, SIMT_HERE); }
inline void post(int* flag, int value, SIMT_SITE) { simt::post(flag, value, SIMT_HERE); }
inline int peek(const int* flag, SIMT_SITE) { return simt::peek(flag, SIMT_HERE); }
inline void wait_for(const int* flag, int value, int, SIMT_SITE) { simt::wait_for(flag, value, SIMT_HERE); }

// --- tensor cores ----------------------------------------------------------------------------------------------------
inline void ldmatrix(uint32_t (&r)[4], const void* row, SIMT_SITE) { simt::ldmatrix(r, row, false, SIMT_HERE); }
inline void ldmatrix_transposed(uint32_t (&r)[4], const void* row, SIMT_SITE) {
  simt::ldmatrix(r, row, true, SIMT_HERE);
}

// d = c + a b: a is 16 x 16, b 16 x 8, in the register layout of PTX's mma.m16n8k16.
template <class Element>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4], SIMT_SITE) {
  struct Args {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
    const float* c;
    simt::Site site;
  } args{d, a, {b0, b1}, c, SIMT_HERE};
  simt::meet<Args>(args.site, args, [](Args* const(&lanes)[32]) SIMT_UNTRACED {
    if (simt::trace::on()) simt::trace::mma(lanes[0]->site);
    float A[16][16], B[16][8], C[16][8] = {};
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = 2 * (lane % 4);
      for (int i = 0; i < 4; ++i) {
        A[g + i % 2 * 8][t + i / 2 * 8] = low_half<Element>(lanes[lane]->a[i]);
        A[g + i % 2 * 8][t + i / 2 * 8 + 1] = high_half<Element>(lanes[lane]->a[i]);
      }
      for (int i = 0; i < 2; ++i) {
        B[t + 8 * i][g] = low_half<Element>(lanes[lane]->b[i]);
        B[t + 8 * i + 1][g] = high_half<Element>(lanes[lane]->b[i]);
      }
    }
    for (int i = 0; i < 16; ++i)
      for (int k = 0; k < 16; ++k)
        for (int j = 0; j < 8; ++j) C[i][j] += A[i][k] * B[k][j];
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i)
        lanes[lane]->d[i] = lanes[lane]->c[i] + C[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2];
  });
}

// --- launch ----------------------------------------------------------------------------------------------------------
template <class Params>
void launch(void (*kernel)(Params), int64_t blocks, int threads, size_t shared_bytes, cudaStream_t,
            const Params& params) {
  simt::launch(reinterpret_cast<const void*>(kernel), unsigned(blocks), unsigned(threads), shared_bytes,
               [&] { kernel(params); });
}
inline int multiprocessors() { return simt::multiprocessors(); }
inline int64_t l2_bytes() { return simt::l2_bytes(); }

}  // namespace tinystory::cuda
