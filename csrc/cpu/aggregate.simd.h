// Inner loops of aggregate.
#pragma once

namespace resm::cpu::RESM_ISA {

// Turns an expert's values into w·rule(Δ) in place and adds them to total.
template <bool kHasBase, bool kTrims, class C>
void weigh(const C* __restrict base, C* __restrict expert, int n, C weight, C threshold, C* __restrict total) {
  for (int i = 0; i < n; ++i) {
    C value = kHasBase ? expert[i] - base[i] : expert[i];
    if (kTrims) value = trim(value, threshold);
    expert[i] = value * weight;
    total[i] = total[i] + expert[i];
  }
}

template <class C>
void elect(const C* __restrict experts, int n, const Election<C>& election, C* __restrict total,
           C* __restrict divisor) {
  C agreeing[kBlock];
  for (int i = 0; i < n; ++i) agreeing[i] = divisor[i] = C(0);
  for (int t = 0; t < election.n_experts; ++t) {
    const C* __restrict weighted = experts + int64_t(t) * kBlock;
    const C weight = election.weights[t];
    for (int i = 0; i < n; ++i) {
      const bool counts = agrees(weighted[i], total[i]);
      agreeing[i] = agreeing[i] + (counts ? weighted[i] : C(0));
      divisor[i] = divisor[i] + (counts ? weight : C(0));
    }
  }
  for (int i = 0; i < n; ++i) {
    total[i] = agreeing[i];
    divisor[i] = divisor[i] == C(0) ? C(1) : divisor[i];
  }
}

template <class C>
void aggregate(const C* __restrict base, C* __restrict experts, int n, const Election<C>& election,
               C* __restrict merged) {
  C total[kBlock], divisor[kBlock];
  for (int i = 0; i < n; ++i) {
    total[i] = C(-0.0);  // the zero to which adding x gives x, -0.0 included
    divisor[i] = election.weight_sum;
  }
  const bool trims = election.rule == Rule::ties && election.thresholds != nullptr;
  const auto step = base == nullptr ? (trims ? weigh<false, true, C> : weigh<false, false, C>)
                                    : (trims ? weigh<true, true, C> : weigh<true, false, C>);
  for (int t = 0; t < election.n_experts; ++t)
    step(base, experts + int64_t(t) * kBlock, n, election.weights[t], trims ? election.thresholds[t] : C(0), total);
  if (election.rule == Rule::ties) elect(experts, n, election, total, divisor);
  if (election.normalize)
    for (int i = 0; i < n; ++i) total[i] = total[i] / divisor[i];
  if (base == nullptr)
    for (int i = 0; i < n; ++i) merged[i] = total[i] * election.scale;
  else
    for (int i = 0; i < n; ++i) merged[i] = base[i] + total[i] * election.scale;
}

}  // namespace resm::cpu::RESM_ISA
