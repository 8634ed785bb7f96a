// The CPU ops for Python. They read tensors and options records, which are Python objects, by the names of attributes
// (tensors.h) instead of torch's headers, so that one build serves every torch version. resm_kernels/ops checks the
// values of arguments; the checks here only keep kernels within the memory of tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "cpu/memory.h"
#include "cpu/ops.h"
#include "tensors.h"

namespace py = pybind11;
#if defined(RESM_WITH_CUDA)
void define_cuda_ops(py::module_& m);  // cuda.cpp
#endif
using namespace resm;
using namespace resm::cpu;
using namespace resm::python;

namespace {

void require(bool holds, const std::string& need) {
  if (!holds) throw py::value_error("resm_kernels._native: " + need);
}

void require_cpu(py::handle tensor, const char* name) {
  require(tensor.attr("is_cpu").cast<bool>(), std::string(name) + ": need a tensor on the CPU");
}

// `elements_of` a tensor on the CPU.
template <class T>
T* cpu_elements(py::handle tensor, const char* name, int64_t numel) {
  require_cpu(tensor, name);
  return elements_of<T>(tensor, name, numel);
}

// A contiguous tensor of floating-point numbers on the CPU.
Array float_array(py::handle tensor, const char* name, int64_t numel) {
  require_cpu(tensor, name);
  return {.data = data_of(tensor, name, numel), .dtype = float_dtype(tensor.attr("dtype"), name)};
}

// An input tensor of an op, made contiguous and aligned, which lives as long as this object.
class Input {
 public:
  Input(py::handle tensor, const char* name) : name_(name), tensor_(tensor.attr("contiguous")()) {
    if (!is_aligned(tensor_)) tensor_ = tensor_.attr("clone")();
  }

  std::vector<int64_t> shape() const { return tensor_.attr("shape").cast<std::vector<int64_t>>(); }
  int64_t numel() const { return tensor_.attr("numel")().cast<int64_t>(); }
  Array array(int64_t numel) const { return float_array(tensor_, name_, numel); }
  template <class T>
  const T* elements(int64_t numel) const {
    return cpu_elements<T>(tensor_, name_, numel);
  }
  // The numbers of rows and columns of a matrix.
  std::pair<int64_t, int64_t> matrix_shape() const {
    const std::vector<int64_t> sizes = shape();
    require(sizes.size() == 2, std::string(name_) + ": need a matrix");
    return {sizes[0], sizes[1]};
  }

 private:
  const char* name_;
  py::object tensor_;
};

// One number for each expert from a float64 tensor; none from None.
std::vector<double> numbers_of(py::handle record, const char* field, int n_experts) {
  const py::object tensor = record.attr(field);
  if (tensor.is_none()) return {};
  auto numbers = tensor.attr("tolist")().cast<std::vector<double>>();
  require(static_cast<int>(numbers.size()) == n_experts, std::string(field) + ": need one number for each expert");
  return numbers;
}

struct GroupNeeds {
  bool base = false;  // whether the op refuses to run without a base
  bool rows = false;  // whether the op treats each row, a vector along the last dimension, separately
};

// The base, the experts and the masks of an op, which live as long as this object.
class GroupInput {
 public:
  GroupInput(py::handle base, const py::sequence& experts, GroupNeeds needs) {
    require(experts.size() > 0, "experts: got none, need one or more tensors");
    require(!needs.base || !base.is_none(), "base: got none, need a tensor");
    inputs_.reserve(1 + experts.size());
    if (!base.is_none()) inputs_.emplace_back(base, "base");
    for (const py::handle expert : experts) inputs_.emplace_back(expert, "experts");
    const int64_t numel = inputs_[0].numel();
    group_.length = numel;
    if (needs.rows) {
      const std::vector<int64_t> shape = inputs_[0].shape();
      group_.length = shape.empty() ? 1 : shape.back();
      for (size_t i = 0; i + 1 < shape.size(); ++i) group_.rows *= shape[i];
    }
    const size_t first = base.is_none() ? 0 : 1;
    if (first == 1) group_.base = inputs_[0].array(numel);
    for (size_t i = first; i < inputs_.size(); ++i) group_.experts.push_back(inputs_[i].array(numel));
  }

