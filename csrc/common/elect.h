// The rules of `aggregate` for one element, shared by every native kernel. The order of operations is part of the
// contract: experts in order, one rounding a step, no fused multiply-add.
#pragma once

#include "common/dtype.h"

namespace resm {

enum class Rule : int32_t { sum = 0, ties = 1 };

// What the experts' votes for a sign are: w·r·δ, r·δ, or the sign of w·r·δ.
enum class Vote : int32_t { weighted = 0, unweighted = 1, count = 2 };

// Trim: what lies below the lower threshold, or above the upper one, counts as no change. NaN is below everything;
// callers refuse it elsewhere.
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

// What thresholds, if it trims, and the bit of a mask leave of a delta.
template <class C>
struct Trim {
  C lower, upper;
  bool trims;

  RESM_HD C of(C delta, bool kept) const { return kept ? (trims ? trim(delta, lower, upper) : delta) : C(0); }
};

// One expert's term at an element, for kernels that go element by element: what stays of its delta, times its factor.
template <class C>
struct Term {
  C factor;
  Trim<C> stays;

  RESM_HD C of(C value, C origin, bool kept) const { return stays.of(value - origin, kept) * factor; }
};

// What a term adds to the votes for a sign.
template <class C>
RESM_HD C vote_of(C term, Vote vote) {
  return vote == Vote::count ? sign_of(term) : term;
}

// What a term whose vote was for the elected sign adds to the result: unweighted votes get their weight only now.
template <class C>
RESM_HD C elected_term(C term, C weight, Vote vote) {
  return vote == Vote::unweighted ? term * weight : term;
}

// Does a term have the elected sign? Zero has none. (Select, then compare: loops over this vectorise.)
template <class C>
RESM_HD bool agrees(C term, C votes) {
  const C towards = votes >= C(0) ? term : -term;
  return towards > C(0);
}

}  // namespace resm
