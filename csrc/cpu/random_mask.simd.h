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

// As random_bits, and the words themselves.
void random_words(uint64_t seed, uint32_t expert, int64_t first_run, int64_t runs, uint64_t limit, uint32_t* words,
                  uint8_t* mask) {
  const Words most = Words::all(limit);
  uint32_t bits[4] = {};
  draw(seed, expert, first_run, runs, [&](int64_t run, int c, const Words(&x)[4]) {
    for (int w = 0; w < 4; ++w) {
      store_words(x[w], words + run * kRun + w * kRunCounters + c);
      bits[w] = (c == 0 ? 0u : bits[w]) | below(x[w], most) << c;
    }
    if (c + Words::kWidth == kRunCounters) memcpy(mask + run * kRunBytes, bits, sizeof bits);
  });
}

int64_t words_between(const uint32_t* __restrict words, int64_t n, uint32_t low, uint32_t high,
                      uint32_t* __restrict places) {
  int64_t found = 0, i = 0;
#if defined(__AVX512F__)
  const __m512i lowest = _mm512_set1_epi32(static_cast<int>(low));
  const __m512i span = _mm512_set1_epi32(static_cast<int>(high - low));
  __m512i at = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  for (; i + kLanes <= n; i += kLanes) {
    const __mmask16 hit =
        _mm512_cmplt_epu32_mask(_mm512_sub_epi32(_mm512_loadu_si512(words + i), lowest), span);
    _mm512_storeu_si512(places + found, _mm512_maskz_compress_epi32(hit, at));
    found += __builtin_popcount(hit);
    at = _mm512_add_epi32(at, _mm512_set1_epi32(kLanes));
  }
#endif
  // Every place is written, and stays if it is between: no branch to guess.
  for (; i < n; ++i) {
    places[found] = static_cast<uint32_t>(i);
    found += words[i] - low < high - low ? 1 : 0;
  }
  return found;
}

// Keys of |δ|, their cells, and how many of them are equal to or less than one.
template <class C>
void keys(const C* __restrict base, const C* __restrict expert, int n, Key<C>* __restrict to) {
  for (int i = 0; i < n; ++i) to[i] = key_of(C(expert[i] - base[i]));
}

template <class C>
void count_cells(const Key<C>* __restrict keys, int64_t n, const KeyGrid<C>& grid, uint16_t* __restrict cells,
                 uint32_t* __restrict counts) {
  using Signed = std::make_signed_t<Key<C>>;  // keys have no sign, and these compare on every instruction set
  const auto first = static_cast<Signed>(grid.first);
  const Signed least = first + 1, last = (Signed(grid.steps) << grid.shift) + 1, part = (Signed(1) << grid.shift) - 1;
  for (int64_t i = 0; i < n; ++i) {
    const auto key = static_cast<Signed>(keys[i]);
    const Signed above = (key > least ? key : least) - first;
    const Signed within = above < last ? above : last;
    const Signed place = key == 0 ? 0 : within;
    cells[i] = static_cast<uint16_t>((place >> grid.shift) + ((place + part) >> grid.shift));
  }
  for (int64_t i = 0; i < n; ++i) ++counts[cells[i]];
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
