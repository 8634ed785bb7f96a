// Inner loops of symmetric_eigen on the tridiagonal matrix: several eigenvalues side by side, one to a lane.
#pragma once

namespace resm::cpu::RESM_ISA::eigen {

using Vec = Vector<double>;
constexpr int kVec = kWidth<double>;

// below[i] = how many eigenvalues of the n × n tridiagonal matrix lie below x[i], of kShifts shifts. Pivots of zero
// need no care: the next one is -inf, the one after it that of the matrix without both.
void count_below(const double* diagonal, const double* squares, int64_t n, const double* x, double* below) {
  constexpr int kVecs = kShifts / kVec;
  Vec shift[kVecs], pivot[kVecs], count[kVecs] = {};
#pragma GCC unroll 16
  for (int i = 0; i < kVecs; ++i) {
    shift[i] = load(x + i * kVec);
    pivot[i] = all(1.0);
  }
  double square = 0;
  for (int64_t j = 0; j < n; ++j) {
    const Vec d = all(diagonal[j]), s = all(square);
#pragma GCC unroll 16
    for (int i = 0; i < kVecs; ++i) {
      pivot[i] = (d - shift[i]) - s / pivot[i];
      count[i] = pivot[i] < Vec{} ? count[i] + all(1.0) : count[i];
    }
    square = squares[j];  // one more than there are
  }
#pragma GCC unroll 16
  for (int i = 0; i < kVecs; ++i) store(below + i * kVec, count[i]);
}

// Eigenvectors of the n × n tridiagonal matrix for kStrip eigenvalues, by twisted factorisations (Parlett and Dhillon,
// Linear Algebra Appl. 267, 1997): T - λ = N G Nᵀ with the twist r where |γ_r| is least solves (T - λ) z = γ_r e_r,
// z_r = 1. Both halves are factorisations of a matrix with slightly different elements, so that z is as good as T and
// λ are.
void twisted_vectors(const double* diagonal, const double* off_diagonal, int64_t n, const double* lambda, double* z,
                     double* scratch) {
  constexpr double kTiny = 1e-150;  // replaces smaller pivots; a product of two is still in range
  constexpr int kVecs = 3;
  double *down = scratch, *up = scratch + n * kStrip;
  for (int at = 0; at < kStrip; at += kVecs * kVec) {
    Vec shift[kVecs], pivot[kVecs], least[kVecs], twist[kVecs], norm[kVecs] = {};
    const auto address = [&](double* p, int64_t i, int c) { return p + i * kStrip + at + c * kVec; };
    const auto guarded = [](Vec p) { return ((p < all(kTiny)) & (p > all(-kTiny))) ? all(-kTiny) : p; };
    // Pivots from the top go to z, multipliers to `down`.
#pragma GCC unroll 4
    for (int c = 0; c < kVecs; ++c) {
      shift[c] = load(lambda + at + c * kVec);
      pivot[c] = guarded(all(diagonal[0]) - shift[c]);
      store(address(z, 0, c), pivot[c]);
    }
    for (int64_t i = 0; i + 1 < n; ++i) {
      const Vec e = all(off_diagonal[i]), d = all(diagonal[i + 1]);
#pragma GCC unroll 4
      for (int c = 0; c < kVecs; ++c) {
        const Vec factor = e / pivot[c];
        store(address(down, i, c), factor);
        pivot[c] = guarded((d - shift[c]) - e * factor);
        store(address(z, i + 1, c), pivot[c]);
      }
    }
    // From the bottom, and γ_i = (pivot from the top) - e_i²/(pivot from the bottom, i + 1).
#pragma GCC unroll 4
    for (int c = 0; c < kVecs; ++c) {
      least[c] = pivot[c] < Vec{} ? -pivot[c] : pivot[c];
      twist[c] = all(static_cast<double>(n - 1));
      pivot[c] = guarded(all(diagonal[n - 1]) - shift[c]);
    }
    for (int64_t i = n - 2; i >= 0; --i) {
      const Vec e = all(off_diagonal[i]), d = all(diagonal[i]), index = all(static_cast<double>(i));
#pragma GCC unroll 4
      for (int c = 0; c < kVecs; ++c) {
        const Vec factor = e / pivot[c], lost = e * factor;
        store(address(up, i + 1, c), factor);
        pivot[c] = guarded((d - shift[c]) - lost);
        const Vec gamma = load(address(z, i, c)) - lost, size = gamma < Vec{} ? -gamma : gamma;
        twist[c] = size < least[c] ? index : twist[c];
        least[c] = size < least[c] ? size : least[c];
      }
    }
    // z upwards from its twist (zero below it), then downwards.
    Vec last[kVecs] = {};
    for (int64_t i = n - 1; i >= 0; --i) {
      const Vec index = all(static_cast<double>(i));
#pragma GCC unroll 4
      for (int c = 0; c < kVecs; ++c) {
        const Vec next = i == n - 1 ? Vec{} : load(address(down, i, c));
        last[c] = twist[c] == index ? all(1.0) : -(next * last[c]);
        store(address(z, i, c), last[c]);
        norm[c] = fma(last[c], last[c], norm[c]);
      }
    }
#pragma GCC unroll 4
    for (int c = 0; c < kVecs; ++c) last[c] = twist[c] == Vec{} ? all(1.0) : Vec{};
    for (int64_t i = 1; i < n; ++i) {
      const Vec index = all(static_cast<double>(i));
#pragma GCC unroll 4
      for (int c = 0; c < kVecs; ++c) {
        const Vec below = -(load(address(up, i, c)) * last[c]);
        norm[c] = fma(below, below, norm[c]);
        store(address(z, i, c), load(address(z, i, c)) + below);
        last[c] = twist[c] == index ? all(1.0) : below;
      }
    }
#pragma GCC unroll 4
    for (int c = 0; c < kVecs; ++c) {
      double scales[kVec];
      store(scales, norm[c]);
      for (int i = 0; i < kVec; ++i) scales[i] = 1 / __builtin_sqrt(scales[i]);
      last[c] = load(scales);
    }
    for (int64_t i = 0; i < n; ++i)
#pragma GCC unroll 4
      for (int c = 0; c < kVecs; ++c) store(address(z, i, c), load(address(z, i, c)) * last[c]);
  }
}

// norms = ‖Tz - λz‖ of each column of a strip.
void residuals(const double* diagonal, const double* off_diagonal, int64_t n, const double* lambda, const double* z,
               double* norms) {
  for (int at = 0; at < kStrip; at += kVec) {
    const Vec shift = load(lambda + at);
    Vec before{}, current = load(z + at), squares{};
    for (int64_t i = 0; i < n; ++i) {
      const Vec next = i + 1 < n ? load(z + (i + 1) * kStrip + at) : Vec{};
      const double above = i > 0 ? off_diagonal[i - 1] : 0, beneath = i + 1 < n ? off_diagonal[i] : 0;
      const Vec off = above * before + (diagonal[i] - shift) * current + beneath * next;
      squares = fma(off, off, squares);
      before = current;
      current = next;
    }
    double sums[kVec];
    store(sums, squares);
    for (int i = 0; i < kVec; ++i) norms[at + i] = __builtin_sqrt(sums[i]);
  }
}

// product = aᵀb of two strips of n rows, a multiple of 8.
void gram(const double* a, const double* b, int64_t n, double* product) {
  for (int p = 0; p < kStrip; p += 8)
    multiply_into<double, Store::set, 3>(n, {a + p, 1, kStrip}, {b, kStrip, 8}, {product + p * kStrip, kStrip, 8});
}

// b -= a · factor, of two strips.
void subtract(const double* a, const double* factor, int64_t n, double* b) {
  for (int64_t i = 0; i < n; i += 8)
    multiply_into<double, Store::subtract, 3>(kStrip, {a + i * kStrip, kStrip, 1}, {factor, kStrip, 8},
                                              {b + i * kStrip, kStrip, 8});
}

// a = a · factor.
void multiply_strip(const double* factor, int64_t n, double* a) {
  double rows[8 * kStrip];
  for (int64_t i = 0; i < n; i += 8) {
    memcpy(rows, a + i * kStrip, sizeof rows);
    multiply_into<double, Store::set, 3>(kStrip, {rows, kStrip, 1}, {factor, kStrip, 8}, {a + i * kStrip, kStrip, 8});
  }
}

template <class T>
constexpr ReductionKernels<T> reduction_kernels() {
  return {pack<T>, tridiagonalize<T>, back_transform<T>};
}

constexpr EigenKernels eigen_kernels() {
  return {reduction_kernels<float>(),
          reduction_kernels<double>(),
          count_below,
          twisted_vectors,
          residuals,
          gram,
          subtract,
          multiply_strip};
}

}  // namespace resm::cpu::RESM_ISA::eigen
