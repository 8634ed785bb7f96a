// Products with Δ: tiles of Δ formed in fp32, and a register-blocked product that adds to its output.
//
// An output's products run over the depth in order, each a fused multiply-add (a multiplication and an addition in the
// baseline, whose bits therefore differ); `add_product` then adds their sum to the output. This does not depend on where
// tiles begin, so that outputs may be shared out among threads in any way.
#pragma once

#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace resm::cpu::RESM_ISA {

RESM_HD float widened(float x) { return x; }
RESM_HD double widened(double x) { return x; }
struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};
RESM_HD float widened(Half x) { return float_from_f16(x.bits); }
RESM_HD float widened(BFloat x) { return float_from_bf16(x.bits); }

// Prefetches the row that lies kRowsAhead below: no hardware prefetcher foresees it, as rows of a tile are a row of Δ
// apart. Rows below the tile belong to the next one. A prefetch past the end of the tensor reads nothing.
constexpr int kRowsAhead = 12;
template <class T>
RESM_HD void prefetch(const T* row, const DeltaTile& from) {
  if (!from.ahead) return;
  const auto begin = reinterpret_cast<uintptr_t>(row) + kRowsAhead * from.stride * sizeof(T);
  for (uintptr_t i = 0; i < from.columns * sizeof(T); i += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(begin + i), 0, 2);
}

// out[r][i] = Δ of row r, column i: in fp32, or in double and then rounded where an input is double.
template <class Base, class Expert>
void subtract(const Base* base, const Expert* expert, const DeltaTile& from, float* to, int to_stride) {
  for (int r = 0; r < from.rows; ++r) {
    const Expert* __restrict e = expert + from.begin + r * from.stride;
    float* __restrict out = to + int64_t(r) * to_stride;
    prefetch(e, from);
    if constexpr (std::is_same_v<Base, void>) {
      for (int i = 0; i < from.columns; ++i) out[i] = float(widened(e[i]));
    } else {
      const Base* __restrict b = base + from.begin + r * from.stride;
      prefetch(b, from);
      for (int i = 0; i < from.columns; ++i) out[i] = float(widened(e[i]) - widened(b[i]));
    }
  }
}

template <class Base>
void subtract_from(const Base* base, const DeltaTile& from, float* to, int to_stride) {
  const void* expert = from.expert->data;
  switch (from.expert->dtype) {
    case DType::f32: return subtract(base, static_cast<const float*>(expert), from, to, to_stride);
    case DType::f64: return subtract(base, static_cast<const double*>(expert), from, to, to_stride);
    case DType::f16: return subtract(base, static_cast<const Half*>(expert), from, to, to_stride);
    case DType::bf16: return subtract(base, static_cast<const BFloat*>(expert), from, to, to_stride);
  }
}

void delta_tile(const DeltaTile& from, float* to, int to_stride) {
  if (from.base == nullptr) return subtract_from(static_cast<const void*>(nullptr), from, to, to_stride);
  const void* base = from.base->data;
  switch (from.base->dtype) {
    case DType::f32: return subtract_from(static_cast<const float*>(base), from, to, to_stride);
    case DType::f64: return subtract_from(static_cast<const double*>(base), from, to, to_stride);
    case DType::f16: return subtract_from(static_cast<const Half*>(base), from, to, to_stride);
    case DType::bf16: return subtract_from(static_cast<const BFloat*>(base), from, to, to_stride);
  }
}

