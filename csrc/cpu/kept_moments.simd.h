// Inner loop of kept_moments.
#pragma once

namespace resm::cpu::RESM_ISA {

template <bool kTrims, bool kMasks, class C>
void add_kept(const C* __restrict base, const C* __restrict expert, int n, const Sparsity<C>& sparsity, int t,
              KeptSums& into) {
  using Doubles = typename Lanes<C>::Doubles;
  Doubles all = Doubles::load(into.all), sums = Doubles::load(into.kept), squares = Doubles::load(into.kept_sq);
  const C lower = kTrims ? sparsity.lower[t] : C(0), upper = kTrims ? sparsity.upper[t] : C(0);
  // Blocks are padded with zeros, which add nothing.
  for (int begin = 0; begin < n; begin += kLanes) {
    const Lanes<C> size = Lanes<C>::load(expert + begin).minus(Lanes<C>::load(base + begin)).magnitude();
    Lanes<C> rest = size;
    if (kTrims) rest = trimmed(rest, lower, upper);
    if (kMasks) rest = masked(rest, mask_of_lanes(sparsity.masks[t] + begin / 8));
    all.add(size);
    sums.add(rest);
    squares.add_square(rest);
  }
  all.store(into.all);
  sums.store(into.kept);
  squares.store(into.kept_sq);
}

template <class C>
void kept_sums(const C* base, const C* expert, int n, const Sparsity<C>& sparsity, int t, KeptSums& into) {
  const bool masks = sparsity.masks != nullptr;
  const auto step = sparsity.trims() ? (masks ? add_kept<true, true, C> : add_kept<true, false, C>)
                                     : (masks ? add_kept<false, true, C> : add_kept<false, false, C>);
  step(base, expert, n, sparsity, t, into);
}

}  // namespace resm::cpu::RESM_ISA
