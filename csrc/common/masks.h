// Masks of elements as bits, and the law by which random masks are drawn. resm_kernels/masks.py and
// resm_kernels/reference/random_mask.py are the twins.
#pragma once

#include "common/dtype.h"
#include "common/philox.h"

namespace resm {

// Element i of a flattened tensor is bit i mod 8 of byte i/8. Masks have whole runs; bits past the tensor are 0.
constexpr int kRun = 128;               // elements that 32 counters draw for
constexpr int kRunCounters = kRun / 4;  // word w of counter c of a run is of the run's element 32·w + c
constexpr int kRunBytes = kRun / 8;
constexpr int64_t mask_bytes(int64_t numel) { return (numel + kRun - 1) / kRun * kRunBytes; }

// An element of doubled mean rank m = 2·#{less} + #{equal} − 1 is kept with probability (lowest + step·m)/2^62.
struct MaskLaw {
  uint64_t lowest, step;
  // The element is kept if its 32 random bits are below this number, which is at most 2^32.
  RESM_HD uint64_t limit(uint64_t doubled_rank) const { return (lowest + step * doubled_rank) >> 30; }
};

}  // namespace resm
