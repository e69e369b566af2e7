#include "machine.h"

#include <cxxabi.h>

#include <algorithm>
#include <bit>
#include <numeric>

namespace ptx {
namespace {

constexpr uint64_t kLongest = 1ull << 30;  // instructions of all warps: more of them are a spin that never ends
constexpr unsigned kTurn = 200;            // largest number of instructions of a warp before another warp runs

unsigned one_of(std::initializer_list<unsigned> choices) { return choices.begin()[simt::random() % choices.size()]; }

}  // namespace

Launch::Launch(const Kernel& kernel, unsigned blocks, unsigned threads, const void* parameters, size_t shared_bytes)
    : kernel_(kernel), blocks_(blocks), threads_(threads), parameters_(static_cast<const char*>(parameters)),
      shared_bytes_(shared_bytes), schedule_(Schedule(simt::random() % 3)), early_copies_(simt::random() % 2),
      newest_first_(one_of({0, 50, 95})) {
  if (threads == 0 || threads % 32 || threads > kernel.max_threads)
    throw simt::Error(kernel.name + ": " + std::to_string(threads) + " threads, and .maxntid is " +
                      std::to_string(kernel.max_threads));
}

void Launch::fail(const Block& b, const Warp& w, int lane, const Instruction& i, const std::string& why) const {
  const std::unique_ptr<char, void (*)(void*)> name(abi::__cxa_demangle(kernel_.name.c_str(), 0, 0, 0), std::free);
  throw simt::Error(std::string(name ? name.get() : kernel_.name) + ": block " + std::to_string(b.id) + " thread " +
                    std::to_string(w.number * 32 + unsigned(lane)) + ": " + why + " (" + i.text + ")");
}

std::unique_ptr<Block> Launch::start(uint32_t id) const {
  auto b = std::make_unique<Block>();
  b->id = id;
  b->shared.assign(shared_bytes_, simt::kPoison);
  b->shadow.resize(shared_bytes_ / 2 + 1);
  b->warps.resize(threads_ / 32);
  for (unsigned number = 0; number < b->warps.size(); ++number) {
    Warp& w = b->warps[number];
    w.number = number;
    w.rows.assign(size_t(kernel_.rows) * 32, ~0ull);  // NaN, until it is written
    for (const auto& [row, value] : kernel_.constants) std::fill_n(w.row(row), 32, value);
    std::iota(w.row(kThread), w.row(kThread) + 32, number * 32);
    std::iota(w.row(kLane), w.row(kLane) + 32, 0);
    std::fill_n(w.row(kThreads), 32, threads_);
    std::fill_n(w.row(kBlock), 32, id);
    std::fill_n(w.row(kBlocks), 32, blocks_);
  }
  return b;
}

void Launch::run() {
  std::vector<uint32_t> order(blocks_);
  std::iota(order.begin(), order.end(), 0u);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[simt::random() % i]);
  const size_t resident = one_of({1, 2, 6, blocks_});
  std::vector<std::unique_ptr<Block>> running;
  for (uint64_t instructions = 0; !order.empty() || !running.empty();) {
    for (; running.size() < resident && !order.empty(); order.pop_back()) running.push_back(start(order.back()));
    const size_t first = simt::random() % 100 < newest_first_ ? running.size() - 1 : simt::random() % running.size();
    bool ran = false;
    for (size_t at = 0; at < running.size() && !ran; ++at) {
      Block& b = *running[(first + at) % running.size()];
      const size_t first_warp = simt::random();
      for (size_t warp = 0; warp < b.warps.size() && !ran; ++warp)
        ran = run_warp(b, b.warps[(first_warp + warp) % b.warps.size()], 1 + simt::random() % kTurn);
    }
    if (!ran || (instructions += kTurn / 2) > kLongest) {
      Block& b = *running[0];
      for (Warp& w : b.warps)
        for (int lane = 0; lane < 32; ++lane)
          if (!(w.exited >> lane & 1))
            fail(b, w, lane, kernel_.code[size_t(w.pc[size_t(lane)])], ran ? "runs for ever" : "waits for ever");
    }
    std::erase_if(running, [&](const auto& b) { return b->exited == threads_; });
  }
}

// The pc to run, and the ready lanes that are there.
int Launch::pick(Warp& w, uint32_t ready, uint32_t& lanes) const {
  int pc = INT32_MAX;
  if (schedule_ == Schedule::smallest_pc) {
    for (int lane = 0; lane < 32; ++lane)
      if (ready >> lane & 1) pc = std::min(pc, w.pc[size_t(lane)]);
  } else {
    uint32_t rest = ready;
    for (unsigned skip = simt::random() % unsigned(std::popcount(ready)); skip > 0; --skip) rest &= rest - 1;
    pc = w.pc[size_t(std::countr_zero(rest))];
  }
  lanes = 0;
  for (int lane = 0; lane < 32; ++lane) lanes |= uint32_t(w.pc[size_t(lane)] == pc) << lane;
  lanes &= ready;
  if (schedule_ == Schedule::random_lanes && simt::random() % 4 == 0)
    if (const uint32_t some = lanes & simt::random()) lanes = some;
  return pc;
}

// Runs some instructions of a warp, until all lanes wait or have ended. Returns false if they did before.
bool Launch::run_warp(Block& b, Warp& w, unsigned instructions) {
  for (unsigned n = 0; n < instructions; ++n) {
    const uint32_t ready = ~(w.exited | w.at_barrier | w.at_collective);
    if (!ready) return n > 0;
    uint32_t lanes = 0;
    const int pc = pick(w, ready, lanes);
    const Instruction& i = kernel_.code[size_t(pc)];
    uint32_t taken = lanes;
    if (i.guard >= 0)
      for (int lane = 0; lane < 32; ++lane)
        if ((w.row(i.guard)[lane] & 1) == i.guard_negated) taken &= ~(1u << lane);
    const auto move_to = [&](uint32_t mask, int target) {
      for (int lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1) w.pc[size_t(lane)] = target;
    };
    move_to(lanes & ~taken, pc + 1);
    if (!taken) continue;
    if (i.op == Op::branch) {
      move_to(taken, i.target);
    } else if (i.op == Op::exit) {
      w.exited |= taken;
      b.exited += unsigned(std::popcount(taken));
    } else if (i.op == Op::sync_block) {
      arrive_at_barrier(b, w, i, taken);
    } else if (is_collective(i.op)) {
      for (int lane = 0; lane < 32; ++lane)
        if (w.at_collective >> lane & 1 && w.pc[size_t(lane)] != pc)
          fail(b, w, lane, kernel_.code[size_t(w.pc[size_t(lane)])], "divergent warp: another lane is at " + i.text);
      w.at_collective |= taken;
      if (w.at_collective != ~0u) continue;
      w.at_collective = 0;
      execute_collective(b, w, i);
      move_to(~0u, pc + 1);
    } else {
      execute(b, w, i, taken);
      move_to(taken, pc + 1);
    }
  }
  return true;
}

void Launch::arrive_at_barrier(Block& b, Warp& w, const Instruction& i, uint32_t lanes) {
  w.at_barrier |= lanes;
  b.at_barrier += unsigned(std::popcount(lanes));
  if (b.at_barrier < threads_) return;
  const int pc = w.pc[size_t(std::countr_zero(lanes))];
  for (Warp& x : b.warps) {
    x.at_barrier = 0;
    for (int lane = 0; lane < 32; ++lane)
      if (x.pc[size_t(lane)]++ != pc) fail(b, x, lane, i, "divergent barrier");
  }
  b.at_barrier = 0;
  ++b.barriers;
  b.known = b.seen;
}

}  // namespace ptx
