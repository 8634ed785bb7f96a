// Inner loops of aggregate.
#pragma once

namespace resm::cpu::RESM_ISA {

// total += Σ w_t·Δ_t over kCount experts in their order, in registers.
template <int kCount, bool kHasBase, class C>
void add_weighted(const C* __restrict base, const C* __restrict experts, int n, const C* weights, C* __restrict total) {
  for (int i = 0; i < n; ++i) {
    C sum = total[i];
    for (int t = 0; t < kCount; ++t) {
      const C value = experts[t * kBlock + i];
      sum = sum + (kHasBase ? value - base[i] : value) * weights[t];
    }
    total[i] = sum;
  }
}

template <bool kHasBase, class C>
void add_all_weighted(const C* base, const C* experts, int n, const Election<C>& election, C* total) {
  int t = 0;
  for (; t + 4 <= election.n_experts; t += 4)
    add_weighted<4, kHasBase>(base, experts + t * kBlock, n, election.factors + t, total);
  const C *rest = experts + t * kBlock, *weights = election.factors + t;
  if (election.n_experts - t == 3) return add_weighted<3, kHasBase>(base, rest, n, weights, total);
  if (election.n_experts - t == 2) return add_weighted<2, kHasBase>(base, rest, n, weights, total);
  if (election.n_experts - t == 1) add_weighted<1, kHasBase>(base, rest, n, weights, total);
}

// Turns an expert's values, in place, into its kept deltas times its factor, and adds them to total.
template <bool kHasBase, bool kTrims, bool kMasks, class C>
void weigh(const C* __restrict base, C* __restrict expert, int n, const Election<C>& election, int t,
           C* __restrict total) {
  const C factor = election.factors[t];
  const C lower = kTrims ? election.sparsity.lower[t] : C(0), upper = kTrims ? election.sparsity.upper[t] : C(0);
  // Blocks are padded: the last lanes hold zeros.
  for (int begin = 0; begin < n; begin += kLanes) {
    Lanes<C> value = Lanes<C>::load(expert + begin);
    if (kHasBase) value = value.minus(Lanes<C>::load(base + begin));
    if (kTrims) value = trimmed(value, lower, upper);
    if (kMasks) value = masked(value, mask_of_lanes(election.sparsity.masks[t] + begin / 8));
    value = value.times(Lanes<C>::all(factor));
    value.store(expert + begin);
    Lanes<C>::load(total + begin).plus(value).store(total + begin);
  }
}

template <bool kHasBase, class C>
void weigh_all(const C* base, C* experts, int n, const Election<C>& election, C* total) {
  const bool masks = election.sparsity.masks != nullptr;
  const auto step = election.sparsity.trims()
                        ? (masks ? weigh<kHasBase, true, true, C> : weigh<kHasBase, true, false, C>)
                        : (masks ? weigh<kHasBase, false, true, C> : weigh<kHasBase, false, false, C>);
  for (int t = 0; t < election.n_experts; ++t) step(base, experts + t * kBlock, n, election, t, total);
}

// kUnweighted: the weights are not in the experts' values yet.
template <bool kUnweighted, class C>
void elect(const C* __restrict experts, int n, const Election<C>& election, C* __restrict total,
           C* __restrict divisor) {
  C agreeing[kBlock];
  for (int i = 0; i < n; ++i) {
    agreeing[i] = C(-0.0);  // a weight may make −0.0 of the first value that agrees
    divisor[i] = C(0);
  }
  for (int t = 0; t < election.n_experts; ++t) {
    const C* __restrict values = experts + t * kBlock;
    const C weight = election.weights[t];
    for (int i = 0; i < n; ++i) {
      const bool counts = agrees(values[i], total[i]);
      const C weighted = kUnweighted ? values[i] * weight : values[i];
      agreeing[i] = agreeing[i] + (counts ? weighted : C(0));
      divisor[i] = divisor[i] + (counts ? weight : C(0));
    }
  }
  for (int i = 0; i < n; ++i) {
    total[i] = agreeing[i];
    divisor[i] = divisor_of(divisor[i], election.min_divisor);
  }
}

// The forms that merge_bf16 is compiled for, each for several numbers of experts.
enum class Form { model_sum, delta_sum, sparse_sum, weighted_vote, unweighted_vote };

// The same operations in the same order as the loops over blocks, in registers from the inputs to the output; kCount 0
// is any number up to kMostAtOnce, whose terms wait in the first-level cache.
template <int kCount, Form kForm>
bool merge_bf16(const uint16_t* base, const uint16_t* const* experts, int n, const Election<float>& election,
                uint16_t* out) {
  using L = Lanes<float>;
  const int count = kCount > 0 ? kCount : election.n_experts;
  constexpr bool kHasBase = kForm != Form::model_sum, kTies = kForm >= Form::weighted_vote;
  const bool trims = election.sparsity.trims(), masks = election.sparsity.masks != nullptr;
  const bool shows = !kTies && kForm != Form::sparse_sum;  // the sum shows whether its terms are finite
  const L zero = L::all(0.0f), one = L::all(1.0f);
  L doubt = zero;  // NaN where something is not finite
  for (int i = 0; i < n; i += kLanes) {
    const L origin = kHasBase ? L::load_bf16(base + i) : zero;
    if (!shows) doubt = doubt.plus(origin.minus(origin));
    L terms[kCount > 0 ? kCount : kMostAtOnce], total = L::all(-0.0f);
    for (int t = 0; t < count; ++t) {
      L value = L::load_bf16(experts[t] + i);
      if (!shows) doubt = doubt.plus(value.minus(value));
      if (kHasBase) value = value.minus(origin);
      if (!shows && trims) value = trimmed(value, election.sparsity.lower[t], election.sparsity.upper[t]);
      if (!shows && masks) value = masked(value, mask_of_lanes(election.sparsity.masks[t] + i / 8));
      terms[t] = value.times(L::all(election.factors[t]));
      total = total.plus(terms[t]);
    }
    if (shows) doubt = doubt.plus(total.minus(total));
    L divisor = L::all(election.weight_sum);
    if (kTies) {
      const auto towards = total.at_least(zero);
      total = L::all(-0.0f);
      divisor = zero;
      for (int t = 0; t < count; ++t) {
        const L weight = L::all(election.weights[t]);
        const auto agrees = terms[t].in(towards, zero.minus(terms[t])).above(zero);
        total = total.plus((kForm == Form::unweighted_vote ? terms[t].times(weight) : terms[t]).in(agrees, zero));
        divisor = divisor.plus(weight.in(agrees, zero));
      }
      if (election.normalize) {
        const L least = L::all(election.min_divisor);
        divisor = divisor.in(divisor.above(zero), divisor.in(zero.above(divisor), one));
        divisor = least.in(least.above(divisor), divisor);
      }
    }
    if (election.normalize) total = total.over(divisor);
    total = total.times(L::all(election.scale));
    (kHasBase ? origin.plus(total) : total).store_bf16(out + i);
  }
  return doubt.all_finite();
}

template <Form kForm>
bool merge_some_bf16(const uint16_t* base, const uint16_t* const* experts, int n, const Election<float>& election,
                     uint16_t* out) {
  switch (election.n_experts) {
    case 1: return merge_bf16<1, kForm>(base, experts, n, election, out);
    case 2: return merge_bf16<2, kForm>(base, experts, n, election, out);
    case 3: return merge_bf16<3, kForm>(base, experts, n, election, out);
    case 4: return merge_bf16<4, kForm>(base, experts, n, election, out);
    default: return merge_bf16<0, kForm>(base, experts, n, election, out);
  }
}

bool aggregate_bf16(const uint16_t* base, const uint16_t* const* experts, int n, const Election<float>& election,
                    uint16_t* out) {
  if (base == nullptr) return merge_some_bf16<Form::model_sum>(base, experts, n, election, out);
  if (election.rule == Rule::sum)
    return election.sparsity.any() ? merge_some_bf16<Form::sparse_sum>(base, experts, n, election, out)
                                   : merge_some_bf16<Form::delta_sum>(base, experts, n, election, out);
  return election.vote == Vote::weighted ? merge_some_bf16<Form::weighted_vote>(base, experts, n, election, out)
                                         : merge_some_bf16<Form::unweighted_vote>(base, experts, n, election, out);
}

template <class C>
bool aggregate(const C* __restrict base, C* __restrict experts, int n, const Election<C>& election,
               C* __restrict merged) {
  C total[kBlock], divisor[kBlock];
  for (int i = 0; i < kBlock; ++i) total[i] = C(-0.0);  // the zero to which adding x gives x, -0.0 included
  bool finite = false;
  if (election.rule == Rule::ties || election.sparsity.any())
    base == nullptr ? weigh_all<false>(base, experts, n, election, total)
                    : weigh_all<true>(base, experts, n, election, total);
  if (election.rule == Rule::ties) {
    election.vote == Vote::unweighted ? elect<true>(experts, n, election, total, divisor)
                                      : elect<false>(experts, n, election, total, divisor);
  } else {
    if (!election.sparsity.any()) {
      base == nullptr ? add_all_weighted<false>(base, experts, n, election, total)
                      : add_all_weighted<true>(base, experts, n, election, total);
      finite = count_nonfinite(total, n) == 0;  // each input has a term in it, and none that is not finite can cancel
    }
    if (election.normalize)
      for (int i = 0; i < n; ++i) divisor[i] = election.weight_sum;
  }
  if (election.normalize)
    for (int i = 0; i < n; ++i) total[i] = total[i] / divisor[i];
  if (base == nullptr)
    for (int i = 0; i < n; ++i) merged[i] = total[i] * election.scale;
  else
    for (int i = 0; i < n; ++i) merged[i] = base[i] + total[i] * election.scale;
  return finite;
}

}  // namespace resm::cpu::RESM_ISA
