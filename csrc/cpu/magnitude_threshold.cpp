// magnitude_threshold: the exact k-th largest |d| without a sort.
//
// |d| is compared by its bit pattern, an integer in the same order (its key). A fixed sample brackets the answer
// between two of its order statistics. One pass over all experts counts the keys above the bracket and at its ends (where
// most of the many ties of half-precision weights are) and collects the keys strictly between the ends, a percent or
// two, among which the answer is selected. If the bracket misses the answer, or holds too many keys, histograms of the
// whole tensor give the answer digit by digit, exactly for any input, in three reads. Both ways give the same number: it
// does not depend on the sample. Counts have no order, so that a tensor may come in parts (MagnitudeSelection).
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

// The search for a rank that is still open: the digits that are known, and the histogram of the next one.
template <class C>
struct OpenRank {
  Key<C> prefix = 0;
  int64_t rank = 0;
  std::vector<int64_t> histogram;  // empty: the rank is not open
};

template <class C>
class Selection : public MagnitudeSelection {
 public:
  Selection(int n_experts, int64_t most, int threads)
      : n_experts_(n_experts), most_(most), threads_(threads), samples_(n_experts), tallies_(n_experts),
        open_(n_experts), answers_(n_experts) {}

  // Samples a whole tensor.
  void sample(const Group& group) {
    const int64_t numel = group.numel(), runs = sample_runs(numel);
    for (auto& sample : samples_) sample.resize(runs * kRunLength);
    const auto take = [&](int64_t run, SelectionBlocks<C>& memory) {
      const int64_t begin = sampled_run(run, numel);
      for_deltas(group, {0, begin, begin + kRunLength}, memory, [&](int t, const C* base, const C* expert, int n) {
        for (int i = 0; i < n; ++i) samples_[t][run * kRunLength + i] = key_of(C(expert[i] - base[i]));
      });
    };
    parallel_for(
        ceil_div(runs, kRunsAtOnce), threads_, [] { return SelectionBlocks<C>(); },
        [&](int64_t task, SelectionBlocks<C>& memory) {
          const int64_t last = std::min(runs, (task + 1) * kRunsAtOnce);
          for (int64_t run = task * kRunsAtOnce; run < last; ++run) take(run, memory);
        });
  }

  void add_sample(const Group& part) override {
    SelectionBlocks<C> memory;
    for (const Chunk& chunk : chunks_of(part))
      for_deltas(part, chunk, memory, [&](int t, const C* base, const C* expert, int n) {
        for (int i = 0; i < n; ++i) samples_[t].push_back(key_of(C(expert[i] - base[i])));
      });
  }

  void narrow(const std::vector<double>& shares) override {
    parallel_for(
        n_experts_, threads_, [] { return 0; },
        [&](int64_t t, int) { narrow(samples_[t], shares[t], static_cast<int>(t)); });
    std::vector<std::vector<Key<C>>>(n_experts_).swap(samples_);
  }

  void count(const Group& part) override {
    const std::vector<Chunk> chunks = chunks_of(part);
    parallel_for(
        static_cast<int64_t>(chunks.size()), threads_, [] { return SelectionBlocks<C>(); },
        [&](int64_t i, SelectionBlocks<C>& memory) {
          std::vector<Tally<C>> chunk_tallies(n_experts_);
          for_deltas(part, chunks[i], memory, [&](int t, const C* base, const C* expert, int n) {
            Tally<C>& tally = chunk_tallies[t];
            const int between = kernels().of<C>().bracket(base, expert, n, tallies_[t].low, tallies_[t].high,
                                                          memory.between.data(), tally.counts);
            tally.between.insert(tally.between.end(), memory.between.begin(), memory.between.begin() + between);
          });
          const std::lock_guard<std::mutex> lock(adding_);
          for (int t = 0; t < n_experts_; ++t) add(chunk_tallies[t], tallies_[t]);
        });
  }

  int64_t nonfinite(int t) const override { return tallies_[t].counts.nonfinite; }

  bool select(const std::vector<int64_t>& k) override {
    for (int t = 0; t < n_experts_; ++t) select(k[t], t);
    shift_ = kKeyBits<C>;
    return !begin_digit();
  }

  void count_digit(const Group& part) override {
    const std::vector<Chunk> chunks = chunks_of(part);
    const Key<C> mask = (Key<C>(1) << bits_) - 1;
    parallel_for(
        static_cast<int64_t>(chunks.size()), threads_, [] { return SelectionBlocks<C>(); },
        [&](int64_t i, SelectionBlocks<C>& memory) {
          std::vector<std::vector<int32_t>> counts(n_experts_);
          for_deltas(part, chunks[i], memory, [&](int t, const C* base, const C* expert, int n) {
            counts[t].resize(open_[t].histogram.size(), 0);
            if (counts[t].empty()) return;
            for (int j = 0; j < n; ++j) {
              const Key<C> key = key_of(C(expert[j] - base[j]));
              if (has_prefix<C>(key, open_[t].prefix, shift_, bits_)) ++counts[t][(key >> shift_) & mask];
            }
          });
          const std::lock_guard<std::mutex> lock(adding_);
          for (int t = 0; t < n_experts_; ++t)
            for (size_t d = 0; d < counts[t].size(); ++d) open_[t].histogram[d] += counts[t][d];
        });
  }

  bool end_digit() override {
    for (int t = 0; t < n_experts_; ++t) {
      OpenRank<C>& open = open_[t];
      if (open.histogram.empty()) continue;
      open.prefix = take_digit<C>(open.histogram, open.prefix, shift_, open.rank);
      if (shift_ > 0) continue;
      answers_[t] = value_of(open.prefix);
      open.histogram.clear();
    }
    return !begin_digit();
  }

