// The inner loops of the CPU ops: compiled once for each instruction set (*.simd.cpp), chosen at run time.
//
// They work on blocks of at most kBlock elements, which are first converted to the compute type C (float, or double if
// any input is double) in memory that the first-level cache holds. Results do not depend on the instruction set: sums run
// over fixed lanes, and a multiplication is fused with an addition only where that changes no rounding. Only products
// with Δ and symmetric_eigen use fused instructions wherever there are any; their results depend on that.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"
#include "common/elect.h"
#include "common/histogram.h"
#include "common/key.h"
#include "common/masks.h"
#include "cpu/symmetric_eigen.h"

namespace resm::cpu {

constexpr int kBlock = 512;       // small enough that the blocks of several experts stay in the first-level cache
constexpr int kLanes = 16;        // independent partial sums of a block
constexpr int kPad = 4 * kLanes;  // blocks are filled up with zeros to a multiple of this
constexpr int kHistogramCopies = 8;
constexpr int64_t kChunk = 65536;  // elements that a task works on

constexpr int kMostAtOnce = 16;  // the most experts that aggregate_bf16 takes

// Sizes of products with Δ (gemm.simd.h):
constexpr int kDepth = 256;        // products that are added up before their sum is added to the output
constexpr int kStripRows = 24;     // rows of the left operand that lie together
constexpr int kPanel = 48;         // columns of the right operand that lie together
constexpr int kSpan = 4 * kPanel;  // most columns of Δ that a task of project works on

// Sizes of gram_product and gram_matrix:
constexpr int kGramRows = 48, kGramColumns = 96;  // a block of Δ, which fits the caches together with a panel of x
constexpr int kUnit = 8;                          // columns of x, y and z come in units of this many
constexpr int kGramUnits = 6;                     // the most units that lie together
constexpr int kGramPanel = 24;                    // columns of gram_matrix that lie together

// Sizes of low_rank_update:
template <class T>
constexpr int kUpdatePanel = 192 / sizeof(T);  // columns of R that lie together
template <class T>
constexpr int kUpdateDepth = 1024 / sizeof(T);  // products that are added up before their sum is added to the output's

struct Array {
  void* data;
  DType dtype;
};

// Partial sums of a chunk, one per lane; callers add up the lanes in their order. The zeros that pad the last block count
// as values.
template <class C>
struct Moments {
  double sum[kLanes], sum_sq[kLanes], sum_abs[kLanes];
  C max_abs[kLanes];
  int32_t zeros[kLanes], smalls[kLanes];
  int64_t n_nonfinite;
};

struct Outliers {
  double sum_abs[kLanes];
  int32_t outliers[kLanes], smalls[kLanes];
};

static_assert(kChunk / kHistogramCopies + kBlock < (1 << 16), "a chunk's counts must fit above the sums");

// The numbers of keys of |d| that are larger than, or at least as large as, the ends of a bracket low <= high.
struct BracketCounts {
  int64_t above_high = 0, from_high = 0, above_low = 0, from_low = 0, nonfinite = 0;
};

template <class C>
struct Bounds {
  C low, high, small;  // outliers are < low or > high; small are |d| <= small
};

// Deltas of magnitude lower[t] … upper[t] whose bit of masks[t] is set are kept; the others count as 0. Null: no condition.
template <class C>
struct Sparsity {
  const C* lower;
  const C* upper;               // null just as lower is
  const uint8_t* const* masks;  // from the block's first element on

  bool trims() const { return lower != nullptr; }
  bool any() const { return lower != nullptr || masks != nullptr; }
};

template <class C>
struct Election {
  int n_experts;
  const C* factors;  // by which the deltas are multiplied before the votes
  const C* weights;  // the terms of the divisor; unweighted terms are multiplied by them after the votes
  C weight_sum;
  C scale;
  Rule rule;
  bool normalize;
  Sparsity<C> sparsity;
  Vote vote;
  C min_divisor;
};

// A monotone map of keys to 2^(bits + 1) cells. Each even cell holds a single key: cell 0 the key 0, the others the keys
// `first`, first + 2^shift, …. Each odd cell holds the keys between those of its neighbours; the last cell holds all
// larger keys.
template <class C>
struct KeyGrid {
  Key<C> first;
  int shift, bits;

