// Linear layers, forward and backward, fused with bias, tanh GELU and the derivative of GELU. Layer norm, fused with
// the sum of the residual stream and a branch.
//
// All three GEMMs use gemm.h. The right operand is first packed in panels; packing the weight takes 1 to 2 % of the
// time of a GEMM, so packed weights are not kept between calls. Each panel is multiplied with blocks of rows that stay
// in the L2 cache. The result of a row depends only on this row, and sums over rows are computed in blocks of fixed
// size. So neither the number of threads nor the rest of the batch changes a bit of a row.
#include <algorithm>
#include <tuple>

#include "../philox.h"
#include "gemm.h"

namespace tinystory::cpu {
namespace {

template <class Policy>
struct Layer {
  using Pack = typename Policy::Pack;
  static constexpr int64_t kWidth = kPanel<Policy>;
  // Whether the left operand of grad_weight is the transposed gradient, in pairs of rows, as AMX needs it (bf16). For
  // f32 the operand is the gradient in place.
  static constexpr bool kTransposed = Policy::kPack == 2;
  static constexpr DType kStored = Policy::kPack == 2 ? DType::bf16 : DType::f32;

  const Linear& l;
  const int64_t in, out, pairs;  // number of Packs per row of x, per row of y, and per column of the chunk (padded)
  const LeftLayout<Policy> x_rows{in}, y_rows{out}, columns{pairs};
  const bool tiled = x_rows.apart > 1;
  Pack *panels, *rows, *grad_rows, *x_pairs, *grad_columns;
  size_t bytes;

  explicit Layer(const Linear& l)
      : l(l), in(l.K / Policy::kPack), out(l.N / Policy::kPack),
        pairs(round_up(round_up(l.rows, Policy::kPack) / Policy::kPack, kPadding<Policy>)) {
    Arena m{static_cast<char*>(l.workspace), 0};
    panels = m.take<Pack>(std::max(round_up(l.N, kColumns) * in, round_up(l.K, kColumns) * out));
    const int64_t n = l.grad_y ? pairs : 0, whole = round_up(l.rows, x_rows.apart);
    rows = m.take<Pack>(l.grad_y || x_stored() ? 0 : whole * in);
    grad_rows = m.take<Pack>(!l.grad_y || grad_stored() ? 0 : whole * out);
    x_pairs = m.take<Pack>(n * round_up(l.K, kColumns));
    grad_columns = m.take<Pack>(kTransposed ? n * l.N : 0);
    bytes = m.used;
  }

  const void* x_at(int64_t row) const { return at(l.x, l.x_type, (l.first + row) * l.K); }
  // x_stored: whether the left operand of the forward pass is x in place; otherwise it is a copy, `rows`.
  bool x_tiled() const { return tiled && l.N > 512; }  // with fewer columns, the copy costs more than it gains
  bool x_stored() const { return !x_tiled() && l.x_type == kStored; }
  // Whether the gradient with respect to x weight^T + bias is grad_y in place; otherwise it is stored in grad_rows.
  bool grad_stored() const { return !tiled && !l.gelu && l.y_type == kStored; }
  const Pack* grads() const {
    return grad_stored() ? static_cast<const Pack*>(at(l.grad_y, l.y_type, l.first * l.N)) : grad_rows;
  }

  // items: blocks of 64 rows of the weight, or of 32 rows in the backward pass
  void pack_weight(int64_t begin, int64_t end) {
    const int64_t height = l.grad_y ? kWeightRows : kColumns;
    Pack* w = reinterpret_cast<Pack*>(scratch(height * in * sizeof(Pack)));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = std::min(height, l.N - i * height);
      pack_rows<Policy>(w, l.weight + i * height * l.K, DType::f32, l.K, n, height, l.K, l.K);
      if (l.grad_y) pair_rows<Policy>(panels + i * height / Policy::kPack * kWidth, w, height, l.K, kWidth, out);
      else transpose_rows<Policy>(panels + i * height * in, w, height, l.K);
    }
  }

  void pack_x(int64_t begin, int64_t end) {
    if (x_stored()) return;
    Pack* row = reinterpret_cast<Pack*>(scratch(in * sizeof(Pack)));
    for (int64_t i = begin; i < end; ++i) {
      if (!x_tiled()) row = rows + i * in;
      pack_rows<Policy>(row, x_at(i), l.x_type, l.K, 1, 1, l.K, l.K);
      if (x_tiled())
        for (int64_t k = 0; k < in; k += 16) std::memcpy(rows + x_rows.at(i, k), row + k, 16 * sizeof(Pack));
    }
  }

