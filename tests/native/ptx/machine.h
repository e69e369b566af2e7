// A launch of a kernel: some blocks are resident at a time, with warps interleaved instruction by instruction.
#pragma once
#include <array>
#include <unordered_map>

#include "../simt/races.h"
#include "ptx.h"

namespace ptx {

using simt::trace::Access;
using simt::trace::Known;
using simt::trace::Shadow;
using simt::trace::Stamp;

struct Copy {  // a cp.async that has not landed
  uint64_t to, from;
  bool valid;
  int group;
  const Instruction* issued_by;
};

struct Warp {
  unsigned number;
  std::vector<uint64_t> rows;  // 32 values per register
  std::array<int, 32> pc{};
  uint32_t exited = 0, at_barrier = 0, at_collective = 0;  // lanes
  uint32_t barriers = 0;                                   // bar.warp.sync so far
  std::array<std::vector<Copy>, 32> copies;
  std::array<int, 32> groups{};        // committed
  std::array<uint64_t, 32> message{};  // of a failed assertion
  uint64_t* row(int r) { return rows.data() + size_t(r) * 32; }
};

struct Block {
  uint32_t id;
  std::vector<char> shared;
  std::vector<Shadow> shadow;  // of shared memory
  std::vector<Warp> warps;
  unsigned at_barrier = 0, exited = 0;  // threads
  uint32_t barriers = 0;                // bar.sync so far
  // The accesses of other blocks that come before now; before this block's next barrier; and, by thread, before the
  // thread's next fence.
  Known known, seen;
  std::map<unsigned, Known> observed;
};

class Launch {
 public:
  Launch(const Kernel& kernel, unsigned blocks, unsigned threads, const void* parameters, size_t shared_bytes);
  void run();  // throws simt::Error

 private:
  // Within a warp, the lanes at the smallest pc go first; or those at a random lane's; or some of these.
  enum class Schedule { smallest_pc, random_group, random_lanes };

  const Kernel& kernel_;
  const unsigned blocks_, threads_;
  const char* const parameters_;
  const size_t shared_bytes_;
  const Schedule schedule_;
  const bool early_copies_;      // cp.async lands when it is issued, not when it is waited for
  const unsigned newest_first_;  // percent of turns that the block that started last takes, so that others make it wait
  std::map<const char*, std::vector<Shadow>> shadow_;  // of global memory, by buffer
  std::unordered_map<uint64_t, Known> released_;       // by flag: the accesses known to the block that set it

  [[noreturn]] void fail(const Block&, const Warp&, int lane, const Instruction&, const std::string& why) const;
  std::unique_ptr<Block> start(uint32_t id) const;
  int pick(Warp&, uint32_t ready, uint32_t& lanes) const;
  bool run_warp(Block&, Warp&, unsigned instructions);
  void arrive_at_barrier(Block&, Warp&, const Instruction&, uint32_t lanes);

  // execute.cpp
  void execute(Block&, Warp&, const Instruction&, uint32_t lanes);
  void execute_lane(Block&, Warp&, const Instruction&, int lane);
  void execute_collective(Block&, Warp&, const Instruction&);
  char* shared_at(Block&, Warp&, int lane, const Instruction&, uint64_t address, uint32_t bytes, Access);
  char* global_at(Block&, Warp&, int lane, const Instruction&, uint64_t address, uint32_t bytes, Access);
  void touch(std::vector<Shadow>&, size_t offset, uint32_t bytes, Access, Block&, Warp&, int lane, const Instruction&,
             const char* where);
  void land(Block&, Warp&, int lane, const Copy&);
};

}  // namespace ptx
