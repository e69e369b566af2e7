// The ops of ../kernels.h on a CUDA device: the same structs with device pointers, and a stream.
//
// Every pointer except those to row ids, lengths and per-row results must be 16-byte aligned. float64, and head sizes
// other than 32, 64 and 128, are not implemented: std::invalid_argument. A failed launch throws std::runtime_error. A
// length or target out of range, which only the device can see, fails a device-side assertion.
#pragma once
#include "../kernels.h"

struct CUstream_st;
using cudaStream_t = CUstream_st*;

namespace tinystory::cuda {

void attention_forward(const Attention&, cudaStream_t);
// workspace: attention_backward_workspace(x) floats.
int64_t attention_backward_workspace(const Attention&);
void attention_backward(const Attention&, float* workspace, cudaStream_t);

// workspace: decode_attention_workspace(x) floats, possibly 0.
int64_t decode_attention_workspace(const DecodeAttention&);
void decode_attention(const DecodeAttention&, float* workspace, cudaStream_t);

void sample(const Sample&, cudaStream_t);

// The steps of TokenLogprob between its GEMMs, on a chunk of rows; all pointers point into the chunk.
struct LogitChunk {
  DType grad_dtype;
  int64_t rows, V;
  int64_t stride;          // elements between rows of logits and of grad: at least V
  const float* logits;     // (rows, V)
  void* grad;              // (rows, V), for logit_grad; may be the logits, if it is float32
  const int64_t* targets;  // (rows,)
  float *logprob, *entropy;
  double* lse;
  // logit_grad only, as in TokenLogprob: if both are null, every logprob's gradient is grad_everywhere.
  const float *grad_logprob, *grad_entropy;
  double grad_everywhere;
};
void logit_stats(const LogitChunk&, cudaStream_t);  // writes logprob, entropy, lse
void logit_grad(const LogitChunk&, cudaStream_t);   // reads entropy, lse

// grad = grad_y gelu'(x), for tanh GELU, and its sums over blocks of rows. N is a multiple of 8; 16-bit types.
struct GeluBackward {
  DType dtype;
  int64_t rows, N;
  const void *grad_y, *x;  // (rows, N) contiguous
  void* grad;              // (rows, N)
  float* parts;            // (gelu_blocks(rows), N): their sum is the gradient of the bias before GELU
};
int64_t gelu_blocks(int64_t rows);
void gelu_backward(const GeluBackward&, cudaStream_t);

void layer_norm(const LayerNorm&, cudaStream_t);
int64_t layer_norm_blocks(int64_t rows);
void layer_norm_backward(const LayerNorm&, cudaStream_t);

}  // namespace tinystory::cuda
