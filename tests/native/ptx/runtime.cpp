// The part of the CUDA runtime that nvcc's host code calls. The PTX of a fat binary is parsed at the first launch. A
// kernel runs before the launch returns, and errors are simt::Error.
#include <cstring>

#include "machine.h"

namespace {

struct FatBinary {  // as __cudaRegisterFatBinary gets it; the header begins what `data` points to
  int magic, version;
  const char* data;
  void* unused;
  struct Header {
    uint32_t magic;
    uint16_t version, bytes;
    uint64_t following;
  };
};
struct Loaded {
  const FatBinary* binary;
  std::unique_ptr<ptx::Module> module;
};
struct Function {
  Loaded* loaded;
  std::string name;
  size_t shared_limit = 48 << 10;
};
std::map<const void*, Function>& functions() {  // by the address of the host's stub
  static std::map<const void*, Function> all;
  return all;
}

const ptx::Kernel& kernel_of(const Function& f) {
  if (!f.loaded->module) {
    FatBinary::Header header;
    std::memcpy(&header, f.loaded->binary->data, sizeof header);
    const std::string all(f.loaded->binary->data + header.bytes, header.following);
    const size_t begin = all.find(".version ");
    if (begin == std::string::npos) throw simt::Error("no PTX: compile with --compress-mode=none");
    f.loaded->module = std::make_unique<ptx::Module>(ptx::parse(all.c_str() + begin));
  }
  return f.loaded->module->kernels.at(f.name);
}

struct Dim3 {
  unsigned x, y, z;
};
struct Configuration {
  Dim3 grid, block;
  size_t shared;
  void* stream;
} configuration;

}  // namespace

extern "C" {
void** __cudaRegisterFatBinary(void* binary) {
  return reinterpret_cast<void**>(new Loaded{static_cast<const FatBinary*>(binary), nullptr});
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void** loaded) { delete reinterpret_cast<Loaded*>(loaded); }
void __cudaRegisterFunction(void** loaded, const char* stub, char*, const char* name, int, void*, void*, void*, void*,
                            int*) {
  functions()[stub] = {reinterpret_cast<Loaded*>(loaded), name};
}
unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, void* stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared, void** stream) {
  *grid = configuration.grid, *block = configuration.block;
  *shared = configuration.shared, *stream = configuration.stream;
  return 0;
}
int __cudaGetKernel(const void** kernel, const void* stub) { return *kernel = stub, 0; }
int cudaLaunchKernel(const void* stub, Dim3 grid, Dim3 block, void** arguments, size_t shared, void*) {
  const Function& f = functions().at(stub);
  if (shared > f.shared_limit) throw simt::Error(f.name + ": " + std::to_string(shared) + " bytes of shared memory");
  ptx::Launch(kernel_of(f), grid.x, block.x, arguments[0], shared).run();
  return 0;
}
int __cudaLaunchKernel(const void* kernel, Dim3 grid, Dim3 block, void** arguments, size_t shared, void* stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}
int cudaFuncSetAttribute(const void* stub, int, int bytes) {
  if (bytes > 99 << 10) return 1;
  functions().at(stub).shared_limit = size_t(bytes);
  return 0;
}
int cudaGetLastError() { return 0; }
const char* cudaGetErrorString(int) { return "invalid value"; }
int cudaGetDevice(int* device) { return *device = 0, 0; }
int cudaDeviceGetAttribute(int* value, int attribute, int) {
  constexpr int kMultiprocessors = 16, kL2Bytes = 38;  // of cudaDeviceAttr
  if (attribute != kMultiprocessors && attribute != kL2Bytes) return 1;
  *value = attribute == kL2Bytes ? simt::l2_bytes() : simt::multiprocessors();
  return 0;
}
}
