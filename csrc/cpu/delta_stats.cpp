// delta_stats: one pass over base and experts for the moments, counts and histogram. Outliers and a relative epsilon need
// a second pass, with bounds from the first pass's moments.
//
// Each chunk has partial sums for every lane, which are added up in double, in the order of lanes and chunks: the result
// has the same bits for any number of threads. The histogram counts in integers, whose sums have no order.
#include <cmath>
#include <limits>
#include <mutex>

#include "cpu/chunks.h"

namespace resm::cpu {
namespace {

// The sum of all lanes, in their order.
template <class Sum, class Lane>
Sum total(const Lane* lanes) {
  Sum sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
}

// Zeros that fill up a chunk's last block.
int64_t padding(const Chunk& chunk) { return (kPad - (chunk.end - chunk.begin) % kPad) % kPad; }

bool is_half(DType dtype) { return item_size(dtype) == 2; }

// What a chunk adds to the statistics of one expert.
struct ChunkMoments {
  double sum, sum_sq, sum_abs, max_abs;
  int64_t n_zero, n_small, n_nonfinite;
};
struct ChunkOutliers {
  double sum_abs;
  int64_t n_outlier, n_small;
};

// Calls visit(t, base block, expert block, n) for every block and expert of a chunk; base is read and converted once.
// Where direct(t, base block, bf16 values of the expert, n) returns true, that block of the expert needs no conversion
// and no visit.
template <class C, class Direct, class Visit>
void for_deltas(const Group& group, const Chunk& chunk, const Blocks<C>& blocks, Direct direct, Visit visit) {
  const auto& k = kernels().of<C>();
  for_blocks(chunk, [&](int64_t begin, int n) {
    k.load(*group.base, begin, n, blocks[0]);
    for (int t = 0; t < group.n_experts(); ++t) {
      const Array& expert = group.experts[t];
      if (expert.dtype == DType::bf16 && n % kPad == 0 &&
          direct(t, blocks[0], static_cast<const uint16_t*>(expert.data) + begin, n))
        continue;
      k.load(expert, begin, n, blocks[1]);
      visit(t, blocks[0], blocks[1], n);
    }
  });
}

// The histogram of one expert's row: integers, so that threads may add to it in any order.
struct Bins {
  std::vector<int64_t> counts;
  std::vector<uint64_t> significands;

  // Empties a chunk's packed counters.
  void take(uint64_t* packed) {
    for (int i = 0; i < kHistogramBins * kHistogramCopies; ++i) {
      const int bin = i / kHistogramCopies;
      counts[bin] += PackedBin::count(packed[i]);
      significands[bin] += PackedBin::significands(packed[i], bin);
      packed[i] = 0;
    }
  }
};

template <class C>
struct StatsBlocks {
  Blocks<C> blocks{2};  // base, expert
  std::vector<uint64_t> packed;
};

// The statistics of every expert and row, both passes.
template <class C>
class Statistics {
 public:
  Statistics(const Group& group, const DeltaStatsOptions& options, const DeltaStatsResult& result, int threads)
      : group_(group), options_(options), result_(result), threads_(threads), n_experts_(group.n_experts()),
        chunks_(chunks_of(group)) {}

  void first_pass() {
    std::vector<ChunkMoments> partial(chunks_.size() * n_experts_);
    const bool histogram = result_.bin_counts != nullptr;
    std::vector<Bins> bins(histogram ? n_experts_ * group_.rows : 0);
    for (auto& b : bins) {
      b.counts.assign(kHistogramBins, 0);
      b.significands.assign(kHistogramBins, 0);
    }
    const auto make = [&] {
      StatsBlocks<C> memory;
      if (histogram) memory.packed.assign(n_experts_ * kHistogramBins * kHistogramCopies, 0);
      return memory;
    };
    parallel_for(static_cast<int64_t>(chunks_.size()), threads_, make, [&](int64_t i, StatsBlocks<C>& memory) {
      add_moments(chunks_[i], memory, partial.data() + i * n_experts_, bins);
    });
    for (int64_t r = 0; r < n_experts_ * group_.rows; ++r) {
      std::fill_n(result_.moments + r * kMoments, kMoments, 0.0);
      std::fill_n(result_.counts + r * kCounts, kCounts, int64_t(0));
      result_.counts[r * kCounts + 4] = group_.length;
    }
    for (size_t i = 0; i < chunks_.size(); ++i)
      for (int t = 0; t < n_experts_; ++t) add(partial[i * n_experts_ + t], position(t, chunks_[i].row));
    if (histogram) write_histogram(bins);
  }

