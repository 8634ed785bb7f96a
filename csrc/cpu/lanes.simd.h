// Sixteen lanes of float or double: the vectors that sums run over, with the same lanes on every instruction set.
//
// The other forms must equal the generic one bit for bit, which tests check. They may fuse a multiplication of two floats
// with an addition in double: that product is exact in double, so that the fused rounding gives the same bits. They do so
// for plain additions too (times one), because processors have separate units for both kinds.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace resm::cpu::RESM_ISA {

template <class C>
struct Lanes {
  C v[kLanes];

  // A set of lanes: the result of a comparison.
  struct Where {
    bool v[kLanes];
    static RESM_HD Where bits(uint32_t set) {
      Where r;
      for (int i = 0; i < kLanes; ++i) r.v[i] = (set >> i) & 1u;
      return r;
    }
    RESM_HD Where operator&(const Where& o) const {
      Where r;
      for (int i = 0; i < kLanes; ++i) r.v[i] = v[i] & o.v[i];
      return r;
    }
  };
  struct Counts {
    int32_t v[kLanes] = {};
    static RESM_HD Counts load(const int32_t* p) {
      Counts r;
      memcpy(r.v, p, sizeof r.v);
      return r;
    }
    RESM_HD void store(int32_t* p) const { memcpy(p, v, sizeof v); }
  };
  struct Doubles {
    double v[kLanes];
    static RESM_HD Doubles load(const double* p) {
      Doubles r;
      memcpy(r.v, p, sizeof r.v);
      return r;
    }
    RESM_HD void store(double* p) const { memcpy(p, v, sizeof v); }
    RESM_HD void add(const Lanes& x) {
      for (int i = 0; i < kLanes; ++i) v[i] += double(x.v[i]);
    }
    RESM_HD void add_square(const Lanes& x) {
      for (int i = 0; i < kLanes; ++i) v[i] += double(x.v[i]) * double(x.v[i]);
    }
    RESM_HD void add_product(const Lanes& x, const Lanes& y) {
      for (int i = 0; i < kLanes; ++i) v[i] += double(x.v[i]) * double(y.v[i]);
    }
  };

  static RESM_HD Lanes all(C x) {
    Lanes r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = x;
    return r;
  }
  static RESM_HD Lanes load(const C* p) {
    Lanes r;
    memcpy(r.v, p, sizeof r.v);
    return r;
  }
  static RESM_HD Lanes load_bf16(const uint16_t* p) {
    Lanes r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = C(float_from_bf16(p[i]));
    return r;
  }
  RESM_HD void store(C* p) const { memcpy(p, v, sizeof v); }
  RESM_HD Lanes minus(const Lanes& o) const {
    Lanes r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = v[i] - o.v[i];
    return r;
  }
  RESM_HD Lanes plus(const Lanes& o) const {
    Lanes r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = v[i] + o.v[i];
    return r;
  }
  RESM_HD Lanes times(const Lanes& o) const {
    Lanes r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = v[i] * o.v[i];
    return r;
  }
  RESM_HD Lanes over(const Lanes& o) const {
    Lanes r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = v[i] / o.v[i];
    return r;
  }
  RESM_HD Where above(const Lanes& o) const {
    Where r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = v[i] > o.v[i];
    return r;
  }
  RESM_HD Where at_least(const Lanes& o) const {
    Where r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = v[i] >= o.v[i];
    return r;
  }
  // This in the lanes of the set, o in the others.
  RESM_HD Lanes in(const Where& where, const Lanes& o) const {
    Lanes r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = where.v[i] ? v[i] : o.v[i];
    return r;
  }
  RESM_HD void store_bf16(uint16_t* p) const {
    for (int i = 0; i < kLanes; ++i) p[i] = bf16_from_float(before_half(v[i]));
  }
  RESM_HD bool all_finite() const { return count_nonfinite(v, kLanes) == 0; }
  // Of magnitudes: is every lane zero or within the limits?
  RESM_HD bool all_zero_or_within(C low, C high) const {
    int n = 0;
    for (int i = 0; i < kLanes; ++i) n += (v[i] == C(0)) | ((v[i] >= low) & (v[i] <= high));
    return n == kLanes;
  }
  RESM_HD Lanes magnitude() const {
    Lanes r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = v[i] < C(0) ? -v[i] : v[i] + C(0);
    return r;
  }
  // The larger of the two; o where this is NaN.
  RESM_HD Lanes larger(const Lanes& o) const {
    Lanes r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = v[i] > o.v[i] ? v[i] : o.v[i];
    return r;
  }
  RESM_HD void count_zero(Counts& n) const {
    for (int i = 0; i < kLanes; ++i) n.v[i] += v[i] == C(0);
  }
  RESM_HD void count_at_most(const Lanes& o, Counts& n) const {
    for (int i = 0; i < kLanes; ++i) n.v[i] += v[i] <= o.v[i];
  }
  // Where this is below low or above high: counts, and adds its magnitude to sum.
  RESM_HD void add_outside(const Lanes& low, const Lanes& high, Counts& n, Lanes& sum) const {
    const Lanes a = magnitude();
    for (int i = 0; i < kLanes; ++i) {
      const bool outside = (v[i] < low.v[i]) | (v[i] > high.v[i]);
      n.v[i] += outside;
      sum.v[i] = sum.v[i] + (outside ? a.v[i] : C(0));
    }
  }
};

