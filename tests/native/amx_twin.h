// A scalar twin of the AMX instructions that csrc/cpu/amx.h uses. It rounds as they do (Intel SDM, TDPBF16PS), and
// ends the program where hardware would fault. amx.h includes it with TINYSTORY_AMX_TWIN, in place of the instructions,
// which tests every path of ours on any machine; amx_trap.cpp runs it for the instructions themselves.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace amx_twin {

struct Twin {
  uint8_t config[64]{};  // as LDTILECFG reads it
  bool configured = false;
  uint32_t tile[8][16][16];
  int64_t loads = 0, dots = 0;

  static void require(bool holds, const char* what) {
    if (!holds) std::fprintf(stderr, "AMX's twin: %s\n", what), std::abort();
  }
  static Twin& own() {
    thread_local Twin twin;
    return twin;
  }

  void load_config(const void* from) {
    std::memcpy(config, from, sizeof config);
    require(config[0] == 1, "the palette is not 1");
    for (int i = 2; i < 64; ++i)
      if (i < 16 || (32 <= i && i < 48) || i >= 56)
        require(config[i] == 0, "a reserved byte of the configuration is set");
    for (int t = 0; t < 8; ++t) {
      require(config[48 + t] <= 16 && bytes_of(t) <= 64, "a tile is too large");
      require((config[48 + t] == 0) == (bytes_of(t) == 0), "a tile has rows but no columns, or columns but no rows");
    }
    configured = true;
    std::memset(tile, 0, sizeof tile);
  }
  void release() { configured = false; }

  void zero(int t) { std::memset(tile[t], 0, rows(t) * sizeof tile[t][0]); }
  void load(int t, const void* from, int64_t stride) {
    ++loads;
    for (int r = 0; r < rows(t); ++r) std::memcpy(tile[t][r], static_cast<const char*>(from) + r * stride, bytes_of(t));
  }
  void store(int t, void* to, int64_t stride) const {
    for (int r = 0; r < rows(t); ++r) std::memcpy(static_cast<char*>(to) + r * stride, tile[t][r], bytes_of(t));
  }
  // Products of the pairs' first halves and of their second halves are summed apart, then added to each other.
  void dot(int sums, int left, int right) {
    ++dots;
    const int depth = bytes_of(left) / 4;
    require(rows(sums) == rows(left) && rows(right) == depth && bytes_of(sums) == bytes_of(right),
            "the tiles' shapes do not fit");
    for (int m = 0; m < rows(sums); ++m)
      for (int n = 0; n < bytes_of(sums) / 4; ++n) {
        float part[2]{}, sum;
        for (int k = 0; k < depth; ++k)
          for (int e = 0; e < 2; ++e)
            part[e] = flushed(std::fma(half(tile[left][m][k], e), half(tile[right][k][n], e), part[e]));
        std::memcpy(&sum, &tile[sums][m][n], 4);
        sum = flushed(flushed(sum) + flushed(part[0] + part[1]));
        std::memcpy(&tile[sums][m][n], &sum, 4);
      }
  }

 private:
  int bytes_of(int t) const { return config[16 + 2 * t] | config[17 + 2 * t] << 8; }
  int rows(int t) const {
    require(configured, "no tiles are configured");
    require(config[48 + t] > 0, "the tile is not configured");
    return config[48 + t];
  }
  static float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
  static float half(uint32_t pair, int which) {
    const uint32_t bits = which ? pair & 0xffff0000 : pair << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return flushed(x);
  }
};

}  // namespace amx_twin

#if defined(TINYSTORY_AMX_TWIN)
#define TILE_CONFIG(c) amx_twin::Twin::own().load_config(&(c))
#define TILE_RELEASE() amx_twin::Twin::own().release()
#define TILE_ZERO(t) amx_twin::Twin::own().zero(t)
#define TILE_LOAD(t, p, stride) amx_twin::Twin::own().load(t, p, stride)
#define TILE_STORE(t, p, stride) amx_twin::Twin::own().store(t, p, stride)
#define TILE_DOT(sums, left, right) amx_twin::Twin::own().dot(sums, left, right)
#endif
