// Linear layers, forward and backward, fused with bias, tanh GELU and its derivative. And layer norm, fused with the sum
// of the residual stream and a branch.
//
// All three GEMMs use gemm.h: the right operand is first packed in panels (the weight takes 1 to 2 % of a GEMM's time,
// so it is not kept between calls), and each panel is multiplied with blocks of rows that stay in the L2 cache. A row's
// result depends on that row alone, and sums over rows are taken in blocks of fixed size: neither the number of threads
// nor the rest of the batch changes a bit of a row.
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
  // The left operand of grad_weight is the gradient as it lies; for bf16, pairs of its rows, transposed as AMX wants.
  static constexpr bool kTransposed = Policy::kPack == 2;
  static constexpr DType kStored = Policy::kPack == 2 ? DType::bf16 : DType::f32;

  const Linear& l;
  const int64_t in, out, pairs;  // Packs per row of x and of y; per column of the chunk, padded
  Pack *panels, *rows, *grad_rows, *x_pairs, *grad_columns;
  size_t bytes;

  explicit Layer(const Linear& l)
      : l(l), in(l.K / Policy::kPack), out(l.N / Policy::kPack),
        pairs(round_up(round_up(l.rows, Policy::kPack) / Policy::kPack, kPadding<Policy>)) {
    Arena m{static_cast<char*>(l.workspace), 0};
    panels = m.take<Pack>(std::max(round_up(l.N, kColumns) * in, round_up(l.K, kColumns) * out));
    rows = m.take<Pack>(l.grad_y || l.x_type == kStored ? 0 : l.rows * in);
    const int64_t n = l.grad_y ? pairs : 0;
    grad_rows = m.take<Pack>(grad_stored() ? 0 : n * Policy::kPack * out);
    x_pairs = m.take<Pack>(n * round_up(l.K, kColumns));
    grad_columns = m.take<Pack>(kTransposed ? n * l.N : 0);
    bytes = m.used;
  }

  const void* x_at(int64_t row) const { return at(l.x, l.x_type, (l.first + row) * l.K); }
  const Pack* x_rows() const { return l.x_type == kStored ? static_cast<const Pack*>(x_at(0)) : rows; }
  // The gradient before the bias is grad_y itself, or grad_rows.
  bool grad_stored() const { return !l.gelu && l.y_type == kStored; }
  const Pack* grads() const {
    return grad_stored() ? static_cast<const Pack*>(at(l.grad_y, l.y_type, l.first * l.N)) : grad_rows;
  }

  // items: blocks of 64 of the weight's rows, or (backward) of 32
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
    const int64_t n = end - begin;
    if (l.x_type != kStored) pack_rows<Policy>(rows + begin * in, x_at(begin), l.x_type, l.K, n, n, l.K, l.K);
  }

  // Calls finish(row, column, sum), a vector at a time, for each item: kTileRows rows of a (rows, packs), 64 columns.
  template <class F>
  void matmul(int64_t begin, int64_t end, const Pack* a, int64_t packs, int64_t columns, const F& finish) const {
    const int64_t across = (columns + kColumns - 1) / kColumns;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item / across * kTileRows, column = item % across * kColumns;
      gemm_tile<Policy>(first, std::min(l.rows, first + kTileRows), column, std::min(columns, column + kColumns), packs,
                        {a, packs, 1}, {panels, kWidth, packs * kWidth}, finish);
    }
  }

  void forward(int64_t begin, int64_t end) {
    matmul(begin, end, x_rows(), in, l.N, [&](int64_t row, int64_t j, vf y) {
      const int64_t to = (l.first + row) * l.N + j;
      y += load<vf>(l.bias + j);
      if (l.gelu) {
        const auto [value, slope] = gelu_and_slope(y);
        store_as(at(l.slope, l.gemm_type, to), l.gemm_type, slope);
        y = value;
      }
      store_as(at(l.y, l.y_type, to), l.y_type, y);
    });
  }

  // items: blocks of kLinearRows rows. Packs the gradient before the bias by rows, for bf16 by columns too; x by pairs.
  void pack_grad(int64_t begin, int64_t end) {
    const size_t block_packs = kLinearRows * std::max(in, out);
    Pack* copy = reinterpret_cast<Pack*>(scratch(2 * block_packs * sizeof(Pack) + l.N * sizeof(float)));
    Pack* in_rows = copy + block_packs;
    float* sums = reinterpret_cast<float*>(in_rows + block_packs);
    // Reads the rows in place if they are stored as Packs and need no padding, else from `copy`.
    const auto in_pairs = [&](Pack* to, int64_t width, const void* from, DType type, int64_t n, int64_t columns) {
      const int64_t padded = round_up(n, Policy::kPack * kPadding<Policy>);
      if (type != kStored || padded > n) {
        pack_rows<Policy>(copy, from, type, columns, n, padded, columns, columns);
        from = copy;
      }
      pair_rows<Policy>(to, static_cast<const Pack*>(from), padded, columns, width, pairs);
      return padded / Policy::kPack;
    };
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kLinearRows, n = std::min(kLinearRows, l.rows - first);
      std::memset(sums, 0, l.N * sizeof(float));
      for (int64_t i = first; i < first + n; ++i)
        for (int64_t j = 0; j < l.N; j += W) {
          const int64_t from = (l.first + i) * l.N + j;
          vf g = load_as<vf>(at(l.grad_y, l.y_type, from), l.y_type);
          if (l.gelu) g *= load_as<vf>(at(l.slope, l.gemm_type, from), l.gemm_type);
          store(sums + j, load<vf>(sums + j) + g);
          if (!grad_stored()) store_elements<Policy>(grad_rows + i * out, j, g);
        }
      std::memcpy(l.bias_parts + (l.first / kLinearRows + block) * l.N, sums, l.N * sizeof(float));
      const int64_t at = first / Policy::kPack;
      if constexpr (kTransposed) {
        const int64_t packs = in_pairs(in_rows, l.N, grads() + first * out, kStored, n, l.N);
        transpose_packs(grad_columns + at, pairs, in_rows, l.N, packs, l.N);
      }
      in_pairs(x_pairs + at * kWidth, kWidth, x_at(first), l.x_type, n, l.K);
    }
  }

  void grad_x(int64_t begin, int64_t end) {
    matmul(begin, end, grads(), out, l.K, [&](int64_t row, int64_t j, vf g) {
      store_as(at(l.grad_x, l.x_type, (l.first + row) * l.K + j), l.x_type, g);
    });
  }

  // items: tiles of 64 x 64
  void grad_weight(int64_t begin, int64_t end) {
    const int64_t across = (l.K + kColumns - 1) / kColumns;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / across * kColumns, c = item % across * kColumns;
      const Left<Policy> left =
          kTransposed ? Left<Policy>{grad_columns + n * pairs, pairs, 1} : Left<Policy>{grads() + n, 1, l.N};
      gemm<Policy>(std::min(kColumns, l.N - n), std::min(kColumns, l.K - c), pairs, left,
                   {x_pairs + c * pairs, kWidth, pairs * kWidth}, l.grad_weight + n * l.K + c, l.K, l.first > 0);
    }
  }

 private:
  static constexpr int64_t kWeightRows = 32;
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
#elif defined(__AVX512F__)
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
int64_t linear_tiles(const Linear& l, int64_t columns) {
  return (l.rows + kTileRows - 1) / kTileRows * ((columns + kColumns - 1) / kColumns);
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

// The factors that dropout multiplies a row of the branch with, 0 or the scale; null without dropout.
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
    for (int64_t lane = 0; lane < 32; ++lane)  // a call of Philox serves groups that lie 32 groups apart
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
    float *weight_part = n.parts + 2 * block * n.C, *bias_part = weight_part + n.C;
    std::memset(weight_part, 0, 2 * n.C * sizeof(float));
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
