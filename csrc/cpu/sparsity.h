// The thresholds and masks of a sparsification: as ops take them, and as kernels take them for one block.
#pragma once

#include <limits>
#include <vector>

#include "cpu/kernels.h"

namespace resm::cpu {

// Each vector is empty, for no condition, or has an entry for each expert.
struct SparsityOptions {
  std::vector<double> thresholds, upper_thresholds;
  std::vector<const uint8_t*> masks;

  bool any() const { return !thresholds.empty() || !upper_thresholds.empty() || !masks.empty(); }
};

// Both thresholds of every expert in the compute type; empty where no expert has thresholds.
template <class C>
struct Thresholds {
  std::vector<C> lower, upper;

  Thresholds(const SparsityOptions& options, int n_experts) {
    if (options.thresholds.empty() && options.upper_thresholds.empty()) return;
    constexpr C kEnd = std::numeric_limits<C>::infinity();
    for (int t = 0; t < n_experts; ++t) {
      lower.push_back(options.thresholds.empty() ? C(0) : static_cast<C>(options.thresholds[t]));
      upper.push_back(options.upper_thresholds.empty() ? kEnd : static_cast<C>(options.upper_thresholds[t]));
    }
  }
};

// The sparsity of one block after the other.
template <class C>
class BlockSparsity {
 public:
  BlockSparsity(const SparsityOptions& options, const Thresholds<C>& limits)
      : options_(options), masks_(options.masks),
        sparsity_{limits.lower.empty() ? nullptr : limits.lower.data(),
                  limits.upper.empty() ? nullptr : limits.upper.data(), masks_.empty() ? nullptr : masks_.data()} {}
  BlockSparsity(const BlockSparsity&) = delete;
  BlockSparsity& operator=(const BlockSparsity&) = delete;

  const Sparsity<C>& at(int64_t begin) {
    for (size_t t = 0; t < masks_.size(); ++t) masks_[t] = options_.masks[t] + begin / 8;
    return sparsity_;
  }

 private:
  const SparsityOptions& options_;
  std::vector<const uint8_t*> masks_;
  Sparsity<C> sparsity_;
};

}  // namespace resm::cpu
