// The CPU ops as python/module.cpp calls them. Tensors come as L groups of one base and T experts.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/sparsity.h"

namespace resm::cpu {

struct Groups {
  std::vector<Array> bases;    // L, or empty where there is no base
  std::vector<Array> experts;  // L*T, those of group 0 first
  std::vector<int64_t> lengths;
  int n_experts = 0;

  int64_t size() const { return static_cast<int64_t>(lengths.size()); }
  const Array* base(int64_t group) const { return bases.empty() ? nullptr : &bases[group]; }
  const Array* experts_of(int64_t group) const { return experts.data() + group * n_experts; }
  // float64 inputs are computed in float64, all others in fp32.
  bool is_double(int64_t group) const {
    bool any = !bases.empty() && bases[group].dtype == DType::f64;
    for (int t = 0; t < n_experts; ++t) any = any || experts_of(group)[t].dtype == DType::f64;
    return any;
  }
};

constexpr int kMoments = 5;  // sum, sum_sq, sum_abs, max_abs, outlier_sum_abs
constexpr int kCounts = 5;   // zero, small, outlier, nonfinite, numel

struct StatsOptions {
  double eps, eps_rel, kappa;  // kappa < 0: no outliers
};

// moments and counts: (L, T, 5); bin_counts and bin_sums: (L, T, kHistogramBins), or null for no histogram.
void delta_stats(const Groups& groups, const StatsOptions& options, double* moments, int64_t* counts,
                 int64_t* bin_counts, double* bin_sums, int threads);

// k, thresholds, nonfinite: (L, T).
void magnitude_threshold(const Groups& groups, const int64_t* k, double* thresholds, int64_t* nonfinite, int threads);

struct AggregateOptions {
  const double* weights;  // (L, T)
  const double* rescale;  // (L, T), or null
  double scale;
  Rule rule;
  bool normalize;
  Vote vote;
  double min_divisor;
  SparsityOptions sparsity;
};

// outs: L arrays of the groups' lengths; nonfinite: (L, 1 + T).
void aggregate(const Groups& groups, const AggregateOptions& options, const std::vector<Array>& outs,
               int64_t* nonfinite, int threads);

// grams: (L, T, T), the sums over a group's elements of the products of each two experts, base subtracted where there
// is one.
void inner_products(const Groups& groups, double* grams, int threads);

// moments: (T, 3) sums of |δ|, of the kept |δ| and of their squares, of one group.
void kept_moments(const Groups& groups, const SparsityOptions& sparsity, double* moments, int threads);

// Masks of one group, `row` elements of which are ranked together; one law, seed's key and mask an expert.
struct RandomMaskOptions {
  int64_t row;
  uint64_t seed;
  std::vector<MaskLaw> laws;
  std::vector<uint8_t*> masks;
};
void random_mask(const Groups& groups, const RandomMaskOptions& options, int threads);

// mask: of the ⌊density·(how many are not 0)⌋ largest variances over the experts of one group, and what ties with them.
void variance_mask(const Groups& groups, double density, uint8_t* mask, int threads);

// Δ = expert − base, m rows of n elements; base may be null.
struct DeltaMatrix {
  const Array* base;
  const Array* expert;
  int64_t m, n;
};

// out = columns first_column … of the first n rows of the random matrix of the seed, (n, columns).
void random_matrix(int64_t n, int64_t columns, uint64_t seed, int64_t first_column, float* out, int threads);

// y = Δ·Ω, (m, columns), with columns first_column … of the random matrix of the seed.
void sketch(const DeltaMatrix& delta, int64_t columns, uint64_t seed, int64_t first_column, float* y, int threads);

// b = qᵀ·Δ, (l, n), of q (m, l).
void project(const DeltaMatrix& delta, const float* q, int64_t l, float* b, int threads);

// y = Δ·x, (m, columns), z = Δᵀ·y, (n, columns), and the sum of Δ's squares, of x (n, columns).
void gram_product(const DeltaMatrix& delta, const float* x, int64_t columns, float* y, float* z, double* energy,
                  int threads);

// g = xᵀ·x, (columns, columns), of x (n, columns).
void gram_matrix(const float* x, int64_t n, int64_t columns, double* g, int threads);

// L·Rᵀ: L (m, k) by rows, element (j, i) of R (n, k) at right + j·right_row + i·right_step; all float, or all double.
struct LowRank {
  const void *left, *right;
  int64_t m, n, k, right_row, right_step;
};

// out = base + scale·L·Rᵀ, computed in float, or in double if the factors are.
void low_rank_update(const LowRank& update, bool in_double, const Array& base, double scale, const Array& out,
                     int threads);

enum class EigenStatus { found, inaccurate, not_finite };

// The k largest eigenvalues of a symmetric n × n matrix, of which the upper triangle is read, and their eigenvectors:
// values (k), vectors (n, k). Without status `found` there are none. Of float and double.
template <class T>
EigenStatus symmetric_eigen(const T* a, int64_t n, int64_t k, T* values, T* vectors, int threads);

}  // namespace resm::cpu
