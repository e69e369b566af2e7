// The Python module. Importing it loads this library, and so registers the operators of ops.cpp.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.doc() = "tinystory's compiled kernels"; }
