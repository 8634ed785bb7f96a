// The rules of `aggregate` for one element, shared by every native kernel. The order of operations is part of the
// contract: experts in order, one rounding a step, no fused multiply-add.
#pragma once

#include "common/dtype.h"

namespace resm {

enum class Rule : int32_t { sum = 0, ties = 1 };

// Trim: what lies below the threshold counts as no change. NaN is below everything; callers refuse it elsewhere.
template <class C>
RESM_HD C trim(C delta, C threshold) {
  const C magnitude = delta < C(0) ? -delta : delta;
  return magnitude >= threshold ? delta : C(0);
}

// Does a weighted delta have the elected sign? Zero has none. (Select, then compare: loops over this vectorise.)
template <class C>
RESM_HD bool agrees(C weighted, C elected_total) {
  const C towards = elected_total >= C(0) ? weighted : -weighted;
  return towards > C(0);
}

}  // namespace resm
