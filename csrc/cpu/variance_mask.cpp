// variance_mask: one pass, in which a sample's bracket of the threshold decides on nearly all elements.
//
// Elements whose variances lie in the bracket are decided at the end, because the rank depends on the number of variances
// that are not 0. If the bracket misses the threshold, or holds too many variances, all variances are written to memory
// and the threshold is selected there without a sort. Both ways give the same mask: it does not depend on the sample.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>

#include "cpu/chunks.h"
#include "cpu/sample.h"

namespace resm::cpu {
namespace {

constexpr int64_t kMostCandidates = 8;  // give the bracket up when more than 1/8 of a tensor lies inside

int64_t rank_of(int64_t nonzero, double density) {
  return static_cast<int64_t>(static_cast<double>(nonzero) * density);
}

// Bits past the tensor are 0.
void clear_rest(int64_t length, uint8_t* mask) {
  std::fill(mask + ceil_div(length, 8), mask + ceil_div(length, kRun) * kRunBytes, uint8_t(0));
}

template <class C>
void keep_values_from(const Array& values, int64_t length, C least, uint8_t* mask, int threads) {
  const std::vector<Chunk> chunks = chunks_of({{}, {values}, 1, length});
  parallel_for(
      static_cast<int64_t>(chunks.size()), threads, [] { return Blocks<C>(1); },
      [&](int64_t i, const Blocks<C>& blocks) {
        for_blocks(chunks[i], [&](int64_t begin, int n) {
          kernels().of<C>().load(values, begin, n, blocks[0]);
          BracketSplit split;
          uint8_t bits[kBlock / 8];
          kernels().of<C>().split_values(blocks[0], n, {least, least, least}, bits, split);
          std::copy_n(bits, ceil_div(n, 8), mask + begin / 8);
        });
      });
  clear_rest(length, mask);
}

template <class C>
class VarianceSelection {
 public:
  VarianceSelection(const Group& group, double density, uint8_t* mask, int threads)
      : group_(group), density_(density), mask_(mask), threads_(threads), length_(group.numel()),
        chunks_(chunks_of(group)) {}

  void run() {
    if (length_ <= kMostRuns * kRunLength || !select_by_sample()) select_in_memory();
    clear_rest(length_, mask_);
  }

  // Returns how many are not 0. `out` has room for all.
  int64_t write_variances(C* out) const {
    std::atomic<int64_t> nonzero{0};
    for_chunks([&](const Chunk& chunk, const Blocks<C>& blocks) {
      for_blocks(chunk, [&](int64_t begin, int n) {
        nonzero += variance_at(begin, n, blocks, blocks[1]);
        std::copy_n(blocks[1], n, out + begin);
      });
    });
    return nonzero.load();
  }

 private:
  struct Candidate {
    C value;
    int64_t position;
  };
  struct Tally {
    int64_t nonzero = 0, from_high = 0, above_high = 0;
    std::vector<Candidate> candidates;
  };

  // Returns how many are not 0.
  int variance_at(int64_t begin, int n, const Blocks<C>& blocks, C* to) const {
    const auto& kernel = kernels().of<C>();
    kernel.load(*group_.base, begin, n, blocks[0]);
    for (int t = 0; t < group_.n_experts(); ++t) kernel.load(group_.experts[t], begin, n, blocks[2 + t]);
    return kernel.variance(blocks[0], blocks[2], n, group_.n_experts(), to);
  }

  Blocks<C> make_blocks() const { return Blocks<C>(group_.n_experts() + 2); }  // base, variances, then the experts

  void for_chunks(const std::function<void(const Chunk&, const Blocks<C>&)>& visit) const {
    parallel_for(
        static_cast<int64_t>(chunks_.size()), threads_, [&] { return make_blocks(); },
        [&](int64_t i, Blocks<C>& blocks) { visit(chunks_[i], blocks); });
  }

