// The forward pass of `Student.trunk` (tinystory/student/model.py) for decoding. If you change one, change the other.
//
// One token step processes one row per active story (the story's last token), plus all prompt tokens of the stories
// that start now. If the weights stay in the caches, each thread takes a part of the rows through all layers. Otherwise
// the weights are read once for all rows: each layer is a few phases, and each phase is split over the threads. Norms
// are split by rows, matmuls by panels of 64 columns, attention by rows and heads. The keys and values of a story stay
// in one slot until the story ends, so no memory is moved when stories end. The keys and values of a prompt are stored
// once for all stories that continue the prompt.
#include "engine.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>

#include "../memory.h"
#include "gemm.h"

namespace tinystory::cpu {
namespace {

// Uninitialised memory, in huge pages if the system has them, because each step reads all weights and caches.
template <class T>
class Buffer {
 public:
  T* data = nullptr;
  void resize(int64_t n) {
    if (n <= size_) return;
    constexpr size_t kHugePage = 2 << 20;
    std::free(data);
    const size_t bytes = round_up(n * sizeof(T) + 64, n * sizeof(T) < kHugePage ? 64 : kHugePage);
    data = static_cast<T*>(std::aligned_alloc(bytes < kHugePage ? 64 : kHugePage, bytes));
    size_ = data ? n : 0;
    if (!data) throw std::bad_alloc();
    use_huge_pages(data, bytes);
  }
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data); }

 private:
  int64_t size_ = 0;
};

template <class Policy>
class EngineOf final : public Engine {
  using Pack = typename Policy::Pack;

  struct Linear {
    const Pack* panels;  // the weight as a right operand of gemm.h, rows and columns padded to multiples of 64
    const float* bias;
    int64_t in, out;  // number of input and output elements
    int64_t k_packs() const { return round_up(in, kColumns) / Policy::kPack; }
    int64_t packs() const { return round_up(out, kColumns) * k_packs(); }
  };
  struct Block {
    StudentWeights::Affine ln_1, ln_2;
    Linear qkv, attn_proj, fc, mlp_proj;
  };

  const StudentWeights student_;
  const Threads threads_, this_thread_;  // this_thread_: runs everything on the caller
  const int64_t C, H, D;
  std::vector<Block> blocks_;
  Linear head_;
  Buffer<Pack> packed_;
  bool by_rows_;  // whether each thread takes a part of the rows through all layers

  struct Prompt {                 // a slot of the prompts' cache
    int64_t id, length, stories;  // id: prompt, -1 for none; stories: number of active stories that continue the prompt
  };
  struct Story {                       // an active story
    int64_t id, slot, prompt, tokens;  // row of the outputs; slots in both caches; number of tokens drawn so far
  };
  struct Token {                          // a row of the forward pass
    int64_t id, position, prompt, story;  // prompt: slot; story: index into active_, -1 for a token of a prompt
  };

  Stories stories_{};
  int64_t next_ = 0;  // the first story that has not started
  std::vector<Story> active_;
  std::vector<Prompt> prompts_;
  std::vector<int64_t> free_slots_;  // slots of the stories' cache
  std::vector<Token> tokens_;
  std::vector<int64_t> drawn_, rows_, steps_;
  std::vector<float> logprobs_, entropies_, values_;
  Buffer<Pack> keys_, values_cache_;          // [layer][slot][head][head_packs(room_)]
  Buffer<Pack> prompt_keys_, prompt_values_;  // the same for the prompts, with prompt_room_
  int64_t room_ = 0, prompt_room_ = 0;
  Buffer<float> x_, qkv_, logits_;          // (rows, C), (rows, 3 C), (stories, V)
  Buffer<float> prompt_hidden_;             // (prompts' slots, C): x of the prompt's last token, for stories that start
  Buffer<Pack> normed_, attended_, inner_;  // (rows, C), (rows, C), (rows, 4 C)

