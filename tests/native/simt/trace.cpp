#include "trace.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <map>
#include <memory>
#include <set>
#include <sstream>
#include <tuple>
#include <unordered_map>
#include <utility>

namespace simt::trace {
namespace {

constexpr unsigned kMaxWarps = 32;

// A source line of a kernel: the call of a primitive, or the return address of a hook until addr2line has named it.
struct Place {
  std::string what, where;
  const void* address = nullptr;
};

Known known,
    seen;  // accesses before everything that the running block now does; before everything after its next barrier

// One instruction of one warp: the addresses of the lanes that took part.
struct Request {
  uint32_t lanes = 0;
  uintptr_t address[kWarpSize];
  unsigned bytes;
  bool shared, atomic;
};
// The requests of one source line since the warp last converged, the n-th executions of all lanes together.
struct Open {
  std::array<uint16_t, kWarpSize> executions{};
  std::vector<Request> requests;
};

struct Race {
  std::string text;
  int64_t count = 0;
};
struct Launched {
  std::map<uint32_t, Counts> places;
  std::map<std::tuple<std::string, uint32_t, uint32_t>, Race> races;
};

struct State {
  bool on = false;
  std::vector<Place> places;
  std::unordered_map<const void*, uint32_t> by_address;
  std::map<std::tuple<const char*, const char*, int>, uint32_t> by_site;
  std::vector<const void*> order;  // of kernels
  std::map<const void*, Launched> kernels;
  Launched* kernel = nullptr;

