// Inner loops of symmetric_eigen up to the tridiagonal matrix, and back from its eigenvectors, in float or double.
//
// A is kept as the tiles of its upper triangle, of kTile × kTile numbers, row after row: panel g holds its rows from
// kTile·g on as tiles (g, g), (g, g+1), …, so that a product with the trailing matrix reads memory from end to end.
// Diagonal tiles are whole. Vectors of kStrip eigenvectors lie side by side in strips, (n, kStrip).
#pragma once

namespace resm::cpu::RESM_ISA::eigen {

// The tiles of a row-major matrix's upper triangle; returns max |a|, or NaN if there are values that are not finite.
template <class T>
T pack(const T* a, int64_t n, T* tiles) {
  using Vec = Vector<T>;
  const int64_t panels = tiles_in<T>(n);
  Vec most{}, poison{};
  for (int64_t g = 0; g < panels; ++g)
    for (int64_t h = g; h < panels; ++h) {
      T* tile = tiles + tile_offset<T>(g, panels) + kTile<T> * kTile<T> * (h - g);
      if (h > g && kTile<T> * (h + 1) <= n) {
        for (int r = 0; r < kTile<T>; ++r)
          memcpy(tile + kTile<T> * r, a + (kTile<T> * g + r) * n + kTile<T> * h, kTile<T> * sizeof(T));
      } else {
        for (int r = 0; r < kTile<T>; ++r)
          for (int c = 0; c < kTile<T>; ++c) {
            const int64_t i = kTile<T> * g + r, j = kTile<T> * h + c, low = i < j ? i : j, high = i < j ? j : i;
            tile[kTile<T> * r + c] = high < n ? a[low * n + high] : 0;
          }
      }
      for (int i = 0; i < kTile<T> * kTile<T>; i += kWidth<T>) {
        const Vec x = load(tile + i), size = x < Vec{} ? -x : x;
        most = size > most ? size : most;
        poison = fma(x, Vec{}, poison);
      }
    }
  T largest = 0;
  for (int i = 0; i < kWidth<T>; ++i) largest = most[i] > largest ? most[i] : largest;
  return largest + sum<T>(poison);
}

// Sums of like terms collect rounding errors of like signs, more than floats can afford: they add up kDepth rows at a
// time (`multiply` a panel's), and then those sums.
template <class T>
constexpr bool kSumsApart = sizeof(T) == 4;
template <class T>
constexpr int64_t kDepth = kSumsApart<T> ? 64 : INT64_MAX / 2;

// y = A v, of the trailing matrix from panel `first` on.
template <class T>
inline void multiply(const T* tiles, int64_t first, int64_t panels, const T* v, T* y) {
  using Vec = Vector<T>;
  constexpr int kTogether = kPerTile == 1 ? kTile<T> : 4;  // rows
  for (int64_t i = kTile<T> * first; i < kTile<T> * panels; ++i) y[i] = 0;
  for (int64_t g = first; g < panels; ++g) {
    const T* panel = tiles + tile_offset<T>(g, panels);
    for (int r0 = 0; r0 < kTile<T>; r0 += kTogether) {
      const T* a = panel + kTile<T> * r0;
      Vec x[kTogether], dots[kTogether] = {};
#pragma GCC unroll 16
      for (int r = 0; r < kTogether; ++r) x[r] = all(v[kTile<T> * g + r0 + r]);
      for (int64_t h = g; h < panels; ++h, a += kTile<T> * kTile<T>) {
#pragma GCC unroll 8
        for (int c = 0; c < kPerTile; ++c) {
          T* to = y + kTile<T> * h + c * kWidth<T>;
          Vec even = kSumsApart<T> ? Vec{} : load(to), odd{};
          const Vec from = h == g ? Vec{} : load(v + kTile<T> * h + c * kWidth<T>);
#pragma GCC unroll 16
          for (int r = 0; r < kTogether; r += 2) {
            const Vec a0 = in_register(load(a + kTile<T> * r + c * kWidth<T>));
            const Vec a1 = in_register(load(a + kTile<T> * (r + 1) + c * kWidth<T>));
            even = fma(a0, x[r], even);
            odd = fma(a1, x[r + 1], odd);
            dots[r] = fma(a0, from, dots[r]);
            dots[r + 1] = fma(a1, from, dots[r + 1]);
          }
          store(to, kSumsApart<T> ? load(to) + (even + odd) : even + odd);
        }
      }
      T sums[kTogether];
      add_up<T, kTogether>(dots, sums);
      for (int r = 0; r < kTogether; ++r) y[kTile<T> * g + r0 + r] += sums[r];
    }
  }
}

// y -= V·of_v + W·of_w, of p columns.
template <class T>
inline void subtract_columns(const T* columns, int64_t first, int64_t panels, int p, const T* of_v, const T* of_w,
                             T* y) {
  using Vec = Vector<T>;
  constexpr int kAtOnce = 4;
  for (int64_t g = first; g < panels; g += kAtOnce) {
    const int n = panels - g < kAtOnce ? static_cast<int>(panels - g) : kAtOnce;
    for (int c = 0; c < kPerTile; ++c) {
      Vec v[kAtOnce] = {}, w[kAtOnce] = {};
      const T* from = columns + g * kGroup<T> + c * kWidth<T>;
      const auto add = [&](int i, int q) {
        const T* column = from + i * kGroup<T> + kTile<T> * q;
        v[i] = fma(load(column), all(of_v[q]), v[i]);
        w[i] = fma(load(column + kTile<T> * kReflectors), all(of_w[q]), w[i]);
      };
      if (n == kAtOnce) {
        for (int q = 0; q < p; ++q)
#pragma GCC unroll 4
          for (int i = 0; i < kAtOnce; ++i) add(i, q);
      } else {
        for (int i = 0; i < n; ++i)
          for (int q = 0; q < p; ++q) add(i, q);
      }
      for (int i = 0; i < n; ++i) {
        T* to = y + kTile<T> * (g + i) + c * kWidth<T>;
        store(to, load(to) - (v[i] + w[i]));
      }
    }
  }
}

// dots[q] = column q of V (or W) · x, of p columns rounded up to 8.
template <class T>
inline void column_dots(const T* columns, int64_t first, int64_t panels, int p, const T* x, T* dots) {
  for (int q = 0; q < p; q += 8) {
    Vector<T> total[8] = {};
    for (int64_t start = first; start < panels; start += kDepth<T> / kTile<T>) {
      Vector<T> acc[8] = {};
      for (int64_t g = start; g < panels && g < start + kDepth<T> / kTile<T>; ++g)
        for (int c = 0; c < kPerTile; ++c) {
          const Vector<T> from = load(x + kTile<T> * g + c * kWidth<T>);
          const T* own = columns + g * kGroup<T> + kTile<T> * q + c * kWidth<T>;
#pragma GCC unroll 8
          for (int i = 0; i < 8; ++i) acc[i] = fma(load(own + kTile<T> * i), from, acc[i]);
        }
      for (int i = 0; i < 8; ++i) total[i] = total[i] + acc[i];
    }
    add_up<T, 8>(total, dots + q);
  }
}

// Of n numbers, a multiple of kTile. Lengths of reflectors are their matrices' orthogonality: floats are multiplied and
// added up in double.
inline double dot(const double* a, const double* b, int64_t n) {
  Vector<double> acc[kPerTile] = {};
  for (int64_t i = 0; i < n; i += 8)
    for (int c = 0; c < kPerTile; ++c)
      acc[c] = fma(load(a + i + c * kWidth<double>), load(b + i + c * kWidth<double>), acc[c]);
  for (int c = 1; c < kPerTile; ++c) acc[0] = acc[0] + acc[c];
  return sum<double>(acc[0]);
}
inline double dot(const float* a, const float* b, int64_t n) {
  double acc[kTile<float>] = {}, wide_a[kTile<float>], wide_b[kTile<float>];
  for (int64_t i = 0; i < n; i += kTile<float>) {
    for (int c = 0; c < kTile<float>; ++c) wide_a[c] = a[i + c], wide_b[c] = b[i + c];
    for (int c = 0; c < kTile<float>; ++c) acc[c] += wide_a[c] * wide_b[c];
  }
  double total = 0;
  for (int c = 0; c < kTile<float>; ++c) total += acc[c];
  return total;
}

// A -= V Wᵀ + W Vᵀ, of nb columns, on the trailing matrix from panel `first` on.
template <class T>
inline void update(T* tiles, int64_t first, int64_t panels, int nb, const T* columns) {
  for (int64_t g = first; g < panels; ++g) {
    T* panel = tiles + tile_offset<T>(g, panels);
    const T* own = columns + g * kGroup<T>;
    const Left<T> v{own, 1, kTile<T>}, w{own + kTile<T> * kReflectors, 1, kTile<T>};
    for (int64_t h = g; h < panels;) {
      const T* other = columns + h * kGroup<T>;
      const Right<T> of_w{other + kTile<T> * kReflectors, kTile<T>, kGroup<T>}, of_v{other, kTile<T>, kGroup<T>};
      const Result<T> into{panel + kTile<T> * kTile<T> * (h - g), kTile<T>, kTile<T> * kTile<T>};
      if (h + 3 <= panels) {
        multiply_into<T, Store::subtract, 3>(nb, v, of_w, into, w, of_v);
        h += 3;
      } else {
        multiply_into<T, Store::subtract, 1>(nb, v, of_w, into, w, of_v);
        h += 1;
      }
    }
  }
}

// A column this short (squared; A is scaled to 1) is zero: double's square would lose digits to underflow, and float's
// elements have lost theirs.
template <class T>
constexpr double kNegligible = sizeof(T) == 4 ? 1e-60 : 1e-280;

// Householder tridiagonalisation in panels (LAPACK's dsytrd and dlatrd).
template <class T>
void tridiagonalize(T* tiles, int64_t n, const Tridiagonal<T>& into, T* scratch) {
  constexpr int kTile = cpu::kTile<T>;
  constexpr int64_t kGroup = cpu::kGroup<T>;
  const int64_t panels = tiles_in<T>(n), padded = kTile * panels;
  T *column = scratch, *product = column + padded, *columns = product + padded;
  T of_v[kReflectors], of_w[kReflectors];
  T* reflectors = into.reflectors;
  T* factors = into.factors;
  for (int64_t start = 0; start < n - 2; start += kReflectors) {
    const int nb = n - 2 - start < kReflectors ? static_cast<int>(n - 2 - start) : kReflectors;
    const int64_t first = start / kTile;
    for (int i = 0; i < kReflectors * kReflectors; ++i) factors[i] = 0;
    for (int64_t i = 0; i < (padded - start) * kReflectors; ++i) reflectors[i] = 0;
    for (int p = 0; p < nb; ++p) {
      const int64_t j = start + p, own = j / kTile, next = (j + 1) / kTile;
      const T* row = tiles + tile_offset<T>(own, panels) + kTile * (j % kTile);
      for (int64_t g = own; g < panels; ++g)
        memcpy(column + kTile * g, row + kTile * kTile * (g - own), kTile * sizeof(T));
      for (int q = 0; q < p; ++q) {
        const T* at = columns + own * kGroup + kTile * q + j % kTile;
        of_w[q] = at[0];
        of_v[q] = at[kTile * kReflectors];
      }
      subtract_columns(columns, own, panels, p, of_v, of_w, column);
      into.diagonal[j] = column[j];
      const double alpha = column[j + 1];
      for (int64_t i = kTile * own; i <= j + 1; ++i) column[i] = 0;
      const double rest = dot(column + kTile * own, column + kTile * own, padded - kTile * own);
      double beta = alpha;
      T tau = 0;
      if (rest > kNegligible<T>) {
        beta = __builtin_sqrt(alpha * alpha + rest);
        if (alpha > 0) beta = -beta;
        tau = static_cast<T>((beta - alpha) / beta);
        const double scale = 1 / (alpha - beta);
        for (int64_t i = j + 2; i < n; ++i) column[i] = static_cast<T>(column[i] * scale);
      }
      into.off_diagonal[j] = beta;
      column[j + 1] = 1;
      // w = τ(A v - V Wᵀv - W Vᵀv), made A-orthogonal: w -= τ/2 (wᵀv) v.
      multiply(tiles, next, panels, column, product);
      T dots_v[kReflectors], dots_w[kReflectors];
      column_dots(columns, own, panels, p, column, dots_v);
      column_dots(columns + kTile * kReflectors, own, panels, p, column, dots_w);
      subtract_columns(columns, next, panels, p, dots_w, dots_v, product);
      for (int64_t i = kTile * own; i <= j; ++i) product[i] = 0;
      const T half =
          static_cast<T>(-0.5 * tau * tau * dot(product + kTile * own, column + kTile * own, padded - kTile * own));
      for (int64_t g = first; g < own; ++g)
        for (int i = 0; i < kTile; ++i) {
          columns[g * kGroup + kTile * p + i] = 0;
          columns[g * kGroup + kTile * (kReflectors + p) + i] = 0;
        }
      for (int64_t g = own; g < panels; ++g)
        for (int i = 0; i < kTile; ++i) {
          const T v = column[kTile * g + i];
          columns[g * kGroup + kTile * p + i] = v;
          columns[g * kGroup + kTile * (kReflectors + p) + i] = tau * product[kTile * g + i] + half * v;
          reflectors[(kTile * g + i - start) * kReflectors + p] = v;
        }
      // H_0 … H_p = I - V F Vᵀ with F upper triangular (LAPACK's dlarft).
      factors[p * kReflectors + p] = tau;
      for (int q = 0; q < p; ++q) {
        double s = 0;
        for (int i = q; i < p; ++i) s += factors[q * kReflectors + i] * dots_v[i];
        factors[q * kReflectors + p] = static_cast<T>(-tau * s);
      }
    }
    update(tiles, (start + nb) / kTile, panels, nb, columns);
    reflectors += (padded - start) * kReflectors;
    factors += kReflectors * kReflectors;
  }
  for (int64_t j = n > 2 ? n - 2 : 0; j < n; ++j) {
    const T* row = tiles + tile_offset<T>(j / kTile, panels) + kTile * (j % kTile);
    into.diagonal[j] = row[j % kTile];
    if (j + 1 < n) into.off_diagonal[j] = row[kTile * kTile * ((j + 1) / kTile - j / kTile) + (j + 1) % kTile];
  }
}

// columns = Q · columns, (n, kColumns), where A = Q T Qᵀ.
template <class T>
void back_transform(const Tridiagonal<T>& from, int64_t n, T* columns) {
  constexpr int kTile = cpu::kTile<T>, kColumns = cpu::kColumns<T>;
  const int64_t padded = kTile * tiles_in<T>(n), blocks = reflector_blocks(n);
  T first[kReflectors * kColumns], second[kReflectors * kColumns];
  const T* reflectors = from.reflectors;
  for (int64_t b = 0; b < blocks; ++b) reflectors += (padded - b * kReflectors) * kReflectors;
  for (int64_t b = blocks - 1; b >= 0; --b) {
    const int64_t start = b * kReflectors, rows = padded - start;
    const T* factors = from.factors + b * kReflectors * kReflectors;
    T* z = columns + start * kColumns;
    reflectors -= rows * kReflectors;
    for (int64_t i = 0; i < rows; i += kDepth<T>) {
      const int64_t depth = rows - i < kDepth<T> ? rows - i : kDepth<T>;
      for (int p = 0; p < kReflectors; p += kTile) {
        const Left<T> left{reflectors + i * kReflectors + p, 1, kReflectors};
        const Right<T> right{z + i * kColumns, kColumns, kTile};
        const Result<T> into{first + p * kColumns, kColumns, kTile};
        if (i == 0)
          multiply_into<T, Store::set, 3>(depth, left, right, into);
        else
          multiply_into<T, Store::add, 3>(depth, left, right, into);
      }
    }
    for (int p = 0; p < kReflectors; p += kTile)
      multiply_into<T, Store::set, 3>(kReflectors, {factors + p * kReflectors, kReflectors, 1},
                                      {first, kColumns, kTile}, {second + p * kColumns, kColumns, kTile});
    for (int64_t i = 0; i < rows; i += kTile)
      multiply_into<T, Store::subtract, 3>(kReflectors, {reflectors + i * kReflectors, kReflectors, 1},
                                           {second, kColumns, kTile}, {z + i * kColumns, kColumns, kTile});
  }
}

}  // namespace resm::cpu::RESM_ISA::eigen
