// The CUDA ops for Python: keyword arguments only, tensors and records read by name. resm_kernels/cuda calls them.
#include <nanobind/nanobind.h>

#include <cmath>
#include <string>

#include "common/histogram.h"
#include "cuda/ops.h"
#include "tensors.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace resm;
using namespace resm::python;

namespace {

cuda::Stream stream_of(uintptr_t stream) { return reinterpret_cast<cuda::Stream>(stream); }

// A contiguous tensor of floating-point numbers.
cuda::Array float_array(nb::handle tensor, const char* name, int64_t numel) {
  return {.data = data_of(tensor, name, numel), .dtype = float_dtype(tensor.attr("dtype"), name)};
}

// A `resm_kernels._launch.Group`, whose addresses lie on the device already. A block works on `chunk` elements.
cuda::Group read_group(nb::handle group, int64_t chunk) {
  const nb::list experts = group.attr("experts"), masks = group.attr("masks");
  const nb::object base = group.attr("base");
  cuda::Group read{};
  read.n_experts = static_cast<int32_t>(experts.size());
  read.rows = nb::cast<int64_t>(group.attr("rows"));
  read.length = nb::cast<int64_t>(group.attr("length"));
  read.chunk = chunk;
  read.aligned = nb::cast<bool>(group.attr("aligned"));
  read.in_double = float_dtype(group.attr("compute"), "compute") == DType::f64;
  if (experts.size() == 0) throw nb::value_error("experts: got none, need one or more tensors");
  read.expert_dtype = float_dtype(experts[0].attr("dtype"), "experts");
  for (const nb::handle expert : experts) {
    if (float_dtype(expert.attr("dtype"), "experts") != read.expert_dtype)
      throw nb::type_error("experts: got several dtypes, need one");
    data_of(expert, "experts", read.rows * read.length);
  }
  read.base = {.data = nullptr, .dtype = read.expert_dtype};
  if (!base.is_none()) read.base = float_array(base, "base", read.rows * read.length);
  if (masks.size() > 0 && masks.size() != experts.size()) throw nb::value_error("masks: need one for each expert");
  const auto n_addresses = static_cast<int64_t>(experts.size() + masks.size());
  read.experts = elements_of<int64_t>(group.attr("addresses"), "addresses", n_addresses);
  for (const nb::handle mask : masks) elements_of<uint8_t>(mask, "masks", mask_bytes(read.rows * read.length));
  read.masks = masks.size() == 0 ? nullptr : read.experts + read.n_experts;
  return read;
}

cuda::Thresholds read_thresholds(OptionalTensor lower, OptionalTensor upper, int64_t n_experts) {
  if (!lower || !upper) return {.lower = nullptr, .upper = nullptr};
  return {.lower = elements_of<double>(*lower, "lower", n_experts),
          .upper = elements_of<double>(*upper, "upper", n_experts)};
}

void aggregate_cuda(nb::handle group, nb::handle options, int64_t chunk, nb::handle factors, nb::handle divisors,
                    OptionalTensor lower, OptionalTensor upper, nb::handle merged, nb::handle nonfinite,
                    uintptr_t stream) {
  const cuda::Group inputs = read_group(group, chunk);
  const int64_t n = inputs.n_experts;
  const cuda::AggregateOptions read{.factors = elements_of<double>(factors, "factors", n),
                                    .divisors = elements_of<double>(divisors, "divisors", n),
                                    .thresholds = read_thresholds(lower, upper, n),
                                    .scale = nb::cast<double>(options.attr("scale")),
                                    .min_divisor = number_or(-INFINITY, options.attr("min_divisor")),
                                    .rule = rule_of(options),
                                    .vote = vote_of(options),
                                    .normalize = nb::cast<bool>(options.attr("normalize"))};
  const cuda::AggregateResult result{.merged = float_array(merged, "merged", inputs.rows * inputs.length),
                                     .nonfinite = elements_of<int64_t>(nonfinite, "nonfinite", 1 + n)};
  const nb::gil_scoped_release unlocked;
  cuda::aggregate(inputs, read, result, stream_of(stream));
}

void delta_stats_cuda(nb::handle group, nb::handle options, int64_t chunk, nb::handle moments, nb::handle counts,
                      nb::handle bin_counts, nb::handle bin_sums, nb::handle chunk_sums, nb::handle significands,
                      uintptr_t stream) {
  constexpr int64_t kMoments = 5, kFields = 8;
  const cuda::Group inputs = read_group(group, chunk);
  const bool histogram = nb::cast<bool>(options.attr("histogram"));
  const int64_t vectors = inputs.n_experts * inputs.rows, bins = histogram ? vectors * kHistogramBins : 0;
  if (chunk <= 0 || chunk >= 65536) throw nb::value_error("chunk: need fewer than 65536 elements");
  const cuda::DeltaStatsOptions read{.eps = nb::cast<double>(options.attr("eps")),
                                     .eps_rel = nb::cast<double>(options.attr("eps_rel")),
                                     .kappa = number_or(-1.0, options.attr("kappa"))};
  int64_t* const bin_counters = elements_of<int64_t>(bin_counts, "bin_counts", bins);
  const cuda::DeltaStatsResult result{.moments = elements_of<double>(moments, "moments", vectors * kMoments),
                                      .counts = elements_of<int64_t>(counts, "counts", vectors * kMoments),
                                      .bin_counts = histogram ? bin_counters : nullptr,
                                      .bin_sums = elements_of<double>(bin_sums, "bin_sums", bins)};
  const cuda::DeltaStatsWorkspace workspace{
      .chunk_sums = elements_of<double>(chunk_sums, "chunk_sums", inputs.blocks() * inputs.n_experts * kFields),
      .significands = elements_of<int64_t>(significands, "significands", bins)};
  const nb::gil_scoped_release unlocked;
  cuda::delta_stats(inputs, read, result, workspace, stream_of(stream));
}

void kept_moments_cuda(nb::handle group, int64_t chunk, OptionalTensor lower, OptionalTensor upper, nb::handle moments,
                       nb::handle chunk_sums, uintptr_t stream) {
  constexpr int64_t kSums = 3;
  const cuda::Group inputs = read_group(group, chunk);
  const int64_t n = inputs.n_experts;
  const cuda::Thresholds thresholds = read_thresholds(lower, upper, n);
  double* const results = elements_of<double>(moments, "moments", n * kSums);
  double* const sums = elements_of<double>(chunk_sums, "chunk_sums", inputs.blocks() * n * kSums);
  const nb::gil_scoped_release unlocked;
  cuda::kept_moments(inputs, thresholds, results, sums, stream_of(stream));
}

void magnitude_threshold_cuda(nb::handle group, int64_t chunk, nb::handle k, nb::handle thresholds,
                              nb::handle nonfinite, nb::handle selections, nb::handle frequencies, nb::handle buffer,
                              uintptr_t stream) {
  constexpr int64_t kSelectionWords = 10, kDigits = 2048, kBufferShare = 16;
  const cuda::Group inputs = read_group(group, chunk);
  const int64_t n = inputs.n_experts;
  if (float_dtype(buffer.attr("dtype"), "buffer") != (inputs.in_double ? DType::f64 : DType::f32))
    throw nb::type_error("buffer: need the dtype of the arithmetic");
  const int64_t* const ranks = elements_of<int64_t>(k, "k", n);
  const cuda::ThresholdResult result{.thresholds = elements_of<double>(thresholds, "thresholds", n),
                                     .nonfinite = elements_of<int64_t>(nonfinite, "nonfinite", n)};
  const cuda::ThresholdWorkspace workspace{
      .selections = elements_of<int64_t>(selections, "selections", n * kSelectionWords),
      .frequencies = elements_of<int64_t>(frequencies, "frequencies", n * kDigits),
      .buffer = data_of(buffer, "buffer", n * (inputs.length / kBufferShare))};
  const nb::gil_scoped_release unlocked;
  cuda::magnitude_threshold(inputs, ranks, result, workspace, stream_of(stream));
}

void random_mask_cuda(int64_t length, uint64_t seed, uint32_t expert, uint64_t lowest, uint64_t step,
                      OptionalTensor ranks, nb::handle mask, uintptr_t stream) {
  const cuda::RandomMaskOptions options{
      .length = length, .seed = seed, .expert = expert, .law = {.lowest = lowest, .step = step}};
  uint8_t* const bits = elements_of<uint8_t>(mask, "mask", mask_bytes(length));
  cuda::Ranks doubled{.doubled = nullptr, .bytes = 0};
  if (ranks)
    doubled = {.doubled = data_of(*ranks, "ranks", length), .bytes = nb::cast<int64_t>(ranks->attr("element_size")())};
  const nb::gil_scoped_release unlocked;
  cuda::random_mask(options, doubled, bits, stream_of(stream));
}

void variances_cuda(nb::handle group, int64_t chunk, nb::handle variances, nb::handle nonzero, uintptr_t stream) {
  const cuda::Group inputs = read_group(group, chunk);
  if (float_dtype(variances.attr("dtype"), "variances") != (inputs.in_double ? DType::f64 : DType::f32))
    throw nb::type_error("variances: need the dtype of the arithmetic");
  char* const values = data_of(variances, "variances", inputs.length);
  int64_t* const counter = elements_of<int64_t>(nonzero, "nonzero", 1);
  const nb::gil_scoped_release unlocked;
  cuda::variances(inputs, values, counter, stream_of(stream));
}

void variance_mask_cuda(nb::handle variances, nb::handle threshold, nb::handle mask, uintptr_t stream) {
  const auto length = nb::cast<int64_t>(variances.attr("numel")());
  const cuda::Array values = float_array(variances, "variances", length);
  if (values.dtype != DType::f32 && values.dtype != DType::f64)
    throw nb::type_error("variances: need float32 or float64");
  const double* const least = elements_of<double>(threshold, "threshold", 1);
  uint8_t* const bits = elements_of<uint8_t>(mask, "mask", mask_bytes(length));
  const nb::gil_scoped_release unlocked;
  cuda::variance_mask(values, length, least, bits, stream_of(stream));
}

}  // namespace

