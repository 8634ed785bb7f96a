// gram_product: each panel of rows of Δ is formed block by block and multiplied by x; while it is in the cache, its
// transpose is multiplied by the rows of y that result.
#include "cpu/chunks.h"

namespace resm::cpu {
namespace {

constexpr int64_t kMostParts = 16;    // the most parts in which z is summed
constexpr int64_t kFewestPanels = 5;  // of rows in a part; with fewer, adding up the parts would take noticeable time
constexpr int64_t kSliceUnits = 24;   // a task works on this many units of columns, whose x and z fit the cache
constexpr int64_t kBlockSize = kGramRows * kGramColumns;

// The columns of x, y and z in units, shared out evenly among panels by pairs, which fill whole registers. The units of a
// panel lie together in memory.
struct UnitPanels {
  int64_t columns, units, count;

  explicit UnitPanels(int64_t c) : columns(c), units(ceil_div(c, kUnit)), count(ceil_div(units, kGramUnits)) {}
  int64_t first(int64_t panel) const { return std::min(ceil_div(units, 2) * panel / count * 2, units); }
  int units_of(int64_t panel) const { return static_cast<int>(first(panel + 1) - first(panel)); }
  int64_t first_column(int64_t panel) const { return first(panel) * kUnit; }
  int64_t columns_of(int64_t panel) const { return std::min(first(panel + 1) * kUnit, columns) - first_column(panel); }
};

// A matrix of `rows` rows, stored panel after panel from panel `begin` on.
template <class T>
struct Packed {
  const UnitPanels& panels;
  int64_t begin, rows;
  T* data;

  T* at(int64_t panel, int64_t row) const {
    return data + ((panels.first(panel) - panels.first(begin)) * rows + row * panels.units_of(panel)) * kUnit;
  }
};

BlockAhead::Part part_ahead(const Array& from, int64_t n, int64_t row, int64_t column) {
  const int64_t size = item_size(from.dtype), columns = std::min<int64_t>(kGramColumns, n - column);
  return {reinterpret_cast<uintptr_t>(from.data) + (row * n + column) * size, n * size,
          static_cast<int>(ceil_div(columns * size, 64))};
}

// The block after that of `row` and `column`: its right neighbour, or the leftmost block of the next rows.
BlockAhead block_after(const DeltaMatrix& delta, int64_t row, int64_t column) {
  column += kGramColumns;
  if (column >= delta.n) row += kGramRows, column = 0;
  const int64_t rows = std::clamp<int64_t>(delta.m - row, 0, kGramRows);
  if (rows == 0) return {};
  return {{delta.base == nullptr ? BlockAhead::Part{} : part_ahead(*delta.base, delta.n, row, column),
           part_ahead(*delta.expert, delta.n, row, column)},
          static_cast<int>(rows)};
}

void put(const float* __restrict from, int64_t n, bool fresh, float* __restrict to) {
  if (fresh) {
    std::copy_n(from, n, to);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] += from[i];
  }
}

// The memory that a thread works in: a panel of Δ, its rows of y, and a part's sums of z. Elements beyond their rows and
// columns are read and multiplied, but never used.
struct PassBuffers {
  ThreadMemory<float> memory;
  float *delta, *y, *z;
};

class Pass {
 public:
  Pass(const DeltaMatrix& delta, const float* x, int64_t columns)
      : delta_(delta), panels_(columns), blocks_(ceil_div(delta.n, kGramColumns)),
        slices_(std::max<int64_t>(ceil_div(panels_.units, kSliceUnits), 1)),
        as_is_(panels_.count == 1 && columns % kUnit == 0),
        copy_(blocks_for(as_is_ ? 0 : delta.n * panels_.units * kUnit)),
        x_{panels_, 0, delta.n, as_is_ ? x : copy_[0]} {}

  void pack(const float* x, int threads) const {
    if (as_is_) return;
    const Packed<float> to{panels_, 0, delta_.n, copy_[0]};
    parallel_for(
        blocks_, threads, [] { return 0; },
        [&](int64_t b, int) {
          for (int64_t p = 0; p < panels_.count; ++p) {
            const int64_t columns = panels_.columns_of(p), padded = panels_.units_of(p) * kUnit;
            for (int64_t row = b * kGramColumns; row < b * kGramColumns + width_of(b); ++row) {
              std::copy_n(x + row * panels_.columns + panels_.first_column(p), columns, to.at(p, row));
              std::fill(to.at(p, row) + columns, to.at(p, row) + padded, 0.0f);
            }
          }
        });
  }

