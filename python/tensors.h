// Readers of Python objects for python/*.cpp: torch tensors by their attributes, so that no header of torch is needed.
//
// Every reader checks what it reads and names the argument in its error, so that no kernel gets a wrong address.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/dtype.h"
#include "common/elect.h"

namespace resm::python {

namespace nb = nanobind;

// An argument that may be None. The caller keeps the object alive during a call.
using OptionalTensor = std::optional<nb::handle>;

inline nb::builtin_exception type_error(const std::string& message) { return nb::type_error(message.c_str()); }
inline nb::builtin_exception value_error(const std::string& message) { return nb::value_error(message.c_str()); }
inline std::string text_of(nb::handle object) { return nb::str(object).c_str(); }

// The torch dtype `name`. It is never released: callers look each dtype up once and use it until the process ends.
inline nb::handle torch_dtype(const char* name) {
  return nb::object(nb::module_::import_("torch").attr(name)).release();
}

// The code that common/dtype.h gives a floating-point dtype.
inline DType float_dtype(nb::handle dtype, const char* name) {
  static const std::array<nb::handle, kDTypes> known = {torch_dtype("float32"), torch_dtype("float64"),
                                                        torch_dtype("float16"), torch_dtype("bfloat16")};
  for (int code = 0; code < kDTypes; ++code)
    if (dtype.is(known[code])) return static_cast<DType>(code);
  throw type_error(std::string(name) + ": got dtype " + text_of(dtype) + ", need a float dtype");
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

inline uintptr_t address_of(nb::handle tensor) { return nb::cast<uintptr_t>(tensor.attr("data_ptr")()); }

// Whether a tensor's memory begins at a multiple of its elements' size, as C++ and the compiler's vector instructions
// require. A tensor that lies in the bytes of a file or of another library need not.
inline bool is_aligned(nb::handle tensor) {
  return address_of(tensor) % nb::cast<uintptr_t>(tensor.attr("element_size")()) == 0;
}

// The address of a contiguous tensor of `numel` elements of any dtype.
inline char* data_of(nb::handle tensor, const char* name, int64_t numel) {
  const auto got = nb::cast<int64_t>(tensor.attr("numel")());
  if (got != numel)
    throw value_error(std::string(name) + ": got " + std::to_string(got) + " elements, need " + std::to_string(numel));
  if (!nb::cast<bool>(tensor.attr("is_contiguous")())) throw value_error(std::string(name) + ": is not contiguous");
  if (!is_aligned(tensor))
    throw value_error(std::string(name) + ": its memory begins at no multiple of its elements' size; need a clone");
  return reinterpret_cast<char*>(address_of(tensor));
}

// The elements of a contiguous tensor of `numel` elements of type T.
template <class T>
T* elements_of(nb::handle tensor, const char* name, int64_t numel) {
  static const nb::handle need = torch_dtype(kDtypeName<T>);
  const nb::object dtype = tensor.attr("dtype");
  if (!dtype.is(need))
    throw type_error(std::string(name) + ": got dtype " + text_of(dtype) + ", need " + text_of(need));
  return reinterpret_cast<T*>(data_of(tensor, name, numel));
}

// A number, or `none` for Python's None.
inline double number_or(double none, nb::handle number) { return number.is_none() ? none : nb::cast<double>(number); }

inline void require(bool holds, const std::string& need) {
  if (!holds) throw value_error("resm_kernels._native: " + need);
}

// One number for each expert from a float64 tensor; none from None.
inline std::vector<double> numbers_of(nb::handle record, const char* field, int n_experts) {
  const nb::object tensor = record.attr(field);
  if (tensor.is_none()) return {};
  auto numbers = nb::cast<std::vector<double>>(tensor.attr("tolist")());
  require(static_cast<int>(numbers.size()) == n_experts, std::string(field) + ": need one number for each expert");
  return numbers;
}

// The value of the enumeration E that a field of a record names.
template <class E>
E choice_of(nb::handle record, const char* field, std::initializer_list<std::pair<const char*, E>> choices) {
  const auto got = nb::cast<std::string>(record.attr(field));
  std::string names;
  for (const auto& [name, choice] : choices) {
    if (got == name) return choice;
    names += (names.empty() ? "" : ", ") + std::string(name);
  }
  throw value_error(std::string(field) + ": got '" + got + "', need one of " + names);
}
inline Rule rule_of(nb::handle aggregate_options) {
  return choice_of<Rule>(aggregate_options, "rule", {{"sum", Rule::sum}, {"ties", Rule::ties}});
}
inline Vote vote_of(nb::handle aggregate_options) {
  return choice_of<Vote>(aggregate_options, "consensus_method",
                         {{"weighted", Vote::weighted}, {"unweighted", Vote::unweighted}});
}

}  // namespace resm::python