  const Group& operator*() const { return group_; }
  const Group* operator->() const { return &group_; }
  // Δ of the first expert as a matrix, for groups with `rows`.
  DeltaMatrix delta() const {
    return {.base = group_.base_or_null(), .expert = group_.experts.data(), .m = group_.rows, .n = group_.length};
  }
  // The fields that a record inherits from SparsityOptions.
  SparsityOptions sparsity(py::handle record) {
    const int n = group_.n_experts();
    SparsityOptions options{.thresholds = numbers_of(record, "thresholds", n),
                            .upper_thresholds = numbers_of(record, "upper_thresholds", n),
                            .masks = {}};
    const py::object masks = record.attr("masks");
    if (masks.is_none()) return options;
    for (const py::handle mask : masks) {
      inputs_.emplace_back(mask, "masks");
      options.masks.push_back(inputs_.back().elements<uint8_t>(mask_bytes(group_.numel())));
    }
    require(static_cast<int>(options.masks.size()) == n, "masks: need one for each expert");
    return options;
  }

 private:
  std::vector<Input> inputs_;
  Group group_;
};

void py_aggregate(py::handle base, const py::sequence& experts, py::handle options, py::handle merged,
                  py::handle nonfinite, int threads) {
  GroupInput group(base, experts, {});
  const int n = group->n_experts();
  const AggregateOptions read{.sparsity = group.sparsity(options),
                              .weights = options.attr("weights").cast<std::vector<double>>(),
                              .rescale = numbers_of(options, "rescale", n),
                              .scale = options.attr("scale").cast<double>(),
                              .rule = rule_of(options),
                              .normalize = options.attr("normalize").cast<bool>(),
                              .vote = vote_of(options),
                              .min_divisor = number_or(-INFINITY, options.attr("min_divisor"))};
  require(static_cast<int>(read.weights.size()) == n, "weights: need one for each expert");
  const AggregateResult result{.merged = float_array(merged, "merged", group->numel()),
                               .nonfinite = cpu_elements<int64_t>(nonfinite, "nonfinite", 1 + n)};
  const py::gil_scoped_release unlocked;
  aggregate(*group, read, result, threads);
}

void py_delta_stats(py::handle base, const py::sequence& experts, py::handle options, py::handle moments,
                    py::handle counts, py::handle bin_counts, py::handle bin_sums, int threads) {
  const GroupInput group(base, experts, {.base = true, .rows = options.attr("rows").cast<bool>()});
  const int64_t vectors = group->n_experts() * group->rows;
  const bool histogram = options.attr("histogram").cast<bool>();
  const int64_t bins = histogram ? vectors * kHistogramBins : 0;
  const DeltaStatsOptions read{.eps = options.attr("eps").cast<double>(),
                               .eps_rel = options.attr("eps_rel").cast<double>(),
                               .kappa = number_or(-1.0, options.attr("kappa"))};
  DeltaStatsResult result{.moments = cpu_elements<double>(moments, "moments", vectors * kMoments),
                          .counts = cpu_elements<int64_t>(counts, "counts", vectors * kCounts),
                          .bin_counts = cpu_elements<int64_t>(bin_counts, "bin_counts", bins),
                          .bin_sums = cpu_elements<double>(bin_sums, "bin_sums", bins)};
  if (!histogram) result.bin_counts = nullptr;
  const py::gil_scoped_release unlocked;
  delta_stats(*group, read, result, threads);
}

void py_magnitude_threshold(py::handle base, const py::sequence& experts, py::handle options, py::handle thresholds,
                            py::handle nonfinite, int threads) {
  const GroupInput group(base, experts, {.base = true});
  const int n = group->n_experts();
  const auto k = options.attr("k").cast<std::vector<int64_t>>();
  require(static_cast<int>(k.size()) == n, "k: need one for each expert");
  for (const int64_t rank : k) require(rank >= 0 && rank <= group->numel(), "k: need 0 to the number of elements");
  const ThresholdResult result{.thresholds = cpu_elements<double>(thresholds, "thresholds", n),
                               .nonfinite = cpu_elements<int64_t>(nonfinite, "nonfinite", n)};
  const py::gil_scoped_release unlocked;
  magnitude_threshold(*group, k, result, threads);
}

// A MagnitudeSelection of tensors: the parts are groups of float32 or half-precision tensors, or, in double, of any.
class PySelection {
 public:
  PySelection(int n_experts, bool in_double, int64_t most, int threads)
      : n_experts_(n_experts), in_double_(in_double),
        selection_(MagnitudeSelection::make(n_experts, in_double, most, threads)) {}

