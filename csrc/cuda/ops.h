// The CUDA ops: python/cuda.cpp calls them for Python, and the tests compile them for the host.
//
// An op enqueues its kernels on a stream of the current device and waits for nothing. All memory is on that device and
// belongs to the caller; "zeroed" memory must hold zeros. T is the number of experts. A launch that CUDA refuses is a
// std::runtime_error that names the op.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/elect.h"
#include "common/masks.h"

namespace resm::cuda {

using Stream = void*;  // a cudaStream_t: a C++ compiler need not have CUDA's headers

struct Array {
  char* data;  // null where there is none
  DType dtype;
};

// Base and experts of an op: contiguous tensors of one shape, cut into chunks. A block works on one chunk.
struct Group {
  Array base;              // without a base its data is null and its dtype that of the experts
  const int64_t* experts;  // (T,) addresses in device memory
  const int64_t* masks;    // (T,) addresses of masks of bits; null where there are none
  DType expert_dtype;      // the dtype of every expert
  int32_t n_experts;
  bool in_double;  // whether the arithmetic is float64
  bool aligned;    // whether the base, the experts and an output of their shape begin at multiples of 16 bytes
  int64_t rows;    // the op treats each row by itself; 1 where it treats the tensor as a whole
  int64_t length;  // elements of a row
  int64_t chunk;   // elements of a chunk, a multiple of 8

  int64_t chunks_of_row() const { return (length + chunk - 1) / chunk; }
  int64_t blocks() const { return rows * chunks_of_row(); }
};

// An expert's delta counts as 0 where its magnitude is below `lower` or above `upper`. Both are null where no expert has
// thresholds.
struct Thresholds {
  const double *lower, *upper;  // (T,)
};

struct AggregateOptions {
  const double *factors, *divisors;  // (T,): multiply the deltas; are the terms of a normalised merge's divisor
  Thresholds thresholds;
  double scale, min_divisor;
  Rule rule;
  Vote vote;
  bool normalize;
};
struct AggregateResult {
  Array merged;
  int64_t* nonfinite;  // (1 + T,), zeroed: how many values of the base and of each expert are not finite
};
void aggregate(const Group&, const AggregateOptions&, const AggregateResult&, Stream);

struct DeltaStatsOptions {
  double eps, eps_rel, kappa;  // kappa < 0: no outliers
};
struct DeltaStatsResult {
  double* moments;      // (T, rows, 5), zeroed
  int64_t* counts;      // (T, rows, 5), zeroed
  int64_t* bin_counts;  // (T, rows, 256), zeroed; null: no histogram
  double* bin_sums;     // (T, rows, 256)
};
struct DeltaStatsWorkspace {
  double* chunk_sums;     // (blocks, T, 8)
  int64_t* significands;  // (T, rows, 256), zeroed
};
void delta_stats(const Group&, const DeltaStatsOptions&, const DeltaStatsResult&, const DeltaStatsWorkspace&, Stream);

struct ThresholdResult {
  double* thresholds;  // (T,)
  int64_t* nonfinite;  // (T,), zeroed
};
struct ThresholdWorkspace {
  int64_t* selections;   // (T, 10)
  int64_t* frequencies;  // (T, 2048), zeroed
  char* buffer;          // (T, length / 16) keys of 4 bytes, or of 8 in double
};
void magnitude_threshold(const Group&, const int64_t* k, const ThresholdResult&, const ThresholdWorkspace&, Stream);

// moments: (T, 3). chunk_sums, workspace: (blocks, T, 3).
void kept_moments(const Group&, const Thresholds&, double* moments, double* chunk_sums, Stream);

// The mask of one expert of `length` elements.
struct RandomMaskOptions {
  int64_t length;
  uint64_t seed;
  uint32_t expert;
  MaskLaw law;
};
struct Ranks {
  const char* doubled;  // a doubled rank for each element; null where all elements have one probability
  int64_t bytes;        // the size of a rank: 4 or 8
};
void random_mask(const RandomMaskOptions&, const Ranks&, uint8_t* mask, Stream);

// The experts' variances, float32, or float64 in double. nonzero, zeroed, counts those that are not 0.
void variances(const Group&, char* variances, int64_t* nonzero, Stream);
// The mask of the variances that are at least as large as *threshold.
void variance_mask(const Array& variances, int64_t length, const double* threshold, uint8_t* mask, Stream);

}  // namespace resm::cuda
