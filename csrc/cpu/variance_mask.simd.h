// Inner loops of variance_mask.
#pragma once

namespace resm::cpu::RESM_ISA {

// Welford's updates in double, in the order of the experts: all δ the same give 0 exactly.
template <int kCount, class C>
int variance_of(const C* __restrict base, const C* __restrict experts, int n, C* __restrict to) {
  Key<C> nonzero = 0;
  for (int i = 0; i < n; ++i) {
    double mean = double(C(experts[i] - base[i])), squares = 0;
    for (int t = 1; t < kCount; ++t) {
      const double delta = double(C(experts[t * kBlock + i] - base[i])), change = delta - mean;
      mean = mean + change / double(t + 1);
      squares = squares + change * (delta - mean);
    }
    to[i] = C(squares / double(kCount));
    nonzero += key_of(to[i]) != 0 ? 1 : 0;
  }
  return static_cast<int>(nonzero);
}

// Any number of experts: the sums of kLanes elements stay in registers while these go by. Blocks are padded.
template <class C>
int variance_of_many(const C* base, const C* experts, int n, int n_experts, C* to) {
  Key<C> nonzero = 0;
  for (int begin = 0; begin < n; begin += kLanes) {
    double mean[kLanes], squares[kLanes] = {};
    for (int i = 0; i < kLanes; ++i) mean[i] = double(C(experts[begin + i] - base[begin + i]));
    for (int t = 1; t < n_experts; ++t) {
      const C* expert = experts + t * kBlock + begin;
      for (int i = 0; i < kLanes; ++i) {
        const double delta = double(C(expert[i] - base[begin + i])), change = delta - mean[i];
        mean[i] = mean[i] + change / double(t + 1);
        squares[i] = squares[i] + change * (delta - mean[i]);
      }
    }
    for (int i = 0; i < kLanes && begin + i < n; ++i) {
      to[begin + i] = C(squares[i] / double(n_experts));
      nonzero += key_of(to[begin + i]) != 0 ? 1 : 0;
    }
  }
  return static_cast<int>(nonzero);
}

template <class C>
int variance(const C* base, const C* experts, int n, int n_experts, C* to) {
  switch (n_experts) {
    case 2: return variance_of<2>(base, experts, n, to);
    case 3: return variance_of<3>(base, experts, n, to);
    case 4: return variance_of<4>(base, experts, n, to);
    case 5: return variance_of<5>(base, experts, n, to);
    default: return variance_of_many(base, experts, n, n_experts, to);
  }
}

// The bits of those of kLanes values that are at least a limit. The other forms must equal the generic one.
template <class C>
RESM_HD uint32_t at_least(const C* values, C least) {
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= (values[lane] >= least ? 1u : 0u) << lane;
  return bits;
}
#if defined(__AVX512F__)
template <>
RESM_HD uint32_t at_least(const float* values, float least) {
  return _mm512_cmp_ps_mask(_mm512_loadu_ps(values), _mm512_set1_ps(least), _CMP_GE_OQ);
}
#elif defined(__AVX2__)
template <>
RESM_HD uint32_t at_least(const float* values, float least) {
  const auto half = [&](const float* from) {
    return static_cast<uint32_t>(
        _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(from), _mm256_set1_ps(least), _CMP_GE_OQ)));
  };
  return half(values) | half(values + 8) << 8;
}
#endif

template <class C>
void split_values(const C* values, int n, const ValueBracket<C>& bracket, uint8_t* mask, BracketSplit& split) {
  for (int begin = 0; begin < n; begin += kLanes) {
    const uint32_t valid = n - begin >= kLanes ? 0xffffu : (1u << (n - begin)) - 1;
    const uint32_t beyond = at_least(values + begin, bracket.high) & valid;
    const uint32_t above = at_least(values + begin, bracket.above_high) & valid;
    const auto bits = static_cast<uint16_t>(beyond);
    memcpy(mask + begin / 8, &bits, sizeof bits);
    split.from_high += __builtin_popcount(beyond);
    split.above_high += __builtin_popcount(above);
    for (uint32_t rest = at_least(values + begin, bracket.low) & valid & ~beyond; rest != 0; rest &= rest - 1)
      split.positions[split.between++] = static_cast<uint16_t>(begin + __builtin_ctz(rest));
  }
}

}  // namespace resm::cpu::RESM_ISA
