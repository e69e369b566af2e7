// All operations of the kernels that are not plain C++. With nvcc they are PTX instructions and intrinsics (sm_80 and
// later). With a C++ compiler, tests/native/simt provides them, so the same kernel sources run without a GPU.
#pragma once
#include <cassert>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../philox.h"
#include "kernels.cuh"

namespace tinystory::cuda {

constexpr int kWarpSize = 32;
constexpr int kMaxSharedBytes = 99 << 10;  // per block on sm_86, sm_89 and sm_120; other GPUs have more
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

using f32 = float;
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct alignas(16) Vec16 {
  uint32_t word[4];
};
struct alignas(8) Vec8 {
  uint32_t word[2];
};

}  // namespace tinystory::cuda

#ifdef __CUDACC__
#include <cuda_runtime.h>

namespace tinystory::cuda {

// --- threads ---------------------------------------------------------------------------------------------------------
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(128) char shared[];
  return shared;
}
__device__ __forceinline__ void sync_block() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
template <class Value>
__device__ __forceinline__ Value shuffle(Value value, int source) {
  return __shfl_sync(0xffffffffu, value, source);
}
template <class Value>
__device__ __forceinline__ Value shuffle_xor(Value value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
__device__ __forceinline__ uint32_t ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }
// A device-side assertion, as in PyTorch's kernels. It is for invalid values that only the kernel can see; a failure is
// an error of the stream.
__device__ __forceinline__ void require(bool ok, const char* what) {
  if (!ok) __assert_fail(what, __FILE__, __LINE__, __func__);
}
__device__ __forceinline__ int lowest_bit(uint32_t x) { return __ffs(int(x)) - 1; }
// Adds x to *p by two 32-bit additions with a carry. A 64-bit addition in shared memory would be a compare-and-swap
// loop, which repeats when several threads add to the same sum. The sum is valid only after a barrier.
__device__ __forceinline__ void atomic_add_shared(uint64_t* p, uint64_t x) {
  unsigned* const half = reinterpret_cast<unsigned*>(p);
  const unsigned low = unsigned(x), before = atomicAdd(half, low);
  const unsigned high = unsigned(x >> 32) + (before + low < before);
  if (high) atomicAdd(half + 1, high);
}

// --- arithmetic ------------------------------------------------------------------------------------------------------
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Addition and multiplication that the compiler must not contract into an FMA.
__device__ __forceinline__ float add_rn(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float mul_rn(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ uint32_t float_bits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float bits_float(uint32_t u) { return __uint_as_float(u); }

// Returns x, but the compiler does not know that. So the compiler cannot hoist computations on x out of a loop.
// Recomputing an address in each iteration is cheaper than keeping the address in one of the loop's scarce registers.
template <class Int>
__device__ __forceinline__ Int recomputed(Int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// The top bit of byte `byte` of `low`, spread over the low half (0xffff or 0), and that of `high` over the high half.
__device__ __forceinline__ uint32_t spread_signs(uint32_t low, uint32_t high, int byte) {
  uint32_t r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(low), "r"(high), "r"(0xcc88u + 0x1111u * uint32_t(byte)));
  return r;
}

// Two 16-bit elements in one register, the first in the low half.
template <class Element>
__device__ __forceinline__ uint32_t pack2(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack2<bf16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <>
__device__ __forceinline__ uint32_t pack2<f16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ __forceinline__ float to_float(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
template <class Element>
__device__ __forceinline__ Element from_float(float x) {
  return {uint16_t(pack2<Element>(x, 0.0f))};
}
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <class Element>
__device__ __forceinline__ float low_half(uint32_t pair) {
  return to_float(Element{uint16_t(pair)});
}
template <class Element>
__device__ __forceinline__ float high_half(uint32_t pair) {
  return to_float(Element{uint16_t(pair >> 16)});
}

// --- memory ----------------------------------------------------------------------------------------------------------
__device__ __forceinline__ size_t global_address(const void* p) { return __cvta_generic_to_global(p); }
__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
// Loads and stores of 16 bytes, aligned to 16, or 8 bytes, aligned to 8. They are PTX, because the compiler splits an
// access if it cannot prove the alignment. Loads have a memory clobber too; otherwise the compiler could move them past
// its own stores.
__device__ __forceinline__ Vec16 load16(const void* p) {
  Vec16 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(global_address(p))
               : "memory");
  return v;
}
__device__ __forceinline__ void store16(void* p, Vec16 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(global_address(p)), "r"(v.word[0]), "r"(v.word[1]),
               "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}
__device__ __forceinline__ Vec8 load8(const void* p) {
  Vec8 v;
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];"
               : "=r"(v.word[0]), "=r"(v.word[1])
               : "l"(global_address(p))
               : "memory");
  return v;
}
__device__ __forceinline__ void store8(void* p, Vec8 v) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(global_address(p)), "r"(v.word[0]), "r"(v.word[1]) : "memory");
}
__device__ __forceinline__ Vec16 load16_shared(const void* p) {
  Vec16 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "r"(shared_address(p))
               : "memory");
  return v;
}
// cp.async: copies 16 bytes from global to shared memory, bypassing registers; writes zeros if `valid` is false. The
// issuing thread sees the result after copy_wait; other threads see the result after a barrier that follows copy_wait.
__device__ __forceinline__ void copy_async16(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(global_address(from)),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPendingGroups>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPendingGroups) : "memory");
}

