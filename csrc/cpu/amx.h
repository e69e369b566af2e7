// AMX: tiles of 16 x 16 sums of products of bf16 pairs. No other header uses AMX instructions. With TINYSTORY_AMX_TWIN,
// a scalar emulation replaces the instructions, so that every path is tested on machines without AMX.
#pragma once
// clang 14 spells the macro __AMXBF16__
#if defined(TINYSTORY_AMX_TWIN) || \
    (defined(__linux__) && (defined(__AMX_BF16__) || defined(__AMXBF16__)) && !defined(TINYSTORY_ARM_BF16_TWIN))
#define TINYSTORY_AMX
#include <cstdint>
#if defined(TINYSTORY_AMX_TWIN)
#include "amx_twin.h"  // of tests/native
#else
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
// macros, because the number of a tile is an immediate operand of the instruction
#define TILE_CONFIG(c) _tile_loadconfig(&(c))
#define TILE_RELEASE() _tile_release()
#define TILE_ZERO(t) _tile_zero(t)
#define TILE_LOAD(t, p, stride) _tile_loadd(t, p, stride)
#define TILE_STORE(t, p, stride) _tile_stored(t, p, stride)
#define TILE_DOT(sums, left, right) _tile_dpbf16ps(sums, left, right)
#endif

namespace tinystory::cpu::amx {

constexpr int64_t kRows = 16, kPacks = 16;  // rows of a tile; 32-bit columns of a tile, which are sums or pairs of bf16

// The operand of LDTILECFG. Tiles 0 to 3 hold 2 x 2 tiles of sums, tiles 4 and 5 rows of the left operand, and tiles 6
// and 7 columns of the right operand.
struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14]{};
  uint16_t column_bytes[16]{};
  uint8_t rows[16]{};

  // The upper tiles have `above` rows, the lower tiles have `below` rows. A tile with 0 rows must not be used.
  Config(int64_t above, int64_t below) {
    const int64_t of[8] = {above, above, below, below, above, below, kPacks, kPacks};
    for (int t = 0; t < 8; ++t) rows[t] = uint8_t(of[t]), column_bytes[t] = of[t] ? 4 * kPacks : 0;
  }
};

// Whether Linux permits AMX. The first call in a process requests permission for the 8 KiB of tile state. A thread gets
// its state with the first tile instruction.
inline bool permitted() {
#if defined(TINYSTORY_AMX_TWIN)
  return true;
#else
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool given = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return given;
#endif
}

// c (rows, columns) = a b, or with `add` c += a b, for 1 to 32 rows and 16 or 32 columns. The reduction is over n_k
// pairs, a multiple of 16. Strides are in elements of 4 bytes. The corner (row, k) of a tile of a lies at row am + k
// ak. The rows of the tile are am apart if ak is 1, else ak apart (ak is then 16). The tiles must be configured for
// these rows.
template <bool kBelow, bool kRight>
inline void block(int64_t n_k, const uint32_t* a, int64_t am, int64_t ak, const uint32_t* b, int64_t bk, float* c,
                  int64_t cm, bool add, const char* next, int64_t lines) {
  float* below = c + kRows * cm;
  const int64_t apart = 4 * (ak == 1 ? am : ak);
  if (add) {
    TILE_LOAD(0, c, 4 * cm);
    if constexpr (kRight) TILE_LOAD(1, c + kPacks, 4 * cm);
    if constexpr (kBelow) TILE_LOAD(2, below, 4 * cm);
    if constexpr (kBelow && kRight) TILE_LOAD(3, below + kPacks, 4 * cm);
  } else {
    TILE_ZERO(0);
    if constexpr (kRight) TILE_ZERO(1);
    if constexpr (kBelow) TILE_ZERO(2);
    if constexpr (kBelow && kRight) TILE_ZERO(3);
  }
  for (int64_t k = 0; k < n_k; k += kPacks, b += kPacks * bk) {
    TILE_LOAD(6, b, 4 * bk);
    TILE_LOAD(4, a + k * ak, apart);
    for (int64_t i = 0; i < lines; ++i, next += 64) __builtin_prefetch(next, 0, 2);
    TILE_DOT(0, 4, 6);
    if constexpr (kRight) {
      TILE_LOAD(7, b + kPacks, 4 * bk);
      TILE_DOT(1, 4, 7);
    }
    if constexpr (kBelow) {
      TILE_LOAD(5, a + kRows * am + k * ak, apart);
      TILE_DOT(2, 5, 6);
      if constexpr (kRight) TILE_DOT(3, 5, 7);
    }
  }
  TILE_STORE(0, c, 4 * cm);
  if constexpr (kRight) TILE_STORE(1, c + kPacks, 4 * cm);
  if constexpr (kBelow) TILE_STORE(2, below, 4 * cm);
  if constexpr (kBelow && kRight) TILE_STORE(3, below + kPacks, 4 * cm);
}

// The same for any number of rows, and columns in multiples of 16. Calls done(row, n) after each n rows. Configures and
// releases the thread's tiles.
template <class Done>
void panel(int64_t rows, int64_t columns, int64_t n_k, const uint32_t* a, int64_t am, int64_t ak, const uint32_t* b,
           int64_t bk, float* c, int64_t cm, bool add, const Done& done) {
  int64_t configured = 0;
  // The memory after a whole panel is read next and is not in the L2 cache, so it is prefetched, evenly over the rows.
  const auto* next = reinterpret_cast<const char*>(b + n_k * bk);
  const int64_t lines = bk == 2 * kPacks ? (2 * kPacks + (rows + 31) / 32 - 1) / ((rows + 31) / 32) : 0;
  for (int64_t r = 0; r < rows; r += 2 * kRows) {
    const int64_t n = rows - r < 2 * kRows ? rows - r : 2 * kRows;
    if (n != configured) {
      const Config config(n < kRows ? n : kRows, n < kRows ? 0 : n - kRows);
      asm volatile("" : : "r"(&config) : "memory");  // the intrinsics do not declare all memory that they read
      TILE_CONFIG(config);
      configured = n;
    }
    for (int64_t j = 0; j < columns; j += 2 * kPacks) {
      const bool right = columns - j > kPacks;
      const auto run = n > kRows ? (right ? block<true, true> : block<true, false>)
                                 : (right ? block<false, true> : block<false, false>);
      run(n_k, a + r * am, am, ak, b + j, bk, c + r * cm + j, cm, add, next, lines);
      next += n_k / kPacks * lines * 64;
    }
    done(r, n);
  }
  TILE_RELEASE();
}

#undef TILE_CONFIG
#undef TILE_RELEASE
#undef TILE_ZERO
#undef TILE_LOAD
#undef TILE_STORE
#undef TILE_DOT

}  // namespace tinystory::cpu::amx
#endif
