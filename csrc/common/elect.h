// The rules of `aggregate` for one element, shared by every native kernel. The order of operations is part of the
// contract: experts in order, one rounding a step, no fused multiply-add.
#pragma once

#include "common/dtype.h"

namespace resm {

enum class Rule : int32_t { sum = 0, ties = 1 };

// The experts' votes for a sign: w·r·δ, or r·δ.
enum class Vote : int32_t { weighted = 0, unweighted = 1 };

// A delta whose magnitude is below the lower threshold or above the upper one counts as no change. NaN is below
// everything; callers refuse it elsewhere.
template <class C>
RESM_HD C trim(C delta, C lower, C upper) {
  const C magnitude = delta < C(0) ? -delta : delta;
  return ((magnitude >= lower) & (magnitude <= upper)) ? delta : C(0);
}

// The divisor of a normalised election.
template <class C>
RESM_HD C divisor_of(C agreeing_weights, C least) {
  const C divisor = agreeing_weights == C(0) ? C(1) : agreeing_weights;
  return divisor < least ? least : divisor;
}

// Thresholds of a delta, if it `trims`, and the bit of a mask say whether it is kept or counts as no change.
template <class C>
struct Trim {
  C lower, upper;
  bool trims;

  RESM_HD C of(C delta, bool kept) const { return kept ? (trims ? trim(delta, lower, upper) : delta) : C(0); }
};

// One expert's term at an element, for kernels that go element by element: its kept delta times its factor.
template <class C>
struct Term {
  C factor;
  Trim<C> sparsity;

  RESM_HD C of(C value, C base, bool kept) const { return sparsity.of(value - base, kept) * factor; }
};

// The value that a term adds to the result if its vote was for the elected sign: unweighted votes get their weight only
// now.
template <class C>
RESM_HD C elected_term(C term, C weight, Vote vote) {
  return vote == Vote::unweighted ? term * weight : term;
}

// Whether a term has the elected sign. Zero has none. (Loops vectorise because this selects before it compares.)
template <class C>
RESM_HD bool agrees(C term, C votes) {
  const C towards = votes >= C(0) ? term : -term;
  return towards > C(0);
}

}  // namespace resm
