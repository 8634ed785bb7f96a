// variance_mask: one pass, in which a sample's bracket of the threshold decides on nearly all elements.
//
// Those whose variances lie in the bracket are decided when all have been seen, for the rank depends on how many are
// not 0. Should the bracket miss, or too much lie in it, variances go to memory, where the threshold is then found
// without a sort. Both ways give the same mask, so that nothing about the sample shows in the result.
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

constexpr int64_t kMostCandidates = 8;             // give the bracket up when more than 1/8 of a tensor lies inside

int64_t rank_of(int64_t nonzero, double density) {
  return static_cast<int64_t>(static_cast<double>(nonzero) * density);
}

template <class C>
class VarianceSelection {
 public:
  VarianceSelection(const Groups& groups, double density, uint8_t* mask, int threads)
      : groups_(groups), density_(density), mask_(mask), threads_(threads), length_(groups.lengths[0]) {
    add_chunks(groups, 0, chunks_);
  }

  void run() {
    if (length_ <= kMostRuns * kRunLength || !select_by_sample()) select_in_memory();
    std::fill(mask_ + ceil_div(length_, 8), mask_ + ceil_div(length_, kRun) * kRunBytes, uint8_t(0));
  }

 private:
  struct Candidate {
    C value;
    int64_t place;
  };
  struct Scratch {
    explicit Scratch(int n_experts) : blocks(n_experts + 2) {}
    Blocks<C> blocks;  // base, variances, then the experts
  };
  struct Found {
    int64_t nonzero = 0, from_high = 0, above_high = 0;
    std::vector<Candidate> candidates;
  };

  // Returns how many are not 0.
  int variance_at(int64_t begin, int n, const Scratch& scratch, C* to) const {
    const auto& kernel = kernels().of<C>();
    kernel.load(*groups_.base(0), begin, n, scratch.blocks[0]);
    for (int t = 0; t < groups_.n_experts; ++t)
      kernel.load(groups_.experts_of(0)[t], begin, n, scratch.blocks[2 + t]);
    return kernel.variance(scratch.blocks[0], scratch.blocks[2], n, groups_.n_experts, to);
  }

  void for_chunks(const std::function<void(const Chunk&, const Scratch&)>& visit) const {
    parallel_for(static_cast<int64_t>(chunks_.size()), threads_, [&] { return Scratch(groups_.n_experts); },
                 [&](int64_t i, Scratch& scratch) { visit(chunks_[i], scratch); });
  }

  // Four standard deviations of the sampled rank on either side; past the sample's ends the bracket stays open.
  ValueBracket<C> bracket() const {
    const Scratch scratch(groups_.n_experts);
    std::vector<C> sample;
    for (int64_t run = 0; run < sample_runs(length_); ++run) {
      const int64_t begin = sampled_run(run, length_);
      variance_at(begin, kRunLength, scratch, scratch.blocks[1]);
      for (int i = 0; i < kRunLength; ++i)
        if (scratch.blocks[1][i] > C(0)) sample.push_back(scratch.blocks[1][i]);
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
    Found all;
    std::mutex adding;
    for_chunks([&](const Chunk& chunk, const Scratch& scratch) {
      Found own;
      for_blocks(chunk, [&](int64_t begin, int n) {
        C* values = scratch.blocks[1];
        own.nonzero += variance_at(begin, n, scratch, values);
        BracketPlaces found;
        uint8_t bits[kBlock / 8];
        kernels().of<C>().split_values(values, n, limits, bits, found);
        std::copy_n(bits, ceil_div(n, 8), mask_ + begin / 8);
        own.from_high += found.from_high;
        own.above_high += found.above_high;
        for (int i = 0; i < found.between; ++i)
          own.candidates.push_back({values[found.places[i]], begin + found.places[i]});
      });
      const std::lock_guard<std::mutex> lock(adding);
      all.nonzero += own.nonzero;
      all.from_high += own.from_high;
      all.above_high += own.above_high;
      if (static_cast<int64_t>(all.candidates.size()) <= most)
        all.candidates.insert(all.candidates.end(), own.candidates.begin(), own.candidates.end());
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
      if (candidate.value >= threshold) mask_[candidate.place / 8] |= static_cast<uint8_t>(1u << candidate.place % 8);
    return true;
  }

  void select_in_memory() {
    const std::unique_ptr<C[]> memory(new C[static_cast<size_t>(length_)]);
    C* const variances = memory.get();
    std::atomic<int64_t> nonzero{0};
    for_chunks([&](const Chunk& chunk, const Scratch& scratch) {
      for_blocks(chunk,
                 [&](int64_t begin, int n) { nonzero += variance_at(begin, n, scratch, variances + begin); });
    });
    const int64_t k = rank_of(nonzero.load(), density_);
    const DType dtype = sizeof(C) == 4 ? DType::f32 : DType::f64;
    double threshold = std::numeric_limits<double>::infinity();
    int64_t nonfinite = 0;  // of the inputs, which the caller sees to
    if (k > 0) magnitude_threshold({{}, {{variances, dtype}}, {length_}, 1}, &k, &threshold, &nonfinite, threads_);
    const auto least = static_cast<C>(threshold);
    for_chunks([&](const Chunk& chunk, const Scratch& scratch) {
      for_blocks(chunk, [&](int64_t begin, int n) {
        kernels().of<C>().load({variances, dtype}, begin, n, scratch.blocks[1]);
        BracketPlaces found;
        uint8_t bits[kBlock / 8];
        kernels().of<C>().split_values(scratch.blocks[1], n, {least, least, least}, bits, found);
        std::copy_n(bits, ceil_div(n, 8), mask_ + begin / 8);
      });
    });
  }

  const Groups& groups_;
  double density_;
  uint8_t* mask_;
  int threads_;
  int64_t length_;
  std::vector<Chunk> chunks_;
};

}  // namespace

void variance_mask(const Groups& groups, double density, uint8_t* mask, int threads) {
  if (groups.is_double(0))
    VarianceSelection<double>(groups, density, mask, threads).run();
  else
    VarianceSelection<float>(groups, density, mask, threads).run();
}

}  // namespace resm::cpu
