// magnitude_threshold: the exact k-th largest |d| without a sort.
//
// |d| is compared by its bit pattern, an integer in the same order (its key). A fixed sample brackets the answer
// between two of its order statistics; one pass over all experts counts what lies above and at the bracket's ends (where
// the many ties of half-precision weights mostly are) and collects what lies strictly between them, a percent or two;
// the rest is decided among the collected. Should the bracket miss, or too much lie in it, the key is found digit by
// digit from histograms over the whole tensor: exact for any input, three reads. Both ways give the same number, so
// nothing about the sample shows in the result.
#include <algorithm>
#include <cmath>
#include <limits>
#include <mutex>

#include "cpu/chunks.h"
#include "cpu/sample.h"

namespace resm::cpu {
namespace {

constexpr int kDigitBits = 11;
constexpr int64_t kMostCandidates = 8;  // give the bracket up when more than 1/8 of a tensor lies inside

// Narrows `prefix` by the digit that holds the rank-th largest of the keys counted in `histogram`; rank becomes the
// rank within that digit.
template <class C>
Key<C> take_digit(const std::vector<int64_t>& histogram, Key<C> prefix, int shift, int64_t& rank) {
  int64_t digit = static_cast<int64_t>(histogram.size()) - 1;
  for (; digit > 0 && histogram[digit] < rank; --digit) rank -= histogram[digit];
  return prefix | (static_cast<Key<C>>(digit) << shift);
}

// The rank-th largest key (from 1), digit by digit. count(shift, bits, prefix, histogram) counts, by the `bits` bits
// from `shift` on, the keys whose higher bits are those of the prefix.
template <class C, class Count>
Key<C> radix_select(int64_t rank, Count count) {
  Key<C> prefix = 0;
  for (int shift = kKeyBits<C>; shift > 0;) {
    const int bits = std::min(kDigitBits, shift);
    shift -= bits;
    std::vector<int64_t> histogram(size_t(1) << bits, 0);
    count(shift, bits, prefix, histogram);
    prefix = take_digit<C>(histogram, prefix, shift, rank);
  }
  return prefix;
}

template <class C>
bool has_prefix(Key<C> key, Key<C> prefix, int shift, int bits) {
  return shift + bits == kKeyBits<C> || (key >> (shift + bits)) == (prefix >> (shift + bits));
}

template <class C>
Key<C> select_among(const std::vector<Key<C>>& keys, int64_t rank) {
  return radix_select<C>(rank, [&](int shift, int bits, Key<C> prefix, std::vector<int64_t>& histogram) {
    const Key<C> mask = (Key<C>(1) << bits) - 1;
    for (Key<C> key : keys)
      if (has_prefix<C>(key, prefix, shift, bits)) ++histogram[(key >> shift) & mask];
  });
}

// What the pass collects for one expert.
template <class C>
struct Tally {
  Key<C> low = 0, high = std::numeric_limits<Key<C>>::max();
  BracketCounts counts;
  std::vector<Key<C>> between;
  bool overflowed = false;
};

template <class C>
struct Scratch {
  Blocks<C> blocks{2};
  std::vector<Key<C>> found = std::vector<Key<C>>(kBlock + kLanes);
};

template <class C>
class Selection {
 public:
  Selection(const Groups& groups, int64_t group, const int64_t* k, int threads)
      : groups_(groups), group_(group), k_(k), threads_(threads), numel_(groups.lengths[group]),
        tallies_(groups.n_experts) {
    add_chunks(groups, group, chunks_);
  }

  void run(double* thresholds, int64_t* nonfinite) {
    if (numel_ > kMostRuns * kRunLength) bracket_by_sample();
    pass();
    for (int t = 0; t < groups_.n_experts; ++t) {
      nonfinite[t] = tallies_[t].counts.nonfinite;
      thresholds[t] = k_[t] == 0 ? std::numeric_limits<double>::infinity() : value_of(select(t));
    }
  }

 private:
  static double value_of(Key<C> key) { return static_cast<double>(bits_as<C>(key)); }

  // Calls visit(t, base block, expert block, n, scratch) for the chunk's blocks.
  template <class Visit>
  void for_deltas(const Chunk& chunk, int first, int last, Scratch<C>& scratch, Visit visit) const {
    const auto& kernel = kernels().of<C>();
    for_blocks(chunk, [&](int64_t begin, int n) {
      if (const Array* base = groups_.base(group_))
        kernel.load(*base, begin, n, scratch.blocks[0]);
      else
        std::fill_n(scratch.blocks[0], kBlock, C(0));
      const Array* experts = groups_.experts_of(group_);
      for (int t = first; t < last; ++t) {
        // Two ranks of one expert are asked for as two experts that are the same.
        if (t == first || experts[t].data != experts[t - 1].data || experts[t].dtype != experts[t - 1].dtype)
          kernel.load(experts[t], begin, n, scratch.blocks[1]);
        visit(t, scratch.blocks[0], scratch.blocks[1], n);
      }
    });
  }

