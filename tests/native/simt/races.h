// The rule by which the tracer (trace.h) and the interpreter of PTX (../ptx) find races: who touched a byte last, and
// whether a barrier or a flag orders that before now.
#pragma once
#include <cstdint>
#include <map>

namespace simt::trace {

// A cp.async reads and writes at some time between issue and wait: recorded at both, counted at the first.
enum class Access { read, write, atomic, copy_issued, copy_landed, late_read };

// Who touched a byte, and after how many barriers.
struct Stamp {
  int32_t thread = -1;  // within its block; -1: nobody
  uint32_t block = 0, block_barriers = 0, warp_barriers = 0, place = 0;
  int warp() const { return thread / 32; }
};

// For other blocks of the launch: the accesses of block b before b's barrier known[b] come before now.
using Known = std::map<uint32_t, uint32_t>;

// How far apart two accesses are that nothing orders: 1 lanes of a warp, 2 warps, 3 blocks. 0: they are ordered.
inline int distance(const Stamp& before, const Stamp& now, const Known& known) {
  if (before.thread < 0) return 0;
  if (before.block != now.block) {
    const auto barriers = known.find(before.block);
    return barriers != known.end() && before.block_barriers < barriers->second ? 0 : 3;
  }
  if (before.thread == now.thread || before.block_barriers != now.block_barriers) return 0;
  if (before.warp() != now.warp()) return 2;
  return before.warp_barriers == now.warp_barriers ? 1 : 0;
}

// The accesses of one kind to one byte: the latest, and the farthest that is unordered with it. Where blocks run one
// after another two are enough: an access that is unordered with any of them is unordered with one of these. Where they
// run at the same time a race may be missed, but none is invented.
struct History {
  Stamp last, other;
  void add(const Stamp& now, const Known& known) {
    if (distance(last, now, known) > distance(other, now, known)) other = last;
    else if (!distance(other, now, known)) other = {};
    last = now;
  }
};

struct Shadow {  // of a byte, or of a few
  History reads, writes, atomics;
  bool copy_in_flight = false;
  bool written() const { return writes.last.thread >= 0 || atomics.last.thread >= 0; }

  // Records an access; report(kind, before) is called for each kind of race with an earlier one.
  template <class Report>
  void touch(const Stamp& now, Access access, const Known& known, const Report& report) {
    const bool is_read = access == Access::read || access == Access::late_read, atomic = access == Access::atomic;
    const auto look_at = [&](const char* kind, const History& history) {
      for (const Stamp* before : {&history.last, &history.other})
        if (distance(*before, now, known)) return report(kind, *before);
    };
    if (copy_in_flight && access != Access::copy_landed) report("access during an asynchronous copy", writes.last);
    look_at(is_read ? "read after write" : atomic ? "atomic after write" : "write after write", writes);
    if (!atomic) look_at(is_read ? "read after atomic" : "write after atomic", atomics);
    if (!is_read) look_at(atomic ? "atomic after read" : "write after read", reads);
    (is_read ? reads : atomic ? atomics : writes).add(now, known);
    if (!is_read) copy_in_flight = access == Access::copy_issued;
  }
};

}  // namespace simt::trace
