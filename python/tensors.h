// Readers of Python objects for python/*.cpp: torch tensors by their attributes, so that no header of torch is needed.
//
// Every reader checks what it reads and names the argument in its error, so that no kernel gets a wrong address.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <string>
#include <type_traits>

#include "common/dtype.h"
#include "common/elect.h"

namespace resm::python {

namespace py = pybind11;

// torch's dtype of that name. The objects are looked up once and live as long as the interpreter.
inline py::handle torch_dtype(const char* name) {
  py::object dtype = py::module_::import("torch").attr(name);
  return dtype.release();
}

// The code of a floating-point dtype, as common/dtype.h has it.
inline DType float_dtype(py::handle dtype, const char* name) {
  static const std::array<py::handle, kDTypes> known = {torch_dtype("float32"), torch_dtype("float64"),
                                                        torch_dtype("float16"), torch_dtype("bfloat16")};
  for (int code = 0; code < kDTypes; ++code)
    if (dtype.is(known[code])) return static_cast<DType>(code);
  throw py::type_error(std::string(name) + ": got dtype " + std::string(py::str(dtype)) + ", need a float dtype");
}

template <class T>
py::handle dtype_of_elements() {
  if constexpr (std::is_same_v<T, double>) {
    static const py::handle dtype = torch_dtype("float64");
    return dtype;
  } else if constexpr (std::is_same_v<T, int64_t>) {
    static const py::handle dtype = torch_dtype("int64");
    return dtype;
  } else if constexpr (std::is_same_v<T, float>) {
    static const py::handle dtype = torch_dtype("float32");
    return dtype;
  } else {
    static_assert(std::is_same_v<T, uint8_t>, "tensors hold float, double, int64_t or uint8_t");
    static const py::handle dtype = torch_dtype("uint8");
    return dtype;
  }
}

// The address of a contiguous tensor of `numel` elements, whatever its dtype is.
inline char* data_of(py::handle tensor, const char* name, int64_t numel) {
  const auto got = tensor.attr("numel")().cast<int64_t>();
  if (got != numel)
    throw py::value_error(std::string(name) + ": got " + std::to_string(got) + " elements, need " +
                          std::to_string(numel));
  if (!tensor.attr("is_contiguous")().cast<bool>()) throw py::value_error(std::string(name) + ": is not contiguous");
  return reinterpret_cast<char*>(tensor.attr("data_ptr")().cast<uintptr_t>());
}

// The elements of a contiguous tensor of `numel` elements of type T.
template <class T>
T* elements_of(py::handle tensor, const char* name, int64_t numel) {
  const py::object dtype = tensor.attr("dtype");
  if (!dtype.is(dtype_of_elements<T>()))
    throw py::type_error(std::string(name) + ": got dtype " + std::string(py::str(dtype)) + ", need " +
                         std::string(py::str(dtype_of_elements<T>())));
  return reinterpret_cast<T*>(data_of(tensor, name, numel));
}

// An optional number; `none` in place of None.
inline double number_or(double none, py::handle number) { return number.is_none() ? none : number.cast<double>(); }

// The names that AggregateOptions has for rules and consensus methods.
inline Rule rule_of(py::handle name) { return name.cast<std::string>() == "ties" ? Rule::ties : Rule::sum; }
inline Vote vote_of(py::handle name) {
  return name.cast<std::string>() == "unweighted" ? Vote::unweighted : Vote::weighted;
}

}  // namespace resm::python
