// Tests the instructions that the compiler made of csrc/cpu/amx.h, with order and addresses. On x86-64 processors
// without AMX its instructions raise SIGILL, and the handler decodes them and runs their twin; linked with
// --wrap=syscall, so that the request for Linux's permission is granted. A processor with AMX runs them itself if Linux
// permits it, else the test is skipped. SIMULATE_AMX=granted or refused shows this on a processor without AMX.
#include <cerrno>
#include <csignal>
#include <string>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>
#include <utility>

#include "amx_twin.h"

namespace {

constexpr int kSkipped = 77;
const std::string simulate = std::getenv("SIMULATE_AMX") ? std::getenv("SIMULATE_AMX") : "";
bool has_amx = false, simulated = false, permitted = false;
long trapped = 0;  // instructions that a processor without AMX was to run

// Reads the instruction at rip; false if it is no AMX instruction.
bool run(const uint8_t* code, greg_t* registers) {
  constexpr int kOrder[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                              REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  // VEX: C4, inverted R X B and the opcode map (2: 0F 38), then W, inverted second operand, L, prefix.
  if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || code[2] & 0x84) return false;
  const int second = ~code[2] >> 3 & 15, prefix = code[2] & 3, opcode = code[3], modrm = code[4];
  const int x = ~code[1] >> 6 & 1, b = ~code[1] >> 5 & 1, mod = modrm >> 6, reg = modrm >> 3 & 7, rm = modrm & 7;
  const uint8_t* next = code + 5;
  char* address = nullptr;
  int64_t stride = 0;
  if (mod != 3) {
    int base = rm | b << 3;
    bool has_base = true;
    if (rm == 4) {
      const int sib = *next++, index = (sib >> 3 & 7) | x << 3;
      base = (sib & 7) | b << 3;
      has_base = !((sib & 7) == 5 && mod == 0);
      if (index != 4) stride = int64_t(registers[kOrder[index]]) << (sib >> 6);
    } else if (rm == 5 && mod == 0) {
      return false;  // relative to rip
    }
    int32_t offset = 0;
    if (mod == 1) offset = int8_t(*next++);
    else if (mod == 2 || !has_base) std::memcpy(&offset, next, 4), next += 4;
    address = reinterpret_cast<char*>((has_base ? registers[kOrder[base]] : 0) + offset);
  }
  auto& twin = amx_twin::Twin::own();
  if (opcode == 0x49 && mod != 3 && prefix == 0 && reg == 0) twin.load_config(address + stride);
  else if (opcode == 0x49 && modrm == 0xc0 && prefix == 0) twin.release();
  else if (opcode == 0x49 && mod == 3 && prefix == 3 && rm == 0) twin.zero(reg);
  else if (opcode == 0x4b && mod != 3 && prefix == 3) twin.load(reg, address, stride);
  else if (opcode == 0x4b && mod != 3 && prefix == 2) twin.store(reg, address, stride);
  else if (opcode == 0x5c && mod == 3 && prefix == 2) twin.dot(reg, rm, second);
  else return false;
  registers[REG_RIP] = reinterpret_cast<greg_t>(next);
  return true;
}

// Linux lets a thread without permission configure and release tiles, but not use them.
void on_illegal(int, siginfo_t*, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const auto* code = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
  const bool configures = (code[2] & 3) == 0;  // LDTILECFG and TILERELEASE alone have no prefix
  if ((!simulated || permitted || configures) && run(code, registers))
    __atomic_fetch_add(&trapped, !simulated, __ATOMIC_RELAXED);
  else std::signal(SIGILL, SIG_DFL);  // the instruction is met again, and ends the program
}

bool configuring_traps() {
  alignas(64) uint8_t config[64] = {1};  // palette 1, all tiles empty
  asm volatile("ldtilecfg %0\n\ttilerelease" : : "m"(config) : "memory");
  return std::exchange(trapped, 0) > 0;
}

[[maybe_unused]] const bool installed = [] {
  struct sigaction action{};
  action.sa_sigaction = on_illegal;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGILL, &action, nullptr);
  simulated = configuring_traps() && !simulate.empty();
  has_amx = !configuring_traps();
  std::fprintf(stderr, "AMX instructions are run by %s\n",
               simulated ? "a simulated processor"
               : has_amx ? "the processor"
                         : "their twin");
  if (has_amx && !simulated) std::signal(SIGILL, SIG_DFL);
  std::atexit([] { amx_twin::Twin::require(has_amx ? permitted : trapped > 0, "no AMX instruction was met"); });
  return true;
}();

}  // namespace

extern "C" long __real_syscall(long number, ...);
extern "C" long __wrap_syscall(long number, long a, long b, long c, long d, long e, long f) {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  if (number != SYS_arch_prctl || a != kRequestPermission || b != kTileData)
    return __real_syscall(number, a, b, c, d, e, f);
  if (!has_amx) return 0;
  errno = EPERM;
  permitted = simulate != "refused" && (simulated || __real_syscall(number, a, b) == 0);
  if (permitted) return 0;
  std::fprintf(stderr, "skipped: this processor has AMX, and Linux refuses its use (%s)\n", std::strerror(errno));
  _exit(kSkipped);
}
