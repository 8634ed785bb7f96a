// Inner loops of delta_stats.
#pragma once

namespace resm::cpu::RESM_ISA {

constexpr int padding(int n) { return (kLanes - n % kLanes) % kLanes; }

// Adds the lanes that a block was summed up in, in the compute type, to those of the chunk.
template <class C>
void flush(const Lanes<C>& block, double* into) {
  C lanes[kLanes];
  block.store(lanes);
  for (int i = 0; i < kLanes; ++i) into[i] += double(lanes[i]);
}

// Sum of d and of its square run in double: the first cancels, the second would leave float's range. The sum of |d|
// does neither and runs in the compute type for the 128 values that a lane has in a block.
template <class C>
void moments(const C* base, const C* expert, int n, C small, Moments& into) {
  using L = Lanes<C>;
  typename L::Doubles sum = L::Doubles::load(into.sum), sum_sq = L::Doubles::load(into.sum_sq);
  L sum_abs = L::all(C(0)), max_abs = L::all(C(0));
  const L limit = L::all(small);
  typename L::Counts zeros, smalls;
  for (int i = 0; i < n; i += kLanes) {
    const L d = L::load(expert + i).minus(L::load(base + i));
    const L a = d.magnitude();
    sum.add(d);
    sum_sq.add_square(d);
    sum_abs = sum_abs.plus(a);
    max_abs = a.larger(max_abs);
    d.count_zero(zeros);
    if (small > C(0)) a.count_at_most(limit, smalls);
  }
  sum.store(into.sum);
  sum_sq.store(into.sum_sq);
  C lanes[kLanes];
  max_abs.store(lanes);
  for (int i = 0; i < kLanes; ++i) into.max_abs[i] = lanes[i] > into.max_abs[i] ? lanes[i] : into.max_abs[i];
  const int64_t n_zero = zeros.total() - padding(n);
  into.n_zero += n_zero;
  into.n_small += small > C(0) ? smalls.total() - padding(n) : n_zero;

  sum_abs.store(lanes);
  if (count_nonfinite(lanes, kLanes) == 0) {
    flush(sum_abs, into.sum_abs);
    return;
  }
  // NaN, infinity, or finite values whose sum is too large for the compute type: once more, value by value.
  for (int i = 0; i < n; ++i) {
    const C d = expert[i] - base[i];
    into.sum_abs[i % kLanes] += double(d < C(0) ? -d : d);
    into.n_nonfinite += count_nonfinite(&d, 1);
  }
}

template <class C>
void outliers(const C* base, const C* expert, int n, const Bounds<C>& bounds, Outliers& into) {
  using L = Lanes<C>;
  L sum_abs = L::all(C(0));
  const L low = L::all(bounds.low), high = L::all(bounds.high), limit = L::all(bounds.small);
  typename L::Counts found, smalls;
  for (int i = 0; i < n; i += kLanes) {
    const L d = L::load(expert + i).minus(L::load(base + i));
    d.add_outside(low, high, found, sum_abs);
    d.magnitude().count_at_most(limit, smalls);
  }
  flush(sum_abs, into.sum_abs);
  // The padding's zeros are outliers too where the mean lies that far from zero.
  const bool zero_is_outside = C(0) < bounds.low || C(0) > bounds.high;
  into.n_outlier += found.total() - (zero_is_outside ? padding(n) : 0);
  into.n_small += smalls.total() - padding(n);
}

// The float with the exponent of |d| that the bins know, and as many leading bits as it holds.
RESM_HD uint32_t histogram_key(float d) { return key_of(d); }
RESM_HD uint32_t histogram_key(double d) {
  const uint64_t key = key_of(d);
  if (key >= kInfinityKey<double>) return 0x7f800000u;
  const int64_t exponent = int64_t(key >> 52) - 1023 + 127;
  if (exponent <= 0) return 0;
  const uint32_t leading = uint32_t(key >> 29) & 0x7fffffu;
  return exponent > 254 ? 0x7f7fffffu : (uint32_t(exponent) << 23) | leading;
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
