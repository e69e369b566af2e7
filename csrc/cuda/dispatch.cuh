// Dispatch from a run-time dtype (and head size) to the template instantiations.
#pragma once
#include "primitives.cuh"

namespace tinystory::cuda {

// Calls f with a value of the C++ type of the dtype.
template <class F>
void dispatch_dtype(DType dtype, const char* op, const F& f) {
  if (dtype == DType::f32) f(float{});
  else if (dtype == DType::bf16) f(bf16{});
  else if (dtype == DType::f16) f(f16{});
  else throw std::invalid_argument(std::string(op) + " on CUDA: float64 is not implemented");
}

// Calls f.run<E, D>() for a dtype and a head size: those of this library, see AttentionKernels, or in native tests any.
template <class F>
void dispatch_attention([[maybe_unused]] DType dtype, [[maybe_unused]] int64_t D, [[maybe_unused]] const char* op,
                        const F& f) {
#ifdef TINYSTORY_DTYPE
  f.template run<TINYSTORY_DTYPE, TINYSTORY_HEAD_SIZE>();
#else
  dispatch_dtype(dtype, op, [&](auto e) {
    using Element = decltype(e);
    if (D == 32) f.template run<Element, 32>();
    else if (D == 64) f.template run<Element, 64>();
    else if (D == 128) f.template run<Element, 128>();
    else
      throw std::invalid_argument(std::string(op) + " on CUDA: head size must be 32, 64 or 128, not " +
                                  std::to_string(D));
  });
#endif
}

}  // namespace tinystory::cuda