// A register of floats, and how many rows and registers of sums a tile holds: as many as the registers allow.
#if defined(__AVX512F__)
struct Vec {
  static constexpr int kWidth = 16, kRows = 8, kAcross = 3;
  __m512 v;
  static RESM_HD Vec all(float x) { return {_mm512_set1_ps(x)}; }
  static RESM_HD Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  RESM_HD void store(float* p) const { _mm512_storeu_ps(p, v); }
  RESM_HD void add_product(const Vec& a, const Vec& b) { v = _mm512_fmadd_ps(a.v, b.v, v); }
  RESM_HD void add(const Vec& a) { v = _mm512_add_ps(v, a.v); }
};
#elif defined(__AVX2__)
struct Vec {
  static constexpr int kWidth = 8, kRows = 6, kAcross = 2;
  __m256 v;
  static RESM_HD Vec all(float x) { return {_mm256_set1_ps(x)}; }
  static RESM_HD Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  RESM_HD void store(float* p) const { _mm256_storeu_ps(p, v); }
  RESM_HD void add_product(const Vec& a, const Vec& b) { v = _mm256_fmadd_ps(a.v, b.v, v); }
  RESM_HD void add(const Vec& a) { v = _mm256_add_ps(v, a.v); }
};
#else
struct Vec {
  static constexpr int kWidth = 4, kRows = 6, kAcross = 2;
  typedef float Register __attribute__((vector_size(16)));
  Register v;
  static RESM_HD Vec all(float x) { return {Register{x, x, x, x}}; }
  static RESM_HD Vec load(const float* p) {
    Vec r;
    memcpy(&r.v, p, sizeof r.v);
    return r;
  }
  RESM_HD void store(float* p) const { memcpy(p, &v, sizeof v); }
  RESM_HD void add_product(const Vec& a, const Vec& b) { v = v + a.v * b.v; }
  RESM_HD void add(const Vec& a) { v = v + a.v; }
};
#endif

constexpr int kTileColumns = Vec::kWidth * Vec::kAcross;
static_assert(kStripRows % Vec::kRows == 0 && kPanel % kTileColumns == 0, "tiles must fill strips and panels");

// sums[i][j] = Σ_k left[i·kLeftRow + k·kLeftStep] · right[k·kRightStep + j], k below depth.
template <int kAcross, int kLeftRow, int kLeftStep, int kRightStep>
RESM_HD void tile_product(const float* left, const float* right, int depth, float* sums) {
  Vec sum[Vec::kRows][kAcross];
#pragma GCC unroll 8
  for (int i = 0; i < Vec::kRows; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < kAcross; ++j) sum[i][j] = Vec::all(0.0f);
  for (int k = 0; k < depth; ++k) {
    Vec row[kAcross];
#pragma GCC unroll 3
    for (int j = 0; j < kAcross; ++j) row[j] = Vec::load(right + k * kRightStep + j * Vec::kWidth);
#pragma GCC unroll 8
    for (int i = 0; i < Vec::kRows; ++i) {
      const Vec factor = Vec::all(left[i * kLeftRow + k * kLeftStep]);
#pragma GCC unroll 3
      for (int j = 0; j < kAcross; ++j) sum[i][j].add_product(factor, row[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Vec::kRows; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < kAcross; ++j) sum[i][j].store(sums + i * kTileColumns + j * Vec::kWidth);
}

// out[i][j] += Σ_k left(i, k) · right(k, j) for i below rows <= kStripRows, j below columns <= kPanel. Both operands
// are read in whole tiles; elements beyond rows and columns change no result.
template <int kLeftRow, int kLeftStep, int kRightStep>
void add_product(const float* left, int rows, const float* right, int columns, int depth, float* out,
                 int64_t out_stride) {
  alignas(64) float sums[Vec::kRows * kTileColumns];
  for (int i = 0; i < rows; i += Vec::kRows) {
    for (int j = 0; j < columns; j += kTileColumns) {
      const float *l = left + i * kLeftRow, *r = right + j;
      const int rest = columns - j, across = (rest + Vec::kWidth - 1) / Vec::kWidth;
      if (across >= Vec::kAcross)
        tile_product<Vec::kAcross, kLeftRow, kLeftStep, kRightStep>(l, r, depth, sums);
      else if (across == 2)
        tile_product<2, kLeftRow, kLeftStep, kRightStep>(l, r, depth, sums);
      else
        tile_product<1, kLeftRow, kLeftStep, kRightStep>(l, r, depth, sums);
      const int height = rows - i < Vec::kRows ? rows - i : Vec::kRows;
      const int width = rest < kTileColumns ? rest : kTileColumns;
      for (int y = 0; y < height; ++y) {
        float* __restrict to = out + (i + y) * out_stride + j;
        const float* __restrict from = sums + y * kTileColumns;
        for (int x = 0; x < width; ++x) to[x] = to[x] + from[x];
      }
    }
  }
}

}  // namespace resm::cpu::RESM_ISA
