// Samples of tensors that selections begin with. What they show decides on the way to a result, never on the result.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/key.h"

namespace resm::cpu {

constexpr int kRunLength = 8;      // neighbours taken at each place: they come with the same cache line
constexpr int kMostRuns = 4096;    // places; tensors with fewer elements than these have are not sampled
constexpr int kRunsAtOnce = 128;   // that a task takes

// Smaller tensors do with fewer: what a wider bracket leaves to look at is less there than the sample itself.
inline int64_t sample_runs(int64_t numel) { return std::clamp<int64_t>(numel >> 10, kMostRuns / 16, kMostRuns); }

// Where a run begins: hashed, so that no structure of a tensor meets the sample.
inline int64_t sampled_run(int64_t run, int64_t numel) {
  return static_cast<int64_t>(hash(0x9e3779b97f4a7c15u * (run + 1)) % static_cast<uint64_t>(numel - kRunLength + 1));
}

}  // namespace resm::cpu
