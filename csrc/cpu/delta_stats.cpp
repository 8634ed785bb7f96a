// delta_stats: one pass over base and experts for the moments, counts and histogram; a second one, where outliers or a
// relative epsilon are asked for, with the bounds that the first pass's moments give.
//
// Each chunk's partial sums are kept per lane and added up in order of lanes and chunks, in double: the result has the
// same bits for any number of threads. The histogram counts in integers, whose sums have no order.
#include <cmath>
#include <limits>
#include <mutex>

#include "cpu/chunks.h"

namespace resm::cpu {
namespace {

// In order of lanes.
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
// An expert for which direct(t, base block, its bf16 values, n) returns true is done with and is not converted.
template <class C, class Direct, class Visit>
void for_deltas(const Groups& groups, const Chunk& chunk, const Blocks<C>& scratch, Direct direct, Visit visit) {
  const auto& k = kernels().of<C>();
  for_blocks(chunk, [&](int64_t begin, int n) {
    k.load(*groups.base(chunk.group), begin, n, scratch[0]);
    for (int t = 0; t < groups.n_experts; ++t) {
      const Array& expert = groups.experts_of(chunk.group)[t];
      if (expert.dtype == DType::bf16 && n % kPad == 0 &&
          direct(t, scratch[0], static_cast<const uint16_t*>(expert.data) + begin, n))
        continue;
      k.load(expert, begin, n, scratch[1]);
      visit(t, scratch[0], scratch[1], n);
    }
  });
}

// The histogram of one expert: integers, so that threads may add to it in any order.
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

struct Scratch {
  Blocks<float> f32{2};
  Blocks<double> f64{2};
  std::vector<uint64_t> packed;

  const Blocks<float>& of(float) const { return f32; }
  const Blocks<double>& of(double) const { return f64; }
};

class Pass {
 public:
  Pass(const Groups& groups, const StatsOptions& options, double* moments, int64_t* counts, int threads)
      : groups_(groups), options_(options), moments_(moments), counts_(counts), threads_(threads) {
    for (int64_t g = 0; g < groups.size(); ++g) add_chunks(groups, g, chunks_);
  }

  void first(int64_t* bin_counts, double* bin_sums) {
    std::vector<ChunkMoments> partial(chunks_.size() * groups_.n_experts);
    const bool histogram = bin_counts != nullptr;
    std::vector<Bins> bins(histogram ? groups_.size() * groups_.n_experts : 0);
    for (auto& b : bins) {
      b.counts.assign(kHistogramBins, 0);
      b.significands.assign(kHistogramBins, 0);
    }
    const auto make = [&] {
      Scratch scratch;
      if (histogram) scratch.packed.assign(groups_.n_experts * kHistogramBins * kHistogramCopies, 0);
      return scratch;
    };
    parallel_for(static_cast<int64_t>(chunks_.size()), threads_, make, [&](int64_t i, Scratch& scratch) {
      ChunkMoments* into = partial.data() + i * groups_.n_experts;
      if (groups_.is_double(chunks_[i].group))
        first_chunk<double>(chunks_[i], scratch, into, bins);
      else
        first_chunk<float>(chunks_[i], scratch, into, bins);
    });
    for (int64_t g = 0; g < groups_.size(); ++g)
      for (int t = 0; t < groups_.n_experts; ++t) {
        double* m = moments_ + row(g, t) * kMoments;
        int64_t* c = counts_ + row(g, t) * kCounts;
        std::fill(m, m + kMoments, 0.0);
        std::fill(c, c + kCounts, int64_t(0));
        c[4] = groups_.lengths[g];
      }
    for (size_t i = 0; i < chunks_.size(); ++i)
      for (int t = 0; t < groups_.n_experts; ++t) add(partial[i * groups_.n_experts + t], row(chunks_[i].group, t));
    if (histogram) write_histogram(bins, bin_counts, bin_sums);
  }

  void second() {
    std::vector<ChunkOutliers> partial(chunks_.size() * groups_.n_experts);
    parallel_for(static_cast<int64_t>(chunks_.size()), threads_, [] { return Scratch(); },
                 [&](int64_t i, Scratch& scratch) {
                   ChunkOutliers* into = partial.data() + i * groups_.n_experts;
                   if (groups_.is_double(chunks_[i].group))
                     second_chunk<double>(chunks_[i], scratch, into);
                   else
                     second_chunk<float>(chunks_[i], scratch, into);
                 });
    const bool count_smalls = options_.eps_rel > 0;
    if (count_smalls)
      for (int64_t i = 0; i < groups_.size() * groups_.n_experts; ++i) counts_[i * kCounts + 1] = 0;
    for (size_t i = 0; i < chunks_.size(); ++i)
      for (int t = 0; t < groups_.n_experts; ++t) {
        const ChunkOutliers& p = partial[i * groups_.n_experts + t];
        const int64_t r = row(chunks_[i].group, t);
        if (count_smalls) counts_[r * kCounts + 1] += p.n_small;
        if (options_.kappa < 0) continue;
        counts_[r * kCounts + 2] += p.n_outlier;
        moments_[r * kMoments + 4] += p.sum_abs;
      }
  }

 private:
  int64_t row(int64_t group, int t) const { return group * groups_.n_experts + t; }

