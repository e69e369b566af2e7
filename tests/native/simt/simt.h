// A small SIMT machine: runs CUDA kernels on the CPU, one block after another, with one fiber per thread of a block.
//
// It is the most adversarial machine that CUDA allows. Guarantees that CUDA does not give do not hold here either:
//   * Between barriers, warps run in a random order (from a seed): either one warp runs as far ahead of the others as
//   its
//     barriers allow, or all are interleaved. Lanes of a warp run in random order from one collective to the next.
//   * Blocks run in random order. Shared memory is filled with NaNs before each block; so are global buffers (Buffer).
//   * cp.async overwrites its destination with NaNs when it is issued, and copies only at the wait_group that waits for
//   it.
//   * It is an error, which names both threads, if threads of a block wait at different barriers or end while others
//     wait, or if lanes of a warp wait at different collectives.
//   * Accesses outside shared memory or outside every global buffer are errors, and so are misaligned accesses. Wide
//     accesses are checked exactly, all others by the protected pages around each buffer.
// Each of these ends the launch with an Error that names the line of the kernel that called the primitive.
// The machine does not see inline PTX, since it compiles twins of primitives.cuh, nor blocks that run at the same time,
// and so no wait, release or fence between blocks. The interpreter in ../ptx runs both. trace.h adds what a schedule
// cannot show: data races that happened not to change a result, and memory traffic.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the running fiber

namespace simt {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Where a kernel calls a primitive. Two sites are the same if name, file and line are.
struct Site {
  const char* what;
  const char* file;
  int line;
};

// --- for tests -------------------------------------------------------------------------------------------------------
void set_seed(uint64_t seed);  // of the schedule; odd or even decides on which side buffers touch a protected page
void set_multiprocessors(int count);
void set_l2_bytes(int bytes);
void trust_global_memory();  // from now on kernels may access any, since others allocate it
int64_t bank_conflicts();    // extra passes of all ldmatrix so far, because rows of a matrix shared banks

void launch(const void* kernel, unsigned blocks, unsigned threads, size_t shared_bytes,
            const std::function<void()>& thread);

// Global memory between protected pages, filled with 0xff bytes, which are NaN in every float format.
class Memory {
 public:
  explicit Memory(size_t bytes);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  char* data() const { return data_; }
  void protect_from_writes();
  void check_edges() const;  // throws if the few bytes between the buffer and its protected page were written

 private:
  size_t bytes_, mapped_;
  char *map_, *data_;
};

template <class T>
class Buffer {
 public:
  explicit Buffer(size_t n) : n_(n), memory_(n * sizeof(T)) {}
  explicit Buffer(const std::vector<T>& from) : Buffer(from.size()) {  // read-only to kernels
    std::memcpy(memory_.data(), from.data(), n_ * sizeof(T));
    memory_.protect_from_writes();
  }
  T* data() const { return reinterpret_cast<T*>(memory_.data()); }
  std::vector<T> read() const {
    memory_.check_edges();
    return std::vector<T>(data(), data() + n_);
  }

 private:
  size_t n_;
  Memory memory_;
};

// --- for primitives --------------------------------------------------------------------------------------------------
constexpr int kWarpSize = 32;

[[noreturn]] void fail(const Site&, const std::string& why);
char* shared_memory();
int multiprocessors();
int l2_bytes();
uint32_t random();  // of the schedule

// Accesses of `bytes` bytes, aligned to as many. Each is checked, and traced as one access of the lane.
void load_global(void* to, const void* from, size_t bytes, const Site&);
void store_global(void* to, const void* from, size_t bytes, const Site&);
void load_shared(void* to, const void* from, size_t bytes, const Site&);
void atomic_add_shared(uint64_t*, uint64_t, const Site&);
// Blocks run one after another, so a flag that a block waits for is set already, or never: an error.
int take_ticket(int* counter, const Site&);
void post(int* flag, int value, const Site&);
int peek(const int* flag, const Site&);
void wait_for(const int* flag, int value, const Site&);
void ldmatrix(uint32_t (&r)[4], const void* row, bool transposed, const Site&);
void copy_async(void* to, const void* from, size_t bytes, bool valid, const Site&);
void copy_commit();
void copy_wait(int pending_groups);

void sync_block(const Site&);
void sync_warp(const Site&);

// A warp-wide collective: when all 32 lanes have arrived, `run` gets the argument of each, then all continue. All lanes
// must call it at the same site.
void meet(const Site&, void* argument, void (*run)(void* const (&lanes)[kWarpSize]));
template <class Argument>
void meet(const Site& site, Argument& argument, void (*run)(Argument* const (&lanes)[kWarpSize])) {
  // The function is passed inside the argument, so that the machine needs no templates.
  struct Call {
    Argument* value;
    void (*run)(Argument* const (&)[kWarpSize]);
  } call{&argument, run};
  meet(site, &call, [](void* const(&lanes)[kWarpSize]) {
    Argument* values[kWarpSize];
    for (int i = 0; i < kWarpSize; ++i) values[i] = static_cast<Call*>(lanes[i])->value;
    static_cast<Call*>(lanes[0])->run(values);
  });
}

// --- for the tracer --------------------------------------------------------------------------------------------------
bool in_kernel();
unsigned running_thread();
size_t shared_bytes();
bool on_stack(const void*);                                    // of any thread of the block
const std::vector<std::pair<const char*, size_t>>& buffers();  // in global memory: begin and size
std::pair<const char*, size_t> find_buffer(const void*);       // or null
constexpr char kPoison = char(0xff);  // memory before its first write; floats of these bytes are NaN

}  // namespace simt