  std::vector<double> thresholds() const override { return answers_; }

 private:
  static double value_of(Key<C> key) { return static_cast<double>(bits_as<C>(key)); }

  // Calls visit(t, base block, expert block, n) for the chunk's blocks and all experts.
  template <class Visit>
  static void for_deltas(const Group& group, const Chunk& chunk, SelectionBlocks<C>& memory, Visit visit) {
    const auto& kernel = kernels().of<C>();
    for_blocks(chunk, [&](int64_t begin, int n) {
      if (group.base)
        kernel.load(*group.base, begin, n, memory.blocks[0]);
      else
        std::fill_n(memory.blocks[0], kBlock, C(0));
      const std::vector<Array>& experts = group.experts;
      for (int t = 0; t < group.n_experts(); ++t) {
        // Callers ask for two ranks of one expert by passing it as two experts.
        if (t == 0 || experts[t].data != experts[t - 1].data || experts[t].dtype != experts[t - 1].dtype)
          kernel.load(experts[t], begin, n, memory.blocks[1]);
        visit(t, memory.blocks[0], memory.blocks[1], n);
      }
    });
  }

  // Four standard deviations of the sampled rank on either side; past the sample's ends the bracket stays open.
  void narrow(const std::vector<Key<C>>& sample, double share, int t) {
    const auto n = static_cast<int64_t>(sample.size());
    const double deviation = std::sqrt(static_cast<double>(n) * share * (1 - share));
    const auto center = static_cast<int64_t>(share * static_cast<double>(n));
    const auto margin = static_cast<int64_t>(4 * deviation) + 8;
    if (center - margin >= 0) tallies_[t].high = select_among<C>(sample, center - margin + 1);
    if (center + margin < n) tallies_[t].low = select_among<C>(sample, center + margin + 1);
  }

  void add(const Tally<C>& chunk_tally, Tally<C>& into) const {
    into.counts.above_high += chunk_tally.counts.above_high;
    into.counts.from_high += chunk_tally.counts.from_high;
    into.counts.above_low += chunk_tally.counts.above_low;
    into.counts.from_low += chunk_tally.counts.from_low;
    into.counts.nonfinite += chunk_tally.counts.nonfinite;
    if (into.overflowed) return;
    if (static_cast<int64_t>(into.between.size() + chunk_tally.between.size()) <= most_) {
      // A vector that grows takes up to three times the memory of its elements.
      if (into.between.empty() && !chunk_tally.between.empty()) into.between.reserve(static_cast<size_t>(most_));
      into.between.insert(into.between.end(), chunk_tally.between.begin(), chunk_tally.between.end());
      return;
    }
    into.overflowed = true;
    std::vector<Key<C>>().swap(into.between);
  }

  void select(int64_t rank, int t) {
    const Tally<C>& tally = tallies_[t];
    const BracketCounts& c = tally.counts;
    const bool inside = c.above_high < rank && rank <= c.from_low;
    if (rank == 0)
      answers_[t] = std::numeric_limits<double>::infinity();
    else if (inside && rank <= c.from_high)
      answers_[t] = value_of(tally.high);
    else if (inside && rank > c.above_low)
      answers_[t] = value_of(tally.low);
    else if (inside && !tally.overflowed)
      answers_[t] = value_of(select_among<C>(tally.between, rank - c.from_high));
    else
      open_[t] = {0, rank, std::vector<int64_t>(1)};
  }

  // Prepares to count the next digit of the ranks that are open; false if none is.
  bool begin_digit() {
    bits_ = std::min(kDigitBits, shift_);
    shift_ -= bits_;
    bool any = false;
    for (OpenRank<C>& open : open_) {
      if (open.histogram.empty()) continue;
      open.histogram.assign(size_t(1) << bits_, 0);
      any = true;
    }
    return any;
  }

  int n_experts_;
  int64_t most_;
  int threads_, shift_ = 0, bits_ = 0;
  std::vector<std::vector<Key<C>>> samples_;
  std::vector<Tally<C>> tallies_;
  std::vector<OpenRank<C>> open_;
  std::vector<double> answers_;
  std::mutex adding_;
};

template <class C>
void select_whole(const Group& group, const std::vector<int64_t>& k, const ThresholdResult& result, int threads) {
  const int64_t numel = group.numel();
  Selection<C> selection(group.n_experts(), std::max<int64_t>(numel / kMostCandidates, kMostRuns * kRunLength),
                         threads);
  if (numel > kMostRuns * kRunLength) {
    std::vector<double> shares;
    for (const int64_t rank : k) shares.push_back(static_cast<double>(rank) / static_cast<double>(numel));
    selection.sample(group);
    selection.narrow(shares);
  }
  selection.count(group);
  for (bool known = selection.select(k); !known; known = selection.end_digit()) selection.count_digit(group);
  const std::vector<double> thresholds = selection.thresholds();
  for (int t = 0; t < group.n_experts(); ++t) {
    result.nonfinite[t] = selection.nonfinite(t);
    result.thresholds[t] = thresholds[t];
  }
}

}  // namespace

std::unique_ptr<MagnitudeSelection> MagnitudeSelection::make(int n_experts, bool in_double, int64_t most, int threads) {
  if (in_double) return std::make_unique<Selection<double>>(n_experts, most, threads);
  return std::make_unique<Selection<float>>(n_experts, most, threads);
}

void magnitude_threshold(const Group& group, const std::vector<int64_t>& k, const ThresholdResult& result,
                         int threads) {
  if (group.in_double())
    select_whole<double>(group, k, result, threads);
  else
    select_whole<float>(group, k, result, threads);
}

}  // namespace resm::cpu
