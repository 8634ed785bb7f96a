// Inner loop of magnitude_threshold.
#pragma once

namespace resm::cpu::RESM_ISA {

template <class C>
int bracket(const C* base, const C* expert, int n, Key<C> low, Key<C> high, Key<C>* between, BracketCounts& counts) {
  Key<C> keys[kBlock];
  Key<C> above_high = 0, from_high = 0, above_low = 0, from_low = 0, nonfinite = 0;
  for (int i = 0; i < n; ++i) {
    const Key<C> key = key_of(C(expert[i] - base[i]));
    keys[i] = key;
    above_high += key > high ? 1 : 0;
    from_high += key >= high ? 1 : 0;
    above_low += key > low ? 1 : 0;
    from_low += key >= low ? 1 : 0;
    nonfinite += key >= kInfinityKey<C> ? 1 : 0;
  }
  counts.above_high += above_high;
  counts.from_high += from_high;
  counts.above_low += above_low;
  counts.from_low += from_low;
  counts.nonfinite += nonfinite;
  if (above_low == from_high) return 0;
  // Every key is written, and stays if it is between: no branch to guess.
  int found = 0;
  for (int i = 0; i < n; ++i) {
    between[found] = keys[i];
    found += (keys[i] > low) & (keys[i] < high) ? 1 : 0;
  }
  return found;
}

#if defined(__AVX512F__)

template <>
int bracket<float>(const float* base, const float* expert, int n, uint32_t low, uint32_t high, uint32_t* between,
                   BracketCounts& counts) {
  const __m512i lowest = _mm512_set1_epi32(static_cast<int>(low));
  const __m512i highest = _mm512_set1_epi32(static_cast<int>(high));
  const __m512i infinity = _mm512_set1_epi32(0x7f800000);
  Lanes<float>::Counts above_high, from_high, above_low, from_low, nonfinite;
  int found = 0;
  for (int i = 0; i < n; i += kLanes) {
    const auto valid = static_cast<__mmask16>(n - i >= kLanes ? 0xffff : (1 << (n - i)) - 1);
    const auto d = Lanes<float>::load(expert + i).minus(Lanes<float>::load(base + i)).magnitude();
    const __m512i keys = _mm512_castps_si512(d.v);
    const __mmask16 beyond = _mm512_mask_cmpge_epu32_mask(valid, keys, highest);
    const __mmask16 over = _mm512_mask_cmpgt_epu32_mask(valid, keys, lowest);
    above_high.add(_mm512_mask_cmpgt_epu32_mask(valid, keys, highest));
    from_high.add(beyond);
    above_low.add(over);
    from_low.add(_mm512_mask_cmpge_epu32_mask(valid, keys, lowest));
    nonfinite.add(_mm512_mask_cmpge_epu32_mask(valid, keys, infinity));
    const auto hit = static_cast<__mmask16>(over & ~beyond);
    if (hit == 0) continue;
    _mm512_storeu_si512(between + found, _mm512_maskz_compress_epi32(hit, keys));
    found += __builtin_popcount(hit);
  }
  counts.above_high += above_high.total();
  counts.from_high += from_high.total();
  counts.above_low += above_low.total();
  counts.from_low += from_low.total();
  counts.nonfinite += nonfinite.total();
  return found;
}

#endif

}  // namespace resm::cpu::RESM_ISA
