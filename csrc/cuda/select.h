// The state of magnitude_threshold's selection for one expert, and the search for a digit of its answer.
#pragma once

#include "cuda/elements.h"

namespace resm::cuda {

constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;

// The keys among which the answer is searched next; none once it is known.
enum class Source : int64_t { none = 0, buffer, tensor };

// The state for one expert. Plain 64-bit words: tests read them.
struct Selection {
  uint64_t low, high;                              // the bracket, keys
  int64_t below_low, to_low, below_high, to_high;  // how many keys are less than an end, or at most as much
  int64_t between;                                 // how many are collected, or would be if there were room
  Source source;
  int64_t rank;     // the answer's rank, from 1, among the source's keys that begin with its known digits
  uint64_t prefix;  // the known first digits of the answer less origin_of
};
static_assert(sizeof(Selection) == 10 * 8, "see ops.h");

// The number that is subtracted from the source's keys, and how many bits the differences have.
template <class C>
RESM_DEVICE Key<C> origin_of(const Selection& s) {
  return s.source == Source::buffer ? static_cast<Key<C>>(s.low) : Key<C>(0);
}
template <class C>
RESM_DEVICE int bits_of(const Selection& s) {
  if (s.source != Source::buffer) return kKeyBits<C>;
  int bits = 0;
  for (uint64_t range = s.high - s.low; range != 0; range >>= 1) ++bits;
  return bits;
}

// The lowest bit and the width of digit number `digit`, from the top, of keys of key_bits bits; 0 bits past the last digit.
struct Digit {
  int low, bits;

  RESM_DEVICE static Digit of(int key_bits, int digit) {
    const int top = key_bits - digit * kDigitBits;
    if (top <= 0) return {0, 0};
    return top > kDigitBits ? Digit{top - kDigitBits, kDigitBits} : Digit{0, top};
  }
};

// The shared memory of find_digit, and its result.
template <int kThreads>
struct DigitSearch {
  int64_t sums[kThreads / kWarp];
  int64_t digit, rank;
};

// The digit of the rank-th largest of the keys counted in `frequencies`, and its rank among the keys that share it; every
// thread gets both.
template <class T, int kThreads>
RESM_DEVICE void find_digit(const Block<kThreads>& block, const T* frequencies, int64_t rank,
                            DigitSearch<kThreads>& shared) {
  constexpr int kShare = kDigits / kThreads;
  PerThread<int64_t, kThreads> before, counts;
  block.each([&](int thread) {
    const int last = kDigits - 1 - thread * kShare;  // thread 0 has the largest digits
    counts[thread] = 0;
    for (int i = 0; i < kShare; ++i) counts[thread] += frequencies[last - i];
    before[thread] = counts[thread];
    if (thread == 0) {
      shared.digit = 0;  // for the case that there are no keys
      shared.rank = rank;
    }
  });
  sum_before(block, before, shared.sums);
  block.each([&](int thread) {
    int64_t left = rank - before[thread];
    if (left <= 0 || left > counts[thread]) return;
    int digit = kDigits - 1 - thread * kShare;
    for (; frequencies[digit] < left; --digit) left -= frequencies[digit];
    shared.digit = digit;
    shared.rank = left;
  });
}

}  // namespace resm::cuda
