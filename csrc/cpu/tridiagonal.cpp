// Eigenvalues by bisection on Sturm counts, kShifts of them side by side.
#include "cpu/tridiagonal.h"

#include <algorithm>
#include <cmath>

namespace resm::cpu {

namespace {

constexpr double kSplit = 8 * kEps;   // off-diagonal elements up to this part of ‖T‖ count as zero
constexpr double kAside = 16 * kEps;  // how far shifts of inverse iteration keep from eigenvalues, in parts of ‖T‖

}  // namespace

Spectrum::Spectrum(const EigenKernels& kernels, int64_t n, const double* diagonal, const double* off_diagonal,
                   int64_t k)
    : kernels_(kernels), n_(n), d_(diagonal), e_(off_diagonal), squares_(n) {
  low_ = high_ = d_[0];
  for (int64_t i = 0; i < n; ++i) {
    const double reach = (i > 0 ? std::fabs(e_[i - 1]) : 0) + (i + 1 < n ? std::fabs(e_[i]) : 0);
    low_ = std::min(low_, d_[i] - reach);
    high_ = std::max(high_, d_[i] + reach);
  }
  norm_ = std::max(std::fabs(low_), std::fabs(high_));
  low_ -= 16 * kEps * norm_ + DBL_MIN;
  high_ += 16 * kEps * norm_ + DBL_MIN;
  int64_t begin = 0;
  for (int64_t i = 0; i < n; ++i) {
    const bool last = i + 1 == n || std::fabs(e_[i]) <= kSplit * norm_;
    squares_[i] = last ? 0 : e_[i] * e_[i];
    if (!last) continue;
    blocks_.push_back({begin, i + 1 - begin});
    begin = i + 1;
  }
  const double from = threshold(k);
  for (int64_t b = 0; b < static_cast<int64_t>(blocks_.size()); ++b) bisect(b, from);
  std::vector<int64_t> order(pairs_.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return pairs_[a].value > pairs_[b].value; });
  for (size_t i = 0; i < order.size(); ++i) pairs_[order[i]].rank = i;
  pairs_.erase(std::remove_if(pairs_.begin(), pairs_.end(), [&](const Pair& p) { return p.rank >= k; }), pairs_.end());
}

void Spectrum::count_below(const Block& block, const double* x, double* below) const {
  kernels_.count_below(d_ + block.begin, squares_.data() + block.begin, block.size, x, below);
}

// A number that at least k eigenvalues exceed or equal, and not many more.
double Spectrum::threshold(int64_t k) const {
  double low = low_, high = high_;
  for (int round = 0; k < n_ && round < 12; ++round) {
    double x[kShifts], below[kShifts], total[kShifts] = {};
    for (int i = 0; i < kShifts; ++i) x[i] = low + (high - low) * (i + 1) / (kShifts + 1);
    for (const Block& block : blocks_) {
      count_below(block, x, below);
      for (int i = 0; i < kShifts; ++i) total[i] += below[i];
    }
    int n_low = 0;
    while (n_low < kShifts && total[n_low] <= n_ - k) ++n_low;
    if (n_low < kShifts) high = x[n_low];
    if (n_low == 0) continue;
    low = x[n_low - 1];
    if (total[n_low - 1] == n_ - k) break;
  }
  return low;
}

