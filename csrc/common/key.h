// Magnitudes as integers: the bit patterns of non-negative floats lie in the order of their values.
#pragma once

#include <type_traits>

#include "common/dtype.h"

namespace resm {

template <class C>
using Key = std::conditional_t<sizeof(C) == 4, uint32_t, uint64_t>;

// The bit pattern of |d|. NaN lies above infinity.
template <class C>
RESM_HD Key<C> key_of(C d) {
  return bits_as<Key<C>>(d) & (~Key<C>(0) >> 1);
}

template <class C>
constexpr Key<C> kInfinityKey = sizeof(C) == 4 ? Key<C>(0x7f800000u) : Key<C>(0x7ff0000000000000u);
template <class C>
constexpr Key<C> kLargestKey = sizeof(C) == 4 ? Key<C>(0x7fffffffu) : Key<C>(0x7fffffffffffffffu);
template <class C>
constexpr int kKeyBits = sizeof(C) * 8 - 1;

// splitmix64's finaliser (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014): where the
// selections take their samples, so that no structure of a tensor meets them.
RESM_HD uint64_t hash(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

}  // namespace resm
