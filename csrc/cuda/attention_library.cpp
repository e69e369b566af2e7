// The Python module of a library with the attention kernels for one dtype and one head size, see AttentionKernels.
// tinystory/ops/cuda.py defines TINYSTORY_DTYPE and TINYSTORY_HEAD_SIZE.
#include <pybind11/pybind11.h>

#include "kernels.cuh"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace tinystory;
  static const cuda::AttentionKernels kernels{.dtype = DType::TINYSTORY_DTYPE, .D = TINYSTORY_HEAD_SIZE};
  m.def("kernels", [] { return reinterpret_cast<uintptr_t>(&kernels); });
}
