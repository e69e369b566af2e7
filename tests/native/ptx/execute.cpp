// The effects of instructions on memory and on the lanes of a warp, from the PTX ISA.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "machine.h"

namespace ptx {
namespace {

constexpr uint32_t kGranule = 2;  // bytes for which accesses are recorded together

uint64_t address_in(Warp& w, const Address& a, int lane) { return w.row(a.row)[lane] + a.offset; }

uint64_t low_bits(uint64_t x, uint32_t bytes) { return bytes == 8 ? x : x & ((1ull << 8 * bytes) - 1); }

float half(uint64_t pair, int which, Op op) {
  const auto bits = uint16_t(pair >> 16 * which);
  return op == Op::mma_f16 ? float(std::bit_cast<_Float16>(bits)) : std::bit_cast<float>(uint32_t(bits) << 16);
}

// Tensor cores may truncate: so does this.
float truncated(double x) {
  const float nearest = float(x);
  return std::isfinite(nearest) && std::fabs(double(nearest)) > std::fabs(x) ? std::nextafter(nearest, 0.0f) : nearest;
}

// d = c + a b, rows d 0-3, a 4-7, b 8-9, c 10-13. With g = lane / 4 and t = lane % 4, element e of a lies in row g (e 0, 1,
// 4, 5) or g + 8, column 2 t + e % 2, 8 further for e >= 4; of b in row 2 t + e % 2, 8 further for e >= 2, column g; of c
// and d in row g, or g + 8 for e >= 2, column 2 t + e % 2. Two elements of a or b share a register.
void mma(Warp& w, const Instruction& i) {
  double a[16][16], b[16][8];
  const auto at = [&](int operand, int lane) -> uint64_t& { return w.row(i.rows[size_t(operand)])[lane]; };
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int e = 0; e < 8; ++e)
      a[e % 4 < 2 ? g : g + 8][2 * t + e % 2 + (e < 4 ? 0 : 8)] = half(at(4 + e / 2, lane), e % 2, i.op);
    for (int e = 0; e < 4; ++e) b[2 * t + e % 2 + (e < 2 ? 0 : 8)][g] = half(at(8 + e / 2, lane), e % 2, i.op);
  }
  double sums[16][8] = {};
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < 8; ++column) sums[row][column] += a[row][k] * b[k][column];
  float d[4][32];
  for (int e = 0; e < 4; ++e)
    for (int lane = 0; lane < 32; ++lane)
      d[e][lane] = truncated(std::bit_cast<float>(uint32_t(at(10 + e, lane))) +
                             sums[lane / 4 + (e < 2 ? 0 : 8)][2 * (lane % 4) + e % 2]);
  for (int e = 0; e < 4; ++e)
    for (int lane = 0; lane < 32; ++lane) at(e, lane) = std::bit_cast<uint32_t>(d[e][lane]);
}

// rows: d, p, a, b, c, members. c holds a mask that divides the warp into segments, and the last lane to read from.
void shuffle(Warp& w, const Instruction& i) {
  uint64_t d[32], p[32];
  for (int lane = 0; lane < 32; ++lane) {
    const auto b = int(w.row(i.rows[3])[lane] & 31), c = int(w.row(i.rows[4])[lane]), segment = c >> 8 & 31;
    const int first = lane & segment, last = first | (c & 31 & ~segment);
    const int from = i.op == Op::shuffle_idx ? first | (b & ~segment) : lane ^ b;
    p[lane] = from <= last;
    d[lane] = uint32_t(w.row(i.rows[2])[p[lane] ? from : lane]);
  }
  std::copy_n(d, 32, w.row(i.rows[0]));
  std::copy_n(p, 32, w.row(i.rows[1]));
}

}  // namespace

void Launch::touch(std::vector<Shadow>& shadow, size_t offset, uint32_t bytes, Access access, Block& b, Warp& w,
                   int lane, const Instruction& i, const char* where) {
  const Stamp now{int32_t(w.number) * 32 + lane, b.id, b.barriers, w.barriers, uint32_t(&i - kernel_.code.data())};
  for (size_t at = offset / kGranule; at < (offset + bytes) / kGranule; ++at)
    shadow[at].touch(now, access, b.known, [&](const char* kind, const Stamp& before) {
      fail(b, w, lane, i,
           std::string("race, ") + kind + " at byte " + std::to_string(at * kGranule) + " of " + where +
               ", by thread " + std::to_string(before.thread) + " of block " + std::to_string(before.block) + " at " +
               kernel_.code[before.place].text);
    });
}

