// Many stories from one opening, token by token: all layers of a step, the draw, and what PPO needs of it.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "../kernels.h"

namespace tinystory::cpu {

// Runs f on parts [begin, end) that make up [0, items), under a name for profilers. Results do not depend on the parts.
struct Threads {
  int64_t count;
  void (*run)(const char* phase, int64_t items, const std::function<void(int64_t begin, int64_t end)>& f);
};

// A student's parameters as PyTorch holds them, f32 and contiguous: a Linear's weight is (out, in). They stay where
// they are; only the matrices are copied, into the order in which products read them.
struct StudentWeights {
  struct Affine {
    const float *weight, *bias;
  };
  struct Block {
    Affine ln_1, qkv, attn_proj, ln_2, fc, mlp_proj;
  };
  int64_t heads, C, V;
  const float *wte, *wpe;     // (V, C), (context, C)
  std::vector<Block> blocks;
  Affine ln_f, value;         // value: (1, C) and (1,), or both null: values are 0
};

// Row `slot` of the (count, max_new) outputs is the story that draws its tokens as row id first_row + slot.
struct Stories {
  const int64_t* prompt;      // (prompt_length,), prompt_length >= 1: all stories begin so
  int64_t prompt_length, count, max_new, eos;
  uint64_t seed;
  int64_t first_row;
  double temperature;
  int64_t top_k;
  double top_p;
  int64_t* tokens;
  float *logprobs, *values, *entropies;
};

class Decoder {
 public:
  virtual ~Decoder() = default;
  // Reads the prompt, once for all stories.
  virtual void start(const Stories&) = 0;
  // Draws one more token for every story that has not ended; returns the slots of those that end with it. A story's
  // numbers depend on its row id and the weights alone: not on the other stories, nor on the threads.
  // Throws std::runtime_error if a logit is NaN or +inf.
  virtual std::vector<int64_t> step() = 0;
};

// dtype of products and cache: f32, or bf16 where decoder_has_bf16(); sums, norms and logits are f32.
std::unique_ptr<Decoder> make_decoder(DType, StudentWeights, Threads);
bool decoder_has_bf16();

}  // namespace tinystory::cpu
