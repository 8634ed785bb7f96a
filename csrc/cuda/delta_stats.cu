// delta_stats on the GPU: sums in float64, chunk by chunk, added up in a fixed order.
//
// Sums and histogram of every chunk; their totals; then, of what needs the moments first (outliers, a relative
// epsilon), again both. The histogram is counted in integers, whose sums have no order.
#include <cmath>

#include "common/histogram.h"
#include "cuda/ops.h"
#include "cuda/table.h"

namespace resm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kMoments = 5;  // sum, sum_sq, sum_abs, max_abs, outlier_sum_abs
constexpr int kCounts = 5;   // zero, small, outlier, nonfinite, numel
constexpr int kFields = 8;   // of a chunk's row
constexpr int kCopies = 8;   // of the histogram: neighbours often share a bin, and then wait for each other

enum Field { kSum, kSumSq, kSumAbs, kMaxAbs, kZero, kSmall, kNonfinite };          // of the first read
enum OutlierField { kOutlier, kOutlierSumAbs, kRelativelySmall, kOutlierFields };  // of the second

struct Outcome {
  double* moments;  // (L, T, kMoments)
  int64_t* counts;  // (L, T, kCounts)
  double* rows;     // (blocks, T, kFields)
};

struct Limits {
  double eps, eps_rel, kappa;
};

template <class Kind, bool kHistogram>
struct Moments {
  using C = typename Kind::Compute;
  static constexpr int kThreads = cuda::kThreads, kResident = 2;
  struct Shared {
    double sums[kWarps];
    uint64_t bins[kHistogram ? kHistogramBins * kCopies : 1];
  };

  Table table;
  Kind dtypes;
  int32_t n_experts;
  Limits limits;
  Outcome outcome;
  int64_t *bin_counts, *significands;  // (L, T, kHistogramBins)

  struct Sums {
    double sum = 0, sum_sq = 0, sum_abs = 0;
    C max_abs = 0;
    int32_t zero = 0, small = 0, nonfinite = 0;
  };

  template <int kCount>
  RESM_DEVICE void add(const C (&delta)[kCount], int thread, Sums& sums, Shared& shared) const {
    for (int j = 0; j < kCount; ++j) {
      const C magnitude = bits_as<C>(key_of(delta[j]));
      const double wide = delta[j], size = magnitude;
      sums.sum += wide;
      sums.sum_sq += wide * wide;
      sums.sum_abs += size;
      sums.max_abs = magnitude > sums.max_abs ? magnitude : sums.max_abs;
      sums.zero += delta[j] == C(0) ? 1 : 0;
      sums.small += size <= limits.eps ? 1 : 0;
      if constexpr (kHistogram) {
        const uint32_t key = histogram_key(delta[j]);
        atomic_add(&shared.bins[(key >> 23) * kCopies + thread % kCopies], PackedBin::one(key));
      }
    }
    sums.nonfinite += count_nonfinite(delta);
  }

  template <class Get>
  RESM_DEVICE void write(const Block<kThreads>& block, Shared& shared, double* row, Field field, Get get) const {
    PerThread<double, kThreads> own;
    block.each([&](int thread) { own[thread] = get(thread); });
    const double total = sum_of(block, own, shared.sums);
    block.each([&](int thread) {
      if (thread == 0) row[field] = total;
    });
  }

  RESM_DEVICE void flush(const Block<kThreads>& block, Shared& shared, int64_t at) const {
    block.each([&](int thread) {
      for (int bin = thread; bin < kHistogramBins; bin += kThreads) {
        uint64_t packed = 0;
        for (int copy = 0; copy < kCopies; ++copy) packed += shared.bins[bin * kCopies + copy];
        if (packed == 0) continue;
        atomic_add(bin_counts + at * kHistogramBins + bin, PackedBin::count(packed));
        atomic_add(significands + at * kHistogramBins + bin, int64_t(PackedBin::significands(packed, bin)));
      }
    });
  }

