// The ops of ../kernels.h on a CUDA device: functions of the same structs, with device pointers, and of a stream.
//
// Every pointer must be 16-byte aligned, except those to logits of `sample`, row ids, lengths and per-row results.
// float64, and head sizes other than 32, 64 and 128, are not implemented and throw std::invalid_argument. A failed
// launch throws std::runtime_error. The host does not check lengths, spans and targets. If one is out of range, a
// device-side assertion fails.
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

// The functions above. Attention is compiled for one dtype and one head size at a time, when an operator first needs
// them, into a library that hands its functions to the library of the operators (attention_library.cpp, ops.cpp).
struct AttentionKernels {
  DType dtype;
  int64_t D;
  decltype(&attention_forward) forward = attention_forward;
  decltype(&attention_backward_workspace) backward_workspace = attention_backward_workspace;
  decltype(&attention_backward) backward = attention_backward;
  decltype(&decode_attention_workspace) decode_workspace = decode_attention_workspace;
  decltype(&decode_attention) decode = decode_attention;
};

void sample(const Sample&, cudaStream_t);

// The steps of TokenLogprob between the GEMMs, for a chunk of rows. All pointers point to the first row of the chunk.
struct LogitChunk {
  DType grad_dtype;
  int64_t rows, V;
  int64_t stride;          // distance between rows of logits and of grad, in elements; at least V
  const float* logits;     // (rows, V)
  void* grad;              // (rows, V), written by logit_grad; float32 gradients may overwrite the logits
  const int64_t* targets;  // (rows,)
  float *logprob, *entropy;
  double* lse;
  // For logit_grad, as in TokenLogprob: if both are null, grad_everywhere is the gradient with respect to every
  // logprob.
  const float *grad_logprob, *grad_entropy;
  double grad_everywhere;
};
void logit_stats(const LogitChunk&, cudaStream_t);  // writes logprob, entropy, lse
void logit_grad(const LogitChunk&, cudaStream_t);   // reads entropy, lse

// grad = grad_y gelu'(x) for tanh GELU, and the sums of grad over blocks of rows. N is a multiple of 8. dtype is a
// 16-bit type.
struct GeluBackward {
  DType dtype;
  int64_t rows, N;
  const void *grad_y, *x;  // (rows, N) contiguous
  void* grad;              // (rows, N)
  float* parts;            // (gelu_blocks(rows), N), to be summed to the gradient of the bias before GELU
};
int64_t gelu_blocks(int64_t rows);
void gelu_backward(const GeluBackward&, cudaStream_t);

void layer_norm(const LayerNorm&, cudaStream_t);
int64_t layer_norm_blocks(int64_t rows);
void layer_norm_backward(const LayerNorm&, cudaStream_t);

}  // namespace tinystory::cuda