// The eigenvalues of a block from `from` on, each to the last places of itself.
void Spectrum::bisect(int64_t b, double from) {
  const Block& block = blocks_[b];
  double x[kShifts], below[kShifts];
  std::fill(x, x + kShifts, from);
  count_below(block, x, below);
  const int64_t lowest = static_cast<int64_t>(below[0]), count = block.size - lowest;
  if (count == 0) return;
  if (block.size == 1) {
    pairs_.push_back({d_[block.begin], b, 0});
    return;
  }
  // A grid first, which serves all eigenvalues at once.
  const int64_t grid = (count + kShifts - 1) / kShifts * kShifts;
  std::vector<double> lows(count, from), highs(count, high_);  // of the eigenvalue lowest + i
  for (int64_t g = 0; g < grid; g += kShifts) {
    for (int i = 0; i < kShifts; ++i) x[i] = from + (high_ - from) * (g + i + 1) / (grid + 1);
    count_below(block, x, below);
    for (int i = 0; i < kShifts; ++i) {
      const int64_t n = std::max<int64_t>(static_cast<int64_t>(below[i]) - lowest, 0);
      for (int64_t p = n; p < count && lows[p] < x[i]; ++p) lows[p] = x[i];
      for (int64_t p = n - 1; p >= 0 && highs[p] > x[i]; --p) highs[p] = x[i];
    }
  }
  for (int64_t first = count; first > 0; first -= kShifts) {
    const int64_t n = std::min<int64_t>(first, kShifts);
    double low[kShifts], high[kShifts];
    for (int i = 0; i < kShifts; ++i) {
      low[i] = lows[first - 1 - std::min<int64_t>(i, n - 1)];
      high[i] = highs[first - 1 - std::min<int64_t>(i, n - 1)];
    }
    for (bool wide = true; wide;) {
      for (int i = 0; i < kShifts; ++i) x[i] = low[i] + 0.5 * (high[i] - low[i]);
      count_below(block, x, below);
      wide = false;
      for (int i = 0; i < n; ++i) {
        (below[i] > lowest + first - 1 - i ? high : low)[i] = x[i];
        const double size = std::max(std::fabs(low[i]), std::fabs(high[i]));
        wide = wide || high[i] - low[i] > 2 * kEps * std::max(size, 1e-8 * kEps * norm_);
      }
      for (int64_t i = n; i < kShifts; ++i) low[i] = low[n - 1], high[i] = high[n - 1];
    }
    for (int i = 0; i < n; ++i) pairs_.push_back({low[i] + 0.5 * (high[i] - low[i]), b, 0});
  }
}

// A shift above all eigenvalues that follow each other closely, from pair p upwards.
double Spectrum::shift_above(int64_t p) const {
  const double value = pairs_[p].value, step = kAside * norm_;
  const int64_t block = pairs_[p].block;
  while (p > 0 && pairs_[p - 1].block == block && pairs_[p - 1].value - pairs_[p].value < step &&
         pairs_[p - 1].value - value < 4 * step)
    --p;
  return pairs_[p].value + step;
}

// x = (T - λ)⁻¹x by elimination with row exchanges; pivots below kEps·‖T‖ are raised to it.
void Spectrum::iterate(int64_t pair, double* x) const {
  const Block& block = block_of(pair);
  const double lambda = shift_above(pair);
  const double *d = d_ + block.begin, *e = e_ + block.begin;
  const int64_t n = block.size;
  const double least = kEps * norm_;
  std::vector<double> pivots(n), first(n), second(n);
  double a = d[0] - lambda, b = n > 1 ? e[0] : 0, c = 0;  // the current row: columns i, i+1, i+2
  for (int64_t i = 0; i < n; ++i) {
    double below = 0, next = 0, after = 0;
    if (i + 1 < n) {
      below = e[i];
      next = d[i + 1] - lambda;
      after = i + 2 < n ? e[i + 1] : 0;
      if (std::fabs(below) > std::fabs(a)) {
        std::swap(a, below);
        std::swap(b, next);
        std::swap(c, after);
        std::swap(x[i], x[i + 1]);
      }
    }
    if (std::fabs(a) < least) a = a < 0 ? -least : least;
    pivots[i] = a;
    first[i] = b;
    second[i] = c;
    const double factor = below / a;
    if (i + 1 < n) x[i + 1] -= factor * x[i];
    a = next - factor * b;
    b = after - factor * c;
    c = 0;
  }
  for (int64_t i = n - 1; i >= 0; --i) {
    double v = x[i];
    if (i + 1 < n) v -= first[i] * x[i + 1];
    if (i + 2 < n) v -= second[i] * x[i + 2];
    x[i] = v / pivots[i];
  }
}

}  // namespace resm::cpu
