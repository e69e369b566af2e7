// What the forward and the backward kernel of causal attention share.
#pragma once
#include "dropout.cuh"
#include "gemm_float32.cuh"
#include "order.cuh"

namespace tinystory::cuda {

// The parameters of every attention kernel. A row of qkv holds q, k and v of all heads.
template <class Element>
struct AttentionParams {
  const Element* qkv;
  Element* out;
  float* lse;
  const Element* grad_out;
  Element* grad_qkv;
  int T, H, heads, group;   // heads: B * H; group: heads per group, see longest_first
  float scale, scale_log2;  // scale of the scores, without and with the factor log2(e)
  Dropout dropout;

  // Offset of a head's first row in a tensor with per_row * H vectors of D elements per row.
  template <int D>
  __device__ __forceinline__ int64_t head_offset(int head, int per_row) const {
    return (int64_t(head / H) * T * per_row * H + head % H) * D;
  }
};

// The parameters of an attention kernel. bytes_per_element: bytes that the blocks of a head share, per element of one
// (T, D) matrix.
template <class Element>
AttentionParams<Element> attention_params(const Attention& x, int bytes_per_element) {
  const double scale = 1 / std::sqrt(double(x.D));
  const uint32_t threshold = dropout_threshold(x.dropout);
  return {.qkv = static_cast<const Element*>(x.qkv),
          .out = static_cast<Element*>(x.out),
          .lse = static_cast<float*>(x.lse),
          .grad_out = static_cast<const Element*>(x.grad_out),
          .grad_qkv = static_cast<Element*>(x.grad_qkv),
          .T = int(x.T),
          .H = int(x.H),
          .heads = int(x.B * x.H),
          .group = heads_per_group(x.B * x.H, x.T * x.D * bytes_per_element),
          .scale = float(scale),
          .scale_log2 = float(scale * 1.4426950408889634),
          .dropout = {dropout_keys(x.seed), threshold, float(dropout_scale(threshold))}};
}

}  // namespace tinystory::cuda
