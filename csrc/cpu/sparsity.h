// What of a group's deltas stays, as the CPU ops get it, and as the kernels do block by block.
#pragma once

#include <limits>
#include <vector>

#include "cpu/kernels.h"

namespace resm::cpu {

// Of L groups of T experts, as python/module.cpp passes it on; null or empty: nothing is left out.
struct SparsityOptions {
  const double *lower = nullptr, *upper = nullptr;  // (L, T)
  std::vector<const uint8_t*> masks;                // L·T
};

// Thresholds in the compute type.
template <class C>
struct Thresholds {
  std::vector<C> lower, upper;

  Thresholds(const SparsityOptions& options, size_t n) {
    if (options.lower == nullptr && options.upper == nullptr) return;
    for (size_t i = 0; i < n; ++i) {
      lower.push_back(options.lower == nullptr ? C(0) : static_cast<C>(options.lower[i]));
      upper.push_back(options.upper == nullptr ? std::numeric_limits<C>::infinity() : static_cast<C>(options.upper[i]));
    }
  }
};

// The sparsity of one group's blocks.
template <class C>
class BlockSparsity {
 public:
  BlockSparsity(const SparsityOptions& options, const Thresholds<C>& limits, int64_t first, int n_experts)
      : options_(options), first_(first), masks_(options.masks.empty() ? 0 : n_experts),
        sparsity_{limits.lower.empty() ? nullptr : limits.lower.data() + first,
                  limits.upper.empty() ? nullptr : limits.upper.data() + first, masks_.empty() ? nullptr : masks_.data()} {}
  BlockSparsity(const BlockSparsity&) = delete;
  BlockSparsity& operator=(const BlockSparsity&) = delete;

  const Sparsity<C>& at(int64_t begin) {
    for (size_t t = 0; t < masks_.size(); ++t) masks_[t] = options_.masks[first_ + t] + begin / 8;
    return sparsity_;
  }

 private:
  const SparsityOptions& options_;
  int64_t first_;
  std::vector<const uint8_t*> masks_;
  Sparsity<C> sparsity_;
};

}  // namespace resm::cpu
