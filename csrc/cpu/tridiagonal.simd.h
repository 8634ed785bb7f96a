// Inner loops of symmetric_eigen up to the tridiagonal matrix, and back from its eigenvectors.
//
// A is kept as the tiles of its upper triangle: panel g holds rows 8g … 8g+7 as tiles (g, g), (g, g+1), … of 8 × 8
// numbers, row after row, so that a product with the trailing matrix reads memory from end to end. Diagonal tiles are
// whole. Vectors of 24 eigenvectors lie side by side in strips, (n, 24).
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace resm::cpu::RESM_ISA::eigen {

#if defined(__AVX512F__)
using Vec = __m512d;
RESM_HD Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_pd(a, b, c); }
RESM_HD Vec fnma(Vec a, Vec b, Vec c) { return _mm512_fnmadd_pd(a, b, c); }
#elif defined(__AVX2__)
using Vec = __m256d;
RESM_HD Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_pd(a, b, c); }
RESM_HD Vec fnma(Vec a, Vec b, Vec c) { return _mm256_fnmadd_pd(a, b, c); }
#else
typedef double Vec __attribute__((vector_size(16)));
RESM_HD Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
RESM_HD Vec fnma(Vec a, Vec b, Vec c) { return c - a * b; }
#endif

constexpr int kVec = sizeof(Vec) / sizeof(double);
constexpr int kPer8 = 8 / kVec;  // vectors in 8 numbers

RESM_HD Vec load(const double* p) {
  Vec v;
  memcpy(&v, p, sizeof v);
  return v;
}
RESM_HD void store(double* p, Vec v) { memcpy(p, &v, sizeof v); }
RESM_HD Vec all(double x) { return x - Vec{}; }
RESM_HD double sum(Vec v) {
  double s[kVec];
  memcpy(s, &v, sizeof s);
  for (int step = kVec / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) s[i] += s[i + step];
  return s[0];
}

struct Left {  // element (r, k) lies at p[r * row + k * step]
  const double* p;
  int64_t row, step;
};
struct Right {  // row k lies at p + k * step, in groups of 8 columns
  const double* p;
  int64_t step, group;
};
struct Result {
  double* p;
  int64_t row, group;
};

// Registers hold this many rows of a product at once.
constexpr int kRows = kVec == 8 ? 8 : 4;

// acc[r][c] ±= Σ_k left(r, k) · right(k, c), for vectors C0 … C0+N-1 of the columns.
template <bool subtract, int N, int C0>
RESM_HD void accumulate(int64_t depth, Left left, Right right, Vec (&acc)[kRows][N]) {
  for (int64_t k = 0; k < depth; ++k) {
    Vec b[N];
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c) b[c] = load(right.p + (C0 + c) / kPer8 * right.group + (C0 + c) % kPer8 * kVec);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec a = all(left.p[r * left.row]);
#pragma GCC unroll 8
      for (int c = 0; c < N; ++c) acc[r][c] = subtract ? fnma(a, b[c], acc[r][c]) : fma(a, b[c], acc[r][c]);
    }
    left.p += left.step;
    right.p += right.step;
  }
}

enum class Store { set, subtract };

// into = left · right, or -= it, of 8 rows and `groups` times 8 columns; with left2 · right2, if given.
template <Store how, int groups, int C0 = 0>
RESM_HD void product8(int64_t depth, Left left, Right right, Result into, Left left2 = {}, Right right2 = {}) {
  constexpr int all_columns = groups * kPer8, n = all_columns - C0 < 3 ? all_columns - C0 : 3;
  for (int r0 = 0; r0 < 8; r0 += kRows) {
    Vec acc[kRows][n];
    const auto place = [&](int r, int c) {
      return into.p + (r0 + r) * into.row + (C0 + c) / kPer8 * into.group + (C0 + c) % kPer8 * kVec;
    };
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < n; ++c) acc[r][c] = how == Store::set ? Vec{} : load(place(r, c));
    accumulate<how == Store::subtract, n, C0>(depth, {left.p + r0 * left.row, left.row, left.step}, right, acc);
    if (left2.p != nullptr)
      accumulate<how == Store::subtract, n, C0>(depth, {left2.p + r0 * left2.row, left2.row, left2.step}, right2, acc);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < n; ++c) store(place(r, c), acc[r][c]);
  }
  if constexpr (C0 + n < all_columns) product8<how, groups, C0 + n>(depth, left, right, into, left2, right2);
}

