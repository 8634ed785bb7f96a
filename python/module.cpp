// The CPU ops for Python. They read tensors and options records, which are Python objects, by the names of attributes
// (tensors.h) instead of torch's headers, so that one build serves every torch version. resm_kernels/ops checks the
// values of arguments; the checks here only keep kernels within the memory of tensors.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "cpu/memory.h"
#include "cpu/ops.h"
#include "tensors.h"

namespace nb = nanobind;
#if defined(RESM_WITH_CUDA)
void define_cuda_ops(nb::module_& m);  // cuda.cpp
#endif
using namespace resm;
using namespace resm::cpu;
using namespace resm::python;

namespace {

void require_cpu(nb::handle tensor, const char* name) {
  require(nb::cast<bool>(tensor.attr("is_cpu")), std::string(name) + ": need a tensor on the CPU");
}

// `elements_of` a tensor on the CPU.
template <class T>
T* cpu_elements(nb::handle tensor, const char* name, int64_t numel) {
  require_cpu(tensor, name);
  return elements_of<T>(tensor, name, numel);
}

// A contiguous tensor of floating-point numbers on the CPU.
Array float_array(nb::handle tensor, const char* name, int64_t numel) {
  require_cpu(tensor, name);
  return {.data = data_of(tensor, name, numel), .dtype = float_dtype(tensor.attr("dtype"), name)};
}

// An input tensor of an op, made contiguous and aligned, which lives as long as this object.
class Input {
 public:
  Input(nb::handle tensor, const char* name) : name_(name), tensor_(tensor.attr("contiguous")()) {
    if (!is_aligned(tensor_)) tensor_ = tensor_.attr("clone")();
  }