#if defined(__AVX512F__)

template <>
struct Lanes<float> {
  __m512 v;

  struct Where {
    __mmask16 v;
    static RESM_HD Where bits(uint32_t set) { return {static_cast<__mmask16>(set)}; }
    RESM_HD Where operator&(const Where& o) const { return {static_cast<__mmask16>(v & o.v)}; }
  };
  struct Counts {
    __m512i v = _mm512_setzero_si512();
    static RESM_HD Counts load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
    RESM_HD void store(int32_t* p) const { _mm512_storeu_si512(p, v); }
    RESM_HD int64_t total() const { return _mm512_reduce_add_epi32(v); }
    RESM_HD void add(__mmask16 where) { v = _mm512_mask_sub_epi32(v, where, v, _mm512_set1_epi32(-1)); }
  };
  struct Doubles {
    __m512d low, high;
    static RESM_HD Doubles load(const double* p) { return {_mm512_loadu_pd(p), _mm512_loadu_pd(p + 8)}; }
    RESM_HD void store(double* p) const {
      _mm512_storeu_pd(p, low);
      _mm512_storeu_pd(p + 8, high);
    }
    RESM_HD void add(const Lanes& x) {
      low = _mm512_fmadd_pd(x.low(), _mm512_set1_pd(1), low);
      high = _mm512_fmadd_pd(x.high(), _mm512_set1_pd(1), high);
    }
    RESM_HD void add_square(const Lanes& x) {
      low = _mm512_fmadd_pd(x.low(), x.low(), low);
      high = _mm512_fmadd_pd(x.high(), x.high(), high);
    }
    RESM_HD void add_product(const Lanes& x, const Lanes& y) {
      low = _mm512_fmadd_pd(x.low(), y.low(), low);
      high = _mm512_fmadd_pd(x.high(), y.high(), high);
    }
  };

