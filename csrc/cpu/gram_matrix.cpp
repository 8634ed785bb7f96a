// gram_matrix: columns are cut into panels, and the products of two panels are a square. The sums of a block of squares
// stay in the cache while pieces of rows are widened to double and multiplied. One block after another goes by all rows.
#include <algorithm>
#include <vector>

#include "cpu/chunks.h"

namespace resm::cpu {
namespace {

constexpr int64_t kPiece = 96;        // rows widened at a time, whose products are added up before a square takes them
constexpr int64_t kAcross = 16;       // panels of a block's columns: widened, they stay in the second cache
constexpr int64_t kDown = 32;         // panels of a block's rows: its squares stay in the third cache
constexpr int64_t kMostParts = 8;     // the most parts of the rows, which are summed separately
constexpr int64_t kFewestPieces = 4;  // of a part: with fewer, adding up the parts would take noticeable time
constexpr int64_t kSquare = int64_t(kGramPanel) * kGramPanel;
constexpr int64_t kWide = kPiece * kGramPanel;

struct Matrix {
  const float* data;
  int64_t columns;

  int64_t panels() const { return ceil_div(columns, kGramPanel); }
  int width_of(int64_t panel) const {
    return static_cast<int>(std::min<int64_t>(kGramPanel, columns - panel * kGramPanel));
  }
  void widen(int64_t row, int rows, int64_t panel, double* to) const {
    kernels().products.widen_panel(data + row * columns + panel * kGramPanel, columns, rows, width_of(panel), to);
  }
};

// The squares of x's panels i … i_end and y's panels j … j_end; of a symmetric product those with i <= j.
struct Block {
  int64_t i, i_end, j, j_end;

  double* square(double* sums, int64_t at_i, int64_t at_j) const {
    return sums + ((at_j - j) * (i_end - i) + at_i - i) * kSquare;
  }
  int64_t area() const { return (i_end - i) * (j_end - j); }
};

class Gram {
 public:
  Gram(Matrix x, Matrix y, bool is_symmetric, int64_t n)
      : x_(x), y_(y), is_symmetric_(is_symmetric), n_(n), pieces_(ceil_div(n, kPiece)),
        parts_(parts_for(pieces_, kMostParts, kFewestPieces)) {
    const int64_t strips = ceil_div(y.panels(), kAcross);
    for (int64_t s = 0; s < strips; ++s) {
      const int64_t j = y.panels() * s / strips, j_end = y.panels() * (s + 1) / strips;
      const int64_t rows = is_symmetric ? j_end : x.panels(), count = ceil_div(rows, kDown);
      for (int64_t b = 0; b < count; ++b) blocks_.push_back({rows * b / count, rows * (b + 1) / count, j, j_end});
    }
    // The longest first: the threads then end at about the same time, and wait for their turns least.
    std::stable_sort(blocks_.begin(), blocks_.end(),
                     [&](const Block& a, const Block& b) { return squares(a) > squares(b); });
  }

  void run(double* g, int threads) const {
    int64_t most = 0;
    for (const Block& block : blocks_) most = std::max(most, block.area());
    Turns turns;
    parallel_for(
        static_cast<int64_t>(blocks_.size()) * parts_, threads,
        [&] { return ThreadMemory<double>((kAcross + 1) * kWide + most * kSquare); },
        [&](int64_t, ThreadMemory<double>& memory) {
          const int64_t task = turns.begin(), part = task % parts_;
          const Block& block = blocks_[task / parts_];
          double *wide = memory.data(), *sums = wide + (kAcross + 1) * kWide;
          std::fill_n(sums, block.area() * kSquare, 0.0);
          for (int64_t p = pieces_ * part / parts_; p < pieces_ * (part + 1) / parts_; ++p)
            add_piece(p * kPiece, block, wide, sums);
          turns.when_due(task, [&] { add_to(g, block, part, sums); });
        });
  }

 private:
  int64_t first_panel(const Block& block, int64_t i) const { return is_symmetric_ ? std::max(i, block.j) : block.j; }
  int64_t squares(const Block& block) const {
    int64_t sum = 0;
    for (int64_t i = block.i; i < block.i_end; ++i) sum += block.j_end - first_panel(block, i);
    return sum;
  }

  void add_piece(int64_t row, const Block& block, double* wide, double* sums) const {
    const int rows = static_cast<int>(std::min(kPiece, n_ - row));
    double* of_x = wide + kAcross * kWide;
    for (int64_t j = block.j; j < block.j_end; ++j) y_.widen(row, rows, j, wide + (j - block.j) * kWide);
    for (int64_t i = block.i; i < block.i_end; ++i) {
      const bool is_at_hand = is_symmetric_ && i >= block.j;
      if (!is_at_hand) x_.widen(row, rows, i, of_x);
      const double* left = is_at_hand ? wide + (i - block.j) * kWide : of_x;
      for (int64_t j = first_panel(block, i); j < block.j_end; ++j)
        kernels().products.add_panel_gram(left, wide + (j - block.j) * kWide, rows, block.square(sums, i, j));
    }
  }

  // Adds a part's sums; the last part also mirrors those of a symmetric product.
  void add_to(double* g, const Block& block, int64_t part, double* sums) const {
    for (int64_t i = block.i; i < block.i_end; ++i)
      for (int64_t j = first_panel(block, i); j < block.j_end; ++j) {
        double* square = block.square(sums, i, j);
        const int height = x_.width_of(i), width = y_.width_of(j);
        double* corner = g + i * kGramPanel * y_.columns + j * kGramPanel;
        for (int a = 0; a < height; ++a) {
          double* __restrict from = square + a * kGramPanel, * __restrict to = corner + a * y_.columns;
          if (part > 0)
            for (int b = 0; b < width; ++b) from[b] = to[b] + from[b];
          std::copy_n(from, width, to);
        }
        if (!is_symmetric_ || part < parts_ - 1) continue;
        corner = g + j * kGramPanel * y_.columns + i * kGramPanel;
        for (int b = 0; b < width; ++b)
          for (int a = 0; a < (i == j ? b : height); ++a) corner[b * y_.columns + a] = square[a * kGramPanel + b];
      }
  }

  Matrix x_, y_;
  bool is_symmetric_;
  int64_t n_, pieces_, parts_;
  std::vector<Block> blocks_;
};

}  // namespace

void gram_matrix(const float* x, int64_t n, int64_t columns, double* g, int threads) {
  if (columns == 0) return;
  Gram({x, columns}, {x, columns}, true, n).run(g, threads);
}

void gram_matrix(const float* x, const float* y, int64_t n, int64_t columns, int64_t y_columns, double* g,
                 int threads) {
  if (columns == 0 || y_columns == 0) return;
  Gram({x, columns}, {y, y_columns}, false, n).run(g, threads);
}

}  // namespace resm::cpu