void define_cuda_ops(nb::module_& m) {
  m.def("aggregate_cuda", &aggregate_cuda, nb::kw_only(), "group"_a, "options"_a, "chunk"_a, "factors"_a, "divisors"_a,
        "lower"_a, "upper"_a, "merged"_a, "nonfinite"_a, "stream"_a);
  m.def("delta_stats_cuda", &delta_stats_cuda, nb::kw_only(), "group"_a, "options"_a, "chunk"_a, "moments"_a,
        "counts"_a, "bin_counts"_a, "bin_sums"_a, "chunk_sums"_a, "significands"_a, "stream"_a);
  m.def("kept_moments_cuda", &kept_moments_cuda, nb::kw_only(), "group"_a, "chunk"_a, "lower"_a, "upper"_a, "moments"_a,
        "chunk_sums"_a, "stream"_a);
  m.def("magnitude_threshold_cuda", &magnitude_threshold_cuda, nb::kw_only(), "group"_a, "chunk"_a, "k"_a,
        "thresholds"_a, "nonfinite"_a, "selections"_a, "frequencies"_a, "buffer"_a, "stream"_a);
  m.def("random_mask_cuda", &random_mask_cuda, nb::kw_only(), "length"_a, "seed"_a, "expert"_a, "lowest"_a, "step"_a,
        "ranks"_a, "mask"_a, "stream"_a);
  m.def("variances_cuda", &variances_cuda, nb::kw_only(), "group"_a, "chunk"_a, "variances"_a, "nonzero"_a, "stream"_a);
  m.def("variance_mask_cuda", &variance_mask_cuda, nb::kw_only(), "variances"_a, "threshold"_a, "mask"_a, "stream"_a);
}
