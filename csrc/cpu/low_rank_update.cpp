// low_rank_update: works on a span of columns of L·Rᵀ at a time, which is in the cache from its first product to its sum
// with the base.
#include "cpu/chunks.h"

namespace resm::cpu {
namespace {

constexpr int kRowGroup = 192;       // rows whose sums stay in the cache while the depth is gone through
constexpr int64_t kTaskRows = 1024;  // of a task: for so many a span of R is packed once
constexpr int kSpanPanels = 4;       // panels of a span

template <class T>
class Update {
 public:
  Update(const LowRank& update, const Array& base, const Array& out, double scale)
      : u_(update), base_(base), out_(out), scale_(static_cast<T>(scale)), left_(static_cast<const T*>(u_.left)),
        right_(static_cast<const T*>(u_.right)), depths_(std::max<int64_t>(ceil_div(u_.k, kDepth), 1)) {}

  void run(int threads) const {
    // How outputs are shared out changes no bit: each adds up its buffers products, in order.
    const int64_t row_tasks = ceil_div(u_.m, kTaskRows);
    parallel_for(
        row_tasks * ceil_div(u_.n, kSpan), threads, [&] { return UpdateBuffers(depths_); },
        [&](int64_t task, UpdateBuffers& buffers) {
          const int64_t column = task / row_tasks * kSpan, row = task % row_tasks * kTaskRows;
          const int columns = static_cast<int>(std::min<int64_t>(kSpan, u_.n - column));
          pack_right(column, columns, buffers.right[0]);
          for (int64_t r = row; r < std::min(row + kTaskRows, u_.m); r += kRowGroup)
            add_group(r, static_cast<int>(std::min<int64_t>(kRowGroup, std::min(row + kTaskRows, u_.m) - r)), column,
                      columns, buffers);
        });
  }

 private:
  static constexpr int kPanel = kUpdatePanel<T>, kSpan = kSpanPanels * kPanel, kDepth = kUpdateDepth<T>;
  static constexpr int kStrip = kTile<T>;

  struct UpdateBuffers {
    Blocks<T> right, left, sums, rows;
    explicit UpdateBuffers(int64_t depths)
        : right(blocks_for(depths * kDepth * kSpan)), left(blocks_for(kStrip * kDepth)),
          sums(blocks_for(kRowGroup * kSpan)), rows(1) {}
  };

  int depth_of(int64_t d) const { return static_cast<int>(std::min<int64_t>(kDepth, u_.k - d * kDepth)); }

  // Columns of Rᵀ: panel after panel of each depth, zeros beyond the last column.
  void pack_right(int64_t column, int columns, T* to) const {
    for (int64_t d = 0; d < depths_; ++d)
      for (int p = 0; p < kSpanPanels; ++p, to += kDepth * kPanel) {
        const int width = std::clamp(columns - p * kPanel, 0, kPanel);
        if (width < kPanel) std::fill_n(to, kDepth * kPanel, T(0));
        const T* from = right_ + (column + p * kPanel) * u_.right_row + d * kDepth * u_.right_step;
        if (u_.right_row == 1) {
          for (int k = 0; k < depth_of(d); ++k) std::copy_n(from + k * u_.right_step, width, to + k * kPanel);
        } else {
          for (int c = 0; c < width; ++c)
            for (int k = 0; k < depth_of(d); ++k) to[k * kPanel + c] = from[c * u_.right_row + k * u_.right_step];
        }
      }
  }

  void pack_left(int64_t row, int rows, int64_t d, T* to) const {
    const T* from = left_ + row * u_.k + d * kDepth;
    for (int r = 0; r < kStrip; ++r, to += kDepth) {
      if (r < rows)
        std::copy_n(from + r * u_.k, depth_of(d), to);
      else
        std::fill_n(to, kDepth, T(0));
    }
  }

  void add_group(int64_t row, int rows, int64_t column, int columns, UpdateBuffers& buffers) const {
    const BlockKernels<T>& k = kernels().of<T>();
    for (int64_t d = 0; d < depths_; ++d)
      for (int r = 0; r < rows; r += kStrip) {
        pack_left(row + r, std::min(kStrip, rows - r), d, buffers.left[0]);
        for (int p = 0; p * kPanel < columns; ++p)
          k.add_update(buffers.left[0], buffers.right[0] + (d * kSpanPanels + p) * kDepth * kPanel, depth_of(d), d == 0,
                       buffers.sums[0] + r * kSpan + p * kPanel, kSpan);
      }
    for (int r = 0; r < rows; ++r) {
      const int64_t begin = (row + r) * u_.n + column;
      T* merged = buffers.rows[0];
      k.load(base_, begin, columns, merged);
      k.add_scaled(buffers.sums[0] + r * kSpan, columns, scale_, merged);
      k.store(merged, begin, columns, out_);
    }
  }

  LowRank u_;
  Array base_, out_;
  T scale_;
  const T *left_, *right_;
  int64_t depths_;
};

}  // namespace

void low_rank_update(const Array& base, const LowRank& update, double scale, const Array& out, int threads) {
  if (update.m == 0 || update.n == 0) return;
  if (update.in_double)
    Update<double>(update, base, out, scale).run(threads);
  else
    Update<float>(update, base, out, scale).run(threads);
}

}  // namespace resm::cpu