// The tiles of a row-major matrix's upper triangle; returns max |a|, or NaN if there are values that are not finite.
double pack(const double* a, int64_t n, double* tiles) {
  const int64_t panels = padded8(n) / 8;
  Vec most{}, poison{};
  for (int64_t g = 0; g < panels; ++g)
    for (int64_t h = g; h < panels; ++h) {
      double* tile = tiles + tile_offset(g, panels) + 64 * (h - g);
      if (h > g && 8 * h + 8 <= n) {
        for (int r = 0; r < 8; ++r) memcpy(tile + 8 * r, a + (8 * g + r) * n + 8 * h, 8 * sizeof(double));
      } else {
        for (int r = 0; r < 8; ++r)
          for (int c = 0; c < 8; ++c) {
            const int64_t i = 8 * g + r, j = 8 * h + c, low = i < j ? i : j, high = i < j ? j : i;
            tile[8 * r + c] = high < n ? a[low * n + high] : 0;
          }
      }
      for (int i = 0; i < 64; i += kVec) {
        const Vec x = load(tile + i), size = x < Vec{} ? -x : x;
        most = size > most ? size : most;
        poison = fma(x, Vec{}, poison);
      }
    }
  double largest = 0;
  for (int i = 0; i < kVec; ++i) largest = most[i] > largest ? most[i] : largest;
  return largest + sum(poison);
}

// y = A v, of the trailing matrix from panel `first` on.
inline void multiply(const double* tiles, int64_t first, int64_t panels, const double* v, double* y) {
  for (int64_t i = 8 * first; i < 8 * panels; ++i) y[i] = 0;
  for (int64_t g = first; g < panels; ++g) {
    const double* panel = tiles + tile_offset(g, panels);
    for (int r0 = 0; r0 < 8; r0 += kRows) {
      const double* a = panel + 8 * r0;
      Vec x[kRows], dots[kRows] = {};
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) x[r] = all(v[8 * g + r0 + r]);
      for (int64_t h = g; h < panels; ++h, a += 64) {
#pragma GCC unroll 8
        for (int c = 0; c < kPer8; ++c) {
          double* to = y + 8 * h + c * kVec;
          Vec even = load(to), odd{};
          const Vec from = h == g ? Vec{} : load(v + 8 * h + c * kVec);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; r += 2) {
            const Vec a0 = load(a + 8 * r + c * kVec), a1 = load(a + 8 * r + 8 + c * kVec);
            even = fma(a0, x[r], even);
            odd = fma(a1, x[r + 1], odd);
            dots[r] = fma(a0, from, dots[r]);
            dots[r + 1] = fma(a1, from, dots[r + 1]);
          }
          store(to, even + odd);
        }
      }
      for (int r = 0; r < kRows; ++r) y[8 * g + r0 + r] += sum(dots[r]);
    }
  }
}

// y -= V·of_v + W·of_w, of p columns.
inline void subtract_columns(const double* columns, int64_t first, int64_t panels, int p, const double* of_v,
                             const double* of_w, double* y) {
  constexpr int kAtOnce = 4;
  for (int64_t g = first; g < panels; g += kAtOnce) {
    const int n = panels - g < kAtOnce ? static_cast<int>(panels - g) : kAtOnce;
    for (int c = 0; c < kPer8; ++c) {
      Vec v[kAtOnce] = {}, w[kAtOnce] = {};
      const double* from = columns + g * kGroup + c * kVec;
      if (n == kAtOnce) {
        for (int q = 0; q < p; ++q)
#pragma GCC unroll 4
          for (int i = 0; i < kAtOnce; ++i) {
            v[i] = fma(load(from + i * kGroup + 8 * q), all(of_v[q]), v[i]);
            w[i] = fma(load(from + i * kGroup + 8 * (kReflectors + q)), all(of_w[q]), w[i]);
          }
      } else {
        for (int i = 0; i < n; ++i)
          for (int q = 0; q < p; ++q) {
            v[i] = fma(load(from + i * kGroup + 8 * q), all(of_v[q]), v[i]);
            w[i] = fma(load(from + i * kGroup + 8 * (kReflectors + q)), all(of_w[q]), w[i]);
          }
      }
      for (int i = 0; i < n; ++i) {
        double* to = y + 8 * (g + i) + c * kVec;
        store(to, load(to) - (v[i] + w[i]));
      }
    }
  }
}