char* Launch::shared_at(Block& b, Warp& w, int lane, const Instruction& i, uint64_t address, uint32_t bytes,
                        Access access) {
  const uint64_t offset = uint32_t(address) - kShared;
  if (address % bytes) fail(b, w, lane, i, "shared address is not a multiple of " + std::to_string(bytes));
  if (offset + bytes > b.shared.size() || offset > b.shared.size())
    fail(b, w, lane, i,
         std::to_string(int64_t(offset)) + " is outside the " + std::to_string(b.shared.size()) +
             " bytes of shared memory");
  touch(b.shadow, offset, bytes, access, b, w, lane, i, "shared memory");
  return b.shared.data() + offset;
}

char* Launch::global_at(Block& b, Warp& w, int lane, const Instruction& i, uint64_t address, uint32_t bytes,
                        Access access) {
  if (address / kGlobal != 1) fail(b, w, lane, i, "the address was not converted to one in global memory");
  if (address % bytes) fail(b, w, lane, i, "global address is not a multiple of " + std::to_string(bytes));
  char* const p = reinterpret_cast<char*>(address - kGlobal);
  const auto [begin, size] = simt::find_buffer(p);
  if (!begin || p + bytes > begin + size) fail(b, w, lane, i, "outside every global buffer");
  std::vector<Shadow>& shadow = shadow_[begin];
  if (shadow.empty()) shadow.resize(size / kGranule + 1);
  touch(shadow, size_t(p - begin), bytes, access, b, w, lane, i, "a global buffer");
  return p;
}

void Launch::land(Block& b, Warp& w, int lane, const Copy& c) {
  char* const to = shared_at(b, w, lane, *c.issued_by, c.to, 16, Access::copy_landed);
  if (c.valid) std::memcpy(to, global_at(b, w, lane, *c.issued_by, c.from, 16, Access::late_read), 16);
  else std::memset(to, 0, 16);
}

void Launch::execute(Block& b, Warp& w, const Instruction& i, uint32_t lanes) {
  if (i.op == Op::arithmetic) {
    const uint64_t* from[4] = {};
    for (size_t r = 1; r < i.rows.size(); ++r) from[r - 1] = w.row(i.rows[r]);
    i.compute(w.row(i.rows[0]), from, lanes);
    return;
  }
  for (int lane = 0; lane < 32; ++lane)
    if (lanes >> lane & 1) execute_lane(b, w, i, lane);
}

