// symmetric_eigen: the largest eigenvalues of a symmetric matrix and their eigenvectors.
//
// A = Q T Qᵀ by blocked Householder reflections; eigenvalues of T by bisection; eigenvectors of T by twisted
// factorisations, O(n) each; then orthogonalised where two eigenvalues are too close for their vectors to be orthogonal
// by themselves: |zᵢᵀzⱼ| ≤ (‖rᵢ‖ + ‖rⱼ‖)/|λᵢ - λⱼ| for residuals r = Tz - λz.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "cpu/ops.h"
#include "cpu/threads.h"
#include "cpu/tridiagonal.h"

namespace resm::cpu {

namespace {

template <class T>
constexpr double kOrthogonal = sizeof(T) == 4 ? 1e-8 : 2e-14;  // pairs bounded by this are left as they are
constexpr double kDependent = 1e-4;  // of a vector's squared norm: with less than this left over it is replaced
constexpr double kResidual = 2e-13;  // the largest ‖Tz - λz‖/‖T‖ let through
constexpr double kChanged = 0.1;     // scalar products above this ask for another pass
constexpr int kPasses = 8;
// Matrices are scaled to 1, or up by as much as the scale's own range allows.
template <class T>
constexpr int kLeastExponent = sizeof(T) == 4 ? -120 : -1000;

struct Release {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Release>;
template <class T>
Buffer<T> allocate(int64_t n) {
  return Buffer<T>(static_cast<T*>(::operator new(std::max<int64_t>(n, 1) * sizeof(T), std::align_val_t(64))));
}

struct Strip {         // of kStrip pairs, the last one of fewer
  int64_t begin, end;  // rows its vectors may differ from zero in, multiples of 8
  double residual;
  double* z;
};

class Vectors {
 public:
  Vectors(const EigenKernels& kernels, const Spectrum& spectrum, int64_t n, const double* diagonal,
          const double* off_diagonal, double orthogonal)
      : kernels_(kernels), spectrum_(spectrum), pairs_(spectrum.pairs()), n_(n), d_(diagonal), e_(off_diagonal),
        orthogonal_(orthogonal) {}

  // Their eigenvectors of T. False if they are not as good as they must be.
  bool find() {
    const int64_t rows = padded<double>(n_), count = (pairs_.size() + kStrip - 1) / kStrip;
    memory_ = allocate<double>(count * rows * kStrip);
    scratch_ = allocate<double>(3 * rows * kStrip);
    std::memset(memory_.get(), 0, count * rows * kStrip * sizeof(double));
    for (int64_t s = 0; s < count; ++s) {
      strips_.push_back({0, 0, 0, memory_.get() + s * rows * kStrip});
      fill(s);
      if (!orthogonalize(s)) return false;
    }
    return true;
  }

  double* strip(int64_t s) { return strips_[s].z; }

 private:
  int64_t used(int64_t s) const { return std::min<int64_t>(kStrip, pairs_.size() - s * kStrip); }

  // Eigenvectors of a strip, each block's for itself.
  void fill(int64_t s) {
    Strip& strip = strips_[s];
    const int64_t first = s * kStrip, last = first + used(s) - 1;
    const Block &top = spectrum_.block_of(first), &bottom = spectrum_.block_of(last);
    strip.begin = top.begin / 8 * 8;
    strip.end = padded<double>(bottom.begin + bottom.size);
    for (int64_t at = first; at <= last;) {
      const int64_t b = pairs_[at].block;
      int64_t end = at;
      while (end <= last && pairs_[end].block == b) ++end;
      const Block& block = spectrum_.block_of(at);
      double lambda[kStrip];
      for (int i = 0; i < kStrip; ++i) lambda[i] = pairs_[std::min(at + i, end - 1)].value;
      double* z = scratch_.get();
      double* scratch = z + padded<double>(n_) * kStrip;
      kernels_.twisted_vectors(d_ + block.begin, e_ + block.begin, block.size, lambda, z, scratch);
      for (int64_t i = 0; i < block.size; ++i)
        std::copy_n(z + i * kStrip, end - at, strip.z + (block.begin + i) * kStrip + at - first);
      at = end;
    }
    strip.residual = residual_of(s);
  }

  // The largest residual of a strip's vectors.
  double residual_of(int64_t s) const {
    const Strip& strip = strips_[s];
    double lambda[kStrip] = {}, norms[kStrip], worst = 0;
    for (int64_t i = 0; i < used(s); ++i) lambda[i] = pairs_[s * kStrip + i].value;
    kernels_.residuals(d_ + strip.begin, e_ + strip.begin, std::min(strip.end, n_) - strip.begin, lambda,
                       strip.z + strip.begin * kStrip, norms);
    for (int64_t i = 0; i < used(s); ++i) worst = norms[i] > worst ? norms[i] : worst;
    const bool finite = std::all_of(norms, norms + used(s), [](double norm) { return norm <= DBL_MAX; });
    return finite ? worst : INFINITY;
  }

