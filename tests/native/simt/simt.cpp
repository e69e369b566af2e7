// Fibers: makecontext gives each its stack once; after that, _setjmp and _longjmp switch without a system call.
#undef _FORTIFY_SOURCE  // its longjmp refuses to switch stacks
#include "simt.h"

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <memory>
#include <numeric>
#include <utility>

#include "trace.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {
namespace {

constexpr size_t kStackBytes = 256 << 10, kSharedLimit = 99 << 10;  // per block on sm_86
const size_t kPage = size_t(sysconf(_SC_PAGESIZE));
constexpr unsigned kMaxThreads = 1024;

struct Copy {
  char* to;
  const char* from;
  size_t bytes;
  bool valid;
  int group;
  Site site;
};

struct Fiber {
  jmp_buf at;
  ucontext_t start;
  bool created = false, done = true;
  Site site{"the start", "", 0};  // where it waits, or the last primitive it called
  std::vector<Copy> copies;
  int groups = 0;  // committed so far
};

struct Warp {
  uint32_t runnable = 0, arrived = 0;
  void* arguments[kWarpSize];
};

// xorshift64*
struct Random {
  uint64_t state = 0x9E3779B97F4A7C15u;
  uint32_t operator()() {
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return uint32_t((state * 0x2545F4914F6CDD1Du) >> 32);
  }
  template <class T>
  void shuffle(std::vector<T>& v) {
    for (size_t i = v.size(); i > 1; --i) std::swap(v[i - 1], v[(*this)() % i]);
  }
};

struct Machine {
  Random random;
  bool at_page_end = true;
  int multiprocessors = 4;
  int l2_bytes = 40 << 20;  // an A100's
  bool trusting = false;
  int64_t conflicts = 0;
  std::vector<std::pair<const char*, size_t>> buffers;

