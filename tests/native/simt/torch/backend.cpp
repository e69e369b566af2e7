// csrc/cuda/ops.cpp with the SIMT machine as the device and CPU tensors instead of CUDA tensors: once loaded into
// torch, the operators on the CPU are the CUDA ones. tests/cuda_device/libraries.py builds it.
#include <ATen/ATen.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include "../simt.h"

#define is_cuda is_cpu
#define CUDA CPU
#include "../../../../csrc/cuda/ops.cpp"

namespace {
[[maybe_unused]] const bool ready = [] {
  simt::trust_global_memory();
  tinystory::chunk_bytes = 512;  // so that token_logprob computes in many chunks here
  for (const auto dtype : {tinystory::DType::f32, tinystory::DType::bf16, tinystory::DType::f16})
    for (const int64_t D : {32, 64, 128}) tinystory::add_attention(*new tinystory::cuda::AttentionKernels{dtype, D});
  return true;
}();
}  // namespace