// --- order between blocks --------------------------------------------------------------------------------------------
// The number of earlier calls with this counter. Tickets increase in the order in which blocks start, so a block may
// wait for a block with a lower ticket, which is running or has ended.
__device__ __forceinline__ int take_ticket(int* counter) { return atomicAdd(counter, 1); }
// Sets the flag for other blocks (release). A thread that sees the value in wait_for also sees everything that this
// thread wrote before, and everything that this block wrote before its last sync_block.
__device__ __forceinline__ void post(int* flag, int value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(global_address(flag)), "r"(value) : "memory");
}
// A recent value of the flag, by a relaxed load, which orders no other accesses.
__device__ __forceinline__ int peek(const int* flag) {
  int value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(global_address(flag)) : "memory");
  return value;
}
// Waits until the flag has the value (acquire). seen: result of an earlier peek, so that the latency of the first load
// is hidden.
__device__ __forceinline__ void wait_for(const int* flag, int value, int seen) {
  while (seen != value) seen = peek(flag);
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
}

// --- tensor cores ----------------------------------------------------------------------------------------------------
// Loads four 8 x 8 matrices of 16-bit elements. Lane 8 i + j passes the address of row j of matrix i.
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d = c + a b, where a is 16 x 16 and b is 16 x 8; d may be c. The asm is volatile; otherwise the compiler could sink
// an mma into a branch that uses the result but that not all lanes take.
template <class Element>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                    const float (&c)[4]);
template <>
__device__ __forceinline__ void mma<bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                          const float (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}
template <>
__device__ __forceinline__ void mma<f16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                         const float (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// --- launch ----------------------------------------------------------------------------------------------------------
inline void check(cudaError_t e) {
  if (e != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(e));
}
template <class Params>
void launch(void (*kernel)(Params), int64_t blocks, int threads, size_t shared_bytes, cudaStream_t stream,
            const Params& params) {
  if (blocks > INT32_MAX) throw std::invalid_argument("CUDA: more than 2^31 - 1 blocks");
  if (shared_bytes > 48 << 10)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
  kernel<<<unsigned(blocks), unsigned(threads), shared_bytes, stream>>>(params);
  check(cudaGetLastError());
}
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}
inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }
inline int64_t l2_bytes() { return device_attribute(cudaDevAttrL2CacheSize); }

}  // namespace tinystory::cuda
#else
#include "simt_primitives.h"
#endif

// --- derived ---------------------------------------------------------------------------------------------------------
namespace tinystory::cuda {

__device__ __forceinline__ int lane_id() { return int(threadIdx.x % kWarpSize); }
// The shuffle broadcasts the value of lane 0, so that the compiler knows that the warp id is uniform over the warp, and
// keeps branches on it convergent.
__device__ __forceinline__ int warp_id() { return shuffle(int(threadIdx.x) / kWarpSize, 0); }

// Sum or maximum over the aligned group of kLanes lanes that contains this lane.
template <int kLanes = kWarpSize, class Value>
__device__ __forceinline__ Value warp_sum(Value x) {
#pragma unroll
  for (int mask = 1; mask < kLanes; mask *= 2) x += shuffle_xor(x, mask);
  return x;
}
template <int kLanes = kWarpSize>
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int mask = 1; mask < kLanes; mask *= 2) x = fmaxf(x, shuffle_xor(x, mask));
  return x;
}

// Inclusive prefix sum over the lanes.
template <class Value>
__device__ __forceinline__ Value warp_prefix_sum(Value x) {
  const int lane = lane_id();
#pragma unroll
  for (int step = 1; step < kWarpSize; step *= 2) {
    const Value before = shuffle(x, lane - step);
    if (lane >= step) x += before;
  }
  return x;
}

// unpack, pack: convert the elements of a 16-byte vector to floats, and back.
template <class Element>
constexpr int kVecElements = 16 / int(sizeof(Element));
__device__ __forceinline__ void unpack(float (&x)[4], Vec16 v, float) {
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = bits_float(v.word[i]);
}
template <class Element>
__device__ __forceinline__ void unpack(float (&x)[8], Vec16 v, Element) {
#pragma unroll
  for (int i = 0; i < 4; ++i) x[2 * i] = low_half<Element>(v.word[i]), x[2 * i + 1] = high_half<Element>(v.word[i]);
}
__device__ __forceinline__ Vec16 pack(const float (&x)[4], float) {
  return {{float_bits(x[0]), float_bits(x[1]), float_bits(x[2]), float_bits(x[3])}};
}
template <class Element>
__device__ __forceinline__ Vec16 pack(const float (&x)[8], Element) {
  return {
      {pack2<Element>(x[0], x[1]), pack2<Element>(x[2], x[3]), pack2<Element>(x[4], x[5]), pack2<Element>(x[6], x[7])}};
}

// load4, store4: access four elements at once.
__device__ __forceinline__ void load4(float (&x)[4], const float* p) { unpack(x, load16(p), float{}); }
template <class Element>
__device__ __forceinline__ void load4(float (&x)[4], const Element* p) {
  const Vec8 v = load8(p);
#pragma unroll
  for (int i = 0; i < 2; ++i) x[2 * i] = low_half<Element>(v.word[i]), x[2 * i + 1] = high_half<Element>(v.word[i]);
}
__device__ __forceinline__ void store4(float* p, const float (&x)[4]) { store16(p, pack(x, float{})); }
template <class Element>
__device__ __forceinline__ void store4(Element* p, const float (&x)[4]) {
  store8(p, {{pack2<Element>(x[0], x[1]), pack2<Element>(x[2], x[3])}});
}

}  // namespace tinystory::cuda
