// Linear layers, forward and backward, fused with what surrounds them in a transformer: bias, tanh GELU and its
// derivative, the residual stream. And layer norm.
//
// All three GEMMs use gemm.h: the right operand is first packed in panels of 64 columns (the weight takes 1 to 2 % of a
// GEMM's time, so it is not kept between calls), and each panel is multiplied with blocks of rows that stay in the L2
// cache. A row's result depends on that row alone, and sums over rows are taken in blocks of fixed size: neither the
// number of threads nor the rest of the batch changes a bit of a row.
#include <algorithm>

#include "gemm.h"

namespace tinystory::cpu {
namespace {

constexpr int64_t kRows = 48;  // rows per block that is multiplied with a panel: their sums stay in the L1 cache
// Packs per partial sum: a sum of short sums rounds less than one long sum. bf16 has rounded far more already.
template <class Policy>
constexpr int64_t kReduce = Policy::kPack == 2 ? 384 : 256;

template <class Policy>
struct Layer {
  using Pack = typename Policy::Pack;
  static constexpr DType kStored = Policy::kPack == 2 ? DType::bf16 : DType::f32;

  const Linear& l;
  const int64_t in, out, pairs;  // Packs per row of x and of y; the rows of the chunk, divided by kPack
  Pack *panels, *rows, *grad_rows, *x_pairs, *grad_pairs;
  size_t bytes;

  explicit Layer(const Linear& l)
      : l(l), in(l.K / Policy::kPack), out(l.N / Policy::kPack), pairs((l.rows + Policy::kPack - 1) / Policy::kPack) {
    Arena m{static_cast<char*>(l.workspace), 0};
    panels = m.take<Pack>(std::max(round_up(l.N, kPanel) * in, round_up(l.K, kPanel) * out));
    rows = m.take<Pack>(l.grad_y || l.x_type == kStored ? 0 : l.rows * in);
    const int64_t n = l.grad_y ? pairs : 0;
    grad_rows = m.take<Pack>(grad_stored() ? 0 : n * Policy::kPack * out);
    x_pairs = m.take<Pack>(n * round_up(l.K, kPanel));
    grad_pairs = m.take<Pack>(n * round_up(l.N, kPanel));
    bytes = m.used;
  }

  const void* x_at(int64_t row) const { return at(l.x, l.x_type, (l.first + row) * l.K); }
  const Pack* x_rows() const { return l.x_type == kStored ? static_cast<const Pack*>(x_at(0)) : rows; }
  // The gradient before the bias is grad_y itself, or grad_rows.
  bool grad_stored() const { return !l.gelu && l.y_type == kStored; }
  const Pack* grads() const {
    return grad_stored() ? static_cast<const Pack*>(at(l.grad_y, l.y_type, l.first * l.N)) : grad_rows;
  }

  // items: panels of the weight's rows, or (backward) blocks of kPack * W of its rows
  void pack_weight(int64_t begin, int64_t end) {
    const int64_t height = l.grad_y ? kWeightRows : kPanel;
    Pack* w = reinterpret_cast<Pack*>(scratch(height * in * sizeof(Pack)));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = std::min(height, l.N - i * height);
      pack_rows<Policy>(w, l.weight + i * height * l.K, DType::f32, l.K, n, height, l.K, l.K);
      if (l.grad_y) pair_rows<Policy>(panels + i * height / Policy::kPack * kPanel, w, height, l.K, kPanel, out);
      else transpose_rows<Policy>(panels + i * kPanel * in, w, kPanel, l.K);
    }
  }

  void pack_x(int64_t begin, int64_t end) {
    const int64_t n = end - begin;
    if (l.x_type != kStored) pack_rows<Policy>(rows + begin * in, x_at(begin), l.x_type, l.K, n, n, l.K, l.K);
  }