  template <class C>
  void first_chunk(const Chunk& chunk, Scratch& scratch, ChunkMoments* into, std::vector<Bins>& bins) {
    const auto& k = kernels().of<C>();
    const C small = at_most<C>(options_.eps);
    const bool half_base = is_half(groups_.base(chunk.group)->dtype);
    const int64_t pad = padding(chunk);
    const int per_expert = kHistogramBins * kHistogramCopies;
    std::vector<Moments<C>> lanes(groups_.n_experts, Moments<C>{});
    const auto direct = [&](int t, const C* base, const uint16_t* expert, int n) {
      if constexpr (sizeof(C) == 4) {
        if (half_base && bins.empty()) kernels().moments_bf16(base, expert, n, small, lanes[t]);
        return half_base && bins.empty();
      }
      return false;
    };
    for_deltas<C>(groups_, chunk, scratch.of(C()), direct, [&](int t, const C* base, const C* expert, int n) {
      k.moments(base, expert, n, half_base && is_half(groups_.experts_of(chunk.group)[t].dtype), small, lanes[t]);
      if (!bins.empty()) k.histogram(base, expert, n, scratch.packed.data() + t * per_expert);
    });
    for (int t = 0; t < groups_.n_experts; ++t) {
      const Moments<C>& m = lanes[t];
      const double max_abs = *std::max_element(m.max_abs, m.max_abs + kLanes);
      into[t] = {total<double>(m.sum), total<double>(m.sum_sq), total<double>(m.sum_abs), max_abs,
                 total<int64_t>(m.zeros) - pad, total<int64_t>(m.smalls) - pad, m.n_nonfinite};
      if (bins.empty()) continue;
      const std::lock_guard<std::mutex> lock(histogram_);
      bins[row(chunk.group, t)].take(scratch.packed.data() + t * per_expert);
    }
  }

  template <class C>
  void second_chunk(const Chunk& chunk, Scratch& scratch, ChunkOutliers* into) {
    const auto& k = kernels().of<C>();
    const int64_t pad = padding(chunk);
    std::vector<Outliers> lanes(groups_.n_experts, Outliers{});
    std::vector<Bounds<C>> bounds;
    for (int t = 0; t < groups_.n_experts; ++t) bounds.push_back(bounds_of<C>(row(chunk.group, t)));
    const bool count_smalls = options_.eps_rel > 0;
    const auto direct = [&](int t, const C* base, const uint16_t* expert, int n) {
      if constexpr (sizeof(C) == 4) kernels().outliers_bf16(base, expert, n, count_smalls, bounds[t], lanes[t]);
      return sizeof(C) == 4;
    };
    for_deltas<C>(groups_, chunk, scratch.of(C()), direct, [&](int t, const C* base, const C* expert, int n) {
      k.outliers(base, expert, n, count_smalls, bounds[t], lanes[t]);
    });
    for (int t = 0; t < groups_.n_experts; ++t) {
      // The padding's zeros are outliers too where the mean lies that far from zero.
      const bool zero_is_outside = bounds[t].low > 0 || bounds[t].high < 0;
      into[t] = {total<double>(lanes[t].sum_abs),
                 total<int64_t>(lanes[t].found) - (zero_is_outside ? pad : 0),
                 total<int64_t>(lanes[t].smalls) - pad};
    }
  }

  template <class C>
  Bounds<C> bounds_of(int64_t r) const {
    const double* m = moments_ + r * kMoments;
    const double n = static_cast<double>(counts_[r * kCounts + 4]);
    const double mean = m[0] / n;
    const double spread = std::fmax(options_.kappa, 0) * std::sqrt(std::fmax(m[1] / n - mean * mean, 0.0));
    const double small = std::fmax(options_.eps, options_.eps_rel * std::sqrt(m[1] / n));
    return {at_least<C>(mean - spread), at_most<C>(mean + spread), at_most<C>(small)};
  }

  // Comparing with these is the same question in C as comparing with the double.
  template <class C>
  static C at_most(double bound) {
    const C nearest = static_cast<C>(bound);
    return nearest > bound ? std::nextafter(nearest, -std::numeric_limits<C>::infinity()) : nearest;
  }
  template <class C>
  static C at_least(double bound) {
    return -at_most<C>(-bound);
  }

  void add(const ChunkMoments& p, int64_t r) {
    double* m = moments_ + r * kMoments;
    int64_t* c = counts_ + r * kCounts;
    m[0] += p.sum;
    m[1] += p.sum_sq;
    m[2] += p.sum_abs;
    m[3] = std::fmax(m[3], p.max_abs);
    c[0] += p.n_zero;
    c[1] += p.n_small;
    c[3] += p.n_nonfinite;
  }

  void write_histogram(const std::vector<Bins>& bins, int64_t* bin_counts, double* bin_sums) const {
    for (size_t r = 0; r < bins.size(); ++r)
      for (int i = 0; i < kHistogramBins; ++i) {
        bin_counts[r * kHistogramBins + i] = bins[r].counts[i];
        // A float with exponent field e is its 24-bit significand times 2^(e - 150); subnormals share e = 1's scale.
        const double sum = std::ldexp(static_cast<double>(bins[r].significands[i]), std::max(i, 1) - 150);
        const bool special = i == kHistogramBins - 1 && bins[r].counts[i] != 0;
        bin_sums[r * kHistogramBins + i] = special ? std::numeric_limits<double>::infinity() : sum;
      }
  }

  const Groups& groups_;
  const StatsOptions& options_;
  double* moments_;
  int64_t* counts_;
  int threads_;
  std::vector<Chunk> chunks_;
  std::mutex histogram_;
};

}  // namespace

void delta_stats(const Groups& groups, const StatsOptions& options, double* moments, int64_t* counts,
                 int64_t* bin_counts, double* bin_sums, int threads) {
  Pass pass(groups, options, moments, counts, threads);
  pass.first(bin_counts, bin_sums);
  if (options.kappa >= 0 || options.eps_rel > 0) pass.second();
}

}  // namespace resm::cpu