  // Four standard deviations of the sampled rank on either side; past the sample's ends the bracket stays open.
  ValueBracket<C> bracket() const {
    const Blocks<C> blocks = make_blocks();
    std::vector<C> sample;
    for (int64_t run = 0; run < sample_runs(length_); ++run) {
      const int64_t begin = sampled_run(run, length_);
      variance_at(begin, kRunLength, blocks, blocks[1]);
      for (int i = 0; i < kRunLength; ++i)
        if (blocks[1][i] > C(0)) sample.push_back(blocks[1][i]);
    }
    const auto n = static_cast<int64_t>(sample.size());
    const int64_t center = rank_of(n, density_);
    const auto margin = static_cast<int64_t>(4 * std::sqrt(static_cast<double>(n) * density_ * (1 - density_))) + 8;
    std::sort(sample.begin(), sample.end(), std::greater<C>());
    constexpr C kEnd = std::numeric_limits<C>::infinity(), kLeast = std::numeric_limits<C>::denorm_min();
    const C high = center >= margin ? sample[center - margin] : kEnd;
    return {center + margin < n ? sample[center + margin] : kLeast, high, std::nextafter(high, kEnd)};
  }

  // False if the sample does not tell.
  bool select_by_sample() {
    const ValueBracket<C> limits = bracket();
    const int64_t most = length_ / kMostCandidates;
    Tally all;
    std::mutex adding;
    for_chunks([&](const Chunk& chunk, const Blocks<C>& blocks) {
      Tally tally;
      for_blocks(chunk, [&](int64_t begin, int n) {
        C* values = blocks[1];
        tally.nonzero += variance_at(begin, n, blocks, values);
        BracketSplit split;
        uint8_t bits[kBlock / 8];
        kernels().of<C>().split_values(values, n, limits, bits, split);
        std::copy_n(bits, ceil_div(n, 8), mask_ + begin / 8);
        tally.from_high += split.from_high;
        tally.above_high += split.above_high;
        for (int i = 0; i < split.between; ++i)
          tally.candidates.push_back({values[split.positions[i]], begin + split.positions[i]});
      });
      const std::lock_guard<std::mutex> lock(adding);
      all.nonzero += tally.nonzero;
      all.from_high += tally.from_high;
      all.above_high += tally.above_high;
      if (static_cast<int64_t>(all.candidates.size()) <= most)
        all.candidates.insert(all.candidates.end(), tally.candidates.begin(), tally.candidates.end());
    });
    const int64_t k = rank_of(all.nonzero, density_);
    if (k <= all.above_high || static_cast<int64_t>(all.candidates.size()) > most) return false;
    if (k <= all.from_high) return true;
    if (k - all.from_high > static_cast<int64_t>(all.candidates.size())) return false;
    const auto kth = all.candidates.begin() + (k - all.from_high - 1);
    std::nth_element(all.candidates.begin(), kth, all.candidates.end(),
                     [](const Candidate& a, const Candidate& b) { return a.value > b.value; });
    const C threshold = kth->value;
    for (const Candidate& candidate : all.candidates)
      if (candidate.value >= threshold)
        mask_[candidate.position / 8] |= static_cast<uint8_t>(1u << candidate.position % 8);
    return true;
  }

  void select_in_memory() {
    const std::unique_ptr<C[]> memory(new C[static_cast<size_t>(length_)]);
    C* const variances = memory.get();
    const int64_t k = rank_of(write_variances(variances), density_);
    const Array array{.data = variances, .dtype = sizeof(C) == 4 ? DType::f32 : DType::f64};
    double threshold = std::numeric_limits<double>::infinity();
    int64_t nonfinite = 0;  // the caller looks for such inputs
    if (k > 0) magnitude_threshold({{}, {array}, 1, length_}, {k}, {&threshold, &nonfinite}, threads_);
    keep_from(array, length_, threshold, mask_, threads_);
  }

  const Group& group_;
  double density_;
  uint8_t* mask_;
  int threads_;
  int64_t length_;
  std::vector<Chunk> chunks_;
};

}  // namespace

int64_t variances(const Group& group, void* out, int threads) {
  if (group.in_double())
    return VarianceSelection<double>(group, 0, nullptr, threads).write_variances(static_cast<double*>(out));
  return VarianceSelection<float>(group, 0, nullptr, threads).write_variances(static_cast<float*>(out));
}

void keep_from(const Array& variances, int64_t n, double least, uint8_t* mask, int threads) {
  if (variances.dtype == DType::f64)
    keep_values_from<double>(variances, n, least, mask, threads);
  else
    keep_values_from<float>(variances, n, static_cast<float>(least), mask, threads);
}

void variance_mask(const Group& group, double density, uint8_t* mask, int threads) {
  if (group.in_double())
    VarianceSelection<double>(group, density, mask, threads).run();
  else
    VarianceSelection<float>(group, density, mask, threads).run();
}

}  // namespace resm::cpu