 public:
  EngineOf(StudentWeights student, Threads threads)
      : student_(std::move(student)), threads_(threads),
        this_thread_{1, threads.cache, threads.run_here, threads.run_here}, C(student_.C), H(student_.heads), D(C / H) {
    std::vector<std::pair<Linear*, const float*>> all;
    blocks_.resize(student_.blocks.size());
    const auto add = [&](Linear& to, const StudentWeights::Affine& from, int64_t in, int64_t out) {
      to = {nullptr, from.bias, in, out};
      all.emplace_back(&to, from.weight);
    };
    for (size_t i = 0; i < blocks_.size(); ++i) {
      const auto& from = student_.blocks[i];
      Block& to = blocks_[i];
      to.ln_1 = from.ln_1, to.ln_2 = from.ln_2;
      add(to.qkv, from.qkv, C, 3 * C);
      add(to.attn_proj, from.attn_proj, C, C);
      add(to.fc, from.fc, C, 4 * C);
      add(to.mlp_proj, from.mlp_proj, 4 * C, C);
    }
    add(head_, {student_.lm_head, nullptr}, C, student_.V);
    int64_t packs = 0;
    for (auto& [to, from] : all) packs += to->packs();
    packed_.resize(packs);
    by_rows_ = packs * int64_t(sizeof(Pack)) <= threads_.cache;
    Pack* at = packed_.data;
    for (auto& [to, from] : all) {
      to->panels = at;
      pack(*to, from, at);
      at += to->packs();
    }
  }

  void start(const Stories& stories) override {
    stories_ = stories;
    next_ = 0;
    const int64_t slots = std::min<int64_t>(stories.at_once, stories.prompt_of.size());
    size_t longest = 0;
    for (const auto& tokens : stories.prompts) longest = std::max(longest, tokens.size());
    room_ = round_up(stories.max_new, W), prompt_room_ = round_up(longest, W);
    const int64_t heads = slots * H * blocks_.size();
    for (auto* cache : {&keys_, &values_cache_}) cache->resize(heads * head_packs(room_));
    for (auto* cache : {&prompt_keys_, &prompt_values_}) cache->resize(heads * head_packs(prompt_room_));
    prompt_hidden_.resize(slots * C), logits_.resize(slots * student_.V);
    active_.clear(), prompts_.assign(slots, {-1, 0, 0}), free_slots_.resize(slots);
    for (int64_t i = 0; i < slots; ++i) free_slots_[i] = slots - 1 - i;
  }