  // Number of items of `matmul`. An item is a block of rows that share a panel, times 64 columns.
  static int64_t tiles(int64_t rows, int64_t packs, int64_t columns) {
    const int64_t together = block_rows<Policy>(rows, packs);
    return (rows + together - 1) / together * ((columns + kColumns - 1) / kColumns);
  }
  // Multiplies the rows of a, (rows, packs), with the panels. Calls finish(row, column, sum) for each vector of the
  // items.
  template <class F>
  void matmul(int64_t begin, int64_t end, Left<Policy> a, int64_t packs, int64_t columns, const F& finish) const {
    const int64_t across = (columns + kColumns - 1) / kColumns, together = block_rows<Policy>(l.rows, packs);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item / across * together, column = item % across * kColumns;
      const int64_t last = std::min(l.rows, first + together);
      const int64_t share = std::min(l.rows - last, together) * packs / across;  // part of a's next block to prefetch
      gemm_tile<Policy>(first, last, column, std::min(columns, column + kColumns), packs, a,
                        {panels, kWidth, packs * kWidth}, finish, a.part(last, 0).at + item % across * share, share);
    }
  }

  void forward(int64_t begin, int64_t end) {
    const auto* x = x_stored() ? static_cast<const Pack*>(x_at(0)) : rows;
    matmul(begin, end, x_tiled() ? x_rows(x) : Left<Policy>{x, in, 1}, in, l.N, [&](int64_t row, int64_t j, vf y) {
      const int64_t to = (l.first + row) * l.N + j;
      __builtin_prefetch(at(l.y, l.y_type, to + kAhead * l.N), 1, kCache);
      y += load<vf>(l.bias + j);
      if (l.gelu) {
        const auto [value, slope] = gelu_and_slope(y);
        stream_as(at(l.slope, l.gemm_type, to), l.gemm_type, slope);
        y = value;
      }
      store_as(at(l.y, l.y_type, to), l.y_type, y);
    });
    end_streams();
  }

  // items: blocks of kLinearRows rows. Packs the gradient with respect to x weight^T + bias by rows, and for bf16 also
  // by columns. Packs x by pairs of rows.
  void pack_grad(int64_t begin, int64_t end) {
    constexpr int64_t kStrip = 128;  // columns at a time, so that their pairs of rows stay in the L1 cache
    Pack* copy = reinterpret_cast<Pack*>(scratch(std::max(kLinearRows * in, kLinearRows / 2 * kStrip) * sizeof(Pack)));
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kLinearRows, n = std::min(kLinearRows, l.rows - first),
                    pair0 = first / Policy::kPack;
      const int64_t padded = round_up(n, Policy::kPack * kPadding<Policy>), packs = padded / Policy::kPack;
      float* bias = l.bias_parts + (l.first / kLinearRows + block) * l.N;
      for (int64_t j0 = 0; j0 < l.N; j0 += kStrip) {
        const int64_t width = std::min(kStrip, l.N - j0);
        vf sums[kStrip / W]{};
        for (int64_t i = 0; i < padded; i += Policy::kPack)
          for (int64_t j = 0; j < width; j += W) {
            vf g[2]{};
            for (int64_t e = 0; e < Policy::kPack && i + e < n; ++e) {
              const int64_t row = first + i + e, from = (l.first + row) * l.N + j0 + j;
              __builtin_prefetch(at(l.grad_y, l.y_type, from + kStrip), 0, 2);
              g[e] = load_as<vf>(at(l.grad_y, l.y_type, from), l.y_type);
              if (l.gelu) {
                __builtin_prefetch(at(l.slope, l.gemm_type, from + kStrip), 0, 2);
                g[e] *= load_as<vf>(at(l.slope, l.gemm_type, from), l.gemm_type);
              }
              sums[j / W] += g[e];
              if (!grad_stored()) {
                const int64_t k = (j0 + j) / Policy::kPack;  // index of the first Pack that is stored
                store_elements<Policy>(grad_rows + y_rows.at(row, k), 0, g[e]);
              }
            }
            if constexpr (kTransposed) store(copy + i / 2 * kStrip + j, pair(to_bf16(g[0]), to_bf16(g[1])));
          }
        for (int64_t j = 0; j < width; j += W) store(bias + j0 + j, sums[j / W]);
        if constexpr (kTransposed)
          for (int64_t k = 0; k < packs; k += kPadding<Policy>)
            for (int64_t j = 0; j < width; j += 16)
              transpose_packs(grad_columns + columns.at(j0 + j, pair0 + k), columns.stride(), copy + k * kStrip + j,
                              kStrip, kPadding<Policy>, 16);
      }
      // x is read in place if the rows are already Packs and need no padding, else from `copy`
      const void* x = x_at(first);
      if (l.x_type != kStored || padded > n) {
        pack_rows<Policy>(copy, x, l.x_type, l.K, n, padded, l.K, l.K);
        x = copy;
      }
      pair_rows<Policy>(x_pairs + pair0 * kWidth, static_cast<const Pack*>(x), padded, l.K, kWidth, pairs);
    }
  }

  void grad_x(int64_t begin, int64_t end) {
    matmul(begin, end, y_rows(grads()), out, l.K, [&](int64_t row, int64_t j, vf g) {
      const int64_t to = (l.first + row) * l.K + j;
      __builtin_prefetch(at(l.grad_x, l.x_type, to + kAhead * l.K), 1, kCache);
      store_as(at(l.grad_x, l.x_type, to), l.x_type, g);
    });
  }

  // Rows and columns per item of grad_weight. Items are large, because each item reads its operands again, but small
  // enough for equal shares of the threads.
  std::pair<int64_t, int64_t> weight_tile() const {
    if (kForAmx<Policy> && on_tiles<Policy>()) return {block_rows<Policy>(l.N, pairs), kColumns};
    if (kTransposed) return {kColumns, kColumns};
    int64_t down = (l.N + 127) / 128, across = (l.K + 255) / 256;
    const auto uneven = [&] { return down * across < 2 * l.threads || down * across % l.threads; };
    while (uneven() && down < l.N / 48) ++down;
    while (uneven() && across < l.K / kColumns) ++across;
    return {round_up((l.N + down - 1) / down, kMicroRows), round_up((l.K + across - 1) / across, kWidth)};
  }
  int64_t weight_tiles() const {
    const auto [rows, width] = weight_tile();
    return (l.N + rows - 1) / rows * ((l.K + width - 1) / width);
  }
  void grad_weight(int64_t begin, int64_t end) {
    const auto [together, width] = weight_tile();
    const int64_t across = (l.K + width - 1) / width;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / across * together, c = item % across * width;
      const Left<Policy> left = kTransposed ? columns(grad_columns).part(n, 0) : Left<Policy>{grads() + n, 1, l.N};
      gemm<Policy>(std::min(together, l.N - n), std::min(width, l.K - c), pairs, left,
                   {x_pairs + c * pairs, kWidth, pairs * kWidth}, l.grad_weight + n * l.K + c, l.K, l.first > 0);
    }
  }

 private:
  static constexpr int64_t kWeightRows = 32;
  // Rows of the result are prefetched kAhead rows ahead into the cache of locality kCache, because they are too far
  // apart for the hardware prefetcher.
  static constexpr int64_t kAhead = Policy::kPack == 1 ? kMicroRows : 32;
  static constexpr int kCache = Policy::kPack == 1 ? 3 : 2;
};