  // The strips before s whose vectors may not be orthogonal to those of s.
  std::vector<int64_t> neighbours(int64_t s) const {
    std::vector<int64_t> close;
    const Pair& top = pairs_[s * kStrip];
    for (int64_t t = s - 1; t >= 0; --t) {
      const Pair& other = pairs_[t * kStrip + kStrip - 1];
      if (other.block != top.block) break;
      const double residuals = strips_[s].residual + strips_[t].residual + 2 * kEps * spectrum_.norm();
      if (!((other.value - top.value) * orthogonal_ > residuals)) close.push_back(t);
    }
    return close;
  }

  // Block Gram-Schmidt of strip s against its neighbours, and Cholesky QR within it; again where that changed much.
  // Vectors that depend on those before them are replaced by inverse iteration.
  bool orthogonalize(int64_t s) {
    Strip& strip = strips_[s];
    const int64_t rows = strip.end - strip.begin;
    double* vectors = strip.z + strip.begin * kStrip;
    std::vector<int64_t> close = neighbours(s);
    for (int pass = 0; pass < kPasses; ++pass) {
      double product[kStrip * kStrip], inverse[kStrip * kStrip];
      bool dependent[kStrip] = {};
      double worst = project(s, close);
      kernels_.gram(vectors, vectors, rows, product);
      worst = std::max(worst, invert_cholesky(product, used(s), inverse, dependent));
      kernels_.multiply(inverse, rows, vectors);
      if (std::any_of(dependent, dependent + kStrip, [](bool d) { return d; })) {
        replace_dependent(s, close, dependent);
        continue;
      }
      strip.residual = residual_of(s);
      const size_t before = close.size();
      close = neighbours(s);  // with larger residuals there are more
      if (worst < kChanged && close.size() <= before) return strip.residual <= kResidual * spectrum_.norm();
    }
    return false;
  }

  // Strip s -= Z Zᵀ strip s for the strips Z before it. Returns the largest element of Zᵀ strip s.
  double project(int64_t s, const std::vector<int64_t>& close) {
    const Strip& strip = strips_[s];
    double product[kStrip * kStrip], worst = 0;
    for (const int64_t t : close) {
      // Rows where both may differ from zero.
      const int64_t begin = std::max(strip.begin, strips_[t].begin), end = std::min(strip.end, strips_[t].end);
      const double* z = strips_[t].z + begin * kStrip;
      double* vectors = strip.z + begin * kStrip;
      kernels_.gram(z, vectors, end - begin, product);
      for (const double p : product) worst = std::max(worst, std::fabs(p));
      kernels_.subtract(z, product, end - begin, vectors);
    }
    return worst;
  }

  // Replaces dependent vectors: two steps of inverse iteration from random numbers that are clear of
  // the strips before. The next pass leaves their new part.
  void replace_dependent(int64_t s, const std::vector<int64_t>& close, const bool* dependent) {
    const Strip& strip = strips_[s];
    for (int column = 0; column < kStrip; ++column) {
      if (!dependent[column]) continue;
      const Block& block = spectrum_.block_of(s * kStrip + column);
      uint64_t state = 0x9e3779b97f4a7c15 * ++drawn_;
      for (int64_t i = block.begin; i < block.begin + block.size; ++i) {
        state = state * 6364136223846793005 + 1442695040888963407;
        strip.z[i * kStrip + column] = static_cast<double>(state >> 11) * 0x1p-53 - 0.5;
      }
    }
    project(s, close);
    for (int column = 0; column < kStrip; ++column) {
      if (!dependent[column]) continue;
      const Block& block = spectrum_.block_of(s * kStrip + column);
      double* z = strip.z + block.begin * kStrip + column;
      std::vector<double> x(block.size);
      for (int64_t i = 0; i < block.size; ++i) x[i] = z[i * kStrip];
      for (int step = 0; step < 2; ++step) {
        spectrum_.iterate(s * kStrip + column, x.data());
        double most = 0, squares = 0;
        for (const double v : x) most = std::max(most, std::fabs(v));
        for (double& v : x) {
          v /= most;
          squares += v * v;
        }
        for (double& v : x) v /= std::sqrt(squares);
      }
      for (int64_t i = 0; i < block.size; ++i) z[i * kStrip] = x[i];
    }
  }

