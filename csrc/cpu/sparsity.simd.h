// What of the deltas stays, for the inner loops of several ops.
#pragma once

namespace resm::cpu::RESM_ISA {

// The bits of kLanes neighbours, the first of which starts a byte.
RESM_HD uint32_t mask_of_lanes(const uint8_t* mask) {
  uint16_t bits;
  memcpy(&bits, mask, sizeof bits);
  return bits;
}

// Zero where the lane's bit is. The generic form is what the others must equal.
template <class C>
RESM_HD Lanes<C> masked(const Lanes<C>& x, uint32_t bits) {
  C kept[kLanes];
  x.store(kept);
  for (int lane = 0; lane < kLanes; ++lane) kept[lane] = (bits >> lane) & 1u ? kept[lane] : C(0);
  return Lanes<C>::load(kept);
}

#if defined(__AVX512F__)

template <>
RESM_HD Lanes<float> masked(const Lanes<float>& x, uint32_t bits) {
  return {_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), x.v)};
}
template <>
RESM_HD Lanes<double> masked(const Lanes<double>& x, uint32_t bits) {
  double kept[kLanes];
  _mm512_storeu_pd(kept, _mm512_maskz_loadu_pd(static_cast<__mmask8>(bits), x.v));
  _mm512_storeu_pd(kept + 8, _mm512_maskz_loadu_pd(static_cast<__mmask8>(bits >> 8), x.v + 8));
  return Lanes<double>::load(kept);
}

#elif defined(__AVX2__)

template <>
RESM_HD Lanes<float> masked(const Lanes<float>& x, uint32_t bits) {
  const auto kept = [&](__m256 half, uint32_t own) {
    const __m256i places = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(own)), places);
    return _mm256_and_ps(half, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, places)));
  };
  return {kept(x.a, bits), kept(x.b, bits >> 8)};
}

#endif

// Zero where the magnitude lies outside lower … upper.
template <class C>
RESM_HD Lanes<C> trimmed(const Lanes<C>& x, C lower, C upper) {
  C kept[kLanes];
  x.store(kept);
  for (int lane = 0; lane < kLanes; ++lane) kept[lane] = trim(kept[lane], lower, upper);
  return Lanes<C>::load(kept);
}

}  // namespace resm::cpu::RESM_ISA
