// sketch: strips of Δ, formed where they are used, times panels of the random matrix, drawn once for all of them.
#include "cpu/chunks.h"

namespace resm::cpu {
namespace {

constexpr int64_t kRandomBytes = int64_t(8) << 20;  // of the random matrix that exist at a time, but for wide ones
constexpr int64_t kPairsAtOnce = 4096;
constexpr int64_t kTaskRows = 4 * kStripRows;

// Rows begin … begin + n of Ω in panels of kPanel columns, those of a panel together.
class RandomPanels {
 public:
  RandomPanels(int64_t rows, int64_t columns, uint64_t seed, int64_t first_column)
      : rows_(rows), columns_(columns), seed_(seed), first_(first_column),
        data_(blocks_for(rows * ceil_div(columns, kPanel) * kPanel)) {
    if (columns % kPanel != 0) std::fill_n(data_[0] + columns / kPanel * rows * kPanel, rows * kPanel, 0.0f);
  }

  float* at(int64_t panel, int64_t row) const { return data_[0] + (panel * rows_ + row) * kPanel; }

  void draw(int64_t begin, int64_t n, int threads) {
    const int64_t shift = first_ % 2, pairs = (shift + columns_ + 1) / 2;  // a pair may begin before first_
    const int64_t run = std::max<int64_t>(kPairsAtOnce / pairs, 1);
    parallel_for(ceil_div(n, run), threads, [&] { return Blocks<float>(blocks_for(2 * run * pairs)); },
                 [&](int64_t i, Blocks<float>& drawn) {
                   const int64_t row = i * run, count = std::min(run, n - row);
                   kernels().products.random_rows(seed_, begin + row, static_cast<int>(count),
                                                  static_cast<uint32_t>(first_ / 2), pairs, drawn[0]);
                   for (int64_t r = 0; r < count; ++r)
                     for (int64_t c = 0; c < columns_; c += kPanel)
                       std::copy_n(drawn[0] + 2 * r * pairs + shift + c, std::min<int64_t>(kPanel, columns_ - c),
                                   at(c / kPanel, row + r));
                 });
  }

 private:
  int64_t rows_, columns_;
  uint64_t seed_;
  int64_t first_;
  Blocks<float> data_;
};

}  // namespace

void sketch(const DeltaMatrix& delta, int64_t columns, uint64_t seed, int64_t first_column, float* y, int threads) {
  std::fill(y, y + delta.m * columns, 0.0f);
  if (delta.m == 0 || delta.n == 0 || columns == 0) return;
  const ProductKernels& k = kernels().products;
  const int64_t panels = ceil_div(columns, kPanel), fitting = kRandomBytes / (panels * kPanel * sizeof(float));
  const int64_t span = std::min(std::max<int64_t>(fitting / kDepth, 1) * kDepth, ceil_div(delta.n, kDepth) * kDepth);
  RandomPanels omega(span, columns, seed, first_column);
  // How rows are shared out changes no bit: each output adds up its own row, in order.
  const int64_t strips = ceil_div(delta.m, kStripRows);
  const int64_t task = std::clamp(strips / (4 * threads) * kStripRows, int64_t(kStripRows), kTaskRows);
  for (int64_t start = 0; start < delta.n; start += span) {
    const int64_t width = std::min(span, delta.n - start);
    omega.draw(start, width, threads);
    parallel_for(ceil_div(delta.m, task), threads,
                 [] {
                   Blocks<float> strip(blocks_for(kStripRows * kDepth));
                   std::fill(strip[0], strip[0] + kStripRows * kDepth, 0.0f);
                   return strip;
                 },
                 [&](int64_t t, Blocks<float>& strip) {
                   const int64_t end = std::min((t + 1) * task, delta.m);
                   for (int64_t at = 0; at < width; at += kDepth)
                     for (int64_t row = t * task; row < end; row += kStripRows) {
                       const int rows = static_cast<int>(std::min<int64_t>(kStripRows, end - row));
                       const int depth = static_cast<int>(std::min<int64_t>(kDepth, width - at));
                       k.delta_tile({delta.base, delta.expert, row * delta.n + start + at, delta.n, rows, depth},
                                    strip[0], kDepth);
                       for (int64_t p = 0; p < panels; ++p)
                         k.add_sketch(strip[0], rows, omega.at(p, at),
                                      static_cast<int>(std::min<int64_t>(kPanel, columns - p * kPanel)), depth,
                                      y + row * columns + p * kPanel, columns);
                     }
                 });
  }
}

}  // namespace resm::cpu