  void bracket_by_sample() {
    const int64_t runs = sample_runs(numel_);
    std::vector<std::vector<Key<C>>> samples(groups_.n_experts, std::vector<Key<C>>(runs * kRunLength));
    const auto take = [&](int64_t run, Scratch<C>& scratch) {
      const int64_t begin = sampled_run(run, numel_);
      for_deltas({group_, begin, begin + kRunLength}, 0, groups_.n_experts, scratch,
                 [&](int t, const C* base, const C* expert, int n) {
                   for (int i = 0; i < n; ++i) samples[t][run * kRunLength + i] = key_of(C(expert[i] - base[i]));
                 });
    };
    parallel_for(ceil_div(runs, kRunsAtOnce), threads_, [] { return Scratch<C>(); },
                 [&](int64_t task, Scratch<C>& scratch) {
                   const int64_t last = std::min(runs, (task + 1) * kRunsAtOnce);
                   for (int64_t run = task * kRunsAtOnce; run < last; ++run) take(run, scratch);
                 });
    parallel_for(groups_.n_experts, threads_, [] { return 0; },
                 [&](int64_t t, int) { narrow(samples[t], static_cast<int>(t)); });
  }

  // Four standard deviations of the sampled rank on either side; past the sample's ends the bracket stays open.
  void narrow(const std::vector<Key<C>>& sample, int t) {
    const auto n = static_cast<int64_t>(sample.size());
    const double share = static_cast<double>(k_[t]) / static_cast<double>(numel_);
    const double deviation = std::sqrt(static_cast<double>(n) * share * (1 - share));
    const auto center = static_cast<int64_t>(share * static_cast<double>(n));
    const auto margin = static_cast<int64_t>(4 * deviation) + 8;
    if (center - margin >= 0) tallies_[t].high = select_among<C>(sample, center - margin + 1);
    if (center + margin < n) tallies_[t].low = select_among<C>(sample, center + margin + 1);
  }

  void pass() {
    const int64_t limit = std::max<int64_t>(numel_ / kMostCandidates, kMostRuns * kRunLength);
    parallel_for(static_cast<int64_t>(chunks_.size()), threads_, [] { return Scratch<C>(); },
                 [&](int64_t i, Scratch<C>& scratch) {
                   std::vector<Tally<C>> own(groups_.n_experts);
                   for_deltas(chunks_[i], 0, groups_.n_experts, scratch,
                              [&](int t, const C* base, const C* expert, int n) {
                                const int found = kernels().of<C>().bracket(
                                    base, expert, n, tallies_[t].low, tallies_[t].high, scratch.found.data(),
                                    own[t].counts);
                                own[t].between.insert(own[t].between.end(), scratch.found.begin(),
                                                      scratch.found.begin() + found);
                              });
                   const std::lock_guard<std::mutex> lock(adding_);
                   for (int t = 0; t < groups_.n_experts; ++t) add(own[t], tallies_[t], limit);
                 });
  }

  static void add(const Tally<C>& own, Tally<C>& into, int64_t limit) {
    into.counts.above_high += own.counts.above_high;
    into.counts.from_high += own.counts.from_high;
    into.counts.above_low += own.counts.above_low;
    into.counts.from_low += own.counts.from_low;
    into.counts.nonfinite += own.counts.nonfinite;
    if (into.overflowed) return;
    into.between.insert(into.between.end(), own.between.begin(), own.between.end());
    if (static_cast<int64_t>(into.between.size()) <= limit) return;
    into.overflowed = true;
    std::vector<Key<C>>().swap(into.between);
  }

  Key<C> select(int t) {
    const Tally<C>& tally = tallies_[t];
    const BracketCounts& c = tally.counts;
    const int64_t rank = k_[t];
    const bool inside = c.above_high < rank && rank <= c.from_low;
    if (inside && rank <= c.from_high) return tally.high;
    if (inside && rank > c.above_low) return tally.low;
    if (inside && !tally.overflowed) return select_among<C>(tally.between, rank - c.from_high);
    return select_from_all(t);
  }

  Key<C> select_from_all(int t) {
    return radix_select<C>(k_[t], [&](int shift, int bits, Key<C> prefix, std::vector<int64_t>& histogram) {
      const Key<C> mask = (Key<C>(1) << bits) - 1;
      parallel_for(static_cast<int64_t>(chunks_.size()), threads_, [] { return Scratch<C>(); },
                   [&](int64_t i, Scratch<C>& scratch) {
                     std::vector<int32_t> own(histogram.size(), 0);
                     for_deltas(chunks_[i], t, t + 1, scratch, [&](int, const C* base, const C* expert, int n) {
                       for (int j = 0; j < n; ++j) {
                         const Key<C> key = key_of(C(expert[j] - base[j]));
                         if (has_prefix<C>(key, prefix, shift, bits)) ++own[(key >> shift) & mask];
                       }
                     });
                     const std::lock_guard<std::mutex> lock(adding_);
                     for (size_t d = 0; d < own.size(); ++d) histogram[d] += own[d];
                   });
    });
  }

  const Groups& groups_;
  int64_t group_;
  const int64_t* k_;
  int threads_;
  int64_t numel_;
  std::vector<Tally<C>> tallies_;
  std::vector<Chunk> chunks_;
  std::mutex adding_;
};

}  // namespace

void magnitude_threshold(const Groups& groups, const int64_t* k, double* thresholds, int64_t* nonfinite, int threads) {
  for (int64_t g = 0; g < groups.size(); ++g) {
    const int64_t at = g * groups.n_experts;
    if (groups.is_double(g))
      Selection<double>(groups, g, k + at, threads).run(thresholds + at, nonfinite + at);
    else
      Selection<float>(groups, g, k + at, threads).run(thresholds + at, nonfinite + at);
  }
}

}  // namespace resm::cpu
