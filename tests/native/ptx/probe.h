// The results of the probe, a kernel that applies every primitive of primitives.cuh to arbitrary bits.
#pragma once
#include <cstdint>

namespace probe {

constexpr int kThreads = 64, kInputs = 8;  // words per thread

// How a result may differ from the twin's: not at all; in a NaN's payload; by the ISA's bounds of ex2 and lg2.
enum Tolerance { exact, f32, bf16x2, f16x2, ex2, lg2 };
struct Result {
  const char* primitive;
  int words;
  Tolerance tolerance;
};
constexpr Result kResults[] = {// in the order in which the kernel writes them, per thread
                               {"exp2_fast", 1, ex2},
                               {"log2_fast", 1, lg2},
                               {"spread_signs", 4, exact},
                               {"pack2<bf16>", 1, bf16x2},
                               {"pack2<f16>", 1, f16x2},
                               {"from_float", 1, f16x2},
                               {"to_float", 2, f32},
                               {"low_half, high_half", 4, f32},
                               {"add_rn, mul_rn", 2, f32},
                               {"float_bits, recomputed", 2, exact},
                               {"shuffle", 3, exact},
                               {"shuffle_xor", 1, exact},
                               {"ballot", 1, exact},
                               {"lowest_bit", 1, exact},
                               {"warp_sum, warp_max, warp_prefix_sum", 4, exact},
                               {"load16, load8", 6, exact},
                               {"load16 and load8 of what was stored", 6, exact},
                               {"copy_async16, of two groups", 8, exact},
                               {"ldmatrix", 4, exact},
                               {"ldmatrix_transposed", 4, exact},
                               {"load16_shared", 4, exact},
                               {"mma<bf16>", 4, exact},
                               {"mma<f16>", 4, exact},
                               {"mma, used in a branch", 4, exact},
                               {"atomic_add_shared", 2, exact},
                               {"sync_warp, sync_block", 2, exact},
                               {"take_ticket, post, peek, wait_for", 1, exact}};
constexpr int words() {
  int all = 0;
  for (const Result& r : kResults) all += r.words;
  return (all + 3) / 4 * 4;
}
constexpr int kWords = words();

struct Params {
  const uint32_t* in;       // kInputs words per thread
  uint32_t *out, *scratch;  // kWords and 8 words per thread
  int* turns;               // 0: a ticket for each block, then a flag for each
  uint32_t* carry;          // a word per thread of a block, passed from block to block
};

}  // namespace probe

void probe_ptx(const probe::Params&, int blocks);
void probe_twin(const probe::Params&, int blocks);