  char *stacks = nullptr, *shared_map = nullptr, *shared = nullptr;
  size_t shared_bytes = 0;
  std::vector<Fiber> fibers{kMaxThreads};
  std::vector<Warp> warps{kMaxThreads / kWarpSize};
  std::vector<unsigned> priority;  // warps, highest priority first
  bool run_ahead = true;
  unsigned threads = 0, at_barrier = 0, first_at_barrier = 0, done = 0, current = 0;
  bool in_fiber = false;
  jmp_buf scheduler;
  const std::function<void()>* thread = nullptr;
  std::string error;
} m;

std::string at(const Site& s) {
  const char* slash = std::strrchr(s.file, '/');
  return std::string(s.what) +
         (s.line ? " (" + std::string(slash ? slash + 1 : s.file) + ":" + std::to_string(s.line) + ")" : "");
}
bool same(const Site& a, const Site& b) {
  const auto equal = [](const char* x, const char* y) { return x == y || std::strcmp(x, y) == 0; };
  return a.line == b.line && equal(a.what, b.what) && equal(a.file, b.file);
}
std::string thread_name(unsigned i) { return "block " + std::to_string(blockIdx.x) + " thread " + std::to_string(i); }

void* map(size_t bytes, int protection) {
  void* p = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return p;
}

// Ends the launch from inside a fiber, abandoning all stacks: kernels hold nothing that needs a destructor.
[[noreturn]] void end_launch(std::string why) {
  m.error = std::move(why);
  _longjmp(m.scheduler, 2);
}

void yield() {
  if (_setjmp(m.fibers[m.current].at) == 0) _longjmp(m.scheduler, 1);
}

void fiber_main() {
  for (;;) {
    (*m.thread)();
    Fiber& f = m.fibers[m.current];
    f.done = true;
    f.site.what = "its end, last at";
    ++m.done;
    m.warps[m.current / kWarpSize].runnable &= ~(1u << m.current % kWarpSize);
    yield();
  }
}

void switch_to(unsigned i) {
  m.current = i;
  threadIdx = {i, 0, 0};
  Fiber& f = m.fibers[i];
  m.in_fiber = true;
  if (!f.created) {
    f.created = true;
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = m.stacks + i * kStackBytes + kPage;  // the page below it stays protected
    f.start.uc_stack.ss_size = kStackBytes - kPage;
    f.start.uc_link = nullptr;
    makecontext(&f.start, fiber_main, 0);
    setcontext(&f.start);
  }
  _longjmp(f.at, 1);
}

void draw_order() {
  m.random.shuffle(m.priority);
  m.run_ahead = m.random() % 4 != 0;
}

// The next thread to run, or -1 when none can.
int next_thread() {
  const size_t n = m.priority.size(), first = m.run_ahead ? 0 : m.random() % n;
  for (size_t i = 0; i < n; ++i) {
    const unsigned w = m.priority[(first + i) % n];
    const uint32_t runnable = m.warps[w].runnable;
    if (!runnable) continue;
    const unsigned turn = m.random() % kWarpSize;
    const uint32_t rotated = runnable >> turn | uint64_t(runnable) << (kWarpSize - turn);
    return int(w * kWarpSize + (__builtin_ctz(rotated) + turn) % kWarpSize);
  }
  return -1;
}

std::string stuck() {
  unsigned waits = m.threads, other = m.threads;
  for (unsigned i = 0; i < m.threads; ++i)
    if (!m.fibers[i].done) waits = waits == m.threads ? i : waits;
  for (unsigned i = 0; i < m.threads; ++i)
    if (m.fibers[i].done || !same(m.fibers[i].site, m.fibers[waits].site)) other = other == m.threads ? i : other;
  std::string why = thread_name(waits) + " waits for ever at " + at(m.fibers[waits].site);
  if (other < m.threads) why += ", while thread " + std::to_string(other) + " is at " + at(m.fibers[other].site);
  return why;
}

void run_block() {
  std::memset(m.shared, kPoison, m.shared_bytes);
  m.at_barrier = m.done = 0;
  for (unsigned i = 0; i < m.threads; ++i) {
    Fiber& f = m.fibers[i];
    f.done = false;
    f.copies.clear();
    f.groups = 0;
  }
  for (unsigned w : m.priority) m.warps[w].runnable = ~0u, m.warps[w].arrived = 0;
  draw_order();
  if (trace::on()) trace::begin_block();
  switch (_setjmp(m.scheduler)) {
    case 2:  // an error: the next launch creates the fibers anew
      m.in_fiber = false;
      for (Fiber& f : m.fibers) f.created = false;
      throw Error(m.error);
    default: m.in_fiber = false;
  }
  if (m.done == m.threads) {
    if (trace::on()) trace::end_block();
    return;
  }
  const int next = next_thread();
  if (next < 0) {
    for (Fiber& f : m.fibers) f.created = false;
    throw Error(stuck());
  }
  switch_to(unsigned(next));
}

void on_fault(int signal, siginfo_t* info, void*) {
  if (!m.in_fiber) {
    std::signal(signal, SIG_DFL);
    return;
  }
  char address[32];
  std::snprintf(address, sizeof address, "%p", info->si_addr);
  const std::string what =
      signal == SIGFPE ? " divided by 0" : std::string(" touched memory that is not its own, ") + address;
  end_launch(thread_name(m.current) + what + ", after " + at(m.fibers[m.current].site));
}

void start_machine() {
  m.stacks = static_cast<char*>(map(kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE));
  for (unsigned i = 0; i < kMaxThreads; ++i) mprotect(m.stacks + i * kStackBytes, kPage, PROT_NONE);
  m.shared_map = static_cast<char*>(map(kSharedLimit + 3 * kPage, PROT_NONE));
  static char signal_stack[64 << 10];
  stack_t own{};
  own.ss_sp = signal_stack;
  own.ss_size = sizeof signal_stack;
  sigaltstack(&own, nullptr);
  struct sigaction action{};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (int signal : {SIGSEGV, SIGBUS, SIGFPE}) sigaction(signal, &action, nullptr);
}

// Shared memory ends at a protected page and begins within a page after another.
void place_shared(size_t bytes) {
  if (bytes > kSharedLimit) throw Error("launch: " + std::to_string(bytes) + " bytes of shared memory are too many");
  m.shared_bytes = (bytes + 15) / 16 * 16;
  const size_t pages = (m.shared_bytes + kPage - 1) / kPage * kPage, all = (kSharedLimit + kPage - 1) / kPage * kPage;
  char* end = m.shared_map + kPage + all;
  mprotect(m.shared_map, kPage + all, PROT_NONE);
  if (pages) mprotect(end - pages, pages, PROT_READ | PROT_WRITE);
  m.shared = end - m.shared_bytes;
}

}  // namespace

void set_seed(uint64_t seed) {
  m.random.state = (seed + 1) * 0x9E3779B97F4A7C15u;
  m.at_page_end = seed % 2 == 0;
}
void set_multiprocessors(int count) { m.multiprocessors = count; }
void set_l2_bytes(int bytes) { m.l2_bytes = bytes; }
void trust_global_memory() { m.trusting = true; }
int multiprocessors() { return m.multiprocessors; }
int l2_bytes() { return m.l2_bytes; }
uint32_t random() { return m.random(); }
int64_t bank_conflicts() { return m.conflicts; }