  int cells() const { return 2 << bits; }
};

// For each range of cells, the limits of a random number for the lowest and the highest rank of its elements.
constexpr int kCellRanges = 32;
struct RankLimits {
  uint32_t least[kCellRanges], most[kCellRanges];
};

// Sums of |δ|, of the kept |δ| and of their squares, one per lane.
struct KeptSums {
  double all[kLanes], kept[kLanes], kept_sq[kLanes];
};

// Rows of Δ = expert − base as a product takes them: `columns` elements from begin + r·stride on for each row r.
struct DeltaTile {
  const Array* base;  // null: Δ = expert
  const Array* expert;
  int64_t begin, stride;
  int rows, columns;
  bool ahead = true;  // whether to prefetch the rows below
};

// Memory of a block of Δ to prefetch: cache lines side by side in each row of base and of expert.
struct BlockAhead {
  struct Part {
    uintptr_t begin;
    int64_t stride;  // bytes
    int lines;
  } parts[2];
  int rows;

  RESM_HD int lines() const { return parts[0].lines + parts[1].lines; }
  RESM_HD int size() const { return rows * lines(); }
};

struct ProductKernels {
  void (*delta_tile)(const DeltaTile& from, float* to, int to_stride);
  // Entries of the random matrix, see random_matrix.simd.h.
  void (*random_rows)(uint64_t seed, int64_t first_row, int rows, uint32_t first_pair, int64_t pairs, float* entries);
  // Of project: out += left·right over `depth` <= kDepth, see gemm.simd.h. left is a strip of qᵀ, stored by columns;
  // right lies in rows of kSpan.
  void (*add_projection)(const float* left, int rows, const float* right, int columns, int depth, float* out,
                         int64_t out_stride);
  // Of gram_product. A block of Δ lies in rows of kGramColumns, zeros beyond `columns`; x, y and z in rows of `units`
  // units. y += block·x, z += blockᵀ·y, or without the addition where they are fresh, while `ahead` is prefetched; and
  // the sum of squares. Rows of y and z are written in whole tiles.
  void (*add_image)(const float* block, int rows, const float* x, int units, int columns, bool fresh, float* y,
                    const BlockAhead& ahead);
  void (*add_preimage)(const float* block, int rows, const float* y, int units, int columns, bool fresh, float* z);
  double (*block_energy)(const float* block, int rows);
  // Of gram_matrix, see gram_matrix.simd.h.
  void (*widen_panel)(const float* from, int64_t stride, int rows, int columns, double* to);
  void (*add_panel_gram)(const double* a, const double* b, int depth, double* sum);
};

// low <= high, and the next number after high.
template <class C>
struct ValueBracket {
  C low, high, above_high;
};

// How many of a block's values are at least high, how many of these are above it, and how many, with which positions, are
// from low on below it.
struct BracketSplit {
  int from_high = 0, above_high = 0, between = 0;
  uint16_t positions[kBlock];
};

template <class C>
struct BlockKernels {
  // block[i] = element begin + i of the array; elements from n to the next multiple of kPad are zero.
  void (*load)(const Array& from, int64_t begin, int n, C* block);
  void (*store)(const C* block, int64_t begin, int n, const Array& to);
  int64_t (*count_nonfinite)(const C* block, int n);
  void (*moments)(const C* base, const C* expert, int n, bool half_inputs, C small, Moments<C>& into);
  void (*outliers)(const C* base, const C* expert, int n, bool count_smalls, const Bounds<C>& bounds, Outliers& into);
  // Adds each |d| to its PackedBin, in interleaved copies.
  void (*histogram)(const C* base, const C* expert, int n, uint64_t* bins);
  // Counts keys; those strictly between low and high go to `between` (room for kBlock + kLanes): returns how many.
  int (*bracket)(const C* base, const C* expert, int n, Key<C> low, Key<C> high, Key<C>* between,
                 BracketCounts& counts);
  // merged[i] from base (may be null) and n_experts blocks of kBlock; `experts` is overwritten for rule ties and where
  // there is sparsity. Returns true if the result shows that all inputs are finite; false says nothing.
  bool (*aggregate)(const C* base, C* experts, int n, const Election<C>& election, C* merged);
  // Of low_rank_update, see low_rank_update.simd.h.
  void (*add_update)(const C* left, const C* right, int depth, bool fresh, C* sums, int64_t stride);
  void (*add_scaled)(const C* update, int n, C scale, C* merged);
  // Adds the products of every pair s <= t of n_experts blocks of kBlock, base subtracted where there is one, to that
  // pair's kLanes of `sums`, pairs (0, 0), (0, 1), … first; `experts` is overwritten.
  void (*inner_products)(const C* base, C* experts, int n, int n_experts, double* sums);
  // Adds the sums of expert t, with entry t of `sparsity`.
  void (*kept_sums)(const C* base, const C* expert, int n, const Sparsity<C>& sparsity, int t, KeptSums& into);
  void (*keys)(const C* base, const C* expert, int n, Key<C>* to);
  // Writes the cell of each key, and to below[c], for c up to the number of cells, how many keys are in cells before c.
  // counts: memory for two numbers a cell.
  void (*count_cells)(const Key<C>* keys, int64_t n, const KeyGrid<C>& grid, uint16_t* cells, uint32_t* counts,
                      uint32_t* below);
  // How many of n keys are less than, and how many are equal to key.
  void (*count_keys)(const Key<C>* keys, int64_t n, Key<C> key, int64_t& less, int64_t& equal);
  // to[i] = variance of n_experts blocks of kBlock at i; returns how many of the n are not 0.
  int (*variance)(const C* base, const C* experts, int n, int n_experts, C* to);
  // Sets bit i of mask for values[i] >= bracket.high, for i below n, in whole pairs of bytes, and says how the other
  // values lie to the bracket. Blocks are padded to kLanes.
  void (*split_values)(const C* values, int n, const ValueBracket<C>& bracket, uint8_t* mask, BracketSplit& split);
};

struct MaskKernels {
  // random_bits writes runs of a mask from first_run on, which keeps elements with probability limit/2^32; random_words
  // writes the 32-bit random numbers of such runs.
  void (*random_bits)(uint64_t seed, uint32_t expert, int64_t first_run, int64_t runs, uint64_t limit, uint8_t* mask);
  void (*random_words)(uint64_t seed, uint32_t expert, int64_t first_run, int64_t runs, uint32_t* words);
  // Sets the bits of those of n elements whose word is below the least limit of their cell's range. Writes the indices of
  // the others whose word is below the largest limit to `open` (room for n + kLanes) and returns their number.
  int64_t (*keep_by_range)(const uint16_t* cells, const uint32_t* words, int64_t n, int cells_of_range,
                           const RankLimits& limits, uint8_t* bits, uint32_t* open);
};

struct Kernels {
  const char* isa;
  BlockKernels<float> f32;
  // These read bf16 experts, the most common ones, without a conversion to blocks. n must be a multiple of kPad.
  void (*moments_bf16)(const float* base, const uint16_t* expert, int n, float small, Moments<float>& into);
  void (*outliers_bf16)(const float* base, const uint16_t* expert, int n, bool count_smalls,
                        const Bounds<float>& bounds, Outliers& into);
  // `aggregate` of at most kMostAtOnce experts, where all tensors are bf16; only plain sums may lack a base. Writes n
  // results, n a multiple of kLanes. Returns false if an input may not be finite.
  bool (*aggregate_bf16)(const uint16_t* base, const uint16_t* const* experts, int n, const Election<float>& election,
                         uint16_t* out);
  BlockKernels<double> f64;
  ProductKernels products;
  MaskKernels masks;
  EigenKernels eigen;

  template <class C>
  const BlockKernels<C>& of() const;
};
template <>
inline const BlockKernels<float>& Kernels::of<float>() const {
  return f32;
}
template <>
inline const BlockKernels<double>& Kernels::of<double>() const {
  return f64;
}

// The kernels in use: the best this processor runs, unless `use_isa` chose another.
const Kernels& kernels();
// Names of the instruction sets built in that this processor runs, best first.
int available_isas(const char* names[3]);
// Chooses the kernels, for tests: results must not depend on it. Returns false if the name is not available.
bool use_isa(const char* name);

}  // namespace resm::cpu