// dots[q] = column q of V (or W) · x, of p columns rounded up to 8.
inline void column_dots(const double* columns, int64_t first, int64_t panels, int p, const double* x, double* dots) {
  for (int q = 0; q < p; q += 8) {
    Vec acc[8] = {};
    for (int64_t g = first; g < panels; ++g)
      for (int c = 0; c < kPer8; ++c) {
        const Vec from = load(x + 8 * g + c * kVec);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) acc[i] = fma(load(columns + g * kGroup + 8 * (q + i) + c * kVec), from, acc[i]);
      }
    for (int i = 0; i < 8; ++i) dots[q + i] = sum(acc[i]);
  }
}

inline double dot(const double* a, const double* b, int64_t n) {  // n is a multiple of 8
  Vec acc[kPer8] = {};
  for (int64_t i = 0; i < n; i += 8)
    for (int c = 0; c < kPer8; ++c) acc[c] = fma(load(a + i + c * kVec), load(b + i + c * kVec), acc[c]);
  for (int c = 1; c < kPer8; ++c) acc[0] = acc[0] + acc[c];
  return sum(acc[0]);
}

// A -= V Wᵀ + W Vᵀ, of nb columns, on the trailing matrix from panel `first` on.
inline void update(double* tiles, int64_t first, int64_t panels, int nb, const double* columns) {
  for (int64_t g = first; g < panels; ++g) {
    double* panel = tiles + tile_offset(g, panels);
    const double* own = columns + g * kGroup;
    const Left v{own, 1, 8}, w{own + 8 * kReflectors, 1, 8};
    for (int64_t h = g; h < panels;) {
      const double* other = columns + h * kGroup;
      const Right of_w{other + 8 * kReflectors, 8, kGroup}, of_v{other, 8, kGroup};
      const Result into{panel + 64 * (h - g), 8, 64};
      if (h + 3 <= panels) {
        product8<Store::subtract, 3>(nb, v, of_w, into, w, of_v);
        h += 3;
      } else {
        product8<Store::subtract, 1>(nb, v, of_w, into, w, of_v);
        h += 1;
      }
    }
  }
}

// A column this short (squared; A is scaled to 1) is zero: its square would lose digits to underflow.
constexpr double kNegligible = 1e-280;