void launch(const void* kernel, unsigned blocks, unsigned threads, size_t shared_bytes,
            const std::function<void()>& thread) {
  if (!m.stacks) start_machine();
  if (threads == 0 || threads % kWarpSize || threads > kMaxThreads)
    throw Error("launch: " + std::to_string(threads) + " threads are not 1 to 32 whole warps");
  if (blocks == 0) throw Error("launch: no blocks");
  place_shared(shared_bytes);
  m.threads = threads;
  m.thread = &thread;
  m.priority.resize(threads / kWarpSize);
  std::iota(m.priority.begin(), m.priority.end(), 0u);
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  m.random.shuffle(order);
  blockDim = {threads, 1, 1};
  gridDim = {blocks, 1, 1};
  if (trace::on()) trace::begin_launch(kernel);
  for (unsigned b : order) {
    blockIdx = {b, 0, 0};
    run_block();
  }
  if (trace::on()) trace::end_launch();
}

void fail(const Site& site, const std::string& why) {
  end_launch(thread_name(m.current) + " at " + at(site) + ": " + why);
}

char* shared_memory() { return m.shared; }
size_t shared_bytes() { return m.shared_bytes; }
bool in_kernel() { return m.in_fiber; }
unsigned running_thread() { return m.current; }
bool on_stack(const void* p) { return p >= m.stacks && p < m.stacks + kMaxThreads * kStackBytes; }
const std::vector<std::pair<const char*, size_t>>& buffers() { return m.buffers; }
std::pair<const char*, size_t> find_buffer(const void* p) {
  for (const auto& [begin, size] : m.buffers)
    if (p >= begin && p < begin + size) return {begin, size};
  return {};
}

namespace {

void check_shared(const void* p, size_t bytes, const Site& site) {
  const char* c = static_cast<const char*>(p);
  if (c < m.shared || c + bytes > m.shared + m.shared_bytes)
    fail(site, std::to_string(c - m.shared) + " is outside the " + std::to_string(m.shared_bytes) +
                   " bytes of shared memory");
  if (uintptr_t(p) % bytes) fail(site, "shared address is not a multiple of " + std::to_string(bytes));
}

void check_global(const void* p, size_t bytes, bool write, const Site& site) {
  if (uintptr_t(p) % bytes) fail(site, "global address is not a multiple of " + std::to_string(bytes));
  if (m.trusting) return;
  const auto [begin, size] = find_buffer(p);
  if (!begin || static_cast<const char*>(p) + bytes > begin + size)
    fail(site, std::string(write ? "write" : "read") + " outside every global buffer");
}

void note(const void* p, size_t bytes, trace::Access access, const Site& site) {
  if (trace::on()) trace::access(p, bytes, access, site);
}

}  // namespace

void load_global(void* to, const void* from, size_t bytes, const Site& site) {
  check_global(from, bytes, false, site);
  note(from, bytes, trace::Access::read, site);
  std::memcpy(to, from, bytes);
}
void store_global(void* to, const void* from, size_t bytes, const Site& site) {
  check_global(to, bytes, true, site);
  note(to, bytes, trace::Access::write, site);
  std::memcpy(to, from, bytes);
}
void load_shared(void* to, const void* from, size_t bytes, const Site& site) {
  check_shared(from, bytes, site);
  note(from, bytes, trace::Access::read, site);
  std::memcpy(to, from, bytes);
}
void atomic_add_shared(uint64_t* p, uint64_t x, const Site& site) {
  check_shared(p, 8, site);
  note(p, 8, trace::Access::atomic, site);
  *p += x;
}

int take_ticket(int* counter, const Site& site) {
  check_global(counter, 4, true, site);
  note(counter, 4, trace::Access::atomic, site);
  return (*counter)++;
}
void post(int* flag, int value, const Site& site) {
  check_global(flag, 4, true, site);
  note(flag, 4, trace::Access::atomic, site);
  if (trace::on()) trace::post(flag);
  *flag = value;
}
int peek(const int* flag, const Site& site) {
  check_global(flag, 4, false, site);
  note(flag, 4, trace::Access::atomic, site);
  return *flag;
}
void wait_for(const int* flag, int value, const Site& site) {
  if (peek(flag, site) != value)
    fail(site, "waits for ever for " + std::to_string(value) + ": the flag is " + std::to_string(*flag));
  if (trace::on()) trace::saw(flag);
}

void sync_block(const Site& site) {
  Fiber& f = m.fibers[m.current];
  f.site = site;
  if (!m.at_barrier) m.first_at_barrier = m.current;
  const Site& first = m.fibers[m.first_at_barrier].site;
  if (!same(first, site))
    fail(site, "divergent barrier: thread " + std::to_string(m.first_at_barrier) + " waits at " + at(first));
  Warp& w = m.warps[m.current / kWarpSize];
  w.runnable &= ~(1u << m.current % kWarpSize);
  if (++m.at_barrier == m.threads) {
    m.at_barrier = 0;
    if (trace::on()) trace::block_barrier();
    for (unsigned i : m.priority) m.warps[i].runnable = ~0u;
    draw_order();
  }
  yield();
}

