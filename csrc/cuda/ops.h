// The CUDA ops as python/module.cpp calls them. Everything is enqueued on the given stream of the current device.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/elect.h"

namespace resm::cuda {

constexpr int kMaxExperts = 64;  // what fits into a kernel's 4 KiB of parameters

struct Array {
  void* data;
  DType dtype;
};

struct Merge {
  Array base;  // data null: no base
  Array out;
  int64_t length;
  int32_t n_experts;
  Rule rule;
  bool normalize, trims;
  double scale, weight_sum;
  Array experts[kMaxExperts];
  double weights[kMaxExperts];
  double thresholds[kMaxExperts];
};
static_assert(sizeof(Merge) <= 4096, "kernel parameters are limited to 4 KiB");

// nonfinite: 1 + n_experts counters on the device, zeroed by the caller; base first. Throws std::runtime_error with
// CUDA's own message if the launch fails.
void aggregate(const Merge& merge, bool in_double, int64_t* nonfinite, uintptr_t stream);

}  // namespace resm::cuda
