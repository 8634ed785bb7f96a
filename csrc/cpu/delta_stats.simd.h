// Inner loops of delta_stats.
#pragma once

namespace resm::cpu::RESM_ISA {

// Sources of a block's values: converted values from a buffer, or bf16 values straight from the tensor.
template <class C>
struct Converted {
  const C* p;
  RESM_HD Lanes<C> lanes(int i) const { return Lanes<C>::load(p + i); }
  RESM_HD C value(int i) const { return p[i]; }
};
struct Bf16 {
  const uint16_t* p;
  RESM_HD Lanes<float> lanes(int i) const { return Lanes<float>::load_bf16(p + i); }
  RESM_HD float value(int i) const { return float_from_bf16(p[i]); }
};

// Adds up a block again, value by value in double, where it has NaN, infinity, or magnitudes whose sums or squares leave
// the range of the compute type. Only the sums and n_nonfinite change.
template <class C, class Source>
void sum_again(const C* base, Source expert, int n, Moments<C>& into) {
  for (int i = 0; i < n; ++i) {
    const C d = expert.value(i) - base[i];
    into.sum[i % kLanes] += double(d);
    into.sum_sq[i % kLanes] += double(d) * double(d);
    into.sum_abs[i % kLanes] += double(d < C(0) ? -d : d);
    into.n_nonfinite += count_nonfinite(&d, 1);
  }
}

// Four registers at a time, so that a value of a block takes part in ten additions at most: a relative error of at most
// 6e-7 where sums run in float.
constexpr int kStep = kPad / kLanes;
template <class C>
RESM_HD Lanes<C> sum_of(const Lanes<C> (&x)[kStep]) {
  return x[0].plus(x[1]).plus(x[2].plus(x[3]));
}

// For half-precision inputs sums may run in float within a block, which keeps the conversions to double off the hot
// path: their differences have few significant bits, so that four of them mostly add up exactly. For others the sum of
// d and of its square run in double from the start. The sum of |d|, which cannot cancel, never needs it.
template <bool kHalfInputs, bool kCountsSmalls, class C, class Source>
void moments_of_block(const C* base, Source expert, int n, C small, Moments<C>& into) {
  using L = Lanes<C>;
  auto sum = L::Doubles::load(into.sum), sum_sq = L::Doubles::load(into.sum_sq);
  auto zeros = L::Counts::load(into.zeros), smalls = L::Counts::load(into.smalls);
  L block_abs = L::all(C(0)), block_sq = L::all(C(0)), max_abs = L::load(into.max_abs);
  const L limit = L::all(small);
  for (int i = 0; i < n; i += kStep * kLanes) {
    L d[kStep], a[kStep], squares[kStep];
    for (int j = 0; j < kStep; ++j) {
      const int at = i + j * kLanes;
      d[j] = expert.lanes(at).minus(L::load(base + at));
      a[j] = d[j].magnitude();
      max_abs = a[j].larger(max_abs);
      d[j].count_zero(zeros);
      if (kCountsSmalls) a[j].count_at_most(limit, smalls);
      if (kHalfInputs) {
        squares[j] = d[j].times(d[j]);
      } else {
        sum.add(d[j]);
        sum_sq.add_square(d[j]);
      }
    }
    block_abs = block_abs.plus(sum_of(a));
    if (kHalfInputs) {
      block_sq = block_sq.plus(sum_of(squares));
      sum.add(sum_of(d));
    }
  }
  max_abs.store(into.max_abs);
  zeros.store(into.zeros);
  (kCountsSmalls ? smalls : zeros).store(into.smalls);
  // Within these limits only squares too small to matter leave float's normal range: they lose 1e-14 of the sum.
  const bool in_range = kHalfInputs ? block_abs.all_zero_or_within(C(1e-9), C(1e18)) : block_abs.all_finite();
  if (!in_range) return sum_again(base, expert, n, into);
  if (kHalfInputs) sum_sq.add(block_sq);
  auto sum_abs = L::Doubles::load(into.sum_abs);
  sum_abs.add(block_abs);
  sum.store(into.sum);
  sum_sq.store(into.sum_sq);
  sum_abs.store(into.sum_abs);
}

template <class C>
void moments(const C* base, const C* expert, int n, bool half_inputs, C small, Moments<C>& into) {
  const Converted<C> source{expert};
  if (half_inputs && small > C(0)) return moments_of_block<true, true>(base, source, n, small, into);
  if (half_inputs) return moments_of_block<true, false>(base, source, n, small, into);
  if (small > C(0)) return moments_of_block<false, true>(base, source, n, small, into);
  moments_of_block<false, false>(base, source, n, small, into);
}

void moments_bf16(const float* base, const uint16_t* expert, int n, float small, Moments<float>& into) {
  if (small > 0) return moments_of_block<true, true>(base, Bf16{expert}, n, small, into);
  moments_of_block<true, false>(base, Bf16{expert}, n, small, into);
}

template <bool kCountsSmalls, class C, class Source>
void outliers_of_block(const C* base, Source expert, int n, const Bounds<C>& bounds, Outliers& into) {
  using L = Lanes<C>;
  L sums[kStep] = {L::all(C(0)), L::all(C(0)), L::all(C(0)), L::all(C(0))};
  const L low = L::all(bounds.low), high = L::all(bounds.high), limit = L::all(bounds.small);
  auto outliers = L::Counts::load(into.outliers), smalls = L::Counts::load(into.smalls);
  for (int i = 0; i < n; i += kStep * kLanes)
    for (int j = 0; j < kStep; ++j) {
      const int at = i + j * kLanes;
      const L d = expert.lanes(at).minus(L::load(base + at));
      d.add_outside(low, high, outliers, sums[j]);
      if (kCountsSmalls) d.magnitude().count_at_most(limit, smalls);
    }
  outliers.store(into.outliers);
  smalls.store(into.smalls);
  const L block = sum_of(sums);
  if (block.all_finite()) {
    auto sum_abs = L::Doubles::load(into.sum_abs);
    sum_abs.add(block);
    return sum_abs.store(into.sum_abs);
  }
  for (int i = 0; i < n; ++i) {  // finite values, too large for such a sum
    const C d = expert.value(i) - base[i];
    if (d < bounds.low || d > bounds.high) into.sum_abs[i % kLanes] += double(d < C(0) ? -d : d);
  }
}

template <class C>
void outliers(const C* base, const C* expert, int n, bool count_smalls, const Bounds<C>& bounds, Outliers& into) {
  const Converted<C> source{expert};
  if (count_smalls) return outliers_of_block<true>(base, source, n, bounds, into);
  outliers_of_block<false>(base, source, n, bounds, into);
}

void outliers_bf16(const float* base, const uint16_t* expert, int n, bool count_smalls, const Bounds<float>& bounds,
                   Outliers& into) {
  if (count_smalls) return outliers_of_block<true>(base, Bf16{expert}, n, bounds, into);
  outliers_of_block<false>(base, Bf16{expert}, n, bounds, into);
}

// One addition a value: see PackedBin. Neighbours often share a bin; interleaved copies keep an addition from waiting
// for the one before it.
template <class C>
void histogram(const C* base, const C* expert, int n, uint64_t* bins) {
  uint32_t keys[kBlock];
  for (int i = 0; i < n; ++i) keys[i] = histogram_key(C(expert[i] - base[i]));
  int i = 0;
  for (; i + kHistogramCopies <= n; i += kHistogramCopies)
    for (int copy = 0; copy < kHistogramCopies; ++copy) {
      const uint32_t key = keys[i + copy];
      bins[(key >> 23) * kHistogramCopies + copy] += PackedBin::one(key);
    }
  for (; i < n; ++i) bins[(keys[i] >> 23) * kHistogramCopies + i % kHistogramCopies] += PackedBin::one(keys[i]);
}

}  // namespace resm::cpu::RESM_ISA
