// csrc/cuda/ops.cpp with the SIMT machine as the device and CPU tensors instead of CUDA tensors: once loaded into
// torch, the operators on the CPU are the CUDA ones. tests/cuda_device/libraries.py builds it.
#include <ATen/ATen.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include "../simt.h"

#define is_cuda is_cpu
#define CUDA CPU
#define TINYSTORY_CHUNK_BYTES 512  // so that token_logprob computes in many chunks here
#include "../../../../csrc/cuda/ops.cpp"

namespace {
[[maybe_unused]] const bool trusted = (simt::trust_global_memory(), true);
}
