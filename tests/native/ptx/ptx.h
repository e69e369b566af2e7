// PTX as text, parsed for machine.h: the part of the ISA that nvcc emits for csrc/cuda. Anything else is an error that
// names the statement, so nothing is skipped silently.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../simt/simt.h"

namespace ptx {

// A register is a row: the value in each lane of a warp, zero-extended. Immediates and special registers are rows too.
using Row = uint64_t[simt::kWarpSize];
enum SpecialRow { kUnused, kThread, kThreads, kBlock, kBlocks, kLane, kFirstRow };

// Sets row `to` from rows `from` in the lanes of the mask.
using Arithmetic = void (*)(uint64_t* to, const uint64_t* const* from, uint32_t lanes);
Arithmetic find_arithmetic(const std::string& opcode);  // null: there is none

enum class Op {
  // On registers alone.
  arithmetic,
  pack,
  unpack,
  // Run by the scheduler.
  branch,
  exit,
  sync_block,
  // Lane by lane.
  load,
  store,
  add,
  copy,
  commit,
  wait,
  fence,
  argument,
  trap,
  // All lanes of a warp together, the first four with a mask of the members.
  sync_warp,
  shuffle_idx,
  shuffle_xor,
  ballot,
  ldmatrix,
  ldmatrix_transposed,
  mma_bf16,
  mma_f16
};
inline bool is_collective(Op op) { return op >= Op::sync_warp; }

enum class Space { parameter, shared, global };
enum class Order { weak, relaxed, release };

struct Address {
  int row;
  uint64_t offset;
};
struct Instruction {
  Op op = Op::arithmetic;
  std::string text;
  Arithmetic compute = nullptr;
  int guard = -1;  // row of the predicate; -1: none
  bool guard_negated = false;
  std::vector<int> rows;           // operands in the order of the text, those of vectors one by one
  std::vector<Address> addresses;  // [register + offset]
  Space space{};
  Order order{};
  uint32_t bytes = 0;  // of an element that is loaded or stored, or of a register that is packed
  int elements = 1;
  int target = -1;
};

struct Kernel {
  std::string name;
  size_t parameter_bytes = 0;
  unsigned max_threads = 1024;
  int rows = kFirstRow;
  std::vector<std::pair<int, uint64_t>> constants;  // rows that hold one value
  std::vector<Instruction> code;
};

struct Module {
  std::map<std::string, Kernel> kernels;
  std::vector<std::unique_ptr<char[]>> strings;  // of assertions
};
Module parse(const std::string& text);

// Shared memory begins here in its window. An address in the global window is a generic one, as the host knows it, plus
// kGlobal: so one that was never converted is an error.
constexpr uint64_t kShared = 0x400, kGlobal = 1ull << 60;

}  // namespace ptx
