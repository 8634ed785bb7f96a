// Inner loops of random_mask.
#pragma once

namespace resm::cpu::RESM_ISA {

// Bits of the words (lower halves) that are below a limit of at most 2^32, and the words themselves side by side.
#if defined(__AVX512F__)
RESM_HD uint32_t below(Words x, Words limit) {
  return _mm512_cmplt_epu64_mask(_mm512_and_si512(x.v, Words::all(0xffffffffu).v), limit.v);
}
RESM_HD void store_words(Words x, uint32_t* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi64_epi32(x.v));
}
#elif defined(__AVX2__)
RESM_HD uint32_t below(Words x, Words limit) {
  const __m256i words = _mm256_and_si256(x.v, Words::all(0xffffffffu).v);
  return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpgt_epi64(limit.v, words))));
}
RESM_HD void store_words(Words x, uint32_t* to) {
  const __m256i packed = _mm256_permutevar8x32_epi32(x.v, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}
#else
RESM_HD uint32_t below(Words x, Words limit) { return uint32_t(x.v) < limit.v ? 1u : 0u; }
RESM_HD void store_words(Words x, uint32_t* to) { *to = uint32_t(x.v); }
#endif

// Calls use(run, c, x) with the words of counters c … of each run, as many as a register holds.
template <class Use>
RESM_HD void draw(uint64_t seed, uint32_t expert, int64_t first_run, int64_t runs, Use use) {
  for (int64_t run = 0; run < runs; ++run)
    for (int c = 0; c < kRunCounters; c += Words::kWidth) {
      const uint64_t counter = uint64_t(first_run + run) * kRunCounters + c;
      Words x[4] = {Words::from(counter), Words::all(counter >> 32), Words::all(expert),
                    Words::all(static_cast<uint32_t>(RandomStream::mask))};
      philox(x, seed);
      use(run, c, x);
    }
}

void random_bits(uint64_t seed, uint32_t expert, int64_t first_run, int64_t runs, uint64_t limit, uint8_t* mask) {
  const Words most = Words::all(limit);
  uint32_t bits[4] = {};
  draw(seed, expert, first_run, runs, [&](int64_t run, int c, const Words(&x)[4]) {
    for (int w = 0; w < 4; ++w) bits[w] = (c == 0 ? 0u : bits[w]) | below(x[w], most) << c;
    if (c + Words::kWidth == kRunCounters) memcpy(mask + run * kRunBytes, bits, sizeof bits);
  });
}

void random_words(uint64_t seed, uint32_t expert, int64_t first_run, int64_t runs, uint32_t* words) {
  draw(seed, expert, first_run, runs, [&](int64_t run, int c, const Words(&x)[4]) {
    for (int w = 0; w < 4; ++w) store_words(x[w], words + run * kRun + w * kRunCounters + c);
  });
}

// Keys of |δ|, and of equal value and lesser ones among keys.
template <class C>
void keys(const C* __restrict base, const C* __restrict expert, int n, Key<C>* __restrict to) {
  for (int i = 0; i < n; ++i) to[i] = key_of(C(expert[i] - base[i]));
}

template <class C>
void count_keys(const Key<C>* __restrict keys, int64_t n, Key<C> key, int64_t& less, int64_t& equal) {
  Key<C> below = 0, same = 0;  // as wide as the keys, so that the loop vectorises; n is a row's length, below 2^31
  for (int64_t i = 0; i < n; ++i) {
    below += keys[i] < key ? 1 : 0;
    same += keys[i] == key ? 1 : 0;
  }
  less = static_cast<int64_t>(below);
  equal = static_cast<int64_t>(same);
}

}  // namespace resm::cpu::RESM_ISA
