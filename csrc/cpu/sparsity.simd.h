// What of the deltas stays, for the inner loops of several ops.
#pragma once

namespace resm::cpu::RESM_ISA {

// The bits of kLanes neighbours, the first of which starts a byte.
RESM_HD uint32_t mask_of_lanes(const uint8_t* mask) {
  uint16_t bits;
  memcpy(&bits, mask, sizeof bits);
  return bits;
}

}  // namespace resm::cpu::RESM_ISA
