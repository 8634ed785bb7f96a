// A Python module of the CUDA ops compiled for the host, for the tests.
#include <nanobind/nanobind.h>

#include "cuda/block.h"

void define_cuda_ops(nanobind::module_& m);

NB_MODULE(cuda_on_host, m) {
  define_cuda_ops(m);
  m.def(
      "run_backwards", [](bool backwards) { resm::cuda::backwards = backwards; },
      "Reverse the order of threads and blocks, or restore it.");
}