  RESM_HD __m512d low() const { return _mm512_cvtps_pd(_mm512_castps512_ps256(v)); }
  RESM_HD __m512d high() const { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)); }

  static RESM_HD Lanes all(float x) { return {_mm512_set1_ps(x)}; }
  static RESM_HD Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static RESM_HD Lanes load_bf16(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  RESM_HD void store(float* p) const { _mm512_storeu_ps(p, v); }
  RESM_HD Lanes minus(const Lanes& o) const { return {_mm512_sub_ps(v, o.v)}; }
  RESM_HD Lanes plus(const Lanes& o) const { return {_mm512_add_ps(v, o.v)}; }
  RESM_HD Lanes times(const Lanes& o) const { return {_mm512_mul_ps(v, o.v)}; }
  RESM_HD Lanes over(const Lanes& o) const { return {_mm512_div_ps(v, o.v)}; }
  RESM_HD Where above(const Lanes& o) const { return {_mm512_cmp_ps_mask(v, o.v, _CMP_GT_OQ)}; }
  RESM_HD Where at_least(const Lanes& o) const { return {_mm512_cmp_ps_mask(v, o.v, _CMP_GE_OQ)}; }
  RESM_HD Lanes in(const Where& where, const Lanes& o) const { return {_mm512_mask_mov_ps(o.v, where.v, v)}; }
  RESM_HD void store_bf16(uint16_t* p) const {
    const __m512i bits = _mm512_castps_si512(v), high = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
    const __m512i rounded =
        _mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), quiet);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
  }
  RESM_HD bool all_finite() const {
    return _mm512_cmp_ps_mask(_mm512_abs_ps(v), _mm512_set1_ps(__FLT_MAX__), _CMP_LE_OQ) == 0xffff;
  }
  RESM_HD bool all_zero_or_within(float low, float high) const {
    const __mmask16 within = _mm512_cmp_ps_mask(v, _mm512_set1_ps(low), _CMP_GE_OQ) &
                             _mm512_cmp_ps_mask(v, _mm512_set1_ps(high), _CMP_LE_OQ);
    return (within | _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_EQ_OQ)) == 0xffff;
  }
  RESM_HD Lanes magnitude() const { return {_mm512_abs_ps(v)}; }
  RESM_HD Lanes larger(const Lanes& o) const { return {_mm512_max_ps(v, o.v)}; }
  RESM_HD void count_zero(Counts& n) const { n.add(_mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_EQ_OQ)); }
  RESM_HD void count_at_most(const Lanes& o, Counts& n) const { n.add(_mm512_cmp_ps_mask(v, o.v, _CMP_LE_OQ)); }
  RESM_HD void add_outside(const Lanes& low, const Lanes& high, Counts& n, Lanes& sum) const {
    const __mmask16 outside = _mm512_cmp_ps_mask(v, low.v, _CMP_LT_OQ) | _mm512_cmp_ps_mask(v, high.v, _CMP_GT_OQ);
    n.add(outside);
    sum.v = _mm512_mask_add_ps(sum.v, outside, sum.v, magnitude().v);
  }
};

#elif defined(__AVX2__)

template <>
struct Lanes<float> {
  __m256 a, b;

