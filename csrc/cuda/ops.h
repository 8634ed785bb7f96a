// The CUDA ops: what python/cuda.cpp gives to Python, and what the tests call where they are compiled for the host.
//
// Every argument is an int64_t or a double, so that any foreign function interface calls them: addresses of device
// memory, counts, dtypes as common/dtype.h codes them, flags. All is enqueued on `stream` of the current device, and
// nothing waits. They return null, or the text of what went wrong, which holds until the thread's next call.
//
// `table` is as cuda/table.h describes it, of n_tensors tensors in 2^steps rows, whose chunks of `chunk` elements (a
// multiple of 8) make up `blocks` blocks. All tensors of a launch have the same dtypes; in_double chooses float64
// arithmetic. L is n_tensors, T is n_experts. "Zeroed" memory is zeroed by the caller.
#pragma once

#include <cstdint>

extern "C" {

// Addresses of a tensor: out, base if base_dtype is not -1, experts, a mask of bits for each of them if masked. factors
// (of the deltas), weights (that divisors add up, and that unweighted votes get once they are counted), lower, upper
// (both 0: trim nothing): (L, T) float64. rule, vote: as common/elect.h codes them. nonfinite: (L, 1 + T) int64, zeroed;
// base first.
const char* aggregate_cuda(int64_t table, int64_t n_tensors, int64_t steps, int64_t blocks, int64_t chunk,
                           int64_t n_experts, int64_t base_dtype, int64_t expert_dtype, int64_t out_dtype,
                           int64_t in_double, int64_t factors, int64_t weights, int64_t lower, int64_t upper,
                           int64_t masked, double scale, int64_t rule, int64_t normalize, int64_t vote,
                           double min_divisor, int64_t nonfinite, int64_t stream);

// Addresses of a tensor: base, experts. kappa < 0: no outliers. moments: (L, T, 5) float64 and counts: (L, T, 5) int64,
// zeroed. rows: (blocks, T, 8) float64. bin_counts (0: no histogram), significands: (L, T, 256) int64, zeroed;
// bin_sums: (L, T, 256) float64. chunk < 65536.
const char* delta_stats_cuda(int64_t table, int64_t n_tensors, int64_t steps, int64_t blocks, int64_t chunk,
                             int64_t n_experts, int64_t base_dtype, int64_t expert_dtype, int64_t in_double, double eps,
                             double eps_rel, double kappa, int64_t moments, int64_t counts, int64_t rows,
                             int64_t bin_counts, int64_t significands, int64_t bin_sums, int64_t stream);

// Addresses of a tensor: base, experts, buffer. The buffer has room for length/16 keys (of 4 bytes, 8 in double) of
// every expert, those of expert 0 first. longest: the greatest length. k, nonfinite: (L, T) int64, the latter zeroed;
// thresholds: (L, T) float64. selections: (L, T, 10) int64; frequencies: (L, T, 2048) int64, zeroed.
const char* magnitude_threshold_cuda(int64_t table, int64_t n_tensors, int64_t steps, int64_t blocks, int64_t chunk,
                                     int64_t n_experts, int64_t base_dtype, int64_t expert_dtype, int64_t in_double,
                                     int64_t longest, int64_t k, int64_t selections, int64_t frequencies,
                                     int64_t thresholds, int64_t nonfinite, int64_t stream);

// Addresses of the tensor: base, experts, a mask of bits for each of them if masked. lower, upper (both 0: trim nothing):
// (T,) float64. rows: (blocks, T, 3) float64; moments: (T, 3) float64.
const char* kept_moments_cuda(int64_t table, int64_t n_tensors, int64_t steps, int64_t blocks, int64_t chunk,
                              int64_t n_experts, int64_t base_dtype, int64_t expert_dtype, int64_t in_double,
                              int64_t lower, int64_t upper, int64_t masked, int64_t rows, int64_t moments,
                              int64_t stream);

// Addresses of a tensor: its mask, and its elements' doubled ranks, of rank_bytes (4 or 8) each; none if that is 0.
// Lengths in the table, and chunks, which are multiples of 16, are bytes of masks; length is elements.
const char* random_mask_cuda(int64_t table, int64_t n_tensors, int64_t steps, int64_t blocks, int64_t chunk,
                             int64_t length, int64_t rank_bytes, int64_t seed, int64_t expert, int64_t lowest,
                             int64_t step, int64_t stream);

// variance_mask in two steps. Addresses of the tensor: variances (float32, or float64 if in_double), base, experts.
// nonzero: one int64, zeroed.
const char* variances_cuda(int64_t table, int64_t n_tensors, int64_t steps, int64_t blocks, int64_t chunk,
                           int64_t n_experts, int64_t base_dtype, int64_t expert_dtype, int64_t in_double,
                           int64_t nonzero, int64_t stream);

// Address of the tensor: its mask, whose bytes are the length in the table and chunks. length: of the variances, as
// above; threshold: one float64.
const char* variance_mask_cuda(int64_t table, int64_t n_tensors, int64_t steps, int64_t blocks, int64_t chunk,
                               int64_t length, int64_t in_double, int64_t variances, int64_t threshold,
                               int64_t stream);
}
