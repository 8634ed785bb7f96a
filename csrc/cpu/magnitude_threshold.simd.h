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
  // Every key is written; the next one overwrites it unless it is between. This needs no unpredictable branch.
  int n_between = 0;
  for (int i = 0; i < n; ++i) {
    between[n_between] = keys[i];
    n_between += ((keys[i] > low) & (keys[i] < high)) ? 1 : 0;
  }
  return n_between;
}

#if defined(__AVX512F__)

// Comparisons of a register's keys with a bracket, as sets of lanes.
struct Placed {
  __mmask16 above_high, from_high, above_low, from_low;
};

template <>
int bracket<float>(const float* base, const float* expert, int n, uint32_t low, uint32_t high, uint32_t* between,
                   BracketCounts& counts) {
  const __m512i lowest = _mm512_set1_epi32(static_cast<int>(low));
  const __m512i highest = _mm512_set1_epi32(static_cast<int>(high));
  const __m512i infinity = _mm512_set1_epi32(0x7f800000);
  __m512i largest = _mm512_setzero_si512();
  Lanes<float>::Counts above_high, from_high, above_low, from_low;
  int n_between = 0;
  const auto keys_at = [&](int i) {
    return _mm512_castps_si512(Lanes<float>::load(expert + i).minus(Lanes<float>::load(base + i)).magnitude().v);
  };
  const auto add = [&](__m512i keys, const Placed& placed) {
    above_high.add(placed.above_high);
    from_high.add(placed.from_high);
    above_low.add(placed.above_low);
    from_low.add(placed.from_low);
    // Always written, and overwritten by the next one unless it is between.
    const auto hit = static_cast<__mmask16>(placed.above_low & ~placed.from_high);
    _mm512_storeu_si512(between + n_between, _mm512_maskz_compress_epi32(hit, keys));
    n_between += __builtin_popcount(hit);
  };
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const __m512i keys = keys_at(i);
    largest = _mm512_max_epu32(largest, keys);
    add(keys, {_mm512_cmpgt_epu32_mask(keys, highest), _mm512_cmpge_epu32_mask(keys, highest),
               _mm512_cmpgt_epu32_mask(keys, lowest), _mm512_cmpge_epu32_mask(keys, lowest)});
  }
  if (i < n) {
    const auto valid = static_cast<__mmask16>((1 << (n - i)) - 1);
    const __m512i keys = keys_at(i);
    largest = _mm512_mask_max_epu32(largest, valid, largest, keys);
    add(keys, {_mm512_mask_cmpgt_epu32_mask(valid, keys, highest), _mm512_mask_cmpge_epu32_mask(valid, keys, highest),
               _mm512_mask_cmpgt_epu32_mask(valid, keys, lowest), _mm512_mask_cmpge_epu32_mask(valid, keys, lowest)});
  }
  counts.above_high += above_high.total();
  counts.from_high += from_high.total();
  counts.above_low += above_low.total();
  counts.from_low += from_low.total();
  if (_mm512_cmpge_epu32_mask(largest, infinity) != 0)
    for (i = 0; i < n; ++i) counts.nonfinite += key_of(expert[i] - base[i]) >= kInfinityKey<float> ? 1 : 0;
  return n_between;
}

#endif

}  // namespace resm::cpu::RESM_ISA