  struct Where {
    __m256 a, b;
    static RESM_HD Where bits(uint32_t set) { return {half(set), half(set >> 8)}; }
    static RESM_HD __m256 half(uint32_t set) {
      const __m256i lane_bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
      const __m256i set_bits = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(set)), lane_bits);
      return _mm256_castsi256_ps(_mm256_cmpeq_epi32(set_bits, lane_bits));
    }
    RESM_HD Where operator&(const Where& o) const { return {_mm256_and_ps(a, o.a), _mm256_and_ps(b, o.b)}; }
  };
  struct Counts {
    __m256i a = _mm256_setzero_si256(), b = _mm256_setzero_si256();
    static RESM_HD Counts load(const int32_t* p) {
      Counts r;
      r.a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
      r.b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8));
      return r;
    }
    RESM_HD void store(int32_t* p) const {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), b);
    }
    RESM_HD void add(__m256 first, __m256 second) {
      a = _mm256_sub_epi32(a, _mm256_castps_si256(first));
      b = _mm256_sub_epi32(b, _mm256_castps_si256(second));
    }
  };
  struct Doubles {
    __m256d v[4];
    static RESM_HD Doubles load(const double* p) {
      return {{_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4), _mm256_loadu_pd(p + 8), _mm256_loadu_pd(p + 12)}};
    }
    RESM_HD void store(double* p) const {
      for (int i = 0; i < 4; ++i) _mm256_storeu_pd(p + 4 * i, v[i]);
    }
    RESM_HD void add(const Lanes& x) {
      for (int i = 0; i < 4; ++i) v[i] = _mm256_add_pd(v[i], x.wide(i));
    }
    RESM_HD void add_square(const Lanes& x) {
      for (int i = 0; i < 4; ++i) v[i] = _mm256_fmadd_pd(x.wide(i), x.wide(i), v[i]);
    }
    RESM_HD void add_product(const Lanes& x, const Lanes& y) {
      for (int i = 0; i < 4; ++i) v[i] = _mm256_fmadd_pd(x.wide(i), y.wide(i), v[i]);
    }
  };

  RESM_HD __m256d wide(int quarter) const {
    const __m256 half = quarter < 2 ? a : b;
    return _mm256_cvtps_pd(quarter % 2 == 0 ? _mm256_castps256_ps128(half) : _mm256_extractf128_ps(half, 1));
  }

  static RESM_HD Lanes all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static RESM_HD Lanes load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static RESM_HD Lanes load_bf16(const uint16_t* p) {
    const auto half = [](const uint16_t* q) {
      const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q)));
      return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    };
    return {half(p), half(p + 8)};
  }
  RESM_HD void store(float* p) const {
    _mm256_storeu_ps(p, a);
    _mm256_storeu_ps(p + 8, b);
  }
  RESM_HD Lanes minus(const Lanes& o) const { return {_mm256_sub_ps(a, o.a), _mm256_sub_ps(b, o.b)}; }
  RESM_HD Lanes plus(const Lanes& o) const { return {_mm256_add_ps(a, o.a), _mm256_add_ps(b, o.b)}; }
  RESM_HD Lanes times(const Lanes& o) const { return {_mm256_mul_ps(a, o.a), _mm256_mul_ps(b, o.b)}; }
  RESM_HD Lanes over(const Lanes& o) const { return {_mm256_div_ps(a, o.a), _mm256_div_ps(b, o.b)}; }
  RESM_HD Where above(const Lanes& o) const {
    return {_mm256_cmp_ps(a, o.a, _CMP_GT_OQ), _mm256_cmp_ps(b, o.b, _CMP_GT_OQ)};
  }
  RESM_HD Where at_least(const Lanes& o) const {
    return {_mm256_cmp_ps(a, o.a, _CMP_GE_OQ), _mm256_cmp_ps(b, o.b, _CMP_GE_OQ)};
  }
  RESM_HD Lanes in(const Where& where, const Lanes& o) const {
    return {_mm256_blendv_ps(o.a, a, where.a), _mm256_blendv_ps(o.b, b, where.b)};
  }
  RESM_HD void store_bf16(uint16_t* p) const {
    const auto half = [](__m256 x) {
      const __m256i bits = _mm256_castps_si256(x), high = _mm256_srli_epi32(bits, 16);
      const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
      const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
      const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
      const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
      return _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), quiet, nan);
    };
    // Packing interleaves halves of the registers; the permutation restores their order.
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(half(a), half(b)), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), packed);
  }
  RESM_HD bool all_finite() const {
    const __m256 most = _mm256_set1_ps(__FLT_MAX__);
    const Lanes size = magnitude();
    return _mm256_movemask_ps(
               _mm256_and_ps(_mm256_cmp_ps(size.a, most, _CMP_LE_OQ), _mm256_cmp_ps(size.b, most, _CMP_LE_OQ))) == 0xff;
  }
  RESM_HD bool all_zero_or_within(float low, float high) const {
    const auto holds = [&](__m256 x) {
      const __m256 within = _mm256_and_ps(_mm256_cmp_ps(x, _mm256_set1_ps(low), _CMP_GE_OQ),
                                          _mm256_cmp_ps(x, _mm256_set1_ps(high), _CMP_LE_OQ));
      return _mm256_movemask_ps(_mm256_or_ps(within, _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_EQ_OQ))) == 0xff;
    };
    return holds(a) && holds(b);
  }
  RESM_HD Lanes magnitude() const {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, a), _mm256_andnot_ps(sign, b)};
  }
  RESM_HD Lanes larger(const Lanes& o) const { return {_mm256_max_ps(a, o.a), _mm256_max_ps(b, o.b)}; }
  RESM_HD void count_zero(Counts& n) const {
    n.add(_mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_EQ_OQ), _mm256_cmp_ps(b, _mm256_setzero_ps(), _CMP_EQ_OQ));
  }
  RESM_HD void count_at_most(const Lanes& o, Counts& n) const {
    n.add(_mm256_cmp_ps(a, o.a, _CMP_LE_OQ), _mm256_cmp_ps(b, o.b, _CMP_LE_OQ));
  }
  RESM_HD void add_outside(const Lanes& low, const Lanes& high, Counts& n, Lanes& sum) const {
    const __m256 first = _mm256_or_ps(_mm256_cmp_ps(a, low.a, _CMP_LT_OQ), _mm256_cmp_ps(a, high.a, _CMP_GT_OQ));
    const __m256 second = _mm256_or_ps(_mm256_cmp_ps(b, low.b, _CMP_LT_OQ), _mm256_cmp_ps(b, high.b, _CMP_GT_OQ));
    n.add(first, second);
    const Lanes size = magnitude();
    sum.a = _mm256_add_ps(sum.a, _mm256_and_ps(first, size.a));
    sum.b = _mm256_add_ps(sum.b, _mm256_and_ps(second, size.b));
  }
};

#endif

}  // namespace resm::cpu::RESM_ISA
