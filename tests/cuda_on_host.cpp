// A Python module of the CUDA ops compiled for the host, for the tests.
#include <pybind11/pybind11.h>

#include "cuda/block.h"

void define_cuda_ops(pybind11::module_& m);

PYBIND11_MODULE(cuda_on_host, m) {
  define_cuda_ops(m);
  m.def(
      "run_backwards", [](bool backwards) { resm::cuda::backwards = backwards; },
      "Reverse the order of threads and blocks, or restore it.");
}