template <class F>
auto with_layer(const Linear& l, const F& f) {
#if defined(TINYSTORY_BF16)
  if (l.gemm_type == DType::bf16) return f(Layer<BF16Tiles>(l));
#endif
  return f(Layer<F32>(l));
}

}  // namespace

const char* instructions() {
#if defined(TINYSTORY_AMX)
  if (on_tiles<BF16Tiles>()) return W == 16 ? "AVX-512, AMX for bfloat16" : "AVX2, AMX for bfloat16";
#endif
#if defined(__AVX512BF16__)
  return "AVX-512, its dot product for bfloat16";
#elif defined(TINYSTORY_AVX512)
  return "AVX-512";
#elif defined(__FMA__)
  return "AVX2";
#elif defined(TINYSTORY_ARM_BF16)
  return "NEON, BFMMLA for bfloat16";
#elif defined(__aarch64__)
  return "NEON";
#else
  return "vectors of 4 floats or more, without a fused multiply-add";
#endif
}

int64_t linear_workspace(const Linear& l) {
  return with_layer(l, [](auto layer) { return int64_t(layer.bytes); });
}
int64_t linear_tiles(const Linear& l) {
  return with_layer(l, [&](auto layer) {
    return l.grad_y ? layer.tiles(l.rows, layer.out, l.K) : layer.tiles(l.rows, layer.in, l.N);
  });
}
int64_t linear_weight_tiles(const Linear& l) {
  return with_layer(l, [](auto layer) { return layer.weight_tiles(); });
}
void linear_pack_weight(const Linear& l, int64_t begin, int64_t end) {
  with_layer(l, [&](auto layer) { layer.pack_weight(begin, end); });
}
void linear_pack_x(const Linear& l, int64_t begin, int64_t end) {
  with_layer(l, [&](auto layer) { layer.pack_x(begin, end); });
}
void linear_forward(const Linear& l, int64_t begin, int64_t end) {
  with_layer(l, [&](auto layer) { layer.forward(begin, end); });
}
void linear_pack_grad(const Linear& l, int64_t begin, int64_t end) {
  with_layer(l, [&](auto layer) { layer.pack_grad(begin, end); });
}
void linear_grad_x(const Linear& l, int64_t begin, int64_t end) {
  with_layer(l, [&](auto layer) { layer.grad_x(begin, end); });
}
void linear_grad_weight(const Linear& l, int64_t begin, int64_t end) {
  with_layer(l, [&](auto layer) { layer.grad_weight(begin, end); });
}

