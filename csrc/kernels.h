// Every op as a function on raw pointers. Kernels do not depend on PyTorch, so native tests call them directly.
//
// The CPU functions process a range [begin, end) of independent items; a comment names the items. They never start a
// thread: ops.cpp divides the range among threads. The result of an item does not depend on the division.
#pragma once
#include <cstdint>

namespace tinystory {

enum class DType { f32, bf16, f16, f64 };

// softmax(Q K^T / sqrt(D), keys <= query) V of packed queries, keys and values; all tensors contiguous.
struct Attention {
  DType dtype;
  int64_t B, T, H, D;
  double dropout;
  uint64_t seed;
  const void* qkv;       // (B, T, 3, H, D)
  void* out;             // (B, T, H, D)
  void* lse;             // (B, H, T) log-sum-exp of the scaled scores, natural log: f32, f64 for f64
  const void* grad_out;  // (B, T, H, D), backward only
  void* grad_qkv;        // (B, T, 3, H, D), backward only
};

// Decode-step attention: one new token per row. The query of the new token attends to the row's prefix (which any
// number of rows may share), to the row's KV cache and to the new token. The key and the value of the new token are
// appended to the cache. All tensors are contiguous; keys lie before values.
struct DecodeAttention {
  DType dtype;
  int64_t B, P, T, H, D;
  const void* qkv;         // (B, 3, H, D)
  const void* prefix;      // (P, 2, H, D)
  const int64_t* spans;    // (B, 2) begin and end of each row's prefix in `prefix`
  void* cache;             // (B, T, 2, H, D)
  const int64_t* lengths;  // (B,) filled positions of the cache, each less than T
  void* out;               // (B, H, D)
};

struct Sample {
  DType dtype;
  int64_t B, V;
  const void* logits;           // (B, V) contiguous
  const int64_t *rows, *steps;  // (B,)
  uint64_t seed;
  double temperature;         // > 0
  int64_t top_k;              // 0: off
  double top_p;               // 1: off
  int64_t* tokens;            // (B,); kNotANumber or kNoToken if no draw is possible
  float *logprobs, *entropy;  // (B,)
};
enum : int64_t { kNotANumber = -1, kNoToken = -2 };

// softmax(hidden weight^T): log-probability of the target and entropy of each row, and the gradients of both.
//
// The caller divides the N x V logits into chunks. Chunks are processed in the order of their rows. For each chunk, the
// steps run in the order of their declaration, each step over all items before the next. Chunks passed to `logits` and
// `stats`, and to gradients in the same pass, span all columns. For gradients only (entropy and lse given, logprob
// null), a chunk may span some of the columns.
struct TokenLogprob {
  DType dtype, weight_dtype;
  int64_t N, C, V;
  const void* hidden;       // (N, C) contiguous, of type dtype
  const void* weight;       // (V, C) contiguous, weight_dtype
  const int64_t* targets;   // (N,)
  void *logprob, *entropy;  // (N,) f32, or f64 for f64
  double* lse;              // (N,) always f64, because an f32 rounding error would affect every probability
  // Gradients of the loss with respect to logprob and entropy, (N,). If both are null, grad_everywhere is the gradient
  // with respect to every logprob.
  const void *grad_logprob, *grad_entropy;
  double grad_everywhere;
  // f32 (f64 for f64), with C' = C rounded up to 64. grad_hidden, (N, C'): chunks of the first columns write, other
  // chunks add. grad_weight, (columns of the chunk, C'): chunks of the first rows write, other chunks add.
  void *grad_hidden, *grad_weight;
  int64_t first, rows;          // rows of the chunk
  int64_t first_group, groups;  // columns of the chunk, in groups
  // Logits of the first groups, f32 (f64 for f64), (kept_groups, N, kLogprobStride). `logits` stores them for the
  // chunks of gradients, which recompute the logits of the other groups.
  void* kept_logits;
  int64_t kept_groups;
  void* workspace;  // logprob_workspace() bytes
};
constexpr int64_t kLogprobGroup = 256;  // columns per group; the last may have fewer
constexpr int64_t kLogprobStride =
    kLogprobGroup + 16;               // padded, because rows 1 KB apart share few sets of the L1 cache
constexpr int64_t kLogprobRows = 96;  // rows per item of logprob_grad_hidden

// y = gelu(x weight^T + bias), where gelu is optional. Sums are f32. The caller divides the M rows into chunks. Forward
// pass: pack_weight once, then pack_x and forward for each chunk. Backward pass: pack_weight once, then pack_grad,
// grad_x and grad_weight for each chunk. K and N are multiples of 32.
struct Linear {
  DType x_type, y_type;  // f32 or bf16; x_type: of x and grad_x; y_type: of y and grad_y
  DType gemm_type;       // f32 or bf16: type of the GEMMs, and of slope
  bool gelu;
  int64_t M, K, N;
  int64_t threads;                  // number of threads that share the items of linear_grad_weight
  const void* x;                    // (M, K)
  const float *weight, *bias;       // (N, K), (N,)
  void *y, *slope;                  // (M, N); slope: derivative of GELU for the backward pass, aligned to 64 bytes
  const void* grad_y;               // (M, N); null in the forward pass
  void* grad_x;                     // (M, K)
  float *grad_weight, *bias_parts;  // (N, K); (blocks of kLinearRows rows, N), to be summed to grad_bias
  int64_t first, rows;              // rows of the chunk; `first` is a multiple of kLinearRows
  void* workspace;                  // linear_workspace() bytes
};
constexpr int64_t kLinearRows = 64;

// sum = x + dropout(branch), y = (sum - mean) scale weight + bias, scale = 1 / sqrt(variance + 1e-5), for each row.
// Without a branch, sum is x. C is a multiple of 32 (of 4 on CUDA). All tensors are contiguous.
struct LayerNorm {
  DType branch_type, y_type;  // f32 or 16-bit; on CUDA y_type is branch_type or f32
  int64_t rows, C;
  double dropout;
  uint64_t seed;
  const float* x;              // (rows, C); backward: the sum
  const void* branch;          // (rows, C) or null
  const float *weight, *bias;  // (C,)
  float* sum;                  // (rows, C); only with a branch
  float *mean, *scale;         // (rows,)
  void* y;                     // (rows, C)
  // Backward only.
  const void* grad_y;     // (rows, C), y_type
  const float* grad_sum;  // (rows, C) or null
  float* grad_x;          // (rows, C)
  void* grad_branch;      // (rows, C) or null
  float* parts;           // (2, blocks of kLinearRows rows, C), on CUDA (2, layer_norm_blocks(rows), C), to be summed
                          // over the blocks to grad_weight and grad_bias
};

namespace cpu {
const char* instructions();                                                 // instructions of the GEMMs on this machine
void attention_forward(const Attention&, int64_t begin, int64_t end);       // items: B * H
void attention_backward(const Attention&, int64_t begin, int64_t end);      // items: B * H
void decode_attention(const DecodeAttention&, int64_t begin, int64_t end);  // items: B * H
void sample(const Sample&, int64_t begin, int64_t end);                     // items: B
int64_t logprob_workspace(const TokenLogprob&);                             // bytes; enough for smaller chunks too
void logprob_pack(const TokenLogprob&, int64_t begin, int64_t end);         // items: pairs of the chunk's rows
void logprob_logits(const TokenLogprob&, int64_t begin, int64_t end);       // items: the chunk's groups
void logprob_stats(const TokenLogprob&, int64_t begin, int64_t end);        // items: rows; logprob, entropy, lse
void logprob_grad_weight(const TokenLogprob&, int64_t begin, int64_t end);  // items: the chunk's groups
void logprob_grad_hidden(const TokenLogprob&, int64_t begin, int64_t end);  // items: rows / kLogprobRows
int64_t linear_workspace(const Linear&);                                    // bytes, for chunks of `rows` rows
int64_t linear_tiles(const Linear&);                                        // number of items of forward, or of grad_x
int64_t linear_weight_tiles(const Linear&);                                 // number of items of grad_weight
void linear_pack_weight(const Linear&, int64_t begin, int64_t end);  // items: N / 64; in the backward pass N / 32
void linear_pack_x(const Linear&, int64_t begin, int64_t end);       // items: rows
void linear_forward(const Linear&, int64_t begin, int64_t end);
void linear_pack_grad(const Linear&, int64_t begin, int64_t end);  // items: rows / kLinearRows
void linear_grad_x(const Linear&, int64_t begin, int64_t end);
void linear_grad_weight(const Linear&, int64_t begin, int64_t end);
void layer_norm(const LayerNorm&, int64_t begin, int64_t end);           // items: rows
void layer_norm_backward(const LayerNorm&, int64_t begin, int64_t end);  // items: rows / kLinearRows
}  // namespace cpu
}  // namespace tinystory
