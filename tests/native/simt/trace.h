// A kernel's accesses to memory, one by one: data races, and the counts that a GPU's profiler would show.
//
// Kernels are compiled with -fsanitize=thread, which puts a call to a __tsan_* function before every load and store;
// tsan_hooks.cpp defines these functions, so no sanitizer runtime is linked. Primitives that move 16 bytes or copy
// asynchronously report their own accesses (simt.cpp). A byte that changed though no write was seen is an error.
//
// Races are those of the PTX memory model: two accesses to the same byte by different threads, at least one of them a
// write and not both atomic, that no barrier orders. sync_block orders all threads of a block and sync_warp all lanes
// of a warp; shuffles, ballots, ldmatrix and mma synchronize execution but order no memory. Two blocks of a launch are
// ordered only by a flag: what a block did before the last sync_block before a post comes before what the block that
// sees the flag in wait_for does after its next sync_block. The destination of a cp.async may not be touched by anyone
// before the wait, and after the wait only by its thread until a barrier. A race is found in every schedule that makes the
// same accesses, whether or not it changed a result.
//
// Counts are per source line: warp requests; passes over shared memory, beside their number without bank conflicts; and
// 32-byte sectors of global memory, with the fraction of their bytes that was asked for. 32 lanes that access up to 4
// bytes each (16 lanes of 8, 8 lanes of 16) take as many passes as the most loaded bank has distinct words, or for
// atomics lanes. Wide accesses and mma are exact; nvcc may merge or repeat scalar accesses, which are counted as this
// compiler left them.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "races.h"
#include "simt.h"

namespace simt::trace {

struct Counts {
  int64_t requests = 0, passes = 0, ideal_passes = 0, sectors = 0, sector_bytes = 0, mma = 0;
};
struct Line {
  std::string where, what;  // "file:line"; the primitive, "load" or "store"
  Counts counts;
};
struct Kernel {
  std::string name;
  Counts total;
  std::vector<Line> lines;
  std::vector<std::string> races;  // one entry per pair of source lines
};

// Traces all launches from start to stop. stop returns one entry per kernel, in order of first launch.
void start();
std::vector<Kernel> stop();

// --- for the machine -------------------------------------------------------------------------------------------------
bool on();
void begin_launch(const void* kernel);
void begin_block();
void end_block();
void end_launch();
void block_barrier();          // all threads of the block have arrived
void converge(unsigned warp);  // all lanes of the warp have arrived at a collective
void warp_barrier(unsigned warp);
void post(const int* flag);
void saw(const int* flag);
void access(const void* p, size_t bytes, Access, const Site&);
void access(const void* p, size_t bytes, Access, const void* return_address);
void mma(const Site&);

}  // namespace simt::trace