  void run(const GramProductResult& result, int threads) const {
    const int64_t row_panels = ceil_div(delta_.m, kGramRows), parts = parts_for(row_panels, kMostParts, kFewestPanels);
    Turns turns;
    parallel_for(
        slices_ * parts, threads, [&] { return make_buffers(); },
        [&](int64_t, PassBuffers& buffers) {
          const int64_t task = turns.begin(), slice = task / parts, part = task % parts;
          const int64_t first = panels_.count * slice / slices_, last = panels_.count * (slice + 1) / slices_;
          const int64_t begin = row_panels * part / parts, end = row_panels * (part + 1) / parts;
          double squares = 0.0;
          for (int64_t panel = begin; panel < end; ++panel) {
            squares += add_images(panel * kGramRows, first, last, buffers, result.y);
            add_preimages(panel * kGramRows, first, last, panel == begin, buffers);
          }
          turns.when_due(task, [&] {
            if (slice == 0) *result.energy += squares;
            add_to(result.z, first, last, part == 0, buffers);
          });
        });
  }

 private:
  int width_of(int64_t block) const {
    return static_cast<int>(std::min<int64_t>(kGramColumns, delta_.n - block * kGramColumns));
  }
  int height_of(int64_t row) const { return static_cast<int>(std::min<int64_t>(kGramRows, delta_.m - row)); }
  Packed<float> image(int64_t first, const PassBuffers& buffers) const {
    return {panels_, first, kGramRows, buffers.y};
  }
  Packed<float> sums(int64_t first, const PassBuffers& buffers) const {
    return {panels_, first, blocks_ * kGramColumns, buffers.z};
  }

  PassBuffers make_buffers() const {
    const int64_t widest = ceil_div(panels_.count, slices_) * kGramUnits * kUnit;
    const int64_t deltas = blocks_ * kBlockSize, images = kGramRows * widest;
    ThreadMemory<float> memory(deltas + images + blocks_ * kGramColumns * widest);
    float* at = memory.data();
    // What the last block has beyond n counts as 0 in its energy.
    std::fill(at + deltas - kBlockSize, at + deltas, 0.0f);
    return {std::move(memory), at, at + deltas, at + deltas + images};
  }

  // Forms the panel of Δ that begins at `row`, and its product with panels first … last of x; returns its energy.
  double add_images(int64_t row, int64_t first, int64_t last, const PassBuffers& buffers, float* y) const {
    const ProductKernels& k = kernels().products;
    const Packed<float> into = image(first, buffers);
    const int rows = height_of(row);
    double squares = 0.0;
    for (int64_t b = 0; b < blocks_; ++b) {
      const int64_t column = b * kGramColumns;
      float* block = buffers.delta + b * kBlockSize;
      const bool ahead = first == last;  // there are no products to prefetch in
      k.delta_tile({delta_.base, delta_.expert, row * delta_.n + column, delta_.n, rows, width_of(b), ahead}, block,
                   kGramColumns);
      if (first == 0) squares += k.block_energy(block, rows);
      const BlockAhead next = block_after(delta_, row, column);
      for (int64_t p = first; p < last; ++p)
        k.add_image(block, rows, x_.at(p, column), panels_.units_of(p), width_of(b), b == 0, into.at(p, 0),
                    p == first ? next : BlockAhead{});
    }
    for (int64_t p = first; p < last; ++p)
      for (int r = 0; r < rows; ++r)
        std::copy_n(into.at(p, r), panels_.columns_of(p), y + (row + r) * panels_.columns + panels_.first_column(p));
    return squares;
  }

  void add_preimages(int64_t row, int64_t first, int64_t last, bool fresh, const PassBuffers& buffers) const {
    for (int64_t b = 0; b < blocks_; ++b)
      for (int64_t p = first; p < last; ++p)
        kernels().products.add_preimage(buffers.delta + b * kBlockSize, height_of(row), image(first, buffers).at(p, 0),
                                        panels_.units_of(p), width_of(b), fresh,
                                        sums(first, buffers).at(p, b * kGramColumns));
  }

  void add_to(float* z, int64_t first, int64_t last, bool fresh, const PassBuffers& buffers) const {
    const Packed<float> from = sums(first, buffers);
    if (as_is_) return put(from.data, delta_.n * panels_.columns, fresh, z);
    for (int64_t p = first; p < last; ++p)
      for (int64_t row = 0; row < delta_.n; ++row)
        put(from.at(p, row), panels_.columns_of(p), fresh, z + row * panels_.columns + panels_.first_column(p));
  }

  const DeltaMatrix& delta_;
  UnitPanels panels_;
  int64_t blocks_, slices_;
  bool as_is_;  // x and z are one panel of whole units, as kernels take them
  Blocks<float> copy_;
  Packed<const float> x_;
};

}  // namespace

void gram_product(const DeltaMatrix& delta, const float* x, int64_t columns, const GramProductResult& result,
                  int threads) {
  *result.energy = 0.0;
  if (delta.m == 0 || delta.n == 0) {
    std::fill_n(result.y, delta.m * columns, 0.0f);
    std::fill_n(result.z, delta.n * columns, 0.0f);
    return;
  }
  const Pass pass(delta, x, columns);
  pass.pack(x, threads);
  pass.run(result, threads);
}

}  // namespace resm::cpu
