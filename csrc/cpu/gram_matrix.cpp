// gram_matrix: pieces of rows are widened to double panel by panel; products of panels are computed up to the diagonal.
#include "cpu/chunks.h"

namespace resm::cpu {
namespace {

constexpr int64_t kPiece = 96;        // rows widened at a time: a strip's panels of them stay in the cache
constexpr int64_t kStripPanels = 16;  // panels of a strip, one to a task: its sums stay in the cache
constexpr int64_t kMostParts = 8;     // the most parts of the rows, which are summed separately
constexpr int64_t kFewestPieces = 4;  // of a part: with fewer, adding up the parts would take noticeable time
constexpr int64_t kSquare = int64_t(kGramPanel) * kGramPanel;

// The panels begin … end of columns. For each of them in order, the sums of its products with all panels up to itself.
struct Strip {
  int64_t begin, end;

  int64_t squares_before(int64_t panel) const { return panel * (panel + 1) / 2 - begin * (begin + 1) / 2; }
  int64_t squares() const { return squares_before(end); }
};

class Gram {
 public:
  Gram(const float* x, int64_t n, int64_t columns)
      : x_(x), n_(n), columns_(columns), panels_(ceil_div(columns, kGramPanel)),
        strips_(ceil_div(panels_, kStripPanels)), pieces_(ceil_div(n, kPiece)),
        parts_(parts_for(pieces_, kMostParts, kFewestPieces)) {}

  void run(double* g, int threads) const {
    std::fill(g, g + columns_ * columns_, 0.0);
    struct Panels {
      Blocks<double> wide, sums;
    };
    Turns turns;
    const Strip last = strip(strips_ - 1);
    parallel_for(
        strips_ * parts_, threads,
        [&] {
          return Panels{Blocks<double>(blocks_for(panels_ * kPiece * kGramPanel)),
                        Blocks<double>(blocks_for(last.squares() * kSquare))};
        },
        [&](int64_t, Panels& memory) {
          const int64_t task = turns.begin(), part = task % parts_;
          const Strip s = strip(strips_ - 1 - task / parts_);  // the longest first
          std::fill_n(memory.sums[0], s.squares() * kSquare, 0.0);
          for (int64_t p = pieces_ * part / parts_; p < pieces_ * (part + 1) / parts_; ++p)
            add_piece(p * kPiece, s, memory.wide[0], memory.sums[0]);
          turns.when_due(task, [&] { add_to(g, s, memory.sums[0]); });
        });
  }

 private:
  // Evenly shared out.
  Strip strip(int64_t i) const { return {panels_ * i / strips_, panels_ * (i + 1) / strips_}; }
  int width_of(int64_t panel) const {
    return static_cast<int>(std::min<int64_t>(kGramPanel, columns_ - panel * kGramPanel));
  }

  void add_piece(int64_t row, const Strip& s, double* wide, double* sums) const {
    const ProductKernels& k = kernels().products;
    const int rows = static_cast<int>(std::min(kPiece, n_ - row));
    for (int64_t p = 0; p < s.end; ++p)
      k.widen_panel(x_ + row * columns_ + p * kGramPanel, columns_, rows, width_of(p), wide + p * kPiece * kGramPanel);
    for (int64_t j = s.begin; j < s.end; ++j)
      for (int64_t i = 0; i <= j; ++i)
        k.add_panel_gram(wide + i * kPiece * kGramPanel, wide + j * kPiece * kGramPanel, rows,
                         sums + (s.squares_before(j) + i) * kSquare);
  }

  // Adds a strip's sums on both sides of the diagonal.
  void add_to(double* g, const Strip& s, const double* sums) const {
    for (int64_t j = s.begin; j < s.end; ++j)
      for (int64_t i = 0; i <= j; ++i) {
        const double* from = sums + (s.squares_before(j) + i) * kSquare;
        for (int a = 0; a < width_of(i); ++a)
          for (int b = 0; b < width_of(j); ++b) {
            const int64_t row = i * kGramPanel + a, column = j * kGramPanel + b;
            if (row > column) continue;
            g[row * columns_ + column] += from[a * kGramPanel + b];
            if (row < column) g[column * columns_ + row] = g[row * columns_ + column];
          }
      }
  }

  const float* x_;
  int64_t n_, columns_, panels_, strips_, pieces_, parts_;
};

}  // namespace

void gram_matrix(const float* x, int64_t n, int64_t columns, double* g, int threads) {
  if (columns == 0) return;
  Gram(x, n, columns).run(g, threads);
}

}  // namespace resm::cpu
