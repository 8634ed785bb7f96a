// The CUDA ops' Python face: their own arguments, an exception where they return an error. Their caller,
// resm_kernels/cuda, builds the tables on the device, so that nothing can be checked here.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "cuda/ops.h"

namespace py = pybind11;

namespace {

template <class... Arguments>
auto raising(const char* (*op)(Arguments...)) {
  return [op](Arguments... arguments) {
    const char* error = nullptr;
    {
      py::gil_scoped_release unlocked;
      error = op(arguments...);
    }
    if (error != nullptr) throw std::runtime_error(error);
  };
}

}  // namespace

void define_cuda_ops(py::module_& m) {
  m.def("aggregate_cuda", raising(&aggregate_cuda));
  m.def("delta_stats_cuda", raising(&delta_stats_cuda));
  m.def("kept_moments_cuda", raising(&kept_moments_cuda));
  m.def("magnitude_threshold_cuda", raising(&magnitude_threshold_cuda));
  m.def("random_mask_cuda", raising(&random_mask_cuda));
  m.def("variance_mask_cuda", raising(&variance_mask_cuda));
  m.def("variances_cuda", raising(&variances_cuda));
}