  // R⁻¹ of gram = RᵀR, without its dependent columns, which become zero. Returns gram's largest element off the
  // diagonal.
  static double invert_cholesky(double* gram, int64_t n, double* inverse, bool* dependent) {
    double worst = 0;
    std::fill(inverse, inverse + kStrip * kStrip, 0.0);
    double r[kStrip][kStrip] = {};
    for (int j = 0; j < n; ++j) {
      double left = gram[j * kStrip + j];
      for (int i = 0; i < j; ++i) {
        const double g = gram[i * kStrip + j];
        worst = std::max(worst, std::fabs(g));
        if (dependent[i]) continue;
        double x = g;
        for (int p = 0; p < i; ++p) x -= r[p][i] * r[p][j];
        r[i][j] = x / r[i][i];
        left -= r[i][j] * r[i][j];
      }
      dependent[j] = !(left > kDependent);
      if (dependent[j]) {
        for (int i = 0; i < j; ++i) r[i][j] = 0;
        continue;
      }
      r[j][j] = std::sqrt(left);
      inverse[j * kStrip + j] = 1 / r[j][j];
      for (int i = j - 1; i >= 0; --i) {
        double x = 0;
        for (int p = i; p < j; ++p) x -= inverse[i * kStrip + p] * r[p][j];
        inverse[i * kStrip + j] = x / r[j][j];
      }
    }
    return worst;
  }

  const EigenKernels& kernels_;
  const Spectrum& spectrum_;
  const std::vector<Pair>& pairs_;
  int64_t n_;
  const double *d_, *e_;
  double orthogonal_;
  std::vector<Strip> strips_;
  Buffer<double> memory_, scratch_;
  uint64_t drawn_ = 0;
};

}  // namespace

template <class T>
EigenStatus symmetric_eigen(const T* a, int64_t n, int64_t k, T* values, T* vectors, int threads) {
  if (n == 0 || k == 0) return EigenStatus::ok;
  const EigenKernels& kernels = cpu::kernels().eigen;
  const ReductionKernels<T>& reduction = kernels.of<T>();
  const int64_t panels = tiles_in<T>(n), size = tile_offset<T>(panels, panels);
  const Buffer<double> diagonal = allocate<double>(2 * n);
  const Buffer<T> factors = allocate<T>(factors_size(n)), reflectors = allocate<T>(reflectors_size<T>(n));
  const Tridiagonal<T> reduced{diagonal.get(), diagonal.get() + n, reflectors.get(), factors.get()};
  int exponent = 0;
  {
    const Buffer<T> tiles = allocate<T>(size), scratch = allocate<T>(tridiagonalize_scratch<T>(n));
    const T largest = reduction.pack(a, n, tiles.get());
    if (!std::isfinite(largest)) return EigenStatus::not_finite;
    if (largest > 0) std::frexp(largest, &exponent);
    exponent = std::max(exponent, kLeastExponent<T>);
    const T scale = std::ldexp(T(1), -exponent);
    for (int64_t i = 0; i < size; ++i) tiles[i] *= scale;
    reduction.tridiagonalize(tiles.get(), n, reduced, scratch.get());
  }
  for (int64_t i = 0; i < n; ++i) reduced.diagonal[i] += 0.0;  // no -0, which Sturm counts take for positive
  const Spectrum spectrum(kernels, n, reduced.diagonal, reduced.off_diagonal, k);
  if (static_cast<int64_t>(spectrum.pairs().size()) != k) return EigenStatus::inaccurate;
  for (const Pair& pair : spectrum.pairs()) values[pair.rank] = static_cast<T>(std::ldexp(pair.value, exponent));
  Vectors vectors_of_t(kernels, spectrum, n, reduced.diagonal, reduced.off_diagonal, kOrthogonal<T>);
  if (!vectors_of_t.find()) return EigenStatus::inaccurate;
  const auto cleared = [n] {
    Buffer<T> columns = allocate<T>(padded<T>(n) * kColumns<T>);
    std::fill_n(columns.get(), padded<T>(n) * kColumns<T>, T(0));
    return columns;
  };
  parallel_for((k + kColumns<T> - 1) / kColumns<T>, threads, cleared, [&](int64_t group, Buffer<T>& columns) {
    const int64_t first = group * kColumns<T>, n_columns = std::min<int64_t>(kColumns<T>, k - first);
    for (int64_t at = first; at < first + n_columns; at += kStrip) {
      const double* z = vectors_of_t.strip(at / kStrip);
      T* to = columns.get() + at - first;
      for (int64_t i = 0; i < n; ++i)
        for (int c = 0; c < kStrip; ++c) to[i * kColumns<T> + c] = static_cast<T>(z[i * kStrip + c]);
    }
    reduction.back_transform(reduced, n, columns.get());
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = 0; c < n_columns; ++c)
        vectors[i * k + spectrum.pairs()[first + c].rank] = columns[i * kColumns<T> + c];
  });
  return EigenStatus::ok;
}
template EigenStatus symmetric_eigen(const float*, int64_t, int64_t, float*, float*, int);
template EigenStatus symmetric_eigen(const double*, int64_t, int64_t, double*, double*, int);

}  // namespace resm::cpu
