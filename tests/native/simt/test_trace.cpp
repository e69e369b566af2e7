// The tracer on small kernels; then the CUDA kernels have no data races and keep to their budgets.
//
// `simt_trace` tests; `simt_trace report` also prints what each source line of a kernel does; `simt_trace races` looks
// for races in the kernels only.
#include <algorithm>
#include <cinttypes>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <sstream>

#include "check.h"
#include "trace.h"

using namespace tinystory;
using namespace test;

namespace {

// --- the tracer ------------------------------------------------------------------------------------------------------
struct Params {
  float *in, *out;
  int mode;
};
int lane() { return int(threadIdx.x) % 32; }
float* shared() { return reinterpret_cast<float*>(cuda::shared_memory()); }

std::string error;  // of the last traced launch
simt::trace::Kernel traced(void (*kernel)(Params), int mode, int threads, int blocks = 1) {
  simt::Buffer<float> in(1024), out(1024);
  simt::trace::start();
  error = "";
  try {
    cuda::launch(kernel, blocks, threads, 4096, nullptr, Params{in.data(), out.data(), mode});
  } catch (const simt::Error& e) {
    error = e.what();
  }
  return simt::trace::stop().at(0);
}

// One store and one load by another lane of the warp; the mode is what lies between them.
void lanes(Params p) {
  shared()[lane()] = 1;
  if (p.mode == 0) cuda::sync_warp();
  if (p.mode == 1) cuda::sync_block();
  if (p.mode == 2) p.out[lane()] = cuda::shuffle(1.0f, lane() ^ 1);
  if (p.mode == 3) p.out[lane()] = float(cuda::ballot(true));
  p.out[lane()] += shared()[lane() ^ 1];
}
// A write to shared or global memory that is not reported to the tracer.
__attribute__((no_sanitize("thread"))) void unseen(Params p) { (p.mode ? p.out : shared())[lane()] = 1; }
// The same with a thread of another warp.
void warps(Params p) {
  const int i = int(threadIdx.x);
  shared()[i] = 1;
  if (p.mode == 0) cuda::sync_warp();
  if (p.mode == 1) cuda::sync_block();
  p.out[i] = shared()[i ^ 32];
}
void write_after_read(Params p) {
  const int i = int(threadIdx.x);
  p.out[i] = shared()[i ^ 32] + shared()[i];
  if (p.mode == 0) cuda::sync_warp();
  if (p.mode == 1) cuda::sync_block();
  shared()[i] = 1;
}
void add(Params p) {
  auto* sum = reinterpret_cast<uint64_t*>(cuda::shared_memory());
  if (threadIdx.x == 0) *sum = 0;
  cuda::sync_block();
  if (p.mode == 0) *sum += 1;
  if (p.mode == 1) cuda::atomic_add_shared(sum, 1);
}
// Accesses to one byte: the reader's own last atomic or write must not hide that of another thread.
void own_is_last(Params p) {
  auto* sum = reinterpret_cast<uint64_t*>(cuda::shared_memory());
  if (p.mode == 0) {  // an unordered atomic before the reader's own
    if (lane() != 5) cuda::atomic_add_shared(sum, 1);
    cuda::ballot(true);
    if (lane() == 5) cuda::atomic_add_shared(sum, 1), p.out[0] = float(*sum);
  } else {  // an unordered write before the writer's own atomic
    if (lane() == 5) *sum = 0, cuda::atomic_add_shared(sum, 1);
    cuda::ballot(true);
    if (lane() != 5) cuda::atomic_add_shared(sum, 1);
  }
}
void copy(Params p) {
  const int i = int(threadIdx.x);
  cuda::copy_async16(shared() + 4 * i, p.in + 4 * i, true);
  cuda::copy_commit();
  if (p.mode == 0) p.out[i] = shared()[4 * i];  // before the wait
  cuda::copy_wait<0>();
  if (p.mode == 1) p.out[i] = shared()[4 * i];        // after it, what this thread copied
  if (p.mode == 2) p.out[i] = shared()[4 * (i ^ 1)];  // what another did
  cuda::sync_block();
  if (p.mode == 3) p.out[i] = shared()[4 * (i ^ 1)];
}
void wide(Params p) {
  const int i = int(threadIdx.x);
  if (p.mode == 0) cuda::store16(p.out + 4 * (i / 2), cuda::Vec16{});
  if (p.mode == 1) cuda::store16(p.out + 4 * i, cuda::Vec16{});
  if (p.mode == 2) shared()[i] = 1, cuda::load16_shared(shared() + 4 * (i / 4));
}
// Blocks take turns to write the same address; a mode leaves one part of the protocol out.
void turns(Params p) {
  int *const counter = reinterpret_cast<int*>(p.out + 512), *const flag = counter + 1;  // both begin as -1
  auto* ticket = reinterpret_cast<int*>(shared());
  if (threadIdx.x == 0) *ticket = cuda::take_ticket(counter) + 1;
  cuda::sync_block();
  if (*ticket > 0 && threadIdx.x == 0 && p.mode != 1) cuda::wait_for(flag, *ticket, cuda::peek(flag));
  if (p.mode != 2) cuda::sync_block();
  p.out[threadIdx.x] = float(*ticket);
  if (p.mode != 3) cuda::sync_block();
  if (threadIdx.x == 0) cuda::post(flag, *ticket + 1);
}
// Blocks are not ordered by anything; mode 1 keeps apart what they write.
void blocks(Params p) { p.out[threadIdx.x + (p.mode ? 32 * blockIdx.x : 0)] = 1; }
// Every block reads; one block writes after a barrier, which orders that block's reads but not those of the other
// blocks.
void read_by_blocks(Params p) {
  const float x = p.out[0];
  cuda::sync_block();
  if (blockIdx.x == 0 && threadIdx.x == 0) p.out[0] = x;
}

void strided(Params p) {  // mode: words between neighbouring lanes
  p.out[p.mode * lane()] = shared()[p.mode * lane()];
}
void vectors(Params p) {
  cuda::store16(p.out + 4 * p.mode * lane(), cuda::load16_shared(shared() + 4 * p.mode * lane()));
}

void test_races() {
  const auto expect = [](void (*kernel)(Params), int mode, int threads, const std::string& kind, int blocks = 1) {
    const auto races = traced(kernel, mode, threads, blocks).races;
    const std::string found = races.empty() ? "" : races[0];
    check(error.empty() && (kind.empty() ? found.empty() : found.find(kind) != std::string::npos),
          "mode " + std::to_string(mode) + ": expected race '" + kind + "', found '" + found + "' " + error);
  };
  for (int seed = 0; seed < 10; ++seed) {
    simt::set_seed(seed);
    expect(lanes, 0, 32, "");
    expect(lanes, 1, 32, "");
    expect(warps, 1, 64, "");
    expect(write_after_read, 1, 64, "");
    expect(add, 1, 64, "");
    expect(copy, 1, 32, "");
    expect(copy, 3, 64, "");
    expect(wide, 1, 32, "");
    expect(blocks, 1, 32, "", 3);
    // Found whatever the order of warps and blocks.
    for (const int mode : {0, 1}) expect(own_is_last, mode, 32, "at byte 0 of shared memory");
    expect(read_by_blocks, 0, 96, "of a global buffer", 2);
    expect(turns, 0, 64, "", 4);
  }
  // A shuffle or a ballot makes lanes meet but orders no memory; sync_warp orders one warp only.
  for (const int mode : {2, 3, 4}) expect(lanes, mode, 32, "shared memory");
  for (const int mode : {0, 4}) expect(warps, mode, 64, "shared memory");
  for (const int mode : {0, 4}) expect(write_after_read, mode, 64, "shared memory");
  expect(add, 0, 64, "at byte 0 of shared memory");
  expect(copy, 0, 32, "access during an asynchronous copy");
  expect(copy, 2, 32, "read after write");
  expect(wide, 0, 32, "(store16 test_trace.cpp");
  expect(wide, 2, 32, "shared memory");
  expect(blocks, 0, 32, "write after write", 3);
  for (const int mode : {0, 1}) {
    traced(unseen, mode, 32);
    check(error.find(mode ? "global" : "shared") != std::string::npos, "an unseen write was not noticed: " + error);
  }
  for (const int mode : {1, 2, 3}) expect(turns, mode, 64, "write after write", 4);
}

void test_counts() {
  const auto expect = [](int64_t got, int64_t want, const std::string& what) {
    check(got == want, what + ": " + std::to_string(got) + ", not " + std::to_string(want));
  };
  for (const auto& [stride, passes, sectors] : {std::tuple{1, 1, 4}, {2, 2, 8}, {3, 1, 12}, {8, 8, 32}, {31, 1, 32}}) {
    const auto kernel = traced(strided, stride, 32);
    const std::string name = "stride " + std::to_string(stride);
    expect(kernel.total.requests, 2, name + " requests");
    expect(kernel.total.passes, passes, name + " passes");
    expect(kernel.total.ideal_passes, 1, name + " ideal passes");
    expect(kernel.total.sectors, sectors, name + " sectors");
    expect(kernel.total.sector_bytes, 128, name + " bytes used");
  }
  for (const auto& [stride, passes] : {std::pair{1, 4}, {2, 8}}) {
    const auto kernel = traced(vectors, stride, 32);
    expect(kernel.total.passes, passes, "16 bytes a lane, passes");
    expect(kernel.total.ideal_passes, 4, "16 bytes a lane, ideal passes");
    expect(kernel.total.sectors, 16 * stride, "16 bytes a lane, sectors");
  }
  const auto kernel = traced(lanes, 0, 32);
  check(kernel.name == "lanes", "the kernel's name is '" + kernel.name + "'");
  for (const auto& line : kernel.lines)
    check(line.where.rfind("test_trace.cpp:", 0) == 0, "a line is named '" + line.where + "'");
}

// --- the kernels -----------------------------------------------------------------------------------------------------
template <class Element>
void attention(int64_t B, int64_t T, int64_t H, int64_t D, double dropout) {
  std::mt19937_64 random(1);
  const simt::Buffer<Element> qkv(normal<Element>(random, B * T * 3 * H * D)),
      grad_out(normal<Element>(random, B * T * H * D));
  simt::Buffer<Element> out(B * T * H * D), grad_qkv(B * T * 3 * H * D);
  simt::Buffer<float> lse(B * H * T);
  const Attention x{Type<Element>::dtype, B, T, H, D, dropout, 5, qkv.data(), out.data(), lse.data(), grad_out.data(),
                    grad_qkv.data()};
  simt::Buffer<float> workspace(cuda::attention_backward_workspace(x));
  cuda::attention_forward(x, nullptr);
  cuda::attention_backward(x, workspace.data(), nullptr);
}

template <class Element>
void decode(int64_t B, int64_t P, int64_t H, int64_t D, int64_t length, int processors) {
  std::mt19937_64 random(1);
  const int64_t T = length + 3, row = H * D;
  const auto filled = normal<Element>(random, B * T * 2 * row);
  const simt::Buffer<Element> qkv(normal<Element>(random, B * 3 * row)), prefix(normal<Element>(random, P * 2 * row));
  std::vector<int64_t> whole;
  for (int64_t b = 0; b < B; ++b) whole.push_back(0), whole.push_back(P);
  const simt::Buffer<int64_t> lengths(std::vector<int64_t>(B, length)), spans(whole);
  simt::Buffer<Element> cache(filled.size()), out(B * row);
  std::copy(filled.begin(), filled.end(), cache.data());
  simt::set_multiprocessors(processors);
  const DecodeAttention x{
      Type<Element>::dtype, B,         P, T, H, D, qkv.data(), prefix.data(), spans.data(), cache.data(),
      lengths.data(),       out.data()};
  simt::Buffer<float> workspace(cuda::decode_attention_workspace(x));
  cuda::decode_attention(x, workspace.data(), nullptr);
}

template <class Element>
void sample(int64_t B, int64_t V, int64_t top_k, double top_p) {
  std::mt19937_64 random(1);
  const simt::Buffer<Element> logits(normal<Element>(random, B * V, 3));
  const simt::Buffer<int64_t> rows(std::vector<int64_t>(B, 3)), steps(std::vector<int64_t>(B, 4));
  simt::Buffer<int64_t> tokens(B);
  simt::Buffer<float> logprobs(B), entropy(B);
  cuda::sample({Type<Element>::dtype, B, V, logits.data(), rows.data(), steps.data(), 7, 1.0, top_k, top_p,
                tokens.data(), logprobs.data(), entropy.data()},
               nullptr);
}

template <class Element>
void logprob(int64_t N, int64_t V) {
  std::mt19937_64 random(1);
  const int64_t stride = (V + 63) / 64 * 64;  // as in cuda/ops.cpp
  const simt::Buffer<float> logits(normal<float>(random, N * stride, 3));
  simt::Buffer<Element> grad(N * stride);
  const simt::Buffer<int64_t> targets(std::vector<int64_t>(N, V / 2));
  const simt::Buffer<float> grad_logprob(normal<float>(random, N)), grad_entropy(normal<float>(random, N));
  simt::Buffer<float> out(N), entropy(N);
  simt::Buffer<double> lse(N);
  const cuda::LogitChunk x{Type<Element>::dtype,
                           N,
                           V,
                           stride,
                           logits.data(),
                           grad.data(),
                           targets.data(),
                           out.data(),
                           entropy.data(),
                           lse.data(),
                           grad_logprob.data(),
                           grad_entropy.data(),
                           0};
  cuda::logit_stats(x, nullptr);
  cuda::logit_grad(x, nullptr);
}

template <class Element>
void gelu(int64_t rows, int64_t N) {
  std::mt19937_64 random(1);
  const simt::Buffer<Element> x(normal<Element>(random, rows * N)), grad_y(normal<Element>(random, rows * N));
  simt::Buffer<Element> grad(rows * N);
  simt::Buffer<float> parts(cuda::gelu_blocks(rows) * N);
  cuda::gelu_backward({Type<Element>::dtype, rows, N, grad_y.data(), x.data(), grad.data(), parts.data()}, nullptr);
}

template <class Branch, class Out>
void norm(int64_t rows, int64_t C, bool with_branch, double dropout) {
  std::mt19937_64 random(1);
  const size_t n = rows * C;
  const simt::Buffer<float> x(normal<float>(random, n)), weight(normal<float>(random, C)), bias(weight.read());
  const simt::Buffer<float> grad_sum(normal<float>(random, n));
  const simt::Buffer<Branch> branch(normal<Branch>(random, n));
  const simt::Buffer<Out> grad_y(normal<Out>(random, n));
  simt::Buffer<float> sum(n), mean(rows), scale(rows), grad_x(n), parts(2 * cuda::layer_norm_blocks(rows) * C);
  simt::Buffer<Branch> grad_branch(n);
  simt::Buffer<Out> y(n);
  LayerNorm p{.branch_type = Type<Branch>::dtype,
              .y_type = Type<Out>::dtype,
              .rows = rows,
              .C = C,
              .dropout = dropout,
              .seed = 3,
              .x = x.data(),
              .branch = with_branch ? branch.data() : nullptr,
              .weight = weight.data(),
              .bias = bias.data(),
              .sum = sum.data(),
              .mean = mean.data(),
              .scale = scale.data(),
              .y = y.data(),
              .grad_y = grad_y.data(),
              .grad_sum = with_branch ? grad_sum.data() : nullptr,
              .grad_x = grad_x.data(),
              .grad_branch = with_branch ? grad_branch.data() : nullptr,
              .parts = parts.data()};
  cuda::layer_norm(p, nullptr);
  if (with_branch) p.x = sum.data();
  cuda::layer_norm_backward(p, nullptr);
}

// The runs with budgets in budgets.txt, and runs with shapes that are chosen for races alone.
const std::vector<std::pair<std::string, std::function<void()>>> kBudgeted{
    {"attention", [] { attention<cuda::bf16>(1, 256, 2, 64, 0); }},
    {"attention-dropout", [] { attention<cuda::bf16>(1, 256, 1, 64, 0.1); }},
    {"attention-f32", [] { attention<float>(1, 64, 2, 64, 0); }},
    {"decode", [] { decode<cuda::bf16>(4, 20, 4, 64, 45, 1); }},
    {"decode-split", [] { decode<cuda::bf16>(2, 20, 2, 64, 300, 4); }},
    {"sample", [] { sample<cuda::bf16>(2, 16000, 0, 1); }},
    {"sample-top-p", [] { sample<cuda::bf16>(2, 16000, 0, 0.9); }},
    {"logprob", [] { logprob<cuda::bf16>(2, 16000); }},
    {"logprob-odd", [] { logprob<cuda::bf16>(4, 16001); }},
    {"gelu", [] { gelu<cuda::bf16>(128, 768); }},
    {"layer-norm", [] { norm<cuda::bf16, cuda::bf16>(40, 768, true, 0.1); }},
};
const std::vector<std::pair<std::string, std::function<void()>>> kForRaces{
    {"attention bf16 T=150 D=32 dropout", [] { attention<cuda::bf16>(1, 150, 2, 32, 0.1); }},
    {"attention f16 T=130 D=64 dropout", [] { attention<cuda::f16>(1, 130, 1, 64, 0.1); }},
    {"attention bf16 T=70 D=128", [] { attention<cuda::bf16>(1, 70, 1, 128, 0); }},
    {"attention f32 T=70 D=32", [] { attention<float>(1, 70, 1, 32, 0); }},
    {"attention f32 T=40 D=128", [] { attention<float>(1, 40, 1, 128, 0.1); }},
    {"decode f32 D=32", [] { decode<float>(2, 130, 3, 32, 60, 1); }},
    {"decode f16 D=128", [] { decode<cuda::f16>(1, 0, 1, 128, 5, 1); }},
    {"sample f32 top-k and top-p, odd V", [] { sample<float>(1, 4099, 40, 0.5); }},
    {"sample bf16 top-k", [] { sample<cuda::bf16>(1, 1000, 5, 1); }},
    {"logprob f32, odd V", [] { logprob<float>(2, 5001); }},
    {"logprob f16", [] { logprob<cuda::f16>(1, 2048); }},
    {"gelu f16, odd sizes", [] { gelu<cuda::f16>(37, 264); }},
    {"layer_norm f32, odd rows", [] { norm<float, float>(37, 260, false, 0); }},
    {"layer_norm f16 to f32", [] { norm<cuda::f16, float>(3, 4400, true, 0.1); }},
};

std::vector<simt::trace::Kernel> run_traced(const std::string& name, const std::function<void()>& f, uint64_t seed) {
  simt::set_seed(seed);
  simt::trace::start();
  run(name, f);
  auto kernels = simt::trace::stop();
  for (const auto& kernel : kernels)
    for (const std::string& race : kernel.races) check(false, name + ", " + kernel.name + ": race: " + race);
  check(!kernels.empty(), name + ": no kernel was traced");
  return kernels;
}

void print_lines(const std::string& name, const simt::trace::Kernel& kernel) {
  const auto print = [](const std::string& where, const std::string& what, const simt::trace::Counts& c) {
    std::printf("  %-28s %-19s %9" PRId64 " %9" PRId64 " %9" PRId64 " %9" PRId64, where.c_str(), what.c_str(),
                c.requests, c.passes, c.ideal_passes, c.sectors);
    if (c.sectors) std::printf(" %6.0f%%", 100.0 * double(c.sector_bytes) / double(32 * c.sectors));
    else std::printf("       -");
    std::printf(" %9" PRId64 "\n", c.mma);
  };
  std::printf("%s: %s\n  %-28s %-19s %9s %9s %9s %9s %7s %9s\n", name.c_str(), kernel.name.c_str(), "", "", "requests",
              "passes", "ideal", "sectors", "used", "mma");
  for (const auto& line : kernel.lines) print(line.where, line.what, line.counts);
  print("total", "", kernel.total);
}

struct Budget {
  int64_t passes, sectors, mma;
};
std::map<std::pair<std::string, std::string>, Budget> read_budgets() {
  std::ifstream file(BUDGETS);
  check(bool(file), "cannot read " BUDGETS);
  std::map<std::pair<std::string, std::string>, Budget> budgets;
  for (std::string line; std::getline(file, line);) {
    std::istringstream fields(line);
    std::string run, kernel;
    Budget b;
    if (line[0] != '#' && fields >> run >> kernel >> b.passes >> b.sectors >> b.mma) budgets[{run, kernel}] = b;
  }
  return budgets;
}

// A count above the budget fails; so does a budget that is more than 5% above the count, since it would hide a loss.
void test_budgets(bool report) {
  auto budgets = read_budgets();
  std::string table;  // like budgets.txt, with each count before the budget
  for (const auto& [name, f] : kBudgeted)
    for (const auto& kernel : run_traced(name, f, 0)) {
      std::string key = kernel.name;
      std::erase(key, ' ');
      if (report) print_lines(name, kernel);
      const auto found = budgets.find({name, key});
      check(found != budgets.end(), name + " " + key + " has no budget");
      if (found == budgets.end()) continue;
      const auto hold = [&](const char* what, int64_t count, int64_t budget) {
        check(count <= budget && budget <= count + count / 20,
              name + " " + key + ": " + std::to_string(count) + " " + what + ", budget " + std::to_string(budget));
      };
      hold("passes", kernel.total.passes, found->second.passes);
      hold("sectors", kernel.total.sectors, found->second.sectors);
      hold("mma", kernel.total.mma, found->second.mma);
      char row[200];
      std::snprintf(row, sizeof row,
                    "%-13s %-33s %6" PRId64 " /%6" PRId64 " %6" PRId64 " /%6" PRId64 " %5" PRId64 " /%5" PRId64 "\n",
                    name.c_str(), key.c_str(), kernel.total.passes, found->second.passes, kernel.total.sectors,
                    found->second.sectors, kernel.total.mma, found->second.mma);
      table += row;
      budgets.erase(found);
    }
  if (report) std::printf("%-47s %14s %14s %12s\n%s", "counts / budgets", "passes", "sectors", "mma", table.c_str());
  for (const auto& [key, budget] : budgets)
    check(false, key.first + " " + key.second + " has a budget but did not run");
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode != "races") test_races(), test_counts(), test_budgets(mode == "report");
  else
    for (const auto& [name, f] : kBudgeted) run_traced(name, f, 0);
  for (const auto& [name, f] : kForRaces) run_traced(name, f, 1);
  return report("simt_trace");
}
