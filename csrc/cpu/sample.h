// Samples of tensors, with which selections begin. Samples change how fast a result is computed, never the result.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/key.h"

namespace resm::cpu {

constexpr int kRunLength = 8;     // neighbours in a run of the sample: they come with the same cache line
constexpr int kMostRuns = 4096;   // runs of a sample; tensors with no more elements than that are not sampled
constexpr int kRunsAtOnce = 128;  // runs that a task takes

// Smaller tensors get fewer runs: there, a wider bracket leaves fewer elements to look at than the sample would have.
inline int64_t sample_runs(int64_t numel) { return std::clamp<int64_t>(numel >> 10, kMostRuns / 16, kMostRuns); }

// The first element of a run. It is hashed, so that the sample does not follow a structure of the tensor.
inline int64_t sampled_run(int64_t run, int64_t numel) {
  return static_cast<int64_t>(hash(0x9e3779b97f4a7c15u * (run + 1)) % static_cast<uint64_t>(numel - kRunLength + 1));
}

}  // namespace resm::cpu
