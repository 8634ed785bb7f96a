// Sparsification of deltas, for the inner loops of several ops.
#pragma once

namespace resm::cpu::RESM_ISA {

// The bits of kLanes neighbours, the first of which starts a byte.
RESM_HD uint32_t mask_of_lanes(const uint8_t* mask) {
  uint16_t bits;
  memcpy(&bits, mask, sizeof bits);
  return bits;
}

// Zero where the lane's bit is.
template <class C>
RESM_HD Lanes<C> masked(const Lanes<C>& x, uint32_t bits) {
  return x.in(Lanes<C>::Where::bits(bits), Lanes<C>::all(C(0)));
}

// Zero where the magnitude lies outside lower … upper. See trim.
template <class C>
RESM_HD Lanes<C> trimmed(const Lanes<C>& x, C lower, C upper) {
  const Lanes<C> magnitude = x.magnitude();
  return x.in(magnitude.at_least(Lanes<C>::all(lower)) & Lanes<C>::all(upper).at_least(magnitude), Lanes<C>::all(C(0)));
}

}  // namespace resm::cpu::RESM_ISA