void meet(const Site& site, void* argument, void (*run)(void* const (&lanes)[kWarpSize])) {
  Warp& w = m.warps[m.current / kWarpSize];
  const unsigned lane = m.current % kWarpSize;
  if (w.arrived) {
    const unsigned first = m.current - lane + unsigned(__builtin_ctz(w.arrived));
    const Site& other = m.fibers[first].site;
    if (!same(other, site)) fail(site, "divergent warp: thread " + std::to_string(first) + " waits at " + at(other));
  }
  m.fibers[m.current].site = site;
  w.arguments[lane] = argument;
  w.arrived |= 1u << lane;
  if (w.arrived == ~0u) {
    if (trace::on()) trace::converge(m.current / kWarpSize);
    run(w.arguments);
    w.arrived = 0;
    w.runnable = ~0u;
  } else {
    w.runnable &= ~(1u << lane);
  }
  yield();
}

void sync_warp(const Site& site) {
  meet(site, nullptr, [](void* const(&)[kWarpSize]) {
    if (trace::on()) trace::warp_barrier(m.current / kWarpSize);
  });
}

void ldmatrix(uint32_t (&r)[4], const void* row, bool transposed, const Site& site) {
  struct Args {
    uint32_t* r;
    const char* row;
    bool transposed;
  } args{r, static_cast<const char*>(row), transposed};
  check_shared(row, 16, site);
  note(row, 16, trace::Access::read, site);
  meet<Args>(site, args, [](Args* const(&lanes)[kWarpSize]) {
    for (int i = 0; i < 4; ++i) {  // matrix i: lane 8 i + j passed the address of its row j
      int rows_at[8] = {};         // by group of four banks
      for (int j = 0; j < 8; ++j) ++rows_at[uintptr_t(lanes[8 * i + j]->row) / 16 % 8];
      m.conflicts += *std::max_element(rows_at, rows_at + 8) - 1;
      for (int lane = 0; lane < kWarpSize; ++lane)
        for (int half = 0; half < 2; ++half) {
          int row = lane / 4, column = 2 * (lane % 4) + half;
          if (lanes[0]->transposed) std::swap(row, column);
          std::memcpy(reinterpret_cast<char*>(lanes[lane]->r + i) + 2 * half, lanes[8 * i + row]->row + 2 * column, 2);
        }
    }
  });
}

void copy_async(void* to, const void* from, size_t bytes, bool valid, const Site& site) {
  check_shared(to, bytes, site);
  if (valid) check_global(from, bytes, false, site);
  Fiber& f = m.fibers[m.current];
  f.site = site;
  note(to, bytes, trace::Access::copy_issued, site);
  if (valid) note(from, bytes, trace::Access::read, site);
  std::memset(to, kPoison, bytes);
  f.copies.push_back({static_cast<char*>(to), static_cast<const char*>(from), bytes, valid, f.groups, site});
}
void copy_commit() { ++m.fibers[m.current].groups; }
void copy_wait(int pending_groups) {
  Fiber& f = m.fibers[m.current];
  std::erase_if(f.copies, [&](const Copy& c) {
    if (c.group >= f.groups - pending_groups) return false;
    note(c.to, c.bytes, trace::Access::copy_landed, c.site);
    if (c.valid) note(c.from, c.bytes, trace::Access::late_read, c.site);
    if (c.valid) std::memcpy(c.to, c.from, c.bytes);
    else std::memset(c.to, 0, c.bytes);
    return true;
  });
}

Memory::Memory(size_t bytes) : bytes_(bytes) {
  const size_t pages = std::max<size_t>(1, (bytes + kPage - 1) / kPage) * kPage;
  mapped_ = pages + 2 * kPage;
  map_ = static_cast<char*>(map(mapped_, PROT_NONE));
  mprotect(map_ + kPage, pages, PROT_READ | PROT_WRITE);
  std::memset(map_ + kPage, kPoison, pages);
  // 16-byte aligned, as torch's allocations are, so up to 15 bytes remain between the buffer and the protected page.
  data_ = map_ + kPage + (m.at_page_end ? pages - (bytes + 15) / 16 * 16 : 0);
  m.buffers.push_back({data_, bytes_});
}
Memory::~Memory() {
  std::erase_if(m.buffers, [&](const auto& b) { return b.first == data_; });
  munmap(map_, mapped_);
}
void Memory::protect_from_writes() { mprotect(map_ + kPage, mapped_ - 2 * kPage, PROT_READ); }
void Memory::check_edges() const {
  for (const char* p = map_ + kPage; p < map_ + mapped_ - kPage; ++p)
    if ((p < data_ || p >= data_ + bytes_) && *p != kPoison) throw Error("a kernel wrote beside a global buffer");
}

}  // namespace simt