  std::vector<Ended> step() override {
    const int64_t running = active_.size();
    tokens_.clear();
    for (int64_t i = 0; i < running; ++i) {
      const Story& s = active_[i];
      tokens_.push_back({drawn_[i], prompts_[s.prompt].length + s.tokens - 1, s.prompt, i});
    }
    while (next_ < int64_t(stories_.prompt_of.size()) && !free_slots_.empty()) begin_story();
    const int64_t n = active_.size(), rows = tokens_.size();
    if (!n) return {};
    reserve(std::max(n, rows));
    // the tokens of a prompt stay in one part, because they attend to each other
    split(
        rows, [&](int64_t i) { return tokens_[i].story >= 0 || tokens_[i].position == 0; },
        [&](const Threads& threads, int64_t first, int64_t last) { run_layers(threads, first, last); });
    for (int64_t i = running; i < rows; ++i) {
      const Token& t = tokens_[i];
      if (t.position + 1 == prompts_[t.prompt].length)
        std::memcpy(prompt_hidden_.data + t.prompt * C, x_.data + i * C, C * sizeof(float));
    }
    for (int64_t i = running; i < n; ++i)
      std::memcpy(x_.data + i * C, prompt_hidden_.data + active_[i].prompt * C, C * sizeof(float));
    prepare_draw(n);
    split(
        n, [](int64_t) { return true; },
        [&](const Threads& threads, int64_t first, int64_t last) {
          run_head(threads, first, last);
          draw(threads, first, last);
        });
    require_drawn();
    std::vector<Ended> ended;
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) {
      Story s = active_[i];
      const int64_t to = s.id * stories_.max_new + s.tokens++;
      stories_.tokens[to] = drawn_[i];
      stories_.logprobs[to] = logprobs_[i];
      stories_.entropies[to] = entropies_[i];
      stories_.values[to] = values_[i];
      if (drawn_[i] == stories_.eos || s.tokens == stories_.max_new) {
        ended.push_back({s.id, s.tokens});
        free_slots_.push_back(s.slot);
        --prompts_[s.prompt].stories;
      } else {
        active_[kept] = s;
        drawn_[kept++] = drawn_[i];
      }
    }
    active_.resize(kept);
    return ended;
  }

 private:
  // Calls f on all rows, or with by_rows_ on one part per thread. A part begins only at a row for which may_begin is
  // true.
  template <class P, class F>
  void split(int64_t rows, const P& may_begin, const F& f) const {
    if (!by_rows_) {
      if (rows) f(threads_, 0, rows);
      return;
    }
    std::vector<int64_t> starts;
    for (int64_t i = 0; i < rows; ++i)
      if (i * threads_.count >= int64_t(starts.size()) * rows && may_begin(i)) starts.push_back(i);
    starts.push_back(rows);
    threads_.run("engine: rows", starts.size() - 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) f(this_thread_, starts[part], starts[part + 1]);
    });
  }

  void reserve(int64_t rows) {
    x_.resize(rows * C), qkv_.resize(rows * 3 * C);
    normed_.resize(packs(rows * C)), attended_.resize(packs(rows * C)), inner_.resize(packs(rows * 4 * C));
  }

  // Assigns slots to the next story. If no slot has the story's prompt, adds the tokens of the prompt to this step.
  void begin_story() {
    const int64_t id = stories_.prompt_of[next_];
    auto slot = std::find_if(prompts_.begin(), prompts_.end(), [&](const Prompt& p) { return p.id == id; });
    if (slot == prompts_.end()) {
      slot = std::find_if(prompts_.begin(), prompts_.end(), [](const Prompt& p) { return p.stories == 0; });
      const auto& prompt = stories_.prompts[id];
      *slot = {id, int64_t(prompt.size()), 0};
      for (size_t t = 0; t < prompt.size(); ++t)
        tokens_.push_back({prompt[t], int64_t(t), slot - prompts_.begin(), -1});
    }
    ++slot->stories;
    active_.push_back({next_++, free_slots_.back(), slot - prompts_.begin(), 0});
    free_slots_.pop_back();
  }

  static int64_t across(const Linear& l) { return round_up(l.out, kColumns) / kColumns; }
  static int64_t packs(int64_t elements) { return elements / Policy::kPack; }

  void pack(const Linear& l, const float* weight, Pack* to) const {
    const int64_t padded = round_up(l.in, kColumns);
    threads_.run("engine: pack weights", across(l), [&](int64_t begin, int64_t end) {
      Pack* rows = reinterpret_cast<Pack*>(scratch(kColumns * padded * sizeof(Pack)));
      for (int64_t i = begin; i < end; ++i) {
        pack_rows<Policy>(rows, weight + i * kColumns * l.in, DType::f32, l.in,
                          std::min(kColumns, l.out - i * kColumns), kColumns, l.in, padded);
        transpose_rows<Policy>(to + i * kColumns * l.k_packs(), rows, kColumns, padded);
      }
    });
  }

  // Multiplies rows first to last - 1 of a, (rows, in), with the weight. Calls finish(row, column, sum) for each vector
  // of sums. The last vector of a row may reach beyond the last column of the matrix.
  template <class F>
  void matmul(const Threads& threads, const char* phase, const Linear& l, const Pack* a, int64_t first, int64_t last,
              const F& finish) const {
    constexpr int64_t kWidth = kPanel<Policy>;
    const int64_t n_k = packs(l.in), columns = across(l), rows = last - first;
    const int64_t blocks = std::max<int64_t>(1, std::min(2 * threads.count / columns, rows / 12));
    const int64_t block = round_up((rows + blocks - 1) / blocks, 6);
    threads.run(phase, columns * blocks, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t column = item / blocks * kColumns, row = first + item % blocks * block;
        gemm_tile<Policy>(row, std::min(last, row + block), column, std::min(round_up(l.out, W), column + kColumns),
                          n_k, {a, n_k, 1}, {l.panels, kWidth, l.k_packs() * kWidth}, finish);
      }
    });
  }
  // The same for sum + bias. `out` must be a multiple of the vector length.
  template <class F>
  void linear(const Threads& threads, const char* phase, const Linear& l, const Pack* a, int64_t first, int64_t last,
              const F& finish) const {
    matmul(threads, phase, l, a, first, last,
           [&](int64_t i, int64_t j, vf sum) { finish(i, j, sum + load<vf>(l.bias + j)); });
  }

  void norm_rows(const Threads& threads, int64_t first, int64_t last, const StudentWeights::Affine& ln) {
    threads.run("engine: norm", last - first, [&](int64_t begin, int64_t end) {
      for (int64_t i = first + begin; i < first + end; ++i) {
        Pack* to = normed_.data + packs(i * C);
        layer_norm_row(x_.data + i * C, C, ln.weight, ln.bias,
                       [&](int64_t c, vf v) { store_elements<Policy>(to, c, v); });
      }
    });
  }

  void run_layers(const Threads& threads, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const float *token = student_.wte + tokens_[i].id * C, *position = student_.wpe + tokens_[i].position * C;
      for (int64_t c = 0; c < C; c += W) store(x_.data + i * C + c, load<vf>(token + c) + load<vf>(position + c));
    }
    for (size_t layer = 0; layer < blocks_.size(); ++layer) {
      const Block& b = blocks_[layer];
      norm_rows(threads, first, last, b.ln_1);
      linear(threads, "engine: qkv", b.qkv, normed_.data, first, last,
             [&](int64_t i, int64_t j, vf v) { store(qkv_.data + i * 3 * C + j, v); });
      for (int64_t i = first; i < last; ++i)
        for (int64_t h = 0; tokens_[i].story < 0 && h < H; ++h) append(layer, tokens_[i], i, h);
      threads.run("engine: attention", (last - first) * H, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
          const int64_t i = first + item / H, h = item % H;
          if (tokens_[i].story >= 0) append(layer, tokens_[i], i, h);
          attend(layer, tokens_[i], i, h);
        }
      });
      const auto add_to_x = [&](const char* phase, const Linear& l, const Pack* a) {
        linear(threads, phase, l, a, first, last, [&](int64_t i, int64_t j, vf v) {
          float* to = x_.data + i * C + j;
          store(to, load<vf>(to) + v);
        });
      };
      add_to_x("engine: attn_proj", b.attn_proj, attended_.data);
      norm_rows(threads, first, last, b.ln_2);
      linear(threads, "engine: fc, gelu", b.fc, normed_.data, first, last, [&](int64_t i, int64_t j, vf v) {
        store_elements<Policy>(inner_.data + packs(i * 4 * C), j, gelu_and_slope(v).first);
      });
      add_to_x("engine: mlp_proj", b.mlp_proj, inner_.data);
    }
  }

  // --- the cache, in Packs: keys [position / W][D / kPack][W], so that a vector holds W scores; values
  // [position / kPack][D]. A Pack of values may hold a written and a not yet written position; the latter is zero. ---
  int64_t head_packs(int64_t room) const { return packs(room * D); }
  Pack* of_story(const Buffer<Pack>& cache, int64_t layer, const Token& t, int64_t head) const {
    return cache.data + ((layer * prompts_.size() + active_[t.story].slot) * H + head) * head_packs(room_);
  }
  Pack* of_prompt(const Buffer<Pack>& cache, int64_t layer, const Token& t, int64_t head) const {
    return cache.data + ((layer * prompts_.size() + t.prompt) * H + head) * head_packs(prompt_room_);
  }

  void append(int64_t layer, const Token& token, int64_t row, int64_t head) {
    const bool prompt = token.story < 0;
    const int64_t t = token.position - (prompt ? 0 : prompts_[token.prompt].length);
    Pack* k = prompt ? of_prompt(prompt_keys_, layer, token, head) : of_story(keys_, layer, token, head);
    Pack* v = prompt ? of_prompt(prompt_values_, layer, token, head) : of_story(values_cache_, layer, token, head);
    k += t / W * head_packs(W) + t % W, v += t / Policy::kPack * D;
    const float* from = qkv_.data + row * 3 * C + C + head * D;
    for (int64_t d = 0; d < D; d += W) {
      const vf value = load<vf>(from + C + d);
      if constexpr (Policy::kPack == 2) {
        const vu half = __builtin_convertvector(to_bf16(value), vu);
        store(v + d, t % 2 ? load<vu>(v + d) | half << 16 : half);
      } else {
        store(v + d, value);
      }
      Pack column[W / Policy::kPack];
      store_elements<Policy>(column, 0, load<vf>(from + d));
      for (int64_t i = 0; i < W / Policy::kPack; ++i) k[(d / Policy::kPack + i) * W] = column[i];
    }
  }

  // The query of a prompt token attends to the prompt up to this token. The query of a story token attends to the whole
  // prompt and to the story up to this token.
  void attend(int64_t layer, const Token& token, int64_t row, int64_t head) {
    const int64_t shared = std::min(token.position + 1, prompts_[token.prompt].length);
    const int64_t own = token.position + 1 - shared;
    const int64_t first = round_up(shared, W), positions = first + round_up(own, W);
    float* scores = reinterpret_cast<float*>(scratch((positions + D) * sizeof(float)));
    Pack* weights = reinterpret_cast<Pack*>(scores);  // in place, because a weight is not larger than a score
    Pack* q = reinterpret_cast<Pack*>(scores + positions);
    for (int64_t d = 0; d < D; d += W) store_elements<Policy>(q, d, load<vf>(qkv_.data + row * 3 * C + head * D + d));
    const Pack *k0 = of_prompt(prompt_keys_, layer, token, head), *v0 = of_prompt(prompt_values_, layer, token, head);
    const Pack* k1 = own ? of_story(keys_, layer, token, head) : nullptr;
    const Pack* v1 = own ? of_story(values_cache_, layer, token, head) : nullptr;

    vf tops = splat<vf>(-INFINITY);
    score(q, k0, shared, scores, tops);
    score(q, k1, own, scores + first, tops);
    const float top = highest(tops);
    vf sums{};
    for (int64_t j = 0; j < positions; j += W) {
      const vf e = exp2(load<vf>(scores + j) - top);
      sums += e;
      store_elements<Policy>(weights, j, e);
    }
    const float total = 1 / sum(sums);
    const Pack* w1 = weights + first / Policy::kPack;
    Pack* out = attended_.data + row * C / Policy::kPack;
    int64_t d = 0;
    for (; d + 4 * W <= D; d += 4 * W) mix<4>(v0 + d, shared, weights, v1 + d, own, w1, total, out, head * D + d);
    for (; d < D; d += W) mix<1>(v0 + d, shared, weights, v1 + d, own, w1, total, out, head * D + d);
  }

  // Computes scores times log2(e), for exp2, and updates `tops`, the lane-wise maximum.
  void score(const Pack* q, const Pack* k, int64_t n, float* scores, vf& tops) const {
    const float scale = float(1.4426950408889634 / std::sqrt(double(D)));
    for (int64_t j = 0; j < n; j += W, k += head_packs(W)) {
      vf part[4]{};
      for (int64_t d = 0; d < D / Policy::kPack; d += 4)
        for (int64_t i = 0; i < 4; ++i)
          part[i] = Policy::dot(Policy::broadcast(reinterpret_cast<const char*>(q + d + i)), load<vf>(k + (d + i) * W),
                                part[i]);
      vf s = ((part[0] + part[1]) + (part[2] + part[3])) * scale;
      for (int64_t i = n - j; i < W; ++i) s[i] = -INFINITY;
      tops = max(s, tops);
      store(scores + j, s);
    }
  }

  template <int N>
  void mix(const Pack* v0, int64_t n0, const Pack* w0, const Pack* v1, int64_t n1, const Pack* w1, float total,
           Pack* out, int64_t column) const {
    vf acc[2][N]{};
    const auto run = [&](const Pack* v, int64_t n, const Pack* weights) {
      const auto add = [&](vf* to, int64_t t) {
        const vf w = Policy::broadcast(reinterpret_cast<const char*>(weights + t));
        for (int i = 0; i < N; ++i) to[i] = Policy::dot(w, load<vf>(v + t * D + i * W), to[i]);
      };
      int64_t t = 0;
      for (; t + 2 <= n; t += 2) add(acc[0], t), add(acc[1], t + 1);
      if (t < n) add(acc[0], t);
    };
    run(v0, (n0 + Policy::kPack - 1) / Policy::kPack, w0);
    run(v1, (n1 + Policy::kPack - 1) / Policy::kPack, w1);
    for (int i = 0; i < N; ++i) store_elements<Policy>(out, column + i * W, (acc[0][i] + acc[1][i]) * total);
  }

  // --- logits, values, draws -----------------------------------------------------------------------------------------
  void prepare_draw(int64_t n) {
    for (auto* ids : {&drawn_, &rows_, &steps_}) ids->resize(n);
    for (auto* results : {&logprobs_, &entropies_, &values_}) results->assign(n, 0.0f);
    for (int64_t i = 0; i < n; ++i) rows_[i] = stories_.first_row + active_[i].id, steps_[i] = active_[i].tokens;
  }

  void run_head(const Threads& threads, int64_t first, int64_t last) {
    threads.run("engine: norm", last - first, [&](int64_t begin, int64_t end) {
      for (int64_t i = first + begin; i < first + end; ++i) {
        vf value{};
        layer_norm_row(x_.data + i * C, C, student_.ln_f.weight, student_.ln_f.bias, [&](int64_t c, vf v) {
          store_elements<Policy>(normed_.data + i * C / Policy::kPack, c, v);
          if (student_.value.weight) value = fma(v, load<vf>(student_.value.weight + c), value);
        });
        if (student_.value.weight) values_[i] = sum(value) + *student_.value.bias;
      }
    });
    const int64_t V = student_.V;
    matmul(threads, "engine: logits", head_, normed_.data, first, last, [&](int64_t i, int64_t j, vf v) {
      float* to = logits_.data + i * V + j;
      if (j + W <= V) store(to, v);
      else store_tail(to, DType::f32, V - j, v);
    });
  }

  void draw(const Threads& threads, int64_t first, int64_t last) {
    threads.run("engine: draw", last - first, [&](int64_t begin, int64_t end) {
      for (int64_t i = first + begin; i < first + end; ++i)
        sample({.dtype = DType::f32,
                .B = 1,
                .V = student_.V,
                .logits = logits_.data + i * student_.V,
                .rows = &rows_[i],
                .steps = &steps_[i],
                .seed = stories_.seed,
                .temperature = stories_.temperature,
                .top_k = stories_.top_k,
                .top_p = stories_.top_p,
                .tokens = &drawn_[i],
                .logprobs = &logprobs_[i],
                .entropy = &entropies_[i]},
               0, 1);
    });
  }

  void require_drawn() const {
    for (size_t i = 0; i < drawn_.size(); ++i)
      if (drawn_[i] < 0)
        throw std::runtime_error("Engine: the logits of story " + std::to_string(rows_[i]) + " at token " +
                                 std::to_string(steps_[i]) + " are not finite");
  }
};

}  // namespace

bool engine_has_bf16() {
#if defined(TINYSTORY_BF16)
  return true;
#else
  return false;
#endif
}

std::unique_ptr<Engine> make_engine([[maybe_unused]] DType dtype, StudentWeights student, Threads threads) {
#if defined(TINYSTORY_BF16)
  if (dtype == DType::bf16) return std::make_unique<EngineOf<BF16Tiles>>(std::move(student), threads);
#endif
  return std::make_unique<EngineOf<F32>>(std::move(student), threads);
}

}  // namespace tinystory::cpu
