// The inner loops of symmetric_eigen, and what they share with those who call them. All numbers are double; matrices
// come scaled to about 1.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace resm::cpu {

constexpr int kReflectors = 32;  // Householder reflectors applied at once
constexpr int kStrip = 24;       // eigenvectors kept side by side
constexpr int kShifts = 32;      // Sturm counts taken at once

// A = Q T Qᵀ: T, and Q as blocks of kReflectors reflectors I - V F Vᵀ.
struct Tridiagonal {
  double* diagonal;      // n
  double* off_diagonal;  // n, the last one unused
  double* reflectors;    // reflectors_size(n): of each block V, from the block's first row on
  double* factors;       // factors_size(n): of each block F
};

RESM_HD int64_t tile_offset(int64_t panel, int64_t panels) { return 64 * (panel * panels - panel * (panel - 1) / 2); }
RESM_HD int64_t padded8(int64_t n) { return (n + 7) / 8 * 8; }
RESM_HD int64_t reflector_blocks(int64_t n) { return n > 2 ? (n - 2 + kReflectors - 1) / kReflectors : 0; }
RESM_HD int64_t factors_size(int64_t n) { return reflector_blocks(n) * kReflectors * kReflectors; }
RESM_HD int64_t reflectors_size(int64_t n) {
  const int64_t blocks = reflector_blocks(n);
  return kReflectors * (blocks * padded8(n) - kReflectors * (blocks * (blocks - 1) / 2));
}
// One panel's reflectors V and their partners W, by groups of 8 rows: V[8g + r, q] lies at g·kGroup + 8q + r and W's
// 8·kReflectors later. One spare line a group keeps the groups out of each other's cache sets.
constexpr int64_t kGroup = 16 * kReflectors + 8;
RESM_HD int64_t tridiagonalize_scratch(int64_t n) { return padded8(n) / 8 * (kGroup + 16); }

struct EigenKernels {
  // The tiles of a row-major matrix's upper triangle; returns max |a|, or NaN if there are values that are not finite.
  double (*pack)(const double* a, int64_t n, double* tiles);
  void (*tridiagonalize)(double* tiles, int64_t n, const Tridiagonal& into, double* scratch);
  // strip = Q · strip.
  void (*back_transform)(const Tridiagonal& from, int64_t n, double* strip);
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
};

}  // namespace resm::cpu
