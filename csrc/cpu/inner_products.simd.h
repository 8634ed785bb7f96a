// Inner loops of inner_products.
#pragma once

namespace resm::cpu::RESM_ISA {

// Adds x·y of kCount blocks y, by lanes; kWithItself: the first of them is x.
template <int kCount, bool kWithItself, class C>
void add_products(const C* x, const C* y, int n, double* sums) {
  using L = Lanes<C>;
  typename L::Doubles total[kCount];
  for (int t = 0; t < kCount; ++t) total[t] = L::Doubles::load(sums + t * kLanes);
  for (int i = 0; i < n; i += kLanes) {
    const L values = L::load(x + i);
    if (kWithItself) total[0].add_square(values);
    for (int t = kWithItself ? 1 : 0; t < kCount; ++t) total[t].add_product(values, L::load(y + t * kBlock + i));
  }
  for (int t = 0; t < kCount; ++t) total[t].store(sums + t * kLanes);
}

template <bool kWithItself, class C>
void add_products_of(const C* x, const C* y, int n_blocks, int n, double* sums) {
  if (n_blocks == 4) add_products<4, kWithItself>(x, y, n, sums);
  if (n_blocks == 3) add_products<3, kWithItself>(x, y, n, sums);
  if (n_blocks == 2) add_products<2, kWithItself>(x, y, n, sums);
  if (n_blocks == 1) add_products<1, kWithItself>(x, y, n, sums);
}

template <class C>
void inner_products(const C* __restrict base, C* __restrict experts, int n, int n_experts, double* sums) {
  if (base != nullptr)
    for (int t = 0; t < n_experts; ++t)
      for (int i = 0; i < n; ++i) experts[t * kBlock + i] = experts[t * kBlock + i] - base[i];
  for (int s = 0; s < n_experts; ++s)
    for (int t = s; t < n_experts;) {
      const int n_blocks = n_experts - t < 4 ? n_experts - t : 4;
      const C *x = experts + s * kBlock, *y = experts + t * kBlock;
      t == s ? add_products_of<true>(x, y, n_blocks, n, sums) : add_products_of<false>(x, y, n_blocks, n, sums);
      sums += n_blocks * kLanes;
      t += n_blocks;
    }
}

}  // namespace resm::cpu::RESM_ISA
