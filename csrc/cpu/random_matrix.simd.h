// Inner loop of random_matrix.
#pragma once

#include "common/philox.h"

namespace resm::cpu::RESM_ISA {

// Words of as many counters as a register holds, and what philox needs of them.
#if defined(__AVX512F__)
struct Words {
  static constexpr int kWidth = 8;
  __m512i v;
  static RESM_HD Words all(uint64_t x) { return {_mm512_set1_epi64(static_cast<int64_t>(x))}; }
  static RESM_HD Words from(uint64_t x) {
    return {_mm512_add_epi64(all(x).v, _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0))};
  }
};
RESM_HD Words times_lower(Words x, uint32_t factor) { return {_mm512_mul_epu32(x.v, Words::all(factor).v)}; }
RESM_HD Words upper(Words x) { return {_mm512_srli_epi64(x.v, 32)}; }
RESM_HD Words operator^(Words x, Words y) { return {_mm512_xor_si512(x.v, y.v)}; }
RESM_HD Words operator^(Words x, uint32_t key) { return x ^ Words::all(key); }

// The popcount of the lower half of `first` and of `second`, in 64 bits.
RESM_HD __m512i ones_of(Words first, Words second) {
  const __m512i bits = _mm512_mask_blend_epi32(0xaaaa, first.v, _mm512_slli_epi64(second.v, 32));
  const __m512i counts = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const __m512i nibble = _mm512_set1_epi8(15);
  const __m512i low = _mm512_shuffle_epi8(counts, _mm512_and_si512(bits, nibble));
  const __m512i high = _mm512_shuffle_epi8(counts, _mm512_and_si512(_mm512_srli_epi64(bits, 4), nibble));
  return _mm512_sad_epu8(_mm512_add_epi8(low, high), _mm512_setzero_si512());
}
RESM_HD void store_binomials(const Words (&x)[4], float* to) {
  const __m512i ones = _mm512_or_si512(ones_of(x[0], x[1]), _mm512_slli_epi64(ones_of(x[2], x[3]), 32));
  const __m512i centred = _mm512_sub_epi32(ones, _mm512_set1_epi32(32));
  _mm512_storeu_ps(to, _mm512_mul_ps(_mm512_cvtepi32_ps(centred), _mm512_set1_ps(0.25f)));
}
#elif defined(__AVX2__)
struct Words {
  static constexpr int kWidth = 4;
  __m256i v;
  static RESM_HD Words all(uint64_t x) { return {_mm256_set1_epi64x(static_cast<int64_t>(x))}; }
  static RESM_HD Words from(uint64_t x) { return {_mm256_add_epi64(all(x).v, _mm256_set_epi64x(3, 2, 1, 0))}; }
};
RESM_HD Words times_lower(Words x, uint32_t factor) { return {_mm256_mul_epu32(x.v, Words::all(factor).v)}; }
RESM_HD Words upper(Words x) { return {_mm256_srli_epi64(x.v, 32)}; }
RESM_HD Words operator^(Words x, Words y) { return {_mm256_xor_si256(x.v, y.v)}; }
RESM_HD Words operator^(Words x, uint32_t key) { return x ^ Words::all(key); }

RESM_HD __m256i ones_of(Words first, Words second) {
  const __m256i bits = _mm256_blend_epi32(first.v, _mm256_slli_epi64(second.v, 32), 0xaa);
  const __m256i counts = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const __m256i nibble = _mm256_set1_epi8(15);
  const __m256i low = _mm256_shuffle_epi8(counts, _mm256_and_si256(bits, nibble));
  const __m256i high = _mm256_shuffle_epi8(counts, _mm256_and_si256(_mm256_srli_epi64(bits, 4), nibble));
  return _mm256_sad_epu8(_mm256_add_epi8(low, high), _mm256_setzero_si256());
}
RESM_HD void store_binomials(const Words (&x)[4], float* to) {
  const __m256i ones = _mm256_or_si256(ones_of(x[0], x[1]), _mm256_slli_epi64(ones_of(x[2], x[3]), 32));
  const __m256i centred = _mm256_sub_epi32(ones, _mm256_set1_epi32(32));
  _mm256_storeu_ps(to, _mm256_mul_ps(_mm256_cvtepi32_ps(centred), _mm256_set1_ps(0.25f)));
}
#else
struct Words {
  static constexpr int kWidth = 1;
  uint64_t v;
  static RESM_HD Words all(uint64_t x) { return {x}; }
  static RESM_HD Words from(uint64_t x) { return {x}; }
};
RESM_HD Words times_lower(Words x, uint32_t factor) { return {resm::times_lower(x.v, factor)}; }
RESM_HD Words upper(Words x) { return {resm::upper(x.v)}; }
RESM_HD Words operator^(Words x, Words y) { return {x.v ^ y.v}; }
RESM_HD Words operator^(Words x, uint32_t key) { return {x.v ^ key}; }
RESM_HD void store_binomials(const Words (&x)[4], float* to) {
  to[0] = standard_binomial(x[0].v, x[1].v);
  to[1] = standard_binomial(x[2].v, x[3].v);
}
#endif

// Rows first_row …, pairs first_pair … of the random matrix: 2·pairs entries a row, rows without gaps between them.
void random_rows(uint64_t seed, int64_t first_row, int rows, uint32_t first_pair, int64_t pairs, float* entries) {
  for (int r = 0; r < rows; ++r) {
    const auto row = static_cast<uint64_t>(first_row + r);
    for (int64_t p = 0; p < pairs; p += Words::kWidth) {
      Words x[4] = {Words::all(row), Words::all(row >> 32), Words::from(uint64_t(first_pair) + p),
                    Words::all(static_cast<uint32_t>(RandomStream::sketch))};
      philox(x, seed);
      float* to = entries + (r * pairs + p) * 2;
      if (pairs - p >= Words::kWidth) {
        store_binomials(x, to);
      } else {
        float drawn[2 * Words::kWidth];
        store_binomials(x, drawn);
        memcpy(to, drawn, 2 * (pairs - p) * sizeof(float));
      }
    }
  }
}

}  // namespace resm::cpu::RESM_ISA