  RESM_DEVICE void operator()(const Block<kThreads>& block, Shared& shared) const {
    const Table::Chunk chunk = table.chunk_of(block.index());
    const int64_t wide_end = Kind::kWide ? chunk.wide_end(1 + n_experts) : chunk.begin;
    const Array base = chunk.array(0, dtypes.base());
    for (int t = 0; t < n_experts; ++t) {
      const Array expert = chunk.array(1 + t, dtypes.expert());
      PerThread<Sums, kThreads> sums;
      if constexpr (kHistogram)
        block.each([&](int thread) {
          for (int i = thread; i < kHistogramBins * kCopies; i += kThreads) shared.bins[i] = 0;
        });
      block.each([&](int thread) {
        for_deltas<Kind, kThreads>(chunk, wide_end, base, expert, thread, [&](const auto& delta, int64_t) {
          add(delta, thread, sums[thread], shared);
        });
      });
      double* row = outcome.rows + (block.index() * n_experts + t) * kFields;
      write(block, shared, row, kSum, [&](int thread) { return sums[thread].sum; });
      write(block, shared, row, kSumSq, [&](int thread) { return sums[thread].sum_sq; });
      write(block, shared, row, kSumAbs, [&](int thread) { return sums[thread].sum_abs; });
      write(block, shared, row, kZero, [&](int thread) { return double(sums[thread].zero); });
      write(block, shared, row, kSmall, [&](int thread) { return double(sums[thread].small); });
      write(block, shared, row, kNonfinite, [&](int thread) { return double(sums[thread].nonfinite); });
      PerThread<double, kThreads> largest;
      block.each([&](int thread) { largest[thread] = sums[thread].max_abs; });
      const double most = largest_of(block, largest, shared.sums);
      block.each([&](int thread) {
        if (thread == 0) row[kMaxAbs] = most;
      });
      if constexpr (kHistogram) flush(block, shared, chunk.tensor * n_experts + t);
    }
  }
};

template <class Kind>
struct Outliers {
  using C = typename Kind::Compute;
  static constexpr int kThreads = cuda::kThreads, kResident = 2;
  struct Shared {
    double sums[kWarps];
  };

  Table table;
  Kind dtypes;
  int32_t n_experts;
  Limits limits;
  Outcome outcome;

  struct Sums {
    double sum_abs = 0;
    int32_t found = 0, small = 0;
  };

  RESM_DEVICE void operator()(const Block<kThreads>& block, Shared& shared) const {
    const Table::Chunk chunk = table.chunk_of(block.index());
    const int64_t wide_end = Kind::kWide ? chunk.wide_end(1 + n_experts) : chunk.begin;
    const Array base = chunk.array(0, dtypes.base());
    for (int t = 0; t < n_experts; ++t) {
      const Array expert = chunk.array(1 + t, dtypes.expert());
      const double* moments = outcome.moments + (chunk.tensor * n_experts + t) * kMoments;
      const double n = static_cast<double>(chunk.length), mean = moments[kSum] / n, square = moments[kSumSq] / n;
      const double variance = square - mean * mean;
      const double spread = limits.kappa * sqrt(variance > 0 ? variance : 0.0);
      const bool counts = limits.kappa >= 0;
      const double below = mean - spread, above = mean + spread, relative = limits.eps_rel * sqrt(square);
      const double small_up_to = relative > limits.eps ? relative : limits.eps;
      PerThread<Sums, kThreads> sums;
      block.each([&](int thread) {
        for_deltas<Kind, kThreads>(chunk, wide_end, base, expert, thread, [&](const auto& delta, int64_t) {
          for (const C d : delta) {
            const double wide = d, size = bits_as<C>(key_of(d));
            const bool outlier = counts && (wide > above || wide < below);
            sums[thread].found += outlier ? 1 : 0;
            sums[thread].small += size <= small_up_to ? 1 : 0;
            sums[thread].sum_abs += outlier ? size : 0.0;
          }
        });
      });
      double* row = outcome.rows + (block.index() * n_experts + t) * kFields;
      PerThread<double, kThreads> own;
      for (int field = 0; field < kOutlierFields; ++field) {
        block.each([&](int thread) {
          const Sums& of = sums[thread];
          own[thread] = field == kOutlier ? of.found : field == kOutlierSumAbs ? of.sum_abs : of.small;
        });
        const double total = sum_of(block, own, shared.sums);
        block.each([&](int thread) {
          if (thread == 0) row[field] = total;
        });
      }
    }
  }
};

// A block for each tensor and expert: the totals of its chunks' rows.
template <bool kSecond>
struct Totals {
  static constexpr int kThreads = cuda::kThreads, kResident = 2;
  struct Shared {
    double sums[kWarps];
  };

  Table table;
  int32_t n_experts;
  Limits limits;
  Outcome outcome;
  const int64_t *bin_counts, *significands;
  double* bin_sums;

  // One field of all chunks, added up in an order that depends on their number only; or the largest.
  RESM_DEVICE double total(const Block<kThreads>& block, Shared& shared, int field, bool largest) const {
    const int64_t tensor = block.index() / n_experts, t = block.index() % n_experts;
    const int64_t n_chunks = (table.length(tensor) + table.chunk - 1) / table.chunk;
    const double* rows = outcome.rows + (table.entries[tensor] * n_experts + t) * kFields + field;
    const int64_t stride = n_experts * kFields;
    // The largest passes over NaN.
    if (largest)
      return combined_rows(block, rows, n_chunks, stride, shared.sums, [](double a, double b) { return a > b ? a : b; });
    return combined_rows(block, rows, n_chunks, stride, shared.sums, [](double a, double b) { return a + b; });
  }

