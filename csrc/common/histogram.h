// The histogram of log2|d|: one bin for each exponent, counted in integers, whose sums have no order.
#pragma once

#include "common/key.h"

namespace resm {

constexpr int kHistogramBins = 256;

// One counter of the histogram: how many values above 48 bits of their summed keys. All keys of a bin have the same
// exponent field, so that the sum of the keys gives the sum of the significands, and with it exactly that of |d|.
struct PackedBin {
  static constexpr int kSumBits = 48;
  static RESM_HD uint64_t one(uint32_t key) { return (uint64_t(1) << kSumBits) + key; }
  static RESM_HD int64_t count(uint64_t packed) { return static_cast<int64_t>(packed >> kSumBits); }
  // In units of the last place of the bin's floats.
  static RESM_HD uint64_t significands(uint64_t packed, int bin) {
    const uint64_t n = packed >> kSumBits, keys = packed & ((uint64_t(1) << kSumBits) - 1);
    const uint64_t hidden = bin == 0 ? 0 : 1;  // subnormals have no hidden bit
    return keys - n * (static_cast<uint64_t>(bin) << 23) + n * (hidden << 23);
  }
};

// The float with the exponent of |d| that the bins know, and as many leading bits as it holds.
RESM_HD uint32_t histogram_key(float d) { return key_of(d); }
RESM_HD uint32_t histogram_key(double d) {
  const uint64_t key = key_of(d);
  if (key >= kInfinityKey<double>) return 0x7f800000u;
  const int64_t exponent = int64_t(key >> 52) - 1023 + 127;
  if (exponent <= 0) return 0;
  const uint32_t leading = uint32_t(key >> 29) & 0x7fffffu;
  return exponent > 254 ? 0x7f7fffffu : (uint32_t(exponent) << 23) | leading;
}

}  // namespace resm
