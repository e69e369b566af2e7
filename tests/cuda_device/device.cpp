// The native half of the simulated CUDA device: what torch asks of a device before any kernel runs. An allocator and a
// pinned one, the hooks and the guard, the operators that make or view a tensor, and two ways across: a CPU tensor on
// a device tensor's memory (`as_cpu`), and a device tensor that copies a CPU tensor (`to_device`). Device memory is the
// host's. README.md has the rest.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace {
using at::Tensor;
using Address = uintptr_t;

constexpr int kPoison = 0xff;  // bytes that are NaN in every float format and -1 in every integer
constexpr size_t kBlock = 512;
constexpr size_t kCached = size_t{1} << 30;  // bytes of free blocks; beyond them a freed block returns to the system
const c10::Device kDevice(c10::kCUDA, 0);
thread_local int64_t current_stream = 0;

// --- memory ----------------------------------------------------------------------------------------------------------
struct Block {
  size_t size;
  int64_t pool, stream, generation;  // the generation counts allocations, so that a reused block is another one
  int64_t born;                      // counts blocks that the system gave, so that no two are one at one address
  bool live;
};

// Like PyTorch's caching allocator: a freed block serves later requests of the same size, stream and pool, and no
// others. Unlike it, this one keeps no more than kCached of them, since a step has micro-batches of many sizes.
struct Memory {
  std::mutex mutex;
  std::map<Address, Block> blocks;
  std::map<std::tuple<int64_t, int64_t, size_t>, std::vector<Address>> free;
  std::map<Address, size_t> pinned;
  std::vector<int64_t> released;  // `born` of blocks that went back to the system, which the machine does not know yet
  size_t allocated = 0, peak = 0, reserved = 0;
  int64_t generations = 0, births = 0;
  int64_t capturing = -1, capture_pool = 0;  // a stream that is captured allocates from the pool of the graph
  std::map<Address, std::string> before_capture;
} memory;

template <class Map>
auto containing(Map& map, Address at) {  // the entry with the greatest key up to this address
  auto it = map.upper_bound(at);
  return it == map.begin() ? map.end() : std::prev(it);
}

void free_block(void* p) {
  const std::lock_guard lock(memory.mutex);
  Block& b = memory.blocks.at(Address(p));
  b.live = false;
  memory.allocated -= b.size;
  if (b.pool == 0 && memory.capturing < 0 && memory.reserved - memory.allocated > kCached) {
    memory.reserved -= b.size;
    memory.released.push_back(b.born);
    memory.blocks.erase(Address(p));
    std::free(p);
    return;
  }
  std::memset(p, kPoison, b.size);
  memory.free[{b.pool, b.stream, b.size}].push_back(Address(p));
}
void free_nothing(void*) {}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    if (n == 0) return {nullptr, nullptr, &free_nothing, kDevice};
    const std::lock_guard lock(memory.mutex);
    const size_t size = (n + kBlock - 1) / kBlock * kBlock;
    const int64_t pool = current_stream == memory.capturing ? memory.capture_pool : 0;
    auto& list = memory.free[{pool, current_stream, size}];
    if (list.empty()) {
      list.push_back(Address(std::aligned_alloc(kBlock, size)));
      memory.reserved += size;
      memory.blocks[list.back()].born = ++memory.births;
    }
    void* p = reinterpret_cast<void*>(list.back());
    list.pop_back();
    std::memset(p, kPoison, size);
    Block& b = memory.blocks.at(Address(p));
    b = {size, pool, current_stream, ++memory.generations, b.born, true};
    memory.allocated += size;
    memory.peak = std::max(memory.peak, memory.allocated);
    return {p, p, &free_block, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_block; }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
} device_allocator;

void unpin(void* p) {
  const std::lock_guard lock(memory.mutex);
  memory.pinned.erase(Address(p));
  std::free(p);
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    void* p = std::aligned_alloc(kBlock, (n + kBlock) / kBlock * kBlock);
    std::memset(p, kPoison, n);
    const std::lock_guard lock(memory.mutex);
    memory.pinned[Address(p)] = std::max<size_t>(n, 1);
    return {p, p, &unpin, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &unpin; }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
} pinned_allocator;

bool is_pinned(Address at) {
  const std::lock_guard lock(memory.mutex);
  const auto it = containing(memory.pinned, at);
  return it != memory.pinned.end() && at < it->first + it->second;
}