  RESM_DEVICE void histogram(const Block<kThreads>& block) const {
    block.each([&](int thread) {
      for (int bin = thread; bin < kHistogramBins; bin += kThreads) {
        const int64_t at = block.index() * kHistogramBins + bin;
        // A float with exponent field e is its 24-bit significand times 2^(e − 150); subnormals share e = 1's scale.
        const double unit = bits_as<double>(uint64_t((bin == 0 ? 1 : bin) - 150 + 1023) << 52);
        const bool special = bin == kHistogramBins - 1 && bin_counts[at] != 0;
        bin_sums[at] = special ? bits_as<double>(kInfinityKey<double>) : double(uint64_t(significands[at])) * unit;
      }
    });
  }

  RESM_DEVICE void operator()(const Block<kThreads>& block, Shared& shared) const {
    double found[kFields];
    RESM_UNROLL
    for (int field = 0; field < (kSecond ? int(kOutlierFields) : kFields - 1); ++field)
      found[field] = total(block, shared, field, !kSecond && field == kMaxAbs);
    double* moments = outcome.moments + block.index() * kMoments;
    int64_t* counts = outcome.counts + block.index() * kCounts;
    block.each([&](int thread) {
      if (thread != 0) return;
      if (kSecond) {
        counts[2] = int64_t(found[kOutlier]);
        moments[4] = found[kOutlierSumAbs];
        if (limits.eps_rel > 0) counts[1] = int64_t(found[kRelativelySmall]);
        return;
      }
      const bool is_number = found[kSumAbs] == found[kSumAbs];  // the largest passes over NaN
      moments[0] = found[kSum];
      moments[1] = found[kSumSq];
      moments[2] = found[kSumAbs];
      moments[3] = is_number ? found[kMaxAbs] : found[kSumAbs];
      counts[0] = int64_t(found[kZero]);
      counts[1] = int64_t(found[kSmall]);
      counts[3] = int64_t(found[kNonfinite]);
      counts[4] = table.length(block.index() / n_experts);
    });
    if (!kSecond && bin_sums != nullptr) histogram(block);
  }
};

}  // namespace
}  // namespace resm::cuda

const char* delta_stats_cuda(int64_t table, int64_t n_tensors, int64_t steps, int64_t blocks, int64_t chunk,
                             int64_t n_experts, int64_t base_dtype, int64_t expert_dtype, int64_t in_double, double eps,
                             double eps_rel, double kappa, int64_t moments, int64_t counts, int64_t rows,
                             int64_t bin_counts, int64_t significands, int64_t bin_sums, int64_t stream) {
  using namespace resm;
  using namespace resm::cuda;
  constexpr const char* kName = "delta_stats";
  const auto experts = static_cast<int32_t>(n_experts);
  const Table tensors{reinterpret_cast<const int64_t*>(table), n_tensors, static_cast<int32_t>(steps), 1 + experts,
                      chunk};
  const Outcome outcome{reinterpret_cast<double*>(moments), reinterpret_cast<int64_t*>(counts),
                        reinterpret_cast<double*>(rows)};
  const Limits limits{eps, eps_rel, kappa};
  auto* const bins = reinterpret_cast<int64_t*>(bin_counts);
  auto* const integers = reinterpret_cast<int64_t*>(significands);
  const auto totals = [&](auto second) {
    const Totals<decltype(second)::value> kernel{tensors, experts, limits, outcome, bins, integers,
                                                 reinterpret_cast<double*>(bin_sums)};
    return launch(kName, kernel, n_tensors * n_experts, stream);
  };
  return with_dtypes(base_dtype, expert_dtype, in_double != 0, [&](auto dtypes) -> const char* {
    using Kind = decltype(dtypes);
    const auto first = [&](auto histogram) {
      const Moments<Kind, decltype(histogram)::value> kernel{tensors, dtypes, experts, limits, outcome, bins, integers};
      return launch(kName, kernel, blocks, stream);
    };
    const char* error = bin_counts != 0 ? first(std::true_type()) : first(std::false_type());
    if (error == nullptr) error = totals(std::false_type());
    if (error != nullptr || (kappa < 0 && eps_rel <= 0)) return error;
    error = launch(kName, Outliers<Kind>{tensors, dtypes, experts, limits, outcome}, blocks, stream);
    return error != nullptr ? error : totals(std::true_type());
  });
}
