// delta_stats on the GPU: sums in float64, chunk by chunk, added up in a fixed order.
//
// First come sums and histogram of every chunk, then their totals. Outliers and a relative epsilon need the moments: for
// these, a second pair of launches reads the chunks again. The histogram is counted in integers, whose sums have no order.
#include <cmath>

#include "common/histogram.h"
#include "cuda/elements.h"

namespace resm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kMoments = 5;  // sum, sum_sq, sum_abs, max_abs, outlier_sum_abs
constexpr int kCounts = 5;   // zero, small, outlier, nonfinite, numel
constexpr int kFields = 8;   // numbers in a chunk's sums
constexpr int kCopies = 8;   // copies of the histogram, because neighbours that share a bin wait for each other
constexpr const char* kName = "delta_stats";

enum Field { kSum, kSumSq, kSumAbs, kMaxAbs, kZero, kSmall, kNonfinite };          // of the first read
enum OutlierField { kOutlier, kOutlierSumAbs, kRelativelySmall, kOutlierFields };  // of the second

// The arguments of all kernels.
struct Problem {
  Group group;
  DeltaStatsOptions options;
  DeltaStatsResult result;
  DeltaStatsWorkspace workspace;
};

template <class Kind, bool kHistogram>
struct Moments : Problem {
  using C = typename Kind::Compute;
  static constexpr int kThreads = cuda::kThreads, kResident = 2;
  struct Shared {
    double sums[kWarps];
    uint64_t bins[kHistogram ? kHistogramBins * kCopies : 1];
  };

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
      sums.small += size <= options.eps ? 1 : 0;
      if constexpr (kHistogram) {
        const uint32_t key = histogram_key(delta[j]);
        atomic_add(&shared.bins[(key >> 23) * kCopies + thread % kCopies], PackedBin::one(key));
      }
    }
    sums.nonfinite += count_nonfinite(delta);
  }

  template <class Get>
  RESM_DEVICE void write(const Block<kThreads>& block, Shared& shared, double* chunk_sums, Field field, Get get) const {
    PerThread<double, kThreads> values;
    block.each([&](int thread) { values[thread] = get(thread); });
    const double total = sum_of(block, values, shared.sums);
    block.each([&](int thread) {
      if (thread == 0) chunk_sums[field] = total;
    });
  }

  // Adds the block's histogram to that of one expert and row, number `index`.
  RESM_DEVICE void flush(const Block<kThreads>& block, Shared& shared, int64_t index) const {
    block.each([&](int thread) {
      for (int bin = thread; bin < kHistogramBins; bin += kThreads) {
        uint64_t packed = 0;
        for (int copy = 0; copy < kCopies; ++copy) packed += shared.bins[bin * kCopies + copy];
        if (packed == 0) continue;
        const int64_t position = index * kHistogramBins + bin;
        atomic_add(result.bin_counts + position, PackedBin::count(packed));
        atomic_add(workspace.significands + position, int64_t(PackedBin::significands(packed, bin)));
      }
    });
  }

  RESM_DEVICE void operator()(const Block<kThreads>& block, Shared& shared) const {
    const Chunk chunk = chunk_of<Kind>(group, block.index());
    for (int t = 0; t < group.n_experts; ++t) {
      PerThread<Sums, kThreads> sums;
      if constexpr (kHistogram)
        block.each([&](int thread) {
          for (int i = thread; i < kHistogramBins * kCopies; i += kThreads) shared.bins[i] = 0;
        });
      block.each([&](int thread) {
        const auto visit = [&](const auto& delta, int64_t) { add(delta, thread, sums[thread], shared); };
        for_deltas<Kind, kThreads>(chunk, Kind::base(group), Kind::expert(group, t), thread, visit);
      });
      double* chunk_sums = workspace.chunk_sums + (block.index() * group.n_experts + t) * kFields;
      write(block, shared, chunk_sums, kSum, [&](int thread) { return sums[thread].sum; });
      write(block, shared, chunk_sums, kSumSq, [&](int thread) { return sums[thread].sum_sq; });
      write(block, shared, chunk_sums, kSumAbs, [&](int thread) { return sums[thread].sum_abs; });
      write(block, shared, chunk_sums, kZero, [&](int thread) { return double(sums[thread].zero); });
      write(block, shared, chunk_sums, kSmall, [&](int thread) { return double(sums[thread].small); });
      write(block, shared, chunk_sums, kNonfinite, [&](int thread) { return double(sums[thread].nonfinite); });
      PerThread<double, kThreads> largest;
      block.each([&](int thread) { largest[thread] = sums[thread].max_abs; });
      const double most = largest_of(block, largest, shared.sums);
      block.each([&](int thread) {
        if (thread == 0) chunk_sums[kMaxAbs] = most;
      });
      if constexpr (kHistogram) flush(block, shared, t * group.rows + chunk.row);
    }
  }
};

template <class Kind>
struct Outliers : Problem {
  using C = typename Kind::Compute;
  static constexpr int kThreads = cuda::kThreads, kResident = 2;
  struct Shared {
    double sums[kWarps];
  };

  struct Sums {
    double sum_abs = 0;
    int32_t outliers = 0, small = 0;
  };

