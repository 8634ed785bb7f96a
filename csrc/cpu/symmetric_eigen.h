// The inner loops of symmetric_eigen and the layouts that they share with their callers. Matrices are scaled to about 1. A
// float matrix is reduced, and its vectors are transformed back, in float; the steps between are double.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace resm::cpu {

constexpr int kReflectors = 32;  // Householder reflectors applied at once
constexpr int kStrip = 24;       // eigenvectors of T that lie side by side
constexpr int kShifts = 32;      // Sturm counts taken at once
template <class T>
constexpr int kTile = 64 / sizeof(T);  // a cache line of numbers
template <class T>
constexpr int kColumns = 3 * kTile<T>;  // eigenvectors transformed back side by side

// A = Q T Qᵀ: T, and Q as blocks of kReflectors reflectors I - V F Vᵀ.
template <class T>
struct Tridiagonal {
  double* diagonal;      // n
  double* off_diagonal;  // n, the last one unused
  T* reflectors;         // reflectors_size(n): of each block V, from the block's first row on
  T* factors;            // factors_size(n): of each block F
};

template <class T>
RESM_HD int64_t tiles_in(int64_t n) {
  return (n + kTile<T> - 1) / kTile<T>;
}
template <class T>
RESM_HD int64_t padded(int64_t n) {
  return tiles_in<T>(n) * kTile<T>;
}
template <class T>
RESM_HD int64_t tile_offset(int64_t panel, int64_t panels) {
  return kTile<T> * kTile<T> * (panel * panels - panel * (panel - 1) / 2);
}
RESM_HD int64_t reflector_blocks(int64_t n) { return n > 2 ? (n - 2 + kReflectors - 1) / kReflectors : 0; }
RESM_HD int64_t factors_size(int64_t n) { return reflector_blocks(n) * kReflectors * kReflectors; }
template <class T>
RESM_HD int64_t reflectors_size(int64_t n) {
  const int64_t blocks = reflector_blocks(n);
  return kReflectors * (blocks * padded<T>(n) - kReflectors * (blocks * (blocks - 1) / 2));
}
// One panel's reflectors V and their partners W, by groups of kTile rows: V[kTile·g + r, q] lies at
// g·kGroup + kTile·q + r and W's kTile·kReflectors later. One spare line a group keeps the groups out of each other's
// cache sets.
template <class T>
constexpr int64_t kGroup = kTile<T> * (2 * kReflectors + 1);
template <class T>
RESM_HD int64_t tridiagonalize_scratch(int64_t n) {
  return tiles_in<T>(n) * (kGroup<T> + 2 * kTile<T>);
}

template <class T>
struct ReductionKernels {
  // The tiles of a row-major matrix's upper triangle; returns max |a|, or NaN if there are values that are not finite.
  T (*pack)(const T* a, int64_t n, T* tiles);
  void (*tridiagonalize)(T* tiles, int64_t n, const Tridiagonal<T>& into, T* scratch);
  // columns = Q · columns, (n padded, kColumns).
  void (*back_transform)(const Tridiagonal<T>& from, int64_t n, T* columns);
};

struct EigenKernels {
  ReductionKernels<float> f32;
  ReductionKernels<double> f64;
  // below[i] = how many eigenvalues of T lie below x[i], of kShifts shifts; squares: of the off-diagonal elements.
  void (*count_below)(const double* diagonal, const double* squares, int64_t n, const double* x, double* below);
  // Eigenvectors z, (n, kStrip) of norm 1, of T for kStrip eigenvalues; scratch: 2·n·kStrip.
  void (*twisted_vectors)(const double* diagonal, const double* off_diagonal, int64_t n, const double* lambda,
                          double* z, double* scratch);
  // norms = ‖Tz - λz‖ of each column of a strip.
  void (*residuals)(const double* diagonal, const double* off_diagonal, int64_t n, const double* lambda,
                    const double* z, double* norms);
  // Of strips of n rows, a multiple of 8: product = aᵀb; b -= a · factor; a = a · factor.
  void (*gram)(const double* a, const double* b, int64_t n, double* product);
  void (*subtract)(const double* a, const double* factor, int64_t n, double* b);
  void (*multiply)(const double* factor, int64_t n, double* a);

  template <class T>
  const ReductionKernels<T>& of() const;
};
template <>
inline const ReductionKernels<float>& EigenKernels::of<float>() const {
  return f32;
}
template <>
inline const ReductionKernels<double>& EigenKernels::of<double>() const {
  return f64;
}

}  // namespace resm::cpu
