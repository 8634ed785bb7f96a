// Inner loops of inner_products.
#pragma once

namespace resm::cpu::RESM_ISA {

// Adds x·y of kCount blocks y, by lanes.
template <int kCount, class C>
void add_products(const C* x, const C* y, int n, double* sums) {
  using L = Lanes<C>;
  typename L::Doubles total[kCount];
  for (int t = 0; t < kCount; ++t) total[t] = L::Doubles::load(sums + t * kLanes);
  for (int i = 0; i < n; i += kLanes) {
    const L own = L::load(x + i);
    for (int t = 0; t < kCount; ++t) total[t].add_product(own, L::load(y + t * kBlock + i));
  }
  for (int t = 0; t < kCount; ++t) total[t].store(sums + t * kLanes);
}

template <class C>
void inner_products(const C* __restrict base, C* __restrict experts, int n, int n_experts, double* sums) {
  if (base != nullptr)
    for (int t = 0; t < n_experts; ++t)
      for (int i = 0; i < n; ++i) experts[t * kBlock + i] = experts[t * kBlock + i] - base[i];
  for (int s = 0; s < n_experts; ++s) {
    const C* x = experts + s * kBlock;
    int t = s;
    for (; t + 4 <= n_experts; t += 4, sums += 4 * kLanes) add_products<4>(x, experts + t * kBlock, n, sums);
    const C* rest = experts + t * kBlock;
    if (n_experts - t == 3) add_products<3>(x, rest, n, sums);
    if (n_experts - t == 2) add_products<2>(x, rest, n, sums);
    if (n_experts - t == 1) add_products<1>(x, rest, n, sums);
    sums += (n_experts - t) * kLanes;
  }
}

}  // namespace resm::cpu::RESM_ISA