  void second_pass() {
    std::vector<ChunkOutliers> partial(chunks_.size() * n_experts_);
    parallel_for(
        static_cast<int64_t>(chunks_.size()), threads_, [] { return StatsBlocks<C>(); },
        [&](int64_t i, StatsBlocks<C>& memory) { add_outliers(chunks_[i], memory, partial.data() + i * n_experts_); });
    const bool count_smalls = options_.eps_rel > 0;
    if (count_smalls)
      for (int64_t r = 0; r < n_experts_ * group_.rows; ++r) result_.counts[r * kCounts + 1] = 0;
    for (size_t i = 0; i < chunks_.size(); ++i)
      for (int t = 0; t < n_experts_; ++t) {
        const ChunkOutliers& p = partial[i * n_experts_ + t];
        const int64_t r = position(t, chunks_[i].row);
        if (count_smalls) result_.counts[r * kCounts + 1] += p.n_small;
        if (options_.kappa < 0) continue;
        result_.counts[r * kCounts + 2] += p.n_outlier;
        result_.moments[r * kMoments + 4] += p.sum_abs;
      }
  }

 private:
  // The position of an expert's row in the results.
  int64_t position(int t, int64_t row) const { return t * group_.rows + row; }

  void add_moments(const Chunk& chunk, StatsBlocks<C>& memory, ChunkMoments* into, std::vector<Bins>& bins) {
    const auto& k = kernels().of<C>();
    const C small = at_most(options_.eps);
    const bool half_base = is_half(group_.base->dtype);
    const int64_t pad = padding(chunk);
    const int per_expert = kHistogramBins * kHistogramCopies;
    std::vector<Moments<C>> lanes(n_experts_, Moments<C>{});
    const auto direct = [&](int t, const C* base, const uint16_t* expert, int n) {
      if constexpr (sizeof(C) == 4) {
        if (half_base && bins.empty()) kernels().moments_bf16(base, expert, n, small, lanes[t]);
        return half_base && bins.empty();
      }
      return false;
    };
    for_deltas<C>(group_, chunk, memory.blocks, direct, [&](int t, const C* base, const C* expert, int n) {
      k.moments(base, expert, n, half_base && is_half(group_.experts[t].dtype), small, lanes[t]);
      if (!bins.empty()) k.histogram(base, expert, n, memory.packed.data() + t * per_expert);
    });
    for (int t = 0; t < n_experts_; ++t) {
      const Moments<C>& m = lanes[t];
      const double max_abs = *std::max_element(m.max_abs, m.max_abs + kLanes);
      into[t] = {total<double>(m.sum),
                 total<double>(m.sum_sq),
                 total<double>(m.sum_abs),
                 max_abs,
                 total<int64_t>(m.zeros) - pad,
                 total<int64_t>(m.smalls) - pad,
                 m.n_nonfinite};
      if (bins.empty()) continue;
      const std::lock_guard<std::mutex> lock(histogram_);
      bins[position(t, chunk.row)].take(memory.packed.data() + t * per_expert);
    }
  }

