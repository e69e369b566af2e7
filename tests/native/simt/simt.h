// A small SIMT machine: runs CUDA kernels on the CPU, one block after another, each thread of a block a fiber.
//
// It is made to be the worst machine that CUDA allows. What a kernel may not rely on does not hold here:
//   * Between barriers the warps run in an order drawn from a seed: either one as far ahead of the others as its
//     barriers let it, or all interleaved. Lanes of a warp run in drawn order from one collective to the next.
//   * Blocks run in drawn order. Shared memory starts each block as NaNs, and so do global buffers (Buffer below).
//   * cp.async spoils its destination when it is issued and copies at the wait_group that waits for it, not before.
//   * Threads of a block that wait at different barriers, or that end while others wait, are an error which names both;
//     so are lanes of a warp that meet in different collectives.
//   * Reads and writes outside shared memory or outside every global buffer are errors, and so are misaligned ones.
//     Wide accesses are checked to the byte, all others by the protected pages around each buffer.
// Any of these ends the launch with an Error that says where: the kernel's line where a primitive was called.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the fiber that runs

namespace simt {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Where a kernel called a primitive.
struct Site {
  const char* what;
  const char* file;
  int line;
};

// --- for tests -------------------------------------------------------------------------------------------------------
void set_seed(uint64_t seed);  // of the schedule and of the side on which buffers meet their protected page
void set_multiprocessors(int count);
int64_t bank_conflicts();  // so far: extra passes that ldmatrix needed because rows of a matrix shared banks

void launch(unsigned blocks, unsigned threads, size_t shared_bytes, const std::function<void()>& thread);

// Global memory between protected pages, filled with 0xff bytes: NaN in every float format.
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
void check_shared(const void* p, size_t bytes, const Site&);
void check_global(const void* p, size_t bytes, bool write, const Site&);
int multiprocessors();
void count_bank_conflicts(int64_t passes);

void sync_block(const Site&);

// The 32 lanes of a warp meet; `run` gets what each brought, then all go on. Lanes must meet at the same site.
void meet(const Site&, void* brought, void (*run)(void* const (&lanes)[kWarpSize]));
template <class T>
void meet(const Site& site, T& brought, void (*run)(T* const (&lanes)[kWarpSize])) {
  // The function travels inside what is brought, so that the engine needs no templates.
  struct Parcel {
    T* value;
    void (*run)(T* const (&)[kWarpSize]);
  } parcel{&brought, run};
  meet(site, &parcel, [](void* const(&lanes)[kWarpSize]) {
    T* values[kWarpSize];
    for (int i = 0; i < kWarpSize; ++i) values[i] = static_cast<Parcel*>(lanes[i])->value;
    static_cast<Parcel*>(lanes[0])->run(values);
  });
}

void copy_async(void* to, const void* from, size_t bytes, bool valid, const Site&);
void copy_commit();
void copy_wait(int newest_left);

}  // namespace simt