// Householder tridiagonalisation in panels (LAPACK's dsytrd and dlatrd).
void tridiagonalize(double* tiles, int64_t n, const Tridiagonal& into, double* scratch) {
  const int64_t panels = (n + 7) / 8, padded = 8 * panels;
  double *column = scratch, *product = column + padded, *columns = product + padded;
  double of_v[kReflectors], of_w[kReflectors];
  double* reflectors = into.reflectors;
  double* factors = into.factors;
  for (int64_t start = 0; start < n - 2; start += kReflectors) {
    const int nb = n - 2 - start < kReflectors ? static_cast<int>(n - 2 - start) : kReflectors;
    const int64_t first = start / 8;
    for (int i = 0; i < kReflectors * kReflectors; ++i) factors[i] = 0;
    for (int64_t i = 0; i < (padded - start) * kReflectors; ++i) reflectors[i] = 0;
    for (int p = 0; p < nb; ++p) {
      const int64_t j = start + p, own = j / 8, next = (j + 1) / 8;
      const double* row = tiles + tile_offset(own, panels) + 8 * (j % 8);
      for (int64_t g = own; g < panels; ++g) memcpy(column + 8 * g, row + 64 * (g - own), 8 * sizeof(double));
      for (int q = 0; q < p; ++q) {
        const double* at = columns + own * kGroup + 8 * q + j % 8;
        of_w[q] = at[0];
        of_v[q] = at[8 * kReflectors];
      }
      subtract_columns(columns, own, panels, p, of_v, of_w, column);
      into.diagonal[j] = column[j];
      const double alpha = column[j + 1];
      for (int64_t i = 8 * own; i <= j + 1; ++i) column[i] = 0;
      const double rest = dot(column + 8 * own, column + 8 * own, padded - 8 * own);
      double tau = 0, beta = alpha;
      if (rest > kNegligible) {
        beta = __builtin_sqrt(alpha * alpha + rest);
        if (alpha > 0) beta = -beta;
        tau = (beta - alpha) / beta;
        const double scale = 1 / (alpha - beta);
        for (int64_t i = j + 2; i < n; ++i) column[i] *= scale;
      }
      into.off_diagonal[j] = beta;
      column[j + 1] = 1;
      // w = τ(A v - V Wᵀv - W Vᵀv), made A-orthogonal: w -= τ/2 (wᵀv) v.
      multiply(tiles, next, panels, column, product);
      double dots_v[kReflectors], dots_w[kReflectors];
      column_dots(columns, own, panels, p, column, dots_v);
      column_dots(columns + 8 * kReflectors, own, panels, p, column, dots_w);
      subtract_columns(columns, next, panels, p, dots_w, dots_v, product);
      for (int64_t i = 8 * own; i <= j; ++i) product[i] = 0;
      const double half = -0.5 * tau * tau * dot(product + 8 * own, column + 8 * own, padded - 8 * own);
      for (int64_t g = first; g < own; ++g)
        for (int i = 0; i < 8; ++i) {
          columns[g * kGroup + 8 * p + i] = 0;
          columns[g * kGroup + 8 * (kReflectors + p) + i] = 0;
        }
      for (int64_t g = own; g < panels; ++g)
        for (int i = 0; i < 8; ++i) {
          const double v = column[8 * g + i];
          columns[g * kGroup + 8 * p + i] = v;
          columns[g * kGroup + 8 * (kReflectors + p) + i] = tau * product[8 * g + i] + half * v;
          reflectors[(8 * g + i - start) * kReflectors + p] = v;
        }
      // H_0 … H_p = I - V F Vᵀ with F upper triangular (LAPACK's dlarft).
      factors[p * kReflectors + p] = tau;
      for (int q = 0; q < p; ++q) {
        double s = 0;
        for (int i = q; i < p; ++i) s += factors[q * kReflectors + i] * dots_v[i];
        factors[q * kReflectors + p] = -tau * s;
      }
    }
    update(tiles, (start + nb) / 8, panels, nb, columns);
    reflectors += (padded - start) * kReflectors;
    factors += kReflectors * kReflectors;
  }
  for (int64_t j = n > 2 ? n - 2 : 0; j < n; ++j) {
    const double* row = tiles + tile_offset(j / 8, panels) + 8 * (j % 8);
    into.diagonal[j] = row[j % 8];
    if (j + 1 < n) into.off_diagonal[j] = row[64 * ((j + 1) / 8 - j / 8) + (j + 1) % 8];
  }
}

// strip = Q · strip, where A = Q T Qᵀ.
void back_transform(const Tridiagonal& from, int64_t n, double* strip) {
  const int64_t padded = (n + 7) / 8 * 8, blocks = n > 2 ? (n - 2 + kReflectors - 1) / kReflectors : 0;
  double first[kReflectors * kStrip], second[kReflectors * kStrip];
  const double* reflectors = from.reflectors;
  for (int64_t b = 0; b < blocks; ++b) reflectors += (padded - b * kReflectors) * kReflectors;
  for (int64_t b = blocks - 1; b >= 0; --b) {
    const int64_t start = b * kReflectors, rows = padded - start;
    const double* factors = from.factors + b * kReflectors * kReflectors;
    double* z = strip + start * kStrip;
    reflectors -= rows * kReflectors;
    for (int p = 0; p < kReflectors; p += 8)
      product8<Store::set, 3>(rows, {reflectors + p, 1, kReflectors}, {z, kStrip, 8}, {first + p * kStrip, kStrip, 8});
    for (int p = 0; p < kReflectors; p += 8)
      product8<Store::set, 3>(kReflectors, {factors + p * kReflectors, kReflectors, 1}, {first, kStrip, 8},
                              {second + p * kStrip, kStrip, 8});
    for (int64_t i = 0; i < rows; i += 8)
      product8<Store::subtract, 3>(kReflectors, {reflectors + i * kReflectors, kReflectors, 1}, {second, kStrip, 8},
                                   {z + i * kStrip, kStrip, 8});
  }
}

}  // namespace resm::cpu::RESM_ISA::eigen