  void add_outliers(const Chunk& chunk, StatsBlocks<C>& memory, ChunkOutliers* into) {
    const auto& k = kernels().of<C>();
    const int64_t pad = padding(chunk);
    std::vector<Outliers> lanes(n_experts_, Outliers{});
    std::vector<Bounds<C>> bounds;
    for (int t = 0; t < n_experts_; ++t) bounds.push_back(bounds_of(position(t, chunk.row)));
    const bool count_smalls = options_.eps_rel > 0;
    const auto direct = [&](int t, const C* base, const uint16_t* expert, int n) {
      if constexpr (sizeof(C) == 4) kernels().outliers_bf16(base, expert, n, count_smalls, bounds[t], lanes[t]);
      return sizeof(C) == 4;
    };
    for_deltas<C>(group_, chunk, memory.blocks, direct, [&](int t, const C* base, const C* expert, int n) {
      k.outliers(base, expert, n, count_smalls, bounds[t], lanes[t]);
    });
    for (int t = 0; t < n_experts_; ++t) {
      // The zeros of the padding are outliers too where the mean is far enough from zero.
      const bool zero_is_outside = bounds[t].low > 0 || bounds[t].high < 0;
      into[t] = {total<double>(lanes[t].sum_abs), total<int64_t>(lanes[t].outliers) - (zero_is_outside ? pad : 0),
                 total<int64_t>(lanes[t].smalls) - pad};
    }
  }

  Bounds<C> bounds_of(int64_t r) const {
    const double* m = result_.moments + r * kMoments;
    const double n = static_cast<double>(group_.length);
    const double mean = m[0] / n;
    const double spread = std::fmax(options_.kappa, 0) * std::sqrt(std::fmax(m[1] / n - mean * mean, 0.0));
    const double small = std::fmax(options_.eps, options_.eps_rel * std::sqrt(m[1] / n));
    return {at_least(mean - spread), at_most(mean + spread), at_most(small)};
  }

  // Comparing a C with these bounds gives the same answer as comparing it with the doubles.
  static C at_most(double bound) {
    const C nearest = static_cast<C>(bound);
    return nearest > bound ? std::nextafter(nearest, -std::numeric_limits<C>::infinity()) : nearest;
  }
  static C at_least(double bound) { return -at_most(-bound); }

  void add(const ChunkMoments& p, int64_t r) {
    double* m = result_.moments + r * kMoments;
    int64_t* c = result_.counts + r * kCounts;
    m[0] += p.sum;
    m[1] += p.sum_sq;
    m[2] += p.sum_abs;
    m[3] = std::fmax(m[3], p.max_abs);
    c[0] += p.n_zero;
    c[1] += p.n_small;
    c[3] += p.n_nonfinite;
  }

  void write_histogram(const std::vector<Bins>& bins) const {
    for (size_t r = 0; r < bins.size(); ++r)
      for (int i = 0; i < kHistogramBins; ++i) {
        result_.bin_counts[r * kHistogramBins + i] = bins[r].counts[i];
        // A float with exponent field e is its 24-bit significand times 2^(e - 150); subnormals share e = 1's scale.
        const double sum = std::ldexp(static_cast<double>(bins[r].significands[i]), std::max(i, 1) - 150);
        const bool special = i == kHistogramBins - 1 && bins[r].counts[i] != 0;
        result_.bin_sums[r * kHistogramBins + i] = special ? std::numeric_limits<double>::infinity() : sum;
      }
  }

  const Group& group_;
  const DeltaStatsOptions& options_;
  const DeltaStatsResult& result_;
  int threads_, n_experts_;
  std::vector<Chunk> chunks_;
  std::mutex histogram_;
};

template <class C>
void run(const Group& group, const DeltaStatsOptions& options, const DeltaStatsResult& result, int threads) {
  Statistics<C> statistics(group, options, result, threads);
  statistics.first_pass();
  if (options.kappa >= 0 || options.eps_rel > 0) statistics.second_pass();
}

}  // namespace

void delta_stats(const Group& group, const DeltaStatsOptions& options, const DeltaStatsResult& result, int threads) {
  if (group.in_double())
    run<double>(group, options, result, threads);
  else
    run<float>(group, options, result, threads);
}

}  // namespace resm::cpu