  void add_sample(py::handle base, const py::sequence& experts) {
    with_part(base, experts, [&](const Group& part) { selection_->add_sample(part); });
  }
  void narrow(const std::vector<double>& shares) {
    require_each(shares.size());
    selection_->narrow(shares);
  }
  void count(py::handle base, const py::sequence& experts) {
    with_part(base, experts, [&](const Group& part) { selection_->count(part); });
  }
  bool select(const std::vector<int64_t>& k) {
    require_each(k.size());
    return selection_->select(k);
  }
  void count_digit(py::handle base, const py::sequence& experts) {
    with_part(base, experts, [&](const Group& part) { selection_->count_digit(part); });
  }
  bool end_digit() { return selection_->end_digit(); }
  std::vector<double> thresholds() const { return selection_->thresholds(); }
  std::vector<int64_t> nonfinite() const {
    std::vector<int64_t> counts;
    for (int t = 0; t < n_experts_; ++t) counts.push_back(selection_->nonfinite(t));
    return counts;
  }

 private:
  void require_each(size_t numbers) const {
    require(static_cast<int>(numbers) == n_experts_, "need one number for each expert");
  }
  template <class Use>
  void with_part(py::handle base, const py::sequence& experts, Use use) {
    const GroupInput part(base, experts, {});
    require(part->n_experts() == n_experts_ && part->in_double() == in_double_, "experts: need those of the selection");
    const py::gil_scoped_release unlocked;
    use(*part);
  }

