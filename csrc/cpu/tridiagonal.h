// Eigenvalues of a symmetric tridiagonal matrix, and inverse iteration.
#pragma once

#include <cfloat>
#include <cstdint>
#include <vector>

#include "cpu/symmetric_eigen.h"

namespace resm::cpu {

constexpr double kEps = DBL_EPSILON;

struct Block {  // of T, cut where off-diagonal elements are negligible
  int64_t begin, size;
};

struct Pair {
  double value;
  int64_t block;
  int64_t rank;  // its position among all pairs, the largest first
};

class Spectrum {
 public:
  // Finds the k largest eigenvalues; diagonal (n) must not hold -0, off_diagonal has n - 1 elements.
  Spectrum(const EigenKernels& kernels, int64_t n, const double* diagonal, const double* off_diagonal, int64_t k);

  double norm() const { return norm_; }  // at least ‖T‖, and at most 3 times it
  // In blocks one after the other, in each the largest first.
  const std::vector<Pair>& pairs() const { return pairs_; }
  const Block& block_of(int64_t pair) const { return blocks_[pairs_[pair].block]; }
  // One step of inverse iteration on x, a vector of the pair's block. The shift lies so far above the pair's eigenvalue
  // that eigenvalues as close as rounding are about as far from it: a random x becomes a random vector of their space.
  void iterate(int64_t pair, double* x) const;

 private:
  void count_below(const Block& block, const double* x, double* below) const;
  double threshold(int64_t k) const;
  void bisect(int64_t b, double from);
  double shift_above(int64_t pair) const;

  const EigenKernels& kernels_;
  int64_t n_;
  const double *d_, *e_;
  std::vector<double> squares_;
  double low_, high_, norm_;
  std::vector<Block> blocks_;
  std::vector<Pair> pairs_;
};

}  // namespace resm::cpu
