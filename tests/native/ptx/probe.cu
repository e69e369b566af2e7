// Compiled twice: by nvcc into PTX, which is interpreted, and by the C++ compiler with the twins of the SIMT machine.
#include "probe.h"

#include "../../../csrc/cuda/primitives.cuh"

namespace tinystory::cuda {
namespace {

constexpr int kRowsAt = 0, kPlainAt = 2048, kBinsAt = 3072, kTicketAt = 3200, kShared = 3328;

// 16-bit integers from -7 to 7: their products and sums are exact in any order.
template <class Element>
__device__ __forceinline__ uint32_t small_pair(uint32_t x) {
  return pack2<Element>(float(int(x % 15) - 7), float(int(x / 15 % 15) - 7));
}

template <class Element>
__device__ __forceinline__ void multiply(float (&d)[4], Vec16 v, uint32_t b0, uint32_t b1) {
  uint32_t a[4];
  for (int i = 0; i < 4; ++i) a[i] = small_pair<Element>(v.word[i]);
  const float c[4] = {1, 20, 300, float(lane_id() * 4000)};
  mma<Element>(d, a, small_pair<Element>(b0), small_pair<Element>(b1), c);
}

__global__ void __launch_bounds__(probe::kThreads) probe_kernel(probe::Params p) {
  const int thread = int(threadIdx.x), id = int(blockIdx.x) * probe::kThreads + thread, lane = lane_id();
  const uint32_t* in = p.in + probe::kInputs * id;
  const Vec16 v0 = load16(in), v1 = load16(in + 4);
  const Vec8 w = load8(in + 2);
  const uint32_t a = v0.word[0], b = v0.word[1];
  const float fa = bits_float(a), fb = bits_float(b);
  uint32_t r[probe::kWords] = {};
  int n = 0;
  r[n++] = float_bits(exp2_fast(fa));
  r[n++] = float_bits(log2_fast(fabsf(fa)));
  for (int i = 0; i < 4; ++i) r[n++] = spread_signs(a, b, i);
  r[n++] = pack2<bf16>(fa, fb);
  r[n++] = pack2<f16>(fa, fb);
  r[n++] = from_float<f16>(fa).bits;
  r[n++] = float_bits(to_float(bf16{uint16_t(a)}));
  r[n++] = float_bits(to_float(f16{uint16_t(a)}));
  r[n++] = float_bits(low_half<bf16>(b)), r[n++] = float_bits(high_half<bf16>(b));
  r[n++] = float_bits(low_half<f16>(b)), r[n++] = float_bits(high_half<f16>(b));
  r[n++] = float_bits(add_rn(mul_rn(fa, fb), fa)), r[n++] = float_bits(mul_rn(fa, fb));
  r[n++] = float_bits(bits_float(b)), r[n++] = recomputed(a);

  // Among the lanes of a warp.
  const uint64_t wide = uint64_t(a) << 32 | b, other = shuffle(wide, int(v0.word[2]));
  r[n++] = uint32_t(other), r[n++] = uint32_t(other >> 32), r[n++] = shuffle(a, int(b % 96) - 48);
  r[n++] = shuffle_xor(a, int(shuffle(b, 0) % 32));
  r[n++] = ballot(a % 3 == 0);
  r[n++] = uint32_t(lowest_bit(a | 1u << 31));
  r[n++] = warp_sum(a), r[n++] = float_bits(warp_max<8>(float(int(a) >> 8)));
  const uint64_t sum = warp_prefix_sum(wide);
  r[n++] = uint32_t(sum), r[n++] = uint32_t(sum >> 32);

  // Global memory, also after plain stores and before others to the same address.
  for (int i = 0; i < 4; ++i) r[n++] = v1.word[i];
  for (int i = 0; i < 2; ++i) r[n++] = w.word[i];
  uint32_t* const own = p.scratch + 8 * id;
  for (int i = 0; i < 4; ++i) own[i] = a + uint32_t(i);
  const Vec16 stored = load16(own);
  for (int i = 0; i < 4; ++i) own[i] = b;
  own[4] = a, own[5] = b;
  const Vec8 stored8 = load8(own + 4);
  own[4] = own[5] = 0;
  for (int i = 0; i < 4; ++i) r[n++] = stored.word[i];
  for (int i = 0; i < 2; ++i) r[n++] = stored8.word[i];

  // Each thread copies a row to the warp's part (some rows are not valid), and one more row in a second group.
  char* const rows = shared_memory() + kRowsAt + thread / kWarpSize * 1024;
  copy_async16(rows + 16 * lane, in + 4, b % 4 != 0);
  copy_commit();
  copy_async16(rows + 512 + 16 * lane, in, a % 4 != 0);
  copy_commit();
  copy_wait<1>();
  Vec16 row = load16_shared(rows + 16 * lane);
  for (int i = 0; i < 4; ++i) r[n++] = row.word[i];
  copy_wait<0>();
  row = load16_shared(rows + 512 + 16 * lane);
  for (int i = 0; i < 4; ++i) r[n++] = row.word[i];
  sync_warp();
  uint32_t m[4];
  ldmatrix(m, rows + 16 * (lane ^ 5));
  for (int i = 0; i < 4; ++i) r[n++] = m[i];
  ldmatrix_transposed(m, rows + 16 * (lane * 7 % 32));
  for (int i = 0; i < 4; ++i) r[n++] = m[i];
  row = load16_shared(rows + 16 * (31 - lane));
  for (int i = 0; i < 4; ++i) r[n++] = row.word[i];

  float d[4];
  multiply<bf16>(d, v1, v0.word[2], v0.word[3]);
  for (int i = 0; i < 4; ++i) r[n++] = float_bits(d[i]);
  multiply<f16>(d, v1, v0.word[2], v0.word[3]);
  for (int i = 0; i < 4; ++i) r[n++] = float_bits(d[i]);
  multiply<bf16>(d, v1, v0.word[3], v0.word[2]);
  for (int i = 0; i < 4; ++i) r[n + i] = 0;
  if (a % 2) {
    for (int i = 0; i < 4; ++i) r[n + i] = float_bits(d[i]);
  }
  n += 4;

  // Among the threads of a block.
  auto* const bins = reinterpret_cast<uint64_t*>(shared_memory() + kBinsAt);
  auto* const plain = reinterpret_cast<uint32_t*>(shared_memory() + kPlainAt);
  if (thread < 8) bins[thread] = 0;
  sync_block();
  atomic_add_shared(bins + a % 8, wide);
  plain[thread] = a;
  sync_warp();
  const uint32_t of_warp = plain[thread ^ 1];
  sync_block();
  r[n++] = uint32_t(bins[thread % 8]), r[n++] = uint32_t(bins[thread % 8] >> 32);
  r[n++] = of_warp, r[n++] = plain[probe::kThreads - 1 - thread];

  // Between blocks: each block adds to the result of the block before.
  auto* const ticket = reinterpret_cast<int*>(shared_memory() + kTicketAt);
  if (thread == 0) *ticket = take_ticket(p.turns);
  sync_block();
  const int turn = *ticket;
  int* const flags = p.turns + 1;
  if (thread == kWarpSize && turn > 0) wait_for(flags + turn - 1, 7, peek(flags + turn - 1));
  sync_block();
  r[n++] = p.carry[thread] += turn == 0 ? 1u : uint32_t(turn);
  sync_block();
  if (thread == 0) post(flags + turn, 7);

  uint32_t* const out = p.out + int64_t(probe::kWords) * id;
  for (int i = 0; i < probe::kWords - 4; i += 4) store16(out + i, {{r[i], r[i + 1], r[i + 2], r[i + 3]}});
  for (int i = probe::kWords - 4; i < probe::kWords; i += 2) store8(out + i, {{r[i], r[i + 1]}});
}

}  // namespace
}  // namespace tinystory::cuda

void PROBE(const probe::Params& p, int blocks) {
  using namespace tinystory::cuda;
  launch(probe_kernel, blocks, probe::kThreads, kShared, nullptr, p);
}
