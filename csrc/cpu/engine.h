// The student's forward pass in C++, for decoding on a CPU: many stories at once, token by token, each with
// what PPO needs of it. `Student.trunk` in tinystory/student/model.py is the same forward pass in Python: a change to
// one needs the same change to the other. find_weights refuses parameters that the engine does not know.
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "../kernels.h"

namespace tinystory::cpu {

// Runs f on parts [begin, end) that cover [0, items); `phase` is for profilers. Results do not depend on the parts.
struct Threads {
  using Run = void (*)(const char* phase, int64_t items, const std::function<void(int64_t begin, int64_t end)>& f);
  int64_t count, cache;  // cache: bytes of weights that stay in its caches from step to step
  Run run, run_here;     // run_here: on the thread that calls it
};

// A parameter as PyTorch holds it, f32 and contiguous: a Linear's weight is (out, in).
struct Parameter {
  const float* data;
  std::vector<int64_t> shape;
};

// The parameters that the engine computes with. They are not copied, except matrices, which are packed for GEMM.
struct StudentWeights {
  struct Affine {
    const float *weight, *bias;
  };
  struct Block {
    Affine ln_1, qkv, attn_proj, ln_2, fc, mlp_proj;
  };
  int64_t heads, C, V, context;
  const float *wte, *wpe, *lm_head;  // (V, C), (context, C), (V, C): wte if the student has no other
  std::vector<Block> blocks;
  Affine ln_f, value;  // value: (1, C) and (1,), or both null: values are 0
};

// Looks each parameter up by its name in `Student.named_parameters()`; a value head's begin with "value_head.".
// Throws std::invalid_argument for a parameter that is missing, unexpected or misshapen.
StudentWeights find_weights(int64_t n_layer, int64_t n_head, const std::map<std::string, Parameter>&);

// count is prompt_of.size(). Row i of the (count, max_new) outputs is the story that draws its tokens as row id
// first_row + i. At most `at_once` of them are written at the same time.
struct Stories {
  std::vector<std::vector<int64_t>> prompts;  // the distinct openings, each of at least one token
  std::vector<int64_t> prompt_of;             // (count,): the prompt that each story continues
  int64_t max_new, eos;
  uint64_t seed;
  int64_t first_row, at_once;
  double temperature;
  int64_t top_k;
  double top_p;
  int64_t* tokens;
  float *logprobs, *values, *entropies;
};

class Engine {
 public:
  struct Ended {
    int64_t story, tokens;  // its row of the outputs, and how many tokens it has
  };

  virtual ~Engine() = default;
  virtual void start(const Stories&) = 0;
  // Begins stories, in order, in place of those that ended with the last step, and draws one more token for each that is
  // being written; returns those that end with it, none once all have ended. A prompt is read once for all of its
  // stories that are written at the same time. A story's results depend on its row id and the weights alone: not on the
  // other stories, nor on the threads. Throws std::runtime_error if a logit is NaN or +inf.
  virtual std::vector<Ended> step() = 0;
};

// dtype of the matmuls and the KV cache: f32, or bf16 where engine_has_bf16(). Sums, norms and logits are f32.
std::unique_ptr<Engine> make_engine(DType, StudentWeights, Threads);
bool engine_has_bf16();

}  // namespace tinystory::cpu