// --- layer norm ------------------------------------------------------------------------------------------------------
namespace {

// Dropout factors of a row of the branch: 0 or the scale. row() returns null without dropout.
class BranchMask {
 public:
  explicit BranchMask(const LayerNorm& n)
      : C_(n.C), threshold_(n.dropout > 0 ? dropout_threshold(n.dropout) : 0), keys_(dropout_keys(n.seed)) {
    if (threshold_) factors_.resize(C_);
  }
  const float* row(int64_t row) {
    if (!threshold_) return nullptr;
    const float scale = float(dropout_scale(threshold_));
    Words4 w{};
    for (int64_t lane = 0; lane < 32; ++lane)  // one call of Philox is for groups that are 32 groups apart
      for (int64_t group = lane, call = 0; 4 * group < C_; group += 32, ++call) {
        if (call % 4 == 0) w = branch_words(keys_, uint64_t(row), uint32_t(group));
        const uint32_t word = call % 4 == 0 ? w.x : call % 4 == 1 ? w.y : call % 4 == 2 ? w.z : w.w;
        for (int64_t i = 0; i < 4; ++i) factors_[4 * group + i] = (word >> 8 * i & 0xff) >= threshold_ ? scale : 0.0f;
      }
    return factors_.data();
  }

 private:
  int64_t C_;
  uint32_t threshold_;
  DropoutKeys keys_;
  std::vector<float> factors_;
};

}  // namespace

void layer_norm(const LayerNorm& n, int64_t begin, int64_t end) {
  BranchMask mask(n);
  for (int64_t i = begin; i < end; ++i) {
    const float* x = n.x + i * n.C;
    if (n.branch) {
      const float* factors = mask.row(i);
      float* sum = n.sum + i * n.C;
      for (int64_t c = 0; c < n.C; c += W) {
        const vf branch = load_as<vf>(at(n.branch, n.branch_type, i * n.C + c), n.branch_type);
        store(sum + c, load<vf>(x + c) + (factors ? branch * load<vf>(factors + c) : branch));
      }
      x = sum;
    }
    std::tie(n.mean[i], n.scale[i]) = layer_norm_row(
        x, n.C, n.weight, n.bias, [&](int64_t c, vf y) { store_as(at(n.y, n.y_type, i * n.C + c), n.y_type, y); });
  }
}

void layer_norm_backward(const LayerNorm& n, int64_t begin, int64_t end) {
  BranchMask mask(n);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t blocks = (n.rows + kLinearRows - 1) / kLinearRows;
    float *weight_part = n.parts + block * n.C, *bias_part = weight_part + blocks * n.C;
    for (float* part : {weight_part, bias_part}) std::memset(part, 0, n.C * sizeof(float));
    for (int64_t i = block * kLinearRows; i < std::min(n.rows, (block + 1) * kLinearRows); ++i) {
      const float *x = n.x + i * n.C, mean = n.mean[i], scale = n.scale[i];
      const auto grad = [&](int64_t c) { return load_as<vf>(at(n.grad_y, n.y_type, i * n.C + c), n.y_type); };
      vf sums{}, products{};
      for (int64_t c = 0; c < n.C; c += W) {
        const vf g = grad(c), h = (load<vf>(x + c) - mean) * scale, gw = g * load<vf>(n.weight + c);
        store(weight_part + c, fma(g, h, load<vf>(weight_part + c)));
        store(bias_part + c, load<vf>(bias_part + c) + g);
        sums += gw;
        products = fma(gw, h, products);
      }
      const float mean_g = sum(sums) / n.C, mean_gh = sum(products) / n.C;
      const float* factors = n.grad_branch ? mask.row(i) : nullptr;
      for (int64_t c = 0; c < n.C; c += W) {
        const int64_t to = i * n.C + c;
        const vf h = (load<vf>(x + c) - mean) * scale;
        vf g = (grad(c) * load<vf>(n.weight + c) - mean_g - h * mean_gh) * scale;
        if (n.grad_sum) g += load<vf>(n.grad_sum + to);
        store(n.grad_x + to, g);
        if (!n.grad_branch) continue;
        store_as(at(n.grad_branch, n.branch_type, to), n.branch_type, factors ? g * load<vf>(factors + c) : g);
      }
    }
  }
}

}  // namespace tinystory::cpu
