// magnitude_threshold: the exact k-th largest |d| without a sort.
//
// |d| is compared by its bit pattern, an integer in the same order (its key). A fixed sample brackets the answer
// between two of its order statistics. One pass over all experts counts the keys above the bracket and at its ends (where
// most of the many ties of half-precision weights are) and collects the keys strictly between the ends, a percent or
// two, among which the answer is selected. If the bracket misses the answer, or holds too many keys, histograms of the
// whole tensor give the answer digit by digit, exactly for any input, in three reads. Both ways give the same number: it
// does not depend on the sample.
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

// The rank-th largest key (from 1), digit by digit. count(shift, bits, prefix, histogram) makes the histogram of the
// `bits` bits from `shift` on, over the keys whose higher bits equal the prefix.
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

// What a pass collects about one expert's keys: how they lie to the bracket low … high, and those between its ends.
template <class C>
struct Tally {
  Key<C> low = 0, high = std::numeric_limits<Key<C>>::max();
  BracketCounts counts;
  std::vector<Key<C>> between;
  bool overflowed = false;
};

template <class C>
struct SelectionBlocks {
  Blocks<C> blocks{2};  // base, expert
  std::vector<Key<C>> between = std::vector<Key<C>>(kBlock + kLanes);
};

template <class C>
class Selection {
 public:
  Selection(const Group& group, const std::vector<int64_t>& k, int threads)
      : group_(group), k_(k), threads_(threads), n_experts_(group.n_experts()), numel_(group.numel()),
        tallies_(n_experts_), chunks_(chunks_of(group)) {}

  void run(const ThresholdResult& result) {
    if (numel_ > kMostRuns * kRunLength) bracket_by_sample();
    pass();
    for (int t = 0; t < n_experts_; ++t) {
      result.nonfinite[t] = tallies_[t].counts.nonfinite;
      result.thresholds[t] = k_[t] == 0 ? std::numeric_limits<double>::infinity() : value_of(select(t));
    }
  }

 private:
  static double value_of(Key<C> key) { return static_cast<double>(bits_as<C>(key)); }

  // Calls visit(t, base block, expert block, n) for the chunk's blocks and the experts first … last.
  template <class Visit>
  void for_deltas(const Chunk& chunk, int first, int last, SelectionBlocks<C>& memory, Visit visit) const {
    const auto& kernel = kernels().of<C>();
    for_blocks(chunk, [&](int64_t begin, int n) {
      if (group_.base)
        kernel.load(*group_.base, begin, n, memory.blocks[0]);
      else
        std::fill_n(memory.blocks[0], kBlock, C(0));
      const std::vector<Array>& experts = group_.experts;
      for (int t = first; t < last; ++t) {
        // Callers ask for two ranks of one expert by passing it as two experts.
        if (t == first || experts[t].data != experts[t - 1].data || experts[t].dtype != experts[t - 1].dtype)
          kernel.load(experts[t], begin, n, memory.blocks[1]);
        visit(t, memory.blocks[0], memory.blocks[1], n);
      }
    });
  }

  void bracket_by_sample() {
    const int64_t runs = sample_runs(numel_);
    std::vector<std::vector<Key<C>>> samples(n_experts_, std::vector<Key<C>>(runs * kRunLength));
    const auto take = [&](int64_t run, SelectionBlocks<C>& memory) {
      const int64_t begin = sampled_run(run, numel_);
      for_deltas({0, begin, begin + kRunLength}, 0, n_experts_, memory,
                 [&](int t, const C* base, const C* expert, int n) {
                   for (int i = 0; i < n; ++i) samples[t][run * kRunLength + i] = key_of(C(expert[i] - base[i]));
                 });
    };
    parallel_for(
        ceil_div(runs, kRunsAtOnce), threads_, [] { return SelectionBlocks<C>(); },
        [&](int64_t task, SelectionBlocks<C>& memory) {
          const int64_t last = std::min(runs, (task + 1) * kRunsAtOnce);
          for (int64_t run = task * kRunsAtOnce; run < last; ++run) take(run, memory);
        });
    parallel_for(
        n_experts_, threads_, [] { return 0; }, [&](int64_t t, int) { narrow(samples[t], static_cast<int>(t)); });
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
    parallel_for(
        static_cast<int64_t>(chunks_.size()), threads_, [] { return SelectionBlocks<C>(); },
        [&](int64_t i, SelectionBlocks<C>& memory) {
          std::vector<Tally<C>> chunk_tallies(n_experts_);
          for_deltas(chunks_[i], 0, n_experts_, memory, [&](int t, const C* base, const C* expert, int n) {
            Tally<C>& tally = chunk_tallies[t];
            const int between = kernels().of<C>().bracket(base, expert, n, tallies_[t].low, tallies_[t].high,
                                                          memory.between.data(), tally.counts);
            tally.between.insert(tally.between.end(), memory.between.begin(), memory.between.begin() + between);
          });
          const std::lock_guard<std::mutex> lock(adding_);
          for (int t = 0; t < n_experts_; ++t) add(chunk_tallies[t], tallies_[t], limit);
        });
  }

  static void add(const Tally<C>& chunk_tally, Tally<C>& into, int64_t limit) {
    into.counts.above_high += chunk_tally.counts.above_high;
    into.counts.from_high += chunk_tally.counts.from_high;
    into.counts.above_low += chunk_tally.counts.above_low;
    into.counts.from_low += chunk_tally.counts.from_low;
    into.counts.nonfinite += chunk_tally.counts.nonfinite;
    if (into.overflowed) return;
    into.between.insert(into.between.end(), chunk_tally.between.begin(), chunk_tally.between.end());
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
      parallel_for(
          static_cast<int64_t>(chunks_.size()), threads_, [] { return SelectionBlocks<C>(); },
          [&](int64_t i, SelectionBlocks<C>& memory) {
            std::vector<int32_t> counts(histogram.size(), 0);
            for_deltas(chunks_[i], t, t + 1, memory, [&](int, const C* base, const C* expert, int n) {
              for (int j = 0; j < n; ++j) {
                const Key<C> key = key_of(C(expert[j] - base[j]));
                if (has_prefix<C>(key, prefix, shift, bits)) ++counts[(key >> shift) & mask];
              }
            });
            const std::lock_guard<std::mutex> lock(adding_);
            for (size_t d = 0; d < counts.size(); ++d) histogram[d] += counts[d];
          });
    });
  }

  const Group& group_;
  const std::vector<int64_t>& k_;
  int threads_, n_experts_;
  int64_t numel_;
  std::vector<Tally<C>> tallies_;
  std::vector<Chunk> chunks_;
  std::mutex adding_;
};

}  // namespace

void magnitude_threshold(const Group& group, const std::vector<int64_t>& k, const ThresholdResult& result,
                         int threads) {
  if (group.in_double())
    Selection<double>(group, k, threads).run(result);
  else
    Selection<float>(group, k, threads).run(result);
}

}  // namespace resm::cpu
