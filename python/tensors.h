// Readers of Python objects for python/*.cpp: torch tensors by their attributes, so that no header of torch is needed.
//
// Every reader checks what it reads and names the argument in its error, so that no kernel gets a wrong address.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>

#include "common/dtype.h"
#include "common/elect.h"

namespace resm::python {

namespace py = pybind11;

// The torch dtype `name`. It is never released: callers look each dtype up once and use it until the process ends.
inline py::handle torch_dtype(const char* name) {
  return py::module_::import("torch").attr(name).cast<py::object>().release();
}

// The code that common/dtype.h gives a floating-point dtype.
inline DType float_dtype(py::handle dtype, const char* name) {
  static const std::array<py::handle, kDTypes> known = {torch_dtype("float32"), torch_dtype("float64"),
                                                        torch_dtype("float16"), torch_dtype("bfloat16")};
  for (int code = 0; code < kDTypes; ++code)
    if (dtype.is(known[code])) return static_cast<DType>(code);
  throw py::type_error(std::string(name) + ": got dtype " + std::string(py::str(dtype)) + ", need a float dtype");
}

// The name of torch's dtype for elements of type T.
template <class T>
inline constexpr const char* kDtypeName = nullptr;
template <>
inline constexpr const char* kDtypeName<float> = "float32";
template <>
inline constexpr const char* kDtypeName<double> = "float64";
template <>
inline constexpr const char* kDtypeName<int64_t> = "int64";
template <>
inline constexpr const char* kDtypeName<uint8_t> = "uint8";

inline uintptr_t address_of(py::handle tensor) { return tensor.attr("data_ptr")().cast<uintptr_t>(); }

// Whether a tensor's memory begins at a multiple of its elements' size, as C++ and the compiler's vector instructions
// require. A tensor that lies in the bytes of a file or of another library need not.
inline bool is_aligned(py::handle tensor) {
  return address_of(tensor) % tensor.attr("element_size")().cast<uintptr_t>() == 0;
}

// The address of a contiguous tensor of `numel` elements of any dtype.
inline char* data_of(py::handle tensor, const char* name, int64_t numel) {
  const auto got = tensor.attr("numel")().cast<int64_t>();
  if (got != numel)
    throw py::value_error(std::string(name) + ": got " + std::to_string(got) + " elements, need " +
                          std::to_string(numel));
  if (!tensor.attr("is_contiguous")().cast<bool>()) throw py::value_error(std::string(name) + ": is not contiguous");
  if (!is_aligned(tensor))
    throw py::value_error(std::string(name) + ": its memory begins at no multiple of its elements' size; need a clone");
  return reinterpret_cast<char*>(address_of(tensor));
}

// The elements of a contiguous tensor of `numel` elements of type T.
template <class T>
T* elements_of(py::handle tensor, const char* name, int64_t numel) {
  static const py::handle need = torch_dtype(kDtypeName<T>);
  const py::object dtype = tensor.attr("dtype");
  if (!dtype.is(need))
    throw py::type_error(std::string(name) + ": got dtype " + std::string(py::str(dtype)) + ", need " +
                         std::string(py::str(need)));
  return reinterpret_cast<T*>(data_of(tensor, name, numel));
}

// A number, or `none` for Python's None.
inline double number_or(double none, py::handle number) { return number.is_none() ? none : number.cast<double>(); }

// The value of the enumeration E that a field of a record names.
template <class E>
E choice_of(py::handle record, const char* field, std::initializer_list<std::pair<const char*, E>> choices) {
  const auto got = record.attr(field).cast<std::string>();
  std::string names;
  for (const auto& [name, choice] : choices) {
    if (got == name) return choice;
    names += (names.empty() ? "" : ", ") + std::string(name);
  }
  throw py::value_error(std::string(field) + ": got '" + got + "', need one of " + names);
}
inline Rule rule_of(py::handle aggregate_options) {
  return choice_of<Rule>(aggregate_options, "rule", {{"sum", Rule::sum}, {"ties", Rule::ties}});
}
inline Vote vote_of(py::handle aggregate_options) {
  return choice_of<Vote>(aggregate_options, "consensus_method",
                         {{"weighted", Vote::weighted}, {"unweighted", Vote::unweighted}});
}

}  // namespace resm::python