// (address, size, pool, generation, whether it is live, born) of the block that holds this address, if one does.
std::optional<std::tuple<Address, size_t, int64_t, int64_t, bool, int64_t>> block_of(Address at) {
  const std::lock_guard lock(memory.mutex);
  const auto it = containing(memory.blocks, at);
  if (it == memory.blocks.end() || at >= it->first + it->second.size) return {};
  const Block& b = it->second;
  return std::tuple(it->first, b.size, b.pool, b.generation, b.live, b.born);
}

// Kernels run while they are captured, which shows the shapes of the results; afterwards all memory is as it was.
void begin_capture(int64_t stream, int64_t pool) {
  const std::lock_guard lock(memory.mutex);
  memory.capturing = stream, memory.capture_pool = pool;
  for (const auto& [p, b] : memory.blocks)
    if (b.live) memory.before_capture[p] = std::string(reinterpret_cast<char*>(p), b.size);
}
void end_capture() {
  const std::lock_guard lock(memory.mutex);
  for (const auto& [p, b] : memory.blocks)
    if (b.pool == memory.capture_pool) std::memset(reinterpret_cast<void*>(p), kPoison, b.size);
  for (const auto& [p, bytes] : memory.before_capture)
    std::memcpy(reinterpret_cast<void*>(p), bytes.data(), bytes.size());
  memory.before_capture.clear();
  memory.capturing = -1;
}

// --- what torch asks of a device -------------------------------------------------------------------------------------
c10::Stream stream(int64_t id) { return c10::Stream(c10::Stream::UNSAFE, kDevice, id); }

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kCUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream(current_stream); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(0); }
  c10::Stream exchangeStream(c10::Stream s) const override { return stream(std::exchange(current_stream, s.id())); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  // Between the streams of one backward pass; Python's streams and events are in runtime.py.
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);
}  // namespace

namespace at {
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex current_device() const override { return 0; }
  int getNumGPUs() const override { return 1; }
  bool isPinnedPtr(const void* p) const override { return is_pinned(Address(p)); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  const Generator& getDefaultGenerator(DeviceIndex) const override {
    static const Generator generator = detail::createCPUGenerator();
    return generator;
  }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at

// --- tensors ---------------------------------------------------------------------------------------------------------
namespace {
[[maybe_unused]] const bool registered = (c10::SetAllocator(c10::kCUDA, &device_allocator, 255), true);
constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::CUDA);

Tensor empty(at::IntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool> pin, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pin.value_or(false), "only CPU tensors can be pinned");
  return at::detail::empty_generic(sizes, &device_allocator, kKeys, c10::dtype_or_default(dtype), format);
}
Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(sizes, strides, &device_allocator, kKeys, c10::dtype_or_default(dtype));
}

// A CPU tensor on the memory of t, a device tensor. owning: it keeps that memory allocated.
Tensor as_cpu(const Tensor& t, bool owning) {
  const c10::Storage& storage = t.storage();
  void* data = storage.mutable_data();
  auto* held = owning ? new c10::Storage(storage) : nullptr;
  c10::DataPtr pointer(data, held, [](void* p) { delete static_cast<c10::Storage*>(p); }, c10::Device(c10::kCPU));
  auto impl = c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), storage.nbytes(),
                                                    std::move(pointer), nullptr, false);
  Tensor out = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(std::move(impl)),
                                                        c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
  out.unsafeGetTensorImpl()->set_storage_offset(t.storage_offset());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides());
  return out;
}

Tensor to_device(const Tensor& t) {
  const Tensor from = t.is_non_overlapping_and_dense() ? t : t.contiguous();
  Tensor out = empty_strided(from.sizes(), from.strides(), from.scalar_type(), {}, {}, {});
  if (from.numel()) std::memcpy(out.mutable_data_ptr(), from.const_data_ptr(), from.numel() * from.itemsize());
  return out;
}
}  // namespace

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("resize_", at::native::resize_);
  m.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("as_cpu", as_cpu);
  m.def("to_device", to_device);
  m.def("block_of", block_of);
  m.def("is_pinned", is_pinned);
  m.def("released", [] {
    const std::lock_guard lock(memory.mutex);
    return std::exchange(memory.released, {});
  });
  m.def("stream", [] { return current_stream; });
  m.def("set_stream", [](int64_t stream) { current_stream = stream; });
  m.def("begin_capture", begin_capture);
  m.def("end_capture", end_capture);
  m.def("memory", [] { return std::tuple(memory.allocated, memory.peak, memory.reserved); });
  m.def("reset_peak", [] { memory.peak = memory.allocated; });
}
