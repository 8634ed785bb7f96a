// Inner loops of aggregate.
#pragma once

namespace resm::cpu::RESM_ISA {

// total += Σ w_t·Δ_t over kCount experts in their order, in registers.
template <int kCount, bool kHasBase, class C>
void add_weighted(const C* __restrict base, const C* __restrict experts, int n, const C* weights,
                  C* __restrict total) {
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

// Turns an expert's values into f·Δ of what stays in place and adds them to total.
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
  const auto step = election.sparsity.trims() ? (masks ? weigh<kHasBase, true, true, C> : weigh<kHasBase, true, false, C>)
                                              : (masks ? weigh<kHasBase, false, true, C> : weigh<kHasBase, false, false, C>);
  for (int t = 0; t < election.n_experts; ++t) step(base, experts + t * kBlock, n, election, t, total);
}

template <class C>
void count_votes(const C* __restrict experts, int n, int n_experts, C* __restrict total) {
  for (int i = 0; i < n; ++i) total[i] = C(0);
  for (int t = 0; t < n_experts; ++t)
    for (int i = 0; i < n; ++i) total[i] = total[i] + sign_of(experts[t * kBlock + i]);
}

// kLate: the weights are not in the experts' values yet.
template <bool kLate, class C>
void elect(const C* __restrict experts, int n, const Election<C>& election, C* __restrict total,
           C* __restrict divisor) {
  C agreeing[kBlock];
  for (int i = 0; i < n; ++i) {
    agreeing[i] = C(-0.0);  // late weights may make −0.0 of the first that agrees
    divisor[i] = C(0);
  }
  for (int t = 0; t < election.n_experts; ++t) {
    const C* __restrict values = experts + t * kBlock;
    const C weight = election.weights[t];
    for (int i = 0; i < n; ++i) {
      const bool counts = agrees(values[i], total[i]);
      const C weighted = kLate ? values[i] * weight : values[i];
      agreeing[i] = agreeing[i] + (counts ? weighted : C(0));
      divisor[i] = divisor[i] + (counts ? weight : C(0));
    }
  }
  for (int i = 0; i < n; ++i) {
    total[i] = agreeing[i];
    divisor[i] = divisor_of(divisor[i], election.min_divisor);
  }
}

// The whole of rule sum where everything is bf16, without a trip through scratch; the same operations in the same order
// as below. True if the result shows that all inputs are finite.
template <int kCount, bool kHasBase>
bool sum_bf16(const uint16_t* __restrict base, const uint16_t* const* experts, int n, const Election<float>& election,
              uint16_t* __restrict out) {
  const uint16_t* __restrict e[4] = {experts[0], experts[kCount > 1 ? 1 : 0], experts[kCount > 2 ? 2 : 0],
                                     experts[kCount > 3 ? 3 : 0]};
  const float divisor = election.normalize ? election.weight_sum : 1.0f;
  uint32_t nonfinite = 0;
  for (int i = 0; i < n; ++i) {
    const float origin = kHasBase ? float_from_bf16(base[i]) : 0.0f;
    float total = -0.0f;
    for (int t = 0; t < kCount; ++t) {
      const float value = float_from_bf16(e[t][i]);
      total = total + (kHasBase ? value - origin : value) * election.factors[t];
    }
    nonfinite += key_of(total) >= kInfinityKey<float> ? 1 : 0;
    const float merged = total / divisor * election.scale;
    out[i] = bf16_from_float(kHasBase ? origin + merged : merged);
  }
  return nonfinite == 0;
}

template <bool kHasBase>
bool sum_any_bf16(const uint16_t* base, const uint16_t* const* experts, int n, const Election<float>& election,
                  uint16_t* out) {
  switch (election.n_experts) {
    case 1: return sum_bf16<1, kHasBase>(base, experts, n, election, out);
    case 2: return sum_bf16<2, kHasBase>(base, experts, n, election, out);
    case 3: return sum_bf16<3, kHasBase>(base, experts, n, election, out);
    default: return sum_bf16<4, kHasBase>(base, experts, n, election, out);
  }
}

bool sum_bf16_of(const uint16_t* base, const uint16_t* const* experts, int n, const Election<float>& election,
                 uint16_t* out) {
  return base == nullptr ? sum_any_bf16<false>(base, experts, n, election, out)
                         : sum_any_bf16<true>(base, experts, n, election, out);
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
    if (election.vote == Vote::count) count_votes(experts, n, election.n_experts, total);
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