  std::vector<Shadow> shared;
  std::map<const char*, std::vector<Shadow>> global;
  std::map<const char*, std::vector<char>> at_launch;  // contents of the global buffers
  std::array<std::unordered_map<uint32_t, Open>, kMaxWarps> open;
  uint32_t block_barriers = 0;  // of all blocks of all launches so far
  std::array<uint32_t, kMaxWarps> warp_barriers{};
  std::map<const int*, Known> flags;  // the accesses known to the block that posted it
} state;

uint32_t place_of(const Site& site) {
  const auto [found, added] = state.by_site.try_emplace({site.what, site.file, site.line}, state.places.size());
  if (added) {
    const char* slash = std::strrchr(site.file, '/');
    state.places.push_back({site.what, (slash ? slash + 1 : site.file) + (":" + std::to_string(site.line))});
  }
  return found->second;
}

uint32_t place_of(const void* return_address, bool write) {
  const auto [found, added] = state.by_address.try_emplace(return_address, state.places.size());
  if (added) state.places.push_back({write ? "store" : "load", "", return_address});
  return found->second;
}

// --- races -----------------------------------------------------------------------------------------------------------
void report(const std::string& kind, const char* offset_name, size_t offset, const Stamp& before, const Stamp& now) {
  Race& race = state.kernel->races[{kind, before.place, now.place}];
  if (race.count++) return;
  std::ostringstream text;
  text << kind << " at byte " << offset << " of " << offset_name << ": thread " << now.thread << " of block "
       << now.block << " and thread " << before.thread << " of block " << before.block;
  race.text = text.str();
}

// --- counts ----------------------------------------------------------------------------------------------------------
void count_shared(const Request& r, Counts& c) {
  const unsigned group = r.bytes >= 16 ? 8 : r.bytes == 8 ? 16 : 32;  // lanes served in one pass without conflicts
  for (unsigned first = 0; first < kWarpSize; first += group) {
    std::array<std::set<uintptr_t>, 32> words;  // by bank
    size_t most = 0;
    for (unsigned lane = first; lane < first + group; ++lane)
      if (r.lanes >> lane & 1)
        for (uintptr_t word = r.address[lane] / 4; word <= (r.address[lane] + r.bytes - 1) / 4; ++word) {
          words[word % 32].insert(r.atomic ? word * kWarpSize + lane : word);  // atomics on one word take turns
          most = std::max(most, words[word % 32].size());
        }
    c.passes += int64_t(most);
    c.ideal_passes += most > 0;
  }
}

void count_global(const Request& r, Counts& c) {
  std::set<uintptr_t> sectors, bytes;
  for (unsigned lane = 0; lane < kWarpSize; ++lane)
    if (r.lanes >> lane & 1)
      for (unsigned i = 0; i < r.bytes; ++i) {
        bytes.insert(r.address[lane] + i);
        sectors.insert((r.address[lane] + i) / 32);
      }
  c.sectors += int64_t(sectors.size());
  c.sector_bytes += int64_t(bytes.size());
}

void close(unsigned warp) {
  for (auto& [place, open] : state.open[warp])
    for (const Request& r : open.requests) {
      Counts& c = state.kernel->places[place];
      ++c.requests;
      if (r.shared) count_shared(r, c);
      else count_global(r, c);
    }
  state.open[warp].clear();
}

void count(const char* p, unsigned bytes, bool shared, bool atomic, uint32_t place, unsigned thread) {
  Open& open = state.open[thread / kWarpSize][place];
  const unsigned lane = thread % kWarpSize, n = open.executions[lane]++;
  if (n == open.requests.size()) open.requests.emplace_back();
  Request& r = open.requests[n];
  r.lanes |= 1u << lane;
  r.address[lane] = shared ? uintptr_t(p - shared_memory()) : uintptr_t(p);
  r.bytes = bytes;
  r.shared = shared;
  r.atomic = atomic;
}

// The memory that a kernel shares between threads.
struct Location {
  const char* begin;
  size_t size;
  bool shared;
};
Location locate(const void* p) {
  const char* shared = shared_memory();
  if (p >= shared && p < shared + shared_bytes()) return {shared, shared_bytes(), true};
  if (on_stack(p)) return {};
  const auto [begin, size] = find_buffer(p);
  return {begin, size, false};
}

void record(const void* p, size_t bytes, const Location& in, Access access, uint32_t place) {
  const unsigned thread = running_thread(), warp = thread / kWarpSize;
  const Stamp now{int32_t(thread), blockIdx.x, state.block_barriers, state.warp_barriers[warp], place};
  std::vector<Shadow>& shadow = in.shared ? state.shared : state.global[in.begin];
  if (shadow.size() < in.size) shadow.resize(in.size);
  const size_t first = size_t(static_cast<const char*>(p) - in.begin);
  for (size_t i = first; i < first + bytes; ++i)
    shadow[i].touch(now, access, known, [&](const char* kind, const Stamp& before) {
      report(kind, in.shared ? "shared memory" : "a global buffer", i, before, now);
    });
  if (access != Access::copy_landed && access != Access::late_read)
    count(static_cast<const char*>(p), unsigned(bytes), in.shared, access == Access::atomic, place, thread);
}

// A write that no hook reported, of a library's function for instance, would hide races.
void check_seen(const std::string& name, const char* begin, const std::vector<char>& before,
                std::vector<Shadow>& shadow) {
  shadow.resize(before.size());
  for (size_t i = 0; i < before.size(); ++i)
    if (begin[i] != before[i] && !shadow[i].written())
      throw Error("trace: byte " + std::to_string(i) + " of " + name + " changed, but no write was seen");
}

// --- names -----------------------------------------------------------------------------------------------------------
// Function and "file:line" of each address in this program, innermost inlined function first. The traced programs are
// linked without position independence, so an address is what the debug information has.
std::vector<std::pair<std::string, std::string>> name(const std::vector<const void*>& addresses) {
  std::vector<std::pair<std::string, std::string>> names;
  if (addresses.empty()) return names;
  char self[4096];
  const ssize_t length = readlink("/proc/self/exe", self, sizeof self);
  std::ostringstream command;
  command << "addr2line -Cfe '" << std::string(self, size_t(std::max<ssize_t>(length, 0))) << "'";
  for (const void* a : addresses) command << ' ' << a;
  const std::unique_ptr<FILE, int (*)(FILE*)> pipe(popen(command.str().c_str(), "r"), pclose);
  char line[4096];
  std::string function;
  for (bool second = false; pipe && std::fgets(line, sizeof line, pipe.get()); second = !second) {
    std::string text(line, std::strcspn(line, "\n"));
    if (!second) function = text;
    else names.push_back({function, text.substr(text.rfind('/') + 1, text.find(" (disc") - text.rfind('/') - 1)});
  }
  if (names.size() != addresses.size()) throw Error("trace: addr2line, of binutils, is needed to name source lines");
  return names;
}

// "void tinystory::cuda::(anonymous namespace)::f<T>(P)" -> "f<T>".
std::string short_name(std::string s) {
  for (const std::string drop : {"tinystory::", "cuda::", "(anonymous namespace)::", "void "})
    for (size_t at; (at = s.find(drop)) != std::string::npos;) s.erase(at, drop.size());
  return s.substr(0, s.find('('));
}

}  // namespace

void start() {
  state = {};
  state.on = true;
}

std::vector<Kernel> stop() {
  state.on = false;
  std::vector<const void*> addresses = state.order;
  for (const Place& p : state.places)  // the call before the return address
    if (p.address) addresses.push_back(static_cast<const char*>(p.address) - 1);
  const auto names = name(addresses);
  size_t next = state.order.size();
  for (Place& p : state.places)
    if (p.address) p.where = names[next++].second;

  std::vector<Kernel> result;
  for (size_t i = 0; i < state.order.size(); ++i) {
    const Launched& launched = state.kernels[state.order[i]];
    Kernel kernel{short_name(names[i].first), {}, {}, {}};
    std::map<std::pair<std::string, std::string>, Counts> lines;
    const auto add = [](Counts& to, const Counts& c) {
      to.requests += c.requests, to.passes += c.passes, to.ideal_passes += c.ideal_passes;
      to.sectors += c.sectors, to.sector_bytes += c.sector_bytes, to.mma += c.mma;
    };
    for (const auto& [place, counts] : launched.places) {
      add(kernel.total, counts);
      add(lines[{state.places[place].where, state.places[place].what}], counts);
    }
    for (const auto& [line, counts] : lines) kernel.lines.push_back({line.first, line.second, counts});
    for (const auto& [key, race] : launched.races) {
      const Place &before = state.places[std::get<1>(key)], &now = state.places[std::get<2>(key)];
      kernel.races.push_back(race.text + " (" + now.what + " " + now.where + ", " + before.what + " " + before.where +
                             "; " + std::to_string(race.count) + " bytes)");
    }
    result.push_back(std::move(kernel));
  }
  return result;
}

bool on() { return state.on; }

void begin_launch(const void* kernel) {
  if (!state.kernels.count(kernel)) state.order.push_back(kernel);
  state.kernel = &state.kernels[kernel];
  state.global.clear();  // launches follow one another
  state.at_launch.clear();
  for (const auto& [begin, size] : buffers()) state.at_launch[begin].assign(begin, begin + size);
  state.flags.clear();
}
void begin_block() {
  known.clear();
  seen.clear();
  state.shared.assign(shared_bytes(), {});
  ++state.block_barriers;
}
void block_barrier() {
  for (unsigned warp = 0; warp < kMaxWarps; ++warp) close(warp);
  ++state.block_barriers;
  known = seen;
}
// A write of the same thread since the barrier is not counted as ordered, which PTX would allow.
void post(const int* flag) {
  state.flags[flag] = known;
  state.flags[flag][blockIdx.x] = state.block_barriers;
}
void saw(const int* flag) {
  for (const auto& [block, barriers] : state.flags[flag]) seen[block] = std::max(seen[block], barriers);
}
void end_block() {
  block_barrier();
  check_seen("shared memory", shared_memory(), std::vector<char>(shared_bytes(), kPoison), state.shared);
}
void end_launch() {
  for (const auto& [begin, before] : state.at_launch) check_seen("a global buffer", begin, before, state.global[begin]);
}
void converge(unsigned warp) { close(warp); }
void warp_barrier(unsigned warp) { ++state.warp_barriers[warp]; }

void access(const void* p, size_t bytes, Access access, const Site& site) {
  record(p, bytes, locate(p), access, place_of(site));
}
// Also called for a thread's own stack, and for the host's memory by functions that the tracer itself uses.
void access(const void* p, size_t bytes, Access access, const void* return_address) {
  const Location in = locate(p);
  if (in.begin) record(p, bytes, in, access, place_of(return_address, access == Access::write));
}
void mma(const Site& site) { ++state.kernel->places[place_of(site)].mma; }

}  // namespace simt::trace
