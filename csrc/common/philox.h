// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011): a random function
// from a 128-bit counter and a 64-bit key to 128 bits. Integers only, so that every device draws the same numbers.
#pragma once

#include "common/dtype.h"

namespace resm {

// The last word of the counter. Ops that use one seed differ in it, so that their random numbers are independent.
enum class RandomStream : uint32_t { sketch = 0, mask = 1 };

// The operations on words that the rounds need. Types that hold several words define their own. A word is the lower half
// of 64 bits; the upper half may hold anything.
RESM_HD uint64_t times_lower(uint64_t x, uint32_t factor) { return uint64_t(uint32_t(x)) * factor; }
RESM_HD uint64_t upper(uint64_t x) { return x >> 32; }

// Replaces the counter, lowest word first, by the random bits.
template <class Word>
RESM_HD void philox(Word (&x)[4], uint64_t seed) {
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const Word p0 = times_lower(x[0], 0xD2511F53u), p1 = times_lower(x[2], 0xCD9E8D57u);
    x[0] = upper(p1) ^ x[1] ^ key0;
    x[1] = p1;
    x[2] = upper(p0) ^ x[3] ^ key1;
    x[3] = p0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

RESM_HD int ones_of(uint64_t x) {
  x = x - ((x >> 1) & 0x5555555555555555u);
  x = (x & 0x3333333333333333u) + ((x >> 2) & 0x3333333333333333u);
  x = (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0fu;
  return int((x * 0x0101010101010101u) >> 56);
}

// (popcount − 32) / 4 of two words: the binomial distribution of mean 0 and variance 1, exact in any float.
RESM_HD float standard_binomial(uint64_t first, uint64_t second) {
  return float(ones_of((second << 32) | uint32_t(first)) - 32) * 0.25f;
}

}  // namespace resm