void Launch::execute_lane(Block& b, Warp& w, const Instruction& i, int lane) {
  const auto value = [&](size_t operand) -> uint64_t& { return w.row(i.rows[operand])[lane]; };
  const uint64_t address = i.addresses.empty() ? 0 : address_in(w, i.addresses[0], lane);
  const uint32_t bytes = i.bytes * uint32_t(i.elements);
  const auto memory = [&](Access access) {
    return i.space == Space::shared ? shared_at(b, w, lane, i, address, bytes, access)
                                    : global_at(b, w, lane, i, address, bytes, access);
  };
  switch (i.op) {
    case Op::load: {
      const char* from = parameters_ + address;
      if (i.space != Space::parameter) from = memory(i.order == Order::weak ? Access::read : Access::atomic);
      else if (address + bytes > kernel_.parameter_bytes) fail(b, w, lane, i, "past the parameters");
      if (const auto flag = released_.find(address); i.order != Order::weak && flag != released_.end())
        for (const auto& [block, barriers] : flag->second) {
          uint32_t& observed = b.observed[w.number * 32 + unsigned(lane)][block];
          observed = std::max(observed, barriers);
        }
      for (size_t e = 0; e < size_t(i.elements); ++e) {
        value(e) = 0;
        std::memcpy(&value(e), from + e * i.bytes, i.bytes);
      }
      break;
    }
    case Op::store: {
      char* const to = memory(i.order == Order::weak ? Access::write : Access::atomic);
      for (size_t e = 0; e < size_t(i.elements); ++e) std::memcpy(to + e * i.bytes, &value(e), i.bytes);
      if (i.space == Space::shared) break;
      released_.erase(address);
      if (i.order == Order::release) {
        Known& known = released_[address] = b.known;
        known[b.id] = b.barriers;  // what its own thread wrote since the barrier is not counted, which PTX would allow
      }
      break;
    }
    case Op::add: {
      char* const p = memory(Access::atomic);
      uint64_t before = 0;
      std::memcpy(&before, p, bytes);
      const uint64_t after = before + value(1);
      std::memcpy(p, &after, bytes);
      value(0) = before;
      break;
    }
    case Op::fence: {  // what the thread observed, it has now acquired: its block has with the next barrier
      for (const auto& [block, barriers] : b.observed[w.number * 32 + unsigned(lane)]) {
        uint32_t& seen = b.seen[block];
        seen = std::max(seen, barriers);
      }
      break;
    }
    case Op::copy: {
      const uint64_t from = address_in(w, i.addresses[1], lane), valid = value(1);
      if (valid != 0 && valid != 16) fail(b, w, lane, i, "copies a part of its 16 bytes");
      const Copy copy{address, from, valid == 16, w.groups[size_t(lane)], &i};
      char* const to = shared_at(b, w, lane, i, address, 16, Access::copy_issued);
      if (copy.valid) global_at(b, w, lane, i, from, 16, Access::read);
      if (early_copies_ && copy.valid) std::memcpy(to, reinterpret_cast<const char*>(from - kGlobal), 16);
      else std::memset(to, simt::kPoison, 16);
      w.copies[size_t(lane)].push_back(copy);
      break;
    }
    case Op::commit: ++w.groups[size_t(lane)]; break;
    case Op::wait: {
      auto& copies = w.copies[size_t(lane)];
      const int landed = w.groups[size_t(lane)] - int(value(0));  // groups before this one
      for (const Copy& c : copies)
        if (c.group < landed) land(b, w, lane, c);
      std::erase_if(copies, [&](const Copy& c) { return c.group < landed; });
      break;
    }
    case Op::pack: {  // mov.b64 d, {a, b}
      uint64_t all = 0;
      const uint32_t part = i.bytes / uint32_t(i.elements);
      for (size_t e = 0; e < size_t(i.elements); ++e) all |= low_bits(value(1 + e), part) << 8 * part * e;
      value(0) = all;
      break;
    }
    case Op::unpack: {  // mov.b64 {a, b}, d
      const uint64_t all = value(size_t(i.elements));
      const uint32_t part = i.bytes / uint32_t(i.elements);
      for (size_t e = 0; e < size_t(i.elements); ++e) value(e) = low_bits(all >> 8 * part * e, part);
      break;
    }
    case Op::argument: w.message[size_t(lane)] = value(0); break;
    case Op::trap: fail(b, w, lane, i, reinterpret_cast<const char*>(w.message[size_t(lane)]));
    default: fail(b, w, lane, i, "is not an instruction of single lanes");
  }
}

void Launch::execute_collective(Block& b, Warp& w, const Instruction& i) {
  if (i.op <= Op::ballot)
    for (int lane = 0; lane < 32; ++lane)
      if (uint32_t(w.row(i.rows.back())[lane]) != ~0u) fail(b, w, lane, i, "not all lanes are its members");
  switch (i.op) {
    case Op::sync_warp: ++w.barriers; break;
    case Op::shuffle_idx:
    case Op::shuffle_xor: shuffle(w, i); break;
    case Op::ballot: {
      uint64_t votes = 0;
      for (int lane = 0; lane < 32; ++lane) votes |= (w.row(i.rows[1])[lane] & 1) << lane;
      std::fill_n(w.row(i.rows[0]), 32, votes);
      break;
    }
    case Op::ldmatrix:
    case Op::ldmatrix_transposed: {
      uint16_t matrix[4][8][8];  // lane 8 m + r has the address of row r of matrix m
      for (int lane = 0; lane < 32; ++lane) {
        const uint64_t address = address_in(w, i.addresses[0], lane);
        std::memcpy(matrix[lane / 8][lane % 8], shared_at(b, w, lane, i, address, 16, Access::read), 16);
      }
      for (size_t m = 0; m < 4; ++m)
        for (int lane = 0; lane < 32; ++lane) {  // which gets two neighbours of row lane / 4
          const int row = lane / 4, column = 2 * (lane % 4);
          const bool across = i.op == Op::ldmatrix_transposed;
          const uint32_t low = across ? matrix[m][column][row] : matrix[m][row][column];
          const uint32_t high = across ? matrix[m][column + 1][row] : matrix[m][row][column + 1];
          w.row(i.rows[m])[lane] = low | high << 16;
        }
      break;
    }
    default: mma(w, i);
  }
}

}  // namespace ptx
