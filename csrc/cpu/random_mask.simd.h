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

int64_t keep_by_range(const uint16_t* __restrict cells, const uint32_t* __restrict words, int64_t n, int cells_of_range,
                      const RankLimits& limits, uint8_t* __restrict bits, uint32_t* __restrict open) {
  const int shift = __builtin_ctz(static_cast<unsigned>(cells_of_range));
  int64_t n_open = 0, begin = 0;
#if defined(__AVX512F__)
  static_assert(kCellRanges == 2 * kLanes, "two registers");
  const __m512i least[2] = {_mm512_loadu_si512(limits.least), _mm512_loadu_si512(limits.least + kLanes)};
  const __m512i most[2] = {_mm512_loadu_si512(limits.most), _mm512_loadu_si512(limits.most + kLanes)};
  __m512i at = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  for (; begin + kLanes <= n; begin += kLanes) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(cells + begin)));
    const __m512i range = _mm512_srl_epi32(wide, _mm_cvtsi32_si128(shift));
    const __m512i drawn = _mm512_loadu_si512(words + begin);
    const __mmask16 kept = _mm512_cmplt_epu32_mask(drawn, _mm512_permutex2var_epi32(least[0], range, least[1]));
    const __mmask16 maybe = _mm512_cmplt_epu32_mask(drawn, _mm512_permutex2var_epi32(most[0], range, most[1]));
    const auto hit = static_cast<__mmask16>(maybe & ~kept);
    memcpy(bits + begin / 8, &kept, sizeof kept);
    _mm512_storeu_si512(open + n_open, _mm512_maskz_compress_epi32(hit, at));
    n_open += __builtin_popcount(hit);
    at = _mm512_add_epi32(at, _mm512_set1_epi32(kLanes));
  }
#endif
  // Every index is written; the next one overwrites it unless it is open. This needs no unpredictable branch.
  for (; begin < n; begin += 8) {
    unsigned eight = 0;
    for (int64_t i = begin; i < n && i < begin + 8; ++i) {
      const int range = cells[i] >> shift;
      const unsigned kept = words[i] < limits.least[range] ? 1 : 0;
      eight |= kept << (i - begin);
      open[n_open] = static_cast<uint32_t>(i);
      n_open += (words[i] < limits.most[range] ? 1 : 0) & (kept ^ 1);
    }
    bits[begin / 8] = static_cast<uint8_t>(eight);
  }
  return n_open;
}

// Functions of keys of |δ|: their cells, and the numbers of keys that are less than a key or equal to it.
template <class C>
void keys(const C* __restrict base, const C* __restrict expert, int n, Key<C>* __restrict to) {
  for (int i = 0; i < n; ++i) to[i] = key_of(C(expert[i] - base[i]));
}

// below[i] = sum of the first i of n, a multiple of kLanes, of each table, up to i = n.
RESM_HD void add_up(const uint32_t* __restrict one, const uint32_t* __restrict other, int n,
                    uint32_t* __restrict below) {
  below[0] = 0;
#if defined(__AVX512F__)
  const __m512i zero = _mm512_setzero_si512();
  __m512i before = zero;
  for (int i = 0; i < n; i += kLanes) {
    __m512i sum = _mm512_add_epi32(_mm512_loadu_si512(one + i), _mm512_loadu_si512(other + i));
    sum = _mm512_add_epi32(sum, _mm512_alignr_epi32(sum, zero, 15));
    sum = _mm512_add_epi32(sum, _mm512_alignr_epi32(sum, zero, 14));
    sum = _mm512_add_epi32(sum, _mm512_alignr_epi32(sum, zero, 12));
    sum = _mm512_add_epi32(sum, _mm512_alignr_epi32(sum, zero, 8));
    sum = _mm512_add_epi32(sum, before);
    _mm512_storeu_si512(below + i + 1, sum);
    before = _mm512_permutexvar_epi32(_mm512_set1_epi32(15), sum);
  }
#else
  uint32_t sum = 0;
  for (int i = 0; i < n; ++i) below[i + 1] = sum += one[i] + other[i];
#endif
}

template <class C>
void count_cells(const Key<C>* __restrict keys, int64_t n, const KeyGrid<C>& grid, uint16_t* __restrict cells,
                 uint32_t* __restrict counts, uint32_t* __restrict below) {
  using Signed = std::make_signed_t<Key<C>>;  // keys have no sign, and these compare on every instruction set
  const auto first = static_cast<Signed>(grid.first);
  const Signed least = first + 1, last = (((Signed(1) << grid.bits) - 1) << grid.shift) + 1,
               part = (Signed(1) << grid.shift) - 1;
  for (int64_t i = 0; i < n; ++i) {
    const auto key = static_cast<Signed>(keys[i]);
    const Signed above = (key > least ? key : least) - first;
    const Signed within = above < last ? above : last;
    const Signed offset = key == 0 ? 0 : within;
    cells[i] = static_cast<uint16_t>((offset >> grid.shift) + ((offset + part) >> grid.shift));
  }
  // Neighbours count in different tables, so that no addition waits for that of an equal neighbour.
  const int n_cells = grid.cells();
  uint32_t* __restrict others = counts + n_cells;
  memset(counts, 0, 2 * n_cells * sizeof *counts);
  int64_t i = 0;
  for (; i + 2 <= n; i += 2) {
    ++counts[cells[i]];
    ++others[cells[i + 1]];
  }
  if (i < n) ++counts[cells[i]];
  add_up(counts, others, n_cells, below);
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
