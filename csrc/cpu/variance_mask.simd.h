// Inner loops of variance_mask.
#pragma once

namespace resm::cpu::RESM_ISA {

// Welford's updates in double, in the order of the experts: all δ the same give 0 exactly.
template <class C>
int variance(const C* __restrict base, const C* __restrict experts, int n, int n_experts, C* __restrict to) {
  double mean[kBlock], squares[kBlock];
  for (int i = 0; i < n; ++i) {
    mean[i] = double(C(experts[i] - base[i]));
    squares[i] = 0;
  }
  for (int t = 1; t < n_experts; ++t) {
    const C* __restrict expert = experts + t * kBlock;
    for (int i = 0; i < n; ++i) {
      const double delta = double(C(expert[i] - base[i])), change = delta - mean[i];
      mean[i] = mean[i] + change / double(t + 1);
      squares[i] = squares[i] + change * (delta - mean[i]);
    }
  }
  Key<C> found = 0;
  for (int i = 0; i < n; ++i) {
    to[i] = C(squares[i] / double(n_experts));
    found += key_of(to[i]) != 0 ? 1 : 0;
  }
  return static_cast<int>(found);
}

template <class C>
void mask_from(const C* __restrict values, int n, C least, uint8_t* __restrict mask) {
  for (int begin = 0; begin < n; begin += 8) {
    uint32_t bits = 0;
    for (int i = begin; i < n && i < begin + 8; ++i) bits |= (values[i] >= least ? 1u : 0u) << (i - begin);
    mask[begin / 8] = static_cast<uint8_t>(bits);
  }
}

}  // namespace resm::cpu::RESM_ISA