  std::vector<int64_t> shape() const { return nb::cast<std::vector<int64_t>>(tensor_.attr("shape")); }
  int64_t numel() const { return nb::cast<int64_t>(tensor_.attr("numel")()); }
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
  nb::object tensor_;
};

struct GroupNeeds {
  bool base = false;  // whether the op refuses to run without a base
  bool rows = false;  // whether the op treats each row, a vector along the last dimension, separately
};

// The base, the experts and the masks of an op, which live as long as this object.
class GroupInput {
 public:
  GroupInput(OptionalTensor base, const nb::sequence& experts, GroupNeeds needs) {
    require(nb::len(experts) > 0, "experts: got none, need one or more tensors");
    require(!needs.base || base, "base: got none, need a tensor");
    inputs_.reserve(1 + nb::len(experts));
    if (base) inputs_.emplace_back(*base, "base");
    for (const nb::handle expert : experts) inputs_.emplace_back(expert, "experts");
    const int64_t numel = inputs_[0].numel();
    group_.length = numel;
    if (needs.rows) {
      const std::vector<int64_t> shape = inputs_[0].shape();
      group_.length = shape.empty() ? 1 : shape.back();
      for (size_t i = 0; i + 1 < shape.size(); ++i) group_.rows *= shape[i];
    }
    const size_t first = base ? 1 : 0;
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
  SparsityOptions sparsity(nb::handle record) {
    const int n = group_.n_experts();
    SparsityOptions options{.thresholds = numbers_of(record, "thresholds", n),
                            .upper_thresholds = numbers_of(record, "upper_thresholds", n),
                            .masks = {}};
    const nb::object masks = record.attr("masks");
    if (masks.is_none()) return options;
    for (const nb::handle mask : masks) {
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

void py_aggregate(OptionalTensor base, const nb::sequence& experts, nb::handle options, nb::handle merged,
                  nb::handle nonfinite, int threads) {
  GroupInput group(base, experts, {});
  const int n = group->n_experts();
  const AggregateOptions read{.sparsity = group.sparsity(options),
                              .weights = nb::cast<std::vector<double>>(options.attr("weights")),
                              .rescale = numbers_of(options, "rescale", n),
                              .scale = nb::cast<double>(options.attr("scale")),
                              .rule = rule_of(options),
                              .normalize = nb::cast<bool>(options.attr("normalize")),
                              .vote = vote_of(options),
                              .min_divisor = number_or(-INFINITY, options.attr("min_divisor"))};
  require(static_cast<int>(read.weights.size()) == n, "weights: need one for each expert");
  const AggregateResult result{.merged = float_array(merged, "merged", group->numel()),
                               .nonfinite = cpu_elements<int64_t>(nonfinite, "nonfinite", 1 + n)};
  const nb::gil_scoped_release unlocked;
  aggregate(*group, read, result, threads);
}

void py_delta_stats(OptionalTensor base, const nb::sequence& experts, nb::handle options, nb::handle moments,
                    nb::handle counts, nb::handle bin_counts, nb::handle bin_sums, int threads) {
  const GroupInput group(base, experts, {.base = true, .rows = nb::cast<bool>(options.attr("rows"))});
  const int64_t vectors = group->n_experts() * group->rows;
  const bool histogram = nb::cast<bool>(options.attr("histogram"));
  const int64_t bins = histogram ? vectors * kHistogramBins : 0;
  const DeltaStatsOptions read{.eps = nb::cast<double>(options.attr("eps")),
                               .eps_rel = nb::cast<double>(options.attr("eps_rel")),
                               .kappa = number_or(-1.0, options.attr("kappa"))};
  DeltaStatsResult result{.moments = cpu_elements<double>(moments, "moments", vectors * kMoments),
                          .counts = cpu_elements<int64_t>(counts, "counts", vectors * kCounts),
                          .bin_counts = cpu_elements<int64_t>(bin_counts, "bin_counts", bins),
                          .bin_sums = cpu_elements<double>(bin_sums, "bin_sums", bins)};
  if (!histogram) result.bin_counts = nullptr;
  const nb::gil_scoped_release unlocked;
  delta_stats(*group, read, result, threads);
}

void py_magnitude_threshold(OptionalTensor base, const nb::sequence& experts, nb::handle options, nb::handle thresholds,
                            nb::handle nonfinite, int threads) {
  const GroupInput group(base, experts, {.base = true});
  const int n = group->n_experts();
  const auto k = nb::cast<std::vector<int64_t>>(options.attr("k"));
  require(static_cast<int>(k.size()) == n, "k: need one for each expert");
  for (const int64_t rank : k) require(rank >= 0 && rank <= group->numel(), "k: need 0 to the number of elements");
  const ThresholdResult result{.thresholds = cpu_elements<double>(thresholds, "thresholds", n),
                               .nonfinite = cpu_elements<int64_t>(nonfinite, "nonfinite", n)};
  const nb::gil_scoped_release unlocked;
  magnitude_threshold(*group, k, result, threads);
}

// A MagnitudeSelection of tensors: the parts are groups of float32 or half-precision tensors, or, in double, of any.
class PySelection {
 public:
  PySelection(int n_experts, bool in_double, int64_t most, int threads)
      : n_experts_(n_experts), in_double_(in_double),
        selection_(MagnitudeSelection::make(n_experts, in_double, most, threads)) {}

  void add_sample(OptionalTensor base, const nb::sequence& experts) {
    with_part(base, experts, [&](const Group& part) { selection_->add_sample(part); });
  }
  void narrow(const std::vector<double>& shares) {
    require_each(shares.size());
    selection_->narrow(shares);
  }
  void count(OptionalTensor base, const nb::sequence& experts) {
    with_part(base, experts, [&](const Group& part) { selection_->count(part); });
  }
  bool select(const std::vector<int64_t>& k) {
    require_each(k.size());
    return selection_->select(k);
  }
  void count_digit(OptionalTensor base, const nb::sequence& experts) {
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
  void with_part(OptionalTensor base, const nb::sequence& experts, Use use) {
    const GroupInput part(base, experts, {});
    require(part->n_experts() == n_experts_ && part->in_double() == in_double_, "experts: need those of the selection");
    const nb::gil_scoped_release unlocked;
    use(*part);
  }

  int n_experts_;
  bool in_double_;
  std::unique_ptr<MagnitudeSelection> selection_;
};

void py_inner_products(OptionalTensor base, const nb::sequence& experts, nb::handle options, nb::handle grams,
                       int threads) {
  const GroupInput group(base, experts, {.base = false, .rows = nb::cast<bool>(options.attr("rows"))});
  const int64_t n = group->n_experts();
  double* out = cpu_elements<double>(grams, "grams", group->rows * n * n);
  const nb::gil_scoped_release unlocked;
  inner_products(*group, out, threads);
}

void py_kept_moments(OptionalTensor base, const nb::sequence& experts, nb::handle options, nb::handle moments,
                     int threads) {
  GroupInput group(base, experts, {.base = true});
  const SparsityOptions sparsity = group.sparsity(options);
  double* out = cpu_elements<double>(moments, "moments", group->n_experts() * 3);
  const nb::gil_scoped_release unlocked;
  kept_moments(*group, sparsity, out, threads);
}

// laws: the numbers `lowest` and `step` of each expert's MaskLaw.
void py_random_mask(OptionalTensor base, const nb::sequence& experts, nb::handle options,
                    const std::vector<std::pair<uint64_t, uint64_t>>& laws, const nb::sequence& masks, int threads) {
  const GroupInput group(base, experts, {.base = true, .rows = true});
  const auto n = static_cast<size_t>(group->n_experts());
  require(group->length <= INT32_MAX, "base: need rows of less than 2^31 elements");
  require(laws.size() == n && nb::len(masks) == n, "need a law and a mask for each expert");
  const auto first = nb::cast<int64_t>(options.attr("first"));
  require(first >= 0 && first % kRun == 0, "first: need whole runs");
  RandomMaskOptions read{.laws = {}, .seed = nb::cast<uint64_t>(options.attr("seed")), .first_run = first / kRun};
  for (const auto& [lowest, step] : laws) read.laws.push_back({.lowest = lowest, .step = step});
  std::vector<uint8_t*> outs;
  for (const nb::handle mask : masks) outs.push_back(cpu_elements<uint8_t>(mask, "masks", mask_bytes(group->numel())));
  const nb::gil_scoped_release unlocked;
  random_mask(*group, read, outs, threads);
}

void py_variance_mask(OptionalTensor base, const nb::sequence& experts, nb::handle options, nb::handle mask,
                      int threads) {
  const GroupInput group(base, experts, {.base = true});
  const auto density = nb::cast<double>(options.attr("density"));
  uint8_t* out = cpu_elements<uint8_t>(mask, "mask", mask_bytes(group->numel()));
  const nb::gil_scoped_release unlocked;
  variance_mask(*group, density, out, threads);
}

int64_t py_variances(OptionalTensor base, const nb::sequence& experts, nb::handle out, int threads) {
  const GroupInput group(base, experts, {.base = true});
  const Array values = float_array(out, "out", group->numel());
  require(values.dtype == (group->in_double() ? DType::f64 : DType::f32), "out: need the dtype of the arithmetic");
  const nb::gil_scoped_release unlocked;
  return variances(*group, values.data, threads);
}

void py_keep_from(nb::handle variances, double least, nb::handle mask, int threads) {
  const Input values(variances, "variances");
  const int64_t numel = values.numel();
  const Array array = values.array(numel);
  require(array.dtype == DType::f32 || array.dtype == DType::f64, "variances: need float32 or float64");
  uint8_t* out = cpu_elements<uint8_t>(mask, "mask", mask_bytes(numel));
  const nb::gil_scoped_release unlocked;
  keep_from(array, numel, least, out, threads);
}

void py_random_matrix(nb::handle options, nb::handle omega, int threads) {
  const RandomMatrixOptions read{.n = nb::cast<int64_t>(options.attr("n")),
                                 .columns = nb::cast<int64_t>(options.attr("columns")),
                                 .seed = nb::cast<uint64_t>(options.attr("seed")),
                                 .first_column = nb::cast<int64_t>(options.attr("first_column"))};
  require(read.n >= 0 && read.columns >= 0 && read.first_column >= 0, "rows and columns must not be negative");
  float* out = cpu_elements<float>(omega, "omega", read.n * read.columns);
  const nb::gil_scoped_release unlocked;
  random_matrix(read, out, threads);
}

void py_project(OptionalTensor base, nb::handle expert, nb::handle q, nb::handle b, int threads) {
  const GroupInput group(base, nb::borrow<nb::sequence>(nb::make_tuple(expert)), {.base = false, .rows = true});
  const DeltaMatrix delta = group.delta();
  const Input factor(q, "q");
  const int64_t l = factor.matrix_shape().second;
  const float* from = factor.elements<float>(delta.m * l);
  float* out = cpu_elements<float>(b, "b", l * delta.n);
  const nb::gil_scoped_release unlocked;
  project(delta, from, l, out, threads);
}

void py_gram_product(OptionalTensor base, nb::handle expert, nb::handle x, nb::handle y, nb::handle z,
                     nb::handle energy, int threads) {
  const GroupInput group(base, nb::borrow<nb::sequence>(nb::make_tuple(expert)), {.base = false, .rows = true});
  const DeltaMatrix delta = group.delta();
  const Input factor(x, "x");
  const int64_t columns = factor.matrix_shape().second;
  const float* from = factor.elements<float>(delta.n * columns);
  const GramProductResult result{.y = cpu_elements<float>(y, "y", delta.m * columns),
                                 .z = cpu_elements<float>(z, "z", delta.n * columns),
                                 .energy = cpu_elements<double>(energy, "energy", 1)};
  const nb::gil_scoped_release unlocked;
  gram_product(delta, from, columns, result, threads);
}

void py_gram_matrix(nb::handle x, OptionalTensor y, nb::handle g, int threads) {
  const Input left(x, "x"), right(y.value_or(x), "y");
  const auto [n, columns] = left.matrix_shape();
  const auto [y_rows, y_columns] = right.matrix_shape();
  require(y_rows == n, "y: need as many rows as x");
  const float *of_x = left.elements<float>(n * columns), *of_y = right.elements<float>(n * y_columns);
  double* out = cpu_elements<double>(g, "g", columns * y_columns);
  const bool has_y = y.has_value();  // of_y does not tell: it is null where y has no rows
  const nb::gil_scoped_release unlocked;
  if (has_y)
    gram_matrix(of_x, of_y, n, columns, y_columns, out, threads);
  else
    gram_matrix(of_x, n, columns, out, threads);
}

// left and right are of one dtype, float32 or float64. right may be the transpose of a contiguous matrix.
void py_low_rank_update(nb::handle base, nb::handle left, nb::handle right, nb::handle options, nb::handle merged,
                        int threads) {
  const Input start(base, "base"), left_rows(left, "left");
  const auto [m, n] = start.matrix_shape();
  const int64_t k = left_rows.matrix_shape().second;
  const nb::object flipped = right.attr("mT");
  const bool is_flipped =
      !nb::cast<bool>(right.attr("is_contiguous")()) && nb::cast<bool>(flipped.attr("is_contiguous")());
  const Input right_rows(is_flipped ? nb::handle(flipped) : right, "right");
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
  const auto scale = nb::cast<double>(options.attr("scale"));
  const nb::gil_scoped_release unlocked;
  low_rank_update(from, update, scale, out, threads);
}

template <class T>
EigenStatus solve(const Input& a, int64_t n, int64_t k, nb::handle values, nb::handle vectors, int threads) {
  const T* from = a.elements<T>(n * n);
  T *to_values = cpu_elements<T>(values, "values", k), *to_vectors = cpu_elements<T>(vectors, "vectors", n * k);
  const nb::gil_scoped_release unlocked;
  return symmetric_eigen(from, n, k, to_values, to_vectors, threads);
}

int py_symmetric_eigen(nb::handle a, nb::handle options, nb::handle values, nb::handle vectors, int threads) {
  const Input matrix(a, "a");
  const int64_t n = matrix.matrix_shape().first;
  const auto k = nb::cast<int64_t>(options.attr("k"));
  require(0 <= k && k <= n, "k: need 0 to the number of rows");
  const bool in_double = matrix.array(n * n).dtype == DType::f64;
  return static_cast<int>(in_double ? solve<double>(matrix, n, k, values, vectors, threads)
                                    : solve<float>(matrix, n, k, values, vectors, threads));
}

nb::dict build_facts() {
  nb::dict facts;
  facts["isa"] = kernels().isa;
  const char* names[3];
  const int n = available_isas(names);
  facts["isas"] = nb::cast(std::vector<std::string>(names, names + n));
  facts["compiler"] = RESM_COMPILER;
  facts["cuda"] = RESM_CUDA_BUILT_FOR;
  return facts;
}

// Python's buffer protocol for a Memory: the view keeps the object, and so its block, alive.
int get_buffer(PyObject* self, Py_buffer* view, int flags) {
  const Memory* memory = nb::inst_ptr<Memory>(self);
  return PyBuffer_FillInfo(view, self, memory->data(), static_cast<Py_ssize_t>(memory->bytes()), 0, flags);
}

}  // namespace

NB_MODULE(_native, m) {
  // Objects that live until the process ends, such as those of a module's globals, are no error of a user's program.
  nb::set_leak_warnings(false);
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
  nb::class_<PySelection>(m, "MagnitudeSelection", "magnitude_threshold of a tensor that comes in parts.")
      .def(nb::init<int, bool, int64_t, int>())
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
  PyType_Slot buffer[] = {{Py_bf_getbuffer, reinterpret_cast<void*>(&get_buffer)}, {0, nullptr}};
  nb::class_<Memory>(m, "Memory", nb::type_slots(buffer), "Bytes for a large output.").def(nb::init<size_t>());
  m.def("build_facts", &build_facts, "Instruction sets, compiler and CUDA architectures of this build.");
  m.def(
      "use_isa",
      [](const std::string& name) {
        require(use_isa(name.c_str()), "this processor or build has no instruction set '" + name + "'");
      },
      "Choose the instruction set, for tests: results must not depend on it.");
}