  // Calls finish(row, column, sum), a vector at a time, for each item: kRows rows of a (rows, packs) and one panel.
  template <class F>
  void matmul(int64_t begin, int64_t end, const Pack* a, int64_t packs, int64_t columns, const F& finish) const {
    const int64_t n_panels = (columns + kPanel - 1) / kPanel;
    float sums[kRows * kPanel];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item / n_panels * kRows, last = std::min(l.rows, first + kRows);
      const int64_t column = item % n_panels * kPanel, width = std::min(kPanel, columns - column);
      for (int64_t k = 0; k < packs; k += kReduce<Policy>)
        for (int64_t r = first; r < last; r += 6)
          gemm<Policy>(std::min<int64_t>(6, last - r), width / W, std::min(kReduce<Policy>, packs - k),
                       a + r * packs + k, packs, 1, panels + column * packs + k * kPanel, kPanel,
                       sums + (r - first) * kPanel, kPanel, k > 0);
      for (int64_t r = first; r < last; ++r)
        for (int64_t j = 0; j < width; j += W) finish(r, column + j, load<vf>(sums + (r - first) * kPanel + j));
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
      if (l.residual) y += load<vf>(l.residual + to);
      store_as(at(l.y, l.y_type, to), l.y_type, y);
    });
  }

  // items: blocks of kLinearRows rows. Packs the gradient before the bias by rows and by pairs of rows, x by pairs.
  void pack_grad(int64_t begin, int64_t end) {
    const size_t block_packs = kLinearRows * std::max(in, out);
    Pack* copy = reinterpret_cast<Pack*>(scratch(block_packs * sizeof(Pack) + l.N * sizeof(float)));
    float* sums = reinterpret_cast<float*>(copy + block_packs);
    // Reads the rows in place if they are stored as Packs and every pair has its second row, else from `copy`.
    const auto in_pairs = [&](Pack* to, const void* from, DType type, int64_t n, int64_t columns) {
      const int64_t padded = round_up(n, Policy::kPack);
      if (type != kStored || padded > n) {
        pack_rows<Policy>(copy, from, type, columns, n, padded, columns, columns);
        from = copy;
      }
      pair_rows<Policy>(to, static_cast<const Pack*>(from), padded, columns, kPanel, pairs);
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
      in_pairs(grad_pairs + first / Policy::kPack * kPanel, grads() + first * out, kStored, n, l.N);
      in_pairs(x_pairs + first / Policy::kPack * kPanel, x_at(first), l.x_type, n, l.K);
    }
  }

  void grad_x(int64_t begin, int64_t end) {
    matmul(begin, end, grads(), out, l.K, [&](int64_t row, int64_t j, vf g) {
      store_as(at(l.grad_x, l.x_type, (l.first + row) * l.K + j), l.x_type, g);
    });
  }

  // items: tiles of kPanel x kPanel
  void grad_weight(int64_t begin, int64_t end) {
    const int64_t n_panels = (l.K + kPanel - 1) / kPanel;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / n_panels * kPanel, c = item % n_panels * kPanel;
      for (int64_t k = 0; k < pairs; k += kReduce<Policy>)
        for (int64_t i = n; i < std::min(n + kPanel, l.N); i += 6) {
          const int64_t height = std::min<int64_t>(6, std::min(n + kPanel, l.N) - i);
          gemm<Policy>(height, std::min(kPanel, l.K - c) / W, std::min(kReduce<Policy>, pairs - k),
                       grad_pairs + n * pairs + k * kPanel + i - n, 1, kPanel, x_pairs + c * pairs + k * kPanel, kPanel,
                       l.grad_weight + i * l.K + c, l.K, k > 0 || l.first > 0);
        }
    }
  }

 private:
  static constexpr int64_t kWeightRows = 32;
};

template <class F>
auto with_layer(const Linear& l, const F& f) {
#if defined(__AVX512BF16__)
  if (l.gemm_type == DType::bf16) return f(Layer<BF16>(l));
#endif
  return f(Layer<F32>(l));
}

}  // namespace

int64_t linear_workspace(const Linear& l) {
  return with_layer(l, [](auto layer) { return int64_t(layer.bytes); });
}
int64_t linear_tiles(const Linear& l, int64_t columns) {
  return (l.rows + kRows - 1) / kRows * ((columns + kPanel - 1) / kPanel);
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
void layer_norm(const LayerNorm& n, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const float* x = n.x + i * n.C;
    vf sums{}, squares{};
    for (int64_t c = 0; c < n.C; c += W) sums += load<vf>(x + c);
    const float mean = sum(sums) / n.C;
    for (int64_t c = 0; c < n.C; c += W) {
      const vf d = load<vf>(x + c) - mean;
      squares = fma(d, d, squares);
    }
    const float scale = 1 / std::sqrt(sum(squares) / n.C + 1e-5f);
    n.mean[i] = mean, n.scale[i] = scale;
    for (int64_t c = 0; c < n.C; c += W)
      store_as(at(n.y, n.y_type, i * n.C + c), n.y_type,
               fma((load<vf>(x + c) - mean) * scale, load<vf>(n.weight + c), load<vf>(n.bias + c)));
  }
}

void layer_norm_backward(const LayerNorm& n, int64_t begin, int64_t end) {
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
      for (int64_t c = 0; c < n.C; c += W) {
        const vf h = (load<vf>(x + c) - mean) * scale;
        store(n.grad_x + i * n.C + c, (grad(c) * load<vf>(n.weight + c) - mean_g - h * mean_gh) * scale);
      }
    }
  }
}

}  // namespace tinystory::cpu