  int n_experts_;
  bool in_double_;
  std::unique_ptr<MagnitudeSelection> selection_;
};

void py_inner_products(py::handle base, const py::sequence& experts, py::handle options, py::handle grams,
                       int threads) {
  const GroupInput group(base, experts, {.base = false, .rows = options.attr("rows").cast<bool>()});
  const int64_t n = group->n_experts();
  double* out = cpu_elements<double>(grams, "grams", group->rows * n * n);
  const py::gil_scoped_release unlocked;
  inner_products(*group, out, threads);
}

void py_kept_moments(py::handle base, const py::sequence& experts, py::handle options, py::handle moments,
                     int threads) {
  GroupInput group(base, experts, {.base = true});
  const SparsityOptions sparsity = group.sparsity(options);
  double* out = cpu_elements<double>(moments, "moments", group->n_experts() * 3);
  const py::gil_scoped_release unlocked;
  kept_moments(*group, sparsity, out, threads);
}

// laws: the numbers `lowest` and `step` of each expert's MaskLaw.
void py_random_mask(py::handle base, const py::sequence& experts, py::handle options,
                    const std::vector<std::pair<uint64_t, uint64_t>>& laws, const py::sequence& masks, int threads) {
  const GroupInput group(base, experts, {.base = true, .rows = true});
  const auto n = static_cast<size_t>(group->n_experts());
  require(group->length <= INT32_MAX, "base: need rows of less than 2^31 elements");
  require(laws.size() == n && masks.size() == n, "need a law and a mask for each expert");
  const auto first = options.attr("first").cast<int64_t>();
  require(first >= 0 && first % kRun == 0, "first: need whole runs");
  RandomMaskOptions read{.laws = {}, .seed = options.attr("seed").cast<uint64_t>(), .first_run = first / kRun};
  for (const auto& [lowest, step] : laws) read.laws.push_back({.lowest = lowest, .step = step});
  std::vector<uint8_t*> outs;
  for (const py::handle mask : masks) outs.push_back(cpu_elements<uint8_t>(mask, "masks", mask_bytes(group->numel())));
  const py::gil_scoped_release unlocked;
  random_mask(*group, read, outs, threads);
}

void py_variance_mask(py::handle base, const py::sequence& experts, py::handle options, py::handle mask, int threads) {
  const GroupInput group(base, experts, {.base = true});
  const auto density = options.attr("density").cast<double>();
  uint8_t* out = cpu_elements<uint8_t>(mask, "mask", mask_bytes(group->numel()));
  const py::gil_scoped_release unlocked;
  variance_mask(*group, density, out, threads);
}

int64_t py_variances(py::handle base, const py::sequence& experts, py::handle out, int threads) {
  const GroupInput group(base, experts, {.base = true});
  const Array values = float_array(out, "out", group->numel());
  require(values.dtype == (group->in_double() ? DType::f64 : DType::f32), "out: need the dtype of the arithmetic");
  const py::gil_scoped_release unlocked;
  return variances(*group, values.data, threads);
}

void py_keep_from(py::handle variances, double least, py::handle mask, int threads) {
  const Input values(variances, "variances");
  const int64_t numel = values.numel();
  const Array array = values.array(numel);
  require(array.dtype == DType::f32 || array.dtype == DType::f64, "variances: need float32 or float64");
  uint8_t* out = cpu_elements<uint8_t>(mask, "mask", mask_bytes(numel));
  const py::gil_scoped_release unlocked;
  keep_from(array, numel, least, out, threads);
}

void py_random_matrix(py::handle options, py::handle omega, int threads) {
  const RandomMatrixOptions read{.n = options.attr("n").cast<int64_t>(),
                                 .columns = options.attr("columns").cast<int64_t>(),
                                 .seed = options.attr("seed").cast<uint64_t>(),
                                 .first_column = options.attr("first_column").cast<int64_t>()};
  require(read.n >= 0 && read.columns >= 0 && read.first_column >= 0, "rows and columns must not be negative");
  float* out = cpu_elements<float>(omega, "omega", read.n * read.columns);
  const py::gil_scoped_release unlocked;
  random_matrix(read, out, threads);
}

void py_project(py::handle base, py::handle expert, py::handle q, py::handle b, int threads) {
  const GroupInput group(base, py::make_tuple(expert), {.base = false, .rows = true});
  const DeltaMatrix delta = group.delta();
  const Input factor(q, "q");
  const int64_t l = factor.matrix_shape().second;
  const float* from = factor.elements<float>(delta.m * l);
  float* out = cpu_elements<float>(b, "b", l * delta.n);
  const py::gil_scoped_release unlocked;
  project(delta, from, l, out, threads);
}

void py_gram_product(py::handle base, py::handle expert, py::handle x, py::handle y, py::handle z, py::handle energy,
                     int threads) {
  const GroupInput group(base, py::make_tuple(expert), {.base = false, .rows = true});
  const DeltaMatrix delta = group.delta();
  const Input factor(x, "x");
  const int64_t columns = factor.matrix_shape().second;
  const float* from = factor.elements<float>(delta.n * columns);
  const GramProductResult result{.y = cpu_elements<float>(y, "y", delta.m * columns),
                                 .z = cpu_elements<float>(z, "z", delta.n * columns),
                                 .energy = cpu_elements<double>(energy, "energy", 1)};
  const py::gil_scoped_release unlocked;
  gram_product(delta, from, columns, result, threads);
}

// y may be None.
void py_gram_matrix(py::handle x, py::handle y, py::handle g, int threads) {
  const Input left(x, "x"), right(y.is_none() ? x : y, "y");
  const auto [n, columns] = left.matrix_shape();
  const auto [y_rows, y_columns] = right.matrix_shape();
  require(y_rows == n, "y: need as many rows as x");
  const float *of_x = left.elements<float>(n * columns), *of_y = right.elements<float>(n * y_columns);
  double* out = cpu_elements<double>(g, "g", columns * y_columns);
  const bool has_y = !y.is_none();  // of_y does not tell: it is null where y has no rows
  const py::gil_scoped_release unlocked;
  if (has_y)
    gram_matrix(of_x, of_y, n, columns, y_columns, out, threads);
  else
    gram_matrix(of_x, n, columns, out, threads);
}

// left and right are of one dtype, float32 or float64. right may be the transpose of a contiguous matrix.
void py_low_rank_update(py::handle base, py::handle left, py::handle right, py::handle options, py::handle merged,
                        int threads) {
  const Input start(base, "base"), left_rows(left, "left");
  const auto [m, n] = start.matrix_shape();
  const int64_t k = left_rows.matrix_shape().second;
  const py::object flipped = right.attr("mT");
  const bool is_flipped = !right.attr("is_contiguous")().cast<bool>() && flipped.attr("is_contiguous")().cast<bool>();
  const Input right_rows(is_flipped ? py::handle(flipped) : right, "right");
  const Array l = left_rows.array(m * k), r = right_rows.array(n * k);
  require(l.dtype == r.dtype && (l.dtype == DType::f32 || l.dtype == DType::f64),
          "left and right: need one dtype, float32 or float64");
  const LowRank update{.left = l.data,
                       .right = r.data,
                       .m = m,
                       .n = n,
                       .k = k,
                       .right_row = is_flipped ? 1 : k,
                       .right_step = is_flipped ? n : 1,
                       .in_double = l.dtype == DType::f64};
  const Array from = start.array(m * n), out = float_array(merged, "merged", m * n);
  const auto scale = options.attr("scale").cast<double>();
  const py::gil_scoped_release unlocked;
  low_rank_update(from, update, scale, out, threads);
}

template <class T>
EigenStatus solve(const Input& a, int64_t n, int64_t k, py::handle values, py::handle vectors, int threads) {
  const T* from = a.elements<T>(n * n);
  T *to_values = cpu_elements<T>(values, "values", k), *to_vectors = cpu_elements<T>(vectors, "vectors", n * k);
  const py::gil_scoped_release unlocked;
  return symmetric_eigen(from, n, k, to_values, to_vectors, threads);
}

int py_symmetric_eigen(py::handle a, py::handle options, py::handle values, py::handle vectors, int threads) {
  const Input matrix(a, "a");
  const int64_t n = matrix.matrix_shape().first;
  const auto k = options.attr("k").cast<int64_t>();
  require(0 <= k && k <= n, "k: need 0 to the number of rows");
  const bool in_double = matrix.array(n * n).dtype == DType::f64;
  return static_cast<int>(in_double ? solve<double>(matrix, n, k, values, vectors, threads)
                                    : solve<float>(matrix, n, k, values, vectors, threads));
}

py::dict build_facts() {
  py::dict facts;
  facts["isa"] = kernels().isa;
  const char* names[3];
  const int n = available_isas(names);
  facts["isas"] = std::vector<std::string>(names, names + n);
  facts["compiler"] = RESM_COMPILER;
  facts["cuda"] = RESM_CUDA_BUILT_FOR;
  return facts;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native kernels of resm_kernels; use them through resm_kernels.ops.";
  m.def("aggregate", &py_aggregate);
  m.def("delta_stats", &py_delta_stats);
  m.def("gram_matrix", &py_gram_matrix);
  m.def("gram_product", &py_gram_product);
  m.def("inner_products", &py_inner_products);
  m.def("kept_moments", &py_kept_moments);
  m.def("low_rank_update", &py_low_rank_update);
  m.def("magnitude_threshold", &py_magnitude_threshold);
  m.def("project", &py_project);
  m.def("random_mask", &py_random_mask);
  m.def("random_matrix", &py_random_matrix);
  m.def("symmetric_eigen", &py_symmetric_eigen);
  m.def("variance_mask", &py_variance_mask);
  m.def("variances", &py_variances);
  m.def("keep_from", &py_keep_from);
  py::class_<PySelection>(m, "MagnitudeSelection", "magnitude_threshold of a tensor that comes in parts.")
      .def(py::init<int, bool, int64_t, int>())
      .def("add_sample", &PySelection::add_sample)
      .def("narrow", &PySelection::narrow)
      .def("count", &PySelection::count)
      .def("select", &PySelection::select)
      .def("count_digit", &PySelection::count_digit)
      .def("end_digit", &PySelection::end_digit)
      .def("thresholds", &PySelection::thresholds)
      .def("nonfinite", &PySelection::nonfinite);
#if defined(RESM_WITH_CUDA)
  define_cuda_ops(m);
#endif
  py::class_<Memory>(m, "Memory", py::buffer_protocol(), "Bytes for a large output.")
      .def(py::init<size_t>())
      .def_buffer([](Memory& memory) {
        return py::buffer_info(static_cast<uint8_t*>(memory.data()), static_cast<py::ssize_t>(memory.bytes()));
      });
  m.def("build_facts", &build_facts, "Instruction sets, compiler and CUDA architectures of this build.");
  m.def(
      "use_isa",
      [](const std::string& name) {
        require(use_isa(name.c_str()), "this processor or build has no instruction set '" + name + "'");
      },
      "Choose the instruction set, for tests: results must not depend on it.");
}
