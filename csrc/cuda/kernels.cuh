// The ops of ../kernels.h on a CUDA device: the same structs, whose pointers are now the device's, and a stream.
//
// Every pointer but those of row ids, lengths and per-row results must be a multiple of 16 bytes. Float64 and head
// sizes other than 32, 64 and 128 are not implemented: std::invalid_argument. A launch that the driver refuses:
// std::runtime_error. A length or target out of range, which only the device sees, fails an assertion there.
#pragma once
#include "../kernels.h"

struct CUstream_st;
using cudaStream_t = CUstream_st*;

namespace tinystory::cuda {

void attention_forward(const Attention&, cudaStream_t);
// delta: workspace of B * H * T floats.
void attention_backward(const Attention&, float* delta, cudaStream_t);

// workspace: as many floats as decode_attention_workspace says, may be 0.
int64_t decode_attention_workspace(const DecodeAttention&);
void decode_attention(const DecodeAttention&, float* workspace, cudaStream_t);

void sample(const Sample&, cudaStream_t);

// The parts of TokenLogprob between its matrix products, on a chunk of rows: all pointers are the chunk's.
struct LogitChunk {
  DType dtype;
  int64_t rows, V;
  void* logits;            // (rows, V) contiguous; logit_grad overwrites them with their gradient
  const int64_t* targets;  // (rows,)
  float *logprob, *entropy;
  double* lse;
  // logit_grad only, as in TokenLogprob: both null means grad_everywhere of every logprob.
  const float *grad_logprob, *grad_entropy;
  double grad_everywhere;
};
void logit_stats(const LogitChunk&, cudaStream_t);  // writes logprob, entropy, lse
void logit_grad(const LogitChunk&, cudaStream_t);   // reads entropy, lse

}  // namespace tinystory::cuda
