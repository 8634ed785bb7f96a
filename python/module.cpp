// The Python face of csrc: tables of raw pointers in, raw pointers out. No torch headers, so that one build serves
// every torch version; what a tensor is, and every check of meaning, lies in resm_kernels/ops.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cpu/memory.h"
#include "cpu/ops.h"

namespace py = pybind11;
#if defined(RESM_WITH_CUDA)
void define_cuda_ops(py::module_& m);  // cuda.cpp
#endif
using resm::DType;
using namespace resm::cpu;

namespace {

using Pointers = py::array_t<uint64_t, py::array::c_style | py::array::forcecast>;
using Codes = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;
using Lengths = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;
using Laws = py::array_t<uint64_t, py::array::c_style | py::array::forcecast>;
using Numbers = py::array_t<double, py::array::c_style | py::array::forcecast>;

// These checks guard memory only: a caller of resm_kernels.ops never meets them.
void require(bool holds, const std::string& need) {
  if (!holds) throw std::invalid_argument("resm_kernels._native: " + need);
}

std::vector<Array> arrays(const Pointers& pointers, const Codes& dtypes, const Lengths& lengths, int64_t per_length,
                          const char* name) {
  require(pointers.size() == dtypes.size(), std::string(name) + " need one dtype code for each pointer");
  std::vector<Array> found;
  for (py::ssize_t i = 0; i < pointers.size(); ++i) {
    const int32_t code = dtypes.at(i);
    require(code >= 0 && code < resm::kDTypes, std::string(name) + " have an unknown dtype code");
    void* data = reinterpret_cast<void*>(pointers.at(i));
    require(data != nullptr || lengths.at(i / per_length) == 0, std::string(name) + " have a null pointer");
    found.push_back({data, static_cast<DType>(code)});
  }
  return found;
}

Groups groups_of(const Pointers& bases, const Codes& base_dtypes, const Pointers& experts, const Codes& expert_dtypes,
                 const Lengths& lengths) {
  const py::ssize_t n = lengths.size();
  require(bases.size() == n || bases.size() == 0, "need one base for each length, or none");
  require(n == 0 ? experts.size() == 0 : experts.size() % n == 0, "need as many experts for each length");
  Groups groups;
  for (py::ssize_t i = 0; i < n; ++i) {
    require(lengths.at(i) >= 0, "lengths must not be negative");
    groups.lengths.push_back(lengths.at(i));
  }
  groups.n_experts = n == 0 ? 0 : static_cast<int>(experts.size() / n);
  groups.bases = arrays(bases, base_dtypes, lengths, 1, "bases");
  groups.experts = arrays(experts, expert_dtypes, lengths, std::max(groups.n_experts, 1), "experts");
  return groups;
}

template <class T>
T* at(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

SparsityOptions sparsity_of(uint64_t lower, uint64_t upper, const Pointers& masks, const Groups& groups) {
  require(masks.size() == 0 || masks.size() == static_cast<py::ssize_t>(groups.experts.size()),
          "need one mask for each expert, or none");
  SparsityOptions options{at<const double>(lower), at<const double>(upper), {}};
  for (py::ssize_t i = 0; i < masks.size(); ++i) options.masks.push_back(at<const uint8_t>(masks.at(i)));
  return options;
}

void py_delta_stats(const Pointers& bases, const Codes& base_dtypes, const Pointers& experts,
                    const Codes& expert_dtypes, const Lengths& lengths, double eps, double eps_rel, double kappa,
                    uint64_t moments, uint64_t counts, uint64_t bin_counts, uint64_t bin_sums, int threads) {
  const Groups groups = groups_of(bases, base_dtypes, experts, expert_dtypes, lengths);
  require(groups.bases.size() == groups.lengths.size(), "delta_stats needs a base");
  py::gil_scoped_release unlocked;
  delta_stats(groups, {eps, eps_rel, kappa}, at<double>(moments), at<int64_t>(counts), at<int64_t>(bin_counts),
              at<double>(bin_sums), threads);
}

void py_magnitude_threshold(const Pointers& bases, const Codes& base_dtypes, const Pointers& experts,
                            const Codes& expert_dtypes, const Lengths& lengths, const Lengths& k, uint64_t thresholds,
                            uint64_t nonfinite, int threads) {
  const Groups groups = groups_of(bases, base_dtypes, experts, expert_dtypes, lengths);
  require(groups.bases.size() == groups.lengths.size(), "magnitude_threshold needs a base");
  require(k.size() == static_cast<py::ssize_t>(groups.experts.size()), "need one k for each expert");
  for (py::ssize_t i = 0; i < k.size(); ++i)
    require(k.at(i) >= 0 && k.at(i) <= groups.lengths[i / groups.n_experts], "k must lie within 0 and the length");
  const int64_t* ks = k.data();
  py::gil_scoped_release unlocked;
  magnitude_threshold(groups, ks, at<double>(thresholds), at<int64_t>(nonfinite), threads);
}

void py_aggregate(const Pointers& bases, const Codes& base_dtypes, const Pointers& experts, const Codes& expert_dtypes,
                  const Pointers& outs, const Codes& out_dtypes, const Lengths& lengths, const Numbers& weights,
                  uint64_t rescale, double scale, int rule, bool normalize, int vote, double min_divisor,
                  uint64_t lower, uint64_t upper, const Pointers& masks, uint64_t nonfinite, int threads) {
  const Groups groups = groups_of(bases, base_dtypes, experts, expert_dtypes, lengths);
  const std::vector<Array> into = arrays(outs, out_dtypes, lengths, 1, "outs");
  require(into.size() == groups.lengths.size(), "need one output for each length");
  require(weights.size() == static_cast<py::ssize_t>(groups.experts.size()), "need one weight for each expert");
  require(rule == 0 || rule == 1, "unknown rule");
  require(vote >= 0 && vote <= 2, "unknown vote");
  const AggregateOptions options{weights.data(),
                                 at<const double>(rescale),
                                 scale,
                                 static_cast<resm::Rule>(rule),
                                 normalize,
                                 static_cast<resm::Vote>(vote),
                                 min_divisor,
                                 sparsity_of(lower, upper, masks, groups)};
  py::gil_scoped_release unlocked;
  aggregate(groups, options, into, at<int64_t>(nonfinite), threads);
}

void py_inner_products(const Pointers& bases, const Codes& base_dtypes, const Pointers& experts,
                       const Codes& expert_dtypes, const Lengths& lengths, uint64_t grams, int threads) {
  const Groups groups = groups_of(bases, base_dtypes, experts, expert_dtypes, lengths);
  py::gil_scoped_release unlocked;
  inner_products(groups, at<double>(grams), threads);
}

// What masks and sums are of: one base and its experts.
Groups one_group(const Pointers& bases, const Codes& base_dtypes, const Pointers& experts, const Codes& expert_dtypes,
                 const Lengths& lengths) {
  Groups groups = groups_of(bases, base_dtypes, experts, expert_dtypes, lengths);
  require(groups.size() == 1 && groups.bases.size() == 1, "need one base");
  return groups;
}

void py_kept_moments(const Pointers& bases, const Codes& base_dtypes, const Pointers& experts,
                     const Codes& expert_dtypes, const Lengths& lengths, uint64_t lower, uint64_t upper,
                     const Pointers& masks, uint64_t moments, int threads) {
  const Groups groups = one_group(bases, base_dtypes, experts, expert_dtypes, lengths);
  const SparsityOptions sparsity = sparsity_of(lower, upper, masks, groups);
  py::gil_scoped_release unlocked;
  kept_moments(groups, sparsity, at<double>(moments), threads);
}

void py_random_mask(const Pointers& bases, const Codes& base_dtypes, const Pointers& experts,
                    const Codes& expert_dtypes, const Lengths& lengths, int64_t row, const Laws& lowest,
                    const Laws& steps, uint64_t seed, const Pointers& masks, int threads) {
  const Groups groups = one_group(bases, base_dtypes, experts, expert_dtypes, lengths);
  require(row > 0 && row <= INT32_MAX && groups.lengths[0] % row == 0, "need whole rows of less than 2^31 elements");
  require(lowest.size() == groups.n_experts && steps.size() == groups.n_experts, "need a law for each expert");
  require(masks.size() == groups.n_experts, "need a mask for each expert");
  RandomMaskOptions options{row, seed, {}, {}};
  for (int t = 0; t < groups.n_experts; ++t) {
    options.laws.push_back({lowest.at(t), steps.at(t)});
    options.masks.push_back(at<uint8_t>(masks.at(t)));
  }
  py::gil_scoped_release unlocked;
  random_mask(groups, options, threads);
}

void py_variance_mask(const Pointers& bases, const Codes& base_dtypes, const Pointers& experts,
                      const Codes& expert_dtypes, const Lengths& lengths, double density, uint64_t mask,
                      int threads) {
  const Groups groups = one_group(bases, base_dtypes, experts, expert_dtypes, lengths);
  py::gil_scoped_release unlocked;
  variance_mask(groups, density, at<uint8_t>(mask), threads);
}

DeltaMatrix matrix_of(const Groups& groups, int64_t m, int64_t n) {
  require(groups.size() == 1 && groups.n_experts == 1, "need one expert");
  require(m >= 0 && n >= 0 && groups.lengths[0] == m * n, "the length must be that of an m×n matrix");
  return {groups.base(0), groups.experts_of(0), m, n};
}

void py_random_matrix(int64_t n, int64_t columns, uint64_t seed, int64_t first_column, uint64_t out, int threads) {
  require(n >= 0 && columns >= 0 && first_column >= 0, "rows and columns must not be negative");
  py::gil_scoped_release unlocked;
  random_matrix(n, columns, seed, first_column, at<float>(out), threads);
}

void py_sketch(const Pointers& bases, const Codes& base_dtypes, const Pointers& experts, const Codes& expert_dtypes,
               const Lengths& lengths, int64_t m, int64_t n, int64_t columns, uint64_t seed, int64_t first_column,
               uint64_t y, int threads) {
  const Groups groups = groups_of(bases, base_dtypes, experts, expert_dtypes, lengths);
  const DeltaMatrix delta = matrix_of(groups, m, n);
  require(columns >= 0 && first_column >= 0, "columns must not be negative");
  py::gil_scoped_release unlocked;
  sketch(delta, columns, seed, first_column, at<float>(y), threads);
}

void py_project(const Pointers& bases, const Codes& base_dtypes, const Pointers& experts, const Codes& expert_dtypes,
                const Lengths& lengths, int64_t m, int64_t n, uint64_t q, int64_t l, uint64_t b, int threads) {
  const Groups groups = groups_of(bases, base_dtypes, experts, expert_dtypes, lengths);
  const DeltaMatrix delta = matrix_of(groups, m, n);
  require(l >= 0, "l must not be negative");
  py::gil_scoped_release unlocked;
  project(delta, at<const float>(q), l, at<float>(b), threads);
}

void py_gram_product(const Pointers& bases, const Codes& base_dtypes, const Pointers& experts,
                     const Codes& expert_dtypes, const Lengths& lengths, int64_t m, int64_t n, uint64_t x,
                     int64_t columns, uint64_t y, uint64_t z, uint64_t energy, int threads) {
  const Groups groups = groups_of(bases, base_dtypes, experts, expert_dtypes, lengths);
  const DeltaMatrix delta = matrix_of(groups, m, n);
  require(columns >= 0, "columns must not be negative");
  py::gil_scoped_release unlocked;
  gram_product(delta, at<const float>(x), columns, at<float>(y), at<float>(z), at<double>(energy), threads);
}

void py_gram_matrix(uint64_t x, int64_t n, int64_t columns, uint64_t g, int threads) {
  require(n >= 0 && columns >= 0, "rows and columns must not be negative");
  py::gil_scoped_release unlocked;
  gram_matrix(at<const float>(x), n, columns, at<double>(g), threads);
}

void py_low_rank_update(uint64_t left, uint64_t right, int64_t m, int64_t n, int64_t k, int64_t right_row,
                        int64_t right_step, bool in_double, const Pointers& bases, const Codes& base_dtypes,
                        const Pointers& outs, const Codes& out_dtypes, const Lengths& lengths, double scale,
                        int threads) {
  require(m >= 0 && n >= 0 && k >= 0 && lengths.size() == 1 && lengths.at(0) == m * n, "need an m×n base");
  require(bases.size() == 1 && outs.size() == 1, "need one base and one output");
  const Array base = arrays(bases, base_dtypes, lengths, 1, "bases")[0];
  const Array out = arrays(outs, out_dtypes, lengths, 1, "outs")[0];
  py::gil_scoped_release unlocked;
  low_rank_update({at<const void>(left), at<const void>(right), m, n, k, right_row, right_step}, in_double, base, scale,
                  out, threads);
}

template <class T>
int py_symmetric_eigen(uint64_t a, int64_t n, int64_t k, uint64_t values, uint64_t vectors, int threads) {
  require(n >= 0 && 0 <= k && k <= n, "k must lie within 0 and n");
  py::gil_scoped_release unlocked;
  return static_cast<int>(symmetric_eigen(at<const T>(a), n, k, at<T>(values), at<T>(vectors), threads));
}

py::dict build_facts() {
  py::dict facts;
  facts["isa"] = kernels().isa;
  const char* names[3];
  const int n = available_isas(names);
  py::list isas;
  for (int i = 0; i < n; ++i) isas.append(names[i]);
  facts["isas"] = isas;
  facts["compiler"] = RESM_COMPILER;
  facts["cuda"] = RESM_CUDA_BUILT_FOR;
  return facts;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native kernels of resm_kernels; use them through resm_kernels.ops.";
  m.def("delta_stats", &py_delta_stats);
  m.def("magnitude_threshold", &py_magnitude_threshold);
  m.def("aggregate", &py_aggregate);
  m.def("inner_products", &py_inner_products);
  m.def("kept_moments", &py_kept_moments);
  m.def("random_mask", &py_random_mask);
  m.def("variance_mask", &py_variance_mask);
  m.def("random_matrix", &py_random_matrix);
  m.def("sketch", &py_sketch);
  m.def("project", &py_project);
  m.def("gram_product", &py_gram_product);
  m.def("gram_matrix", &py_gram_matrix);
  m.def("low_rank_update", &py_low_rank_update);
  m.def("symmetric_eigen_f32", &py_symmetric_eigen<float>);
  m.def("symmetric_eigen_f64", &py_symmetric_eigen<double>);
#if defined(RESM_WITH_CUDA)
  define_cuda_ops(m);
#endif
  py::class_<Memory>(m, "Memory", py::buffer_protocol(), "Bytes for a large output.")
      .def(py::init<size_t>())
      .def_buffer([](Memory& memory) {
        return py::buffer_info(static_cast<uint8_t*>(memory.data()), static_cast<py::ssize_t>(memory.bytes()));
      });
  m.def("build_facts", &build_facts, "Instruction sets, compiler and CUDA architectures of this build.");
  m.def("use_isa", [](const std::string& name) {
    require(use_isa(name.c_str()), "this processor or build has no instruction set '" + name + "'");
  }, "Choose the instruction set, for tests: results must not depend on it.");
}
