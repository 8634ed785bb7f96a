// Inner loops of gram_product: products whose columns come in units of kUnit, as many to a register tile as fit.
#pragma once

namespace resm::cpu::RESM_ISA {

// The last unit of an odd number of them fills half a register where registers hold two.
#if defined(__AVX512F__)
struct HalfVec {
  static constexpr int kWidth = 8;
  __m256 v;
  static RESM_HD HalfVec all(float x) { return {_mm256_set1_ps(x)}; }
  static RESM_HD HalfVec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  RESM_HD void store(float* p) const { _mm256_storeu_ps(p, v); }
  RESM_HD void add_product(const HalfVec& a, const HalfVec& b) { v = _mm256_fmadd_ps(a.v, b.v, v); }
  RESM_HD void add(const HalfVec& a) { v = _mm256_add_ps(v, a.v); }
};
constexpr int kMostUnits = 6;
#elif defined(__AVX2__)
using HalfVec = Vec;
constexpr int kMostUnits = 2;
#else
using HalfVec = Vec;
constexpr int kMostUnits = 1;
#endif

// A row of a tile: kUnits units in registers.
template <int kUnits>
struct UnitRow {
  static constexpr int kFull = kUnits * kUnit / Vec::kWidth;
  static constexpr bool kHalf = kUnits * kUnit % Vec::kWidth != 0;
  Vec full[kFull > 0 ? kFull : 1];
  HalfVec half;
};

// Rows of a tile: narrower tiles have more, so that loads stay few against products. All of them divide kGramRows and
// kGramColumns.
template <int kUnits>
constexpr int kUnitRows = kMostUnits == 6 ? (kUnits <= 2   ? 24
                                             : kUnits <= 4 ? 12
                                                           : 8)
                                          : kMostUnits / kUnits * 6;

// Walks over the next block of Δ and prefetches its cache lines: down all rows, then on to the right.
// Spread over the products before it, these requests overlap with them; all at once they would wait for memory.
class Walk {
 public:
  Walk(const BlockAhead& block, int steps) : block_(&block), each_((block.size() + steps - 1) / steps) { turn(); }
  RESM_HD void step() {
    for (int i = 0; i < each_; ++i) {
      __builtin_prefetch(reinterpret_cast<const void*>(at_), 0, 2);
      at_ += stride_;
      if (++row_ == block_->rows) {
        ++line_;
        turn();
      }
    }
  }

 private:
  RESM_HD void turn() {
    row_ = 0;
    if (line_ == block_->lines()) each_ = 0;
    const auto& part = block_->parts[line_ < block_->parts[0].lines ? 0 : 1];
    at_ = part.begin + 64 * (line_ < block_->parts[0].lines ? line_ : line_ - block_->parts[0].lines);
    stride_ = part.stride;
  }

  const BlockAhead* block_;
  int each_, line_ = 0, row_ = 0;
  uintptr_t at_ = 0;
  int64_t stride_ = 0;
};

// out(i, j) += Σ_k left[i·kLeftRow + k·kLeftStep] · right(k, j), k below depth; rows of right and out are kRight
// apart. With `fresh` the sum is stored, not added.
template <int kUnits, int kRight, int kLeftRow, int kLeftStep>
RESM_HD void unit_tile(const float* left, const float* right, int depth, bool fresh, float* out, Walk& shared) {
  Walk walk = shared;  // in registers
  constexpr int kRows = kUnitRows<kUnits>;
  using Row = UnitRow<kUnits>;
  Row sum[kRows];
#pragma GCC unroll 24
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < Row::kFull; ++j) sum[i].full[j] = Vec::all(0.0f);
    if constexpr (Row::kHalf) sum[i].half = HalfVec::all(0.0f);
  }
  for (int k = 0; k < depth; ++k) {
    walk.step();
    Row row;
#pragma GCC unroll 3
    for (int j = 0; j < Row::kFull; ++j) row.full[j] = Vec::load(right + k * kRight + j * Vec::kWidth);
    if constexpr (Row::kHalf) row.half = HalfVec::load(right + k * kRight + Row::kFull * Vec::kWidth);
#pragma GCC unroll 24
    for (int i = 0; i < kRows; ++i) {
      const float factor = left[i * kLeftRow + k * kLeftStep];
#pragma GCC unroll 3
      for (int j = 0; j < Row::kFull; ++j) sum[i].full[j].add_product(Vec::all(factor), row.full[j]);
      if constexpr (Row::kHalf) sum[i].half.add_product(HalfVec::all(factor), row.half);
    }
  }
  shared = walk;