  RESM_DEVICE void operator()(const Block<kThreads>& block, Shared& shared) const {
    const Chunk chunk = chunk_of<Kind>(group, block.index());
    for (int t = 0; t < group.n_experts; ++t) {
      const double* moments = result.moments + (t * group.rows + chunk.row) * kMoments;
      const double n = static_cast<double>(group.length), mean = moments[kSum] / n, square = moments[kSumSq] / n;
      const double variance = square - mean * mean;
      const double spread = options.kappa * sqrt(variance > 0 ? variance : 0.0);
      const bool counts = options.kappa >= 0;
      const double below = mean - spread, above = mean + spread, relative = options.eps_rel * sqrt(square);
      const double small_up_to = relative > options.eps ? relative : options.eps;
      PerThread<Sums, kThreads> sums;
      block.each([&](int thread) {
        const auto add = [&](const auto& delta, int64_t) {
          for (const C d : delta) {
            const double wide = d, size = bits_as<C>(key_of(d));
            const bool outlier = counts && (wide > above || wide < below);
            sums[thread].outliers += outlier ? 1 : 0;
            sums[thread].small += size <= small_up_to ? 1 : 0;
            sums[thread].sum_abs += outlier ? size : 0.0;
          }
        };
        for_deltas<Kind, kThreads>(chunk, Kind::base(group), Kind::expert(group, t), thread, add);
      });
      double* chunk_sums = workspace.chunk_sums + (block.index() * group.n_experts + t) * kFields;
      PerThread<double, kThreads> values;
      for (int field = 0; field < kOutlierFields; ++field) {
        block.each([&](int thread) {
          const Sums& sum = sums[thread];
          values[thread] = field == kOutlier ? sum.outliers : field == kOutlierSumAbs ? sum.sum_abs : sum.small;
        });
        const double total = sum_of(block, values, shared.sums);
        block.each([&](int thread) {
          if (thread == 0) chunk_sums[field] = total;
        });
      }
    }
  }
};

// A block for each expert and row adds up its chunks' sums.
template <bool kSecond>
struct Totals : Problem {
  static constexpr int kThreads = cuda::kThreads, kResident = 2;
  struct Shared {
    double sums[kWarps];
  };

  // One field of all chunks, added up in an order that depends on their number only; or the largest.
  RESM_DEVICE double total(const Block<kThreads>& block, Shared& shared, int field, bool largest) const {
    const int64_t t = block.index() / group.rows, row = block.index() % group.rows;
    const int64_t n_chunks = (group.length + group.chunk - 1) / group.chunk;
    const double* sums = workspace.chunk_sums + (row * n_chunks * group.n_experts + t) * kFields + field;
    const int64_t stride = group.n_experts * kFields;
    // A maximum passes over NaN.
    if (largest)
      return combined_rows(block, sums, n_chunks, stride, shared.sums,
                           [](double a, double b) { return a > b ? a : b; });
    return combined_rows(block, sums, n_chunks, stride, shared.sums, [](double a, double b) { return a + b; });
  }

  RESM_DEVICE void histogram(const Block<kThreads>& block) const {
    block.each([&](int thread) {
      for (int bin = thread; bin < kHistogramBins; bin += kThreads) {
        const int64_t position = block.index() * kHistogramBins + bin;
        // A float with exponent field e is its 24-bit significand times 2^(e − 150); subnormals share e = 1's scale.
        const double unit = bits_as<double>(uint64_t((bin == 0 ? 1 : bin) - 150 + 1023) << 52);
        const bool special = bin == kHistogramBins - 1 && result.bin_counts[position] != 0;
        result.bin_sums[position] =
            special ? bits_as<double>(kInfinityKey<double>) : double(uint64_t(workspace.significands[position])) * unit;
      }
    });
  }

  RESM_DEVICE void operator()(const Block<kThreads>& block, Shared& shared) const {
    double totals[kFields];
    RESM_UNROLL
    for (int field = 0; field < (kSecond ? int(kOutlierFields) : kFields - 1); ++field)
      totals[field] = total(block, shared, field, !kSecond && field == kMaxAbs);
    double* moments = result.moments + block.index() * kMoments;
    int64_t* counts = result.counts + block.index() * kCounts;
    block.each([&](int thread) {
      if (thread != 0) return;
      if (kSecond) {
        counts[2] = int64_t(totals[kOutlier]);
        moments[4] = totals[kOutlierSumAbs];
        if (options.eps_rel > 0) counts[1] = int64_t(totals[kRelativelySmall]);
        return;
      }
      const bool is_number = totals[kSumAbs] == totals[kSumAbs];  // a maximum passes over NaN
      moments[0] = totals[kSum];
      moments[1] = totals[kSumSq];
      moments[2] = totals[kSumAbs];
      moments[3] = is_number ? totals[kMaxAbs] : totals[kSumAbs];
      counts[0] = int64_t(totals[kZero]);
      counts[1] = int64_t(totals[kSmall]);
      counts[3] = int64_t(totals[kNonfinite]);
      counts[4] = group.length;
    });
    if (!kSecond && result.bin_counts != nullptr) histogram(block);
  }
};

}  // namespace

void delta_stats(const Group& group, const DeltaStatsOptions& options, const DeltaStatsResult& result,
                 const DeltaStatsWorkspace& workspace, Stream stream) {
  const Problem problem{group, options, result, workspace};
  const int64_t blocks = group.blocks(), totals = group.rows * group.n_experts;
  with_dtypes(group, [&](auto kind) {
    using Kind = decltype(kind);
    if (result.bin_counts != nullptr)
      launch(kName, Moments<Kind, true>{problem}, blocks, stream);
    else
      launch(kName, Moments<Kind, false>{problem}, blocks, stream);
    launch(kName, Totals<false>{problem}, totals, stream);
    if (options.kappa < 0 && options.eps_rel <= 0) return;
    launch(kName, Outliers<Kind>{problem}, blocks, stream);
    launch(kName, Totals<true>{problem}, totals, stream);
  });
}

}  // namespace resm::cuda
