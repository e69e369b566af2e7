// Stands in for torch's header, where the SIMT machine is the device: everything runs at once, in one stream.
#pragma once

struct CUstream_st;

namespace c10::cuda {
struct CUDAStream {
  operator CUstream_st*() const { return nullptr; }
};
inline CUDAStream getCurrentCUDAStream() { return {}; }
}  // namespace c10::cuda
