// Parts of symmetric_eigen's inner loops: vectors of floats or doubles in as many lanes as the instruction set has, their
// sums, and products of small tiles.
#pragma once

#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace resm::cpu::RESM_ISA::eigen {

template <class T>
struct VectorOf;
#if defined(__AVX512F__)
template <>
struct VectorOf<float> {
  using Type = __m512;
};
template <>
struct VectorOf<double> {
  using Type = __m512d;
};
RESM_HD __m512 fma(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
RESM_HD __m512 fnma(__m512 a, __m512 b, __m512 c) { return _mm512_fnmadd_ps(a, b, c); }
RESM_HD __m512d fma(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }
RESM_HD __m512d fnma(__m512d a, __m512d b, __m512d c) { return _mm512_fnmadd_pd(a, b, c); }
#elif defined(__AVX2__)
template <>
struct VectorOf<float> {
  using Type = __m256;
};
template <>
struct VectorOf<double> {
  using Type = __m256d;
};
RESM_HD __m256 fma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
RESM_HD __m256 fnma(__m256 a, __m256 b, __m256 c) { return _mm256_fnmadd_ps(a, b, c); }
RESM_HD __m256d fma(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
RESM_HD __m256d fnma(__m256d a, __m256d b, __m256d c) { return _mm256_fnmadd_pd(a, b, c); }
#else
template <>
struct VectorOf<float> {
  typedef float Type __attribute__((vector_size(16)));
};
template <>
struct VectorOf<double> {
  typedef double Type __attribute__((vector_size(16)));
};
template <class V>
RESM_HD V fma(V a, V b, V c) {
  return a * b + c;
}
template <class V>
RESM_HD V fnma(V a, V b, V c) {
  return c - a * b;
}
#endif

template <class T>
using Vector = typename VectorOf<T>::Type;
template <class T>
constexpr int kWidth = sizeof(Vector<T>) / sizeof(T);
constexpr int kPerTile = 64 / sizeof(Vector<double>);  // vectors in a row of a tile

template <class T>
RESM_HD Vector<T> load(const T* p) {
  Vector<T> v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
RESM_HD void store(T* p, Vector<T> v) {
  memcpy(p, &v, sizeof v);
}
RESM_HD Vector<float> all(float x) { return x - Vector<float>{}; }
RESM_HD Vector<double> all(double x) { return x - Vector<double>{}; }
// v, as a register holds it: GCC otherwise reads it from memory again for its second use.
template <class V>
RESM_HD V in_register(V v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#endif
  return v;
}
// The lower half of each group of 2·step numbers of a, then of b, or the upper half with `offset` = step.
template <int step, int offset, class V, int... i>
RESM_HD V halves(V a, V b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, (i / step * 2 * step + i % step + offset)...);
}
// sums[i] = Σ v[i] of n vectors at once, n a power of two: upper halves are added to lower ones till one is left.
template <class T, int n, int step = kWidth<T> / 2>
RESM_HD void add_up(const Vector<T>* v, T* sums) {
  if constexpr (step == 0) {
    memcpy(sums, v, n * sizeof *v);
  } else if constexpr (n == 1) {
    T s[kWidth<T>];
    memcpy(s, v, sizeof s);
    for (int group = 0; group < kWidth<T> / (2 * step); ++group) {
      T* part = s + group * 2 * step;
      for (int half = step; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) part[i] += part[i + half];
      sums[group] = part[0];
    }
  } else {
    constexpr std::make_integer_sequence<int, kWidth<T>> lanes{};
    Vector<T> added[n / 2];
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i)
      added[i] = halves<step, 0>(v[2 * i], v[2 * i + 1], lanes) + halves<step, step>(v[2 * i], v[2 * i + 1], lanes);
    add_up<T, n / 2, step / 2>(added, sums);
  }
}
template <class T>
RESM_HD T sum(Vector<T> v) {
  T s;
  add_up<T, 1>(&v, &s);
  return s;
}

template <class T>
struct Left {  // element (r, k) lies at p[r * row + k * step]
  const T* p;
  int64_t row, step;
};
template <class T>
struct Right {  // row k lies at p + k * step, in groups of kTile columns
  const T* p;
  int64_t step, group;
};
template <class T>
struct Result {
  T* p;
  int64_t row, group;
};

// Registers hold this many rows of a product at once.
constexpr int kRows = kPerTile == 1 ? 8 : 4;

// acc[r][c] ±= Σ_k left(r, k) · right(k, c), for vectors C0 … C0+N-1 of the columns.
template <bool subtract, int N, int C0, class T>
RESM_HD void accumulate(int64_t depth, Left<T> left, Right<T> right, Vector<T> (&acc)[kRows][N]) {
  for (int64_t k = 0; k < depth; ++k) {
    Vector<T> b[N];
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c)
      b[c] = load(right.p + (C0 + c) / kPerTile * right.group + (C0 + c) % kPerTile * kWidth<T>);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vector<T> a = all(left.p[r * left.row]);
#pragma GCC unroll 8
      for (int c = 0; c < N; ++c) acc[r][c] = subtract ? fnma(a, b[c], acc[r][c]) : fma(a, b[c], acc[r][c]);
    }
    left.p += left.step;
    right.p += right.step;
  }
}

enum class Store { set, add, subtract };

// into = left · right, or += or -= it, of kTile rows and `groups` times kTile columns; the product is left · right +
// left2 · right2 if these are not null. It is added up before it is added to `into`.
template <class T, Store how, int groups, int C0 = 0>
RESM_HD void multiply_into(int64_t depth, Left<T> left, Right<T> right, Result<T> into, Left<T> left2 = {},
                           Right<T> right2 = {}) {
  constexpr int all_columns = groups * kPerTile, n = all_columns - C0 < 3 ? all_columns - C0 : 3;
  for (int r0 = 0; r0 < kTile<T>; r0 += kRows) {
    Vector<T> acc[kRows][n];
    const auto address = [&](int r, int c) {
      return into.p + (r0 + r) * into.row + (C0 + c) / kPerTile * into.group + (C0 + c) % kPerTile * kWidth<T>;
    };
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < n; ++c) acc[r][c] = how == Store::subtract ? load(address(r, c)) : Vector<T>{};
    constexpr bool subtract = how == Store::subtract;
    accumulate<subtract, n, C0>(depth, Left<T>{left.p + r0 * left.row, left.row, left.step}, right, acc);
    if (left2.p != nullptr)
      accumulate<subtract, n, C0>(depth, Left<T>{left2.p + r0 * left2.row, left2.row, left2.step}, right2, acc);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < n; ++c) store(address(r, c), how == Store::add ? load(address(r, c)) + acc[r][c] : acc[r][c]);
  }
  if constexpr (C0 + n < all_columns) multiply_into<T, how, groups, C0 + n>(depth, left, right, into, left2, right2);
}

}  // namespace resm::cpu::RESM_ISA::eigen
