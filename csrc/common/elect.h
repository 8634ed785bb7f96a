// The rules of `aggregate` for one element, shared by every native kernel. The order of operations is part of the
// contract: experts in order, one rounding a step, no fused multiply-add.
#pragma once

#include "common/dtype.h"

namespace resm {

enum class Rule : int32_t { sum = 0, ties = 1 };

// What the experts' votes for a sign are: w·δ, δ, or the sign of w·δ.
enum class Vote : int32_t { weighted = 0, unweighted = 1, count = 2 };

// Trim: what lies below the threshold counts as no change. NaN is below everything; callers refuse it elsewhere.
template <class C>
RESM_HD C trim(C delta, C threshold) {
  const C magnitude = delta < C(0) ? -delta : delta;
  return magnitude >= threshold ? delta : C(0);
}

// The same with an upper threshold, above which deltas count as outliers.
template <class C>
RESM_HD C trim(C delta, C lower, C upper) {
  const C magnitude = delta < C(0) ? -delta : delta;
  return (magnitude >= lower) & (magnitude <= upper) ? delta : C(0);
}

template <class C>
RESM_HD C sign_of(C x) {
  return x > C(0) ? C(1) : x < C(0) ? C(-1) : C(0);
}

// What a normalised election divides by.
template <class C>
RESM_HD C divisor_of(C agreeing_weights, C least) {
  const C divisor = agreeing_weights == C(0) ? C(1) : agreeing_weights;
  return divisor < least ? least : divisor;
}

// How one expert takes part, for kernels that go element by element.
template <class C>
struct Share {
  C weight, threshold;
  bool trims;

  // What the expert adds at an element.
  RESM_HD C of(C value, C origin) const {
    const C delta = value - origin;
    return (trims ? trim(delta, threshold) : delta) * weight;
  }
};

// Does a weighted delta have the elected sign? Zero has none. (Select, then compare: loops over this vectorise.)
template <class C>
RESM_HD bool agrees(C weighted, C elected_total) {
  const C towards = elected_total >= C(0) ? weighted : -weighted;
  return towards > C(0);
}

}  // namespace resm
