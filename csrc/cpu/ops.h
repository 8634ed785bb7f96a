// The CPU ops, which python/module.cpp calls with inputs, one record of options, outputs in the caller's memory and the
// number of threads. T is the number of experts. All tensors are contiguous.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/sparsity.h"

namespace resm::cpu {

// One base and its experts, tensors of one shape. Some ops treat each row by itself; for others the tensor is one row.
struct Group {
  std::optional<Array> base;
  std::vector<Array> experts;
  int64_t rows = 1;
  int64_t length = 0;  // elements of a row

  int n_experts() const { return static_cast<int>(experts.size()); }
  int64_t numel() const { return rows * length; }
  const Array* base_or_null() const { return base ? &*base : nullptr; }
  // float64 inputs are computed in float64, all others in fp32.
  bool in_double() const {
    bool any = base && base->dtype == DType::f64;
    for (const Array& expert : experts) any = any || expert.dtype == DType::f64;
    return any;
  }
};

struct AggregateOptions {
  SparsityOptions sparsity;
  std::vector<double> weights;
  std::vector<double> rescale;  // empty: 1 for every expert
  double scale;
  Rule rule;
  bool normalize;
  Vote vote;
  double min_divisor;  // −infinity: no bound
};
struct AggregateResult {
  Array merged;
  int64_t* nonfinite;  // (1 + T,): how many values of the base and of each expert are not finite
};
void aggregate(const Group& group, const AggregateOptions& options, const AggregateResult& result, int threads);

constexpr int kMoments = 5;  // sum, sum_sq, sum_abs, max_abs, outlier_sum_abs
constexpr int kCounts = 5;   // zero, small, outlier, nonfinite, numel

struct DeltaStatsOptions {
  double eps, eps_rel;
  double kappa;  // < 0: no outliers
};
struct DeltaStatsResult {
  double* moments;      // (T, rows, kMoments)
  int64_t* counts;      // (T, rows, kCounts)
  int64_t* bin_counts;  // (T, rows, kHistogramBins); null: no histogram
  double* bin_sums;     // like bin_counts
};
void delta_stats(const Group& group, const DeltaStatsOptions& options, const DeltaStatsResult& result, int threads);

// Finds the k[t]-th largest |δ| of expert t. Without a base δ is the expert's value.
struct ThresholdResult {
  double* thresholds;  // (T,)
  int64_t* nonfinite;  // (T,)
};
void magnitude_threshold(const Group& group, const std::vector<int64_t>& k, const ThresholdResult& result, int threads);

// The same for a tensor that comes in parts, several times over: first a sample of it, then all parts, and, while a rank
// is open, all parts again. The ranks may depend on what the parts hold, so that they come last.
class MagnitudeSelection {
 public:
  // most: how many keys of each expert may be held.
  static std::unique_ptr<MagnitudeSelection> make(int n_experts, bool in_double, int64_t most, int threads);
  virtual ~MagnitudeSelection() = default;
  // Adds all |δ| of the part to the sample.
  virtual void add_sample(const Group& part) = 0;
  // Brackets the answers by the sample. shares: of each expert's |δ|, how many are at least the one that is looked for.
  virtual void narrow(const std::vector<double>& shares) = 0;
  // Counts the part's |δ| once the brackets are narrow.
  virtual void count(const Group& part) = 0;
  virtual int64_t nonfinite(int t) const = 0;
  // All parts have been counted: these are the ranks. True if the thresholds are known now; else every part has to be
  // passed to count_digit, again and again, each time until end_digit returns true.
  virtual bool select(const std::vector<int64_t>& k) = 0;
  virtual void count_digit(const Group& part) = 0;
  virtual bool end_digit() = 0;
  virtual std::vector<double> thresholds() const = 0;
};

// grams: (rows, T, T), to which the inner products of every two experts' deltas within each row are added.
void inner_products(const Group& group, double* grams, int threads);

// moments: (T, 3), to which the sums of |δ|, of the kept |δ| and of their squares are added.
void kept_moments(const Group& group, const SparsityOptions& sparsity, double* moments, int threads);

// Ranks are counted within rows.
struct RandomMaskOptions {
  std::vector<MaskLaw> laws;  // of each expert
  uint64_t seed;
  int64_t first_run;  // the run of random numbers that the group's first elements get
};
void random_mask(const Group& group, const RandomMaskOptions& options, const std::vector<uint8_t*>& masks, int threads);

// mask keeps the elements with the k largest variances over the experts, k = ⌊density·(number of variances that are not
// 0)⌋, and all elements that tie with the k-th.
void variance_mask(const Group& group, double density, uint8_t* mask, int threads);
// The variances themselves, in the compute type, and how many are not 0; and the mask of those that are at least a limit.
int64_t variances(const Group& group, void* out, int threads);
void keep_from(const Array& variances, int64_t n, double least, uint8_t* mask, int threads);

struct RandomMatrixOptions {
  int64_t n, columns;
  uint64_t seed;
  int64_t first_column;
};
// out: (n, columns).
void random_matrix(const RandomMatrixOptions& options, float* out, int threads);

// Δ = expert − base, m rows of n elements; base may be null.
struct DeltaMatrix {
  const Array* base;
  const Array* expert;
  int64_t m, n;
};

// b = qᵀ·Δ, with q (m, l) and b (l, n).
void project(const DeltaMatrix& delta, const float* q, int64_t l, float* b, int threads);

// y = Δ·x, z = Δᵀ·y and the sum of Δ's squares, with x (n, columns), y (m, columns) and z (n, columns).
struct GramProductResult {
  float *y, *z;
  double* energy;
};
void gram_product(const DeltaMatrix& delta, const float* x, int64_t columns, const GramProductResult& result,
                  int threads);

// g = xᵀ·x, with x (n, columns) and g (columns, columns).
void gram_matrix(const float* x, int64_t n, int64_t columns, double* g, int threads);
// g = xᵀ·y, with x (n, columns), y (n, y_columns) and g (columns, y_columns).
void gram_matrix(const float* x, const float* y, int64_t n, int64_t columns, int64_t y_columns, double* g, int threads);

// L·Rᵀ: L (m, k) is row-major; element (j, i) of R (n, k) lies at right + j·right_row + i·right_step. Both are float, or
// both double.
struct LowRank {
  const void *left, *right;
  int64_t m, n, k, right_row, right_step;
  bool in_double;
};
// out = base + scale·L·Rᵀ, computed in the dtype of the factors.
void low_rank_update(const Array& base, const LowRank& update, double scale, const Array& out, int threads);

// resm_kernels/ops/symmetric_eigen.py knows these numbers.
enum class EigenStatus { ok = 0, inaccurate = 1, not_finite = 2 };

// The k largest eigenvalues of a symmetric n × n matrix, whose upper triangle is read, and their eigenvectors: values
// (k,), vectors (n, k), both written only if the status is `ok`. T is float or double.
template <class T>
EigenStatus symmetric_eigen(const T* a, int64_t n, int64_t k, T* values, T* vectors, int threads);

}  // namespace resm::cpu