#pragma GCC unroll 24
  for (int i = 0; i < kRows; ++i) {
    float* to = out + i * kRight;
#pragma GCC unroll 3
    for (int j = 0; j < Row::kFull; ++j) {
      if (!fresh) sum[i].full[j].add(Vec::load(to + j * Vec::kWidth));
      sum[i].full[j].store(to + j * Vec::kWidth);
    }
    if constexpr (Row::kHalf) {
      if (!fresh) sum[i].half.add(HalfVec::load(to + Row::kFull * Vec::kWidth));
      sum[i].half.store(to + Row::kFull * Vec::kWidth);
    }
  }
}

// All rows, and all units from kFirst on, of a product with kUnits units; the first tiles walk over `ahead`.
template <int kUnits, int kFirst, int kLeftRow, int kLeftStep>
void unit_product(const float* left, int rows, const float* right, int depth, bool fresh, float* out,
                  const BlockAhead& ahead) {
  constexpr int kRight = kUnits * kUnit, kHere = kUnits - kFirst < kMostUnits ? kUnits - kFirst : kMostUnits;
  Walk walk(ahead, (rows + kUnitRows<kHere> - 1) / kUnitRows<kHere> * depth);
  for (int i = 0; i < rows; i += kUnitRows<kHere>)
    unit_tile<kHere, kRight, kLeftRow, kLeftStep>(left + i * kLeftRow, right + kFirst * kUnit, depth, fresh,
                                                  out + i * kRight + kFirst * kUnit, walk);
  if constexpr (kFirst + kHere < kUnits)
    unit_product<kUnits, kFirst + kHere, kLeftRow, kLeftStep>(left, rows, right, depth, fresh, out, BlockAhead{});
}

template <int kLeftRow, int kLeftStep>
void unit_product_of(int units, const float* left, int rows, const float* right, int depth, bool fresh, float* out,
                     const BlockAhead& ahead) {
  static_assert(kGramUnits == 6, "one case for each number of units");
  switch (units) {
    case 1: return unit_product<1, 0, kLeftRow, kLeftStep>(left, rows, right, depth, fresh, out, ahead);
    case 2: return unit_product<2, 0, kLeftRow, kLeftStep>(left, rows, right, depth, fresh, out, ahead);
    case 3: return unit_product<3, 0, kLeftRow, kLeftStep>(left, rows, right, depth, fresh, out, ahead);
    case 4: return unit_product<4, 0, kLeftRow, kLeftStep>(left, rows, right, depth, fresh, out, ahead);
    case 5: return unit_product<5, 0, kLeftRow, kLeftStep>(left, rows, right, depth, fresh, out, ahead);
    case 6: return unit_product<6, 0, kLeftRow, kLeftStep>(left, rows, right, depth, fresh, out, ahead);
  }
}

void add_image(const float* block, int rows, const float* x, int units, int columns, bool fresh, float* y,
               const BlockAhead& ahead) {
  unit_product_of<kGramColumns, 1>(units, block, rows, x, columns, fresh, y, ahead);
}

void add_preimage(const float* block, int rows, const float* y, int units, int columns, bool fresh, float* z) {
  unit_product_of<1, kGramColumns>(units, block, columns, y, rows, fresh, z, BlockAhead{});
}

// Lanes of fp32 add up kEnergyRows squares each, so that the result is right to (kEnergyRows + 1)·2⁻²⁴; where fp32's
// range may not do, double does it again.
double block_energy(const float* block, int rows) {
  constexpr int kEnergyRows = 12, kVecs = kGramColumns / Vec::kWidth;
  double energy = 0.0;
  for (int first = 0; first < rows; first += kEnergyRows) {
    const int last = first + kEnergyRows < rows ? first + kEnergyRows : rows;
    Vec squares[kVecs];
#pragma GCC unroll 24
    for (int i = 0; i < kVecs; ++i) squares[i] = Vec::all(0.0f);
    for (int r = first; r < last; ++r) {
#pragma GCC unroll 24
      for (int i = 0; i < kVecs; ++i) {
        const Vec d = Vec::load(block + r * kGramColumns + i * Vec::kWidth);
        squares[i].add_product(d, d);
      }
    }
    float lanes[kGramColumns];
#pragma GCC unroll 24
    for (int i = 0; i < kVecs; ++i) squares[i].store(lanes + i * Vec::kWidth);
    double wide[kLanes] = {};
    for (int i = 0; i < kGramColumns; i += kLanes)
      for (int l = 0; l < kLanes; ++l) wide[l] += lanes[i + l];
    double sum = 0.0;
    for (int l = 0; l < kLanes; ++l) sum += wide[l];
    if (!(sum > 1e-20 && sum < 1e30)) {
      sum = 0.0;
      for (int r = first; r < last; ++r)
        for (int i = 0; i < kGramColumns; ++i) {
          const double d = block[r * kGramColumns + i];
          sum += d * d;
        }
    }
    energy += sum;
  }
  return energy;
}

}  // namespace resm::cpu::RESM_ISA
