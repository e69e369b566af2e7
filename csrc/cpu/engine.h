// The student's forward pass in C++, for decoding on a CPU: many stories at once, token by token, with the values,
// log-probabilities and entropies that PPO needs. `Student.trunk` in tinystory/student/model.py is the same forward
// pass in Python: a change to one needs the same change to the other. find_weights refuses parameters that the engine
// does not know.
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "../kernels.h"

namespace tinystory::cpu {

// Threads of the caller. run: runs f on parts [begin, end) that cover [0, items), on `count` threads; `phase` is for
// profilers. Results do not depend on the parts.
struct Threads {
  using Run = void (*)(const char* phase, int64_t items, const std::function<void(int64_t begin, int64_t end)>& f);
  int64_t count, cache;  // cache: bytes of weights that stay in the threads' caches from step to step
  Run run, run_here;     // run_here: the same on the calling thread only
};

// A parameter as PyTorch stores it, f32 and contiguous: the weight of a Linear is (out, in).
struct Parameter {
  const float* data;
  std::vector<int64_t> shape;
};

// The parameters that the engine uses. Matrices are packed for GEMM; other parameters are not copied.
struct StudentWeights {
  struct Affine {
    const float *weight, *bias;
  };
  struct Block {
    Affine ln_1, qkv, attn_proj, ln_2, fc, mlp_proj;
  };
  int64_t heads, C, V, context;
  const float *wte, *wpe, *lm_head;  // (V, C), (context, C), (V, C); lm_head is wte if the student has no lm_head
  std::vector<Block> blocks;
  Affine ln_f, value;  // value: (1, C) and (1,), or both null, which means that all values are 0
};

// The parameters as the engine uses them, found by the names of `Student.named_parameters()`. Names of a value head
// begin with "value_head.". Throws std::invalid_argument for a parameter that is missing, unexpected or of a wrong
// shape.
StudentWeights find_weights(int64_t n_layer, int64_t n_head, const std::map<std::string, Parameter>&);

// A batch of stories to write. The number of stories, count, is prompt_of.size(). Story i has row i of the outputs,
// (count, max_new), and draws tokens as row id first_row + i. At most `at_once` stories are active at the same time.
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
    int64_t story, tokens;  // row of the outputs; number of tokens of the story
  };

  virtual ~Engine() = default;
  virtual void start(const Stories&) = 0;
  // Draws one more token for each active story and returns the stories that end with it. Before, starts further
  // stories, in order, in place of those that ended in the last step. Returns nothing after all stories have ended. A
  // prompt is processed once for all stories that continue it and are active at the same time. The results of a story
  // depend only on its prompt, its row id, the sampling options and the weights, not on other stories or on threads.
  // Throws std::runtime_error if a logit is NaN or +inf.
  virtual std::vector<Ended> step() = 0;
};

// A new engine. dtype: type of the matmuls and the KV cache, f32, or bf16 if engine_has_bf16(). Sums, norms and logits
// are f32.
std::unique_ptr<Engine> make_engine(DType, StudentWeights, Threads);
bool engine_has_bf16();

}  // namespace tinystory::cpu
